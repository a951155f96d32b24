"""The network of a container and of a guest, against servers in a world of their own (support.world). Each way around
an allow-list has its positive control: without the list it works.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from support import leaks
from support.sandboxes import SOURCES, need, need_level, python
from support.world import CLIENT, HOST_ADDRESS, HOST_PORTS, UNPRIVILEGED, World, equal, in_world

USERS = pytest.mark.parametrize("user", [0, UNPRIVILEGED], ids=["root", "unprivileged"])
# What a workload gets for a destination that isn't open: "administratively prohibited" (icmp(7), RFC 4443).
NO, NO6 = "EHOSTUNREACH", "EACCES"


@pytest.fixture(autouse=True)
def root() -> None:
    """Network namespaces of the tests' own are made as root; what runs in them isn't always."""
    need("root", os.geteuid() == 0)


def need_tap() -> None:
    need("/dev/net/tun", os.path.exists("/dev/net/tun"))
    need_level("vm")


def allow(*rules: str, **options: Any) -> rf.Network:
    return rf.Network("nat", allow=rules, **options)


# ---- what works ----


def reaches_the_world(world: World) -> None:
    steps = ["tcp 203.0.113.80 80", "udp 203.0.113.80 9999", "tcp 2001:db8::80 443", "udp 2001:db8::80 443"]
    steps += ["page web.example 80", "name alias.example", "tcp6 ::ffff:203.0.113.80 80", "tcp 10.1.2.3 80"]
    wanted = ["203.0.113.80 80", "203.0.113.80 9999 ping", "2001:db8::80 443", "2001:db8::80 443 ping"]
    wanted += ["203.0.113.80 80", "2001:db8::80 203.0.113.80", "203.0.113.80 80", "10.1.2.3 80"]
    # What the network says of itself arrives as it would without a gateway.
    steps += ["tcp 203.0.113.80 81", "udp 203.0.113.80 81", "tcp6 2001:db8::80 81", "name nobody.example"]
    wanted += ["ECONNREFUSED", "ECONNREFUSED", "ECONNREFUSED", "EAI_NONAME"]
    # Which of a name's addresses is tried first depends on those that one has oneself.
    equal(world.unconfined(*steps), [*wanted[:4], "2001:db8::80 80", *wanted[5:]])
    found, result = world.run(*steps, network="nat")
    equal(found, wanted)
    rules = {one.rule: one for one in result.applied}
    equal((rules["network"].requested, rules["network"].effective), ("nat", "nat"))
    own = {"container": "::2 on lo, no route out", "vm": "::1 on lo, tap0 to the guest alone, no route out"}
    mechanism = rules["network"].mechanism
    assert own[world.isolation] in mechanism and "nftables" in mechanism, mechanism
    equal(world.client(*steps[:5], network="nat", user=0), wanted[:5])


@USERS
def test_nat_reaches_the_world(user: int) -> None:
    in_world(reaches_the_world, user=user)


def moves_bytes(world: World) -> None:
    """Much at once, both ways, with each side's end told to the other."""
    code = """
import hashlib, os, socket, threading
sent = os.urandom(8 << 20)
one = socket.create_connection(("203.0.113.80", 80))
first = one.makefile("rb").readline()
threading.Thread(target=lambda: (one.sendall(sent), one.shutdown(socket.SHUT_WR))).start()
back = b""
while data := one.recv(1 << 20): back += data
print(first.decode().strip(), len(back), back == sent)
for address in ("203.0.113.80", "2001:db8::80"):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.settimeout(5)
        one.connect((address, 9999))
        one.send(sent[:60000])  # more than fits into a guest's frame
        print(one.recv(1 << 16)[-60000:] == sent[:60000])
"""
    result = world.start(["python3", "-c", code], network="nat")
    equal((result.stdout, result.stderr), (f"203.0.113.80 80 {8 << 20} True\nTrue\nTrue\n", ""))


@USERS
def test_nat_moves_bytes_both_ways(user: int) -> None:
    in_world(moves_bytes, user=user)


def many_at_once(world: World) -> None:
    code = """
import socket
ones = [socket.create_connection(("203.0.113.80", 80), timeout=20) for _ in range(60)]
print(len({one.recv(100) for one in ones}))
"""
    equal(world.start(["python3", "-c", code], network="nat").stdout, "1\n")


def test_many_connections_at_once() -> None:
    in_world(many_at_once)


# ---- the allow-list, and the ways around it ----


def allow_list_by_name(world: World) -> None:
    # By its address the name's host is closed until the name was resolved, and then only on its port.
    listed = allow("web.example:80")
    steps = ["tcp 203.0.113.80 80", "page web.example 80", "tcp 203.0.113.80 80", "tcp 2001:db8::80 80"]
    steps += ["tcp 203.0.113.80 443", "udp 203.0.113.80 443", "udp 203.0.113.80 80"]
    open_there = ["203.0.113.80 80", "203.0.113.80 80", "203.0.113.80 80", "2001:db8::80 80"]
    closed = ["203.0.113.80 443", "203.0.113.80 443 ping", "203.0.113.80 80 ping"]
    equal(world.client(*steps, network="nat"), open_there + closed)
    # TCP and UDP alike: "host:port" says nothing of the protocol.
    found, result = world.run(*steps, network=listed)
    equal(found, [NO, *open_there[1:], NO, NO, closed[2]])
    rules = {one.rule: one for one in result.applied}
    equal(rules["allow"].effective, ("web.example:80",))
    # The name behind an alias is open by the alias, and the alias isn't by the name.
    equal(world.client("page alias.example 80", network=allow("alias.example:80")), ["203.0.113.80 80"])
    equal(world.client("name alias.example", network=listed), ["EAI_AGAIN"])


