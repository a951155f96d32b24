"""What of a guest's network is not as a container's: its own kernel is hostile, and it takes a tap. The rest of it is
in test_network.py, with the same bodies for both levels.
"""

from __future__ import annotations

import os
import re
import select
import socket
import struct
import subprocess
import tempfile
import threading
from typing import Any

import pytest

import ringfence as rf
from support import leaks
from support.sandboxes import need, need_level
from support.world import CLIENT, HOST_ADDRESS, HOST_PORTS, UNPRIVILEGED, World, _change_policy, equal, in_world

NO = "EHOSTUNREACH"  # "administratively prohibited"


@pytest.fixture(autouse=True)
def what_it_takes() -> None:
    need("root", os.geteuid() == 0)
    need("/dev/net/tun", os.path.exists("/dev/net/tun"))
    need_level("vm")


# With every power over its own stack and raw frames. Prints how many frames went out.
HOSTILE = r"""
import os, random, socket, struct, sys
random.seed(7)
own, near, far = "192.0.0.2", "203.0.113.80", "203.0.113.81"  # near is on the list, far isn't
own6, far6 = "fdd5:7266:6e65:7400::2", "2001:db8::81"
mac, gateway, everybody = b"\2rf\0\0\2", b"\2rf\0\0\1", b"\xff" * 6
p4 = lambda one: socket.inet_aton(one)
p6 = lambda one: socket.inet_pton(socket.AF_INET6, one)
def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16: total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF
def ip(source, to, protocol, body, *, fragment=0, ttl=64, options=b"", number=1):
    words = 5 + len(options) // 4
    head = struct.pack("!BBHHHBBH", 0x40 | words, 0, words * 4 + len(body), number, fragment, ttl, protocol, 0)
    head += p4(source) + p4(to) + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body
def ip6(source, to, following, body, hops=64):
    return struct.pack("!IHBB", 6 << 28, len(body), following, hops) + p6(source) + p6(to) + body
def tcp(source, to, port=80, flags=2, size=4):
    pack = p4 if size == 4 else p6
    body = struct.pack("!HHIIBBHHH", random.randrange(1024, 60000), port, 1, 0, 0x50, flags, 1000, 0, 0)
    pseudo = pack(source) + pack(to) + struct.pack("!II", 20, 6)
    return body[:16] + struct.pack("!H", checksum(pseudo + body)) + body[18:]
def udp(port=80, data=b"out"):
    return struct.pack("!HHHH", random.randrange(1024, 60000), port, 8 + len(data), 0) + data
def icmp6(source, to, kind, rest):
    body = struct.pack("!BBH", kind, 0, 0) + rest
    value = checksum(p6(source) + p6(to) + struct.pack("!II", len(body), 58) + body)
    return ip6(source, to, 58, body[:2] + struct.pack("!H", value) + body[4:], 255)
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
wire.bind(("eth0", 0))
sent = 0
def frame(body, kind=0x800, source=mac, to=gateway):
    global sent
    try:
        wire.send(to + source + struct.pack("!H", kind) + body)
        sent += 1
    except OSError:
        pass  # too long for its own card
for _ in range(2):
    # Other sources: of the world, of the host, of the namespace itself, of nobody.
    for source in (far, near, "10.0.0.9", "127.0.0.1", "192.0.0.1", "0.0.0.0", "255.255.255.255", "HOST", "224.0.0.1"):
        for to in (near, far, "127.0.0.1", "HOST", "192.0.0.1", "169.254.169.254", "255.255.255.255", "224.0.0.251"):
            for port in (53, 80, PORT):
                frame(ip(source, to, 6, tcp(source, to, port)))
                frame(ip(source, to, 17, udp(port)))
    # Its own, to what isn't open, by every protocol, as fragments, with options that lead elsewhere, in other frames.
    for to in (far, "127.0.0.1", "HOST", "169.254.169.254", "255.255.255.255", "224.0.0.251", "10.1.2.3"):
        for port in (80, PORT):
            whole = tcp(own, to, port)
            route = b"\x83\x07\x04" + p4(far) + b"\0"
            for one in (whole, udp(port)):
                kind = 6 if one is whole else 17
                for packet in (
                    ip(own, to, kind, one), ip(own, to, kind, one, ttl=1), ip(own, to, kind, one, options=route),
                    ip(own, near, kind, one, options=b"\x89\x07\x04" + p4(to) + b"\0"),
                    ip(own, to, kind, one[:8], fragment=0x2000), ip(own, to, kind, one[8:], fragment=1),
                    ip(own, to, kind, one, fragment=0x1FFF), ip(own, to, kind, one)[:-3],
                ):
                    for target in (gateway, everybody): frame(packet, to=target)
                    for source in (gateway, os.urandom(6)): frame(packet, source=source)
                    frame(struct.pack("!HH", 5, 0x800) + packet, kind=0x8100)
            for flags in (0, 1, 4, 16, 18, 20, 63): frame(ip(own, to, 6, tcp(own, to, port, flags)))
        for protocol in (1, 2, 4, 41, 47, 50, 89, 103, 132, 255): frame(ip(own, to, protocol, os.urandom(40)))
        frame(ip(own, to, 4, ip(near, far, 17, udp())))
        frame(ip(own, to, 41, ip6(own6, far6, 17, udp())))
    gateway6 = "fdd5:7266:6e65:7400::1"
    for source in (own6, "fe80::1", far6, "::1", "::", gateway6):
        for to in (far6, "::1", "ff02::1", "ff02::2", "fe80::2", gateway6, "2001:db8::2", "fd00:ec2::254"):
            frame(ip6(source, to, 6, tcp(source, to, size=16)), kind=0x86DD)
            frame(ip6(source, to, 17, udp(53)), kind=0x86DD)
            routing = struct.pack("!BBBBI", 17, 2, 0, 1, 0) + p6(far6)
            frame(ip6(source, to, 43, routing + udp()), kind=0x86DD)
            frame(ip6(source, to, 0, struct.pack("!BBBB4s", 17, 0, 5, 2, b"\0" * 4) + udp()), kind=0x86DD)
            frame(ip6(source, to, 44, struct.pack("!BBHI", 17, 0, 1, 7) + udp()), kind=0x86DD)
            # A router's word, a neighbour's, a redirect.
            prefix = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 9000, 9000, 0) + p6("2001:db8:bad::")
            frame(icmp6(source, to, 134, struct.pack("!BBHII", 64, 0, 9000, 0, 0) + prefix), kind=0x86DD)
            frame(icmp6(source, to, 137, bytes(4) + p6(to) + p6(far6)), kind=0x86DD)
for number in range(1500):
    other, other6 = f"10.{number >> 8}.{number & 255}.9", f"fe80::{number + 9:x}"
    ask = struct.pack("!HHBBH", 1, 0x800, 6, 4, 1 + number % 2)
    frame(ask + mac + p4(other) + bytes(6) + p4(random.choice(("192.0.0.1", far, other))), kind=0x806, to=everybody)
    frame(icmp6(other6, "ff02::1", 135 + number % 2, bytes(4) + p6(other6) + b"\1\1" + mac), kind=0x86DD, to=everybody)
    kind = random.choice((0, 5, 0x600, 0x8847, 0x8863, 0x88CC, 0x888E))
    frame(os.urandom(random.choice((0, 1, 14, 46, 400))), kind=kind)
    frame(ip(own, near, 6, os.urandom(random.randrange(60))))
    frame(os.urandom(random.randrange(80)), kind=0x86DD)
for size in (1500, 9000, 16384, 16385, 30000, 65535): frame(ip(own, far, 17, udp(80, bytes(min(size, 60000)))))
print("sent", sent > 10000)
"""


