"""The rules of a spec that are values of their own: limits, mounts, the network, files."""

from __future__ import annotations

from ringfence._value import Later, Value
from ringfence.errors import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from typing import Any

    from ringfence.spec import parse

    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
else:
    parse = Later("ringfence.spec.parse")  # most specs have nothing to be parsed

__all__ = ["WORK_DIRECTORY", "File", "FileIn", "Limits", "Mount", "Tmpfs"]

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
# CGROUP_WEIGHT_MAX of include/linux/cgroup.h; a group that nobody weighed has 100.
_MOST_WEIGHT = 10_000
# A day's worth of bytes a second is no limit at all, and the kernel's files take no more.
_MOST_RATE = 2**63 - 1
# CONFIG_NR_CPUS of the largest kernels.
_MOST_CPUS = 8192


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
    memory: "256M" or bytes, at least 1 MiB -> memory_bytes. Swap is not granted on top, unless by `swap`.
    swap: "64M", bytes or 0: how much more it may hold in swap, on top of `memory`, which it needs -> swap_bytes.
    cpus: 0.5 or "2" CPUs, at least 0.01 -> cpus.
    cpu_weight: 1 to 10000, its share of busy CPUs against this caller's other sandboxes, who have 100 -> cpu_weight.
    cpuset: "0-1,3" or numbers: the CPUs that it may run on -> cpuset, sorted numbers.
    pids: processes and threads at once -> pids.
    io_read, io_write: "10M" or bytes a second, from and to the disk of the work directory -> *_bytes_per_second.
    io_read_ops, io_write_ops: operations a second, likewise -> the same names.
    wall_time: "10s" or seconds, at least 1 ms -> wall_time_ns.
    cpu_time: "5s" or seconds of CPU of all its processes, at least 1 ms -> cpu_time_ns.
    output: bytes kept of each of stdout and stderr, 64 MiB by default -> output_bytes.
    disk: "1G" or bytes that its work directory and its overlay may hold together, at least 4 KiB; both are in memory
    then, and count as such -> disk_bytes. Writable mounts aren't bounded by it.
    asked: the names of the arguments that were given.

    Raises SpecError.
    """

    __slots__ = (
        "asked",
        "cpu_time_ns",
        "cpu_weight",
        "cpus",
        "cpuset",
        "disk_bytes",
        "io_read_bytes_per_second",
        "io_read_ops",
        "io_write_bytes_per_second",
        "io_write_ops",
        "memory_bytes",
        "output_bytes",
        "pids",
        "swap_bytes",
        "wall_time_ns",
    )
    memory_bytes: int | None
    swap_bytes: int | None
    cpus: float | None
    cpu_weight: int | None
    cpuset: tuple[int, ...] | None
    pids: int | None
    io_read_bytes_per_second: int | None
    io_write_bytes_per_second: int | None
    io_read_ops: int | None
    io_write_ops: int | None
    wall_time_ns: int | None
    cpu_time_ns: int | None
    output_bytes: int
    disk_bytes: int | None
    asked: frozenset[str]

    def __init__(
        self,
        *,
        memory: str | int | float | None = None,
        swap: str | int | float | None = None,
        cpus: str | int | float | None = None,
        cpu_weight: str | int | None = None,
        cpuset: str | int | Iterable[int] | None = None,
        pids: str | int | None = None,
        io_read: str | int | float | None = None,
        io_write: str | int | float | None = None,
        io_read_ops: str | int | None = None,
        io_write_ops: str | int | None = None,
        wall_time: str | int | float | None = None,
        cpu_time: str | int | float | None = None,
        output: str | int | float | None = None,
        disk: str | int | float | None = None,
    ) -> None:
        given = {
            "memory": memory,
            "swap": swap,
            "cpus": cpus,
            "cpu_weight": cpu_weight,
            "cpuset": cpuset,
            "pids": pids,
            "io_read": io_read,
            "io_write": io_write,
            "io_read_ops": io_read_ops,
            "io_write_ops": io_write_ops,
            "wall_time": wall_time,
            "cpu_time": cpu_time,
            "output": output,
            "disk": disk,
        }
        if swap is not None and memory is None:
            raise SpecError("swap is what may be held on top of memory: limit memory too")
        self._set(
            memory_bytes=None if memory is None else _at_least(memory, "memory", _LEAST_MEMORY_BYTES, "1 MiB"),
            swap_bytes=None if swap is None else 0 if swap in (0, "0") else parse.size(swap, "swap"),
            cpus=None if cpus is None else parse.cpus(cpus),
            cpu_weight=None if cpu_weight is None else parse.count(cpu_weight, "cpu_weight", 1, _MOST_WEIGHT),
            cpuset=None if cpuset is None else _cpuset(cpuset),
            pids=None if pids is None else parse.count(pids, "pids", 1, _MOST_PIDS),
            io_read_bytes_per_second=None if io_read is None else parse.size(io_read, "io_read"),
            io_write_bytes_per_second=None if io_write is None else parse.size(io_write, "io_write"),
            io_read_ops=None if io_read_ops is None else parse.count(io_read_ops, "io_read_ops", 1, _MOST_RATE),
            io_write_ops=None if io_write_ops is None else parse.count(io_write_ops, "io_write_ops", 1, _MOST_RATE),
            wall_time_ns=None if wall_time is None else _time(wall_time, "wall_time"),
            cpu_time_ns=None if cpu_time is None else _time(cpu_time, "cpu_time"),
            output_bytes=_DEFAULT_OUTPUT_BYTES if output is None else parse.size(output, "output"),
            disk_bytes=None if disk is None else _at_least(disk, "disk", _LEAST_DISK_BYTES, "4 KiB"),
            asked=frozenset(name for name, value in given.items() if value is not None),
        )

    def given(self) -> dict[str, Any]:
        """The arguments that were given, for limits that are to be changed by these."""
        return {name: value for name, value in self._init_arguments().items() if name in self.asked}

    def _init_arguments(self) -> dict[str, Any]:
        return {
            "memory": self.memory_bytes,
            "swap": self.swap_bytes,
            "cpus": self.cpus,
            "cpu_weight": self.cpu_weight,
            "cpuset": self.cpuset,
            "pids": self.pids,
            "io_read": self.io_read_bytes_per_second,
            "io_write": self.io_write_bytes_per_second,
            "io_read_ops": self.io_read_ops,
            "io_write_ops": self.io_write_ops,
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
    secret: that the caller means it, where the source is, holds or lies in a place of known secrets (keys, credentials,
    sockets of agents and daemons): without it such a mount is refused.

    Raises SpecError. Whether the source exists is checked when a spec is made of it.
    """

    __slots__ = ("secret", "source", "target", "writable")
    source: bytes
    target: bytes
    writable: bool
    secret: bool

    def __init__(self, source: Path, target: Path, writable: bool = False, *, secret: bool = False) -> None:
        self._set(
            source=parse.host_path(source, "a mount's source"),
            target=_target(target),
            writable=bool(writable),
            secret=bool(secret),
        )


