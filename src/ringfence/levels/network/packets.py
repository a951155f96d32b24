"""Headers of IP, TCP, UDP and ICMP, as far as the gateway reads or makes them. What it reads is the workload's."""

from __future__ import annotations

import array
import os
import struct
import sys

__all__ = ["Segment", "checksum", "fragments", "icmp_error", "parse_syn", "reset", "udp", "with_checksum"]

_TCP, _UDP, _ICMP, _ICMP6, _FRAGMENT = 6, 17, 1, 58, 44
_FLAGS, _SYN = 0x17, 0x02  # FIN, SYN, RST, ACK
_IP4, _IP6 = struct.Struct("!BBHHHBBH4s4s"), struct.Struct("!IHBB16s16s")
_TTL = 64

# What an ICMP error says, by the errno that connect(2) gives for it: (type, code) of ICMP and of ICMPv6.
_UNREACHABLE = {
    "network": ((3, 0), (1, 0)),  # ENETUNREACH
    "host": ((3, 1), (1, 3)),  # EHOSTUNREACH
    "port": ((3, 3), (1, 4)),  # ECONNREFUSED
    "prohibited": ((3, 13), (1, 1)),  # EHOSTUNREACH, and EACCES by ICMPv6
}


class Segment:
    """A SYN: the addresses packed, its sequence number, and the whole packet."""

    __slots__ = ("data", "destination", "port", "sequence", "source", "source_port")

    def __init__(
        self, source: bytes, source_port: int, destination: bytes, port: int, sequence: int, data: bytes
    ) -> None:
        self.source, self.source_port = source, source_port
        self.destination, self.port = destination, port
        self.sequence = sequence
        self.data = data


def checksum(data: bytes) -> int:
    """RFC 1071's, of `data`."""
    words = array.array("H", data if len(data) % 2 == 0 else data + b"\0")
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    total ^= 0xFFFF
    return total if sys.byteorder == "big" else (total >> 8) | (total & 0xFF) << 8


def _pseudo(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    if len(source) == 4:
        return source + destination + struct.pack("!BBH", 0, protocol, length)
    return source + destination + struct.pack("!IHBB", length, 0, 0, protocol)


def _ip(source: bytes, destination: bytes, protocol: int, payload: bytes) -> bytes:
    if len(source) == 4:
        # The kernel fills in its own checksum (raw(7), IP_HDRINCL).
        return _IP4.pack(0x45, 0, 20 + len(payload), 0, 0, _TTL, protocol, 0, source, destination) + payload
    return _IP6.pack(6 << 28, len(payload), protocol, _TTL, source, destination) + payload


def _header_bytes(packet: bytes) -> int:
    """The length of the IP header; 0 for what is malformed, a fragment, or has IPv6 extension headers before TCP."""
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        length = (packet[0] & 15) * 4
        fragment = struct.unpack_from("!H", packet, 6)[0] & 0x3FFF
        return length if length >= 20 and not fragment and packet[9] == _TCP else 0
    if len(packet) >= 40 and packet[0] >> 4 == 6:
        return 40 if packet[6] == _TCP else 0
    return 0


def parse_syn(packet: bytes) -> Segment | None:
    """A TCP packet that asks for a new connection; None for every other one. What it carries beside (by TCP Fast Open,
    up to 64 KiB) is left out: its sender sends it again.
    """
    at = _header_bytes(packet)
    if not at or len(packet) < at + 20 or packet[at + 13] & _FLAGS != _SYN:
        return None
    end = at + (packet[at + 12] >> 4) * 4
    if not at + 20 <= end <= len(packet):
        return None
    if end < len(packet):
        where, length = (2, end) if packet[0] >> 4 == 4 else (4, end - at)
        packet = packet[:where] + struct.pack("!H", length) + packet[where + 2 : end]
    source_port, port, sequence = struct.unpack_from("!HHI", packet, at)
    size = 4 if packet[0] >> 4 == 4 else 16
    first = 12 if size == 4 else 8
    source, destination = packet[first : first + size], packet[first + size : first + 2 * size]
    return Segment(source, source_port, destination, port, sequence, packet)


def with_checksum(packet: bytes) -> bytes:
    """A TCP packet as it was captured on lo, where the kernel leaves its checksum to hardware that isn't there."""
    at = _header_bytes(packet)
    segment = packet[at : at + 16] + b"\0\0" + packet[at + 18 :]
    first, size = (12, 4) if packet[0] >> 4 == 4 else (8, 16)
    source, destination = packet[first : first + size], packet[first + size : first + 2 * size]
    value = checksum(_pseudo(source, destination, _TCP, len(segment)) + segment)
    return packet[:at] + segment[:16] + struct.pack("!H", value) + segment[18:]


def reset(syn: Segment) -> bytes:
    """What a host without a listener answers to a SYN."""
    acknowledged = (syn.sequence + 1) & 0xFFFFFFFF
    segment = struct.pack("!HHIIBBHHH", syn.port, syn.source_port, 0, acknowledged, 5 << 4, 0x14, 0, 0, 0)
    value = checksum(_pseudo(syn.destination, syn.source, _TCP, len(segment)) + segment)
    return _ip(syn.destination, syn.source, _TCP, segment[:16] + struct.pack("!H", value) + segment[18:])


def udp(source: bytes, source_port: int, destination: bytes, port: int, payload: bytes) -> bytes:
    """A datagram."""
    length = 8 + len(payload)
    value = 0  # none: IPv4 allows it, and lo loses nothing
    if len(source) == 16:
        header = struct.pack("!HHHH", source_port, port, length, 0)
        value = checksum(_pseudo(source, destination, _UDP, length) + header + payload) or 0xFFFF
    return _ip(source, destination, _UDP, struct.pack("!HHHH", source_port, port, length, value) + payload)


def fragments(packet: bytes, most: int) -> list[bytes]:
    """A packet of our own in pieces of at most so many bytes (RFC 791, RFC 8200 4.5)."""
    if len(packet) <= most:
        return [packet]
    four = packet[0] >> 4 == 4
    head, body = (packet[:20], packet[20:]) if four else (packet[:40], packet[40:])
    room = (most - len(head) - (0 if four else 8)) & ~7
    number = (int.from_bytes(os.urandom(4)) | 1) & (0xFFFF if four else 0xFFFFFFFF)  # for 0 the kernel takes its own
    found = []
    for at in range(0, len(body), room):
        piece, more = body[at : at + room], at + room < len(body)
        if four:
            changed = struct.pack("!HHH", 20 + len(piece), number, more << 13 | at >> 3)
            found.append(head[:2] + changed + head[8:] + piece)
        else:
            extension = struct.pack("!BBHI", head[6], 0, at | more, number)
            found.append(head[:4] + struct.pack("!HB", 8 + len(piece), _FRAGMENT) + head[7:] + extension + piece)
    return found


def icmp_error(kind: str, source: bytes, destination: bytes, original: bytes) -> bytes:
    """An error about the packet `original`, from `source` to who sent it. kind: "network", "host", "port" or
    "prohibited".
    """
    if len(source) == 4:
        (number, code), quoted = _UNREACHABLE[kind][0], original[:576]
        body = struct.pack("!BBHI", number, code, 0, 0) + quoted
        body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
        return _ip(source, destination, _ICMP, body)
    (number, code), quoted = _UNREACHABLE[kind][1], original[:1232]
    body = struct.pack("!BBHI", number, code, 0, 0) + quoted
    value = checksum(_pseudo(source, destination, _ICMP6, len(body)) + body)
    return _ip(source, destination, _ICMP6, body[:2] + struct.pack("!H", value) + body[4:])
