"""What a Python process and its launcher left that were killed both, so that nobody was there to remove it.

A run folder is locked for as long as its Python lives, its cgroups bear its name, and symbolic links in it say where
they are. So where a folder's lock is free and its process is gone, what has that name is nobody's, but for a moment in
which its launcher removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time

__all__ = ["FOLDER", "find", "hold", "note"]

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_PREFIX = b"ringfence-"
_LINK = b"cgroups-"
_RANDOM_LETTERS = 16
_HELD = 0o711
# One that isn't locked yet has a process that is about to, which may be in another PID namespace.
_YOUNG_S = 60
# As many as a launcher has room for beside what is its own.
_MOST = 4


def hold(fd: int) -> bool:
    """Locks our own run folder, for as long as this descriptor, or a forked child's copy of it, is open.

    Only then others may pass through, to a work directory that lets them in, but not look around. By that those who
    don't see our pid know that it was locked. False where it is gone: who waited here for long was taken for dead.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks: our pid has to tell
            raise
    os.fchmod(fd, _HELD)
    return os.fstat(fd).st_nlink > 0


def note(run_fd: int, parent_fd: int) -> None:
    """Says in our run folder that a cgroup of its name is going to be in that directory."""
    about = os.fstat(parent_fd)
    name = _LINK + b"%d-%d" % (about.st_dev, about.st_ino)
    try:
        os.symlink(os.readlink(b"/proc/self/fd/%d" % parent_fd), name, dir_fd=run_fd)
    except FileExistsError:
        pass  # it was said before


def find(run_parent: int) -> list[tuple[bytes, list[int]]]:
    """What is left over: names, and for each descriptors, for the caller to close, of the directories in which there is
    a cgroup of that name. run_parent: the directory with the run folders.
    """
    found: list[tuple[bytes, list[int]]] = []
    for entry in os.listdir(run_parent):
        name = os.fsencode(entry)
        if len(found) < _MOST and name.startswith(_PREFIX):
            parents = _if_left_over(run_parent, name)
            if parents is not None:
                found.append((name, parents))
    return found


def _if_left_over(parent_fd: int, name: bytes) -> list[int] | None:
    pid, _, random = name.removeprefix(_PREFIX).partition(b"-")
    if not pid.isdigit() or len(random) != _RANDOM_LETTERS or os.path.exists(b"/proc/" + pid):
        return None
    try:
        fd = os.open(name, FOLDER, dir_fd=parent_fd)
    except OSError:
        return None  # not a folder, not ours, or not there any more
    try:
        about = os.fstat(fd)
        held = stat.S_IMODE(about.st_mode) == _HELD
        if about.st_uid != os.geteuid() or not (held or abs(time.time() - about.st_ctime) > _YOUNG_S):
            return None
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else its process lives, where we can't see it
        return _cgroup_parents(fd)
    except OSError:
        return None
    finally:
        os.close(fd)


def _cgroup_parents(folder: int) -> list[int]:
    """Raises OSError where one is out of our reach: whoever reaches all of them is to remove them."""
    found: list[int] = []
    try:
        for entry in os.listdir(folder):
            link = os.fsencode(entry)
            if not link.startswith(_LINK):
                continue
            path = os.readlink(link, dir_fd=folder)
            if _is_gone(path):
                continue
            found.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            # Only a cgroup's directory has this file, so that no folder of another kind is ever taken for one.
            os.stat("cgroup.procs", dir_fd=found[-1])
    except BaseException:
        for fd in found:
            os.close(fd)
        raise
    return found


def _is_gone(path: bytes) -> bool:
    """Whether a cgroup was removed, with all below it. Where no directory above it is one, it is only out of sight."""
    if os.path.lexists(path):
        return False
    while path != b"/" and not os.path.lexists(path):
        path = os.path.dirname(path)
    return os.path.exists(os.path.join(path, b"cgroup.procs"))
