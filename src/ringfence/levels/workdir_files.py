"""The files of a work directory: in, out, and their removal.

What is in it was made by the workload, so nothing here follows a symlink, opens what isn't a regular file, or trusts a
depth. Everything goes by directory descriptors; `top` is the work directory's.
"""

from __future__ import annotations

import errno
import os
import stat

from ringfence.errors import SpecError
from ringfence.spec.parse import match_pattern

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ringfence.spec import FileIn

__all__ = ["collect", "listed", "put", "read", "remove"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
# Deeper than any honest tree; a descriptor is held for each level.
_MOST_DEEP = 64
_MOST_ENTRIES = 65536
# Of a removal: directories held open at once, each by two descriptors; and how often it starts anew, as it does for
# each such depth of a tree, before it gives up on somebody who fills the directory meanwhile.
_HELD, _MOST_ROUNDS = 48, 100_000
# What a name turns out to be that was a file or a folder a moment ago, or isn't ours to open.
_NOT_THERE = (
    errno.ENOENT,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
    errno.ENXIO,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ESTALE,
)


class _TooLong(Exception):
    """A file is longer than what may still be read. It isn't read then: a hole can be of any size."""


def put(top: int, files: tuple[FileIn, ...], owner: tuple[int, int] | None, *, replace: bool = False) -> None:
    """Writes files. replace: in place of what has their names; nothing is followed that a workload may have put
    there. Raises OSError: ENOTDIR where what should be a folder on the way is something else.
    """
    for one in files:
        folder, name = _parents(top, one.path, owner)
        try:
            if replace:
                _unlink(folder, name)
            fd = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=folder
            )
            try:
                rest = memoryview(one.data)
                while rest:
                    rest = rest[os.write(fd, rest) :]
                if owner is not None:
                    os.fchown(fd, *owner)
                os.fchmod(fd, one.mode)
            finally:
                os.close(fd)
        finally:
            if folder != top:
                os.close(folder)


def _parents(top: int, path: bytes, owner: tuple[int, int] | None) -> tuple[int, bytes]:
    """A descriptor of the directory that `path` is in, made where it is missing, and the last name."""
    *folders, name = path.split(b"/")
    here = top
    try:
        for folder in folders:
            try:
                os.mkdir(folder, 0o755, dir_fd=here)
                made = True
            except FileExistsError:
                made = False
            below = os.open(folder, _FOLDER, dir_fd=here)
            if here != top:
                os.close(here)
            here = below
            if made and owner is not None:
                os.fchown(here, *owner)
            if made:
                os.fchmod(here, 0o755)
    except BaseException:
        if here != top:
            os.close(here)
        raise
    return here, name


