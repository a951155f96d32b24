"""What control groups are told and tell, as values: limits, layouts, what is in force, what was used."""

from __future__ import annotations

from ringfence._value import Value

__all__ = [
    "CONTROLLERS",
    "NO_LIMITS",
    "RULES",
    "Base",
    "Controller",
    "InForce",
    "IoLimits",
    "Layout",
    "Limits",
    "Usage",
]

# Those that ringfence uses, by the names of version 2. io is blkio in version 1. In version 2 the time of cpuacct and
# the freezer are in every cgroup, without a controller.
CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "cpuset", "io", "freezer")

# The rules that cgroups enforce, in the order in which they are told.
RULES = (
    "memory",
    "swap",
    "cpus",
    "cpu_weight",
    "cpuset",
    "pids",
    "io_read",
    "io_write",
    "io_read_ops",
    "io_write_ops",
)


class IoLimits(Value):
    """How fast a cgroup may read from and write to one disk. None is no limit.

    device: (major, minor) of the whole disk. read_bytes, write_bytes, read_ops, write_ops: a second.
    """

    __slots__ = ("device", "read_bytes", "read_ops", "write_bytes", "write_ops")
    device: tuple[int, int]
    read_bytes: int | None
    write_bytes: int | None
    read_ops: int | None
    write_ops: int | None

    def __init__(
        self,
        *,
        device: tuple[int, int],
        read_bytes: int | None = None,
        write_bytes: int | None = None,
        read_ops: int | None = None,
        write_ops: int | None = None,
    ) -> None:
        self._set(device=device, read_bytes=read_bytes, write_bytes=write_bytes, read_ops=read_ops, write_ops=write_ops)

    def rules(self) -> dict[str, int | None]:
        """Rule to limit, in the order of RULES."""
        return {
            "io_read": self.read_bytes,
            "io_write": self.write_bytes,
            "io_read_ops": self.read_ops,
            "io_write_ops": self.write_ops,
        }


class Limits(Value):
    """What a cgroup is to limit. None is no limit; where a cgroup is changed, it is no change.

    memory_bytes, and swap_bytes on top of it (None is 0 where memory is limited). cpus: the quota. cpu_weight: 1 to
    10000, among the cgroups beside it. cpuset: numbers of CPUs, sorted. pids: processes and threads. io: of one disk.
    """

    __slots__ = ("cpu_weight", "cpus", "cpuset", "io", "memory_bytes", "pids", "swap_bytes")
    memory_bytes: int | None
    swap_bytes: int | None
    cpus: float | None
    cpu_weight: int | None
    cpuset: tuple[int, ...] | None
    pids: int | None
    io: IoLimits | None

    def __init__(
        self,
        *,
        memory_bytes: int | None = None,
        swap_bytes: int | None = None,
        cpus: float | None = None,
        cpu_weight: int | None = None,
        cpuset: tuple[int, ...] | None = None,
        pids: int | None = None,
        io: IoLimits | None = None,
    ) -> None:
        self._set(
            memory_bytes=memory_bytes,
            swap_bytes=swap_bytes,
            cpus=cpus,
            cpu_weight=cpu_weight,
            cpuset=cpuset,
            pids=pids,
            io=io,
        )

    def controllers(self) -> set[str]:
        """The controllers that it takes."""
        needed = {
            "memory": self.memory_bytes is not None or self.swap_bytes is not None,
            "cpu": self.cpus is not None or self.cpu_weight is not None,
            "cpuset": self.cpuset is not None,
            "pids": self.pids is not None,
            "io": self.io is not None,
        }
        return {name for name, is_needed in needed.items() if is_needed}

    def changed_by(self, other: Limits) -> Limits:
        """These, with what `other` says in place of what it names."""
        mine, theirs = self._init_arguments(), other._init_arguments()
        if self.io is not None and other.io is not None and self.io.device == other.io.device:
            io = {name: value for name, value in other.io._init_arguments().items() if value is not None}
            theirs["io"] = self.io.replace(**io)
        return Limits(**{**mine, **{name: value for name, value in theirs.items() if value is not None}})


NO_LIMITS = Limits()


class Controller(Value):
    """One controller as this process finds it.

    name: one of CONTROLLERS. version: 1 or 2, or 0 where the kernel has none mounted.
    path: the directory of this process's own cgroup, or b"". usable: whether ringfence can make cgroups
    there.
    reason: why not, or "". help: what would help, or "".
    """

    __slots__ = ("help", "name", "path", "reason", "usable", "version")
    name: str
    version: int
    path: bytes
    usable: bool
    reason: str
    help: str

    def __init__(self, *, name: str, version: int, path: bytes, usable: bool, reason: str = "", help: str = "") -> None:
        self._set(name=name, version=version, path=path, usable=usable, reason=reason, help=help)


