"""A program in QEMU's place, in QEMU's own jail: what a guest and its VMM may do to the host, played on demand.

A real guest is too well behaved to be told to lie about a length; beside this stand tests with real ones.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

# What a part is written in: send, receive, until, boot, start, and the types of frames.
PRELUDE = '''#!/usr/bin/python3 -IS
import os, signal, socket, struct, sys, time

VERSION, MACHINES = "@VERSION@", "@MACHINES@"
if "--version" in sys.argv:
    print("QEMU emulator version " + VERSION + " (not the real one)")
    sys.exit()
if sys.argv[-2:] == ["-machine", "help"]:
    print("Supported machines are:")
    for one in MACHINES.split():
        print(one + "   a machine")
    sys.exit()

PLAN, EXEC, STDIN, KILL, LIST, READ, PING = 16, 17, 18, 20, 23, 24, 29
READY, STARTED, ERROR, STDOUT, STDERR, EXITED, CREDIT, ENTRIES, DONE = 33, 34, 35, 36, 37, 38, 39, 40, 41
DATA, LISTENER, SIZES, LAYER_END, PONG = 22, 42, 43, 44, 48
channel = socket.socket(fileno=3)
held = b""

def header(type, length, id=0, magic=0x4652, version=1, nfds=0, zero=0):
    return struct.pack("<HBBIIHH", magic, version, type, length, id, nfds, zero)

def frame(type, payload=b"", id=0):
    return header(type, len(payload), id) + payload

def send(type, payload=b"", id=0):
    channel.sendall(frame(type, payload, id))

def attribute(tag, data):
    return struct.pack("<HHI", tag, 0, len(data)) + data

def receive():
    """(type, id, payload) of the next frame."""
    global held
    while len(held) < 16 or len(held) < 16 + struct.unpack_from("<I", held, 4)[0]:
        more = channel.recv(1 << 16)
        if not more:
            sys.exit("the caller has closed the channel")
        held += more
    _, _, type, length, id, _, _ = struct.unpack_from("<HBBIIHH", held)
    payload, held = held[16 : 16 + length], held[16 + length :]
    return type, id, payload

def until(type):
    """The id and the payload of the next frame of that type."""
    while True:
        found, id, payload = receive()
        if found == type:
            return id, payload

def boot():
    send(READY)
    until(PLAN)
    send(READY, b"".join(attribute(tag, struct.pack("<Q", 1 << 20)) for tag in (1, 2, 3)))

def start():
    """The command's id, once it was reported as started."""
    boot()
    id, _ = until(EXEC)
    send(STARTED, attribute(1, struct.pack("<I", 5)), id)
    return id

def exited(id, status=0):
    send(EXITED, attribute(1, struct.pack("<I", 1)) + attribute(2, struct.pack("<I", status)), id)

def hang():
    while True:
        time.sleep(60)

'''

_numbers = itertools.count()


class FakeQemu:
    """Puts a program that plays a part in QEMU's place, for this test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch

    def __call__(self, part: str, *, version: str = "7.2.0", machines: str = "microvm q35 pc") -> Path:
        path = self._folder / f"qemu-{next(_numbers)}"
        path.write_text(PRELUDE.replace("@VERSION@", version).replace("@MACHINES@", machines) + part)
        path.chmod(0o755)
        self._monkeypatch.setenv("RINGFENCE_QEMU", str(path))
        return path
