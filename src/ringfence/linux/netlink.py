"""rtnetlink and nftables, as far as a sandbox's network needs them: requests as bytes, and one exchange.

Written here rather than taken from a library: it is a dozen messages, and importing pyroute2 would take longer than the
whole start of a container. Sources: rtnetlink(7), include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

from ringfence.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "address",
    "any_ip_route",
    "chain",
    "count_rules",
    "exchange",
    "expression",
    "host_route",
    "link_up",
    "list_addresses",
    "log_group",
    "logged",
    "neighbour",
    "nft_batch",
    "route_type",
    "rule",
    "table",
]

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
RTN_UNICAST, RTN_LOCAL = 1, 2

_REQUEST, _ACK, _DUMP, _CREATE, _EXCL, _APPEND = 1, 4, 0x300, 0x400, 0x200, 0x800
_ERROR, _DONE = 2, 3
_NEWLINK, _NEWADDR, _GETADDR, _NEWROUTE, _GETROUTE, _NEWNEIGH = 16, 20, 22, 24, 26, 28
_HEADER = struct.Struct("=IHHII")
_NESTED = 0x8000
_LO = 1  # the loopback interface is the first of every network namespace
_TABLE_MAIN, _PROTO_STATIC, _SCOPE_HOST, _SCOPE_LINK = 254, 4, 254, 253
_IFF_UP, _IFF_NOARP, _NUD_PERMANENT = 1, 0x80, 0x80
_NODAD = 2
_RECEIVE_BYTES = 1 << 16

# nftables' own, all of the family inet.
_NFT, _LOG, _INET = 10 << 8, 4 << 8, 1
_NEWTABLE, _NEWCHAIN, _NEWRULE, _GETRULE = 0, 3, 6, 7


def attribute(kind: int, data: bytes) -> bytes:
    """A netlink attribute, padded to four bytes."""
    return struct.pack("=HH", len(data) + 4, kind) + data + b"\0" * (-len(data) % 4)


def _nested(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(parts))


def _message(kind: int, flags: int, body: bytes, sequence: int = 0) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, sequence, 0) + body


# ---- rtnetlink ----


def address(packed: bytes) -> bytes:
    """Gives lo an address of its own (as packed bytes), and no network with it."""
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    # Without the search for duplicates, until whose end an IPv6 address can't be a route's source.
    body = struct.pack("=BBBBI", family, len(packed) * 8, _NODAD, 0, _LO) + attribute(1, packed) + attribute(2, packed)
    return _message(_NEWADDR, _ACK | _CREATE, body)


def any_ip_route(source: bytes) -> bytes:
    """Makes every address that no other route knows a local one, reached from `source`."""
    family = socket.AF_INET if len(source) == 4 else socket.AF_INET6
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, _TABLE_MAIN, _PROTO_STATIC, _SCOPE_HOST, RTN_LOCAL, 0)
    return _message(_NEWROUTE, _ACK | _CREATE, body + attribute(4, struct.pack("=I", _LO)) + attribute(7, source))


def link_up(index: int, mac: bytes, mtu: int, *, ipv6: bool) -> bytes:
    """Brings an interface up that speaks no ARP. ipv6: the kernel has it; it is to make no address for itself then."""
    flags = _IFF_UP | _IFF_NOARP
    quiet = _nested(26, _nested(socket.AF_INET6, attribute(8, b"\1")))  # IFLA_INET6_ADDR_GEN_MODE: none
    body = (
        struct.pack("=BBHiII", 0, 0, 0, index, flags, flags) + attribute(1, mac) + attribute(4, struct.pack("=I", mtu))
    )
    return _message(_NEWLINK, _ACK, body + (quiet if ipv6 else b""))


def neighbour(index: int, packed: bytes, mac: bytes) -> bytes:
    """Who has an address, for good."""
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    body = struct.pack("=BBHiHBB", family, 0, 0, index, _NUD_PERMANENT, 0, 0) + attribute(1, packed) + attribute(2, mac)
    return _message(_NEWNEIGH, _ACK | _CREATE, body)


def host_route(index: int, packed: bytes, source: bytes) -> bytes:
    """An address that is right behind an interface, reached from `source`, which is one of ours."""
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    scope = _SCOPE_LINK if len(packed) == 4 else 0
    head = struct.pack("=BBBBBBBBI", family, len(packed) * 8, 0, 0, _TABLE_MAIN, _PROTO_STATIC, scope, RTN_UNICAST, 0)
    body = head + attribute(1, packed) + attribute(4, struct.pack("=I", index)) + attribute(7, source)
    return _message(_NEWROUTE, _ACK | _CREATE, body)


def route_type(sock: socket.socket, packed: bytes) -> int | None:
    """The kind of the route to an address (RTN_* of rtnetlink(7)) in the socket's namespace; None without one.

    Raises OSError where the kernel doesn't say.
    """
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    body = struct.pack("=BBBBBBBBI", family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0) + attribute(1, packed)
    # By its number an answer that came too late for its question isn't taken for one to another address.
    sequence = int.from_bytes(os.urandom(4))
    sock.send(_message(_GETROUTE, 0, body, sequence))
    while True:
        answer = sock.recv(_RECEIVE_BYTES)
        if _HEADER.unpack_from(answer)[3] == sequence:
            for kind, data in _messages(answer):
                if kind == _NEWROUTE and len(data) > 7:
                    return data[7]
                code = -struct.unpack_from("=i", data)[0] if kind == _ERROR and len(data) >= 4 else 0
                if code in (errno.ENETUNREACH, errno.EHOSTUNREACH):
                    return None
                raise OSError(code or errno.EBADMSG, os.strerror(code or errno.EBADMSG))
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))


def list_addresses(sock: socket.socket) -> list[bytes]:
    """The addresses of all interfaces in the socket's namespace, packed."""
    sock.send(_message(_GETADDR, _DUMP, struct.pack("=BBBBI", 0, 0, 0, 0, 0)))
    found = []
    for kind, data in _dump(sock):
        if kind == _NEWADDR:
            attributes = dict(_attributes(data[8:]))
            found.append(attributes.get(2) or attributes.get(1) or b"")
    return found


