"""What a gateway holds in memory and how often it wakes up, with real sockets on loopback and no sandbox."""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from ringfence.levels.network import loop as loops
from ringfence.levels.network.flows import Connection
from ringfence.levels.network.loop import Loop

Make = Callable[[Loop], tuple[Connection, socket.socket, socket.socket]]


def pair(receive_bytes: int = 0, send_bytes: int = 0) -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if receive_bytes:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        one = socket.socket()
        if send_bytes:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        one.connect(listener.getsockname())
        other, _ = listener.accept()
    for sock in (one, other):
        sock.setblocking(False)
    return one, other


@pytest.fixture
def flow() -> Iterator[Make]:
    """(connection, the workload's end, the server's end)."""
    held: list[socket.socket] = []
    made: list[Connection] = []

    def make(loop: Loop) -> tuple[Connection, socket.socket, socket.socket]:
        workload, inside = pair()
        outside, server = pair(receive_bytes=65536, send_bytes=43520)
        held.extend((workload, inside, outside, server))
        made.append(Connection(loop, inside, outside, lambda _: None))
        return made[-1], workload, server

    yield make
    for connection in made:
        connection.close(broken=True)
        connection._loop.close()
    for sock in held:
        sock.close()


def test_what_is_kept_is_what_is_counted(
    flow: Make,
) -> None:
    """A server that takes a little now and then doesn't make the gateway keep more than it counts."""
    loop = Loop(None)
    connection, workload, server = flow(loop)
    half = connection._halves[0]
    partly = 0
    for _ in range(400):
        for work in (lambda: workload.send(bytes(300 << 10)), lambda: server.recv(16384)):
            try:
                work()
            except BlockingIOError:
                pass
        loop.turn(0.001)
        kept = len(half.pending.obj)  # type: ignore[arg-type]
        assert loop.held_bytes == kept
        assert kept <= 2 * len(half.pending)
        partly += 0 < len(half.pending) < kept
    assert partly > 0
    connection.close(broken=True)
    assert loop.held_bytes == 0


def test_a_limited_flow_wakes_up_as_often_as_it_makes_sense(
    flow: Make,
) -> None:
    """Though the other direction, in which nothing moves, has room all the time."""
    loop = Loop(200_000)
    _, workload, server = flow(loop)
    turns = moved = 0
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        try:
            workload.send(bytes(1 << 16))
        except BlockingIOError:
            pass
        loop.turn(max(0.0, end - time.monotonic()))
        turns += 1
        try:
            moved += len(server.recv(1 << 18))
        except BlockingIOError:
            pass
    assert 0 < moved <= 300_000
    assert turns < 400, turns  # one for every 1500 bytes, and as many again


def test_a_flow_that_cannot_be_watched_is_broken_off(flow: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors of epoll are short: the workload is told, and nothing is kept."""
    loop = Loop(None)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "max_user_watches")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "want", refuse)
        connection, workload, server = flow(loop)
        assert connection.inside.fileno() < 0 and connection.outside.fileno() < 0
    for end in (workload, server):
        select.select([end], [], [], 5)
        with pytest.raises(ConnectionResetError):
            end.recv(1)


def test_an_error_of_one_is_not_the_end_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_PAUSE_S", 0)
    loop = Loop(1000)
    one, other = pair()
    called: list[str] = []

    def fails(*_: object) -> None:
        called.append("fails")
        raise OSError(errno.ENOMEM, "no memory")

    loop.watch(one, fails)
    loop.paused(0, fails)
    other.send(b"x")
    loop.turn(1)
    assert called == ["fails", "fails"]
    for sock in (one, other):
        sock.close()
    loop.close()
