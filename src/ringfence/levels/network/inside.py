"""What a sandbox's network namespace is given before its command starts, and the gateway's own sockets in it.

The namespace belongs to the sandbox's user namespace, and nothing in it is trusted: were a workload to tear all of this
down, it would only be cut off. See docs/design/network.md.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import socket
import struct

from ringfence.errors import KernelError, ProtocolError
from ringfence.levels.network import tap
from ringfence.levels.network.packets import fragments
from ringfence.linux import netlink
from ringfence.linux.netlink import expression
from ringfence.wire.channel import received

__all__ = ["ADDRESS4", "ADDRESS6", "GATEWAY4", "GATEWAY6", "MARK", "Inside", "Supply"]

# Of the prefix that a host may use for itself (RFC 7335), so that no destination is hidden behind them.
ADDRESS4, GATEWAY4 = (ipaddress.ip_address(one).packed for one in ("192.0.0.2", "192.0.0.1"))
# Unique local (RFC 4193), of a prefix drawn once. From such a source programs prefer IPv4 where a name has both.
ADDRESS6, GATEWAY6 = (ipaddress.ip_address(f"fdd5:7266:6e65:7400::{one}").packed for one in (2, 1))
# The port of the gateway's sockets, which packets are handed to whatever their own port is.
_PORT = 1
# On a SYN that the gateway has judged. Setting it takes CAP_NET_ADMIN, and gains nothing: see `Gateway`.
MARK = 0x72660001

_TABLE, _CHAIN = b"ringfence", b"judge"
_PREROUTING, _PRIORITY_MANGLE = 0, -150
_META_MARK, _META_INTERFACE, _META_FAMILY, _META_PROTOCOL = 3, 4, 15, 16
_IPV4, _IPV6 = b"\2", b"\x0a"
_TCP, _UDP = b"\6", b"\x11"

_GROUP = 1
_LO = 1
_IP_TRANSPARENT, _IP_RECVORIGDSTADDR, _IPV6_TRANSPARENT, _IPV6_RECVORIGDSTADDR = 19, 20, 75, 74
_ANSWER_LIMIT_S = 10.0


class Supply:
    """Sockets of a sandbox's network namespace, made on request by its init."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.settimeout(_ANSWER_LIMIT_S)

    def theirs(self) -> int:
        """The descriptor that init gets with the plan."""
        return self._theirs.fileno()

    def handed_over(self) -> None:
        self._theirs.close()

    def fileno(self) -> int:
        return self._ours.fileno()

    def request(self, domain: int, kind: int, protocol: int = 0) -> None:
        try:
            self._ours.send(struct.pack("=III", domain, kind, protocol))
        except (BrokenPipeError, ConnectionResetError):
            raise ProtocolError("init ended before it was asked for a socket") from None

    def take(self) -> socket.socket:
        """The socket of the oldest request. Raises KernelError with init's error."""
        return socket.socket(fileno=self.take_descriptor("socket"))

    def take_descriptor(self, call: str) -> int:
        """The same for what needn't be a socket."""
        try:
            data, control, _, _ = self._ours.recvmsg(4, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        except (TimeoutError, ConnectionResetError):
            raise ProtocolError("init hands over no socket") from None
        found = received(control)
        if len(data) != 4 or (data == bytes(4)) != (len(found) == 1):
            for fd in found:
                os.close(fd)
            raise ProtocolError("init ended before it handed over a socket")
        if not found:
            raise KernelError(call, ["of the sandbox's network namespace"], struct.unpack("=i", data)[0])
        return found[0]

    def make(self, domain: int, kind: int, protocol: int = 0) -> socket.socket:
        self.request(domain, kind, protocol)
        return self.take()

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


class Inside:
    """The gateway's sockets in one sandbox's network namespace, all non-blocking.

    guest: whether who sends is a guest, whose VMM has the namespace to itself. syn: on which `netlink.logged` finds
    each SYN. tcp: listeners, udp: sockets for every address. raw: by address size. tap: a guest's, until it was handed
    on, or -1.
    """

    def __init__(self, supply: Supply, *, ipv6: bool, local_dns: bool = False, guest: bool = False) -> None:
        self.supply = supply
        self.ipv6 = ipv6
        self.guest = guest
        self.tap = -1
        self._local_dns = local_dns
        self._wanted = _wanted(ipv6)
        for domain, kind, protocol in self._wanted:
            supply.request(domain, kind, protocol)
        if guest:
            supply.request(socket.AF_UNSPEC, 0)
        self.applied = ""
        self._all: list[socket.socket] = []

    def open(self) -> None:
        """Takes the sockets and configures the namespace, once init has begun to answer.

        Raises KernelError with what this kernel refuses.
        """
        for _ in self._wanted:
            self._all.append(self.supply.take())
        if self.guest:
            self.tap = self.supply.take_descriptor("tap")
        route, self.syn, *rest = self._all
        for one in (route, self.syn):
            one.settimeout(_ANSWER_LIMIT_S)
        self._configure(route, self.syn)
        self.syn.setblocking(False)
        self._all.remove(route)
        route.close()
        self.tcp, self.udp = rest[0::3], rest[1::3]
        self.raw: dict[int, socket.socket] = {}
        for index, family in enumerate(_families(self.ipv6)):
            self._prepare(*rest[3 * index : 3 * index + 3], family=family)
        if self._local_dns:
            self.udp.append(self._open_local_dns())

    def _open_local_dns(self) -> socket.socket:
        """Where programs ask that find no resolv.conf (resolver(3))."""
        one = self.supply.make(socket.AF_INET, socket.SOCK_DGRAM)
        self._all.append(one)
        one.bind(("127.0.0.1", 53))
        one.setsockopt(socket.SOL_IP, _IP_RECVORIGDSTADDR, 1)
        one.setblocking(False)
        return one

    def _configure(self, route: socket.socket, filters: socket.socket) -> None:
        pairs = [(ADDRESS4, GATEWAY4)] + ([(ADDRESS6, GATEWAY6)] if self.ipv6 else [])
        addresses = [pair[self.guest] for pair in pairs]
        # The addresses first: a route can only prefer a source that is there.
        netlink.exchange(route, b"".join(map(netlink.address, addresses)), len(addresses), "RTM_NEWADDR")
        netlink.exchange(route, b"".join(map(netlink.any_ip_route, addresses)), len(addresses), "RTM_NEWROUTE")
        if self.guest:
            tap.configure(route, pairs)
        # First who takes what the rules log, so that none of it is lost.
        netlink.exchange(filters, netlink.log_group(_GROUP), 2, "NFULNL_MSG_CONFIG")
        rules, batch = _rules(self.ipv6, self.guest)
        netlink.exchange(filters, batch, 1, "NFT_MSG_NEWRULE")
        # Read back, as everything that is told in `applied`.
        held = netlink.list_addresses(route)
        if not set(addresses) <= set(held) or netlink.count_rules(filters, _TABLE) != rules:
            raise ProtocolError("the kernel doesn't have the network that it acknowledged")
        shown = ", ".join(str(ipaddress.ip_address(one)) for one in held if one in addresses)
        behind = f", {tap.NAME} to the guest alone" if self.guest else ""
        self.applied = f"{shown} on lo{behind}, no route out, {rules} nftables rules"

    def _prepare(self, tcp: socket.socket, udp: socket.socket, raw: socket.socket, *, family: int) -> None:
        level, transparent, original, address = (
            (socket.SOL_IP, _IP_TRANSPARENT, _IP_RECVORIGDSTADDR, GATEWAY4)
            if family == socket.AF_INET
            else (socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, _IPV6_RECVORIGDSTADDR, GATEWAY6)
        )
        where = (str(ipaddress.ip_address(address)), _PORT)
        for one in (tcp, udp):
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.setsockopt(level, transparent, 1)
            one.bind(where)
        udp.setsockopt(level, original, 1)
        tcp.listen(128)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        self.raw[4 if family == socket.AF_INET else 16] = raw
        for one in (tcp, udp, raw):
            one.setblocking(False)

    def connect(self, sock: socket.socket, port: int) -> int:
        """Begins a connection of the gateway's own to a port of the sandbox: the errno, as connect_ex gives it."""
        if self.guest:
            # The rules hand what the guest answers to a transparent socket, and to no other.
            sock.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)
        return sock.connect_ex((str(ipaddress.ip_address(ADDRESS4)) if self.guest else "127.0.0.1", port))

    def inject(self, destination: bytes, packet: bytes) -> None:
        """Sends a packet as it is, in the namespace. One that doesn't go is lost, as on any network."""
        raw = self.raw.get(len(destination))
        if raw is None:
            return
        to = (str(ipaddress.ip_address(destination)), 0)
        try:
            for piece in fragments(packet, tap.MTU_BYTES) if self.guest else (packet,):
                raw.sendto(piece, to)
        except OSError:
            return

    def close(self) -> None:
        for one in self._all:
            one.close()
        self._all.clear()
        self.tap_was_handed_on()

    def tap_was_handed_on(self) -> None:
        held, self.tap = self.tap, -1
        if held >= 0:
            os.close(held)


