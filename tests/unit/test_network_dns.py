"""The DNS messages of the gateway: from a hostile workload, and from hostile servers."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.levels.network import dns


def wire(name: str) -> bytes:
    return b"".join(bytes([len(one)]) + one.encode() for one in name.split(".") if one) + b"\0"


def query(name: str | bytes, kind: int = dns.A, *, flags: int = 0x100, network: int = 1, counts: str = "1000") -> bytes:
    encoded = name if isinstance(name, bytes) else wire(name)
    head = struct.pack("!HHHHHH", 7, flags, *map(int, counts))
    return head + encoded + struct.pack("!HH", kind, network)


def record(owner: bytes, kind: int, data: bytes, ttl: int = 60) -> bytes:
    return owner + struct.pack("!HHIH", kind, 1, ttl, len(data)) + data


def response(name: str, kind: int, *records: bytes, code: int = 0, id: int = 7, count: int | None = None) -> bytes:
    head = struct.pack("!HHHHHH", id, 0x8180 | code, 1, len(records) if count is None else count, 0, 0)
    return head + wire(name) + struct.pack("!HH", kind, 1) + b"".join(records)


def test_a_query() -> None:
    found = dns.parse_query(query("WWW.Example.COM", dns.AAAA))
    assert found is not None
    assert (found.id, found.name, found.kind, found.opcode) == (7, "www.example.com", dns.AAAA, 0)
    # With EDNS's record behind it, as most clients send.
    assert dns.parse_query(query("a.b", counts="1001") + b"\0" + struct.pack("!HHIH", 41, 4096, 0, 0)) is not None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(12),
        query("a.b")[:-1],
        query("a.b", flags=0x8100),
        query("a.b", counts="2000"),
        query("a.b", counts="1100"),
        query("a.b", counts="1010"),
        query(b"\xc0\x0c"),
        query(b"\3abc\xc0\x0c"),
        query(b"\x40" + bytes(64) + b"\0"),
        query(b"".join(b"\x3f" + b"a" * 63 for _ in range(4)) + b"\0"),
        query(b"\5abc"),
        query("a.b") + bytes(4096),
    ],
)
def test_what_is_no_query(data: bytes) -> None:
    assert dns.parse_query(data) is None


@pytest.mark.parametrize(
    "name", [b"\x0ba.b.example\0", b"\1 \1a\0", b"\2\xc3\xa4\1a\0", b"\1\0\1a\0", b"\1/\1a\0", b"\4a\\.b\1c\0"]
)
def test_a_label_that_looks_like_something_else_is_no_name(name: bytes) -> None:
    found = dns.parse_query(query(name))
    assert found is not None
    assert found.name == ""


def test_another_class_has_no_name() -> None:
    found = dns.parse_query(query("version.bind", 16, network=3))
    assert found is not None
    assert found.name == ""


def test_a_response_is_made_anew_and_fits() -> None:
    asked = dns.parse_query(query("a.example"))
    assert asked is not None
    addresses = [bytes([10, 0, 0, number]) for number in range(100)]
    made = dns.build_response(asked, dns.NO_ERROR, [bytes(16), *addresses], 60)
    assert len(made) <= 512
    answer = dns.parse_response(made, 7, "a.example", dns.A)
    assert answer is not None
    assert (answer.code, answer.ttl_s, answer.addresses) == (0, 60, addresses[: len(answer.addresses)])
    assert len(answer.addresses) == 30


def test_our_own_query_is_one() -> None:
    found = dns.parse_query(dns.build_query(77, "a-b_c.example", dns.AAAA))
    assert found is not None
    assert (found.id, found.name, found.kind) == (77, "a-b_c.example", dns.AAAA)


ONE, TWO = bytes([203, 0, 113, 1]), bytes([203, 0, 113, 2])


def test_an_answer_by_aliases() -> None:
    data = response(
        "a.example",
        dns.A,
        record(b"\xc0\x0c", dns.CNAME, wire("b.example"), 30),
        record(wire("b.example"), dns.CNAME, wire("c.test"), 500),
        record(wire("c.test"), dns.A, ONE, 90),
        record(wire("C.TEST"), dns.A, TWO, 20),
        record(wire("c.test"), dns.A, ONE, 90),
    )
    answer = dns.parse_response(data, 7, "a.example", dns.A)
    assert answer is not None
    assert (answer.addresses, answer.ttl_s) == ([ONE, TWO], 20)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (response("a.example", dns.A, record(b"\xc0\x0c", dns.A, ONE), id=8), "another id"),
        (response("b.example", dns.A, record(b"\xc0\x0c", dns.A, ONE)), "another name"),
        (response("a.example", dns.AAAA, record(b"\xc0\x0c", dns.A, ONE)), "another kind"),
        (query("a.example"), "a query"),
        (response("a.example", dns.A)[:20], "cut short"),
        (response("a.example", dns.A) + bytes(4096), "too long"),
    ],
)
def test_what_is_no_answer_to_it(data: bytes, why: str) -> None:
    assert dns.parse_response(data, 7, "a.example", dns.A) is None, why


@pytest.mark.parametrize(
    "records",
    [
        [record(wire("other.example"), dns.A, ONE)],  # of a name that wasn't asked for
        [record(b"\xc0\x0c", dns.A, ONE + b"x")],
        [record(b"\xc0\x0c", dns.AAAA, bytes(16))],
        [record(b"\xc0\x0c", dns.CNAME, wire("a.example"))],
        [record(b"\xc0\x0c", dns.CNAME, wire("b.x")), record(wire("b.x"), dns.CNAME, wire("a.example"))],
        [record(b"\xff\xff", dns.A, ONE)],
        [record(b"\xc0\x0c", dns.A, ONE)[:-1]],
        [record(b"\xc0\x0c", dns.CNAME, b"\x0bx.y.example\0"), record(b"\x0bx.y.example\0", dns.A, ONE)],
    ],
)
def test_records_that_do_not_count(records: list[bytes]) -> None:
    answer = dns.parse_response(response("a.example", dns.A, *records), 7, "a.example", dns.A)
    assert answer is not None
    assert answer.addresses == []


def test_pointers_lead_backwards_only() -> None:
    at = 12 + len(wire("a.example")) + 4
    loop = struct.pack("!H", 0xC000 | at)
    answer = dns.parse_response(response("a.example", dns.A, record(loop, dns.A, ONE)), 7, "a.example", dns.A)
    assert answer is not None
    assert answer.addresses == []


@given(st.binary(max_size=600))
def test_any_bytes_are_a_query_or_none(data: bytes) -> None:
    found = dns.parse_query(data)
    if found is not None:
        assert data[12 : 12 + len(found.question)] == found.question
        assert len(dns.build_response(found, dns.REFUSED, [])) <= 512


@given(st.binary(max_size=600), st.sampled_from([dns.A, dns.AAAA]))
def test_any_bytes_behind_a_good_question_are_addresses_or_none(tail: bytes, kind: int) -> None:
    data = response("a.example", kind, count=200) + tail
    answer = dns.parse_response(data, 7, "a.example", kind)
    assert answer is not None
    assert all(len(one) == (4 if kind == dns.A else 16) for one in answer.addresses)
    dns.parse_response(tail, 7, "a.example", kind)


@pytest.mark.parametrize("data", [query("a.b", flags=opcode << 11) for opcode in (1, 2, 4, 5, 6, 15)])
def test_what_is_no_question_is_refused(data: bytes) -> None:
    """Such as NOTIFY and UPDATE, which a server takes from the host's own address."""
    assert not dns.is_plain(data)
    answer = dns.build_refusal(data)
    id, flags, *counts = struct.unpack("!HHHHHH", answer)
    assert (id, flags & 0xF80F, counts) == (7, 0x8000 | struct.unpack_from("!H", data, 2)[0] & 0x7800 | 4, [0] * 4)


def test_a_plain_question() -> None:
    assert dns.is_plain(query("a.b")) and dns.is_plain(query("a.b", counts="1001"))
    for counts in ("0000", "2000", "1100", "1010"):
        assert not dns.is_plain(query("a.b", counts=counts))
        assert dns.build_refusal(query("a.b", counts=counts))[3] & 15 == dns.NOT_IMPLEMENTED
    assert not dns.is_plain(query("a.b", flags=0x8000)) and not dns.build_refusal(query("a.b", flags=0x8000))
    assert not dns.is_plain(b"short") and not dns.build_refusal(b"short")


def test_a_truncated_answer_without_an_address_is_not_that_there_is_none() -> None:
    cut = bytearray(response("a.b", dns.A))
    cut[2] |= 2
    answer = dns.parse_response(bytes(cut), 7, "a.b", dns.A)
    assert answer is not None and (answer.code, answer.addresses) == (dns.SERVER_FAILURE, [])
    cut = bytearray(response("a.b", dns.A, record(wire("a.b"), dns.A, ONE), count=9))
    cut[2] |= 2
    answer = dns.parse_response(bytes(cut), 7, "a.b", dns.A)
    assert answer is not None and (answer.code, answer.addresses) == (0, [ONE])
