"""A sandbox's work directory on the host. What is in it is `workdir_files`' business: most sandboxes leave nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from ringfence.spec import FileIn

__all__ = ["WorkDirectory"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_PRISTINE_BYTES = 4096
# The kernel may give all changes within one tick the same time; the longest is 10 ms. A file system that counts in
# seconds, or in two (ext4 with inodes of 128 bytes, FAT), gives the same time for so long, and shows by its round ones.
_TICK_NS = 20_000_000
_COARSE_TICK_NS = 2_020_000_000
_ROUND_NS = 10_000_000
# FS_IOC_GETFLAGS and FS_IOC_FSGETXATTR of include/uapi/linux/fs.h: (request, what of the answer is an attribute). The
# number of extents, in the middle of the latter, is none.
_ATTRIBUTES = ((0x80086601, ((0, 4),)), (0x801C581F, ((0, 8), (12, 20))))


class WorkDirectory:
    """The directory `name` below `parent_fd`, owned by (uid, gid) unless they are None. `fd` is its descriptor."""

    # Its change time after `renew`, and when it was found pristine, if no later change can have the same one.
    _renewed_ns = 0
    _changed_ns = 0

    def __init__(self, parent_fd: int, name: bytes, owner: tuple[int, int] | None) -> None:
        self._parent_fd = parent_fd
        self._name = self.name = name
        self._owner = owner
        os.mkdir(name, 0o700, dir_fd=parent_fd)
        self.fd = os.open(name, _FOLDER, dir_fd=parent_fd)
        try:
            if owner is not None:
                os.fchown(self.fd, *owner)
            self._attributes = _attributes(self.fd)
            made_ns = os.fstat(self.fd).st_mtime_ns // 10**9 * 10**9
            self._times_ns = made_ns, made_ns
            self.renew()
        except BaseException:
            self.remove()
            raise

    @classmethod
    def of(cls, fd: int) -> Self:
        """One that somebody else made, and removes; `fd` stays theirs. It is only read."""
        found = cls.__new__(cls)
        found.fd, found._owner = fd, None
        return found

    def put(self, files: tuple[FileIn, ...], *, replace: bool = False) -> None:
        """Writes files. replace: in place of what has their names; nothing is followed that a workload may have put
        there. Raises OSError: ENOTDIR where what should be a folder on the way is something else.
        """
        if files:
            from ringfence.levels import workdir_files

            workdir_files.put(self.fd, files, self._owner, replace=replace)

    def read(self, path: bytes, limit_bytes: int) -> bytes | None:
        """A regular file's content; None where it isn't one. Raises SpecError where it has more than `limit_bytes`."""
        from ringfence.levels import workdir_files

        return workdir_files.read(self.fd, path, limit_bytes)

    def files(self) -> list[tuple[bytes, int]]:
        """(path, size) of the regular files, sorted by path."""
        from ringfence.levels import workdir_files

        return workdir_files.listed(self.fd)

    def collect(self, patterns: tuple[bytes, ...], limit_bytes: int) -> dict[str, bytes]:
        """The regular files that match. Raises SpecError where they are more than `limit_bytes` together."""
        from ringfence.levels import workdir_files

        return workdir_files.collect(self.fd, patterns, limit_bytes)

    def is_untouched(self) -> bool:
        """Whether it is as when it was last found pristine, by its change time alone: what is made or removed in a
        directory, its mode, its owner and its attributes change that, and nobody can set it.
        """
        return self._changed_ns != 0 and os.fstat(self.fd).st_ctime_ns == self._changed_ns

    def is_pristine(self) -> bool:
        """Whether nothing of a workload shows in it, but for its times: it is empty, and as it was made."""
        self._changed_ns = 0
        about = os.fstat(self.fd)
        # With CAP_CHOWN a workload may have given it away.
        owned = (about.st_uid, about.st_gid) == (self._owner or (os.geteuid(), about.st_gid))
        # A directory that held much stays large on disk, and slow. An ACL is an extended attribute.
        plain = stat.S_IMODE(about.st_mode) == 0o700 and about.st_size <= _PRISTINE_BYTES and about.st_nlink > 0
        if not (owned and plain) or os.listdir(self.fd) or os.listxattr(self.fd):
            return False
        if _attributes(self.fd) != self._attributes:
            return False  # what is made in it would have them too: each write would wait for the disk
        changed_ns = about.st_ctime_ns
        tick_ns = _TICK_NS if changed_ns % _ROUND_NS else _COARSE_TICK_NS
        if changed_ns == self._renewed_ns and time.time_ns() - changed_ns > tick_ns:
            self._changed_ns = changed_ns
        return True

    def renew(self) -> bool:
        """Sets its times to what they were when it was made: else the next workload would read there what the last one
        set them to. False where that can't be done.
        """
        try:
            os.utime(self.fd, ns=self._times_ns)
        except OSError:  # as root without CAP_FOWNER
            return False
        about = os.fstat(self.fd)
        # Where they are one (FAT, some of FUSE), whoever sets one sets the other: then it tells nothing.
        self._renewed_ns = about.st_ctime_ns if about.st_ctime_ns != about.st_mtime_ns else 0
        return True

    def remove(self) -> None:
        """Removes it with all that the workload left in it, and closes `fd`. May be called twice."""
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        try:
            os.rmdir(self._name, dir_fd=self._parent_fd)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                os.close(fd)
                raise
            try:
                from ringfence.levels import workdir_files

                workdir_files.remove(fd, self._parent_fd, self._name)
            finally:
                os.close(fd)
        else:
            os.close(fd)


def _attributes(fd: int) -> tuple[bytes | None, ...]:
    """What chattr(1), xfs_io and their like set, each None where the file system has no such thing."""
    found: list[bytes | None] = []
    for request, parts in _ATTRIBUTES:
        try:
            answer = fcntl.ioctl(fd, request, bytes(28))
        except OSError:
            found.append(None)
        else:
            found.append(b"".join(answer[first:end] for first, end in parts))
    return tuple(found)
