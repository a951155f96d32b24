"""What a command used, from those who measured it: the sandbox's cgroup, and init, which reaped all of it."""

from __future__ import annotations

from ringfence.result import Usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

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


class Measured:
    """What was read at a command's end. out_of_memory: whether the kernel killed for the memory limit.

    fields: gives those of `result.Usage` but for the times, which others know; one that isn't there is unknown. Few
    ask for them, so they are worked out when somebody does.
    """

    __slots__ = ("_fields", "out_of_memory", "source")

    def __init__(self, source: str, out_of_memory: bool, fields: Callable[[], dict[str, int | None]]) -> None:
        self.source = source
        self.out_of_memory = out_of_memory
        self._fields = fields

    def usage(
        self, *, wall_ns: int | None = None, startup_ns: int | None = None, teardown_ns: int | None = None
    ) -> Usage:
        """With the times."""
        return Usage(
            wall_ns=wall_ns, startup_ns=startup_ns, teardown_ns=teardown_ns, source=self.source, **self._fields()
        )


def of_cgroup(used: cgroups.Usage | None, exited: Exited | None) -> Measured:
    """used: what the sandbox's cgroup tells, or None where it has none. exited: what init reported, or None."""
    source = used.source if used is not None else "wait4" if exited is not None else ""
    return Measured(source, used is not None and bool(used.oom_kills), lambda: _of_cgroup(used, exited))


def _of_cgroup(used: cgroups.Usage | None, exited: Exited | None) -> dict[str, int | None]:
    fields: dict[str, int | None] = {}
    if used is not None:
        fields = {
            "memory_peak_bytes": used.memory_peak_bytes,
            "pids_peak": used.pids_peak,
            "throttled_ns": used.throttled_ns,
            "oom_kills": used.oom_kills,
            "memory_pressure_ns": used.memory_pressure_ns,
            "cpu_pressure_ns": used.cpu_pressure_ns,
            "io_pressure_ns": used.io_pressure_ns,
        }
    cpu, io = _cpu(used, exited), _io(used, exited)
    fields["cpu_ns"], fields["cpu_user_ns"], fields["cpu_system_ns"] = cpu
    fields["io_read_bytes"], fields["io_write_bytes"] = io
    return fields


def _cpu(used: cgroups.Usage | None, exited: Exited | None) -> tuple[int | None, int | None, int | None]:
    """In all, of user and of system time."""
    if used is not None and used.cpu_ns is not None:
        if used.cpu_user_ns is not None or exited is None:
            return used.cpu_ns, used.cpu_user_ns, used.cpu_system_ns
        # Version 1 has the sum alone, which counts what nobody waited for too: split as init's own sum is.
        user_ns = used.cpu_ns * exited.cpu_user_ns // exited.cpu_ns if exited.cpu_ns else used.cpu_ns
        return used.cpu_ns, user_ns, used.cpu_ns - user_ns
    return (None, None, None) if exited is None else (exited.cpu_ns, exited.cpu_user_ns, exited.cpu_system_ns)


def _io(used: cgroups.Usage | None, exited: Exited | None) -> tuple[int | None, int | None]:
    """Read and written."""
    if used is not None and used.io_read_bytes is not None:
        return used.io_read_bytes, used.io_write_bytes
    return (None, None) if exited is None else (exited.io_read_bytes, exited.io_write_bytes)


def of_guest(
    exited: Exited | None, before: Exited | None = None, vmm: cgroups.Usage | None = None, *, killed: bool = False
) -> Measured:
    """All that a guest's init tells of its kernel. before: what it told of the command before this one, where there was
    one: the guest's cgroup counts on. vmm: what the cgroup of its VMM on the host tells. killed: the host's kernel
    killed for that one's memory limit.
    """
    fields: dict[str, int | None] = {}
    if exited is not None:
        for name in _NAMES:
            now, then = getattr(exited, name), getattr(before, name) if before is not None and name in _SUMS else None
            fields[name] = now - then if now is not None and then is not None else now
    if vmm is not None:
        fields["vmm_cpu_ns"], fields["vmm_memory_peak_bytes"] = vmm.cpu_ns, vmm.memory_peak_bytes
    if killed:
        fields["oom_kills"] = 1
    source = "the cgroup of QEMU" if killed else "the guest's cgroup v2" if exited is not None else ""
    return Measured(source, bool(fields.get("oom_kills")), lambda: fields)