# ---- nftables ----


def _nft(kind: int, flags: int, *attributes: bytes, family: int = _INET) -> bytes:
    return _message(_NFT | kind, flags, struct.pack("!BBH", family, 0, 0) + b"".join(attributes))


def table(name: bytes) -> bytes:
    return _nft(_NEWTABLE, _CREATE, attribute(1, name + b"\0"))


def chain(table: bytes, name: bytes, *, hook: int, priority: int, policy: int) -> bytes:
    """A base chain of the kind "filter". policy: 0 drops, 1 accepts."""
    where = _nested(4, attribute(1, struct.pack("!I", hook)), attribute(2, struct.pack("!i", priority)))
    named = attribute(1, table + b"\0") + attribute(3, name + b"\0")
    return _nft(_NEWCHAIN, _CREATE, named, where, attribute(5, struct.pack("!I", policy)), attribute(7, b"filter\0"))


def rule(table: bytes, chain: bytes, expressions: Iterable[bytes]) -> bytes:
    named = attribute(1, table + b"\0") + attribute(2, chain + b"\0")
    return _nft(_NEWRULE, _CREATE | _APPEND, named, _nested(4, *expressions))


def nft_batch(messages: Sequence[bytes]) -> bytes:
    """All of them, or none: the last one is acknowledged, an error names the first that failed."""
    end = struct.pack("!BBH", 0, 0, 10)
    parts = [_message(0x10, 0, end), *messages[:-1]]
    last = bytearray(messages[-1])
    last[6:8] = struct.pack("=H", struct.unpack_from("=H", last, 6)[0] | _ACK)
    return b"".join([*parts, bytes(last), _message(0x11, 0, end)])


def count_rules(sock: socket.socket, table: bytes) -> int:
    """How many rules the kernel has in a table of the socket's namespace."""
    sock.send(_nft(_GETRULE, _DUMP, attribute(1, table + b"\0")))
    return sum(kind == _NFT | _NEWRULE for kind, _ in _dump(sock))


def log_group(group: int) -> bytes:
    """Asks for all that rules log to a group, each packet whole and at once: two requests."""

    def configure(*attributes: bytes) -> bytes:
        body = struct.pack("!BBH", 0, 0, group) + b"".join(attributes)
        return _message(_LOG | 1, _ACK, body)

    whole = attribute(2, struct.pack("!IBB", 0xFFFF, 2, 0))
    return configure(attribute(1, b"\1")) + configure(whole, attribute(5, struct.pack("!I", 1)))


