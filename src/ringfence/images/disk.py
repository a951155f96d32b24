"""A disk image given by its user: what format it has, by its content and never by its name, and that it is no more
than one file.

Only the header is read here, within bounds. What is on the disk, partitions and file systems, is for the guest's kernel
alone to read. Source: QEMU, docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import stat
import struct

from ringfence._value import Value
from ringfence.errors import SpecError
from ringfence.images.held import open_real

__all__ = ["DiskImage", "inspect", "parse_header"]

_HEADER_BYTES = 4096
# Far more than a root file system is, and nothing that a 64-bit sector number or QEMU's tables can't hold.
MAX_BYTES = 8 << 40
_SECTOR = 512
# One table for each 512 MiB with clusters of 64 KiB; QEMU keeps it in memory, and itself takes up to 32 MiB.
_MOST_L1_BYTES = 8 << 20

_QCOW = b"QFI\xfb"
# What else QEMU reads, and a guest doesn't. (offset, magic, name)
_OTHERS = (
    (0, b"KDMV", "a VMDK"),
    (0, b"COWD", "a VMDK"),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor"),
    (0, b"conectix", "a VHD"),
    (0, b"vhdxfile", "a VHDX"),
    (0, b"QED\0", "a QED"),
    (0, b"WithoutFreeSpace", "a Parallels"),
    (0, b"WithouFreSpacExt", "a Parallels"),
    (64, b"\x7f\x10\xda\xbe", "a VDI"),
    (0, b"\x1f\x8b", "a gzip-compressed"),
    (0, b"\xfd7zXZ\0", "an xz-compressed"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd-compressed"),
    (0, b"PK\3\4", "a zip-compressed"),
)

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
# Incompatible features (docs/interop/qcow2.txt): bits 0 dirty, 1 corrupt, 2 external data file, 3 compression type,
# 4 extended L2 entries.
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = 1, 2, 4, 8, 16


class DiskImage(Value):
    """A disk image. format: "raw" or "qcow2". size_bytes: of the disk that it holds. identity: (st_dev, st_ino) of the
    file that was read.
    """

    __slots__ = ("format", "identity", "path", "size_bytes")
    path: str
    format: str
    size_bytes: int
    identity: tuple[int, int]

    def __init__(self, *, path: str, format: str, size_bytes: int, identity: tuple[int, int]) -> None:
        self._set(path=path, format=format, size_bytes=size_bytes, identity=identity)


def inspect(path: str) -> DiskImage:
    """path: a real one. Raises SpecError where it is no disk image that a guest can have, or can't be read."""
    header = b""
    try:
        # Not opened before it is known to be a file: to open a device or a FIFO may do something, or never end.
        held = open_real(path)
        try:
            about = os.fstat(held)
            if stat.S_ISREG(about.st_mode):
                fd = os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    header = os.pread(fd, _HEADER_BYTES, 0)
                finally:
                    os.close(fd)
        finally:
            os.close(held)
    except OSError as error:
        raise SpecError(f"image: {path!r} can't be read ({error.strerror})") from None
    if not stat.S_ISREG(about.st_mode):
        raise SpecError(f"image: {path!r} is no regular file")
    try:
        format, size = parse_header(header, about.st_size)
    except ValueError as error:
        raise SpecError(f"image: {path!r} {error}") from None
    return DiskImage(path=path, format=format, size_bytes=size, identity=(about.st_dev, about.st_ino))


def parse_header(header: bytes, file_bytes: int) -> tuple[str, int]:
    """(format, size of the disk in bytes), from a file's first 4096 bytes and its size. Raises ValueError with what is
    wrong, as the end of a sentence.
    """
    if header.startswith(_QCOW):
        return "qcow2", _qcow2(header, file_bytes)
    for at, magic, name in _OTHERS:
        if header[at : at + len(magic)] == magic:
            raise ValueError(f"is {name} image: convert it, as by 'qemu-img convert -O qcow2'")
    if file_bytes < _SECTOR:
        raise ValueError(f"has {file_bytes} bytes: that is no disk")
    if file_bytes > MAX_BYTES:
        raise ValueError(f"is larger than {MAX_BYTES >> 40} TiB")
    return "raw", file_bytes


def _qcow2(header: bytes, file_bytes: int) -> int:
    """The disk's size. Whatever lets QEMU open another file is refused, and so is what it can't have been made with."""
    if len(header) < _V2.size:
        raise ValueError("is a truncated qcow2 image")
    _, version, backing, _, cluster_bits, size, crypt, l1_size, l1_at, refcount_at, _, _, _ = _V2.unpack_from(header)
    if version not in (2, 3):
        raise ValueError(f"is a qcow2 image of version {version}: 2 and 3 are known")
    if backing:
        raise ValueError("has a backing file, which would be opened too: merge them by 'qemu-img convert -O qcow2'")
    if crypt:
        raise ValueError("is encrypted")
    if version == 3:
        _features(header)
    if not 9 <= cluster_bits <= 21:
        raise ValueError(f"is a damaged qcow2 image: clusters of 2^{cluster_bits} bytes")
    if not 0 < size <= MAX_BYTES or size % _SECTOR:
        raise ValueError(f"holds a disk of {size} bytes: up to {MAX_BYTES >> 40} TiB in sectors of 512 can be")
    # An L2 table is one cluster of 8-byte entries; of extended ones it takes twice as many tables.
    covered = 1 << (2 * cluster_bits - 3)
    needed = -(-size // covered)
    if not needed <= l1_size or l1_size * 8 > _MOST_L1_BYTES:
        raise ValueError(f"is a damaged qcow2 image: {l1_size} level 1 entries for {size} bytes")
    for at in (l1_at, refcount_at):
        if at == 0 or at % (1 << cluster_bits) or at >= file_bytes:
            raise ValueError("is a damaged or truncated qcow2 image: a table lies outside the file")
    if l1_at + l1_size * 8 > file_bytes:
        raise ValueError("is a truncated qcow2 image")
    return int(size)


def _features(header: bytes) -> None:
    if len(header) < _V2.size + _V3.size:
        raise ValueError("is a truncated qcow2 image")
    incompatible, _, _, refcount_order, length = _V3.unpack_from(header, _V2.size)
    if incompatible & _DATA_FILE:
        raise ValueError("has an external data file, which would be opened too: convert it, as by 'qemu-img convert'")
    if incompatible & _CORRUPT:
        raise ValueError("is marked as corrupt: see 'qemu-img check'")
    if incompatible & ~(_DIRTY | _COMPRESSION | _EXTENDED_L2):
        raise ValueError(f"needs features of qcow2 that aren't known here: {incompatible:#x}")
    if refcount_order > 6 or length < _V2.size + _V3.size or length % 8:
        raise ValueError("is a damaged qcow2 image")
