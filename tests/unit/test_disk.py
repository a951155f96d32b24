"""What a disk image is, by its first bytes: whatever could make QEMU open another file is refused."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from ringfence.errors import SpecError
from ringfence.images import disk
from support.disks import CLUSTER, qcow2, qcow2_header

MIB = 1 << 20
FILE_BYTES = 10 * CLUSTER


def test_a_qcow2_is_told_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "named.raw"
    path.write_bytes(qcow2(os.urandom(MIB)))
    found = disk.inspect(str(path))
    assert (found.path, found.format, found.size_bytes) == (str(path), "qcow2", MIB)
    path.write_bytes(b"\xeb\x63" + bytes(MIB - 2))
    assert disk.inspect(str(path)).format == "raw"


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions(version: int) -> None:
    assert disk.parse_header(qcow2_header(MIB, version=version), FILE_BYTES) == ("qcow2", MIB)


# A field, a value that it must not have, and what is said.
BAD = [
    ("version", 1, "version 1"),
    ("version", 4, "version 4"),
    ("backing_file_offset", 112, "backing file"),
    ("crypt_method", 1, "encrypted"),
    ("crypt_method", 2, "encrypted"),
    ("incompatible_features", 4, "external data file"),
    ("incompatible_features", 5, "external data file"),
    ("incompatible_features", 2, "corrupt"),
    ("incompatible_features", 1 << 5, "features"),
    ("incompatible_features", 1 << 63, "features"),
    ("cluster_bits", 8, "clusters of 2^8"),
    ("cluster_bits", 2**32 - 1, "clusters"),
    ("size", 0, "a disk of 0 bytes"),
    ("size", 1 << 60, "a disk of"),
    ("size", MIB + 1, "sectors of 512"),
    ("l1_size", 0, "level 1"),
    ("l1_size", 2**32 - 1, "level 1"),
    ("l1_table_offset", 0, "outside"),
    ("l1_table_offset", 3 * CLUSTER + 8, "outside"),
    ("l1_table_offset", 1 << 62, "outside"),
    ("refcount_table_offset", FILE_BYTES, "outside"),
    ("header_length", 0, "damaged"),
    ("header_length", 107, "damaged"),
    ("refcount_order", 7, "damaged"),
]


@pytest.mark.parametrize(("field", "value", "said"), BAD, ids=[f"{field}={value}" for field, value, _ in BAD])
def test_a_header_that_is_refused(field: str, value: int, said: str) -> None:
    disk.parse_header(qcow2_header(MIB), FILE_BYTES)
    with pytest.raises(ValueError, match=said.replace("^", r"\^")):
        disk.parse_header(qcow2_header(MIB, **{field: value}), FILE_BYTES)


def test_a_table_beyond_the_end_is_a_truncated_image() -> None:
    header = qcow2_header(MIB)
    with pytest.raises(ValueError, match="truncated"):
        disk.parse_header(header, 3 * CLUSTER + 4)
    for length in range(4, len(header)):
        with pytest.raises(ValueError, match="truncated"):
            disk.parse_header(header[:length], FILE_BYTES)


@pytest.mark.parametrize(("magic", "at"), [(b"KDMV", 0), (b"vhdxfile", 0), (b"\x7f\x10\xda\xbe", 64), (b"\x1f\x8b", 0)])
def test_other_formats_are_not_taken_for_raw(magic: bytes, at: int) -> None:
    with pytest.raises(ValueError, match="convert it"):
        disk.parse_header(bytes(at) + magic + bytes(4096), 1 << 30)


def test_any_header_is_an_image_without_another_file_or_refused() -> None:
    """Random changes of a real header, and random bytes: a value within bounds, or ValueError, never another one."""
    known = random.Random(7)
    accepted = 0
    for _ in range(20_000):
        header = bytearray(qcow2_header(MIB).ljust(4096, b"\0"))
        for _ in range(known.randrange(1, 4)):
            header[known.randrange(112)] = known.randrange(256)
        if known.random() < 0.1:
            header = bytearray(known.randbytes(known.randrange(200)))
        try:
            format, size = disk.parse_header(bytes(header), FILE_BYTES)
        except ValueError:
            continue
        accepted += 1
        assert 0 < size <= disk.MAX_BYTES
        if format == "qcow2":
            assert header[8:16] == bytes(8)  # no backing file
            assert header[4:8] == b"\0\0\0\2" or not header[79] & 4  # no external data file
    assert 100 < accepted < 19_000


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in ((tmp_path / "pipe", "no regular file"), (tmp_path / "none", "can't be read")):
        with pytest.raises(SpecError, match=said):
            disk.inspect(str(path))
    (tmp_path / "small").write_bytes(b"x")
    with pytest.raises(SpecError, match="no disk"):
        disk.inspect(str(tmp_path / "small"))