def around_by_address(world: World) -> None:
    steps = ["tcp 203.0.113.81 80", "tcp 2001:db8::81 80", "tcp6 ::ffff:203.0.113.81 80", "udp 203.0.113.81 80"]
    steps += ["udp 2001:db8::81 80", "tcp 10.1.2.3 80"]
    there = ["203.0.113.81 80", "2001:db8::81 80", "203.0.113.81 80", "203.0.113.81 80 ping", "2001:db8::81 80 ping"]
    equal(world.client(*steps, network="nat"), [*there, "10.1.2.3 80"])
    closed = [NO, NO6, NO, NO, NO6, NO]
    for user in (None, 0):
        equal(world.client("name web.example", *steps, network=allow("web.example:80"), user=user)[1:], closed)
    equal(world.client(*steps, network=allow()), closed)


def around_by_dns(world: World) -> None:
    listed = allow("web.example:*")
    # Another server, by UDP and by TCP; the gateway's own by TCP; and data in names that aren't on the list.
    steps = ["dns 203.0.113.53 other.example", "tcp 203.0.113.53 443", "dns 2001:db8::1 other.example"]
    equal(
        world.client(*steps, network="nat"),
        ["rcode 0 answers 1 bytes 60", "203.0.113.53 443", "rcode 0 answers 1 bytes 60"],
    )
    world.asked()
    equal(world.client(*steps, "tcp 192.0.0.1 53", network=listed), [NO, NO, NO6, NO])
    steps = ["name c2VjcmV0.other.example", "dns 192.0.0.1 c2VjcmV0.other.example", "dns 192.0.0.1 other.example 16"]
    equal(world.client(*steps, network="nat")[1:], ["rcode 3 answers 0 bytes 40", "rcode 0 answers 0 bytes 31"])
    assert {"c2vjcmv0.other.example", "other.example"} <= set(world.asked())
    # A name within the list may not carry other kinds of records either.
    more = ("dns 192.0.0.1 web.example 16", "dns 192.0.0.1 web.example 255", "dns 192.0.0.1 web.example.other.example")
    found = world.client(*steps, *more, network=listed)
    equal(found[0], "EAI_AGAIN")
    equal(
        [one.split(" bytes")[0] for one in found[1:]],
        ["rcode 5 answers 0"] * 2 + ["rcode 0 answers 0"] * 2 + ["rcode 5 answers 0"],
    )
    equal(world.asked(), [])
    equal(world.client("dns 192.0.0.1 web.example", network=listed), ["rcode 0 answers 1 bytes 45"])
    equal(world.asked(), ["web.example"])


def around_by_rebinding(world: World) -> None:
    """A name on the list that points to what isn't public."""
    steps = (
        "name rebind.example",
        "tcp 10.1.2.3 80",
        "tcp 169.254.169.254 80",
        f"tcp {HOST_ADDRESS} {HOST_PORTS['address']}",
    )
    equal(world.unconfined(steps[0])[0].count(" "), 6)
    found = world.client(*steps, "name rebind-to-host.example", steps[3], network=allow("*.example:*"))
    # The host's own public address may be told, and can't be reached all the same.
    equal(found, ["203.0.113.2", NO, NO, NO, "203.0.113.2", NO])
    # A rule that names the address opens it, and lets the name tell it.
    network = allow("rebind.example:80", "10.1.2.3:80")
    equal(
        world.client("name rebind.example", "page rebind.example 80", "tcp 10.1.2.3 443", network=network)[1:],
        ["10.1.2.3 80", NO],
    )
    equal(world.client("tcp 10.1.2.3 80", network=allow("10.0.0.0/8:80")), ["10.1.2.3 80"])


def rules_of_all_kinds(world: World) -> None:
    steps = ["page a.wild.example 80", "page a.b.wild.example 80", "name wild.example"]
    equal(world.client(*steps, network=allow("*.wild.example:80")), ["203.0.113.82 80"] * 2 + ["EAI_AGAIN"])
    steps = [
        "tcp 203.0.113.81 80",
        "tcp 203.0.113.81 443",
        "tcp 198.51.100.7 80",
        "tcp 2001:db8::81 80",
        "name web.example",
    ]
    equal(world.client(*steps, network=allow("203.0.113.81:80")), ["203.0.113.81 80", NO, NO, NO6, "EAI_AGAIN"])
    equal(
        world.client(*steps, network=allow("203.0.113.0/24:*")),
        ["203.0.113.81 80", "203.0.113.81 443", NO, NO6, "EAI_AGAIN"],
    )
    equal(world.client(*steps, network=allow("[2001:db8::/32]:80"))[:4], [NO, NO, NO, "2001:db8::81 80"])
    found = world.client(*steps, network=allow("*:80"))
    equal(found, ["203.0.113.81 80", NO, "198.51.100.7 80", "2001:db8::81 80", "2001:db8::80 203.0.113.80"])
    # As many addresses as a client without EDNS takes, and these are open.
    addresses = world.client("name many.example", network=allow("many.example:80"))[0].split()
    assert 20 < len(addresses) < 31, addresses


