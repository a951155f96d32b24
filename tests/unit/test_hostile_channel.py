"""All that parses what a guest sends, with the guest as the enemy: nothing but typed errors, in bounded time and space.

Streams are made of real frames, of frames whose parts are random, and of frames that lie about their length, and end at
any byte. A short run of the same examples each time; many more under `-m long`.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringfence.errors import RingfenceError
from ringfence.levels.base import Command
from ringfence.levels.container import ContainerSandbox
from ringfence.levels.drive import drive
from ringfence.levels.layer import Layer
from ringfence.levels.vm.agent import Agent
from ringfence.levels.vm.vmm import Vmm
from ringfence.result import Applied
from ringfence.spec import Spec
from ringfence.wire import frames, guest_messages
from ringfence.wire.channel import Channel
from ringfence.wire.frames import Type

SHORT, LONG = 300, 20_000
# Of one stream, and what Python may hold of it at once: frames, their parts, what is kept of output and lists.
STREAM_BYTES = 3 << 20
HELD_BYTES = 64 << 20
# The loops themselves wait for 60 s: a machine that is busy isn't a loop that waits.
EXAMPLE_S, WAIT_NS = 30, 60 * 10**9

TYPES = [value for name, value in vars(Type).items() if name.isupper()]
numbers = st.one_of(st.integers(0, 8), st.sampled_from([2**31 - 1, 2**31, 2**32 - 1]))
wide = st.one_of(st.integers(0, 300), st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1]))
names = st.one_of(
    st.binary(max_size=12), st.sampled_from([b"/", b"..", b"a/../b", b"x" * 5000, b"\xff\xfe", b"\x1b[2J"])
)


def _attribute(tag: int, data: bytes, lie: int) -> bytes:
    return struct.pack("<HHI", tag, 0, max(0, len(data) + lie)) + data


values = st.one_of(
    st.builds(lambda n: struct.pack("<I", n), numbers),
    st.builds(lambda n: struct.pack("<Q", n), wide),
    st.builds(lambda n, name: struct.pack("<QQ", n, n) + name + b"\0", wide, names),
    st.builds(lambda n, name: struct.pack("<BBQ", 1 + n % 3, 102, n) + b"/" + name + b"\0", wide, names),
    st.builds(lambda name: name + b"\0", names),
    st.binary(max_size=200),
)
lies = st.one_of(st.just(0), st.just(0), st.just(0), st.integers(-8, 8))
attributes = st.lists(st.builds(_attribute, st.integers(0, 18), values, lies), max_size=12).map(b"".join)
entries = st.lists(
    st.builds(
        lambda kind, mode, size, name: kind + struct.pack("<IQ", mode, size) + name + b"\0",
        st.sampled_from([b"f", b"d", b"l", b"?"]),
        numbers,
        wide,
        names,
    ),
    max_size=12,
).map(b"".join)
started = st.just(frames.u32(1, 5))
exited = st.builds(
    lambda how, status: frames.u32(1, how) + frames.u32(2, status), st.integers(0, 3), st.integers(0, 300)
)
payloads = st.one_of(
    st.just(b""), attributes, entries, started, exited, st.binary(max_size=64), st.just(bytes(1 << 20))
)


def _frame(type: int, id: int, payload: bytes, lie: int, nfds: int, magic: int) -> bytes:
    length = (len(payload) + lie) % 2**32
    return struct.pack("<HBBIIHH", magic, 1, type, length, id, nfds, 0) + payload


types = st.one_of(st.sampled_from(TYPES), st.integers(0, 255))
ids = st.one_of(st.just(1), st.just(1), st.just(2), numbers)
frame = st.builds(
    _frame,
    types,
    ids,
    payloads,
    st.one_of(st.just(0), st.just(0), st.just(0), st.just(0), st.integers(-16, 2**20), st.just(2**31)),
    st.sampled_from([0, 0, 0, 0, 0, 0, 1, 65535]),
    st.sampled_from([0x4652] * 9 + [0]),
)
honest = st.builds(lambda type, payload: frames.encode(type, payload, id=1), st.sampled_from(TYPES), payloads)
streams = st.builds(
    lambda start, rest, cut: (b"".join([*start, *rest])[: cut or None])[:STREAM_BYTES],
    st.sampled_from([[], [frames.encode(Type.STARTED, frames.u32(1, 5), id=1)]]),
    st.lists(st.one_of(frame, honest), max_size=12),
    st.one_of(st.just(0), st.integers(0, 4096)),
)


class Silent(Vmm):
    """A VMM of which nothing comes but what the guest sends."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def watch(self) -> dict[int, Callable[[], None]]:
        return {}

    def last_words(self) -> str:
        return ""

    def ended(self, when: str) -> RingfenceError:
        return RingfenceError(when)

    def applied(self) -> list[Applied]:
        return []

    control = None
    cgroup = None

    @property
    def jail(self) -> ContainerSandbox:
        raise NotImplementedError

    def forget(self) -> None:
        pass

    def out_of_memory(self) -> bool:
        return False

    def booted(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def close(self) -> None:
        self.channel.close()


def feed(stream: bytes, what: Callable[[Channel], object]) -> None:
    """`what` with a channel on which that comes and then the end. What it raises but RingfenceError is a failure."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours, trusted=False)

    def send() -> None:
        try:
            theirs.sendall(stream)
        except OSError:
            pass  # enough was had of it
        theirs.close()

    sender = threading.Thread(target=send)
    began = time.monotonic()
    tracemalloc.start()
    try:
        sender.start()
        what(channel)
    except RingfenceError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        channel.close()
        sender.join()
    assert time.monotonic() - began < EXAMPLE_S
    assert peak < HELD_BYTES


COMMAND = Command(
    argv=(b"x",), env=(), cwd=b"/", input=b"in" * 40000, wall_time_ns=WAIT_NS, output_bytes=1 << 20, once=True
)


def drive_it(channel: Channel) -> None:
    layer = Layer()

    def on_frame(frame: frames.Frame) -> None:
        if frame.type == Type.READY:
            guest_messages.parse_ready(frame.payload)
        elif frame.type == Type.LISTENER:
            guest_messages.parse_denials(frame.payload)
        else:
            layer.take(frame)

    outcome = drive(
        channel, COMMAND, id=1, pipes=None, start_limit_ns=WAIT_NS, kill_hard=lambda: None, on_frame=on_frame
    )
    outcome.settle()
    assert len(outcome.stdout) <= COMMAND.output_bytes and len(outcome.stderr) <= COMMAND.output_bytes
    assert layer.fd == -1
    layer.changes()


def ask_it(channel: Channel) -> None:
    """What an agent is asked, in the order of a run; each where the one before has failed too."""
    agent = Agent(Silent(channel), lambda frame: None)
    until = time.monotonic_ns() + WAIT_NS
    files = Spec.make(["x"], files={"a": b"1" * 100, "b": b""}).files
    agent.put(files)
    asked: list[Callable[[], object]] = [
        agent.until_taken,
        lambda: [entry.path.decode("utf-8", "surrogateescape") for entry in agent.entries(until)],
        lambda: agent.read(b"a", 1 << 20, until),
        lambda: agent.wait_for(Type.READY, WAIT_NS, "it did not boot"),
    ]
    for one in asked:
        try:
            one()
        except RingfenceError:
            continue


def check(examples: int, what: Callable[[Channel], None]) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples == SHORT,
        suppress_health_check=list(HealthCheck),
    )
    @given(streams)
    def every(stream: bytes) -> None:
        feed(stream, what)

    every()


PARTS = {"drive": drive_it, "agent": ask_it}


@pytest.mark.parametrize("part", PARTS)
def test_whatever_a_guest_sends_is_a_value_or_a_typed_error(part: str) -> None:
    check(SHORT, PARTS[part])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", PARTS)
def test_much_more_of_what_a_guest_sends(part: str) -> None:
    check(LONG, PARTS[part])
