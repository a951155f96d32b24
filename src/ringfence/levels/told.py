"""What was in force in a sandbox on the host's kernel, rule by rule, as a result tells it in `applied`."""

from __future__ import annotations

import os
import resource

from ringfence.levels import capabilities, filter, namespace_rules, namespaces, reach
from ringfence.levels.base import requested
from ringfence.levels.limit_rules import cgroup_applied
from ringfence.result import Applied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.levels.base import Outcome
    from ringfence.levels.container import ContainerSandbox
    from ringfence.levels.local import LocalSandbox
    from ringfence.levels.process import ProcessSandbox

__all__ = ["container_user", "of_container", "of_local", "of_process"]

_INFINITY = 2**64 - 1
_RLIMIT_NAMES = {
    resource.RLIMIT_CORE: "rlimit core",
    resource.RLIMIT_CPU: "rlimit cpu",
    resource.RLIMIT_NPROC: "rlimit nproc",
    resource.RLIMIT_NICE: "rlimit nice",
    resource.RLIMIT_RTPRIO: "rlimit rtprio",
}


def of_local(sandbox: LocalSandbox, outcome: Outcome) -> list[Applied]:
    """The rules that both levels have, read back from the command and the cgroup."""
    spec, started = sandbox.spec, outcome.started
    found = cgroup_applied(sandbox.cgroup.in_force if sandbox.cgroup is not None else sandbox.in_force, spec.asked)
    if spec.limits.wall_time_ns is not None:
        wall = spec.limits.wall_time_ns
        found.append(Applied(rule="wall_time", requested=wall, effective=wall, mechanism="the caller's clock"))
    if spec.limits.cpu_time_ns is not None:
        cpu = spec.limits.cpu_time_ns
        found.append(Applied(rule="cpu_time", requested=cpu, effective=cpu, mechanism="init, by the cgroup's usage"))
    output = spec.limits.output_bytes
    asked = output if "output" in spec.asked else None
    found.append(Applied(rule="output", requested=asked, effective=output, mechanism="the caller's pipes"))
    if started is None:
        return found
    user = f"{started.ids[1]}:{started.ids[4]}"
    found.append(
        Applied(
            rule="user",
            requested=requested(spec, "user"),
            effective=user,
            mechanism=sandbox.user_mechanism(),
        )
    )
    found.append(capabilities.applied(spec, started, "read from /proc/self/status", first_namespace=False))
    found.append(
        Applied(
            rule="no_new_privs",
            requested=None,
            effective=True if started.no_new_privs else None,
            mechanism="read from /proc/self/status",
        )
    )
    found.append(filter.applied(spec, sandbox.host, started, sandbox.filter))
    for which, (soft, hard) in started.rlimits.items():
        name = _RLIMIT_NAMES.get(which, f"rlimit {which}")
        shown = [None if one == _INFINITY else one for one in (soft, hard)]
        found.append(Applied(rule=name, requested=None, effective=shown, mechanism="getrlimit"))
    return found


def of_process(sandbox: ProcessSandbox, outcome: Outcome) -> list[Applied]:
    found = of_local(sandbox, outcome)
    started = outcome.started
    if started is None:
        return found
    found += reach.applied(sandbox.spec, started, sandbox.landlock)
    shown = "the host read-only" if sandbox.spec.readable is None else "only what is `readable`"
    found.append(
        Applied(
            rule="files",
            requested=None,
            effective=f"{shown}, the work directory writable" if started.landlock else None,
            mechanism=sandbox.landlock or "this kernel has no Landlock",
        )
    )
    for device in sandbox.spec.devices:
        found.append(
            Applied(
                rule=f"device {os.fsdecode(device.target)}",
                requested=device.access,
                effective=device.access if started.landlock else None,
                mechanism=f"{sandbox.landlock}, and its mode",
            )
        )
    for mount in sandbox.spec.mounts:
        shown = "writable" if mount.writable else "read-only"
        found.append(
            Applied(
                rule=f"mount {os.fsdecode(mount.target)}",
                requested=shown,
                effective=shown if started.landlock else None,
                mechanism=sandbox.landlock,
            )
        )
    mode = sandbox.spec.network.mode
    narrowed = sandbox.spec.network.allow is not None
    enforced = mode == "host" or started.seccomp == 2
    mechanism = "seccomp: no socket(2)" if mode == "none" else "nothing is taken away"
    if narrowed:
        mechanism = "only TCP, to what `allow` names"
    if mode == "none" and started.landlock and sandbox.host.landlock_abi >= 4:
        mechanism += ", and Landlock: no TCP"
    found.append(
        Applied(
            rule="network",
            requested=mode if "network" in sandbox.spec.asked else None,
            effective=mode if enforced else None,
            mechanism=mechanism if enforced else sandbox.host.seccomp,
        )
    )
    if not started.landlock and not sandbox.has_own_uid:
        found.append(
            Applied(
                rule="other processes of its user",
                requested=None,
                effective=None,
                mechanism="within reach: without Landlock their memory is open (/proc/PID/mem)",
            )
        )
    if started.ids[1] == 0:
        found.append(
            Applied(
                rule="host files and sockets",
                requested=None,
                effective=None,
                mechanism="shared: uid 0 reads what root may, and connects where the network is the host's",
            )
        )
    found += [
        Applied(rule=f"namespace {name}", requested=None, effective=inode, mechanism="the host's")
        for name, inode in started.namespaces.items()
    ]
    return found


