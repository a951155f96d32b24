"""A stream of frames over a socket: to an init that can take descriptors, or to a guest that can't."""

from __future__ import annotations

# What the module socket wraps: its import takes 1.5 ms, and each pair and each flag of its own some microseconds.
import _socket as socket
import os
import select
import struct

from ringfence.errors import ProtocolError
from ringfence.wire import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Channel", "passed", "received", "send_packet"]

# At once. Of an init on this host, whose commands' output doesn't come this way, frames are small.
_RECEIVE_BYTES = 256 << 10
_RECEIVE_LOCAL_BYTES = 16 << 10
_FLUSH_LIMIT_MS = 30_000
_TRUNCATED = socket.MSG_CTRUNC
_NO_SIGNAL = socket.MSG_NOSIGNAL
_CLOSE_ON_EXEC = socket.MSG_CMSG_CLOEXEC
_FD_BYTES = struct.calcsize("i")
# The other side sends one descriptor with one frame, once. A few more are room for that to change.
_CONTROL_BYTES = socket.CMSG_SPACE(4 * _FD_BYTES)


def passed(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """What sendmsg takes besides, to hand over these descriptors."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []


def received(control: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with what recvmsg read."""
    found: list[int] = []
    for level, kind, body in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.extend(struct.unpack_from(f"{len(body) // _FD_BYTES}i", body))
    return found


def send_packet(sock: socket.socket, packet: bytes, fds: Sequence[int]) -> None:
    """One packet with its descriptors, whole or not at all."""
    sock.sendmsg([packet], passed(fds))


class Channel:
    """Frames over a stream socket, which it owns and makes non-blocking.

    What it holds is bounded: one frame that isn't whole yet, and what `send` could not pass on. `trusted` says
    whether the other side may hand over descriptors: a guest may not.
    """

    def __init__(self, sock: socket.socket, *, trusted: bool) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._trusted = trusted
        self._in = bytearray()
        self._fds: list[int] = []
        self._out: list[memoryview] = []
        self._out_fds: Sequence[int] = ()
        self.at_end = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def block(self) -> None:
        """From now on `receive` waits where nothing has come."""
        self._socket.setblocking(True)

    @property
    def wants_to_send(self) -> bool:
        """Whether something waits for the socket to take it."""
        return bool(self._out)

    @property
    def queued_bytes(self) -> int:
        """How much waits for the socket to take it, bytes."""
        return sum(len(part) for part in self._out)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Queues whole frames, and passes on what the socket takes now. Descriptors go with the first byte."""
        if fds and self._out:
            self.flush_blocking()
        self._out.append(memoryview(data))
        self._out_fds = fds or self._out_fds
        self.flush()

    def flush(self) -> None:
        """Passes on what the socket takes now. That the other side is gone shows when reading."""
        while self._out:
            try:
                sent = self._socket.sendmsg([self._out[0]], passed(self._out_fds), _NO_SIGNAL)
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                self._out.clear()
                self._out_fds = ()
                return
            self._out_fds = ()
            if sent == len(self._out[0]):
                del self._out[0]
            else:
                self._out[0] = self._out[0][sent:]

    def flush_blocking(self) -> None:
        """Passes on all that waits. Raises ProtocolError where the other side doesn't take it in time."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLOUT)
        while self._out:
            self.flush()
            if self._out and not poll.poll(_FLUSH_LIMIT_MS):
                raise ProtocolError("the sandbox doesn't take what is sent to it")

    def receive(self) -> list[frames.Frame]:
        """Reads once, and returns the frames that are whole. Sets `at_end` at the end of the stream.

        Raises ProtocolError where the other side breaks the format, or sends descriptors that it may not.
        """
        try:
            if self._trusted:
                data, control, flags, _ = self._socket.recvmsg(_RECEIVE_LOCAL_BYTES, _CONTROL_BYTES, _CLOSE_ON_EXEC)
                self._fds += received(control)
                if flags & _TRUNCATED:
                    raise ProtocolError("more descriptors came than the protocol allows")
            else:
                data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        if not data:
            self.at_end = True
            return []
        self._in += data
        return self._whole_frames()

    def _whole_frames(self) -> list[frames.Frame]:
        found = []
        at = 0
        while len(self._in) - at >= frames.HEADER_BYTES:
            type, length, id, nfds = frames.parse_header(self._in[at : at + frames.HEADER_BYTES])
            end = at + frames.HEADER_BYTES + length
            if len(self._in) < end:
                break
            if nfds > len(self._fds):
                raise ProtocolError("a frame names descriptors that did not come")
            taken, self._fds = self._fds[:nfds], self._fds[nfds:]
            found.append(frames.Frame(type, id, bytes(self._in[at + frames.HEADER_BYTES : end]), taken))
            at = end
        del self._in[:at]
        return found

    def is_quiet(self) -> bool:
        """Whether the other side has sent nothing that wasn't received yet, and is there."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        return not (self.at_end or poll.poll(0))  # what was sent, its end, or an error

    def finish(self) -> None:
        """Sends no more, which the other side sees as the end; what it still sends can be received."""
        self._out.clear()
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            return  # it is gone already

    def close(self) -> None:
        self._socket.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._out.clear()
