"""The limits that every level on the host's kernel has, and by what."""

from __future__ import annotations

from ringfence.levels.base import Ability

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.levels.host import Host

__all__ = ["limit_abilities"]

_FILES = {
    "memory": ("memory", "memory.limit_in_bytes", "memory.max"),
    "cpus": ("cpu", "cpu.cfs_quota_us", "cpu.max"),
    "pids": ("pids", "pids.max", "pids.max"),
    "cpu_time": ("cpuacct", "cpuacct.usage", "cpu.stat"),
}


def limit_abilities(host: Host) -> dict[str, Ability]:
    """Rule by rule, for a sandbox whose cgroup is the host's."""
    found = {}
    for rule, (name, v1_file, v2_file) in _FILES.items():
        controller = host.cgroups.controller(name)
        if controller.usable:
            file = v1_file if controller.version == 1 else v2_file
            found[rule] = Ability(rule=rule, mechanism=f"cgroup v{controller.version} {file}")
        else:
            help = controller.help or f"use a kernel, or a container, with the {name} controller of cgroups"
            found[rule] = Ability(rule=rule, reason=controller.reason, help=help)
    found["wall_time"] = Ability(rule="wall_time", mechanism="the caller's clock")
    found["output"] = Ability(rule="output", mechanism="the caller's pipes")
    found["disk"] = Ability(
        rule="disk", reason="no level limits the work directory's size yet", help="limit memory and output instead"
    )
    return found