def of_container(sandbox: ContainerSandbox, outcome: Outcome) -> list[Applied]:
    found = of_local(sandbox, outcome)
    started = outcome.started
    if started is None:
        return found
    spec = sandbox.spec
    found.append(
        Applied(rule="hostname", requested=spec.hostname, effective=started.hostname, mechanism="UTS namespace")
    )
    found += namespace_rules.applied(spec, sandbox.shared, outcome, host_network=sandbox.network_kind == "host")
    if sandbox.network is not None:
        found += sandbox.network.applied(spec.asked)
    mode = sandbox.network_kind
    # What wasn't told is never a restriction.
    host_net = namespaces.own_namespaces().get("net")
    own_net = started.namespaces.get("net", host_net) != host_net
    if sandbox.network is None:
        found.append(
            Applied(
                rule="network",
                requested=mode if "network" in spec.asked else None,
                effective=mode if own_net == (mode != "host") else None,
                mechanism="a joined network namespace"
                if mode == "joined"
                else _network_mechanism(own_net, started.landlock),
            )
        )
    found.append(
        Applied(
            rule="files",
            requested=spec.image if "image" in spec.asked else None,
            effective=f"{spec.image}, {'below an overlay' if spec.overlay else 'read-only'};"
            " its own /tmp, /dev and /proc; /run and /home empty",
            mechanism="mount namespace, pivot_root",
        )
    )
    if sandbox.layer is not None:
        found += sandbox.layer.applied(spec)
    for device in spec.devices:
        found.append(
            Applied(
                rule=f"device {os.fsdecode(device.target)}",
                requested=device.access,
                effective=device.access,
                mechanism="a node of its own, by its mode" if sandbox.privileged else "the host's node, by its mode",
            )
        )
    for mount in spec.mounts:
        shown = "writable" if mount.writable else "read-only"
        found.append(
            Applied(
                rule=f"mount {os.fsdecode(mount.target)}",
                requested=shown,
                effective=shown,
                mechanism="bind, mount_setattr"
                + ("; its file system can't map ids: all are nobody's" if mount.source in sandbox.unmapped else ""),
            )
        )
    return found


def container_user(sandbox: ContainerSandbox) -> str:
    user = sandbox.shared.kinds["user"]
    if user == "host":
        return "the host's user namespace: an id that no account has"
    if user != "own":
        return f"a joined user namespace: {sandbox.outside[0]}:{sandbox.outside[1]} outside"
    if not sandbox.host.privileged:
        how = "all others by newuidmap" if sandbox.subordinate else "no other is mapped"
        return f"user namespace: id {sandbox.user[0]} is {os.geteuid()} outside, {how}"
    inside = sandbox.maps[0].split()
    return f"user namespace: id {inside[0].decode()} is {inside[1].decode()} outside, {inside[2].decode()} mapped"


def _network_mechanism(own: bool, scoped: bool) -> str:
    if own:
        return "network namespace with only lo"
    return "the host's network namespace" + (", less its abstract UNIX sockets (Landlock)" if scoped else "")