def _families(ipv6: bool) -> list[int]:
    return [socket.AF_INET, socket.AF_INET6] if ipv6 else [socket.AF_INET]


def _wanted(ipv6: bool) -> list[tuple[int, int, int]]:
    """The arguments of socket(2) for all that is needed from the start."""
    found: list[tuple[int, int, int]] = [
        (socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_ROUTE),
        (socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_NETFILTER),
    ]
    for family in _families(ipv6):
        found += [(family, socket.SOCK_STREAM, 0), (family, socket.SOCK_DGRAM, 0)]
        found.append((family, socket.SOCK_RAW, socket.IPPROTO_RAW))
    return found


# ---- nftables ----


@functools.cache
def _rules(ipv6: bool, guest: bool = False) -> tuple[int, bytes]:
    """(number of rules, the batch that makes them). Only what stays inside, or goes to our sockets, is accepted.

    Of a guest's packets none is for the namespace itself, and all have the guest's address. Beside them there is only
    what the gateway sends: its VMM, which is alone in there, has no network of its own.
    """
    e = expression
    port = struct.pack("!H", _PORT)
    rules = []
    families = [(_IPV4, 2, GATEWAY4, ((16, b"\x7f"), (16, ADDRESS4)), (12, ADDRESS4))]
    if ipv6:
        own6 = (24, ipaddress.ip_address("::1").packed), (24, ADDRESS6)
        families.append((_IPV6, 10, GATEWAY6, own6, (8, ADDRESS6)))
    judged = [e.meta(_META_MARK), e.compare(struct.pack("=I", MARK), equal=False)]
    if guest:
        rules.append([e.meta(_META_INTERFACE), e.compare(struct.pack("=I", _LO)), *judged, e.verdict(0)])
    outside = [e.meta(_META_INTERFACE), e.compare(struct.pack("=I", _LO), equal=False)]
    for family, number, gateway, own, (at, sender) in families:
        here = [e.meta(_META_FAMILY), e.compare(family)]
        if guest:
            of_others = [e.payload(1, at, len(sender)), e.compare(sender, equal=False)]
            rules.append([*here, *outside, *of_others, e.verdict(0)])
        for offset, value in own[: 1 if guest else 2]:
            to = [e.payload(1, offset, len(value)), e.compare(value)]
            rules.append([*here, *outside, *to, e.verdict(0)] if guest else [*here, *to, e.verdict(1)])
        # A SYN that wasn't judged goes to the gateway and no further; it sends it again once it may pass.
        asks = [e.meta(_META_PROTOCOL), e.compare(_TCP), e.payload(2, 13, 1), e.mask(b"\x17"), e.compare(b"\2")]
        rules.append([*here, *asks, *judged, e.log(_GROUP), e.verdict(0)])
        target = [e.load(2, gateway), e.load(3, port), e.tproxy(number, 2, 3), e.verdict(1)]
        for protocol in (_TCP, _UDP):
            rules.append([*here, e.meta(_META_PROTOCOL), e.compare(protocol), *target])
    rules.append([e.reject()])
    messages = [
        netlink.table(_TABLE),
        netlink.chain(_TABLE, _CHAIN, hook=_PREROUTING, priority=_PRIORITY_MANGLE, policy=0),
    ]
    messages += [netlink.rule(_TABLE, _CHAIN, one) for one in rules]
    return len(rules), netlink.nft_batch(messages)
