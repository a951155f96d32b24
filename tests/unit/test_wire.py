"""The wire protocol, as an attacker would speak it: Python's parsers, and the C core's behind a real launcher and init.

A guest's kernel may be taken over, so whatever arrives on a channel must become values or a ProtocolError, and never
more memory than the protocol's bounds. The C parsers have their fuzz harnesses in core/fuzz; here they run for real.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringfence.errors import ProtocolError, StartError
from ringfence.wire import frames, guest_messages, layers, messages
from ringfence.wire.channel import Channel, send_packet
from ringfence.wire.frames import Type
from ringfence.wire.launcher import Launcher
from support.sandboxes import need

LIMIT_SECONDS = 20.0
CLONE_VM = 0x100
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x04000000, 0x10000000, 0x40000000
# CLONE_NEW{NS,UTS,IPC,USER,PID,NET} and CLONE_NEWTIME.
NAMESPACES = 0x7C020080
UNSET = 2**32 - 1

quick = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])


def attribute_run(tags: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    """Well-formed attributes that say anything."""
    one = st.builds(
        frames.attribute, tags, st.binary(max_size=48) | st.sampled_from([b"", bytes(4), bytes(8), bytes(40)])
    )
    return st.lists(one, max_size=8).map(b"".join)


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """One of the originals, with a few bytes changed, cut out or put in."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(data)


STARTED = b"".join(
    [
        frames.u32(1, 2),
        frames.attribute(2, struct.pack("<5Q", 0, 0, 0, 0, 0)),
        frames.attribute(3, struct.pack("<6I", *[1000] * 6)),
        frames.u32(4, 1),
        frames.u32(5, 2),
        frames.attribute(6, b"mnt:[4026531841]\0pid:[4026531836]\0"),
        frames.attribute(7, struct.pack("<IIQQ", 4, 0, 0, 2**64 - 1)),
        frames.u32(8, 1),
        frames.string(9, b"ringfence"),
        frames.string(10, b"6.1.0"),
    ]
)
EXITED = b"".join(
    [
        *(frames.u32(1, 1), frames.u32(2, 7), frames.u32(6, 0)),
        *(
            frames.u64(tag, value)
            for tag, value in [(3, 5), (4, 6), (5, 1 << 20), (7, 0), (8, 1 << 20), (10, 512), (11, 1024)]
        ),
        *(frames.u64(tag, tag) for tag in range(12, 17)),
    ]
)
ERROR = frames.u32(1, 2) + frames.string(2, b"exec") + frames.string(3, b"execve") + frames.string(4, b"/no")
ENTRIES = struct.pack("<cIQ", b"f", 0o644, 3) + b"a.txt\0" + struct.pack("<cIQ", b"d", 0o755, 0) + b"out\0"

DENIALS = struct.pack("<Q", 3) + struct.pack("<IIiIQ6Q", 0xC000003E, 165, 1, 0, 7, 1, 2, 3, 4, 5, 6)
DENIALS += struct.pack("<IIiIQ6Q", 0xC000003E, 166, -1, 0, 1, 0, 0, 0, 0, 0, 0)
SIZES = frames.attribute(1, struct.pack("<QQ", 1 << 20, 256) + b"/data\0")


def change(kind: int, what: bytes, size: int, path: bytes) -> bytes:
    return frames.attribute(2, bytes([kind]) + what + struct.pack("<Q", size) + path + b"\0")


LAYER_END = (
    frames.attribute(1, struct.pack("<QQ", 0, 7)) + change(1, b"f", 3, b"/etc/new") + change(3, b"\0", 0, b"/old")
)


def layer_end(payload: bytes) -> object:
    end = layers.LayerEnd()
    end.add(payload, 4)
    return end.free, end.changes, end.complete


PARSERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "started": (messages.parse_started, STARTED),
    "exited": (messages.parse_exited, EXITED),
    "error": (messages.parse_error, ERROR),
    "entries": (guest_messages.parse_entries, ENTRIES),
    "denials": (guest_messages.parse_denials, DENIALS),
    "sizes": (layers.parse_sizes, SIZES),
    "layer end": (layer_end, LAYER_END),
}


# ---- what a payload says ----


@pytest.mark.parametrize("name", PARSERS)
def test_a_real_payload_is_read(name: str) -> None:
    parse, payload = PARSERS[name]
    assert parse(payload)


