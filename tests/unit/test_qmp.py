"""The QMP client, with a socket in QEMU's place: what it asks, what it takes, what it doesn't let a hostile one do."""

from __future__ import annotations

import array
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ringfence.errors import ProtocolError
from ringfence.levels.vm.qmp import Qmp, restore

HELLO = b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}\r\n'
RESUME = b'{"timestamp": {"seconds": 1700000000, "microseconds": 250}, "event": "RESUME"}\r\n'


def soon() -> int:
    return time.monotonic_ns() + 5_000_000_000


@pytest.fixture
def both() -> Iterator[tuple[Qmp, socket.socket]]:
    ours, theirs = socket.socketpair()
    client = Qmp(ours, dict)
    yield client, theirs
    client.close()
    theirs.close()


def test_all_that_a_restore_takes_is_said_at_once() -> None:
    decoder, text, asked = json.JSONDecoder(), restore(6).decode(), []
    while text:
        one, end = decoder.raw_decode(text)
        asked.append(one)
        text = text[end:]
    assert [one["execute"] for one in asked] == ["qmp_capabilities", "migrate-set-capabilities", "migrate-incoming"]
    assert asked[1]["arguments"]["capabilities"] == [{"capability": "x-ignore-shared", "state": True}]
    assert asked[2]["arguments"] == {"uri": "fd:6"}


def test_an_event_is_found_among_answers_and_others(both: tuple[Qmp, socket.socket]) -> None:
    client, qemu = both
    other = b'{"timestamp": {"seconds": 1, "microseconds": 0}, "event": "STOP"}\r\n'
    qemu.sendall(HELLO + b'{"return": {}}\r\n' * 3 + other + RESUME[:40])
    threading.Timer(0.05, qemu.sendall, (RESUME[40:],)).start()
    assert client.event("RESUME", soon()) == 1_700_000_000_000_250_000
    assert client.event("STOP", soon()) == 1_000_000_000  # kept until somebody asks


def test_a_command_and_a_descriptor(both: tuple[Qmp, socket.socket]) -> None:
    client, qemu = both
    qemu.sendall(HELLO + RESUME + b'{"return": {"status": "completed"}}\r\n')
    with open("/dev/null", "rb") as null:
        assert client.execute("query-x", soon(), (null.fileno(),), some_name="y") == {"status": "completed"}
    data, control, _, _ = qemu.recvmsg(4096, socket.CMSG_SPACE(4))
    assert json.loads(data) == {"execute": "query-x", "arguments": {"some-name": "y"}}
    (fd,) = array.array("i", control[0][2])
    socket.close(fd)


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (b'{"error": {"class": "GenericError", "desc": "no \\u001b such thing"}}\r\n', r"refuses: no \? such thing"),
        (b'{"error": 7}\r\n', "refuses: for no reason"),
        (b"not json\r\n", "no JSON"),
        (b"[" * 60_000 + b"\r\n", "no JSON"),
        (b"[1, 2]\r\n", "no QMP"),
        (b'{"event": "RESUME"}\r\n', "without its time"),
        (b'{"event": "RESUME", "timestamp": {"seconds": -1, "microseconds": 0}}\r\n', "without its time"),
        (b'{"event": "RESUME", "timestamp": {"seconds": 1e300, "microseconds": true}}\r\n', "without its time"),
    ],
)
def test_what_makes_no_sense_is_an_error(both: tuple[Qmp, socket.socket], says: bytes, why: str) -> None:
    client, qemu = both
    qemu.sendall(HELLO)
    qemu.sendall(says)
    with pytest.raises(ProtocolError, match=why):
        client.event("RESUME", soon())


@pytest.mark.parametrize("line", [b"x" * 1000, b'{"return": {}}\r\n' * 60, b'{"event": "X"}\r\n' * 60])
def test_a_flood_is_bounded(both: tuple[Qmp, socket.socket], line: bytes) -> None:
    client, qemu = both

    def flood() -> None:
        try:
            while True:
                qemu.sendall(line)
        except OSError:
            return

    thread = threading.Thread(target=flood)
    thread.start()
    with pytest.raises(ProtocolError, match="more than it may"):
        client.event("RESUME", soon())
    client.close()
    thread.join(10)


def test_silence_and_an_end_are_told(both: tuple[Qmp, socket.socket]) -> None:
    client, qemu = both
    began = time.monotonic()
    with pytest.raises(ProtocolError, match="in time"):
        client.event("RESUME", time.monotonic_ns() + 50_000_000)
    assert time.monotonic() - began < 2
    qemu.close()
    with pytest.raises(ProtocolError, match="control socket"):
        client.event("RESUME", time.monotonic_ns() + 200_000_000)


def test_who_ended_qemu_tells_more_than_its_closed_socket() -> None:
    ours, theirs = socket.socketpair()
    watched, other = socket.socketpair()

    def ended() -> None:
        raise ProtocolError("QEMU ended: its last words")

    watch: dict[int, Callable[[], Any]] = {watched.fileno(): ended}
    client = Qmp(ours, lambda: watch)
    theirs.close()
    other.close()
    with pytest.raises(ProtocolError, match="last words"):
        client.event("RESUME", soon())
    client.close()
    watched.close()