@USERS
@pytest.mark.parametrize(
    "way", [allow_list_by_name, around_by_address, around_by_dns, around_by_rebinding, rules_of_all_kinds]
)
def test_an_allow_list(way: Any, user: int) -> None:
    in_world(way, user=user)


def closed_places(world: World) -> None:
    """The host's own services and metadata services, which no network reaches but by a rule that names the address."""
    metadata = ("tcp 169.254.169.254 80", "tcp 100.100.100.200 80", "tcp fd00:ec2::254 80", "udp 169.254.169.254 80")
    loopback, address = HOST_PORTS["loopback"], HOST_PORTS["address"]
    own = (f"tcp {HOST_ADDRESS} {address}", f"tcp 192.0.0.1 {loopback}", f"page host.ringfence.internal {loopback}")
    inside = (f"tcp 127.0.0.1 {loopback}", f"tcp ::1 {loopback}", f"tcp 192.0.0.2 {loopback}")
    equal(
        world.unconfined(*metadata, own[0], inside[0])[:3],
        ["169.254.169.254 80", "100.100.100.200 80", "fd00:ec2::254 80"],
    )
    equal(world.unconfined(own[0], inside[0]), ["the host"] * 2)
    wide = ("*:*", "0.0.0.0/0:*", "[::/0]:*", "*.example:*")
    for network in (rf.Network(), allow(*wide)):
        equal(world.client(*metadata, *own, *inside, network=network), [NO, NO, NO6, *[NO] * 4, *["ECONNREFUSED"] * 3])
    equal(world.client("tcp 0.0.0.0 5000", "udp 255.255.255.255 80", network="nat"), ["ECONNREFUSED", "EACCES"])
    named = allow("169.254.169.254:80", f"{HOST_ADDRESS}:{address}", f"127.0.0.1:{loopback}")
    found = world.client(*metadata, *own, *inside, network=named)
    equal(found, ["169.254.169.254 80", NO, NO6, "169.254.169.254 80 ping", *["the host"] * 3, *["ECONNREFUSED"] * 3])


@USERS
def test_the_host_and_metadata_services_are_closed(user: int) -> None:
    in_world(closed_places, user=user)


CHANGES = r"""
import errno, fcntl, socket, struct
def attempt(what):
    try:
        what()
        print("done")
    except OSError as error:
        print(errno.errorcode[error.errno])
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
name = struct.pack("16sH2s4s8x", b"lo", socket.AF_INET, b"", socket.inet_aton("10.0.0.9"))
attempt(lambda: fcntl.ioctl(one, 0x8916, name))  # SIOCSIFADDR
attempt(lambda: one.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x72660001))
attempt(lambda: one.setsockopt(socket.SOL_IP, 19, 1))  # IP_TRANSPARENT
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
def route():
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    body = struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 4, 0, 1, 0) + struct.pack("=HHI", 8, 4, 1)
    link.send(struct.pack("=IHHII", 16 + len(body), 24, 0x405, 0, 0) + body)
    code = -struct.unpack_from("=i", link.recv(4096), 16)[0]
    if code: raise OSError(code, "")
attempt(route)
"""


def changes_nothing(world: World) -> None:
    for user in (None, 0):
        result = rf.run(["python3", "-c", CHANGES], network="nat", user=user, text=True)
        equal((result.stdout.split(), result.stderr), (["EPERM"] * 6, ""))


@USERS
def test_a_workload_cannot_change_its_network(user: int) -> None:
    in_world(changes_nothing, user=user)


