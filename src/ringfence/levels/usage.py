"""What a command used, from those who measured it: the sandbox's cgroup, and init, which reaped all of it."""

from __future__ import annotations

from ringfence.result import Usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.linux import cgroups
    from ringfence.wire.messages import Exited

__all__ = ["Measured", "of_cgroup", "of_guest"]

_NAMES = (
    "cpu_ns",
    "cpu_user_ns",
    "cpu_system_ns",
    "memory_peak_bytes",
    "io_read_bytes",
    "io_write_bytes",
    "pids_peak",
    "throttled_ns",
    "oom_kills",
    "memory_pressure_ns",
    "cpu_pressure_ns",
    "io_pressure_ns",
)
# Those that a guest's cgroup counts on from one command to the next.
_SUMS = frozenset(("throttled_ns", "oom_kills", "memory_pressure_ns", "cpu_pressure_ns", "io_pressure_ns"))


# Not a Value: it is made once a run, and becomes a `Usage` once the times are known.
class Measured:
    """The fields of `result.Usage` but for the times. None is unknown."""

    __slots__ = (*_NAMES, "source", "vmm_cpu_ns", "vmm_memory_peak_bytes")

    def __init__(self, source: str) -> None:
        self.cpu_ns: int | None = None
        self.cpu_user_ns: int | None = None
        self.cpu_system_ns: int | None = None
        self.memory_peak_bytes: int | None = None
        self.io_read_bytes: int | None = None
        self.io_write_bytes: int | None = None
        self.pids_peak: int | None = None
        self.throttled_ns: int | None = None
        self.oom_kills: int | None = None
        self.memory_pressure_ns: int | None = None
        self.cpu_pressure_ns: int | None = None
        self.io_pressure_ns: int | None = None
        self.vmm_cpu_ns: int | None = None
        self.vmm_memory_peak_bytes: int | None = None
        self.source = source

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel killed for the memory limit."""
        return bool(self.oom_kills)

    def usage(
        self, *, wall_ns: int | None = None, startup_ns: int | None = None, teardown_ns: int | None = None
    ) -> Usage:
        """With the times, which others know."""
        return Usage(
            wall_ns=wall_ns,
            startup_ns=startup_ns,
            teardown_ns=teardown_ns,
            cpu_ns=self.cpu_ns,
            cpu_user_ns=self.cpu_user_ns,
            cpu_system_ns=self.cpu_system_ns,
            memory_peak_bytes=self.memory_peak_bytes,
            io_read_bytes=self.io_read_bytes,
            io_write_bytes=self.io_write_bytes,
            pids_peak=self.pids_peak,
            throttled_ns=self.throttled_ns,
            oom_kills=self.oom_kills,
            memory_pressure_ns=self.memory_pressure_ns,
            cpu_pressure_ns=self.cpu_pressure_ns,
            io_pressure_ns=self.io_pressure_ns,
            vmm_cpu_ns=self.vmm_cpu_ns,
            vmm_memory_peak_bytes=self.vmm_memory_peak_bytes,
            source=self.source,
        )


def of_cgroup(used: cgroups.Usage | None, exited: Exited | None) -> Measured:
    """used: what the sandbox's cgroup tells, or None where it has none. exited: what init reported, or None."""
    found = Measured(used.source if used is not None else "wait4" if exited is not None else "")
    if exited is not None:
        found.cpu_ns = exited.cpu_ns
        found.cpu_user_ns, found.cpu_system_ns = exited.cpu_user_ns, exited.cpu_system_ns
        found.io_read_bytes, found.io_write_bytes = exited.io_read_bytes, exited.io_write_bytes
    if used is None:
        return found
    if used.cpu_ns is not None:
        found.cpu_ns = used.cpu_ns
        found.cpu_user_ns, found.cpu_system_ns = used.cpu_user_ns, used.cpu_system_ns
        if used.cpu_user_ns is None and exited is not None:
            # Version 1 has the sum alone, which counts what nobody waited for too: split as init's own sum is.
            found.cpu_user_ns = used.cpu_ns * exited.cpu_user_ns // exited.cpu_ns if exited.cpu_ns else used.cpu_ns
            found.cpu_system_ns = used.cpu_ns - found.cpu_user_ns
    found.memory_peak_bytes = used.memory_peak_bytes
    if used.io_read_bytes is not None:
        found.io_read_bytes, found.io_write_bytes = used.io_read_bytes, used.io_write_bytes
    found.pids_peak = used.pids_peak
    found.throttled_ns = used.throttled_ns
    found.oom_kills = used.oom_kills
    found.memory_pressure_ns = used.memory_pressure_ns
    found.cpu_pressure_ns = used.cpu_pressure_ns
    found.io_pressure_ns = used.io_pressure_ns
    return found


def of_guest(exited: Exited | None, before: Exited | None = None, vmm: cgroups.Usage | None = None) -> Measured:
    """All that a guest's init tells of its kernel. before: what it told of the command before this one, where there was
    one: the guest's cgroup counts on. vmm: what the cgroup of its VMM on the host tells.
    """
    found = Measured("the guest's cgroup v2" if exited is not None else "")
    if exited is not None:
        for name in _NAMES:
            now, then = getattr(exited, name), getattr(before, name) if before is not None and name in _SUMS else None
            setattr(found, name, now - then if now is not None and then is not None else now)
    if vmm is not None:
        found.vmm_cpu_ns, found.vmm_memory_peak_bytes = vmm.cpu_ns, vmm.memory_peak_bytes
    return found
