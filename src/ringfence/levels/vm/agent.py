"""What Python asks of a guest's init: files in and out, and what comes by the way.

The guest is taken for hostile: what it sends is bounded, and must get on.
"""

from __future__ import annotations

import select
import time

from ringfence.errors import ProtocolError, SpecError
from ringfence.levels.drive import SandboxEnded
from ringfence.wire import frames, guest_messages, messages
from ringfence.wire.frames import Type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.errors import RingfenceError
    from ringfence.levels.vm.vmm import Vmm
    from ringfence.spec import FileIn

__all__ = ["TRANSFER_LIMIT_NS", "Agent"]

# All that is brought back of one run: 1 GiB at some 15 MB/s, and as much again.
TRANSFER_LIMIT_NS = 150_000_000_000
_MOST_ENTRIES = 65536
_MOST_NAMES_BYTES = 64 << 20
_PATH_BYTES = 4095
# The longest that a guest may take from one whole frame of an answer to the next.
_SILENCE_NS = 30_000_000_000


class Agent:
    """The guest's init, behind the VMM's channel. other: takes what comes and is no answer."""

    def __init__(self, vmm: Vmm, other: Callable[[frames.Frame], None]) -> None:
        self._vmm = vmm
        self._other = other
        self._next_id = 1
        self._untaken = 0  # files that were put in, and whose DONE hasn't come yet

    def next_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def died(self, when: str) -> RingfenceError:
        return self._vmm.ended(when)

    def wait_for(self, kind: int, limit_ns: int, what: str) -> frames.Frame:
        """The next frame of that type. Raises StartError for an ERROR, ProtocolError where none comes."""
        for frame in self._frames(limit_ns, what):
            if frame.type == kind:
                return frame
            raise ProtocolError(f"{what}: it sent a frame of type {frame.type}")
        raise ProtocolError(what)

    def _frames(self, limit_ns: int, what: str) -> list[frames.Frame]:
        """What has come, waiting for the first of it."""
        channel = self._vmm.channel
        deadline = time.monotonic_ns() + limit_ns
        poll = select.poll()
        watch = self._vmm.watch()
        poll.register(channel.fileno(), select.POLLIN)
        for fd in watch:
            poll.register(fd, select.POLLIN)
        while not channel.at_end:
            poll.modify(channel.fileno(), select.POLLIN | (select.POLLOUT if channel.wants_to_send else 0))
            left = deadline - time.monotonic_ns()
            if left <= 0:
                break
            for fd, event in poll.poll(left // 1_000_000 + 1):
                if fd in watch:
                    try:
                        watch[fd]()
                    except SandboxEnded:  # which may be told before the channel's end is
                        raise self.died(f"({what})") from None
                elif event & select.POLLOUT:
                    channel.flush()
            found = channel.receive()
            for frame in found:
                if frame.type == Type.ERROR:
                    raise messages.parse_error(frame.payload)
            if found:
                return found
        if channel.at_end:
            raise self.died(f"({what})")
        raise ProtocolError(f"{what} in time{self._vmm.last_words()}")

    def until(self, done: Callable[[], bool], limit_ns: int, what: str) -> None:
        """Hands on what comes until that is so. Raises as `wait_for`."""
        deadline = time.monotonic_ns() + limit_ns
        while not done():
            for frame in self._frames(deadline - time.monotonic_ns(), what):
                self._other(frame)

    # ---- files in ----

    def put(self, files: tuple[FileIn, ...]) -> None:
        """Sends them; their DONEs come later, to `took` or while an answer is waited for."""
        for one in files:
            for request in guest_messages.put(one.path, one.mode, one.data, id=self.next_id()):
                self._vmm.channel.send(request)
            self._untaken += 1

    def took(self) -> None:
        """A DONE came that was no answer to what is waited for."""
        if self._untaken <= 0:
            raise ProtocolError("the guest took a file that wasn't sent")
        self._untaken -= 1

    def until_taken(self) -> None:
        deadline = time.monotonic_ns() + TRANSFER_LIMIT_NS
        while self._untaken > 0:
            for frame in self._frames(deadline - time.monotonic_ns(), "the guest did not take the files"):
                self._other(frame)

    # ---- files out ----

    def entries(self, until_ns: int) -> list[guest_messages.Entry]:
        """What is in the work directory, by path. until_ns: CLOCK_MONOTONIC."""
        entries: dict[bytes, guest_messages.Entry] = {}
        listed = names_bytes = 0

        def take(frame: frames.Frame) -> None:
            nonlocal listed, names_bytes
            for entry in guest_messages.parse_entries(frame.payload):
                # The names become keys of Result.files, and then perhaps paths of the caller's.
                if not {b"", b".", b".."}.isdisjoint(entry.path.split(b"/")) or len(entry.path) > _PATH_BYTES:
                    raise ProtocolError("the guest lists a file outside its work directory")
                entries[entry.path] = entry
                names_bytes += len(entry.path)
                listed += 1
            if listed > _MOST_ENTRIES or names_bytes > _MOST_NAMES_BYTES:
                raise ProtocolError("the guest lists more files than it may")

        self._answer(frames.encode(Type.LIST, id=self.next_id()), Type.ENTRIES, take, until_ns)
        return [entries[path] for path in sorted(entries)]

    def read(self, path: bytes, limit_bytes: int, until_ns: int) -> bytes:
        """Raises StartError where it is no regular file (any more), SpecError where it is larger than the limit."""
        data = bytearray()

        def take(frame: frames.Frame) -> None:
            data.extend(frame.payload)
            if len(data) > limit_bytes:
                raise SpecError(f"collect: the files that match are more than {limit_bytes} bytes together")

        self._answer(guest_messages.read(path, id=self.next_id()), Type.DATA, take, until_ns)
        return bytes(data)

    def _answer(self, request: bytes, kind: int, take: Callable[[frames.Frame], None], until_ns: int) -> None:
        """Hands on the frames of an answer up to its DONE."""
        self._vmm.channel.send(request)
        empty = 0
        while True:
            left = min(until_ns - time.monotonic_ns(), _SILENCE_NS)
            for frame in self._frames(left, "the guest did not hand over its files"):
                if frame.type == Type.DONE and self._untaken > 0:
                    self._untaken -= 1  # the end of a file that was put in before
                    continue
                if frame.type == Type.DONE:
                    return
                if frame.type == Type.PONG:
                    continue
                if frame.type != kind:
                    raise ProtocolError(f"the guest answered with a frame of type {frame.type}")
                empty += not frame.payload
                if empty > 1:
                    raise ProtocolError("the guest sends frames with nothing in them")
                take(frame)