# Every capability over its own network: the rules are deleted, the mark is set, packets are made by hand.
ATTACK = r"""
import errno, socket, struct, sys
MARK = 0x72660001
def attempt(what):
    try:
        print(what() or b"")
    except OSError as error:
        print(errno.errorcode.get(error.errno, error))
def connect(mark=0, source=None, address="203.0.113.81"):
    one = socket.socket()
    one.settimeout(3)
    if mark: one.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    if source:
        one.setsockopt(socket.SOL_IP, 19, 1)
        one.bind((source, 0))
    one.connect((address, 80))
    return one.recv(100)
def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16: total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF
def raw(mark):
    to, own = socket.inet_aton("203.0.113.81"), socket.inet_aton("192.0.0.2")
    head = struct.pack("!HHIIBBHHH", 40000, 80, 1, 0, 0x50, 2, 1000, 0, 0)
    pseudo = own + to + struct.pack("!BBH", 0, 6, 20)
    head = head[:16] + struct.pack("!H", checksum(pseudo + head)) + head[18:]
    one = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    one.sendto(struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, 6, 0, own, to) + head, ("203.0.113.81", 0))
def netlink(protocol, messages):
    one = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    parts = [struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body for kind, flags, body in messages]
    one.send(b"".join(parts))
    code = -struct.unpack_from("=i", one.recv(4096), 16)[0]
    if code: raise OSError(code, "")
    return b"done"
def delete_rules():
    ends, name = struct.pack("!BBH", 0, 0, 10), struct.pack("=HH", 14, 1) + b"ringfence\0\0\0"
    return netlink(12, [(0x10, 1, ends), (10 << 8 | 2, 5, struct.pack("!BBH", 1, 0, 0) + name), (0x11, 1, ends)])
def delete_route():
    route = struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 4, 254, 2, 0) + struct.pack("=HHI", 8, 4, 1)
    return netlink(0, [(25, 5, route)])
attempt(lambda: connect(address="203.0.113.80"))
attempt(connect)
attempt(lambda: connect(MARK))
attempt(lambda: connect(MARK, "203.0.113.80"))
attempt(lambda: connect(0, "127.0.0.1"))
attempt(lambda: raw(MARK))
attempt(lambda: raw(0))
attempt(lambda: connect(address="203.0.113.80"))
attempt(delete_rules)
attempt(connect)
attempt(lambda: connect(MARK))
attempt(delete_route)
attempt(connect)
"""


def with_capabilities(world: World) -> None:
    """An allow-list holds against a workload that may do anything to its own network: it can only cut itself off."""
    held = ["net_admin", "net_raw", "net_bind_service"] + (["sys_admin"] if os.geteuid() == 0 else [])
    for capabilities in (held[:3], held):
        result = rf.run(
            ["python3", "-c", ATTACK], network=allow("203.0.113.80:80"), capabilities=capabilities, text=True
        )
        good = "b'203.0.113.80 80\\n'"
        wanted = [good, NO, "ECONNRESET", "ECONNRESET", NO, "b''", "b''", good]
        wanted += ["b'done'", "ECONNREFUSED", "ECONNREFUSED", "b'done'", "ENETUNREACH"]
        equal((result.stdout.splitlines(), result.stderr), (wanted, ""))


@USERS
def test_an_allow_list_holds_against_capabilities(user: int) -> None:
    in_world(with_capabilities, user=user)


NOISE = r"""
import os, random, socket, struct
random.seed(7)
raw4 = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
raw6 = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
dns.setblocking(False)
good = struct.pack("!HHHHHH", 7, 256, 1, 0, 0, 0) + b"\3web\7example\0\0\1\0\1"
own6, there6 = (socket.inet_pton(socket.AF_INET6, one) for one in ("fdd5:7266:6e65:7400::2", "2001:db8::80"))
def send(one, data, to):
    try: one.sendto(data, to)
    except OSError: pass
for number in range(3000):
    size = random.choice((0, 1, 4, 12, 13, 19, 20, 24, 40, 60))
    segment = bytearray(os.urandom(size))
    if size > 13: segment[13] = random.choice((2, 2, 2, 3, 18, 0xC2))
    if size > 12: segment[12] = random.randrange(256)
    source = socket.inet_aton(random.choice(("192.0.0.2", "203.0.113.80", "0.0.0.0", "255.255.255.255")))
    rest = random.choice((0, 0x2000, 1)), 64, random.choice((6, 6, 17, 1, 132)), 0, source
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, *rest, socket.inet_aton("203.0.113.80"))
    send(raw4, head + bytes(segment), ("203.0.113.80", 0))
    six = struct.pack("!IHBB", 6 << 28, size, random.choice((6, 6, 17, 0, 43, 44, 60)), 64) + own6 + there6
    send(raw6, six + bytes(segment), ("2001:db8::80", 0))
    query = bytearray(good)
    for _ in range(random.randrange(4)): query[random.randrange(len(query))] = random.randrange(256)
    send(dns, bytes(query)[: random.choice((len(query), random.randrange(len(query))))], ("192.0.0.1", 53))
"""


def noise(world: World) -> None:
    """Packets and queries that make no sense do the gateway no harm: the next ones work."""
    for network in (rf.Network(), allow("web.example:80")):
        code = NOISE + "\nimport sys\nexec(sys.argv.pop(1))"
        command = ["python3", "-c", code, CLIENT, "page web.example 80", "tcp 203.0.113.80 80"]
        result = rf.run(command, network=network, capabilities=["net_raw"], text=True)
        equal((result.stdout.split("\n"), result.stderr), (["203.0.113.80 80"] * 2 + [""], ""))


@USERS
def test_noise_does_no_harm(user: int) -> None:
    in_world(noise, user=user)


