"""What moves between a sandbox and the world: TCP connections with two ends, and the bound on their speed."""

from __future__ import annotations

import errno
import select
import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.levels.network.loop import Loop

__all__ = ["BACK", "OUT", "Bucket", "Connection", "abort"]

OUT, BACK = 0, 1  # from the sandbox, and to it

# One connection's share of a turn of the loop.
_READS = 4
_LEAST_BURST_BYTES = 16 << 10
_LEAST_MOVE_BYTES = 1500
_MOST_TURNS_A_SECOND = 500


class Bucket:
    """A bound of so many bytes a second, over all flows of one direction."""

    def __init__(self, bytes_per_second: int, now: float) -> None:
        self.rate = bytes_per_second
        # 50 ms of it at once, so that a turn of the loop moves enough.
        self._most = max(bytes_per_second // 20, min(_LEAST_BURST_BYTES, bytes_per_second))
        # Less than this isn't worth a turn: a sender that always has more would have one for every few bytes.
        self._least = max(1, min(self._most, max(_LEAST_MOVE_BYTES, bytes_per_second // _MOST_TURNS_A_SECOND)))
        self._tokens = float(self._most)
        self._at = now

    def room(self, now: float) -> int:
        self._tokens = min(self._most, self._tokens + (now - self._at) * self.rate)
        self._at = now
        return int(self._tokens) if self._tokens >= self._least else 0

    def take(self, count: int) -> None:
        """May go below nothing, by a datagram: later ones wait for it."""
        self._tokens -= count

    def wait_s(self, now: float) -> float:
        """Until there is room again."""
        self.room(now)
        return max(0.001, (self._least - self._tokens) / self.rate)


def abort(sock: socket.socket) -> None:
    """Closes a connection so that the other side sees that it broke."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass  # it broke already
    sock.close()


class _Half:
    """One direction. held_bytes: what is kept of it in memory, of which `pending` may be a part."""

    __slots__ = ("direction", "ended", "held_bytes", "pending", "sink", "source")

    def __init__(self, source: socket.socket, sink: socket.socket, direction: int) -> None:
        self.source, self.sink = source, sink
        self.direction = direction
        self.pending = memoryview(b"")
        self.held_bytes = 0
        self.ended = False


class Connection:
    """Two connected sockets, `inside` and `outside`, and what is on its way between them. Calls `over` at its end."""

    def __init__(
        self, loop: Loop, inside: socket.socket, outside: socket.socket, over: Callable[[Connection], None]
    ) -> None:
        self._loop = loop
        self._over = over
        self.inside, self.outside = inside, outside
        self._halves = (_Half(inside, outside, OUT), _Half(outside, inside, BACK))
        try:
            for sock in (inside, outside):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            loop.watch(inside, lambda events: self._event(0, events))
            loop.watch(outside, lambda events: self._event(1, events))
            self._interest()
        except OSError:
            self.close(broken=True)

    def _event(self, side: int, events: int) -> None:
        try:
            if events & ~select.EPOLLOUT:
                self._read(self._halves[side])
            if events & select.EPOLLOUT:
                self._write(self._halves[1 - side])
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                self.close(broken=True)
                return
        self.resume()

    def _read(self, half: _Half) -> None:
        buffer = self._loop.buffer
        for _ in range(_READS):
            if half.pending or half.ended:
                return
            room = self._loop.room(half.direction)
            if room <= 0:
                return  # the loop calls `resume` when there is some
            count = half.source.recv_into(buffer, min(room, len(buffer)))
            if count == 0:
                half.ended = True
                half.sink.shutdown(socket.SHUT_WR)
                return
            self._loop.moved(half.direction, count)
            try:
                sent = half.sink.send(buffer[:count])
            except BlockingIOError:
                sent = 0
            if sent < count:
                self._hold(half, memoryview(bytes(buffer[sent:count])), count - sent)

    def _write(self, half: _Half) -> None:
        if half.pending:
            rest = half.pending[half.sink.send(half.pending) :]
            if 2 * len(rest) <= half.held_bytes:
                # A view keeps all that it is a view of. Each byte is copied once more at most.
                self._hold(half, memoryview(bytes(rest)), len(rest))
            else:
                half.pending = rest

    def _hold(self, half: _Half, pending: memoryview, held_bytes: int) -> None:
        self._loop.held_bytes += held_bytes - half.held_bytes
        half.pending, half.held_bytes = pending, held_bytes

    def _interest(self) -> None:
        if all(half.ended and not half.pending for half in self._halves):
            self.close()
            return
        for side, sock in enumerate((self.inside, self.outside)):
            reads, writes = self._halves[side], self._halves[1 - side]
            wanted = 0
            if not reads.pending and not reads.ended:
                if self._loop.room(reads.direction) > 0:
                    wanted |= select.EPOLLIN
                else:
                    self._loop.paused(reads.direction, self.resume)
            if writes.pending:
                wanted |= select.EPOLLOUT
            self._loop.want(sock, wanted)

    def resume(self) -> None:
        """Waits for what makes sense now. One that can't wait for anything any more is broken off."""
        if self.inside.fileno() >= 0:
            try:
                self._interest()
            except OSError:
                self.close(broken=True)

    def close(self, *, broken: bool = False) -> None:
        if self.inside.fileno() < 0:
            return
        for half in self._halves:
            self._hold(half, memoryview(b""), 0)
        for sock in (self.inside, self.outside):
            self._loop.forget(sock)
            if broken:
                abort(sock)
            else:
                sock.close()
        self._over(self)
