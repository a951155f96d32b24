"""The loop that drives one command: feeds its stdin, drains its output with bounds, watches the clock, takes reports.

One loop for all levels. Where init can take descriptors, the command's streams are pipes; in a guest they are frames on
the channel. Drain first, wait after: a full pipe must never be what a limit waits for.
"""

from __future__ import annotations

import os
import select
import time

from ringfence.errors import ProtocolError
from ringfence.levels.base import Command, Outcome
from ringfence.wire import frames, messages
from ringfence.wire.frames import Type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.wire.channel import Channel

__all__ = ["Pipes", "SandboxEnded", "drive"]

_READ_BYTES = 256 << 10
# More than any pipe holds (pipe-max-size is 1 MiB for all but root).
_DRAIN_READS = 64
# What a pipe takes at once without being read: the kernel's default capacity (pipe(7)).
_PIPE_BYTES = 64 << 10
# How long init gets to end the sandbox by itself before its process is killed.
_GRACE_NS = 2_000_000_000
# How much may wait in the channel before more stdin is queued.
_QUEUE_BYTES = 1 << 20

# From the hard kill until its end is seen. What takes longer hangs in the kernel.
_END_NS = 10_000_000_000
# A guest that has said nothing for so long is asked whether it lives, and given up where it doesn't answer. Its init
# has a share of the guest's CPUs whatever else runs there, but the whole guest may wait for one on a busy host.
_SILENCE_NS = 5_000_000_000
_ANSWER_NS = 60_000_000_000
# Frames of a guest that are neither its command's nor anything else that is bounded by what was asked of it.
_MOST_OTHERS = 1 << 20

_POLL_MS = 2**31 - 1

_READABLE = select.POLLIN | select.POLLHUP | select.POLLERR


class SandboxEnded(ProtocolError):
    """What `watch` raises where the sandbox has ended by itself. Once a command runs it is no error of the loop's."""


class Pipes:
    """The caller's ends and the command's ends of stdin, stdout and stderr. `close` closes what is still open."""

    __slots__ = ("child", "err", "in_", "out", "rest")

    def __init__(self, input: bytes | None, null: int) -> None:
        self.in_ = -1
        self.rest = memoryview(b"")
        self.child: list[int] = []
        self.out, self.err = -1, -1
        try:
            if input:
                theirs, self.in_ = os.pipe2(os.O_CLOEXEC)
                self.child.append(theirs)
                os.set_blocking(self.in_, False)
                sent = os.write(self.in_, input[:_PIPE_BYTES])
                self.rest = memoryview(input)[sent:]
                if not self.rest:
                    os.close(self.in_)
                    self.in_ = -1
            else:
                self.child.append(os.dup(null))
            self.out, theirs = os.pipe2(os.O_CLOEXEC)
            self.child.append(theirs)
            self.err, theirs = os.pipe2(os.O_CLOEXEC)
            self.child.append(theirs)
        except BaseException:
            self.close()
            raise

    def sent(self) -> None:
        """The command's ends went to init."""
        for fd in self.child:
            os.close(fd)
        self.child = []

    def ended(self, fd: int) -> None:
        """One of the streams is at its end."""
        if fd == self.out:
            self.out = -1
        else:
            self.err = -1
        os.close(fd)

    def close(self) -> None:
        self.sent()
        for fd in (self.in_, self.out, self.err):
            if fd >= 0:
                os.close(fd)
        self.in_ = self.out = self.err = -1


class _Kept:
    """The first `limit` bytes of a stream. One buffer: a guest may send it in frames of a byte each."""

    __slots__ = ("buffer", "limit", "over")

    def __init__(self, limit: int) -> None:
        self.buffer = bytearray()
        self.limit = limit
        self.over = False

    def add(self, data: bytes) -> None:
        room = self.limit - len(self.buffer)
        if len(data) > room:
            data = data[:room]
            self.over = True
        self.buffer += data