def test_what_the_payloads_say() -> None:
    started = messages.parse_started(STARTED)
    assert (started.pid, started.no_new_privs, started.seccomp, started.landlock) == (2, True, 2, True)
    assert started.namespaces == {"mnt": 4026531841, "pid": 4026531836}
    assert started.rlimits == {4: (0, 2**64 - 1)}
    exited = messages.parse_exited(EXITED)
    assert (exited.exit_code, exited.signal, exited.cpu_ns, exited.oom_kills) == (7, None, 11, 0)
    assert (exited.cpu_user_ns, exited.cpu_system_ns) == (5, 6)
    assert (exited.io_read_bytes, exited.io_write_bytes) == (512, 1024)
    assert (exited.pids_peak, exited.throttled_ns) == (12, 13)
    assert (exited.memory_pressure_ns, exited.cpu_pressure_ns, exited.io_pressure_ns) == (14, 15, 16)
    shorter = messages.parse_exited(frames.u32(1, 1))
    assert (shorter.pids_peak, shorter.throttled_ns, shorter.io_pressure_ns) == (None, None, None)
    error = messages.parse_error(ERROR)
    assert (error.step, error.call, error.errno) == ("exec", "execve", errno.ENOENT)
    assert [(entry.kind, entry.path, entry.size_bytes) for entry in guest_messages.parse_entries(ENTRIES)] == [
        ("f", b"a.txt", 3),
        ("d", b"out", 0),
    ]
    others, denied = guest_messages.parse_denials(DENIALS)
    assert (others, denied[0]) == (3, (0xC000003E, 165, 1, 7, (1, 2, 3, 4, 5, 6)))
    assert denied[1][:4] == (0xC000003E, 166, None, 1)
    assert layers.parse_sizes(SIZES) == {b"/data": (1 << 20, 256)}
    changes = {b"/etc/new": ("created", "file", 3), b"/old": ("deleted", None, 0)}
    assert layer_end(LAYER_END) == ((0, 7), changes, True)
    assert layer_end(frames.attribute(3)) == (None, {}, False)


@pytest.mark.parametrize("name", PARSERS)
@quick
@given(data=st.data())
def test_any_payload_is_values_or_a_protocol_error(name: str, data: st.DataObject) -> None:
    parse, original = PARSERS[name]
    payload = data.draw(st.binary(max_size=256) | attribute_run(st.integers(0, 12)) | mutated([original]))
    try:
        found = parse(payload)
    except ProtocolError:
        return
    if isinstance(found, messages.Exited):
        # Either, never both, and no signal that no kernel has.
        assert (found.exit_code is None) != (found.signal is None)
        assert found.signal is None or 1 <= found.signal <= 64
    assert len(repr(found)) < 100 * (len(payload) + 100)


@pytest.mark.parametrize(
    "payload",
    [
        *(change(1, b"f", 0, path) for path in (b"etc", b"", b"/", b"/a/../b", b"/a//b", b"/./b", b"/a\0b")),
        change(0, b"f", 0, b"/a"),
        change(4, b"f", 0, b"/a"),
        change(3, b"f", 0, b"/a"),
        change(1, b"\0", 0, b"/a"),
        change(1, b"x", 0, b"/a"),
        b"".join(change(1, b"f", 0, b"/%d" % number) for number in range(5)),
        frames.attribute(3, b"x"),
        frames.attribute(4, b""),
    ],
)
def test_a_change_that_cannot_be_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        layer_end(payload)


@pytest.mark.parametrize(
    "payload",
    [
        frames.u32(1, 3) + frames.u32(2, 0),
        frames.u32(1, 1) + frames.u32(2, 256),
        frames.u32(1, 2) + frames.u32(2, 0),
        frames.u32(1, 2) + frames.u32(2, 65),
        frames.u32(2, 0),
        frames.u64(1, 1),
        frames.u32(1, 1) + frames.u32(9, 0),
        b"",
    ],
)
def test_an_end_that_no_command_can_have_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        messages.parse_exited(payload)


def test_what_is_not_told_never_looks_like_a_restriction() -> None:
    started = messages.parse_started(b"")
    assert not started.no_new_privs
    assert not started.landlock
    assert started.seccomp == 0
    assert all(one == 2**64 - 1 for one in started.capabilities)
    assert started.ids == (0,) * 6


