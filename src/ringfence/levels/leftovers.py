"""What a Python process and its launcher left that were killed both, so that nobody was there to remove it.

A run folder is locked for as long as its Python lives, and its cgroups bear its name. So where a folder's lock is free
and its process is gone, what has that name is nobody's; but for a moment, while the launcher removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os

__all__ = ["FOLDER", "find", "hold"]

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_PREFIX = b"ringfence-"
_RANDOM_LETTERS = 16
# As many as a launcher has room for beside what is its own.
_MOST = 4


def hold(fd: int) -> None:
    """Locks our own run folder, for as long as this descriptor, or a forked child's copy of it, is open."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system without locks, or somebody is just looking whether it is left over. Our pid says that it isn't.
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOLCK, errno.EOPNOTSUPP):
            raise


def find(run_parent: int) -> list[bytes]:
    """The names of what is left over. run_parent: the directory with the run folders."""
    found: list[bytes] = []
    for entry in os.listdir(run_parent):
        name = os.fsencode(entry)
        if len(found) < _MOST and name.startswith(_PREFIX) and _is_left_over(run_parent, name):
            found.append(name)
    return found


def _is_left_over(parent_fd: int, name: bytes) -> bool:
    pid, _, random = name.removeprefix(_PREFIX).partition(b"-")
    if not pid.isdigit() or len(random) != _RANDOM_LETTERS:
        return False
    if os.path.exists(b"/proc/" + pid):
        return False
    try:
        fd = os.open(name, FOLDER, dir_fd=parent_fd)
    except OSError:
        return False  # not a folder, not ours, or not there any more
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # its process lives, where we can't see it
    finally:
        os.close(fd)
    return True
