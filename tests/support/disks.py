"""Disk images for tests, made without root and without qemu-img."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS


def ext4(folder: Path, at: Path, size: str = "16M", *options: str) -> bytes:
    """A file system with the folder's content."""
    subprocess.run(["truncate", "-s", size, at], check=True)
    subprocess.run(["mkfs.ext4", "-q", *options, "-d", folder, at], check=True, timeout=60)
    return at.read_bytes()


def qcow2_header(disk_bytes: int, **changes: int) -> bytes:
    """Of version 3, as `qcow2` lays it out. changes: of the fields of docs/interop/qcow2.txt, by name."""
    fields = {
        "magic": 0x514649FB,
        "version": 3,
        "backing_file_offset": 0,
        "backing_file_size": 0,
        "cluster_bits": CLUSTER_BITS,
        "size": disk_bytes,
        "crypt_method": 0,
        "l1_size": -(-disk_bytes // (CLUSTER * CLUSTER // 8)),
        "l1_table_offset": 3 * CLUSTER,
        "refcount_table_offset": CLUSTER,
        "refcount_table_clusters": 1,
        "nb_snapshots": 0,
        "snapshots_offset": 0,
        "incompatible_features": 0,
        "compatible_features": 0,
        "autoclear_features": 0,
        "refcount_order": 4,
        "header_length": 104,
    }
    assert changes.keys() <= fields.keys()
    return struct.pack(">IIQIIQIIQQIIQQQQII", *{**fields, **changes}.values())


def qcow2(raw: bytes) -> bytes:
    """The same disk as a qcow2 image, without what is zero; for reading only, as nothing is counted in it."""
    clusters = [raw[at : at + CLUSTER] for at in range(0, len(raw), CLUSTER)]
    per_table = CLUSTER // 8
    tables = [clusters[at : at + per_table] for at in range(0, len(clusters), per_table)]
    first_table = 4
    used = 1 << 63
    data = b""
    next_cluster = first_table + len(tables)
    level2 = b""
    for table in tables:
        entries = []
        for cluster in table:
            empty = not cluster.strip(b"\0")
            entries.append(0 if empty else next_cluster * CLUSTER | used)
            next_cluster += not empty
            data += b"" if empty else cluster.ljust(CLUSTER, b"\0")
        level2 += struct.pack(f">{len(entries)}Q", *entries).ljust(CLUSTER, b"\0")
    level1 = struct.pack(f">{len(tables)}Q", *((first_table + n) * CLUSTER | used for n in range(len(tables))))
    counts = struct.pack(">Q", 2 * CLUSTER)
    parts = (qcow2_header(len(raw)), counts, b"", level1)
    return b"".join(part.ljust(CLUSTER, b"\0") for part in parts) + level2 + data


def partitioned(*partitions: bytes) -> bytes:
    """A disk with an MBR and these, of 512-byte sectors, up to four; each begins at a MiB."""
    table = b""
    disk = bytearray(1 << 20)
    for one in partitions:
        start, sectors = len(disk) // 512, len(one) // 512
        table += struct.pack("<B3sB3sII", 0, b"\0\2\0", 0x83, b"\xff\xff\xff", start, sectors)
        disk += one.ljust(-(-len(one) // (1 << 20)) << 20, b"\0")
    disk[446 : 446 + len(table)] = table
    disk[510:512] = b"\x55\xaa"
    return bytes(disk)