OPEN = "frame(ip(own, far, 17, udp()))"
OPENED = {("ip", 17, HOST_ADDRESS, "203.0.113.81", 80), ("ip", 17, "203.0.113.81", HOST_ADDRESS, 80)}


class Watch:
    """All that the host sends into its network, or gets from there: (protocol, from, to, the other side's port)."""

    def __init__(self) -> None:
        self.seen: set[tuple[Any, ...]] = set()
        self._ends, self._end = os.pipe()
        self._wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
        self._wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._wire.bind(("h0", 3))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while self._ends not in select.select([self._wire.fileno(), self._ends], [], [])[0]:
            self._note(self._wire.recv(200))

    def _note(self, data: bytes) -> None:
        kind = struct.unpack_from("!H", data, 12)[0]
        if kind == 0x0806:
            self.seen.add(("arp",))
        elif kind == 0x0800:
            ends = [socket.inet_ntoa(data[at : at + 4]) for at in (26, 30)]
            ports = struct.unpack_from("!HH", data, 34)
            to = ends[0] == HOST_ADDRESS
            self.seen.add(("ip", data[23], *ends, ports[to]))
        elif kind == 0x86DD and (data[20], data[54 if data[20] else 62]) in ((58, 133), (58, 135), (58, 136), (0, 143)):
            self.seen.add(("ndp",))  # both ends of the wire say that they are there
        else:
            self.seen.add((hex(kind), data[:60].hex()))

    def close(self) -> set[tuple[Any, ...]]:
        os.close(self._end)
        self._thread.join()
        os.close(self._ends)
        self._wire.close()
        return self.seen


