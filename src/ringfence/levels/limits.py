"""The limits of sandboxes whose cgroup is the host's, as a cgroup is told them."""

from __future__ import annotations

import os

from ringfence.linux.cgroups import NO_LIMITS, RULES, IoLimits, Limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence import spec as specs
    from ringfence.levels.host import Host
    from ringfence.linux.disks import Disk

__all__ = ["CGROUP_RULES", "IO_RULES", "REFINED_RULES", "cgroup_limits", "work_disk"]

IO_RULES = frozenset(("io_read", "io_write", "io_read_ops", "io_write_ops"))
CGROUP_RULES = frozenset(RULES)
# What can be asked for of these depends on more than the controller.
REFINED_RULES = IO_RULES | {"cpuset"}


def work_disk(host: Host) -> Disk:
    """The disk of the work directories."""
    from ringfence.levels.state import work_folder
    from ringfence.linux.disks import disk_of

    return disk_of(os.path.realpath(work_folder(passable=host.privileged)))


def cgroup_limits(limits: specs.Limits, host: Host) -> Limits:
    """What a cgroup of this host is told for them. They were checked before, or none of them is asked for."""
    if not limits.asked & CGROUP_RULES:
        return NO_LIMITS
    io = None
    if limits.asked & IO_RULES:
        device = work_disk(host).device
        assert device is not None
        io = IoLimits(
            device=device,
            read_bytes=limits.io_read_bytes_per_second,
            write_bytes=limits.io_write_bytes_per_second,
            read_ops=limits.io_read_ops,
            write_ops=limits.io_write_ops,
        )
    return Limits(
        memory_bytes=limits.memory_bytes,
        swap_bytes=limits.swap_bytes,
        cpus=limits.cpus,
        cpu_weight=limits.cpu_weight,
        cpuset=limits.cpuset,
        pids=limits.pids,
        io=io,
    )
