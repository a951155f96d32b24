"""Which destinations a sandbox may reach: by address, and by the names whose addresses its own resolver gave it.

Addresses are packed (4 or 16 bytes). Nothing here does any input or output.
"""

from __future__ import annotations

import ipaddress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.spec.network import Allowed

__all__ = ["HOST_LOOPBACK", "Policy", "is_special"]

# A name's addresses stay open for the time to live of the answer, and at least this long: programs keep addresses.
LEAST_OPEN_S = 300.0
MOST_OPEN_S = 86400.0
# Addresses that are open by name at once; the oldest gives way.
_MOST_OPEN = 4096

HOST_LOOPBACK = ipaddress.ip_address("127.0.0.1").packed

_ANY_PORT = 0

# Where a cloud's instances ask for their own credentials, beside 169.254.0.0/16 and fe80::/10: Alibaba (twice), Azure,
# Oracle (twice), Google, Scaleway, Linode.
_METADATA = frozenset(
    ipaddress.ip_address(one).packed
    for one in (
        *("100.100.100.200", "fd00:100::100:200", "168.63.129.16", "192.0.0.192", "fd00:c1::a9fe:a9fe"),
        *("fd20:ce::254", "fd00:42::42", "fd00:a9fe:a9fe::1"),
    )
)
# Whole prefixes: those of Amazon's services (metadata, credentials of containers and pods, DNS, time), and those of
# addresses that stand for an IPv4 one in more ways than can be told: local NAT64 (RFC 8215), Teredo (RFC 4380).
_METADATA_PREFIX = b"\xfd\0\x0e\xc2"
_OPAQUE_PREFIXES = (b"\0\x64\xff\x9b\0\1", b"\x20\1\0\0")


def is_special(packed: bytes) -> bool:
    """Whether an address is never meant by a wildcard, a network or a name: loopback, link-local (the metadata services
    among them), multicast, broadcast, unspecified, reserved, and what holds such an IPv4 address.
    """
    if packed in _METADATA:
        return True
    if len(packed) == 4:
        return packed[0] in (0, 127) or packed[0] >= 224 or packed[:2] == b"\xa9\xfe"
    if packed[:8] == bytes(8):
        # ::, ::1, IPv4-compatible and IPv4-mapped ones, SIIT: none of them belongs on a wire.
        return True
    if packed[:4] == _METADATA_PREFIX or packed.startswith(_OPAQUE_PREFIXES):
        return True
    embedded = _embedded(packed)
    if embedded is not None and is_special(embedded):
        return True
    # ff00::/8, fe80::/10, and the site-local fec0::/10 of old.
    return packed[0] == 0xFF or (packed[0] == 0xFE and packed[1] >= 0x80)


def is_private(packed: bytes) -> bool:
    """Whether an address is of a private network, which a public name has no business to point to."""
    if len(packed) == 4:
        return (
            packed[0] == 10
            or (packed[0] == 172 and packed[1] & 0xF0 == 16)
            or packed[:2] == b"\xc0\xa8"
            or (packed[0] == 100 and packed[1] & 0xC0 == 64)  # carriers' (RFC 6598)
            or packed[:3] == b"\xc0\0\0"
            or (packed[0] == 198 and packed[1] & 0xFE == 18)  # benchmarks' (RFC 2544)
        )
    embedded = _embedded(packed)
    return packed[0] & 0xFE == 0xFC or (embedded is not None and is_private(embedded))


def _embedded(packed: bytes) -> bytes | None:
    """The IPv4 address that an IPv6 one stands for: NAT64 (RFC 6052) and 6to4 (RFC 3056)."""
    if packed[:12] == b"\0\x64\xff\x9b" + bytes(8):
        return packed[12:]
    return packed[2:6] if packed[:2] == b"\x20\x02" else None


class Policy:
    """The allow-list of one sandbox. allow: of the spec; None allows every destination that isn't special."""

    def __init__(self, allow: Sequence[Allowed] | None) -> None:
        self.unlimited = allow is None
        self._any: set[int] = set()
        self._addresses: dict[bytes, set[int]] = {}
        self._networks: list[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int]] = []
        self._names: dict[str, set[int]] = {}
        self._below: dict[str, set[int]] = {}
        # address -> {port: until}, in order of their last opening.
        self._opened: dict[bytes, dict[int, float]] = {}
        for one in allow or ():
            port = _ANY_PORT if one.port is None else one.port
            if one.host == "*":
                self._any.add(port)
            elif "/" in one.host:
                network = ipaddress.ip_network(one.host)
                if network.num_addresses == 1:
                    self._addresses.setdefault(_packed(network.network_address), set()).add(port)
                else:
                    self._networks.append((network, port))
            elif _is_address(one.host):
                self._addresses.setdefault(_packed(ipaddress.ip_address(one.host)), set()).add(port)
            elif one.host.startswith("*."):
                self._below.setdefault(one.host[2:], set()).add(port)
            else:
                self._names.setdefault(one.host, set()).add(port)

    def names(self, address: bytes, port: int) -> bool:
        """Whether a rule names this very address: the only way to a special one, or to one of the host's own."""
        ports = self._addresses.get(address, ())
        return port in ports or _ANY_PORT in ports

    def permits(self, address: bytes, port: int, now: float) -> bool:
        """Whether a flow to there may be opened. Whether the address is the host's own is for the caller to ask."""
        if self.names(address, port):
            return True
        if is_special(address):
            return False
        if self.unlimited or _matches(self._any, port):
            return True
        where = ipaddress.ip_address(address)
        if any(where in network for network, open_port in self._networks if open_port in (port, _ANY_PORT)):
            return True
        until = self._opened.get(address, {})
        return max(until.get(port, 0.0), until.get(_ANY_PORT, 0.0)) > now

    def ports_of(self, name: str) -> set[int]:
        """The ports on which a name may be reached; 0 is any. Empty: it may not be resolved either."""
        ports = set(self._any) | self._names.get(name, set())
        above = name
        while "." in above:
            above = above.partition(".")[2]
            ports |= self._below.get(above, set())
        return ports

    def open(self, name: str, addresses: Sequence[bytes], ttl_s: float, now: float) -> list[bytes]:
        """What of a name's addresses the workload may be told; these are open from now on.

        A name that points to a special or a private address doesn't open it (DNS rebinding): a rule has to name such
        an address, or the network that it is in.
        """
        ports = self.ports_of(name)
        told = []
        for address in addresses:
            if is_special(address) or is_private(address):
                # What a rule opens by itself may be told; what only a name points to may not.
                ruled = not is_special(address) and (bool(self._any) or self._in_network(address))
                if ruled or address in self._addresses:
                    told.append(address)
                continue
            told.append(address)
            until = self._opened.pop(address, {})
            for port in ports:
                until[port] = max(until.get(port, 0.0), now + min(max(ttl_s, LEAST_OPEN_S), MOST_OPEN_S))
            self._opened[address] = until
            while len(self._opened) > _MOST_OPEN:
                del self._opened[next(iter(self._opened))]
        return told

    def _in_network(self, address: bytes) -> bool:
        where = ipaddress.ip_address(address)
        return any(where in network for network, _ in self._networks)


def _matches(ports: set[int], port: int) -> bool:
    return port in ports or _ANY_PORT in ports


def _packed(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
    """An IPv4-mapped address is an IPv4 one on the wire."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).packed


def _is_address(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdecimal()
