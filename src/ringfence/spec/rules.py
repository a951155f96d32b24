"""The rules of a spec that are values of their own: limits, mounts, the network, files."""

from __future__ import annotations

from ringfence._value import Value
from ringfence.errors import SpecError
from ringfence.spec import parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping
    from typing import Any

    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

__all__ = ["WORK_DIRECTORY", "File", "FileIn", "Limits", "Mount", "Network"]

# Where the work directory is inside a container and a VM; at process level it is a directory of the host.
WORK_DIRECTORY = b"/work"

_DEFAULT_OUTPUT_BYTES = 64 * 2**20
# Below it even ordinary commands are killed before they do anything, and each run ends as "memory": on Linux
# 6.18 a static program needs 128 KiB with the kernel's pages for it, `true` 256, `sh` 512.
_LEAST_MEMORY_BYTES = 2**20
# Below a millisecond a limit is under the cost of a start and under what poll(2) counts in.
_LEAST_TIME_NS = 10**6
# tmpfs counts in pages, and rounds a size up to one; 0 would be no limit at all.
_LEAST_DISK_BYTES = 4096
# PID_MAX_LIMIT of include/linux/threads.h.
_MOST_PIDS = 4 * 2**20


class File(Value):
    """A file to put into the work directory. data: bytes or str (UTF-8). mode: its permission bits."""

    __slots__ = ("data", "mode")
    data: bytes
    mode: int

    def __init__(self, data: bytes | bytearray | memoryview | str, mode: Any = 0o644) -> None:
        if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode <= 0o777:
            shown = oct(mode) if isinstance(mode, int) else repr(mode)
            raise SpecError(f"a file's mode must be between 0 and 0o777, not {shown}")
        self._set(data=parse.content(data, "a file's data"), mode=mode)


class FileIn(Value):
    """A file in the spec. path: relative to the work directory, normalised. data: its content. mode: 0 to
    0o777.
    """

    __slots__ = ("data", "mode", "path")
    path: bytes
    data: bytes
    mode: int

    def __init__(self, *, path: bytes, data: bytes, mode: int = 0o644) -> None:
        self._set(path=path, data=data, mode=mode)


class Limits(Value):
    """How much a workload may use. None is no limit, but for output, which always has one.

    Arguments (human spellings as in `spec.parse`) and the fields they become:
    memory: "256M" or bytes, at least 1 MiB -> memory_bytes. Swap is not granted on top.
    cpus: 0.5 or "2" CPUs, at least 0.01 -> cpus.
    pids: processes and threads at once -> pids.
    wall_time: "10s" or seconds, at least 1 ms -> wall_time_ns.
    cpu_time: "5s" or seconds of CPU of all its processes, at least 1 ms -> cpu_time_ns.
    output: bytes kept of each of stdout and stderr, 64 MiB by default -> output_bytes.
    disk: "1G" or bytes that it may write, at least 4 KiB -> disk_bytes.
    asked: the names of the arguments that were given.

    Raises SpecError.
    """

    __slots__ = (
        "asked",
        "cpu_time_ns",
        "cpus",
        "disk_bytes",
        "memory_bytes",
        "output_bytes",
        "pids",
        "wall_time_ns",
    )
    memory_bytes: int | None
    cpus: float | None
    pids: int | None
    wall_time_ns: int | None
    cpu_time_ns: int | None
    output_bytes: int
    disk_bytes: int | None
    asked: frozenset[str]

    def __init__(
        self,
        *,
        memory: str | int | float | None = None,
        cpus: str | int | float | None = None,
        pids: str | int | None = None,
        wall_time: str | int | float | None = None,
        cpu_time: str | int | float | None = None,
        output: str | int | float | None = None,
        disk: str | int | float | None = None,
    ) -> None:
        given = {
            "memory": memory,
            "cpus": cpus,
            "pids": pids,
            "wall_time": wall_time,
            "cpu_time": cpu_time,
            "output": output,
            "disk": disk,
        }
        self._set(
            memory_bytes=None if memory is None else _at_least(memory, "memory", _LEAST_MEMORY_BYTES, "1 MiB"),
            cpus=None if cpus is None else parse.cpus(cpus),
            pids=None if pids is None else parse.count(pids, "pids", 1, _MOST_PIDS),
            wall_time_ns=None if wall_time is None else _time(wall_time, "wall_time"),
            cpu_time_ns=None if cpu_time is None else _time(cpu_time, "cpu_time"),
            output_bytes=_DEFAULT_OUTPUT_BYTES if output is None else parse.size(output, "output"),
            disk_bytes=None if disk is None else _at_least(disk, "disk", _LEAST_DISK_BYTES, "4 KiB"),
            asked=frozenset(name for name, value in given.items() if value is not None),
        )

    def _init_arguments(self) -> dict[str, Any]:
        return {
            "memory": self.memory_bytes,
            "cpus": self.cpus,
            "pids": self.pids,
            "wall_time": None if self.wall_time_ns is None else f"{self.wall_time_ns}ns",
            "cpu_time": None if self.cpu_time_ns is None else f"{self.cpu_time_ns}ns",
            "output": self.output_bytes if "output" in self.asked else None,
            "disk": self.disk_bytes,
        }


