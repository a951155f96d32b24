"""What an allow-list opens, without a packet."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.levels.network.policy import Policy, is_private, is_special
from ringfence.levels.network.rules import network_unmet
from ringfence.spec import Network, Spec

PORTS = st.integers(1, 65535)
ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(lambda one: one.packed)
NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,5}[a-z0-9](\.[a-z0-9]{1,5}){0,3}", fullmatch=True)


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def policy(*rules: str) -> Policy:
    return Policy(Network("nat", allow=rules).allow)


SPECIAL = [
    *("0.0.0.0", "0.1.2.3", "127.0.0.1", "127.9.9.9", "169.254.169.254", "169.254.0.1", "224.0.0.1", "239.255.255.250"),
    *("240.0.0.1", "255.255.255.255", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
    *("::", "::1", "fe80::1", "febf::1", "fec0::1", "ff02::1", "fd00:ec2::254", "::ffff:127.0.0.1", "::ffff:8.8.8.8"),
    *("::127.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b::7f00:1", "64:ff9b:1::a9fe:a9fe", "2002:7f00:1::1"),
    *("2002:a9fe:a9fe::1", "fd20:ce::254", "fd00:c1::a9fe:a9fe", "fd00:42::42", "fd00:ec2::23", "fd00:ec2::253"),
    *("fd00:100::100:200", "fd00:a9fe:a9fe::1"),
    *("64:ff9b:1:a9fe:a9:fe00::", "64:ff9b:1::808:808", "64:ff9b:1:ffff::1", "2001:0:a9fe:a9fe::1", "2001::1"),
]
PRIVATE = ["10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "192.0.0.1", "198.18.0.1"]
PRIVATE += ["fc00::1", "fd12::1", "64:ff9b::10.0.0.1", "2002:c0a8:101::1"]
PUBLIC = ["8.8.8.8", "1.1.1.1", "203.0.113.80", "100.128.0.1", "172.32.0.1", "169.253.1.1", "198.20.0.1", "128.0.0.1"]
PRIVATE += ["fd20:ce::253", "fd00:ec3::254", "fd00:42::41"]
PUBLIC += ["2001:1::1", "64:ff9b:2::1", "2001:db8::80", "2606:4700::1111", "64:ff9b::8.8.8.8", "2002:808:808::1"]


@pytest.mark.parametrize("address", SPECIAL)
def test_special_addresses_need_a_rule_that_names_them(address: str) -> None:
    one = packed(address)
    assert is_special(one)
    wide = ("*:*", "0.0.0.0/0:*", "[::/0]:*", "*.example:*", "x.example:*")
    assert not Policy(None).permits(one, 80, 0.0)
    opened = policy(*wide)
    assert opened.open("x.example", [one], 60, 0.0) == []
    assert not opened.permits(one, 80, 1.0)


@pytest.mark.parametrize("address", PRIVATE + PUBLIC)
def test_other_addresses(address: str) -> None:
    one = packed(address)
    assert not is_special(one)
    assert is_private(one) == (address in PRIVATE)
    assert Policy(None).permits(one, 80, 0.0)
    assert not policy().permits(one, 80, 0.0)
    assert policy("*:80").permits(one, 80, 0.0)
    assert not policy("*:80").permits(one, 81, 0.0)


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_does_not_open_a_private_address(address: str) -> None:
    one = packed(address)
    listed = policy("x.example:*")
    assert listed.open("x.example", [one], 60, 0.0) == []
    assert not listed.permits(one, 80, 1.0)


def test_a_rule_names_an_address_in_any_spelling() -> None:
    for rule in ("127.0.0.1:80", "127.0.0.1/32:80", "[::ffff:7f00:1]:80"):
        assert policy(rule).permits(packed("127.0.0.1"), 80, 0.0)
        assert policy(rule).names(packed("127.0.0.1"), 80)
        assert not policy(rule).permits(packed("127.0.0.1"), 81, 0.0)
    assert not policy("[::1]:80").permits(packed("127.0.0.1"), 80, 0.0)


def test_a_name_opens_its_addresses_for_a_while_on_its_ports() -> None:
    listed = policy("a.example:443", "*.example:8080", "other.test:*")
    web, other = packed("203.0.113.80"), packed("2001:db8::1")
    assert not listed.permits(web, 443, 0.0)
    assert listed.open("a.example", [web, other], 60, 100.0) == [web, other]
    assert listed.permits(web, 443, 399.0)
    assert listed.permits(other, 8080, 399.0)
    assert not listed.permits(web, 80, 101.0)
    assert not listed.permits(web, 443, 401.0), "the time to live is over, and the least time too"
    listed.open("a.example", [web], 1000, 100.0)
    assert listed.permits(web, 443, 1099.0)
    listed.open("a.example", [web], 2**31, 100.0)
    assert not listed.permits(web, 443, 100.0 + 86401)


def test_which_names_may_be_resolved() -> None:
    listed = policy("a.example:443", "*.b.example:80", "10.0.0.0/8:1")
    assert listed.ports_of("a.example") == {443}
    assert listed.ports_of("x.b.example") == listed.ports_of("y.x.b.example") == {80}
    for name in ("b.example", "x.a.example", "example", "xb.example", "a.example.evil", ""):
        assert not listed.ports_of(name), name
    assert policy("*:7").ports_of("anything.at.all") == {7}


def test_what_names_open_is_bounded() -> None:
    listed = policy("*.example:80")
    first = packed("8.0.0.0")
    listed.open("n.example", [first], 60, 0.0)
    for number in range(5000):
        listed.open("n.example", [(8 << 24 | 1 + number).to_bytes(4)], 60, 0.0)
    assert len(listed._opened) == 4096
    assert not listed.permits(first, 80, 1.0)


@given(ADDRESSES, PORTS, NAMES)
def test_an_empty_list_opens_nothing(address: bytes, port: int, name: str) -> None:
    nothing = policy()
    assert not nothing.ports_of(name)
    assert nothing.open(name, [address], 60, 0.0) == [address] or is_private(address) or is_special(address)
    assert not nothing.permits(address, port, 1.0)


@given(ADDRESSES, PORTS, st.lists(NAMES, max_size=3), NAMES)
def test_only_names_on_the_list_open_anything(address: bytes, port: int, listed: list[str], name: str) -> None:
    found = policy(*(f"{one}:443" for one in listed))
    if found.ports_of(name):
        assert name in listed
        found.open(name, [address], 60, 0.0)
        assert found.permits(address, port, 1.0) == (
            port == 443 and not is_special(address) and not is_private(address)
        )
    else:
        assert name not in listed


IN_VAIN = [
    *("[::1]:80", "127.0.0.2:80", "127.0.0.0/8:80", "192.0.0.1:80", "192.0.0.2:*", "0.0.0.0:80", "[::]:80"),
    *("[fdd5:7266:6e65:7400::1]:53", "[::1/128]:80", "[::ffff:7f00:9]:80"),
]
WORKS = [
    *("127.0.0.1:80", "127.0.0.1/32:80", "[::ffff:7f00:1]:80", "*:80", "x.example:80", "*.example:80", "host7:80"),
    *("192.0.0.192:80", "0.0.0.0/0:*", "[::/0]:80", "169.254.169.254:80", "[fd00::1]:80", "10.0.0.0/8:1"),
]


def test_a_rule_that_would_open_nothing_is_refused() -> None:
    for rule in (*IN_VAIN, *WORKS):
        spec = Spec.make(["true"], isolation="container", network=Network("nat", allow=[rule]))
        unmet = network_unmet(spec)
        assert [(one.rule, one.requested) for one in unmet] == [("allow", rule)] * (rule in IN_VAIN), rule
        assert all("127.0.0.1:PORT" in one.help for one in unmet)
