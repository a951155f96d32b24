"""The limits of sandboxes whose cgroup is the host's: which can be enforced, changed, and how they are told."""

from __future__ import annotations

import os

from ringfence.errors import CannotEnforce, Unmet
from ringfence.levels.base import Ability, requested
from ringfence.levels.limits import CGROUP_RULES, IO_RULES, REFINED_RULES, cgroup_limits, work_disk
from ringfence.result import Applied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ringfence import spec as specs
    from ringfence.levels.host import Host
    from ringfence.linux.cgroups import Cgroup, Controller, InForce
    from ringfence.linux.disks import Disk
    from ringfence.spec import Spec

__all__ = ["cgroup_applied", "change_limits", "cpuset_unmet", "freeze", "limit_abilities", "limit_unmet"]

# Rule to controller, and its file in version 1 and in version 2.
_FILES = {
    "memory": ("memory", "memory.limit_in_bytes", "memory.max"),
    "swap": ("memory", "memory.memsw.limit_in_bytes", "memory.swap.max"),
    "cpus": ("cpu", "cpu.cfs_quota_us", "cpu.max"),
    "cpu_weight": ("cpu", "cpu.shares", "cpu.weight"),
    "cpuset": ("cpuset", "cpuset.cpus", "cpuset.cpus"),
    "pids": ("pids", "pids.max", "pids.max"),
    "cpu_time": ("cpuacct", "cpuacct.usage", "cpu.stat"),
    "io_read": ("io", "blkio.throttle.read_bps_device", "io.max"),
    "io_write": ("io", "blkio.throttle.write_bps_device", "io.max"),
    "io_read_ops": ("io", "blkio.throttle.read_iops_device", "io.max"),
    "io_write_ops": ("io", "blkio.throttle.write_iops_device", "io.max"),
}
_IO_WRITE = frozenset(("io_write", "io_write_ops"))


def limit_abilities(host: Host) -> dict[str, Ability]:
    """Rule by rule, for a sandbox whose cgroup is the host's."""
    found = {}
    for rule, (name, v1_file, v2_file) in _FILES.items():
        controller = host.cgroups.controller(name)
        reason, help = controller.reason, controller.help
        if controller.usable:
            reason, help = _why_no_file(rule, controller, v1_file), "use a kernel that has it"
        if not reason and rule in _IO_WRITE:
            reason, help = _why_no_writes(host, controller)
        if reason:
            help = help or f"use a kernel, or a container, with the {name} controller of cgroups"
            found[rule] = Ability(rule=rule, reason=reason, help=help)
        else:
            file = v1_file if controller.version == 1 else v2_file
            found[rule] = Ability(rule=rule, mechanism=f"cgroup v{controller.version} {file}")
    found["wall_time"] = Ability(rule="wall_time", mechanism="the caller's clock")
    found["output"] = Ability(rule="output", mechanism="the caller's pipes")
    found["disk"] = Ability(
        rule="disk",
        reason="a process has no mounts of its own: its work directory is a folder of the host's",
        help="use isolation='container'",
    )
    return found


def _why_no_file(rule: str, controller: Controller, v1_file: str) -> str:
    """Why a usable controller lacks what this rule takes; "" where it has it."""
    if controller.version == 1:
        if rule in ("swap", *IO_RULES) and not os.path.exists(os.path.join(controller.path, v1_file.encode())):
            return f"this kernel has no {v1_file}"
        return ""
    # The root of version 2 has no limits' files to look for, so these ask the kernel in another way.
    if rule == "swap" and (not os.path.exists("/proc/swaps") or "swapaccount=0" in _command_line()):
        return "this kernel doesn't count swap"
    return ""


