"""What a process can enforce on a host, and what of a spec it can't."""

from __future__ import annotations

import os

from ringfence.errors import Unmet
from ringfence.levels import capabilities, filter, reach
from ringfence.levels.base import Ability, requested
from ringfence.levels.limit_rules import limit_abilities, limit_unmet
from ringfence.linux import landlock_abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.levels.host import Host
    from ringfence.spec import Spec

__all__ = ["abilities", "unmet"]


def abilities(host: Host) -> dict[str, Ability]:
    container = "use isolation='container' or 'vm'"
    found = limit_abilities(host)
    found["hostname"] = Ability(rule="hostname", reason="a process has the host's name", help=container)
    found["seccomp"] = filter.ability(host)
    found["capabilities"] = capabilities.REFUSED_AT_PROCESS
    found["image"] = Ability(rule="image", reason="a process sees the host's files", help=container)
    found["user"] = Ability(rule="user", mechanism="setresuid")
    found.update(reach.abilities(host))
    found["tmpfs"] = Ability(rule="tmpfs", reason="a process has no mounts of its own", help=container)
    found["overlay"] = Ability(rule="overlay", reason="a process has no mounts of its own", help=container)
    found["kernel"] = Ability(rule="kernel", reason="a process runs on the host's kernel", help="use isolation='vm'")
    found["namespaces"] = Ability(
        rule="namespaces", reason="a process has the host's, all of them", help="use isolation='container'"
    )
    found["network=host"] = Ability(rule="network=host", mechanism="nothing is taken away")
    found["network=none"] = (
        Ability(rule="network=none", reason=host.seccomp, help="install libseccomp: 'ringfence setup'")
        if host.seccomp
        else Ability(rule="network=none", mechanism="seccomp: no socket(2)")
    )
    found["network=nat"] = Ability(
        rule="network=nat", reason="a process has no network stack of its own", help="use isolation='container'"
    )
    return found


def unmet(spec: Spec, host: Host) -> list[Unmet]:
    unmet = limit_unmet(spec, host) + reach.unmet(spec, host)
    if "seccomp" in spec.asked:
        unmet += filter.unmet(spec, host)
    elif not host.privileged or spec.user is not None:
        unmet += filter.cgroup_unmet(spec, host)
    if spec.devices:
        from ringfence.levels import devices

        unmet += devices.process_unmet(spec, privileged=host.privileged)
    for mount in spec.mounts:
        asked = (mount.source, mount.target, mount.writable)
        if mount.source != mount.target:
            unmet.append(
                Unmet(
                    "mounts",
                    asked,
                    f"a process sees the host's paths: {os.fsdecode(mount.source)} can't appear elsewhere",
                    "use the same path twice, or isolation='container'",
                )
            )
    if not host.landlock_abi and (not host.privileged or spec.user is not None):
        unmet += _without_landlock(spec, host)
    elif not host.privileged and host.landlock_abi < landlock_abi.SCOPES_ABI:
        # The workload is the caller's own user, who may stop ringfence's processes too.
        for rule in sorted(spec.asked & {"wall_time", "cpu_time"}):
            unmet.append(
                Unmet(
                    rule,
                    requested(spec, rule),
                    "the workload could stop ringfence itself: signals can't be kept in here (Landlock ABI 6)",
                    "use Linux 6.12, run as root, or use isolation='container'",
                )
            )
    if isinstance(spec.user, str):
        unmet.append(Unmet("user", spec.user, "a process takes a user by number", "give a uid or 'uid:gid'"))
    elif spec.user is not None and not host.privileged and spec.user != (os.geteuid(), os.getegid()):
        unmet.append(Unmet("user", spec.user, "only root can become another user", "run as root"))
    return unmet


def _without_landlock(spec: Spec, host: Host) -> list[Unmet]:
    """What was asked of a workload whose user has other processes: it could write their memory (/proc/PID/mem), and
    have them do what it may not. A filter of its own is refused by `levels.filter`.
    """
    from ringfence.levels import owned

    keeps = {"network"} if spec.network.mode == "none" else set()
    if owned.is_owner(spec, host):
        keeps |= owned.CGROUP_LIMITS  # whose files are its user's too
    if not host.privileged:
        keeps |= {"wall_time", "output"}  # which ringfence's own processes keep
    reason = "the workload's user has other processes, and files of cgroups, that only Landlock keeps from it"
    help = "use a kernel with Landlock, isolation='container', or root without user="
    return [Unmet(rule, requested(spec, rule), reason, help) for rule in sorted(spec.asked & keeps)]
