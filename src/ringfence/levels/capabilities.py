"""Capabilities that a workload keeps: which can be granted to whom, and how they are told.

They are the sandbox's own: in a container they count in its user namespace, in a guest in the guest's kernel. At the
process level they would be the host's, so there are none.
"""

from __future__ import annotations

from ringfence.errors import Unmet
from ringfence.levels.base import Ability
from ringfence.result import Applied
from ringfence.spec.boundary import CAPABILITIES, capability_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.levels.host import Host
    from ringfence.spec import Spec
    from ringfence.wire.messages import Started

__all__ = ["NETWORK", "REFUSED_AT_PROCESS", "ability", "applied", "mask", "unmet"]

SET_NAMES = ("effective", "permitted", "inheritable", "bounding", "ambient")

# Those that count in the user namespace that a network namespace belongs to.
NETWORK = frozenset(("CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW"))

# For all that these allow, Linux asks for the capability in the first user namespace (capable(), not ns_capable()).
WITHOUT_POWER = frozenset(
    [
        "CAP_LINUX_IMMUTABLE",
        "CAP_NET_BROADCAST",
        "CAP_IPC_LOCK",
        "CAP_SYS_MODULE",
        "CAP_SYS_RAWIO",
        "CAP_SYS_PACCT",
        "CAP_SYS_TIME",
        "CAP_SYS_TTY_CONFIG",
        "CAP_MKNOD",
        "CAP_LEASE",
        "CAP_AUDIT_WRITE",
        "CAP_AUDIT_CONTROL",
        "CAP_MAC_OVERRIDE",
        "CAP_MAC_ADMIN",
        "CAP_SYSLOG",
        "CAP_WAKE_ALARM",
        "CAP_BLOCK_SUSPEND",
        "CAP_AUDIT_READ",
        "CAP_PERFMON",
        "CAP_BPF",
    ]
)

REFUSED_AT_PROCESS = Ability(
    rule="capabilities",
    reason="a process has no user namespace of its own: they would be the host's",
    help="use isolation='container' or 'vm'",
)


def ability(mechanism: str) -> Ability:
    return Ability(rule="capabilities", mechanism=mechanism)


def mask(wanted: tuple[str, ...]) -> int:
    """As the kernel has them: bit N is capability N."""
    return sum(1 << CAPABILITIES.index(name) for name in wanted)


def unmet(spec: Spec, host: Host) -> list[Unmet]:
    """What of a container's capabilities can't be granted on this host, or would be more than was meant."""
    wanted = set(spec.capabilities)
    found = []

    def refuse(which: set[str], reason: str, help: str) -> None:
        if which:
            listed = tuple(sorted(which, key=CAPABILITIES.index))
            found.append(Unmet("capabilities", listed, reason, help))

    last = _last_capability()
    refuse({name for name in wanted if CAPABILITIES.index(name) > last}, "this kernel doesn't know it", "leave it out")
    if spec.namespaces.user != "own":
        refuse(wanted, "they count in a user namespace of its own, and it has none", "leave namespaces out")
        return found
    networked = wanted & NETWORK
    if spec.network.mode == "host" or spec.namespaces.net != "own":
        reason = "they count only in a network namespace that belongs to the sandbox, which this one doesn't"
        refuse(networked, reason, "use network='none', or isolation='vm'")
    if "CAP_SYS_ADMIN" in wanted:
        powerful = {"CAP_SYS_ADMIN"}
        if not host.privileged:
            reason = (
                "its user is the caller's own outside: it could mount and change what is the caller's, as cgroups are"
            )
            refuse(powerful, reason, "run as root, or use isolation='vm'")
        shared = [one for one in ("mnt", "pid", "ipc", "uts") if getattr(spec.namespaces, one) != "own"]
        if shared:
            reason = f"it would be power over a namespace that isn't the sandbox's own ({', '.join(shared)})"
            refuse(powerful, reason, "leave namespaces out")
    if any(mount.writable for mount in spec.mounts):
        reason = "a file in a writable mount could be given capabilities that count on the host"
        refuse(wanted & {"CAP_SETFCAP"}, reason, "mount it read-only, or leave it out")
    return found


def _last_capability() -> int:
    try:
        with open("/proc/sys/kernel/cap_last_cap", "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return len(CAPABILITIES) - 1


def applied(spec: Spec, started: Started, mechanism: str, *, first_namespace: bool) -> Applied:
    """The five sets, read back. first_namespace: whether they count in the first user namespace of their kernel."""
    if not any(started.capabilities):
        asked = spec.capabilities or None
        return Applied(rule="capabilities", requested=asked, effective=None if asked else "none", mechanism=mechanism)
    sets = dict(zip(SET_NAMES, map(capability_names, started.capabilities), strict=True))
    # An unprivileged caller may not empty the bounding set, which no_new_privs keeps from mattering.
    held = {name: "all" if len(one) == len(CAPABILITIES) else one for name, one in sets.items() if one}
    if spec.capabilities and not first_namespace:
        powerless = [name for name in spec.capabilities if name in WITHOUT_POWER]
        if powerless:
            mechanism += f"; without power in a user namespace: {' '.join(powerless)}"
    return Applied(
        rule="capabilities",
        requested=spec.capabilities or None,
        effective=held,
        mechanism=mechanism,
    )