# ---- frames on a channel ----


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Channel]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, trusted=False)
    yield theirs, channel
    theirs.close()
    channel.close()


def receive_all(pieces: list[bytes]) -> tuple[list[frames.Frame], bool]:
    """What a channel makes of a stream that comes in these pieces, and whether it broke the protocol."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours, trusted=False)
    found: list[frames.Frame] = []
    try:
        for piece in pieces:
            theirs.sendall(piece)
            found += channel.receive()
            # One frame that isn't whole is all that it may hold.
            assert len(channel._in) < frames.HEADER_BYTES + frames.PAYLOAD_MAX
        return found, False
    except ProtocolError:
        return found, True
    finally:
        theirs.close()
        channel.close()


FRAMES = st.builds(
    lambda type, payload, id: frames.encode(type, payload, id=id),
    st.sampled_from([value for name, value in vars(Type).items() if name.isupper()]),
    st.binary(max_size=64),
    st.integers(0, UNSET),
)


def split(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges) if a < b]


@quick
@given(st.lists(FRAMES, max_size=6), st.lists(st.integers(0, 1000), max_size=6))
def test_a_stream_gives_the_same_frames_in_whatever_pieces(sent: list[bytes], cuts: list[int]) -> None:
    found, broken = receive_all(split(b"".join(sent), cuts))
    assert not broken
    assert [frames.encode(one.type, one.payload, id=one.id) for one in found] == sent
    assert all(one.fds == [] for one in found)


@quick
@given(
    st.binary(max_size=512)
    | st.lists(FRAMES, min_size=1, max_size=4).map(b"".join).flatmap(lambda one: mutated([one])),
    st.lists(st.integers(0, 1000), max_size=4),
)
def test_any_stream_is_frames_or_a_protocol_error(stream: bytes, cuts: list[int]) -> None:
    receive_all(split(stream, cuts))


@pytest.mark.parametrize(
    ("what", "header"),
    [
        ("magic", struct.pack("<HBBIIHH", 0x4653, 1, 33, 0, 0, 0, 0)),
        ("version", struct.pack("<HBBIIHH", 0x4652, 2, 33, 0, 0, 0, 0)),
        ("length", struct.pack("<HBBIIHH", 0x4652, 1, 36, (1 << 20) + 1, 0, 0, 0)),
        ("descriptors", struct.pack("<HBBIIHH", 0x4652, 1, 33, 0, 0, 65, 0)),
        ("descriptors of a guest", struct.pack("<HBBIIHH", 0x4652, 1, 32, 0, 0, 1, 0)),
        ("reserved", struct.pack("<HBBIIHH", 0x4652, 1, 33, 0, 0, 0, 1)),
    ],
)
def test_a_bad_header_is_refused_before_its_payload(
    pair: tuple[socket.socket, Channel], what: str, header: bytes
) -> None:
    theirs, channel = pair
    theirs.sendall(header)
    with pytest.raises(ProtocolError):
        channel.receive()


def test_the_longest_payload_passes(pair: tuple[socket.socket, Channel]) -> None:
    theirs, channel = pair
    theirs.setblocking(False)
    rest = memoryview(frames.encode(Type.STDOUT, bytes(frames.PAYLOAD_MAX)))
    found: list[frames.Frame] = []
    while not found:
        if rest:
            rest = rest[theirs.send(rest) :]
        found = channel.receive()
    assert [len(one.payload) for one in found] == [frames.PAYLOAD_MAX]


def test_a_guest_can_not_hand_over_descriptors(pair: tuple[socket.socket, Channel]) -> None:
    theirs, channel = pair
    before = sorted(os.listdir("/proc/self/fd"))
    socket.send_fds(theirs, [frames.encode(Type.READY)], [0, 1, 2])
    (frame,) = channel.receive()
    assert frame.fds == []
    assert sorted(os.listdir("/proc/self/fd")) == before


@quick
@given(st.lists(st.binary(max_size=32).filter(lambda one: b"\0" not in one), min_size=1, max_size=5))
def test_arguments_survive(argv: list[bytes]) -> None:
    request = messages.execute(argv, [(b"A", b"b")], b"/", id=1, once=True, streams=False, nfds=3)
    fields = dict(frames.attributes(request[frames.HEADER_BYTES :]))
    assert fields[1].split(b"\0")[:-1] == argv
    assert fields[2] == b"A=b\0"


# ---- the C side, for real ----


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    with plain_init(launcher) as init:  # so that it is past its own start
        init.channel.send(good_plan())
        assert init.serves()
    yield launcher
    launcher.close()


class Talk:
    """A conversation with an init. Leaving it ends the init."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._waiting: list[frames.Frame] = []

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def answer(self) -> frames.Frame | None:
        """The next frame but LAUNCHED; None at the channel's end."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not self._waiting and not self.channel.at_end:
            assert time.monotonic() < deadline, "no answer"
            select.select([self.channel.fileno()], [], [], 1)
            for frame in self.channel.receive():
                for fd in frame.fds:
                    os.close(fd)
                if frame.type != Type.LAUNCHED:
                    self._waiting.append(frame)
        return self._waiting.pop(0) if self._waiting else None

    def refusal(self) -> StartError:
        frame = self.answer()
        assert frame is not None
        assert frame.type == Type.ERROR
        return messages.parse_error(frame.payload)

    def execute(self, *argv: bytes) -> None:
        null = os.open(os.devnull, os.O_RDWR)
        request = messages.execute(argv, [], b"/", id=9, once=True, streams=False, nfds=3)
        self.channel.send(request, [null] * 3)
        os.close(null)

    def serves(self) -> bool:
        """Whether a planned init runs a command, to its end."""
        self.execute(b"/bin/sh", b"-c", b"exit 7")
        frame = self.answer()
        assert frame is not None
        assert frame.type == Type.STARTED, messages.parse_error(frame.payload)
        frame = self.answer()
        assert frame is not None
        assert frame.type == Type.EXITED
        return messages.parse_exited(frame.payload).exit_code == 7


def plain_init(launcher: Launcher) -> Talk:
    """An init of the process level, with the rights of this test."""
    return Talk(launcher.launch(messages.launch(clone_flags=0, host_mounts=True)))


def contained_init(launcher: Launcher) -> Talk:
    """An init of the container level: whatever a plan makes it do, it does to namespaces of its own."""
    # Root maps to an id that owns nothing; an unprivileged user may only map its own.
    uid, gid = (1996488704, 1996488704) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    request = messages.launch(clone_flags=NAMESPACES, uid_map=b"0 %d 1\n" % uid, gid_map=b"0 %d 1\n" % gid)
    return Talk(launcher.launch(request))


def good_plan() -> bytes:
    plan = messages.Plan()
    plan.flags()
    return plan.encode()


def test_a_launch_for_later_waits_for_a_sandbox_to_end_or_for_quiet(launcher: Launcher) -> None:
    def later() -> Talk:
        return Talk(launcher.launch(messages.launch(clone_flags=0, host_mounts=True, later=True)))

    with plain_init(launcher) as running, later() as second, later() as third:
        for init in (running, second, third):
            init.channel.send(good_plan())
            assert init.serves()
    with later() as alone:
        alone.channel.send(good_plan())
        assert alone.serves()


def test_a_real_init_serves(launcher: Launcher) -> None:
    """The control of what follows: the same requests, well-formed, work."""
    with plain_init(launcher) as init:
        init.channel.send(good_plan())
        assert init.serves()


PLANS = {
    "unknown tag": frames.attribute(60),
    "unknown high tag": frames.attribute(0xFFFF),
    "wrong length": frames.attribute(12, bytes(8)),
    "past the end": struct.pack("<HHI", 12, 0, 5) + bytes(4),
    "reserved": struct.pack("<HHI", 12, 1, 4) + bytes(4),
    "given twice": frames.u32(12, 4) * 2,
    "unknown flag": frames.u32(12, 8),
    "no NUL": frames.attribute(1, b"name"),
    "two strings": frames.attribute(1, b"a\0b\0"),
    "descriptor that did not come": frames.u32(8, 0),
    "descriptor for sockets that did not come": frames.u32(23, 0),
    "descriptor for a tap that did not come": frames.u32(22, 0),
    "half a network card": frames.attribute(24, bytes(13)),
    "a network card with half of IPv6": frames.attribute(24, bytes(30)),
    "empty filter": frames.attribute(6),
    "cut filter": frames.attribute(6, bytes(9)),
    "long filter": frames.attribute(6, bytes(8 * 4097)),
    "reserved of a limit": frames.attribute(7, struct.pack("<IIQQ", 4, 1, 0, 0)),
    "17 limits": frames.attribute(7, struct.pack("<IIQQ", 4, 0, 0, 0)) * 17,
    "unset uid": frames.u32(4, UNSET) + frames.u32(5, 1000),
    "unset gid": frames.u32(4, 1000) + frames.u32(5, UNSET),
    "uid without gid": frames.u32(4, 1000),
    "gid without uid": frames.u32(5, 1000),
    "257 steps": messages.mask(b"/x").encode(frames.NO_FD) * 257,
    "step of no kind": frames.attribute(3, bytes(12) + b"\0\0/x\0\0"),
    "relative target": frames.attribute(3, struct.pack("<BBHII", 1, 0, 0, 0, frames.NO_FD) + b"\0\0x\0\0"),
    "a word to give back": frames.attribute(27, b"x"),
    "long seed": frames.attribute(17, bytes(513)),
    "a listener without a filter": frames.u32(19, 1),
    "an unknown flag of a filter": frames.attribute(6, struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000)) + frames.u32(19, 32),
    "a guest's audit": frames.attribute(6, struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000)) + frames.u32(19, 17),
    "answers of a guest": frames.attribute(6, struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000))
    + frames.attribute(19, struct.pack("<IHBBI", 1, 6, 0, 0, 0x7FFF0000)),
    "half an answer": frames.attribute(6, struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000)) + frames.attribute(19, bytes(8)),
    # Well-formed, but not for an init in the host's namespaces.
    "capabilities on the host": frames.u64(15, 1),
    "the host's name": frames.string(1, b"renamed"),
    "the host's loopback": frames.attribute(2),
    "the host's mounts": frames.u32(12, 2),
    "the host's clock": frames.u64(16, 1),
    "a guest's network card": frames.attribute(24, bytes(14)),
    "a guest's limits": frames.attribute(18, struct.pack("<QQQ", 1 << 30, 0, 0)),
    "a CPU limit that nothing tells": frames.u64(10, 10**9),
}


@pytest.mark.parametrize("name", PLANS)
def test_init_refuses_a_malformed_plan_and_starts_nothing(launcher: Launcher, name: str) -> None:
    with plain_init(launcher) as init:
        init.channel.send(frames.encode(Type.PLAN, PLANS[name]))
        error = init.refusal()
        assert (error.step, error.errno) == ("protocol", errno.EPROTO)
        init.execute(b"/bin/true")
        error = init.refusal()
        assert (error.step, error.call, error.detail) == ("protocol", "request", "before the plan")


_NEWNS = 0x00020000


def own_network(*, own: bool = True) -> bytes:
    """LAUNCH of an init whose network namespace belongs to its user namespace. own: and is never one of the stock."""
    uid, gid = (1996488704, 1996488704) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    maps = b"0 %d 1\n" % uid, b"0 %d 1\n" % gid
    # Without mounts of its own, which would need a tree to enter.
    flags = NAMESPACES & ~_NEWNS
    return messages.launch(clone_flags=flags, uid_map=maps[0], gid_map=maps[1], own_network=own)


def supplied(launcher: Launcher, request: bytes, *, tap: int = -1) -> tuple[socket.socket, Talk]:
    """Our end of the socket on which an init hands over others, once it has its plan."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(LIMIT_SECONDS)
    init = Talk(launcher.launch(request))
    plan = messages.Plan()
    plan.flags()
    plan.sockets(theirs.fileno())
    if tap >= 0:
        plan.tap(tap)
    init.channel.send(plan.encode(), plan.fds)
    theirs.close()
    return ours, init