class Tmpfs(Value):
    """An empty file system in memory, to show inside. It is gone with the sandbox, and counts as its memory.

    target: as for `Mount`. size: "64M" or bytes that it holds at most, at least 4 KiB -> size_bytes.
    mode: of its root directory, 0o1777 by default, as /tmp has it.

    Raises SpecError.
    """

    __slots__ = ("mode", "size_bytes", "target")
    target: bytes
    size_bytes: int
    mode: int

    def __init__(self, target: Path, size: str | int | float = "64M", mode: Any = 0o1777) -> None:
        if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode <= 0o1777:
            shown = oct(mode) if isinstance(mode, int) else repr(mode)
            raise SpecError(f"a tmpfs's mode must be between 0 and 0o1777, not {shown}")
        self._set(
            target=_target(target),
            size_bytes=_at_least(size, "a tmpfs's size", _LEAST_DISK_BYTES, "4 KiB"),
            mode=mode,
        )

    def _init_arguments(self) -> dict[str, Any]:
        return {"target": self.target, "size": self.size_bytes, "mode": self.mode}


def _target(target: Path) -> bytes:
    """Where something of the caller's choice may be mounted."""
    inside = parse.absolute_path(target, "a mount's target")
    # What the sandbox itself mounts there is part of the boundary.
    for reserved in (b"/proc", b"/sys", b"/dev", WORK_DIRECTORY):
        if inside == reserved or inside.startswith(reserved + b"/"):
            raise SpecError(f"a mount's target can't be in {reserved.decode()}: {parse.shown(inside)}")
    if inside == b"/":
        raise SpecError("a mount's target can't be /: give the folder as image instead")
    return inside


def _cpuset(value: str | int | Iterable[int]) -> tuple[int, ...]:
    """Numbers of CPUs, sorted, from "0-1,3", a number, or numbers (cpuset(7), "List format")."""
    if isinstance(value, bool) or not (isinstance(value, (str, int)) or hasattr(value, "__iter__")):
        raise SpecError(f"cpuset must be such as '0-1,3' or numbers of CPUs, not {value!r}")
    parts: list[Any] = (
        value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else list(value)
    )
    found: set[int] = set()
    for part in parts:
        first, dash, last = part.partition("-") if isinstance(part, str) else (part, "", "")
        start = parse.count(first, "cpuset: a CPU", 0, _MOST_CPUS - 1)
        end = parse.count(last, "cpuset: a CPU", 0, _MOST_CPUS - 1) if dash else start
        if end < start:
            raise SpecError(f"cpuset: {part!r} ends before it begins")
        found.update(range(start, end + 1))
    if not found:
        raise SpecError("cpuset must name a CPU")
    return tuple(sorted(found))


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
