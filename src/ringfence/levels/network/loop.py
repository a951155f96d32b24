"""The gateway's event loop: sockets, the bound on their speed, and the clock."""

from __future__ import annotations

import select
import socket
import time

from ringfence.levels.network.flows import BACK, OUT, Bucket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.levels.network.flows import Connection

__all__ = ["Loop"]

_BUFFER_BYTES = 256 << 10


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
        self._paused: set[Connection] = set()

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
        self.want(sock, 0)
        fd = sock.fileno()
        self._calls.pop(fd, None)
        self._interest.pop(fd, None)

    # ---- speed ----

    def room(self, direction: int) -> int:
        """How many bytes may move now."""
        if self._buckets is None:
            return _BUFFER_BYTES
        return self._buckets[direction].room(time.monotonic())

    def moved(self, direction: int, count: int) -> None:
        if self._buckets is not None:
            self._buckets[direction].take(count)

    def paused(self, one: Connection) -> None:
        """It waits for room."""
        self._paused.add(one)

    # ---- the clock ----

    def turn(self, timeout_s: float | None) -> None:
        """Waits for events, and hands them out."""
        if self._paused and self._buckets is not None:
            wait = min(bucket.wait_s() for bucket in self._buckets)
            timeout_s = wait if timeout_s is None else min(wait, timeout_s)
        for fd, events in self._epoll.poll(timeout_s):
            call = self._calls.get(fd)
            if call is not None:  # an earlier event of this turn may have closed it
                call(events)
        if self._paused:
            waiting, self._paused = self._paused, set()
            for one in waiting:
                one.resume()

    def close(self) -> None:
        self._epoll.close()
