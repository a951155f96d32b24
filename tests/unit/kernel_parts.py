"""Small stand-ins for kernel images and modules, of the real formats: what a test needs to damage at will."""

from __future__ import annotations

import struct

RELEASE = "6.1.0-test-amd64"


def elf_kernel(*, pvh: bool = True, size: int = 5000) -> bytes:
    """A 64-bit ELF file with one program header, a note: the PVH entry, or another kind."""
    name = b"Xen\0"
    note = struct.pack("<III", len(name), 8, 18 if pvh else 6) + name + b"\0\0\0\1\0\0\0\0"
    note = struct.pack("<III", 4, 4, 1) + b"GNU\0" + b"1234" + note
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x1000000, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    header = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    text = b"Linux version " + RELEASE.encode() + b" (somebody@example) #1 SMP\0"
    body = head + header + note + text
    # Neither all the same nor without repetition: every kind of match of a compressor.
    filler = b"".join(b"%d," % (number * number % 977) for number in range(size // 3))
    return body + filler[: max(0, size - len(body))] + bytes(700) + b"end"


def bzimage(payload: bytes, *, magic: bytes = b"HdrS", length: int | None = None, release: str = RELEASE) -> bytes:
    """A bzImage with this payload, after four setup sectors and 100 bytes of decompressor."""
    image = bytearray(512 * 5)
    image[0x1F1] = 4
    image[0x202:0x206] = magic
    struct.pack_into("<H", image, 0x206, 0x20F)
    struct.pack_into("<H", image, 0x20E, 0x300)
    text = release.encode() + b" (somebody@example) #1 SMP\0"
    image[0x500 : 0x500 + len(text)] = text
    struct.pack_into("<II", image, 0x248, 100, len(payload) if length is None else length)
    return bytes(image) + bytes(100) + payload + b"tail"


def module(info: dict[str, str], *, body: bytes = b"code", signature: bytes | None = None) -> bytes:
    """A .ko with a section .modinfo of these fields."""
    modinfo = b"".join(f"{key}={value}".encode() + b"\0" for key, value in info.items())
    names = b"\0.modinfo\0.shstrtab\0"
    start = 64
    table = start + len(modinfo) + len(names) + len(body)
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)

    def section(name: int, offset: int, length: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, length, 0, 0, 1, 0)

    data = head + modinfo + names + body + bytes(64)
    data += section(1, start, len(modinfo)) + section(10, start + len(modinfo), len(names))
    if signature is None:
        return data
    return data + signature + bytes(8) + struct.pack(">I", len(signature)) + b"~Module signature appended~\n"


# The dependencies of Debian 12's kernel.
DEPENDS = {
    "virtio_ring": "",
    "virtio": "virtio_ring",
    "virtio_mmio": "virtio,virtio_ring",
    "virtio_console": "virtio,virtio_ring",
    "virtio_blk": "virtio,virtio_ring",
    "virtio_net": "virtio,virtio_ring,net_failover",
    "net_failover": "failover",
    "failover": "",
    "9pnet": "",
    "9pnet_virtio": "virtio,9pnet,virtio_ring",
    "netfs": "",
    "fscache": "netfs",
    "9p": "9pnet,fscache,netfs",
    "crc32c_generic": "",
    "libcrc32c": "",
    "erofs": "libcrc32c",
    "overlay": "",
    "crc16": "",
    "mbcache": "",
    "jbd2": "",
    "ext4": "jbd2,mbcache,crc16",
    "xfs": "libcrc32c",
    "zstd_compress": "",
    "raid6_pq": "",
    "xor": "",
    "btrfs": "zstd_compress,raid6_pq,xor,libcrc32c",
    "squashfs": "",
    "virtio_pci_legacy_dev": "",
    "virtio_pci_modern_dev": "",
    "virtio_pci": "virtio_pci_legacy_dev,virtio_pci_modern_dev,virtio,virtio_ring",
}


def debian_modules() -> dict[str, bytes]:
    """name -> .ko, as in Debian 12, each with a signature."""
    made = {}
    for name, depends in DEPENDS.items():
        info = {"license": "GPL", "depends": depends, "name": name}
        if name == "libcrc32c":
            info["softdep"] = "pre: crc32c"
        made[name] = module(info, body=name.encode() * 20, signature=b"s" * 300)
    return made
