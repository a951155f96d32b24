"""What a level needs of a spec's network rules before it starts anything. Imported on every start, so it is small."""

from __future__ import annotations

import os

from ringfence.errors import Unmet
from ringfence.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.spec import Spec
    from ringfence.wire.messages import MountStep

__all__ = ["NetworkFiles", "network_unmet"]

_FLAGS = messages.NOSUID | messages.NODEV | messages.NOEXEC

RESOLV_CONF = b"# by ringfence: its gateway resolves what may be reached\nnameserver 192.0.0.1\n"
HOSTS = (
    b"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n192.0.0.2 %s\n192.0.0.1 host.ringfence.internal\n"
)


def network_unmet(spec: Spec) -> list[Unmet]:
    """The rules that only a network of the sandbox's own can keep."""
    network = spec.network
    if network.mode == "none":
        return []
    if network.mode == "nat":
        if spec.namespaces.net == "own":
            return _in_vain(spec) if network.allow else []
        reason = "its gateway is the way out of a network namespace that it has made itself"
        return [Unmet("network", "nat", reason, "leave namespaces.net out")]
    reason = "it would have the host's own network, where nothing stands between it and the world"
    asked: dict[str, object] = {
        "allow": None if network.allow is None else tuple(map(str, network.allow)),
        "publish": network.publish or None,
        "bandwidth": network.bandwidth_bytes_per_second,
    }
    return [Unmet(rule, value, reason, "use network mode 'nat'") for rule, value in asked.items() if value is not None]


def _in_vain(spec: Spec) -> list[Unmet]:
    """Rules that name what a packet never leaves the sandbox for: its own addresses and its gateway's."""
    import ipaddress

    from ringfence.levels.network import inside

    own = [inside.ADDRESS4, inside.GATEWAY4, inside.ADDRESS6, inside.GATEWAY6]
    found = []
    for rule in spec.network.allow or ():
        if not rule.host[-1:].isdigit() and ":" not in rule.host:
            continue  # a name, or any
        try:
            where = ipaddress.ip_network(rule.host)
        except ValueError:
            continue  # a name that ends with a digit
        first = getattr(where[0], "ipv4_mapped", None) or where[0]
        if first == ipaddress.ip_address("127.0.0.1") and where.num_addresses == 1:
            continue  # the host's loopback, by the gateway's address
        single = where.num_addresses == 1 and (first.packed in own or first.is_unspecified)
        if single or (first.is_loopback and where.is_loopback) or (first.is_loopback and where.num_addresses == 1):
            reason = "it is an address of the sandbox's own, which no packet leaves for: the rule would open nothing"
            help = "a service of the host's loopback is opened by '127.0.0.1:PORT', and is at host.ringfence.internal"
            found.append(Unmet("allow", str(rule), reason, help))
    return found


class NetworkFiles:
    """The steps that show /etc/resolv.conf and /etc/hosts of our own making over the image's.

    before, after: to run before and after the sandbox's own /tmp and /run are mounted. missing: whether the image has
    no /etc/resolv.conf, and as its root is read-only gets none: programs then ask 127.0.0.1.
    """

    def __init__(self, image: str, hostname: str, user: tuple[int, int]) -> None:
        # A file system in memory that the sandbox's own /tmp covers right afterwards.
        self.before = [messages.filesystem(b"/tmp", b"tmpfs", data=b"mode=0755,size=64k", flags=_FLAGS)]
        self.after: list[MountStep] = []
        self.missing = False
        top = b"/" if image == "host" else os.fsencode(image)
        for name, data in ((b"resolv.conf", RESOLV_CONF), (b"hosts", HOSTS % hostname.encode("ascii"))):
            place = _place(top, name)
            if place is None:
                self.missing |= name == b"resolv.conf"
            elif place.startswith(b"/run/"):
                # A symlink to where a service of the host's keeps it. /run is the sandbox's own, and empty.
                if user[0] != 0 and not self.after:
                    self.after.append(messages.filesystem(b"/run", b"tmpfs", data=b"mode=0755,size=64k", flags=_FLAGS))
                self.after += [*_directories(place), messages.file(place, data, 0o444)]
            else:
                self.before.append(messages.file(b"/tmp/" + name, data, 0o444))
                self.before.append(messages.bind(b"/etc/" + name, b"/tmp/" + name, messages.RDONLY | messages.INSIDE))


def _place(top: bytes, name: bytes) -> bytes | None:
    """Where in the sandbox /etc/NAME is in the end, as far as one symlink tells; None where the image has none."""
    path = os.path.join(top, b"etc", name)
    try:
        target = os.readlink(path)
    except OSError:
        return b"/etc/" + name if os.path.lexists(path) else None
    place = os.path.normpath(os.path.join(b"/etc", target))
    return place[4:] if place.startswith(b"/var/run/") else place


def _directories(place: bytes) -> list[MountStep]:
    parts = place.split(b"/")[1:-1]
    return [messages.directory(b"/" + b"/".join(parts[:count])) for count in range(2, len(parts) + 1)]
