"""A guest's network card: virtio-net, on a tap in the network namespace of the VMM's jail (levels.network.tap)."""

from __future__ import annotations

import os

from ringfence._value import Value
from ringfence.errors import Unmet
from ringfence.levels.base import Ability
from ringfence.levels.network.rules import HOSTS, RESOLV_CONF, NetworkFiles
from ringfence.result import Applied
from ringfence.spec import Network
from ringfence.wire import messages
from ringfence.wire.messages import INSIDE, NODEV, NOEXEC, NOSUID, OPTIONAL, RDONLY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ringfence.levels.container import ContainerSandbox
    from ringfence.spec import Spec
    from ringfence.wire.guest_messages import GuestPlan
    from ringfence.wire.messages import MountStep

__all__ = ["RULES", "Card", "abilities", "arguments", "disk_files", "unmet"]

RULES = ("network=nat", "allow", "publish", "bandwidth")
_TUN = "/dev/net/tun"
# What a card may be asked to do for its guest, and ours is not: each is code of the VMM's that a guest could reach.
_OFF = (
    *("csum", "guest_csum", "gso", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo", "host_tso4", "host_tso6"),
    *("host_ecn", "host_ufo", "ctrl_vq", "ctrl_rx", "ctrl_vlan", "ctrl_mac_addr", "guest_announce", "mq", "status"),
)


class Card(Value):
    """The network behind a guest's card. network: of mode "nat"."""

    __slots__ = ("network",)
    network: Network

    def __init__(self, *, network: Network) -> None:
        self._set(network=network)

    def closed(self) -> Card:
        """The same card, and nothing is open."""
        return Card(network=Network("nat", allow=()))


def of(spec: Spec) -> Card | None:
    return Card(network=spec.network) if spec.network.mode == "nat" else None


# ---- before a start ----


def abilities(sets: Iterable[str]) -> Mapping[str, Ability]:
    """sets: of the guest's kernel's modules, that there are."""
    reason, help = _why_not(sets)
    how = "a gateway outside, behind a tap in the VMM's own network namespace"
    return {rule: Ability(rule=rule, mechanism="" if reason else how, reason=reason, help=help) for rule in RULES}


def _why_not(sets: Iterable[str]) -> tuple[str, str]:
    if "net" not in sets:
        return "the guest's kernel has no virtio_net", "use Debian's generic kernel"
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        reason = f"the guest's packets come by a tap, and {_TUN} can't be opened: {os.strerror(error.errno or 0)}"
        return (
            reason,
            "as root run 'modprobe tun', and let the caller open it (chmod 666), or use isolation='container'",
        )
    return "", ""


def unmet(spec: Spec) -> list[Unmet]:
    if spec.network.mode != "nat":
        return []
    if spec.overlay or spec.image_is_disk or not NetworkFiles(spec.image, "guest", (0, 0)).missing:
        return []
    reason = "the image has no /etc/resolv.conf to tell the guest its name server in, and nothing can be made there"
    return [Unmet("network", "nat", reason, "make an empty file there, or use overlay=True")]


# Where an image's /etc/resolv.conf may lead to in /run, of which an image shows nothing: systemd-resolved, resolvconf.
_LED_TO = (b"systemd/resolve/stub-resolv.conf", b"systemd/resolve/resolv.conf", b"resolvconf/resolv.conf")


def disk_files(hostname: str, user: tuple[int, int]) -> list[MountStep]:
    """The steps that show /etc/resolv.conf and /etc/hosts of our own making over those of a disk, of which only the
    guest knows what it has: to run after the guest's own /run was made. Where there is no /etc/resolv.conf and none can
    be made, init says so (EROFS), and nothing runs.
    """
    flags = NOSUID | NODEV | NOEXEC
    steps = [] if user[0] == 0 else [messages.filesystem(b"/run", b"tmpfs", data=b"mode=0755,size=64k", flags=flags)]
    for name in _LED_TO:
        above = name.split(b"/")[:-1]
        steps += [messages.directory(b"/run/" + b"/".join(above[: count + 1])) for count in range(len(above))]
        steps.append(messages.file(b"/run/" + name, RESOLV_CONF, 0o444))
    steps.append(messages.file(b"/run/hosts", HOSTS % hostname.encode("ascii"), 0o444))
    steps.append(messages.file(b"/etc/resolv.conf"))
    steps.append(messages.bind(b"/etc/resolv.conf", b"/run/" + _LED_TO[0], RDONLY | INSIDE))
    steps.append(messages.bind(b"/etc/hosts", b"/run/hosts", RDONLY | INSIDE | OPTIONAL))
    return steps


# ---- starting ----


def arguments(fd: int, bus: str) -> list[str]:
    """QEMU's. fd: the tap's. bus: how its virtio devices end there, "device" or "pci"."""
    from ringfence.levels.network import tap

    mac = tap.GUEST_MAC.hex(":")
    off = ",".join(f"{one}=off" for one in _OFF)
    if bus == "pci":
        off += ",romfile="  # a ROM to boot from the network by: nobody does, and it is in a package of its own
    return [
        *("-netdev", f"tap,id=card,fd={fd},vhost=off"),
        *("-device", f"virtio-net-{bus},netdev=card,mac={mac},host_mtu={tap.MTU_BYTES},{off}"),
    ]


def put(plan: GuestPlan, jail: ContainerSandbox) -> None:
    """What the guest's init has to know."""
    from ringfence.levels.network import tap
    from ringfence.levels.network.inside import ADDRESS4, ADDRESS6, GATEWAY4, GATEWAY6

    assert jail.network is not None
    pairs = [(ADDRESS4, GATEWAY4)] + ([(ADDRESS6, GATEWAY6)] if jail.network.ipv6 else [])
    plan.card(tap.GATEWAY_MAC, pairs)


def applied(jail: ContainerSandbox, spec: Spec) -> list[Applied]:
    """The host's side of it, as the host has it: nothing of it is the guest's word."""
    if jail.network is not None:
        return jail.network.applied(spec.asked)
    requested = spec.network.mode if "network" in spec.asked else None
    return [Applied(rule="network", requested=requested, effective="none", mechanism="no network card")]
