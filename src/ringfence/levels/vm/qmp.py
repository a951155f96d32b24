"""QMP, QEMU's control protocol: as much of it as saving and restoring a guest takes.

A client of our own, as what is needed is a dozen commands in a fixed order and the answers to them: the package
qemu.qmp is asyncio's, and importing it takes as long as restoring a guest. What comes may be from a QEMU that its guest
has taken over: it is bounded, and only what is looked for is read.
"""

from __future__ import annotations

import _socket as socket
import select
import time

from ringfence.errors import ProtocolError, printable
from ringfence.wire.channel import passed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Qmp", "restore"]

_LINE_BYTES = 64 << 10
# A whole connection's: a hello of 200 bytes, and some 100 for each answer and event.
_MOST_BYTES = 1 << 20
_MOST_EVENTS = 256

_IGNORE_SHARED = (
    b'{"execute":"migrate-set-capabilities","arguments":'
    b'{"capabilities":[{"capability":"x-ignore-shared","state":true}]}}'
)


def restore(state_fd: int) -> bytes:
    """All that a QEMU has to be told that waits for its guest's state. state_fd: as it numbers it."""
    load = b'{"execute":"migrate-incoming","arguments":{"uri":"fd:%d"}}' % state_fd
    return b'{"execute":"qmp_capabilities"}' + _IGNORE_SHARED + load


class Qmp:
    """A connection to a QEMU, which it owns.

    watch: what else to wait for, and what takes it: it raises where QEMU has ended.
    """

    def __init__(self, sock: socket.socket, watch: Callable[[], dict[int, Callable[[], None]]]) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._watch = watch
        self._in = bytearray()
        self._came = 0
        self._events: list[dict[str, Any]] = []

    def send(self, commands: bytes, fds: tuple[int, ...] = ()) -> None:
        """A few hundred bytes, which a socket always takes."""
        try:
            sent = self._socket.sendmsg([commands], passed(fds), socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            return  # that it is gone shows when reading
        if sent != len(commands):
            raise ProtocolError("QEMU doesn't take what is sent to it")

    def event(self, name: str, deadline_ns: int) -> int:
        """When QEMU told that event, CLOCK_REALTIME in ns by its own stamp. deadline_ns: CLOCK_MONOTONIC.

        Raises ProtocolError for an error that comes instead, for QEMU's end and for a time without it.
        """
        while True:
            for one in self._events:
                if one.get("event") == name:
                    self._events.remove(one)
                    return _stamp(one)
            said = self._next(deadline_ns)
            if "error" in said:
                raise ProtocolError(f"QEMU refuses: {_reason(said)}")

    def execute(self, command: str, deadline_ns: int, fds: tuple[int, ...] = (), **arguments: object) -> Any:
        """A command's answer. Raises ProtocolError for an error, for QEMU's end and for a time without an answer."""
        import json

        asked = {"execute": command, "arguments": {name.replace("_", "-"): value for name, value in arguments.items()}}
        self.send(json.dumps(asked).encode(), fds)
        while True:
            said = self._next(deadline_ns)
            if "return" in said:
                return said["return"]
            if "error" in said:
                raise ProtocolError(f"QEMU refuses {command}: {_reason(said)}")

    def capabilities(self, deadline_ns: int) -> None:
        """The start of a conversation: QEMU takes commands from now on, and leaves memory that is a file alone."""
        self.send(b'{"execute":"qmp_capabilities"}' + _IGNORE_SHARED)
        for _ in range(2):
            while "return" not in (said := self._next(deadline_ns)):
                if "error" in said:
                    raise ProtocolError(f"QEMU refuses: {_reason(said)}")

    def _next(self, deadline_ns: int) -> dict[str, Any]:
        """What QEMU says next. Events are kept until they are asked for."""
        import json

        while True:
            end = self._in.find(b"\n")
            if end < 0:
                self._receive(deadline_ns)
                continue
            line = bytes(self._in[:end])
            del self._in[: end + 1]
            try:
                said = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ProtocolError(f"QEMU says what is no JSON: {error}") from None
            if not isinstance(said, dict):
                raise ProtocolError("QEMU says what is no QMP")
            if "event" in said:
                self._events.append(said)
                if len(self._events) > _MOST_EVENTS:
                    raise ProtocolError("QEMU says more than it may")
            return said

    def _receive(self, deadline_ns: int) -> None:
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        watch = self._watch()
        for fd in watch:
            poll.register(fd, select.POLLIN)
        left = deadline_ns - time.monotonic_ns()
        found = [fd for fd, _ in poll.poll(left // 1_000_000 + 1)] if left > 0 else []
        if not found:
            raise ProtocolError("QEMU doesn't answer in time")
        # QMP first: what it said last tells more than that it has ended.
        if self._socket.fileno() in found:
            try:
                data = self._socket.recv(_LINE_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            self._in += data
            self._came += len(data)
            if len(self._in) > 2 * _LINE_BYTES or self._came > _MOST_BYTES:
                raise ProtocolError("QEMU says more than it may")
            if data:
                return
            poll.unregister(self._socket.fileno())
            found = [fd for fd, _ in poll.poll(max(0, left // 1_000_000))]
            if not found:
                raise ProtocolError("QEMU closed its control socket")
        for fd in found:
            if fd in watch:
                watch[fd]()

    def close(self) -> None:
        self._socket.close()


def _stamp(event: dict[str, Any]) -> int:
    stamp = event.get("timestamp")
    if isinstance(stamp, dict):
        seconds, micro = stamp.get("seconds"), stamp.get("microseconds")
        if isinstance(seconds, int) and isinstance(micro, int) and 0 <= seconds < 2**33 and 0 <= micro < 10**6:
            return seconds * 1_000_000_000 + micro * 1000
    raise ProtocolError("QEMU tells an event without its time")


def _reason(said: dict[str, Any]) -> str:
    error = said.get("error")
    text = error.get("desc") if isinstance(error, dict) else None
    return printable(text[:300], "?") if isinstance(text, str) else "for no reason"