def neighbours() -> int:
    """How many entries the tables have that all network namespaces share."""
    shown = subprocess.run(["ip", "-s", "ntable", "show"], capture_output=True, text=True, check=True).stdout
    found = [int(one) for one in re.findall(r"entries (\d+)", shown)]
    assert len(found) == 2, shown
    return sum(found)


def hostile(world: World) -> None:
    """Whatever a guest's kernel sends, out goes only what is on the list; and its network goes on."""
    network = rf.Network("nat", allow=["203.0.113.80:80"])
    steps = ["tcp 203.0.113.80 80", "tcp 203.0.113.81 80"]
    code = HOSTILE.replace("HOST", HOST_ADDRESS).replace("PORT", str(HOST_PORTS["loopback"]))
    before = neighbours()
    watch = Watch()
    try:
        options: dict[str, Any] = {"user": 0, "capabilities": ["net_admin", "net_raw"]}
        with rf.Sandbox(isolation="vm", network=network, **options) as guest:
            result = guest.run(["python3", "-c", code], text=True)
            equal((result.stdout, result.stderr), ("sent True\n", ""))
            most = neighbours()
            result = guest.run(["python3", "-I", "-c", CLIENT, *steps], text=True)
            equal((result.stdout.split("\n"), result.stderr), (["203.0.113.80 80", NO, ""], ""))
            # The control: the same frame as one of those goes out where it is open.
            _change_policy(guest, rf.Network("nat", allow=["203.0.113.81:80"]))
            result = guest.run(["python3", "-c", code.partition("for _ in range(2)")[0] + OPEN], text=True)
            equal((result.stdout, result.stderr), ("", ""))
            assert leaks.settled(lambda: not watch.seen & OPENED, 5) is False, watch.seen
            _change_policy(guest, network)
            # Its address is its own to change, and no other one is heard.
            script = (
                "ip addr add 10.0.0.9/32 dev eth0; ip route replace default via 192.0.0.1 dev eth0 onlink src 10.0.0.9"
            )
            result = guest.run(["sh", "-c", script], text=True)
            equal((result.stdout, result.stderr), ("", ""))
            result = guest.run(["python3", "-I", "-c", CLIENT, *steps], text=True)
            equal((result.stdout, result.stderr), ("timeout\n" * 2, ""))
    finally:
        seen = watch.close()
    there = ("203.0.113.80", HOST_ADDRESS)
    equal(seen - {("arp",), ("ndp",)} - OPENED, {("ip", 6, *there, 80), ("ip", 6, *reversed(there), 80)})
    assert most - before < 20, (before, most)


def test_out_goes_only_what_is_open_whatever_a_guest_sends() -> None:
    in_world(hostile, isolation="vm")