def test_init_hands_over_sockets_of_its_own_network_namespace(launcher: Launcher) -> None:
    ours, init = supplied(launcher, own_network())
    with ours, init:
        # One that makes no sense gets its errno; one that takes CAP_NET_RAW is made, as the namespace is init's own.
        for asked, code in (((77, 1, 0), errno.EAFNOSUPPORT), ((socket.AF_INET, socket.SOCK_RAW, 255), 0)):
            ours.send(struct.pack("<III", *asked))
            data, fds, _, _ = socket.recv_fds(ours, 64, 4)
            assert (struct.unpack("<i", data), len(fds)) == ((code,), 0 if code else 1)
            for fd in fds:
                with socket.socket(fileno=fd) as made, pytest.raises(OSError, match="unreachable"):
                    made.sendto(bytes(20), ("203.0.113.1", 0))  # there is nothing but a lo that is down
        init.execute(b"/nothing")  # it goes on serving
        assert init.refusal().step == "exec"


def test_init_hands_over_a_tap_of_its_own_network_namespace_once(launcher: Launcher) -> None:
    need("/dev/net/tun", os.access("/dev/net/tun", os.R_OK | os.W_OK))
    folder = os.open("/dev/net", os.O_PATH)
    ours, init = supplied(launcher, own_network(), tap=folder)
    os.close(folder)
    with ours, init:
        for code in (0, errno.EAFNOSUPPORT):
            ours.send(bytes(12))
            data, fds, _, _ = socket.recv_fds(ours, 64, 4)
            assert (struct.unpack("<i", data), len(fds)) == ((code,), 0 if code else 1)
            for fd in fds:
                # TUNGETIFF: whose it is. None of our own namespace has that name.
                assert fcntl.ioctl(fd, 0x800454D2, bytes(40))[:5] == b"tap0\0"
                assert "tap0" not in [name for _, name in socket.if_nameindex()]
                os.close(fd)