def _command_line() -> list[str]:
    try:
        with open("/proc/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read().split()
    except FileNotFoundError:
        return []


def _why_no_writes(host: Host, io: Controller) -> tuple[str, str]:
    """(reason, help) where what a cgroup writes isn't on its account: a write to a file only makes pages dirty, and the
    kernel writes those later.
    """
    if io.version == 1:
        reason = "cgroup v1 holds back only writes past the page cache, and programs write through it"
        return reason, "use a host with cgroup v2, or limit reading alone"
    memory = host.cgroups.controller("memory")
    if not memory.usable:
        return f"what is written back later needs the memory controller too, and {memory.reason}", memory.help
    return "", ""


# ---- one spec ----


def limit_unmet(spec: Spec, host: Host) -> list[Unmet]:
    """What of the limits of this very spec can't be enforced, beyond what `limit_abilities` tells of its rules."""
    asked = spec.asked & REFINED_RULES
    if not asked:
        return []
    able = limit_abilities(host)
    unmet = cpuset_unmet(spec, host)
    on_disk = sorted(rule for rule in asked & IO_RULES if able[rule].available)
    if on_disk:
        disk = work_disk(host)
        for rule in on_disk:
            reason = disk.reason
            if not reason and rule in _IO_WRITE:
                reason = _why_not_written_back(host, disk)
            if reason:
                help = "let $TMPDIR name a folder on a disk with ext4 or xfs"
                unmet.append(Unmet(rule, requested(spec, rule), reason, help))
    return unmet


def _why_not_written_back(host: Host, disk: Disk) -> str:
    from ringfence.linux.disks import WRITEBACK_FILE_SYSTEMS

    if disk.file_system in WRITEBACK_FILE_SYSTEMS:
        return ""
    return f"{disk.file_system or 'its file system'} writes back later on nobody's account"


def cpuset_unmet(spec: Spec, host: Host) -> list[Unmet]:
    """CPUs that were asked for and aren't to be had: the kernel would give others instead."""
    wanted = set(spec.limits.cpuset or ())
    controller = host.cgroups.controller("cpuset")
    if not wanted or not controller.usable:
        return []
    for allowed, whose in ((_cpus_of(controller), "ringfence's own cgroup"), (os.sched_getaffinity(0), "this process")):
        if missing := wanted - set(allowed):
            reason = f"{whose} may not use CPU {min(missing)}, only {_shown(allowed)}"
            return [Unmet("cpuset", spec.limits.cpuset, reason, "name CPUs of those")]
    return []


def _cpus_of(controller: Controller) -> Iterable[int]:
    from ringfence.linux.cgroups import files

    names = ("cpuset.effective_cpus", "cpuset.cpus") if controller.version == 1 else ("cpuset.cpus.effective",)
    fd = files.open_directory(controller.path)
    try:
        for name in names:
            text = files.read(fd, name)
            if text is not None:
                return files.cpus_in(text)
    finally:
        os.close(fd)
    return os.sched_getaffinity(0)


def _shown(cpus: Iterable[int]) -> str:
    from ringfence.linux.cgroups import files

    return files.cpu_list(sorted(cpus))


def change_limits(
    cgroup: Cgroup | None, limits: specs.Limits, changed: frozenset[str], host: Host, isolation: str
) -> list[Applied]:
    """Changes what runs in a cgroup. limits: all of them, checked; changed: those that are new.

    All that is in force then. Raises CannotEnforce, KernelError.
    """
    unmet = [
        Unmet(rule, limits.given()[rule], "it is fixed when the sandbox is opened", "open another sandbox")
        for rule in sorted(changed - CGROUP_RULES - {"wall_time", "output"})
    ]
    if unmet:
        raise CannotEnforce(isolation, unmet)
    if cgroup is None:
        return []
    if changed & CGROUP_RULES:
        cgroup.update(cgroup_limits(limits, host))
    return cgroup_applied(cgroup.in_force, limits.asked)


def freeze(cgroup: Cgroup | None, host: Host, isolation: str) -> None:
    """Stops all that runs in a cgroup. Raises CannotEnforce, KernelError."""
    able = host.cgroups.controller("freezer")
    if cgroup is None or not able.usable:
        raise CannotEnforce(isolation, [Unmet("pause", None, able.reason or "no cgroup is usable here", able.help)])
    cgroup.freeze()


def cgroup_applied(in_force: Iterable[InForce], asked: frozenset[str]) -> list[Applied]:
    """What a cgroup read back, as a result tells it."""
    return [
        Applied(
            rule=one.rule,
            requested=one.requested if one.rule in asked else None,
            effective=one.effective,
            mechanism=one.mechanism,
        )
        for one in in_force
    ]
