"""Files that a workload made, written into a directory of the caller's: no symlink on the way is followed, and nothing
is replaced that the caller didn't say so of.
"""

from __future__ import annotations

import errno
import os
import stat

from ringfence.errors import RingfenceError
from ringfence.spec import parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["NotSaved", "save"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class NotSaved(RingfenceError):
    """Collected files could not be written; where something was in the way, none was."""


def save(files: Mapping[str, bytes], folder: str, *, replace: bool) -> None:
    """Writes {path relative to `folder`: content}; folders are made as they are needed, also `folder` itself.

    A file that is there already is an error and nothing is written, unless `replace`: then it gets a new one in its
    place, so that what a symlink or a hard link of that name leads to stays as it is. Raises NotSaved.
    """
    # A guest's word is no path: it is judged like any other input.
    paths = [(parse.relative_path(os.fsencode(name), "collect"), data) for name, data in files.items()]
    try:
        os.makedirs(folder, exist_ok=True)
        top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise NotSaved(f"{folder}: {error.strerror}") from None
    try:
        for path, _ in paths:
            _check(top, path, folder, replace)
        for path, data in paths:
            _write(top, path, data, folder, replace)
    finally:
        os.close(top)


def _check(top: int, path: bytes, folder: str, replace: bool) -> None:
    """Raises NotSaved where something is in the way of a file."""
    try:
        parent = _open_parent(top, path, make=False)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _in_the_way(error, folder, path) from None
    try:
        mode = os.lstat(os.path.basename(path), dir_fd=parent).st_mode
    except FileNotFoundError:
        return
    finally:
        os.close(parent)
    if stat.S_ISDIR(mode):
        raise NotSaved(f"{_shown(folder, path)} is a folder: nothing was collected")
    if not replace:
        raise NotSaved(f"{_shown(folder, path)} is there already: nothing was collected (--force replaces it)")


def _write(top: int, path: bytes, data: bytes, folder: str, replace: bool) -> None:
    try:
        parent = _open_parent(top, path, make=True)
        try:
            _write_in(parent, os.path.basename(path), data, replace)
        finally:
            os.close(parent)
    except OSError as error:
        raise _in_the_way(error, folder, path) from None


def _write_in(parent: int, name: bytes, data: bytes, replace: bool) -> None:
    temporary = b".ringfence-%s" % os.urandom(8).hex().encode() if replace else name
    fd = os.open(temporary, _NEW_FILE, 0o666, dir_fd=parent)
    try:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(fd, left) :]
        finally:
            os.close(fd)
        if replace:
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException:
        os.unlink(temporary, dir_fd=parent)  # half a file is none
        raise


def _open_parent(top: int, path: bytes, *, make: bool) -> int:
    """The folder that a file is to be in, opened one component at a time, so that no symlink is followed."""
    at = os.dup(top)
    for part in path.split(b"/")[:-1]:
        try:
            if make:
                try:
                    os.mkdir(part, 0o777, dir_fd=at)
                except FileExistsError:
                    pass
            below = os.open(part, _FOLDER, dir_fd=at)
        finally:
            os.close(at)
        at = below
    return at


def _in_the_way(error: OSError, folder: str, path: bytes) -> NotSaved:
    reason = error.strerror
    # With O_DIRECTORY and O_NOFOLLOW a symlink is either of these (open(2)).
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        reason = "a symlink or a file is where a folder should be"
    return NotSaved(f"{_shown(folder, path)}: {reason}")


def _shown(folder: str, path: bytes) -> str:
    return os.path.join(folder, os.fsdecode(path))