def test_init_makes_no_tap_where_the_network_namespace_is_not_its_own(launcher: Launcher) -> None:
    """One of the launcher's stock belongs to the host's user namespace. And without the node there is none at all."""
    for own, wanted in ((False, ("protocol", "a tap of somebody else's")), (True, ("network card", "/dev/net/tun"))):
        folder = os.open("/proc", os.O_PATH)
        ours, init = supplied(launcher, own_network(own=own), tap=folder)
        os.close(folder)
        with ours, init:
            error = init.refusal()
            assert (error.step, error.detail) == wanted


@pytest.mark.parametrize("packet", [b"", b"x", bytes(11), bytes(13), bytes(5000)])
def test_init_closes_a_supply_that_breaks_the_protocol(launcher: Launcher, packet: bytes) -> None:
    ours, init = supplied(launcher, own_network())
    with ours, init:
        ours.send(packet)
        assert ours.recv(64) == b""
        init.execute(b"/nothing")  # it goes on serving
        assert init.refusal().step == "exec"


def test_init_of_the_hosts_network_hands_over_nothing(launcher: Launcher) -> None:
    ours, init = supplied(launcher, messages.launch(clone_flags=0, host_mounts=True))
    with ours, init:
        error = init.refusal()
        assert (error.step, error.detail) == ("protocol", "it would change a namespace of the host's")