# In QEMU's place, with its tap as descriptor 3: everything that the kernel lets its holder ask of it, and sockets.
TAKEN_OVER = r"""
import errno, fcntl, os, socket, struct, sys
def attempt(what):
    try:
        print(what() or "done")
    except OSError as error:
        print(errno.errorcode.get(error.errno, error))
name = lambda one: struct.pack("16s24x", one)
def ask(number, argument=1): return lambda: fcntl.ioctl(3, number, argument) and None
plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
def on_interface(number, request): return lambda: fcntl.ioctl(plain, number, request) and None
attempt(ask(0x400454CA, struct.pack("16sH22x", b"tap1", 0x1002)))  # TUNSETIFF: another one
for number in (0x400454CB, 0x400454CD, 0x400454CC, 0x400454CE):  # TUNSETPERSIST, LINK, OWNER, GROUP
    attempt(ask(number, 1000))
attempt(ask(0x8924, struct.pack("16sH6s16x", b"", 1, b"\2rf\0\0\7")))  # SIOCSIFHWADDR
attempt(on_interface(0x8916, struct.pack("16sH2s4s8x", b"tap0", 2, b"", socket.inet_aton("10.0.0.9"))))  # SIOCSIFADDR
attempt(on_interface(0x8914, struct.pack("16sH22x", b"tap0", 0)))  # SIOCSIFFLAGS: down
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
attempt(lambda: os.open("/dev/net/tun", os.O_RDWR))
def connect(address, port=80):
    with socket.create_connection((address, port), timeout=1) as one:
        return one.recv(100).decode().strip()
socket.setdefaulttimeout(1)
for address in ("203.0.113.80", "203.0.113.81", "169.254.169.254", "HOST", "192.0.0.1"):
    attempt(lambda: connect(address))
attempt(lambda: connect("192.0.0.1", PORT))
for number in range(2000): os.write(3, os.urandom(14 + number % 1500))
attempt(lambda: connect("203.0.113.80"))
"""


def taken_over(world: World) -> None:
    """A VMM that its guest has taken over has the guest's tap and no other network, and can't change its namespace."""
    from ringfence.levels.container import ContainerSandbox
    from ringfence.levels.state import state
    from ringfence.spec import Spec
    from ringfence.wire import messages

    code = TAKEN_OVER.replace("HOST", HOST_ADDRESS).replace("PORT", str(HOST_PORTS["loopback"]))
    network = rf.Network("nat", allow=["203.0.113.80:80"])
    spec = Spec.make(["python3", "-c", code], isolation="container", network=network)
    ours, theirs = os.pipe()
    jail = ContainerSandbox(spec, rf.host(), state(), guest=True)
    try:
        assert jail.channel is not None and jail.network is not None
        fds = [state().null, theirs, theirs, jail.network.tap]
        request = messages.execute(
            spec.argv, spec.environment(b"/work"), b"/work", id=1, once=True, streams=False, nfds=len(fds)
        )
        jail.channel.send(request, fds)
        jail.network.tap_was_handed_on()
        os.close(theirs)
        with open(ours, "rb") as file:
            lines = file.read().decode().splitlines()
    finally:
        jail.close()
    # What its descriptor does is the tap's own, and goes with it: that it stays, whose it is, its MAC.
    equal(lines[:6], ["EEXIST", "done", "EBUSY", "done", "done", "done"])
    equal(lines[6:11], ["EPERM", "EPERM", "EPERM", "EPERM", "ENOENT"])
    equal(lines[11:], ["timed out"] * 7)


@pytest.mark.parametrize("user", [0, UNPRIVILEGED], ids=["root", "unprivileged"])
def test_a_vmm_that_was_taken_over_has_no_network_but_the_tap(user: int) -> None:
    in_world(taken_over, user=user)


def refusals(world: World) -> None:
    def why(**options: Any) -> dict[str, str]:
        with pytest.raises(rf.CannotEnforce) as caught:
            rf.run(["true"], isolation="vm", network="nat", **options)
        return {one.rule: one.reason for one in caught.value.unmet}

    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/image/etc")
        equal(list(why(image=f"{folder}/image")), ["network"])
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/net"], check=True)
    missing = "the guest's packets come by a tap, and /dev/net/tun can't be opened: No such file or directory"
    equal(why(), {"network": missing})
    subprocess.run(["umount", "/dev/net"], check=True)
    os.chmod("/dev/net/tun", 0o600)


def test_what_cannot_be_had_is_refused() -> None:
    in_world(refusals, isolation="vm")
