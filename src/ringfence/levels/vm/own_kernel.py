"""A kernel that a spec names: prepared once, kept by which file it was, and what of a spec it can't do.

Image and modules are opened once each, without a symlink on their way: what is judged is what is read.
"""

from __future__ import annotations

import errno
import os
import stat

from ringfence import _cache
from ringfence.errors import SpecError, Unavailable, Unmet
from ringfence.images.held import open_real
from ringfence.levels.vm import bzimage, kernel
from ringfence.levels.vm.kernel import GuestKernel
from ringfence.levels.vm.kernel_source import DirectoryTree, MemoryTree, ModuleTree, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.spec import Kernel, Spec

    Progress = Callable[[str], None]

__all__ = ["prepare", "unmet"]

_KIND = "own-kernels"
# Who builds kernels names another one each time.
_KEPT = 8
_PACKAGE = b"!<arch>\n"
_ELF, _BANNER = b"\x7fELF", b"Linux version "
_BANNER_BYTES, _PART_BYTES = 256, 4 << 20
# Where a bzImage says which release it is: its header has a pointer of 16 bits into the first 64 KiB.
_HEADER_BYTES = 1 << 17

# What has to be in a kernel for a part of a spec -> why.
_NEEDED = {
    "9p": "9p, by which a guest gets the host's folders: its image='host' and its mounts",
    "erofs": "virtio_blk and erofs, by which a guest gets an image that is a folder or a disk",
    "overlay": "overlayfs, which overlay=True takes",
    "net": "virtio_net, by which a guest gets a network",
    "pci": "virtio_pci, which QEMU's machine q35 takes",
}


def prepare(given: Kernel, cache_dir: str | None = None, *, progress: Progress | None = None) -> GuestKernel:
    """The kernel, ready for guests; made so now where it wasn't yet, which takes a second or two.

    Raises SpecError where a file can't be read, Unavailable where guests can't be started from it.
    """
    image = _open(given.path, "kernel", stat.S_ISREG)
    folder = -1
    try:
        fd = os.open(f"/proc/self/fd/{image}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            path = given.modules if given.modules is not None else _beside(os.fsdecode(given.path), fd)
            if path is not None:
                folder = _open(path, "kernel modules", stat.S_ISDIR)
            key = _key(given, fd, folder)
            made = _cache.find(_KIND, key, cache_dir) or _make(given, fd, folder, key, cache_dir, progress)
        finally:
            os.close(fd)
    except OSError as error:
        raise SpecError(f"kernel: {os.fsdecode(given.path)!r} can't be read ({error.strerror})") from None
    finally:
        os.close(image)
        if folder >= 0:
            os.close(folder)
    return kernel.load(made)


def _open(path: bytes, what: str, is_kind: Callable[[int], bool]) -> int:
    try:
        held = open_real(path)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "?")
        raise SpecError(f"{what}: {os.fsdecode(path)!r} can't be opened: {name} ({error.strerror})") from None
    if not is_kind(os.fstat(held).st_mode):
        os.close(held)
        raise SpecError(f"{what}: {os.fsdecode(path)!r} was replaced while it was looked at")
    return held


def _beside(path: str, image: int) -> bytes | None:
    """The folder of its modules, where a distribution has them; none for a package, which has its own."""
    start = os.pread(image, _HEADER_BYTES, 0)
    if start.startswith(_PACKAGE):
        return None
    found = kernel.folder_beside(path, bzimage.release(_banner(image) if start.startswith(_ELF) else start))
    return os.fsencode(os.path.realpath(found)) if found is not None else None


# Where the banner of an image is: to look for it again takes longer than all else here. Of this process's last ones.
_banners: dict[tuple[int, ...], bytes] = {}


def _banner(image: int) -> bytes:
    """An uncompressed kernel, reduced to where it says what it is, which may be anywhere in it."""
    key = _about(os.fstat(image))
    if key not in _banners:
        # Not by mmap(2): who cuts the file short then would end this process.
        found, at = b"", 0
        while not found and at < bzimage.MAX_KERNEL_BYTES and (part := os.pread(image, _PART_BYTES, at)):
            if (where := part.find(_BANNER)) >= 0:
                found = os.pread(image, _BANNER_BYTES, at + where)
            at += _PART_BYTES - _BANNER_BYTES
        while len(_banners) >= _KEPT:
            _banners.pop(next(iter(_banners)), None)
        _banners[key] = _ELF + found
    return _banners[key]


def _whole(image: int) -> bytes:
    with open(f"/proc/self/fd/{image}", "rb") as file:
        data = file.read(bzimage.MAX_KERNEL_BYTES + 1)
    if len(data) > bzimage.MAX_KERNEL_BYTES:
        raise Unavailable("vm", f"the kernel has more than {bzimage.MAX_KERNEL_BYTES >> 20} MiB", "strip it")
    return data


def _about(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _key(given: Kernel, image: int, folder: int) -> str:
    """Another one when the image is another file, or when modules were installed (depmod writes modules.dep anew)."""
    import hashlib

    of: list[object] = [given.path, _about(os.fstat(image)), kernel.sets_digest()]
    if folder >= 0:
        of.append(_about(os.fstat(folder)))
        for name in ("modules.dep", "modules.builtin", "kernel"):
            try:
                of.append(_about(os.stat(name, dir_fd=folder, follow_symlinks=False)))
            except OSError:
                of.append(name)
    return hashlib.sha256(repr(of).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _make(given: Kernel, image: int, folder: int, key: str, cache_dir: str | None, progress: Progress | None) -> str:
    path = os.fsdecode(given.path)

    def fill(scratch: str) -> None:
        if progress:
            progress(f"preparing the guest's kernel from {path}")
        tree: ModuleTree
        if os.pread(image, len(_PACKAGE), 0) == _PACKAGE:
            data, tree = unpack([f"/proc/self/fd/{image}"], (image,))
        else:
            data = _whole(image)
            tree = DirectoryTree(folder) if folder >= 0 else MemoryTree(None, {})
        try:
            if folder >= 0 and tree.builtin is None:
                # Nothing would tell what is missing there from what the kernel has in it.
                reason = "the folder of the kernel's modules has no file modules.builtin"
                raise Unavailable("vm", reason, "give a /lib/modules/RELEASE, as 'make modules_install' makes it")
            kernel.write(scratch, data, tree, source=path, required=("boot",))
        finally:
            tree.close()

    made = _cache.obtain(_KIND, key, fill, cache_dir=cache_dir, progress=progress)
    _cache.forget_old(_KIND, _KEPT, cache_dir)
    return made


def unmet(spec: Spec, found: GuestKernel, board: str) -> list[Unmet]:
    """What a spec takes that its kernel hasn't, as far as its modules tell: one in a single piece tells nothing."""
    needed = ["9p"] if spec.image == "host" or spec.mounts else []
    needed += ["erofs"] if spec.image != "host" else []
    needed += ["overlay"] if spec.overlay else []
    needed += ["net"] if spec.network.mode == "nat" else []
    needed += ["pci"] if board == "q35" else []
    assert spec.kernel is not None
    path = os.fsdecode(spec.kernel.path)
    help = {"9p": "give a folder or a disk as image, and files= in place of mounts"}
    return [
        Unmet(
            "kernel", path, f"kernel {found.release} has no {_NEEDED[one]}", help.get(one, "use a kernel that has it")
        )
        for one in needed
        if one not in found.sets
    ]