EXECS = {
    "no argv": frames.string(3, b"/"),
    "empty argv": frames.attribute(1),
    "argv without NUL": frames.attribute(1, b"true"),
    "argv twice": frames.string(1, b"true") * 2,
    "8193 arguments": frames.attribute(1, b"a\0" * 8193),
    "unknown flag": frames.string(1, b"true") + frames.u32(4, 4),
    "unknown tag": frames.string(1, b"true") + frames.u32(5, 0),
    "no descriptors": frames.string(1, b"true"),
}


@pytest.mark.parametrize("name", EXECS)
def test_init_refuses_a_malformed_exec_and_goes_on(launcher: Launcher, name: str) -> None:
    with plain_init(launcher) as init:
        init.channel.send(good_plan())
        init.channel.send(frames.encode(Type.EXEC, EXECS[name], id=3))
        assert init.refusal().errno == errno.EPROTO
        assert init.serves()


@pytest.mark.parametrize(
    "stream",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<HBBIIHH", 0x4652, 2, 16, 0, 0, 0, 0),
        struct.pack("<HBBIIHH", 0x4652, 1, 16, (1 << 20) + 1, 0, 0, 0),
        struct.pack("<HBBIIHH", 0x4652, 1, 16, 0, 0, 1, 0),
        struct.pack("<HBBIIHH", 0x4652, 1, 16, 0, 0, 65, 0),
        struct.pack("<HBBIIHH", 0x4652, 1, 16, 0, 0, 0, 1),
    ],
)
def test_init_ends_with_a_broken_stream(launcher: Launcher, stream: bytes) -> None:
    with plain_init(launcher) as init:
        init.channel.send(stream)
        assert init.refusal().errno == errno.EPROTO
        assert init.answer() is None