class Mount(Value):
    """A file or folder of the host to show inside.

    source: its path on the host; a relative one counts from the caller's current directory at this moment.
    target: an absolute path inside, not over /, /proc, /sys, /dev or the work directory.
    writable: whether the workload may write to it. False by default.

    Raises SpecError. Whether the source exists is checked when a spec is made of it.
    """

    __slots__ = ("source", "target", "writable")
    source: bytes
    target: bytes
    writable: bool

    def __init__(self, source: Path, target: Path, writable: bool = False) -> None:
        inside = parse.absolute_path(target, "a mount's target")
        # What the sandbox itself mounts there is part of the boundary.
        for reserved in (b"/proc", b"/sys", b"/dev", WORK_DIRECTORY):
            if inside == reserved or inside.startswith(reserved + b"/"):
                raise SpecError(f"a mount's target can't be in {reserved.decode()}: {parse.shown(inside)}")
        if inside == b"/":
            raise SpecError("a mount's target can't be /: give the folder as image instead")
        self._set(
            source=parse.host_path(source, "a mount's source"),
            target=inside,
            writable=bool(writable),
        )


class Network(Value):
    """Which network a workload has.

    mode: "none" (a loopback of its own at most), "nat" (its own stack, connected through the host), or
    "host".
    allow: with nat, the only "host:port" that it may connect to; None is all of them.
    publish: with nat, {port of the host: port inside}; kept as sorted pairs.

    Raises SpecError.
    """

    __slots__ = ("allow", "mode", "publish")
    mode: str
    allow: tuple[str, ...] | None
    publish: tuple[tuple[int, int], ...]

    def __init__(
        self,
        mode: str = "nat",
        *,
        allow: Iterable[str] | None = None,
        publish: Mapping[int, int] | Iterable[tuple[int, int]] = (),
    ) -> None:
        if mode not in ("none", "nat", "host"):
            raise SpecError(f"network must be 'none', 'nat' or 'host', not {mode!r}")
        if isinstance(allow, (str, bytes)):
            raise SpecError("network allow must be a list of 'host:port', not a str")
        pairs = publish.items() if hasattr(publish, "items") else publish
        allowed = None if allow is None else tuple(_host_and_port(one) for one in allow)
        published = tuple(sorted((_port(outer), _port(inner)) for outer, inner in pairs))
        if mode != "nat" and (allowed is not None or published):
            raise SpecError(f"network allow and publish need mode 'nat', not {mode!r}")
        self._set(mode=mode, allow=allowed, publish=published)


def _host_and_port(value: str) -> str:
    if not isinstance(value, str):
        raise SpecError(f"network allow: {value!r} must be a str such as 'example.com:443'")
    host, _, port = value.rpartition(":")
    if not host or any(character.isspace() or character in "/@\0" for character in host):
        raise SpecError(f"network allow: {value!r} must be 'host:port', such as 'example.com:443'")
    return f"{host}:{_port(port)}"


def _port(value: str | int) -> int:
    return parse.count(value, "network: a port", 1, 65535)


def _time(value: str | int | float, what: str) -> int:
    found = parse.duration(value, what)
    if found < _LEAST_TIME_NS:
        raise SpecError(f"{what} must be at least 1 ms, not {value}")
    return found


def _at_least(value: str | int | float, what: str, least: int, spelled: str) -> int:
    found = parse.size(value, what)
    if found < least:
        raise SpecError(f"{what} must be at least {spelled}, not {value}")
    return found