def read(top: int, path: bytes, limit_bytes: int) -> bytes | None:
    """A regular file's content; None where it isn't one. Raises SpecError where it has more than `limit_bytes`."""
    *folders, name = path.split(b"/")
    here = top
    try:
        for folder in folders:
            below = os.open(folder, _FOLDER, dir_fd=here)
            if here != top:
                os.close(here)
            here = below
        data = _read(here, name, limit_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return None
    finally:
        if here != top:
            os.close(here)
    if data is not None and len(data) > limit_bytes:
        raise SpecError(f"{os.fsdecode(path)!r} has more than {limit_bytes} bytes")
    return data


def listed(top: int) -> list[tuple[bytes, int]]:
    """(path, size) of the regular files, sorted by path."""
    found = []
    for path, folder, name in _files(top, b"", 0, [0]):
        try:
            found.append((path, os.stat(name, dir_fd=folder, follow_symlinks=False).st_size))
        except FileNotFoundError:
            continue
    return found


def collect(top: int, patterns: tuple[bytes, ...], limit_bytes: int) -> dict[str, bytes]:
    """The regular files that match. Raises SpecError where they are more than `limit_bytes` together."""
    found: dict[str, bytes] = {}
    left = limit_bytes
    for path, folder, name in _files(top, b"", 0, [0]):
        if not any(match_pattern(pattern, path) for pattern in patterns):
            continue
        try:
            data = _read(folder, name, left)
        except _TooLong:
            raise SpecError(f"collect: the files that match are more than {limit_bytes} bytes together") from None
        if data is None:
            continue
        left -= len(data)
        found[os.fsdecode(path)] = data
    return found


def _files(folder: int, prefix: bytes, depth: int, count: list[int]) -> Iterator[tuple[bytes, int, bytes]]:
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            count[0] += 1
            if count[0] > _MOST_ENTRIES:
                raise SpecError(f"collect: the work directory has more than {_MOST_ENTRIES} entries")
            names.append(os.fsencode(entry.name))
    for name in sorted(names):
        try:
            mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
            if stat.S_ISREG(mode):
                yield prefix + name, folder, name
            elif stat.S_ISDIR(mode) and depth < _MOST_DEEP:
                below = os.open(name, _FOLDER, dir_fd=folder)
                try:
                    yield from _files(below, prefix + name + b"/", depth + 1, count)
                finally:
                    os.close(below)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise


def remove(fd: int, parent_fd: int, name: bytes) -> None:
    """Removes the directory `name` of `parent_fd`, with all that is in it. fd: a descriptor of it."""
    for _ in range(_MOST_ROUNDS):
        if _empty(fd, fd, 0):
            continue
        try:
            os.rmdir(name, dir_fd=parent_fd)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise OSError(errno.ENOTEMPTY, f"{os.fsdecode(name)} is filled faster than it is emptied")


def _unlink(folder: int, name: bytes) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass


def _read(folder: int, name: bytes, limit: int) -> bytes | None:
    """A regular file's content, as long as it is at its opening, which doesn't follow one that grows; None for what is
    no such file any more. Raises _TooLong.
    """
    try:
        # Without waiting for a FIFO's other end, should one have taken the name.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, dir_fd=folder)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            return None
        if about.st_size > limit:
            raise _TooLong
        chunks, left = [], about.st_size
        while left > 0 and (chunk := os.read(fd, min(left, 1 << 20))):
            chunks.append(chunk)
            left -= len(chunk)
        return b"".join(chunks)
    finally:
        os.close(fd)


# Of a removal: somebody else is at work in the same folder.
_TAKEN_AWAY = (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST, errno.ELOOP, errno.EISDIR)


def _empty(folder: int, top: int, depth: int) -> bool:
    """Removes what is in `folder`. What lies deeper than _HELD is moved up to `top` instead, and then True is returned:
    another round is needed. Whatever is swapped under way, nothing is followed out of the tree.
    """
    again = False
    # Name by name: there may be millions.
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                again |= _remove_entry(folder, os.fsencode(entry.name), top, depth)
            except OSError as error:
                # Somebody was quicker, or is. The round after, if any is left, will tell.
                if error.errno not in _TAKEN_AWAY:
                    raise
    return again


def _remove_entry(folder: int, name: bytes, top: int, depth: int) -> bool:
    try:
        os.unlink(name, dir_fd=folder)
        return False
    except IsADirectoryError:
        pass
    except PermissionError:
        os.fchmod(folder, 0o700)  # an unprivileged caller's own folder, made read-only by the workload
    try:
        below = _open_folder(folder, name)
    except NotADirectoryError:
        os.unlink(name, dir_fd=folder)
        return False
    try:
        if depth < _HELD:
            again = _empty(below, top, depth + 1)
        elif _has_entries(below):
            # By a name that the workload could not foresee, and so not take.
            os.rename(name, b".deep-" + os.urandom(16).hex().encode(), src_dir_fd=folder, dst_dir_fd=top)
            return True
        else:
            again = False
    finally:
        os.close(below)
    os.rmdir(name, dir_fd=folder)
    return again


def _has_entries(folder: int) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is not None


def _open_folder(folder: int, name: bytes) -> int:
    """A folder to list and to empty, also one that the workload has closed to its own user."""
    try:
        return os.open(name, _FOLDER, dir_fd=folder)
    except PermissionError:
        # By what was opened, as chmod(2) would follow a symlink that took the name.
        held = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            os.chmod(f"/proc/self/fd/{held}", 0o700)
            return os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            os.close(held)