def test_init_says_that_it_lives(launcher: Launcher) -> None:
    with plain_init(launcher) as init:
        init.channel.send(frames.encode(Type.PING, id=7))
        assert init.refusal().errno == errno.EPROTO  # before its plan
    with plain_init(launcher) as init:
        init.channel.send(frames.encode(Type.PLAN, frames.u32(12, 4)) + frames.encode(Type.PING, id=7))
        answer = init.answer()
        assert answer is not None and (answer.type, answer.id, answer.payload) == (Type.PONG, 7, b"")


@settings(deadline=None, max_examples=100)
@given(payload=st.binary(max_size=128) | attribute_run(st.integers(0, 20)))
def test_any_plan_is_taken_or_refused(launcher: Launcher, payload: bytes) -> None:
    with contained_init(launcher) as init:
        init.channel.send(frames.encode(Type.PLAN, payload) + frames.encode(Type.SHUTDOWN))
        frame = init.answer()
        assert frame is None or frame.type == Type.ERROR


def open_fds(launcher: Launcher) -> int:
    return len(os.listdir(f"/proc/{launcher.pid}/fd"))


def settled_fds(launcher: Launcher) -> int:
    """Once the launcher sleeps: it closes its copies of the last request after its answer."""
    while True:
        found = open_fds(launcher)
        time.sleep(0.05)
        with open(f"/proc/{launcher.pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
        if state == "S" and open_fds(launcher) == found:
            return found


# Packets that have no answer: their answer socket is closed. (An empty one is the end of the socket.)
GARBAGE = [
    b"x",
    bytes(16),
    b"RF" * 4000,
    os.urandom(65536),
    frames.encode(Type.OWN, bytes(100), nfds=9),
    frames.encode(77),
]


@pytest.mark.parametrize("packet", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("nfds", [0, 1, 3])
def test_the_launcher_survives_garbage_and_serves(launcher: Launcher, packet: bytes, nfds: int) -> None:
    ours, theirs = socket.socketpair()
    before = settled_fds(launcher)
    send_packet(launcher._socket, packet, [theirs.fileno()] * nfds)
    theirs.close()
    ours.settimeout(LIMIT_SECONDS)
    assert ours.recv(1) == b"", "a malformed request is answered by the end of its socket"
    ours.close()
    with plain_init(launcher) as init:
        init.channel.send(good_plan())
        assert init.serves()
    deadline = time.monotonic() + LIMIT_SECONDS
    while open_fds(launcher) != before:  # it closes its own copies after the answer
        assert time.monotonic() < deadline, f"{open_fds(launcher)} descriptors, not {before}"
        time.sleep(0.01)


def test_a_template_is_of_paths_of_the_host_and_the_launcher_comes_back(launcher: Launcher) -> None:
    need("root", launcher.own_mounts)
    own = f"/proc/{launcher.pid}"
    before = os.readlink(f"{own}/ns/mnt"), sorted(os.listdir(f"{own}/root")), settled_fds(launcher)
    assert before[0] != os.readlink("/proc/self/ns/mnt")
    launcher.template(b"usr", [messages.bind(b"/", b"/usr", messages.RDONLY | messages.RECURSIVE)])
    launcher.confirm()
    shown = f"{own}/root/t/usr"
    assert sorted(os.listdir(shown)) == sorted(os.listdir("/usr"))
    assert os.statvfs(shown).f_flag & os.ST_RDONLY
    # One that fails half-way leaves nothing of what it opened.
    steps = [messages.directory(b"/a"), messages.bind(b"/a", b"/usr"), messages.bind(b"/a", b"/nowhere/at/all")]
    launcher.template(b"none", steps)
    with pytest.raises(StartError, match="/nowhere/at/all") as caught:
        launcher.confirm()
    assert caught.value.errno == errno.ENOENT
    assert (os.readlink(f"{own}/ns/mnt"), sorted(os.listdir(f"{own}/root")), settled_fds(launcher)) == before


def join(flag: int, index: int) -> bytes:
    return frames.attribute(7, struct.pack("<QI", flag, index))


LAUNCHES = {
    "shared memory": frames.u64(1, CLONE_VM),
    "root by uid": frames.u64(1, 0) + frames.u32(5, 0),
    "everybody by uid": frames.u64(1, 0) + frames.u32(5, UNSET),
    "one map": frames.u64(1, 0) + frames.string(2, b"0 0 1\n"),
    "flags twice": frames.u64(1, 0) * 2,
    "unknown tag": frames.u32(4, 1),
    "an account's uid": frames.u64(1, 0) + frames.u32(5, 1000),
    "past the last slot": frames.u64(1, 0) + frames.u32(5, 0x7FFE0000),
    "a uid of another slot's map": frames.u64(1, CLONE_NEWUSER)
    + frames.string(2, b"0 1895825408 65536\n")
    + frames.string(3, b"0 1895825408 65536\n")
    + frames.u32(5, 0x71010000 + 1000),
    "the answer's socket joined": frames.u64(1, 0) + join(CLONE_NEWNET, 0),
    "a descriptor that didn't come": frames.u64(1, 0) + join(CLONE_NEWNET, 2),
    "mounts joined": frames.u64(1, 0) + join(CLONE_NEWNS, 1),
    "two types in one": frames.u64(1, 0) + join(CLONE_NEWNET | CLONE_NEWUTS, 1),
    "joined twice": frames.u64(1, 0) + join(CLONE_NEWNET, 1) * 2,
    "joined and new": frames.u64(1, CLONE_NEWNET) + join(CLONE_NEWNET, 1),
    "maps of another's user namespace": frames.u64(1, 0)
    + frames.string(2, b"0 0 1\n")
    + frames.string(3, b"0 0 1\n")
    + join(CLONE_NEWUSER, 1),
    "the host's clocks": frames.u64(1, 0) + frames.attribute(8, bytes(16)),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_launcher_refuses_a_malformed_launch(launcher: Launcher, name: str) -> None:
    joins = [os.open("/proc/self/ns/net", os.O_RDONLY)]
    try:
        with Talk(launcher.launch(frames.encode(Type.LAUNCH, LAUNCHES[name], nfds=2), joins)) as refused:
            assert refused.refusal().errno == errno.EPROTO
    finally:
        os.close(joins[0])


def test_a_joined_namespace_is_of_its_type(launcher: Launcher) -> None:
    for path, wanted in (("/proc/self/ns/uts", errno.EINVAL), ("/dev/null", errno.ENOTTY)):
        fd = os.open(path, os.O_RDONLY)
        try:
            with Talk(launcher.launch(messages.launch(clone_flags=0, joins=(CLONE_NEWNET,)), [fd])) as refused:
                assert refused.refusal().errno == wanted
        finally:
            os.close(fd)


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"x" * 256])
def test_the_launcher_owns_no_name_that_leads_elsewhere(launcher: Launcher, name: bytes) -> None:
    parent = os.open("/", os.O_PATH)
    try:
        launcher.own(1, parent, name)
        with pytest.raises(StartError) as raised:
            launcher.confirm()
    finally:
        os.close(parent)
    assert raised.value.errno == errno.EPROTO


def test_init_takes_no_plan_that_leaves_out_a_restriction(launcher: Launcher) -> None:
    """No new privileges, a tree where the mounts are its own, and the uid that it is to be killed by."""
    bad = messages.Plan()
    bad.flags(no_new_privs=False)
    mounts = messages.launch(clone_flags=_NEWNS)
    ours = messages.launch(clone_flags=0, host_mounts=True)
    for request, plan in ((ours, bad.encode()), (mounts, good_plan())):
        if os.geteuid() != 0 and request is mounts:
            continue  # it takes root to have mounts and no user namespace
        with Talk(launcher.launch(request)) as init:
            init.channel.send(plan)
            error = init.refusal()
            assert (error.step, error.call, error.errno) == ("protocol", "plan", errno.EPROTO)


def test_settle_answers_once_what_was_killed_is_gone(launcher: Launcher) -> None:
    with plain_init(launcher) as init:
        init.channel.send(good_plan())
        assert init.serves()
    launcher.settle()