class _Drive:
    def __init__(
        self,
        channel: Channel,
        command: Command,
        *,
        id: int,
        pipes: Pipes | None,
        start_limit_ns: int,
        kill_hard: Callable[[], None],
        on_frame: Callable[[frames.Frame], None],
        watch: dict[int, Callable[[], None]],
        on_started: Callable[[], None] | None,
    ) -> None:
        self.channel = channel
        self.command = command
        self.id = id
        self.pipes = pipes
        self.kill_hard = kill_hard
        self.on_frame = on_frame
        self.watch = watch
        self.on_started = on_started
        self.polled: set[int] = set()
        self.outcome = Outcome()
        self.out = _Kept(command.output_bytes)
        self.err = _Kept(command.output_bytes)
        self.poll = select.poll()
        self.deadline: int | None = time.monotonic_ns() + start_limit_ns
        self.killing = False
        self.gone = False
        self.given_up = False
        # Of a guest: when something came last, when it was asked whether it lives (0: it wasn't), answers not come yet.
        self.guest = pipes is None
        self.heard_ns = self.asked_ns = self.pings = self.others = 0
        self.ended_streams: set[int] = set()
        self.streams: dict[int, tuple[_Kept, str]] = {}
        # Of a command whose stdin travels as frames.
        self.input = memoryview(command.input or b"") if pipes is None else memoryview(b"")
        self.credit = frames.STDIN_CREDIT
        self.eof_sent = pipes is not None

    def run(self) -> Outcome:
        self.poll.register(self.channel.fileno(), select.POLLIN)
        self._poll_watched()
        if self.pipes is not None:
            self.streams = {self.pipes.out: (self.out, "out"), self.pipes.err: (self.err, "err")}
            for fd in self.streams:
                self.poll.register(fd, select.POLLIN)
            if self.pipes.in_ >= 0:
                self.poll.register(self.pipes.in_, select.POLLOUT)
        self._feed()
        self.heard_ns = time.monotonic_ns()
        while not self._over():
            self._step()
        if self.gone:
            self._take_the_rest()
        self._drain()
        outcome = self.outcome
        outcome.stdout, outcome.stderr = bytes(self.out.buffer), bytes(self.err.buffer)
        outcome.truncated = self.out.over or self.err.over
        return outcome

    def _over(self) -> bool:
        return self.gone or self._over_already()

    def _step(self) -> None:
        timeout = None
        until = self.deadline if not self.guest else self._until()
        if until is not None:
            left = (until - time.monotonic_ns() + 999_999) // 1_000_000
            timeout = min(max(0, left), _POLL_MS)  # poll(2) takes an int, and an early return does no harm
        channel_fd = self.channel.fileno()
        self.poll.modify(channel_fd, select.POLLIN | (select.POLLOUT if self.channel.wants_to_send else 0))
        for fd, event in self.poll.poll(timeout):
            if fd == channel_fd:
                if event & select.POLLOUT:
                    self.channel.flush()
                    self._feed()
                if event & _READABLE:
                    for frame in self.channel.receive():
                        self._take(frame)
                        self.asked_ns = 0
                    self.heard_ns = time.monotonic_ns()
            elif fd in self.streams:
                self._read(fd)
            elif self.pipes is not None and fd == self.pipes.in_:
                self._write_stdin()
            elif fd in self.watch:
                self._watched(fd)
        if self.deadline is not None and time.monotonic_ns() >= self.deadline:
            self._deadline_passed()
        elif self.guest:
            self._ask_whether_it_lives()

    def _poll_watched(self) -> None:
        """`watch` changes while the command runs: what comes is waited for, and what went isn't any more."""
        for fd in self.polled - self.watch.keys():
            self.poll.unregister(fd)  # by its number: it may be closed already
        for fd in self.watch.keys() - self.polled:
            self.poll.register(fd, select.POLLIN)
        self.polled = set(self.watch)

    def _watched(self, fd: int) -> None:
        """What else the sandbox consists of has something to tell, such as its end."""
        try:
            self.watch[fd]()
        except SandboxEnded:
            if not self.killing and self.outcome.started is None:
                raise
            self.gone = True  # what was printed until then is kept
        self._poll_watched()

    def _take_the_rest(self) -> None:
        """What a guest sent before it was gone: no more than the socket holds, as nobody can add to it any more."""
        for _ in range(_DRAIN_READS):
            if self._over_already() or not (found := self.channel.receive()):
                return
            for frame in found:
                self._take(frame)

    def _over_already(self) -> bool:
        return self.channel.at_end or self.outcome.exited is not None

    # ---- the clock ----

    def _deadline_passed(self) -> None:
        if self.given_up:
            raise ProtocolError("the sandbox was killed, and doesn't end")
        if self.killing:
            self.given_up = True
            self.deadline = time.monotonic_ns() + _END_NS
            self.kill_hard()
        elif self.outcome.started is None:
            self.kill_hard()
            raise ProtocolError("the sandbox did not start in time")
        else:
            self._stop("wall_time")

    def _until(self) -> int | None:
        """When there is something to do though nothing comes from a guest."""
        if self.killing or self.outcome.started is None:
            return self.deadline
        asking = self.asked_ns + _ANSWER_NS if self.asked_ns else self.heard_ns + _SILENCE_NS
        return asking if self.deadline is None else min(asking, self.deadline)

    def _ask_whether_it_lives(self) -> None:
        """A guest that was halted, or whose kernel hangs, says nothing, and no event of its VMM's tells it."""
        now = time.monotonic_ns()
        if self.killing or self.outcome.started is None:
            return  # another clock is running
        if self.asked_ns and now - self.asked_ns >= _ANSWER_NS:
            self.kill_hard()
            raise ProtocolError(f"the guest has stopped answering: nothing came for {_ANSWER_NS // 10**9} s")
        if not self.asked_ns and now - self.heard_ns >= _SILENCE_NS:
            self.asked_ns = now
            self.pings += 1
            self.channel.send(frames.encode(Type.PING))

    def _stop(self, reason: str) -> None:
        """Ends all that runs in the sandbox; init reports as ever. Should it not, its process is killed."""
        if self.killing:
            return
        self.killing = True
        self.outcome.stopped = reason
        self.channel.send(frames.encode(Type.KILL))
        self.deadline = time.monotonic_ns() + _GRACE_NS

    # ---- what comes ----

    def _take(self, frame: frames.Frame) -> None:
        outcome = self.outcome
        kind = frame.type
        if (kind == Type.STDOUT or kind == Type.STDERR) and self.guest:
            self._streamed(frame)
        elif kind == Type.STARTED and frame.id == self.id:
            if outcome.started is not None:
                raise ProtocolError("the command was reported as started twice")  # each would set the clock anew
            outcome.started = messages.parse_started(frame.payload)
            outcome.started_ns = time.monotonic_ns()
            wall = self.command.wall_time_ns
            if not self.killing:
                self.deadline = None if wall is None else outcome.started_ns + wall
            if self.on_started is not None:
                self.on_started()
        elif kind == Type.EXITED and frame.id == self.id:
            if outcome.started is None:
                raise ProtocolError("the command was reported as ended before it had started")
            outcome.ended_ns = time.monotonic_ns()
            outcome.exited = messages.parse_exited(frame.payload)
        elif kind == Type.CREDIT and frame.id == self.id and self.pipes is None:
            more = int.from_bytes(frame.payload, "little")
            if len(frame.payload) != 4 or more == 0:
                raise ProtocolError("CREDIT has no number")
            self.credit += more
            if self.credit > frames.STDIN_CREDIT:
                raise ProtocolError("a guest gave more credit than it has room for")
            self._feed()
        elif kind == Type.ERROR:
            error = messages.parse_error(frame.payload)
            if outcome.started is not None:
                raise ProtocolError(f"an error came while the command ran: {error}")
            error.whole = frame.id != self.id
            raise error
        elif kind == Type.PONG and self.pings:
            self.pings -= 1
        else:
            self.others += 1
            if self.others > _MOST_OTHERS:
                raise ProtocolError("the guest sends more frames than it has anything to tell")
            self.on_frame(frame)
            self._poll_watched()

    def _streamed(self, frame: frames.Frame) -> None:
        """Output of a guest's command. Empty is a stream's end, which comes once: else it could go on for ever."""
        if frame.id != self.id or self.outcome.started is None or frame.type in self.ended_streams:
            raise ProtocolError("the guest sent output of no command that runs, or after its end")
        if not frame.payload:
            self.ended_streams.add(frame.type)
        self._output(self.out if frame.type == Type.STDOUT else self.err, frame.payload)

    def _output(self, kept: _Kept, data: bytes) -> None:
        if not self.outcome.first_output_ns and data:
            self.outcome.first_output_ns = time.monotonic_ns()
        kept.add(data)
        if kept.over:
            self._stop("output")

    def _read(self, fd: int) -> bool:
        """False at the stream's end."""
        data = os.read(fd, _READ_BYTES)
        if data:
            self._output(self.streams[fd][0], data)
            return True
        self.poll.unregister(fd)
        del self.streams[fd]
        if self.pipes is not None:
            self.pipes.ended(fd)  # while the command's end is on its way
        return False

    def _drain(self) -> None:
        """What the pipes still hold once the command is over. Only a sandbox that stays may have other writers, so
        nothing here waits.
        """
        for fd in tuple(self.streams):
            os.set_blocking(fd, False)
            try:
                for _ in range(_DRAIN_READS):
                    if not self._read(fd):
                        break
            except BlockingIOError:
                continue

    # ---- stdin ----

    def _write_stdin(self) -> None:
        pipes = self.pipes
        assert pipes is not None
        try:
            sent = os.write(pipes.in_, pipes.rest[:_READ_BYTES])
            pipes.rest = pipes.rest[sent:]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it doesn't want more
            pipes.rest = memoryview(b"")
        if not pipes.rest:
            self.poll.unregister(pipes.in_)
            os.close(pipes.in_)
            pipes.in_ = -1

    def _feed(self) -> None:
        """Queues stdin as frames, as far as the credit goes."""
        while self.input and self.credit and self.channel.queued_bytes < _QUEUE_BYTES:
            chunk = self.input[: min(frames.CHUNK, self.credit)]
            self.channel.send(frames.encode(Type.STDIN, bytes(chunk), id=self.id))
            self.credit -= len(chunk)
            self.input = self.input[len(chunk) :]
        if not self.input and not self.eof_sent:
            self.eof_sent = True
            self.channel.send(frames.encode(Type.STDIN, id=self.id))


def drive(
    channel: Channel,
    command: Command,
    *,
    id: int,
    pipes: Pipes | None,
    start_limit_ns: int,
    kill_hard: Callable[[], None],
    on_frame: Callable[[frames.Frame], None],
    watch: dict[int, Callable[[], None]] | None = None,
    on_started: Callable[[], None] | None = None,
) -> Outcome:
    """Drives a command whose EXEC was sent, until it is over or the channel ends.

    id: the command's, in EXEC. pipes: its streams, or None where they travel as frames. start_limit_ns: how long it
    may take until STARTED. kill_hard: ends the sandbox when init doesn't. on_frame: takes what isn't the command's.
    watch: other descriptors, and what to call when one can be read. on_started: called once the command runs.

    Raises StartError with the error that init reported, ProtocolError where the other side breaks the protocol.
    """
    loop = _Drive(
        channel,
        command,
        id=id,
        pipes=pipes,
        start_limit_ns=start_limit_ns,
        kill_hard=kill_hard,
        on_frame=on_frame,
        watch={} if watch is None else watch,
        on_started=on_started,
    )
    return loop.run()
