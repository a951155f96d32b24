"""A rootfs folder as a disk: an uncompressed erofs image, made once for the same content.

Content is the same as long as this is: for everything in the folder its path, type, mode, owner, size, mtime,
ctime, inode number and device number, and a symbolic link's target. Reading every file each time would cost
seconds; a change that leaves all of these as they were (which takes a write to the disk below the file
system, or a clock that was set back) goes unseen. An access changes none of them.
"""

from __future__ import annotations

import errno
import os
import stat

from ringfence import _cache
from ringfence.errors import SpecError
from ringfence.images.held import open_real
from ringfence.images.kernel_mounts import kernel_mounts
from ringfence.levels.vm import mkfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Progress = Callable[[str], None]

_FILE = "disk.erofs"
_FORMAT = 2
# Sizes are powers of two from here on, as a template of a guest serves any image whose disk has the size of its own: a
# guest knows no more of a disk before it is restored. What is added is a hole.
_LEAST_BYTES = 64 << 20
# Images of one folder that are kept: the newest, and two that a guest may be about to start from.
_KEPT = 3

MAX_ENTRIES = 2_000_000
# By the files' sizes, as holes are filled.
MAX_BYTES = 16 << 30
# Of all images in the cache together, on disk.
MOST_CACHED_BYTES = 16 << 30
# What an image must leave free of the cache's file system.
RESERVE_BYTES = 256 << 20
_BLOCK = 4096


def erofs_disk(folder: str, cache_dir: str | None = None, *, progress: Progress | None = None) -> str:
    """Path of the erofs image of a folder, given by a real path, for a guest to mount read-only. Its size is a power of
    two. The folder is opened once: whatever is put in the place of one above it later changes nothing.

    Owners, modes, times, links and devices are the folder's; holes are filled; extended attributes are left
    out, and with them file capabilities, which no_new_privs voids anyway. The first time it takes about a
    second for 200 MB, later as long as a walk of the tree (some 5 µs an entry).

    Raises SpecError where the folder is none, can't be read, changes while it is read, or has over
    MAX_ENTRIES entries or MAX_BYTES bytes; Unavailable where mkfs.erofs is missing or fails, or there is no room.
    """
    folder = os.path.normpath(folder)
    held = _open(folder)
    try:
        return _disk_of(folder, held, cache_dir, progress)
    finally:
        os.close(held)


def _open(folder: str) -> int:
    try:
        return open_real(folder)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "?")
        raise SpecError(f"image: {folder} can't be read: {name} ({error.strerror})") from error


def _disk_of(folder: str, held: int, cache_dir: str | None, progress: Progress | None) -> str:
    for point, of in kernel_mounts([os.readlink(b"/proc/self/fd/%d" % held)]):
        shown = f"{os.fsdecode(point)} is a {os.fsdecode(of)} of the host's"
        raise SpecError(f"image: {shown}, which a disk can't hold: unmount it")
    before, size_bytes = _survey(folder, held)

    def fill(scratch: str) -> None:
        if progress:
            progress(f"making a disk image of {folder}")
        image = os.path.join(scratch, _FILE)
        mkfs.need_room(folder, scratch, size_bytes + RESERVE_BYTES)
        mkfs.make(folder, held, image)
        with open(image, "r+b") as file:
            file.truncate(size_class(file.seek(0, os.SEEK_END)))
        if _survey(folder, held)[0] != before:
            raise SpecError(f"image: {folder} changed while it was read; try again when nothing writes to it")

    # A kind for each folder: several folders can then be read at once, and the old images of one are easy to
    # find.
    kind = f"erofs/{_sha256(os.fsencode(folder))[:16]}"
    if (made := _cache.find(kind, before[:32], cache_dir)) is None:
        made = _cache.obtain(kind, before[:32], fill, cache_dir=cache_dir, progress=progress)
        _cache.forget_old(kind, _KEPT, cache_dir)
        _forget_folders(kind, cache_dir)
    return os.path.join(made, _FILE)


