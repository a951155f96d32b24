"""A guest's memory packed and unpacked, and sealed so that nobody changes it."""

from __future__ import annotations

import mmap
import os
import random
import struct
from pathlib import Path

import pytest

from ringfence.errors import ProtocolError
from ringfence.levels.vm import memory

SIZE = 8 << 20


def content(fd: int) -> bytes:
    return os.pread(fd, SIZE * 2, 0)


def packed(folder: Path, data: dict[int, bytes]) -> tuple[int, bytes]:
    """(the packed file, its runs) of a memory with that in it."""
    fd = memory.create("test", SIZE)
    for at, piece in data.items():
        os.pwrite(fd, piece, at)
    memory.pack(fd, str(folder / "memory"), str(folder / "runs"))
    os.close(fd)
    return os.open(folder / "memory", os.O_RDONLY), (folder / "runs").read_bytes()


def test_what_was_packed_comes_back(tmp_path: Path) -> None:
    rng = random.Random(7)
    data = {0: b"\1", SIZE - 1: b"\2", 3 << 20: bytes(65536), 5 << 20: rng.randbytes(100_000), 1 << 20: b"x"}
    fd, runs = packed(tmp_path, data)
    wanted = bytearray(SIZE)
    for at, piece in data.items():
        wanted[at : at + len(piece)] = piece
    found = memory.unpack(fd, runs, SIZE)
    assert content(found) == bytes(wanted)
    # Zeros that were written are left out, holes or not.
    assert (tmp_path / "memory").stat().st_size < 200_000
    os.close(fd)
    os.close(found)


def test_nobody_changes_what_was_unpacked(tmp_path: Path) -> None:
    fd, runs = packed(tmp_path, {0: b"x"})
    found = memory.unpack(fd, runs, SIZE)
    os.close(fd)
    again = os.open(f"/proc/self/fd/{found}", os.O_RDWR)
    for change in (
        lambda: os.pwrite(again, b"y", 0),
        lambda: os.ftruncate(again, SIZE * 2),
        lambda: os.ftruncate(again, 0),
        lambda: mmap.mmap(again, 4096, flags=mmap.MAP_SHARED),
        lambda: memory.seal(again),
    ):
        with pytest.raises(PermissionError):
            change()
    with mmap.mmap(again, 4096, flags=mmap.MAP_PRIVATE) as private:
        private[0] = 7
    assert content(found)[:1] == b"x"
    os.close(again)
    os.close(found)


def test_the_control_can_be_changed() -> None:
    fd = memory.create("test", SIZE)
    os.pwrite(fd, b"y", 0)
    with mmap.mmap(fd, 4096, flags=mmap.MAP_SHARED) as shared:
        shared[0] = 8
        with pytest.raises(OSError, match="busy"):
            memory.seal(fd)
    memory.seal(fd)
    os.close(fd)


@pytest.mark.parametrize(
    "runs",
    [
        b"",
        b"short",
        struct.pack("<QQ", 0, 8192),  # more than the file has
        struct.pack("<QQ", SIZE, 4096),  # past the end
        struct.pack("<QQ", 2**63, 4096),
        struct.pack("<QQ", 1, 4096),  # not a page's start
        struct.pack("<QQQQ", 0, 4096, 4096, 4096),
    ],
)
def test_runs_that_make_no_sense(runs: bytes, tmp_path: Path) -> None:
    fd, good = packed(tmp_path, {0: b"x"})
    with pytest.raises(ProtocolError, match="runs"):
        memory.unpack(fd, runs, SIZE)
    os.close(memory.unpack(fd, good, SIZE))  # the control
    os.close(fd)