def kernel_without(world: World) -> None:
    """A kernel that lacks a part of nftables: a rule that can't be enforced, and no command was started."""
    from ringfence.levels.network import inside
    from ringfence.linux.netlink import expression

    inside._rules.cache_clear()
    tproxy = expression.tproxy
    expression.tproxy = lambda *_: expression._make(b"nosuch")  # type: ignore[method-assign]
    reason = r"this kernel refuses NFT_MSG_NEWRULE in a network namespace \(ENOENT\)"
    try:
        with pytest.raises(rf.CannotEnforce, match=reason):
            world.start(["true"], network="nat")
    finally:
        expression.tproxy = tproxy  # type: ignore[method-assign]
        inside._rules.cache_clear()
    if world.isolation == "container":
        equal(world.client("tcp 203.0.113.80 80", network="nat"), ["203.0.113.80 80"])


@USERS
@pytest.mark.parametrize("isolation", ["container", "vm"])
def test_a_kernel_without_a_part_of_it(user: int, isolation: str) -> None:
    if isolation == "vm":
        need_tap()
    in_world(kernel_without, user=user, isolation=isolation)


# ---- published ports ----

SERVER = """
import socket, sys
one = socket.create_server((sys.argv[1], 80))
open("ready", "w").close()
peer, _ = one.accept()
peer.sendall(b"inside: " + peer.recv(100))
peer.shutdown(1)
peer.recv(1)
"""


def _ask(port: int, text: bytes, deadline: float) -> bytes:
    while True:
        try:
            # A guest that hasn't booted yet answers late.
            with socket.create_connection(("127.0.0.1", port), timeout=deadline - time.monotonic()) as one:
                one.sendall(text)
                if found := one.recv(100):
                    return found
        except ConnectionError:
            pass  # nobody listens inside yet
        assert time.monotonic() < deadline
        time.sleep(0.02)


def serves(world: World, where: str, network: rf.Network) -> None:
    answers: list[bytes] = []
    asks = threading.Thread(target=lambda: answers.append(_ask(18080, b"hello", time.monotonic() + 40)))
    asks.start()
    result = world.start(["python3", "-c", SERVER, where], network=network)
    asks.join()
    equal((answers, result.stderr, result.exit_code), ([b"inside: hello"], "", 0))
    equal([one.effective for one in result.applied if one.rule == "publish"], [((18080, 80),)])


def publishes(world: World) -> None:
    network = rf.Network("nat", allow=(), publish={18080: 80})
    serves(world, "0.0.0.0", network)
    # A guest's 127.0.0.1 is behind its own kernel: what is to be reached from outside listens at its address.
    serves(world, {"container": "127.0.0.1", "vm": "192.0.0.2"}[world.isolation], network)
    # The port is free again, and one that is taken is told before anything is started.
    taken = "port 18080 of the host can't be opened: Address already in use"
    with socket.create_server(("127.0.0.1", 18080)), pytest.raises(rf.CannotEnforce, match=taken):
        world.start(["true"], network=network)
    # Another sandbox doesn't get at it.
    other = threading.Thread(target=lambda: world.start(["python3", "-c", SERVER, "0.0.0.0"], network=network))
    other.start()
    steps = ["tcp 127.0.0.1 18080", "tcp 192.0.0.1 18080", f"tcp {HOST_ADDRESS} 18080", "tcp 192.0.0.2 80"]
    equal(world.client(*steps, network="nat"), ["ECONNREFUSED", NO, NO, "ECONNREFUSED"])
    equal(_ask(18080, b"x", time.monotonic() + 40), b"inside: x")
    other.join()


@USERS
def test_published_ports(user: int) -> None:
    in_world(publishes, user=user)


def forks(world: World) -> None:
    """A child that the caller forks meanwhile doesn't keep the port, and doesn't take the network away."""
    network = rf.Network("nat", publish={18082: 80})
    results: list[rf.Result] = []
    runs = threading.Thread(
        target=lambda: results.append(rf.run(["python3", "-c", SERVER, "0.0.0.0"], network=network, text=True))
    )
    runs.start()
    assert leaks.settled(lambda: not _listens(18082), 20) is False
    goes_on, ends = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ends)
        os.read(goes_on, 1)
        os._exit(0)
    os.close(goes_on)
    equal(_ask(18082, b"after the fork", time.monotonic() + 20), b"inside: after the fork")
    runs.join()
    equal(results[0].exit_code, 0)
    assert not _listens(18082)
    os.close(ends)
    os.waitpid(child, 0)


def test_a_fork_of_the_caller() -> None:
    in_world(forks)


# ---- where else it works ----


def images(world: World) -> None:
    """/etc/resolv.conf is ringfence's own whatever an image has in its place, and where it has none names work too."""
    for link in (None, "", "/run/systemd/resolve/stub-resolv.conf", "../run/resolv.conf", "/var/run/a/b", "other"):
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            os.mkdir(f"{folder}/etc")
            for name in ("bin", "lib", "lib64"):
                os.symlink(f"usr/{name}", f"{folder}/{name}")
            if link:
                Path(folder, "etc/other").write_text("nameserver 203.0.113.99\n")
                os.symlink(link, f"{folder}/etc/resolv.conf")
            elif link is not None:
                Path(folder, "etc/resolv.conf").write_text("nameserver 203.0.113.99\n")
            options: dict[str, Any] = {"image": folder, "mounts": [rf.Mount("/usr", "/usr")]}
            for user in (None, 0):
                for network in (rf.Network(), allow("web.example:80")):
                    found = world.client("page web.example 80", network=network, user=user, **options)
                    equal((link, user, found), (link, user, ["203.0.113.80 80"]))


