"""Frames and attributes: bytes in, bytes out. Parsing takes every byte for an attacker's.

See docs/design/protocol.md; core/frame.c is the other implementation.
"""

from __future__ import annotations

import struct

from ringfence.errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "CHUNK",
    "FDS_MAX",
    "HEADER_BYTES",
    "NO_FD",
    "PACKET_MAX",
    "PAYLOAD_MAX",
    "STDIN_CREDIT",
    "Frame",
    "Type",
    "attribute",
    "attributes",
    "encode",
    "parse_header",
    "string",
    "u32",
    "u64",
]

MAGIC = 0x4652
VERSION = 1
PAYLOAD_MAX = 1 << 20
PACKET_MAX = 64 << 10
FDS_MAX = 64
NO_FD = 0xFFFFFFFF
CHUNK = 64 << 10
STDIN_CREDIT = 256 << 10

_HEADER = struct.Struct("<HBBIIHH")
_ATTRIBUTE = struct.Struct("<HHI")
HEADER_BYTES = _HEADER.size


class Type:
    """Frame types, by the side that sends them: to the launcher, to init, from either.

    Plain numbers: importing enum takes 3 ms, and each comparison of its members more than one of numbers.
    """

    LAUNCH = 1
    TEMPLATE = 2
    OWN = 3
    USERNS = 4
    SETTLE = 6
    PLAN = 16
    EXEC = 17
    STDIN = 18
    SIGNAL = 19
    KILL = 20
    PUT = 21
    DATA = 22
    LIST = 23
    READ = 24
    SHUTDOWN = 25
    ASK_CLOCK = 26
    PING = 29
    CHANGES = 30
    LAUNCHED = 32
    READY = 33
    STARTED = 34
    ERROR = 35
    STDOUT = 36
    STDERR = 37
    EXITED = 38
    CREDIT = 39
    ENTRIES = 40
    DONE = 41
    LISTENER = 42
    SIZES = 43
    LAYER_END = 44
    CLOCK = 47
    PONG = 48


# Not a Value: made for each 64 KiB that a guest sends.
class Frame:
    """One frame: its type, the id of its command or transfer, its payload, and descriptors that came along."""

    __slots__ = ("fds", "id", "payload", "type")

    def __init__(self, type: int, id: int, payload: bytes, fds: list[int]) -> None:
        self.type = type
        self.id = id
        self.payload = payload
        self.fds = fds


def encode(type: int, payload: bytes = b"", *, id: int = 0, nfds: int = 0) -> bytes:
    """A whole frame. ValueError where it passes a bound, which is a mistake of the caller's."""
    if len(payload) > PAYLOAD_MAX or nfds > FDS_MAX:
        raise ValueError(f"a frame of {len(payload)} bytes and {nfds} descriptors passes the protocol's bounds")
    return _HEADER.pack(MAGIC, VERSION, type, len(payload), id, nfds, 0) + payload


def parse_header(buffer: bytes | bytearray) -> tuple[int, int, int, int]:
    """(type, payload length, id, number of descriptors) of the frame that `buffer` begins with."""
    magic, version, type, length, id, nfds, zero = _HEADER.unpack_from(buffer)
    if magic != MAGIC or zero != 0:
        raise ProtocolError("the channel holds something that is no ringfence frame")
    if version != VERSION:
        raise ProtocolError(f"the other side speaks protocol version {version}, not {VERSION}")
    if length > PAYLOAD_MAX or nfds > FDS_MAX:
        raise ProtocolError(f"a frame of {length} bytes and {nfds} descriptors passes the protocol's bounds")
    return type, length, id, nfds


def attribute(tag: int, data: bytes = b"") -> bytes:
    """One attribute of a payload."""
    return _ATTRIBUTE.pack(tag, 0, len(data)) + data


def u32(tag: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, 0, 4, value)


def u64(tag: int, value: int) -> bytes:
    return struct.pack("<HHIQ", tag, 0, 8, value)


def string(tag: int, value: bytes) -> bytes:
    return attribute(tag, value + b"\0")


def attributes(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """The (tag, data) pairs of a payload. ProtocolError where it is malformed."""
    at, end, header, unpack = 0, len(payload), _ATTRIBUTE.size, _ATTRIBUTE.unpack_from
    while at < end:
        if end - at < header:
            raise ProtocolError("a payload ends within an attribute's header")
        tag, zero, length = unpack(payload, at)
        at += header
        if zero != 0 or length > end - at:
            raise ProtocolError("an attribute passes the end of its payload")
        yield tag, payload[at : at + length]
        at += length
