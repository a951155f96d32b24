"""Linux kernel images: the uncompressed kernel out of a bzImage, its release, how it can be started.

Sources: Documentation/arch/x86/boot.rst (the header's fields), the PVH boot ABI (Xen's docs/misc/pvh.pandoc).
"""

from __future__ import annotations

import struct

from ringfence.errors import Unavailable

# Fields of the x86 boot protocol's header, as offsets into the bzImage.
_SETUP_SECTORS = 0x1F1
_MAGIC = 0x202
_PROTOCOL = 0x206
_VERSION_POINTER = 0x20E
_PAYLOAD = 0x248
_SECTOR = 512

_ELF = b"\x7fELF"
_PT_NOTE = 4
_XEN_PHYS32_ENTRY = 18

# No kernel comes near; a header that says more is damaged.
MAX_KERNEL_BYTES = 512 << 20


def vmlinux(image: bytes) -> bytes:
    """The uncompressed ELF kernel in a bzImage; an image that is one already is given back as it is.

    Uncompressed, QEMU starts it by its PVH entry and no decompressor runs in the guest: under emulation that
    saves a third of a boot. Raises Unavailable where it's not a kernel, or can't be started that way.
    """
    kernel = image if image.startswith(_ELF) else _decompress(_payload(image))
    if not kernel.startswith(_ELF):
        raise Unavailable("vm", "the kernel image holds no ELF kernel", "use Debian's linux-image-amd64")
    if not _has_pvh_entry(kernel):
        raise Unavailable("vm", "the kernel can't be started by PVH", "use one built with CONFIG_PVH=y")
    return kernel


def release(image: bytes) -> str:
    """The release, as `uname -r` prints it, of a bzImage or an uncompressed kernel ("6.1.0-56-amd64")."""
    if image.startswith(_ELF):
        at = image.find(b"Linux version ")
        text = image[at + 14 : at + 14 + 128] if at >= 0 else b""
    else:
        _check_header(image)
        pointer = struct.unpack_from("<H", image, _VERSION_POINTER)[0]
        text = image[pointer + _SECTOR : pointer + _SECTOR + 128]
    words = text.split(b"\0")[0].split()
    if not words:
        raise Unavailable("vm", "the kernel image doesn't say which release it is")
    return words[0].decode("ascii", "replace")


def _check_header(image: bytes) -> None:
    if len(image) < 0x260 or image[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise Unavailable("vm", "the file is neither an x86 bzImage nor an ELF kernel")
    # payload_offset and payload_length came with protocol 2.08, Linux 2.6.24.
    if struct.unpack_from("<H", image, _PROTOCOL)[0] < 0x208:
        raise Unavailable("vm", "the kernel's boot protocol is older than 2.08")


def _payload(image: bytes) -> bytes:
    _check_header(image)
    start = ((image[_SETUP_SECTORS] or 4) + 1) * _SECTOR
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    payload = image[start + offset : start + offset + length]
    if length == 0 or len(payload) != length:
        raise Unavailable("vm", "the kernel image is cut short")
    return payload


def _decompress(payload: bytes) -> bytes:
    """What the kernel's own decompressor would make of it. The last four bytes are the size, which no format
    here takes for its own data: each decoder stops at its end mark.
    """
    import bz2
    import lzma
    import zlib

    try:
        if payload.startswith(b"\xfd7zXZ\0"):
            return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload, MAX_KERNEL_BYTES)
        if payload.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(31).decompress(payload, MAX_KERNEL_BYTES)
        if payload.startswith(b"\x02\x21\x4c\x18"):
            return _lz4_legacy(payload)
        if payload.startswith(b"\x28\xb5\x2f\xfd"):
            return unzstd(payload)
        if payload.startswith(b"BZh"):
            return bz2.BZ2Decompressor().decompress(payload, MAX_KERNEL_BYTES)
        if payload.startswith(b"\x5d\0\0"):
            return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(payload, MAX_KERNEL_BYTES)
    except (lzma.LZMAError, zlib.error, OSError, EOFError, IndexError) as error:
        raise Unavailable("vm", f"the kernel image is damaged: {error}") from error
    raise Unavailable(
        "vm",
        f"the kernel's compression is unknown (it begins with {payload[:4].hex()})",
        "use a kernel compressed by gzip, xz, lz4, zstd, bzip2 or lzma, or an uncompressed vmlinux",
    )


