"""The gateway's event loop: sockets, the bound on their speed, and the clock."""

from __future__ import annotations

import select
import socket
import time

from ringfence.levels.network.flows import BACK, OUT, Bucket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Loop"]

_BUFFER_BYTES = 256 << 10
# What all connections together hold for a side that doesn't take it; a little more for each beyond that.
_MOST_HELD_BYTES = 32 << 20
_LEAST_READ_BYTES = 4096
# Until descriptors, or whatever else an operation lacked, may be there again.
_PAUSE_S = 0.01


class Loop:
    """An epoll, and who to call for each socket. bytes_per_second: of each direction, or None.

    buffer: for whoever reads just now.
    """

    def __init__(self, bytes_per_second: int | None) -> None:
        now = time.monotonic()
        self.buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[int], None]] = {}
        self._interest: dict[int, int] = {}
        self._buckets = None if bytes_per_second is None else tuple(Bucket(bytes_per_second, now) for _ in (OUT, BACK))
        # By direction.
        self._paused: tuple[set[Callable[[], None]], ...] = (set(), set())
        self.held_bytes = 0

    # ---- sockets ----

    def watch(self, sock: socket.socket, call: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Has `call` called with the events of a socket."""
        fd = sock.fileno()
        self._calls[fd] = call
        self._interest[fd] = 0
        self.want(sock, events)

    def want(self, sock: socket.socket, events: int) -> None:
        """For these events. With none the socket is out of the epoll, which else tells of its end for ever."""
        fd = sock.fileno()
        before = self._interest.get(fd)
        if before is None or before == events:
            return
        if not before:
            self._epoll.register(fd, events)
        elif not events:
            self._epoll.unregister(fd)
        else:
            self._epoll.modify(fd, events)
        self._interest[fd] = events

    def forget(self, sock: socket.socket) -> None:
        """Before it is closed."""
        try:
            self.want(sock, 0)
        except OSError:
            pass  # closing it takes it out as well
        fd = sock.fileno()
        self._calls.pop(fd, None)
        self._interest.pop(fd, None)

    # ---- speed ----

    def room(self, direction: int) -> int:
        """How many bytes may move now."""
        most = min(_BUFFER_BYTES, max(_LEAST_READ_BYTES, (_MOST_HELD_BYTES - self.held_bytes) // 8))
        if self._buckets is None:
            return most
        return min(most, self._buckets[direction].room(time.monotonic()))

    def moved(self, direction: int, count: int) -> None:
        if self._buckets is not None:
            self._buckets[direction].take(count)

    def paused(self, direction: int, resume: Callable[[], None]) -> None:
        """Somebody waits for room in a direction; called once there is some."""
        self._paused[direction].add(resume)

    # ---- the clock ----

    def turn(self, timeout_s: float | None) -> None:
        """Waits for events, and hands them out."""
        if self._buckets is not None:
            now = time.monotonic()
            waits = [self._buckets[one].wait_s(now) for one in (OUT, BACK) if self._paused[one]]
            timeout_s = min([*waits, *(() if timeout_s is None else (timeout_s,))], default=None)
        for fd, events in self._epoll.poll(timeout_s):
            call = self._calls.get(fd)
            if call is not None:  # else an earlier event of this turn has closed it
                self._guarded(call, events)
        for direction in (OUT, BACK):
            if self._paused[direction] and self.room(direction) > 0:
                waiting = list(self._paused[direction])
                self._paused[direction].clear()
                for resume in waiting:
                    self._guarded(resume)

    def _guarded(self, call: Callable[..., None], *arguments: int) -> None:
        try:
            call(*arguments)
        except OSError:
            # Descriptors or memory are short, say. The flow is left as it is, and others go on.
            time.sleep(_PAUSE_S)

    def close(self) -> None:
        self._epoll.close()