def size_class(size_bytes: int) -> int:
    """How large the disk of an image of that size is."""
    return max(_LEAST_BYTES, 1 << (size_bytes - 1).bit_length())


def _forget_folders(kept: str, cache_dir: str | None) -> None:
    """Remove the images of the folders whose image was made longest ago, until all take at most MOST_CACHED_BYTES."""
    kinds = []
    with os.scandir(os.path.join(_cache.root(cache_dir), "erofs")) as found:
        for one in found:
            kind = f"erofs/{one.name}"
            listed = _cache.entries(kind, cache_dir)
            kinds.append((kind == kept, max((used for _, _, used in listed), default=0), kind, listed))
    total = 0
    for _, _, kind, listed in sorted(kinds, reverse=True):
        total += sum(size for _, size, _ in listed)
        if total > MOST_CACHED_BYTES and kind != kept:
            for key, _, _ in listed:
                _cache.remove(kind, key, cache_dir)


def tree_digest(folder: str) -> str:
    """SHA-256 in hex of all stat(2) data of a folder's content, as the module's text says.

    Raises SpecError as `erofs_disk` does.
    """
    held = _open(folder)
    try:
        return _survey(folder, held)[0]
    finally:
        os.close(held)


def _survey(folder: str, held: int) -> tuple[str, int]:
    """The digest, and how large an image of the folder may become."""
    import hashlib

    digest = hashlib.sha256(b"ringfence erofs %d\n" % _FORMAT)
    total = entries = 0
    linked: set[tuple[int, int]] = set()
    for entries, (path, about, target) in enumerate(_walk(os.fsencode(folder), held), start=1):
        if stat.S_ISREG(about.st_mode) and (about.st_dev, about.st_ino) not in linked:
            total += about.st_size
            if about.st_nlink > 1:
                linked.add((about.st_dev, about.st_ino))
        if entries > MAX_ENTRIES or total > MAX_BYTES:
            raise SpecError(
                f"image: {folder} is too large for a disk image: at most {MAX_ENTRIES} entries and"
                f" {MAX_BYTES >> 30} GiB"
            )
        digest.update(
            b"%b\0%o %d %d %d %d %d %d %d %d\0%b\n"
            % (
                path,
                about.st_mode,
                about.st_uid,
                about.st_gid,
                about.st_size if not stat.S_ISDIR(about.st_mode) else 0,
                about.st_mtime_ns,
                about.st_ctime_ns,
                about.st_ino,
                about.st_dev,
                about.st_rdev,
                target,
            )
        )
    return digest.hexdigest(), total + entries * _BLOCK


def _walk(folder: bytes, held: int) -> Iterator[tuple[bytes, os.stat_result, bytes]]:
    """(path below the folder, lstat, a link's target) of everything in it, the folder itself first, in a
    fixed order.

    Links are never followed: what they point at isn't in the image.
    """
    here = folder
    top_path = b"/proc/self/fd/%d" % held
    try:
        top = os.fstat(held)
        if not stat.S_ISDIR(top.st_mode):
            raise SpecError(f"image: {os.fsdecode(folder)} is not a folder")
        yield b"", top, b""
        below = [b""]
        while below:
            prefix = below.pop()
            here = os.path.join(folder, prefix)
            with os.scandir(os.path.join(top_path, prefix)) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            for entry in entries:
                path = os.path.join(prefix, entry.name)
                here = os.path.join(folder, path)
                about = entry.stat(follow_symlinks=False)
                link = stat.S_ISLNK(about.st_mode)
                yield path, about, os.readlink(entry.path) if link else b""
                if stat.S_ISDIR(about.st_mode):
                    below.append(path)
    except OSError as error:
        name, where = errno.errorcode.get(error.errno or 0, "?"), os.fsdecode(here)
        raise SpecError(f"image: {where} can't be read: {name} ({error.strerror})") from error


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