class Layout(Value):
    """How cgroups are mounted here: kind is "v1", "v2", "hybrid" (both) or "none"; controllers, one each.

    unified: the directory of this process's own cgroup of version 2, or b"". mount: where the root of that hierarchy is
    mounted, or None. home: in words, where ringfence makes its cgroups, and by whose leave; "" where it makes none.
    by_systemd: whether they are in a scope that systemd is asked for when a limit is first needed.
    """

    __slots__ = ("by_systemd", "controllers", "home", "kind", "mount", "unified")
    kind: str
    controllers: tuple[Controller, ...]
    unified: bytes
    mount: bytes | None
    home: str
    by_systemd: bool

    def __init__(
        self,
        *,
        kind: str,
        controllers: tuple[Controller, ...],
        unified: bytes = b"",
        mount: bytes | None = None,
        home: str = "",
        by_systemd: bool = False,
    ) -> None:
        self._set(kind=kind, controllers=controllers, unified=unified, mount=mount, home=home, by_systemd=by_systemd)

    def controller(self, name: str) -> Controller:
        """Raises KeyError where the name is none of CONTROLLERS."""
        return {one.name: one for one in self.controllers}[name]


class InForce(Value):
    """A limit as read back from the kernel.

    rule: one of RULES. requested, effective: bytes, CPUs, a count, numbers of CPUs, or an amount a second; an effective
    None is no limit. mechanism: the version and the file, such as "cgroup v1 memory.limit_in_bytes".
    """

    __slots__ = ("effective", "mechanism", "requested", "rule")
    rule: str
    requested: int | float | tuple[int, ...]
    effective: int | float | tuple[int, ...] | None
    mechanism: str

    def __init__(
        self,
        *,
        rule: str,
        requested: int | float | tuple[int, ...],
        effective: int | float | tuple[int, ...] | None,
        mechanism: str,
    ) -> None:
        self._set(rule=rule, requested=requested, effective=effective, mechanism=mechanism)


class Usage(Value):
    """What a cgroup used. None is unknown: no such controller, or a kernel too old to say.

    memory_peak_bytes: the most at once. cpu_ns: user and system time of all that ever ran in it, and
    cpu_user_ns, cpu_system_ns its parts. oom_kills: processes that the kernel killed at the memory limit. pids_peak:
    most processes and threads at once. throttled_ns: time that it
    waited for its CPU quota. io_read_bytes, io_write_bytes: from and to block devices. memory_pressure_ns,
    cpu_pressure_ns, io_pressure_ns: time in which at least one of its tasks waited for memory, a CPU, or a device
    ("some" of PSI).
    source: "cgroup v1" or "cgroup v2".
    """

    __slots__ = (
        "cpu_ns",
        "cpu_pressure_ns",
        "cpu_system_ns",
        "cpu_user_ns",
        "io_pressure_ns",
        "io_read_bytes",
        "io_write_bytes",
        "memory_peak_bytes",
        "memory_pressure_ns",
        "oom_kills",
        "pids_peak",
        "source",
        "throttled_ns",
    )
    memory_peak_bytes: int | None
    cpu_ns: int | None
    cpu_user_ns: int | None
    cpu_system_ns: int | None
    oom_kills: int | None
    pids_peak: int | None
    throttled_ns: int | None
    io_read_bytes: int | None
    io_write_bytes: int | None
    memory_pressure_ns: int | None
    cpu_pressure_ns: int | None
    io_pressure_ns: int | None
    source: str

    def __init__(
        self,
        *,
        memory_peak_bytes: int | None = None,
        cpu_ns: int | None = None,
        cpu_user_ns: int | None = None,
        cpu_system_ns: int | None = None,
        oom_kills: int | None = None,
        pids_peak: int | None = None,
        throttled_ns: int | None = None,
        io_read_bytes: int | None = None,
        io_write_bytes: int | None = None,
        memory_pressure_ns: int | None = None,
        cpu_pressure_ns: int | None = None,
        io_pressure_ns: int | None = None,
        source: str,
    ) -> None:
        self._set(
            memory_peak_bytes=memory_peak_bytes,
            cpu_ns=cpu_ns,
            cpu_user_ns=cpu_user_ns,
            cpu_system_ns=cpu_system_ns,
            oom_kills=oom_kills,
            pids_peak=pids_peak,
            throttled_ns=throttled_ns,
            io_read_bytes=io_read_bytes,
            io_write_bytes=io_write_bytes,
            memory_pressure_ns=memory_pressure_ns,
            cpu_pressure_ns=cpu_pressure_ns,
            io_pressure_ns=io_pressure_ns,
            source=source,
        )

    def since(self, before: Usage) -> Usage:
        """What was used after `before` was read. Peaks stay those of all its time: nothing resets those."""
        used = {}
        for name, now in self._init_arguments().items():
            then = getattr(before, name)
            counted = name not in ("memory_peak_bytes", "memory_bytes", "pids_peak", "source")
            used[name] = now - then if counted and now is not None and then is not None else now
        return Usage(**used)


class Base(Value):
    """A base cgroup in one hierarchy, for whoever cleans up after this process.

    fd: its directory. parent_fd: the directory that it is in, where `name` is to be removed.
    Both belong to the Manager.
    """

    __slots__ = ("fd", "name", "parent_fd")
    fd: int
    name: bytes
    parent_fd: int

    def __init__(self, *, fd: int, name: bytes, parent_fd: int) -> None:
        self._set(fd=fd, name=name, parent_fd=parent_fd)
