"""The headers that the gateway reads and makes. tests/security/test_network.py has the kernel judge them."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from ringfence.levels.network import packets
from ringfence.levels.network.flows import Bucket

A4, B4 = bytes([192, 0, 0, 2]), bytes([203, 0, 113, 80])
A6, B6 = bytes(15) + b"\2", b"\x20\1" + bytes(13) + b"\x50"


def syn(source: bytes, destination: bytes, *, flags: int = 2, data: bytes = b"") -> bytes:
    segment = struct.pack("!HHIIBBHHH", 40000, 443, 77, 0, 5 << 4, flags, 65535, 0x1234, 0) + data
    return packets._ip(source, destination, 6, segment)


def test_a_syn_is_read_and_gets_its_checksum() -> None:
    for source, destination in ((A4, B4), (A6, B6)):
        found = packets.parse_syn(syn(source, destination))
        assert found is not None
        assert (found.source, found.source_port, found.destination, found.port) == (source, 40000, destination, 443)
        whole = packets.with_checksum(found.data)
        at = 20 if len(source) == 4 else 40
        assert packets.checksum(packets._pseudo(source, destination, 6, len(whole) - at) + whole[at:]) == 0


def test_what_is_no_syn() -> None:
    for flags in (0x12, 0x10, 0x04, 0x06, 0x03, 0x00):
        assert packets.parse_syn(syn(A4, B4, flags=flags)) is None
    whole = syn(A4, B4)
    fragment = whole[:6] + b"\x20\0" + whole[8:]
    for one in (b"", whole[:39], fragment, b"\x41" + whole[1:], b"\x55" + whole[1:], syn(A6, B6)[:59]):
        assert packets.parse_syn(one) is None


def test_what_a_syn_carries_is_left_out() -> None:
    """By TCP Fast Open, up to 64 KiB: a connection that is being opened holds no more than headers."""
    for source, destination in ((A4, B4), (A6, B6)):
        found, plain = (packets.parse_syn(syn(source, destination, data=data)) for data in (bytes(60000), b""))
        assert found is not None and plain is not None
        assert found.data == plain.data == syn(source, destination)
    whole = bytearray(syn(A4, B4, data=bytes(40)))
    for words, fits in ((15, True), (4, False)):  # its options are kept, and may not pass its end
        whole[32] = words << 4
        kept = packets.parse_syn(bytes(whole))
        assert (kept is not None) == fits
        assert kept is None or len(kept.data) == 20 + 4 * words
    whole[32] = 15 << 4
    assert packets.parse_syn(bytes(whole[:60])) is None


def test_a_reset_acknowledges_the_syn() -> None:
    found = packets.parse_syn(syn(A4, B4, data=b"early"))
    assert found is not None
    answer = packets.reset(found)
    assert answer[12:20] == B4 + A4
    assert struct.unpack_from("!HHII", answer, 20) == (443, 40000, 0, 77 + 1)
    assert answer[33] == 0x14


def test_a_datagram_over_ipv6_has_a_checksum() -> None:
    for payload in (b"", b"x", b"even", bytes(65000)):
        made = packets.udp(B6, 53, A6, 40000, payload)
        assert packets.checksum(packets._pseudo(B6, A6, 17, len(made) - 40) + made[40:]) == 0
        assert made[46:48] != b"\0\0"


@given(st.binary(max_size=200))
def test_any_packet_is_a_syn_or_none(data: bytes) -> None:
    for first in (b"\x45", b"\x60", b"\x4f"):
        found = packets.parse_syn(first + data)
        if found is not None:
            packets.with_checksum(found.data)
            packets.reset(found)
            packets.icmp_error("prohibited", found.destination, found.source, found.data)


@given(st.binary(max_size=200))
def test_the_checksum_is_that_of_the_rfc(data: bytes) -> None:
    padded = data + b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert packets.checksum(data) == total ^ 0xFFFF


def test_a_bucket_lets_through_its_rate() -> None:
    now, moved = 0.0, 0
    bucket = Bucket(1_000_000, now)
    while now < 2.0:
        room = bucket.room(now)
        if room > 0:
            bucket.take(min(room, 1500))
            moved += min(room, 1500)
        else:
            now += bucket.wait_s(now)
    assert 2_000_000 <= moved <= 2_060_000


def test_a_bucket_is_not_emptied_byte_by_byte() -> None:
    """Who always has more to send has a turn each few milliseconds, not one for every byte that becomes free."""
    for rate in (1000, 20_000, 1_000_000, 100_000_000):
        bucket, now, turns, moved = Bucket(rate, 0.0), 0.0, 0, 0
        while now < 2.0:
            if room := bucket.room(now):
                bucket.take(room)
                moved += room
                turns += 1
            now += max(0.001, bucket.wait_s(now))
        assert 1.4 * rate <= moved <= 3.1 * rate
        assert turns <= 2 * 500 + 2, (rate, turns)
        assert moved / turns >= min(1000, rate)


@given(st.binary(max_size=65000), st.sampled_from((1280, 1500, 16384)))
def test_fragments_are_the_packet(payload: bytes, most: int) -> None:
    for source, destination in ((A4, B4), (A6, B6)):
        whole = packets.udp(source, 53, destination, 40000, payload)
        pieces = packets.fragments(whole, most)
        assert all(len(one) <= most for one in pieces)
        if len(whole) <= most:
            assert pieces == [whole]
            continue
        body, numbers = b"", set()
        for number, one in enumerate(pieces):
            last = number == len(pieces) - 1
            if len(source) == 4:
                assert struct.unpack_from("!H", one, 2)[0] == len(one)
                at, more, skip = (one[6] << 8 | one[7]) << 3 & 0xFFFF, one[6] >> 5 == 1, 20
                numbers.add(one[4:6])
            else:
                assert (struct.unpack_from("!H", one, 4)[0], one[6], one[40]) == (len(one) - 40, 44, 17)
                at, more, skip = struct.unpack_from("!H", one, 42)[0] & ~7, one[43] & 1 == 1, 48
                numbers.add(one[44:48])
            assert (at, more) == (len(body), not last)
            body += one[skip:]
        assert body == whole[20 if len(source) == 4 else 40 :]
        assert len(numbers) == 1
