"""The loop that drives a command, with a guest at the other end that doesn't keep to the protocol."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ringfence.errors import ProtocolError, StartError
from ringfence.levels.base import Command, Outcome
from ringfence.levels.drive import SandboxEnded, drive
from ringfence.wire import frames
from ringfence.wire.channel import Channel
from ringfence.wire.frames import Type

STARTED = frames.encode(Type.STARTED, frames.u32(1, 5), id=1)
EXITED = frames.encode(Type.EXITED, frames.u32(1, 1) + frames.u32(2, 3), id=1)
ERROR = frames.encode(Type.ERROR, frames.u32(1, 2) + frames.string(2, b"exec"), id=1)
SECOND_NS = 10**9


class Guest:
    """The other end of a channel, and what the loop would do to it."""

    def __init__(self) -> None:
        ours, self.socket = socket.socketpair()
        self.channel = Channel(ours, trusted=False)
        self.killed = False
        self.tell, self.told = socket.socketpair()

    def kill(self) -> None:
        self.killed = True
        self.tell.close()  # the jail's channel is at its end, as VmSandbox watches it

    def drive(self, *, wall_time_ns: int | None = None, output_bytes: int = 1 << 20) -> Outcome:
        def jail_ended() -> None:
            raise SandboxEnded("QEMU ended")

        command = Command(
            argv=(b"x",),
            env=(),
            cwd=b"/",
            input=None,
            wall_time_ns=wall_time_ns,
            output_bytes=output_bytes,
            once=True,
        )
        return drive(
            self.channel,
            command,
            id=1,
            pipes=None,
            start_limit_ns=10 * SECOND_NS,
            kill_hard=self.kill,
            on_frame=lambda frame: None,
            watch={self.told.fileno(): jail_ended},
        )

    def close(self) -> None:
        self.channel.close()
        for one in (self.socket, self.tell, self.told):
            one.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.close()


def sender(guest: Guest, what: Callable[[], None]) -> threading.Thread:
    def run() -> None:
        try:
            what()
        except OSError:
            return  # the loop has had enough and closed its end

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_the_control(guest: Guest) -> None:
    guest.socket.sendall(STARTED + frames.encode(Type.STDOUT, b"out", id=1) + EXITED)
    outcome = guest.drive()
    assert outcome.exited is not None
    assert (outcome.stdout, outcome.exited.exit_code, outcome.stopped) == (b"out", 3, None)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (STARTED + STARTED, "started twice"),
        (EXITED, "ended before it had started"),
        (STARTED + ERROR, "while the command ran"),
        (STARTED + frames.encode(Type.CREDIT, b"\xff\xff\xff\xff", id=1), "more credit"),
        (STARTED + frames.encode(Type.CREDIT, b"1", id=1), "no number"),
    ],
)
def test_reports_out_of_order_are_an_error(guest: Guest, sent: bytes, words: str) -> None:
    guest.socket.sendall(sent)
    with pytest.raises(ProtocolError, match=words):
        guest.drive()


def test_an_error_before_the_start_is_a_start_error(guest: Guest) -> None:
    guest.socket.sendall(ERROR)
    with pytest.raises(StartError, match="ENOENT"):
        guest.drive()


def test_a_guest_that_ignores_its_kill_is_killed_and_what_it_printed_is_kept(guest: Guest) -> None:
    guest.socket.sendall(STARTED + frames.encode(Type.STDOUT, b"until then", id=1))
    began = time.monotonic()
    outcome = guest.drive(wall_time_ns=SECOND_NS // 5)
    assert guest.killed
    assert (outcome.stopped, outcome.stdout, outcome.exited) == ("wall_time", b"until then", None)
    assert time.monotonic() - began < 5


def test_a_guest_that_talks_on_does_not_stretch_its_time(guest: Guest) -> None:
    def chatter() -> None:
        while True:
            guest.socket.sendall(frames.encode(Type.STDOUT, b"x", id=1))
            time.sleep(0.01)

    guest.socket.sendall(STARTED)
    thread = sender(guest, chatter)
    began = time.monotonic()
    assert guest.drive(wall_time_ns=SECOND_NS // 5).stopped == "wall_time"
    assert time.monotonic() - began < 5
    guest.close()
    thread.join()


def test_a_wall_time_of_months_is_taken(guest: Guest) -> None:
    guest.socket.sendall(STARTED)

    def later() -> None:
        time.sleep(0.05)
        guest.socket.sendall(EXITED)

    thread = sender(guest, later)
    assert guest.drive(wall_time_ns=90 * 86400 * SECOND_NS).exited is not None
    thread.join()


def test_output_in_frames_of_two_bytes_costs_little(guest: Guest) -> None:
    kept = 2 << 20
    piece = frames.encode(Type.STDOUT, b"xy", id=1) * 1000
    guest.socket.sendall(STARTED)

    def flood() -> None:
        for _ in range(kept // 2000 + 10):
            guest.socket.sendall(piece)

    thread = sender(guest, flood)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = guest.drive(output_bytes=kept, wall_time_ns=60 * SECOND_NS)
    assert outcome.stopped == "output"
    assert outcome.truncated
    assert len(outcome.stdout) == kept
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 16 << 10
    guest.close()
    thread.join()
