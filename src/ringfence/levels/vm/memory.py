"""A guest's memory as a file: packed for the cache, and unpacked into memory that nobody can change any more.

Packed it is what isn't zero, in runs: most of a guest's memory was never touched. Unpacked it is a memfd of the guest's
whole size under the seals WRITE, GROW and SHRINK, which a QEMU can map privately and nobody, a QEMU that its guest has
taken over neither, can write to.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct

from ringfence.errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["create", "pack", "seal", "sealed", "unpack"]

_PAGE = 4096
_ZERO = bytes(_PAGE)
# A gap of zeros that is smaller isn't worth a run of its own.
_GAP = 16 * _PAGE
_RUN = struct.Struct("<QQ")
_MOST_RUNS = 1 << 20

_MFD_NOEXEC_SEAL = 8  # Linux 6.3; where vm.memfd_noexec is 2, nothing else is given
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def create(name: str, size_bytes: int) -> int:
    """A file in memory of that size, all holes. Who has a descriptor of it may open it anew, whatever its uid is."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError:
        fd = os.memfd_create(name, flags)
    try:
        # What execution takes is the owner's alone to give; reading and writing are for the id that QEMU has.
        os.fchmod(fd, 0o666)
        os.ftruncate(fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> None:
    """Nobody can change it from now on. Raises OSError where somebody has it mapped to be written to."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


def sealed(name: str, data: bytes) -> int:
    """A file in memory with that content, sealed."""
    fd = create(name, len(data))
    try:
        os.pwrite(fd, data, 0)
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def pack(fd: int, path: str, runs_path: str) -> None:
    """Writes what of the file isn't zero to `path`, and where it was to `runs_path`."""
    size = os.fstat(fd).st_size
    runs: list[tuple[int, int]] = []
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as memory, memoryview(memory) as view, open(path, "xb") as file:
        for start, end in _runs(fd, memory, size):
            # Not a copy: of runs of some 10 MB glibc would keep 18 MB for good.
            with view[start:end] as run:
                file.write(run)
            runs.append((start, end - start))
    with open(runs_path, "xb") as file:
        file.write(b"".join(_RUN.pack(*run) for run in runs))


def _runs(fd: int, memory: mmap.mmap, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what isn't zero, in whole pages."""
    start = end = -1
    for page in _pages(fd, size):
        if memory[page : page + _PAGE] == _ZERO:
            continue
        if start >= 0 and page - end > _GAP:
            yield start, end
            start = -1
        if start < 0:
            start = page
        end = page + _PAGE
    if start >= 0:
        yield start, end


def _pages(fd: int, size: int) -> Iterator[int]:
    """The pages that were ever touched."""
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        hole = os.lseek(fd, at, os.SEEK_HOLE)
        yield from range(at, hole, _PAGE)
        at = hole


def unpack(packed: int, runs: bytes, size_bytes: int) -> int:
    """A sealed file in memory of that size, with what `pack` wrote to the file `packed`.

    Raises ProtocolError where the runs make no sense.
    """
    fd = create("ringfence-memory", size_bytes)
    try:
        length = os.fstat(packed).st_size
        wanted = [_RUN.unpack_from(runs, at) for at in range(0, len(runs) - len(runs) % _RUN.size, _RUN.size)]
        fits = all(start + count <= size_bytes and start % _PAGE == 0 for start, count in wanted)
        if not wanted or len(wanted) > _MOST_RUNS or not fits or sum(count for _, count in wanted) != length:
            raise ProtocolError("the memory of a template isn't what its runs tell")
        with mmap.mmap(packed, length, prot=mmap.PROT_READ) as source, memoryview(source) as view:
            at = 0
            for start, count in wanted:
                _write(fd, view[at : at + count], start)
                at += count
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write(fd: int, data: memoryview, at: int) -> None:
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done