@USERS
def test_images_with_any_resolv_conf(user: int) -> None:
    in_world(images, user=user)


def dead_server(world: World) -> None:
    """The host's first name server doesn't answer."""
    Path("/etc/resolv.conf").write_text("nameserver 203.0.113.99\nnameserver 203.0.113.53\n")
    time.sleep(1.1)  # what was read before is kept for a second
    for network in (rf.Network(), allow("web.example:80")):
        equal(world.client("page web.example 80", network=network), ["203.0.113.80 80"])


def test_a_name_server_that_does_not_answer() -> None:
    in_world(dead_server)


def stays(world: World) -> None:
    with rf.Sandbox(isolation=world.isolation, network=allow("web.example:80")) as sandbox:
        for step, wanted in (("page web.example 80", "203.0.113.80 80"), ("tcp 203.0.113.80 80", "203.0.113.80 80")):
            result = sandbox.run(["python3", "-c", CLIENT, step], text=True)
            equal((result.stdout, result.stderr), (wanted + "\n", ""))


def test_a_sandbox_that_stays() -> None:
    in_world(stays)


def by_command_line(world: World) -> None:
    options = ["--network", "nat", "--allow", "web.example:80", "--publish", "18083:80", "--bandwidth", "10M"]
    command = ["python3", "-c", CLIENT, "page web.example 80", "tcp 203.0.113.81 80"]
    done = subprocess.run(
        [sys.executable, "-m", "ringfence", "run", "-i", world.isolation, *options, "--", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        check=False,
    )
    equal((done.stdout.split("\n"), done.stderr), (["203.0.113.80 80", NO, ""], ""))


def test_by_the_command_line() -> None:
    in_world(by_command_line)


def bounded(world: World) -> None:
    """More connections than the gateway has room for: the others wait, and nothing but they does."""
    code = """
import errno, socket, time
ones = [socket.socket() for _ in range(80)]
for one in ones:
    one.setblocking(False)
    one.connect_ex(("203.0.113.80", 80))
time.sleep(1.5)
def said(one):
    try: return one.recv(100)
    except BlockingIOError: return b""
first = [one for one in ones if said(one)]
print(len(first))
for one in first: one.close()
time.sleep(4)
print(len([one for one in ones if one not in first and said(one)]))
"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        before = time.process_time()
        result = world.start(["python3", "-c", code], network="nat")
        spent = time.process_time() - before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    first, later = map(int, result.stdout.split())
    assert (first, later > 0) == (32, True), (first, later)
    assert spent < 1.0, f"{spent} s of CPU"


def test_flows_are_bounded() -> None:
    in_world(bounded)


def bounded_together(world: World) -> None:
    """Several sandboxes share the bound, and each has a few flows whatever the others take: the caller goes on."""
    code = """
import socket, time
ones = []
for _ in range(60):
    one = socket.socket()
    one.settimeout(0.7)
    try: one.connect(("203.0.113.80", 80))
    except OSError: break
    ones.append(one)
print(len(ones), flush=True)
time.sleep(6)
"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    found: list[int] = []

    def one() -> None:
        found.append(int(rf.run(["python3", "-c", code], isolation="container", network="nat", text=True).stdout))

    threads = [threading.Thread(target=one) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
            time.sleep(1.5)
        # All is taken now: there is room for what the caller itself does.
        assert len(os.listdir("/proc/self/fd")) < 200
        assert rf.run(["true"], isolation="container").ok
        for thread in threads:
            thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(found) <= 32 + 2 * 8 and min(found) >= 8, found


def test_flows_of_all_sandboxes_are_bounded_together() -> None:
    in_world(bounded_together)


def publishes_in_vain(world: World) -> None:
    """Inside every port that a connection could come from is taken: the caller's CPU isn't used up by trying."""
    code = """
import os, resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
first, last = map(int, open("/proc/sys/net/ipv4/ip_local_port_range").read().split())
held = []
while first <= last and (len(held) < 4000 or os.fork() == 0 and not held.clear()):
    held.append(socket.socket())
    held[-1].bind(("127.0.0.1", first))
    first += 1
open(str(first), "w").close()
time.sleep(8)
"""
    network = rf.Network("nat", publish={18084: 80})
    results: list[rf.Result] = []
    runs = threading.Thread(
        target=lambda: results.append(rf.run(["python3", "-c", code], isolation="container", network=network))
    )
    runs.start()
    time.sleep(4)
    began = time.process_time()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", 18084), timeout=5) as one, pytest.raises(ConnectionResetError):
            one.recv(1)
    time.sleep(1)
    spent = time.process_time() - began
    runs.join()
    equal((results[0].stderr, results[0].exit_code), (b"", 0))
    assert spent < 0.5, f"{spent} s of CPU"


def test_a_published_port_that_leads_nowhere() -> None:
    in_world(publishes_in_vain)


def goes_on_or_fails(world: World) -> None:
    """An operating system's error for a while costs what it hits. What nobody thought of ends the run, and is told."""
    from ringfence.levels.network import loop

    code = """
import socket, time
query = b"\\x12\\x34\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\3web\\7example\\0\\0\\1\\0\\1"
dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(4):
    dns.sendto(query, ("192.0.0.1", 53))
    time.sleep(0.5)
print(socket.create_connection(("203.0.113.80", 80), timeout=5).recv(100).decode().strip())
"""
    real, failing = loop.Loop.watch, threading.Event()

    def watch(self: loop.Loop, *arguments: Any) -> None:
        if failing.is_set():
            raise OSError(28, "max_user_watches")
        real(self, *arguments)

    loop.Loop.watch = watch  # type: ignore[assignment]
    network = allow("web.example:80", "203.0.113.80:80")
    try:
        timer = threading.Timer(0.3, failing.set), threading.Timer(1.6, failing.clear)
        for one in timer:
            one.start()
        result = rf.run(["python3", "-c", code], isolation="container", network=network, text=True)
        for one in timer:
            one.join()
    finally:
        loop.Loop.watch = real  # type: ignore[method-assign]
    equal((result.stdout, result.stderr), ("203.0.113.80 80\n", ""))

    turn = loop.Loop.turn

    def fails(self: loop.Loop, timeout_s: float | None) -> None:
        turn(self, timeout_s)
        raise ValueError("nobody thought of this")

    loop.Loop.turn = fails  # type: ignore[method-assign]
    try:
        began = time.monotonic()
        with pytest.raises(rf.ProtocolError, match="gateway failed: ValueError: nobody thought of this"):
            rf.run(["python3", "-c", code + "time.sleep(60)"], isolation="container", network=network)
        assert time.monotonic() - began < 20
    finally:
        loop.Loop.turn = turn  # type: ignore[method-assign]
    equal(world.client("tcp 203.0.113.80 80", network="nat"), ["203.0.113.80 80"])


def test_a_gateway_goes_on_or_its_run_fails() -> None:
    in_world(goes_on_or_fails)


def hangs(world: World) -> None:
    """A gateway's thread that doesn't end in time goes on to use nothing of others': what it has it closes itself."""
    from ringfence.levels.network import gateway, loop

    turn, join = loop.Loop.turn, gateway._JOIN_S
    begun, goes_on = threading.Event(), threading.Event()
    stuck: list[gateway.Gateway] = []

    def sticks(self: loop.Loop, timeout_s: float | None) -> None:
        turn(self, timeout_s)
        begun.set()
        goes_on.wait()

    try:
        gateway._JOIN_S = 0.2
        loop.Loop.turn = sticks  # type: ignore[method-assign]
        code = "import socket; one = socket.socket(); one.settimeout(1); one.connect_ex(('203.0.113.80', 80))"
        assert rf.run(["python3", "-c", code], isolation="container", network="nat").exit_code == 0
        stuck += gateway._gateways
        assert begun.is_set() and len(stuck) == 1
        assert stuck[0]._inside.syn.fileno() >= 0 and stuck[0]._wake.fileno() >= 0
    finally:
        loop.Loop.turn, gateway._JOIN_S = turn, join  # type: ignore[method-assign]
        goes_on.set()
    stuck[0]._thread.join(20)
    assert stuck[0]._inside.syn.fileno() < 0 and stuck[0]._wake.fileno() < 0 and gateway._gateways == []


def test_a_gateway_that_hangs_closes_what_it_has_itself() -> None:
    in_world(hangs)


OPERATIONS = """
import socket, struct
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.settimeout(3)
for opcode in (0, 2, 4, 5):
    head = struct.pack("!HHHHHH", 7, opcode << 11 | 0x100, 1, 0, 0, 0)
    one.sendto(head + b"\\3web\\7example\\0\\0\\1\\0\\1", ("192.0.0.1", 53))
    print(one.recv(512)[3] & 15)
"""


def only_questions(world: World) -> None:
    """The host's servers see the host's address: a workload doesn't have them change a zone."""
    world.asked()
    for network in (rf.Network(), allow("web.example:80")):
        result = rf.run(["python3", "-c", OPERATIONS], isolation="container", network=network, text=True)
        equal((result.stdout.split(), result.stderr), (["0", "4", "4", "4"], ""))
        equal(world.asked(), ["web.example"])


def test_only_questions_are_passed_on() -> None:
    in_world(only_questions)


# ---- bandwidth ----

TRANSFER = """
import socket, sys, threading, time
one = socket.create_connection(("203.0.113.80", 80))
one.makefile("rb").readline()
begin = time.monotonic()
threading.Thread(target=lambda: (one.sendall(bytes(1 << 20)), one.shutdown(1))).start()
count = 0
while data := one.recv(1 << 16): count += len(data)
print(count, time.monotonic() - begin)
"""


def keeps_to_its_bandwidth(world: World) -> None:
    for rate, least, most in ((None, 0.0, 1.0), (1 << 20, 0.85, 3.0)):
        result = world.start(["python3", "-c", TRANSFER], network=rf.Network("nat", bandwidth=rate))
        count, seconds = result.stdout.split()
        equal(count, str(1 << 20))
        assert least <= float(seconds) <= most, (rate, seconds)
    began = time.process_time()
    rf.run(["python3", "-c", TRANSFER], network=rf.Network("nat", bandwidth=512 << 10), text=True)
    assert time.process_time() - began < 1.0  # while there is always more to send


def test_bandwidth() -> None:
    in_world(keeps_to_its_bandwidth)


# ---- what is left ----

KILLED = """
import os, sys
import ringfence as rf
from ringfence.wire.launcher import launcher
code = "import socket, time; one = socket.create_connection(('203.0.113.80', 80)); time.sleep(600)"
rf.run(["true"])
print(launcher().pid, flush=True)
true = ["true"], None, "container"
for run in ((["python3", "-c", code], rf.Network("nat", publish={18081: 80}), sys.argv[1]), true, true):
    try:
        rf.run(run[0], network=run[1], isolation=run[2])
    except rf.ProtocolError:
        pass  # without its launcher; the next run has another one, which removes what the first one had to
"""


def _namespaces() -> set[str]:
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found.add(os.readlink(f"/proc/{name}/ns/net"))
            except OSError:
                continue  # it has ended, or isn't ours to look at
    return found


def _listens(port: int) -> bool:
    """By the kernel's table: a connection would be the one that the server inside takes."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def _host_network() -> tuple[object, ...]:
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("route", "fib_trie")]
    forward = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    return sorted(socket.if_nameindex()), *(one.count("\n") for one in tables), forward


def leaves_nothing(world: World) -> None:
    before, network = _namespaces(), _host_network()
    for whom in ("caller", "launcher"):
        caller = python(KILLED, world.isolation)
        try:
            assert caller.stdout is not None
            launcher = int(caller.stdout.readline())
            assert leaks.settled(lambda: not _listens(18081), 20) is False
            equal(_host_network(), network)
            time.sleep(0.3 if world.isolation == "container" else 4)  # with a connection under way
        finally:
            os.kill(caller.pid if whom == "caller" else launcher, signal.SIGKILL)
        caller.wait(20)
        caller.stdout.close()
        left = leaks.settled(
            lambda: (_namespaces() - before) | ({"18081"} if _listens(18081) else set()), leaks.GRACE_S
        )
        assert not left, (whom, left)
        equal(_host_network(), network)


@USERS
def test_nothing_is_left_after_a_kill(user: int) -> None:
    in_world(leaves_nothing, user=user)


def ends_with_the_sandbox(world: World) -> None:
    """At a limit, with connections under way; `support.world` looks what is left."""
    code = "import socket, time; one = socket.create_connection(('203.0.113.80', 80)); time.sleep(600)"
    before = _host_network()
    result = world.start(["python3", "-c", code], network="nat", limits=rf.Limits(wall_time=1))
    equal(str(result.termination_reason), "wall_time")
    equal(_host_network(), before)


def test_it_ends_with_the_sandbox() -> None:
    in_world(ends_with_the_sandbox)


# ---- guests ----


def judged(world: World) -> None:
    """All that holds for a container, with the same guests throughout."""
    for one in (
        reaches_the_world,
        allow_list_by_name,
        around_by_address,
        around_by_dns,
        around_by_rebinding,
        rules_of_all_kinds,
        closed_places,
    ):
        one(world)


# Each of these boots guests; an unprivileged caller's have the same code behind them.
GUESTS_USERS = pytest.mark.parametrize(
    "user", [0, pytest.param(UNPRIVILEGED, marks=pytest.mark.long)], ids=["root", "unprivileged"]
)


@GUESTS_USERS
def test_a_guest_is_judged_as_a_container_is(user: int) -> None:
    need_tap()
    in_world(judged, user=user, isolation="vm")


def test_a_guest_of_an_unprivileged_caller() -> None:
    need_tap()
    in_world(reaches_the_world, user=UNPRIVILEGED, isolation="vm")


def in_and_out(world: World) -> None:
    moves_bytes(world)
    keeps_to_its_bandwidth(world)
    publishes(world)


@GUESTS_USERS
def test_a_guests_bytes_bandwidth_and_published_ports(user: int) -> None:
    need_tap()
    in_world(in_and_out, user=user, isolation="vm")


@GUESTS_USERS
def test_nothing_is_left_of_a_guests_network_after_a_kill(user: int) -> None:
    need_tap()
    in_world(leaves_nothing, user=user, isolation="vm")


@pytest.mark.long
@USERS
@pytest.mark.parametrize("body", [many_at_once, stays, by_command_line, bounded, ends_with_the_sandbox])
def test_what_else_a_guests_network_does(body: Any, user: int) -> None:
    need_tap()
    in_world(body, user=user, isolation="vm")


@pytest.mark.long
def test_a_guests_name_server_that_does_not_answer() -> None:
    need_tap()
    in_world(dead_server, isolation="vm")
