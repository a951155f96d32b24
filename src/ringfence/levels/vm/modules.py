"""Kernel modules: which ones a guest needs, what each of them requires, in which order they load.

Each module says in its ELF section .modinfo what it depends on, so no modules.dep is needed: depmod(8) writes
that one when a kernel is installed, and ours is only unpacked.
"""

from __future__ import annotations

import os
import struct

from ringfence.errors import Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

# set -> modules. "boot" is what the channel needs, and what every guest loads; the others load when asked
# for, as each module costs 5 to 20 ms under emulation.
SETS: dict[str, tuple[str, ...]] = {
    "boot": ("virtio_mmio", "virtio_console"),
    "9p": ("9pnet_virtio", "9p"),
    "erofs": ("virtio_blk", "erofs"),
    "overlay": ("overlay",),
    "pci": ("virtio_pci",),
    "net": ("virtio_net",),
    "ext4": ("ext4",),
    "xfs": ("xfs",),
    "btrfs": ("btrfs",),
    "squashfs": ("squashfs",),
}

# What only a disk of the user's own takes: larger than all others together, so in an initramfs of its own. A kernel
# may lack any of them. erofs is among the others, as our own disks are made of it.
FILE_SYSTEMS = ("ext4", "xfs", "btrfs", "squashfs")
# Those of them that are loaded before a template is made, where one is asked for such a disk: to load ext4 or xfs takes
# a restored guest a second under emulation. btrfs measures its checksums as it loads, and is rare.
LOADED_AHEAD = ("ext4", "xfs", "squashfs")
REQUIRED = tuple(name for name in SETS if name not in FILE_SYSTEMS)

# Soft dependencies name crypto algorithms, not modules; modules.alias, which depmod writes, would tell. The
# generic implementations run on every CPU.
_ALGORITHMS = {
    "crc32c": "crc32c_generic",
    "crc32": "crc32_generic",
    "xxhash64": "xxhash_generic",
    "sha256": "sha256_generic",
    "blake2b-256": "blake2b_generic",
}

# The largest of a distribution's, with all that is there to debug it, have some 100 MB.
MAX_MODULE_BYTES = 256 << 20

_SIGNATURE_MARK = b"~Module signature appended~\n"
_SIGNATURE_HEADER = 12


def canonical(name: str) -> str:
    """A module's name: "virtio-rng.ko.xz" and "virtio_rng" are the same one."""
    return os.path.basename(name).split(".ko")[0].replace("-", "_")


def plain(name: str, data: bytes) -> bytes:
    """A module file's ELF: decompressed by its suffix (.ko.xz, .ko.gz, .ko.zst), and without its signature.

    The signature goes because our kernels don't demand one, and a boot has less to read. Raises Unavailable where it
    is damaged, or has more than MAX_MODULE_BYTES.
    """
    import lzma
    import zlib

    try:
        if name.endswith(".xz"):
            data = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data, MAX_MODULE_BYTES + 1)
        elif name.endswith(".gz"):
            data = zlib.decompressobj(31).decompress(data, MAX_MODULE_BYTES + 1)
        elif name.endswith(".zst"):
            from ringfence.levels.vm.bzimage import unzstd

            data = unzstd(data, MAX_MODULE_BYTES + 1)
    except (lzma.LZMAError, zlib.error, EOFError) as error:
        raise Unavailable("vm", f"the kernel module {name} is damaged: {error}") from error
    if len(data) > MAX_MODULE_BYTES:
        raise Unavailable("vm", f"the kernel module {name} has more than {MAX_MODULE_BYTES >> 20} MiB")
    return _unsigned(data)


def _unsigned(data: bytes) -> bytes:
    """What scripts/sign-file appends: the signature, struct module_signature, whose last field is the
    signature's length (big endian), and a mark.
    """
    if not data.endswith(_SIGNATURE_MARK):
        return data
    end = len(data) - len(_SIGNATURE_MARK) - _SIGNATURE_HEADER
    length = struct.unpack_from(">I", data, end + 8)[0]
    return data[: end - length] if length <= end else data


def requires(module: bytes) -> tuple[str, ...]:
    """The modules that have to be loaded before this one (an ELF .ko), soft dependencies first."""
    info = _modinfo(module)
    before: list[str] = []
    for line in info.get("softdep", []):
        # "pre: crc32c post: other" (modprobe.d(5)): what follows pre: comes first.
        words, pre = line.split(), False
        for word in words:
            if word.endswith(":"):
                pre = word == "pre:"
            elif pre:
                before.append(_ALGORITHMS.get(word.removeprefix("crypto-"), word))
    for line in info.get("depends", []):
        before += [name for name in line.split(",") if name]
    return tuple(canonical(name) for name in before)


def _modinfo(module: bytes) -> dict[str, list[str]]:
    """key -> values of the section .modinfo, which holds "key=value" strings that each end with a NUL."""
    info: dict[str, list[str]] = {}
    for entry in _section(module, b".modinfo").split(b"\0"):
        key, equals, value = entry.decode("utf-8", "replace").partition("=")
        if equals:
            info.setdefault(key, []).append(value)
    return info


def _section(elf: bytes, wanted: bytes) -> bytes:
    """A section of a 64-bit ELF file, by name. Raises Unavailable where the file is none or damaged."""
    try:
        if elf[:6] != b"\x7fELF\x02\x01":
            raise ValueError("no 64-bit ELF file")
        table = struct.unpack_from("<Q", elf, 40)[0]
        size, count, names_at = struct.unpack_from("<HHH", elf, 58)
        headers = [struct.unpack_from("<IIQQQQ", elf, table + index * size) for index in range(count)]
        names = headers[names_at][4]
        for name, _, _, _, offset, length in headers:
            start = names + name
            if elf[start : start + len(wanted) + 1] == wanted + b"\0":
                return elf[offset : offset + length]
    except (ValueError, IndexError, struct.error) as error:
        raise Unavailable("vm", f"a kernel module is damaged: {error}", "run 'ringfence setup'") from error
    return b""


def load_order(wanted: Iterable[str], read: Callable[[str], bytes | None], builtin: frozenset[str]) -> dict[str, bytes]:
    """name -> ELF of the wanted modules and all that they require, each after what it requires.

    read(name) gives a module's ELF, or None where there is no such file. Names in `builtin` are part of the
    kernel and need no file. Raises LookupError(name) for one that is neither.
    """
    order: dict[str, bytes] = {}
    visiting: set[str] = set()

    def visit(name: str) -> None:
        name = canonical(name)
        if name in order or name in builtin or name in visiting:
            return
        visiting.add(name)
        module = read(name)
        if module is None:
            raise LookupError(name)
        for before in requires(module):
            visit(before)
        order[name] = module

    for name in wanted:
        visit(name)
    return order


def every(sets: Mapping[str, Iterable[str]]) -> list[str]:
    """The modules of all sets, in order, each once."""
    return list(dict.fromkeys(name for names in sets.values() for name in names))
