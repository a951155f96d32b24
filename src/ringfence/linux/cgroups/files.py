"""The files of a cgroup's directory: made, opened, written and read by the descriptor of a directory above."""

from __future__ import annotations

import errno
import os

from ringfence.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "cpu_list",
    "cpus_in",
    "make_directory",
    "may_make_directories",
    "open_directory",
    "open_to_read",
    "open_to_write",
    "read",
    "read_keyed",
    "read_number",
    "read_pids",
    "remove_children",
    "remove_directory",
    "rmdir_if_there",
    "set_and_read",
    "write",
]

_READ_SIZE = 65536


def may_make_directories(path: bytes) -> str:
    """Why this process can't make a cgroup in that directory, or ""."""
    if os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        return ""
    if not os.path.isdir(path):
        return f"{os.fsdecode(path)} isn't there"
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return f"{os.fsdecode(path)} is mounted read-only"
    return f"{os.fsdecode(path)} isn't writable for this user (not delegated)"


def open_directory(path: bytes | str, parent_fd: int | None = None) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=parent_fd)


def open_to_write(path: str, directory_fd: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory_fd)


def open_to_read(path: str, directory_fd: int) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory_fd)


def make_directory(name: bytes | str, parent_fd: int) -> None:
    """mkdir. Raises KernelError."""
    try:
        os.mkdir(name, 0o755, dir_fd=parent_fd)
    except OSError as error:
        raise KernelError("mkdir", (name,), error.errno or 0) from error


def set_and_read(directory_fd: int, name: str, value: str) -> str:
    """Write a control file and read it back. Raises KernelError, ENOENT where there is no such file."""
    try:
        fd = os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=directory_fd)
        try:
            os.write(fd, value.encode())
            return os.pread(fd, _READ_SIZE, 0).decode().strip()
        finally:
            os.close(fd)
    except OSError as error:
        raise KernelError("write", (name, value), error.errno or 0) from error


def write(directory_fd: int, name: str, value: str) -> None:
    """Write a control file that can't be read. Raises KernelError."""
    try:
        fd = open_to_write(name, directory_fd)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise KernelError("write", (name, value), error.errno or 0) from error


def read(directory_fd: int, name: str) -> str | None:
    """A control file's text; None where this kernel has no such file."""
    try:
        fd = open_to_read(name, directory_fd)
    except FileNotFoundError:
        return None
    try:
        # Lists of pids can be longer than one read gives.
        parts = []
        while part := os.read(fd, _READ_SIZE):
            parts.append(part)
        return b"".join(parts).decode()
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return None
        raise KernelError("read", (name,), error.errno or 0) from error
    finally:
        os.close(fd)


def read_number(directory_fd: int, name: str) -> int | None:
    """A control file's one number; None where there is no such file or it says "max"."""
    text = read(directory_fd, name)
    return None if text is None or text.strip() == "max" else int(text)


def read_keyed(directory_fd: int, name: str) -> dict[str, int]:
    """A control file of "key number" lines; empty where there is no such file."""
    pairs = (line.split() for line in (read(directory_fd, name) or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


def read_pids(directory_fd: int, prefix: str = "") -> set[int]:
    """The processes of a cgroup, but those outside of this process's PID namespace, which show as 0."""
    return {int(pid) for pid in (read(directory_fd, prefix + "cgroup.procs") or "").split()} - {0}


def rmdir_if_there(name: bytes | str, parent_fd: int) -> None:
    """rmdir; one that is gone is fine. Raises OSError EBUSY while processes are in it."""
    try:
        os.rmdir(name, dir_fd=parent_fd)
    except FileNotFoundError:
        return


def remove_directory(name: bytes | str, parent_fd: int) -> None:
    """rmdir for cleaning up. Raises KernelError."""
    try:
        rmdir_if_there(name, parent_fd)
    except OSError as error:
        raise KernelError("rmdir", (name,), error.errno or 0) from error


def remove_children(base_fd: int) -> None:
    """Remove the sandboxes of a base. Raises KernelError EBUSY where one still has processes."""
    for name in os.listdir(base_fd):
        if name.startswith("s") and name[1:].isdigit():
            remove_directory(name, base_fd)


def cpu_list(cpus: Iterable[int]) -> str:
    """Numbers as cpuset(7) has them, in its "List format": "0,1,3"."""
    return ",".join(map(str, cpus))


def cpus_in(text: str) -> tuple[int, ...]:
    """The numbers in such a list: "0-1,3" is (0, 1, 3)."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))