def unzstd(data: bytes, most_bytes: int = MAX_KERNEL_BYTES) -> bytes:
    """Decompress zstd: by the standard library (Python 3.14), the zstandard package, or the zstd command.

    What becomes more than so much is cut off there.
    """
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]

        return bytes(zstd.ZstdDecompressor().decompress(data, most_bytes))
    except ImportError:
        pass
    try:
        import io

        import zstandard  # type: ignore[import-not-found, unused-ignore]

        return bytes(zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read(most_bytes))
    except ImportError:
        pass
    return _by_the_zstd_command(data, most_bytes)


def _by_the_zstd_command(data: bytes, most_bytes: int) -> bytes:
    import subprocess
    import tempfile

    try:
        with tempfile.TemporaryFile() as source:
            source.write(data)
            source.seek(0)
            # zstd complains about the four bytes of size after the frame, and exits with 1, but has written all of it.
            # Who writes more than is read here ends by SIGPIPE.
            with subprocess.Popen(
                ["zstd", "-dcq"], stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as run:
                assert run.stdout is not None
                found = run.stdout.read(most_bytes)
    except FileNotFoundError:
        raise Unavailable(
            "vm",
            "the kernel is compressed by zstd and nothing here can undo that",
            "install the zstd command (Debian: apt-get install zstd) or the Python package zstandard",
        ) from None
    if not found:
        raise Unavailable("vm", "zstd can't read the kernel, or a module of it")
    return found


def _lz4_legacy(payload: bytes) -> bytes:
    """The lz4 legacy frame, which the kernel uses: a magic number, then blocks, each after its length."""
    out = bytearray()
    at = 4
    while at + 4 <= len(payload):
        length = int.from_bytes(payload[at : at + 4], "little")
        at += 4
        if at + length > len(payload):
            break  # The size of the kernel, which is no block.
        _lz4_block(payload[at : at + length], out)
        at += length
    return bytes(out)


def _lz4_block(block: bytes, whole: bytearray) -> None:
    """Append one block (doc/lz4_Block_format.md): sequences of literals and a match further back."""
    out = bytearray()
    at = 0
    while at < len(block):
        token = block[at]
        count, at = _lz4_length(block, at + 1, token >> 4)
        out += block[at : at + count]
        at += count
        if at >= len(block):
            break  # The last sequence has literals only.
        back = block[at] | block[at + 1] << 8
        count, at = _lz4_length(block, at + 2, token & 15)
        count += 4
        start = len(out) - back
        if back == 0 or start < 0 or len(out) + count > MAX_KERNEL_BYTES:
            raise EOFError("an lz4 match lies outside the block")
        if back >= count:
            out += out[start : start + count]
        else:
            out += (out[start:] * (count // back + 1))[:count]
    whole += out


def _lz4_length(block: bytes, at: int, nibble: int) -> tuple[int, int]:
    if nibble == 15:
        while True:
            more = block[at]
            at += 1
            nibble += more
            if more != 255:
                break
    return nibble, at


def _has_pvh_entry(kernel: bytes) -> bool:
    """Whether a 64-bit ELF kernel has the note that names its 32-bit PVH entry."""
    if len(kernel) < 64 or kernel[4] != 2:
        return False
    headers = struct.unpack_from("<Q", kernel, 32)[0]
    size, count = struct.unpack_from("<HH", kernel, 54)
    for index in range(count):
        at = headers + index * size
        if at + 56 > len(kernel):
            return False
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", kernel, at)
        if kind == _PT_NOTE and _note(kernel[offset : offset + length]):
            return True
    return False


def _note(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name, data, kind = struct.unpack_from("<III", notes, at)
        if kind == _XEN_PHYS32_ENTRY and notes[at + 12 : at + 12 + name] == b"Xen\0":
            return True
        at += 12 + (name + 3 & ~3) + (data + 3 & ~3)
    return False