def logged(data: bytes) -> list[bytes]:
    """The packets, from the IP header on, in what such a socket has received."""
    found = []
    for kind, body in _messages(data):
        packet = dict(_attributes(body[4:])).get(9) if kind == _LOG else None
        if packet is not None:
            found.append(packet)
    return found


class expression:
    """The expressions of nftables' rules: each loads a register, compares one, or ends the rule."""

    @staticmethod
    def _make(name: bytes, *attributes: bytes) -> bytes:
        return _nested(1, attribute(1, name + b"\0"), _nested(2, *attributes))

    @staticmethod
    def _u32(kind: int, value: int) -> bytes:
        return attribute(kind, struct.pack("!I", value))

    @classmethod
    def meta(cls, key: int) -> bytes:
        """Loads register 1. key: 3 mark, 4 index of the interface, 15 family of the network layer, 16 number of the
        transport protocol.
        """
        return cls._make(b"meta", cls._u32(1, 1), cls._u32(2, key))

    @classmethod
    def payload(cls, base: int, offset: int, length: int) -> bytes:
        """Loads register 1 from the packet. base: 1 network header, 2 transport header."""
        return cls._make(b"payload", cls._u32(1, 1), cls._u32(2, base), cls._u32(3, offset), cls._u32(4, length))

    @classmethod
    def mask(cls, mask: bytes) -> bytes:
        zero = bytes(len(mask))
        operands = _nested(4, attribute(1, mask)) + _nested(5, attribute(1, zero))
        return cls._make(b"bitwise", cls._u32(1, 1), cls._u32(2, 1), cls._u32(3, len(mask)), operands)

    @classmethod
    def compare(cls, value: bytes, *, equal: bool = True) -> bytes:
        return cls._make(b"cmp", cls._u32(1, 1), cls._u32(2, 0 if equal else 1), _nested(3, attribute(1, value)))

    @classmethod
    def load(cls, register: int, value: bytes) -> bytes:
        return cls._make(b"immediate", cls._u32(1, register), _nested(2, attribute(1, value)))

    @classmethod
    def verdict(cls, code: int) -> bytes:
        """0 drops, 1 accepts."""
        return cls._make(b"immediate", cls._u32(1, 0), _nested(2, _nested(2, cls._u32(1, code))))

    @classmethod
    def tproxy(cls, family: int, address: int, port: int) -> bytes:
        """Hands the packet to a transparent socket, by the registers that hold its address and port."""
        return cls._make(b"tproxy", cls._u32(1, family), cls._u32(2, address), cls._u32(3, port))

    @classmethod
    def log(cls, group: int) -> bytes:
        """Shows the packet to who has asked for that group by `log_group`."""
        return cls._make(b"log", attribute(1, struct.pack("!H", group)))

    @classmethod
    def reject(cls) -> bytes:
        """An ICMP error of the packet's own family: administratively prohibited."""
        return cls._make(b"reject", cls._u32(1, 2), attribute(2, b"\3"))


# ---- exchanging ----


def _messages(data: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or length > len(data) - at:
            break
        found.append((kind, data[at + _HEADER.size : at + length]))
        at += length + (-length % 4)
    return found


def _attributes(data: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4 or length > len(data) - at:
            break
        found.append((kind & 0x3FFF, data[at + 4 : at + length]))
        at += length + (-length % 4)
    return found


def _dump(sock: socket.socket) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    while True:
        for kind, data in _messages(sock.recv(_RECEIVE_BYTES)):
            if kind == _DONE:
                return found
            if kind == _ERROR:
                _check(data, "a dump")
                return found
            found.append((kind, data))


def _check(data: bytes, what: str) -> None:
    code = -struct.unpack_from("=i", data)[0]
    if code:
        raise KernelError("netlink", [what], code)


def exchange(sock: socket.socket, request: bytes, answers: int, what: str) -> None:
    """Sends requests, and waits for so many acknowledgements. Raises KernelError with the first that is an error."""
    sock.send(request)
    while answers > 0:
        for kind, data in _messages(sock.recv(_RECEIVE_BYTES)):
            if kind == _ERROR:
                _check(data, what)
                answers -= 1


def open_route() -> socket.socket:
    """A socket of this thread's own network namespace."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE)


def has_ipv6() -> bool:
    """Whether this kernel speaks IPv6 at all."""
    return os.path.exists("/proc/net/if_inet6")
