"""What a guest's init is told and answers besides what every init is; and files over the channel, as any init takes
them where Python has no way to them.
"""

from __future__ import annotations

import struct

from ringfence._value import Value
from ringfence.errors import ProtocolError
from ringfence.wire import frames, messages
from ringfence.wire.frames import Type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "Entry",
    "GuestPlan",
    "parse_clock",
    "parse_denials",
    "parse_entries",
    "parse_ready",
    "put",
    "read",
    "signal",
]


class GuestPlan(messages.Plan):
    """A PLAN with what only a guest takes."""

    def guest(
        self,
        *,
        realtime_ns: int,
        entropy: bytes,
        memory_bytes: int,
        pids: int,
        cpu_ns: int,
        realtime_at_ns: int = 0,
    ) -> None:
        """Limits of 0 are none; `cpu_ns` is the quota in each 100 ms. realtime_at_ns: its
        CLOCK_MONOTONIC when the time was `realtime_ns`; 0 is now.
        """
        self._parts.append(frames.u64(16, realtime_ns) + frames.attribute(17, entropy))
        if realtime_at_ns:
            self._parts.append(frames.u64(20, realtime_at_ns))
        self._parts.append(frames.attribute(18, struct.pack("<QQQ", memory_bytes, pids, cpu_ns)))

    def card(self, mac: bytes, addresses: Sequence[tuple[bytes, bytes]]) -> None:
        """A guest's network card. mac: the gateway's. addresses: (the guest's, the gateway's) of IPv4, and of IPv6."""
        self._parts.append(frames.attribute(24, mac + b"".join(b"".join(pair) for pair in addresses)))


def signal(number: int, *, id: int) -> bytes:
    return frames.encode(Type.SIGNAL, struct.pack("<I", number), id=id)


def put(path: bytes, mode: int, data: bytes, *, id: int) -> Iterable[bytes]:
    """PUT and the DATA frames that follow it, in pieces small enough to queue one by one."""
    yield frames.encode(Type.PUT, frames.string(1, path) + frames.u32(2, mode) + frames.u64(3, len(data)), id=id)
    for at in range(0, len(data), frames.CHUNK):
        yield frames.encode(Type.DATA, data[at : at + frames.CHUNK], id=id)
    yield frames.encode(Type.DATA, id=id)


def read(path: bytes, *, id: int) -> bytes:
    return frames.encode(Type.READ, frames.string(1, path), id=id)


class Entry(Value):
    """A name below the work directory. kind: "f" file, "d" directory, "l" symlink, "o" other."""

    __slots__ = ("kind", "mode", "path", "size_bytes")
    kind: str
    mode: int
    size_bytes: int
    path: bytes

    def __init__(self, *, kind: str, mode: int, size_bytes: int, path: bytes) -> None:
        self._set(kind=kind, mode=mode, size_bytes=size_bytes, path=path)


_DENIAL = struct.Struct("<IIiIQ6Q")
_MOST_DENIALS = 256


def parse_denials(payload: bytes) -> tuple[int, list[tuple[int, int, int | None, int, tuple[int, ...]]]]:
    """A guest's LISTENER: how many were not listed, and (architecture, number, errno or None, count, arguments)."""
    entries = len(payload) - 8
    if entries < 0 or entries % _DENIAL.size or entries // _DENIAL.size > _MOST_DENIALS:
        raise ProtocolError(f"a list of denials has {len(payload)} bytes")
    found = []
    for arch, number, code, zero, count, *arguments in _DENIAL.iter_unpack(payload[8:]):
        if zero != 0 or not -1 <= code < 4096:
            raise ProtocolError("a denial has no errno")
        found.append((arch, number, None if code < 0 else code, count, tuple(arguments)))
    return int.from_bytes(payload[:8], "little"), found


def parse_ready(payload: bytes) -> dict[str, int]:
    """The limits that a guest read back of its cgroup; 0 is none. Empty where there is no such cgroup."""
    names = {1: "memory", 2: "pids", 3: "cpu_ns"}
    found = {}
    for tag, data in frames.attributes(payload):
        if tag not in names:
            raise ProtocolError(f"READY has the unknown attribute {tag}")
        (found[names[tag]],) = messages.unpack(messages.U64, data, "an attribute of READY")
    return found


def parse_clock(payload: bytes) -> int:
    """A guest's CLOCK_MONOTONIC, ns."""
    return messages.unpack(messages.U64, payload, "CLOCK")[0]


_KINDS = frozenset((b"f", b"d", b"l", b"o"))


def parse_entries(payload: bytes) -> list[Entry]:
    found = []
    at = 0
    while at < len(payload):
        end = payload.find(b"\0", at + 13)
        if end < 0:
            raise ProtocolError("a list of files ends within an entry")
        kind, mode, size = struct.unpack_from("<cIQ", payload, at)
        if kind not in _KINDS:
            raise ProtocolError("a list of files has an entry of no kind")
        found.append(
            Entry(kind=kind.decode("latin-1"), mode=mode & 0o7777, size_bytes=size, path=payload[at + 13 : end])
        )
        at = end + 1
    return found
