"""/proc/PID of a live process, by a descriptor: once it is open, no other process can take its place.

Source: proc(5) and its pages (proc_pid_status, proc_pid_mountinfo, proc_pid_ns, ...).
"""

from __future__ import annotations

import os

from ringfence._value import Closing, Value
from ringfence.errors import KernelError
from ringfence.spec.boundary import NAMESPACES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MountEntry", "Proc", "pids", "unescaped"]

# A command line or a mount table can be of any length; a file of /proc that is longer is cut.
_MOST_BYTES = 4 << 20


class MountEntry(Value):
    """A line of mountinfo. device: (major, minor). root: what of its file system is shown. point: where.

    options: of this mount. kind, source: of the file system, with options of its own (`super_options`). number: its
    own; parent: of the mount that it lies on.
    """

    __slots__ = ("device", "kind", "number", "options", "parent", "point", "root", "source", "super_options")
    device: tuple[int, int]
    root: str
    point: str
    options: tuple[str, ...]
    kind: str
    source: str
    super_options: tuple[str, ...]
    number: int
    parent: int

    def __init__(
        self,
        *,
        device: tuple[int, int],
        root: str,
        point: str,
        options: tuple[str, ...],
        kind: str,
        source: str,
        super_options: tuple[str, ...],
        number: int = 0,
        parent: int = 0,
    ) -> None:
        self._set(
            device=device,
            root=root,
            point=point,
            options=options,
            kind=kind,
            source=source,
            super_options=super_options,
            number=number,
            parent=parent,
        )

    @property
    def writable(self) -> bool:
        return "rw" in self.options and "rw" in self.super_options


def pids(proc: str = "/proc") -> list[int]:
    """The numbers of all processes that this /proc shows, in order."""
    return sorted(int(name) for name in os.listdir(proc) if name.isdecimal())


class Proc(Closing):
    """One process. What this caller may not read is None, never a guess; a process that has ended raises KernelError
    (ESRCH) at `open`, and is None afterwards.
    """

    def __init__(self, pid: int, proc: str = "/proc") -> None:
        self.pid, self.folder = pid, proc
        try:
            self._fd = os.open(f"{proc}/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError("open", [f"{proc}/{pid}"], error.errno or 0, "is there such a process?") from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # ---- reading ----

    def data(self, name: str) -> bytes | None:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._fd)
        except OSError:
            return None
        found = bytearray()
        try:
            while len(found) < _MOST_BYTES and (more := os.read(fd, 1 << 16)):
                found += more
        except OSError:
            return None  # it ended meanwhile, or only the opening was allowed
        finally:
            os.close(fd)
        return bytes(found)

    def text(self, name: str) -> str | None:
        found = self.data(name)
        return None if found is None else found.decode("utf-8", "surrogateescape")

    def link(self, name: str) -> str | None:
        try:
            return os.readlink(name, dir_fd=self._fd)
        except OSError:
            return None

    def names(self, name: str) -> list[str] | None:
        """What is in a directory of it."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError:
            return None
        try:
            return os.listdir(fd)
        except OSError:
            return None
        finally:
            os.close(fd)

    # ---- what is in the files ----

    def status(self) -> dict[str, str]:
        lines = (line.partition(":") for line in (self.text("status") or "").splitlines())
        return {name: value.strip() for name, _, value in lines}

    def namespaces(self) -> dict[str, int]:
        """Inode by name ("mnt", "pid", ...); without those that may not be read."""
        found = {}
        for name in NAMESPACES:
            link = self.link(f"ns/{name}")
            if link is not None and link.endswith("]"):
                found[name] = int(link.partition("[")[2][:-1])
        return found

    def argv(self) -> tuple[str, ...]:
        """() of a kernel thread, or of one that has none."""
        words = (self.text("cmdline") or "").split("\0")
        return tuple(words[:-1] if words[-1:] == [""] else words)

    def id_map(self, name: str) -> tuple[tuple[int, int, int], ...]:
        """(first inside, first outside as this caller sees it, count) of uid_map or gid_map."""
        rows = (line.split() for line in (self.text(name) or "").splitlines())
        return tuple((int(row[0]), int(row[1]), int(row[2])) for row in rows if len(row) == 3)

    def cgroups(self) -> dict[str, str]:
        """Path by controller; of version 2 by ""."""
        found: dict[str, str] = {}
        for line in (self.text("cgroup") or "").splitlines():
            _, names, path = line.split(":", 2)
            found |= dict.fromkeys(names.split(","), path)
        return found

    def mounts(self) -> list[MountEntry] | None:
        table = self.text("mountinfo")
        return None if table is None else list(_entries(table))

    def descriptors(self) -> dict[int, str] | None:
        """Where each open descriptor leads, as the kernel words it ("socket:[123]", "/dev/kvm")."""
        numbers = self.names("fd")
        if numbers is None:
            return None
        links = ((int(one), self.link(f"fd/{one}")) for one in numbers)
        return {number: link for number, link in links if link is not None}

    def threads(self) -> list[str]:
        """The name of each thread."""
        found = []
        for one in self.names("task") or []:
            name = self.text(f"task/{one}/comm")
            if name is not None:
                found.append(name.rstrip("\n"))
        return found


def _entries(table: str) -> Iterator[MountEntry]:
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        fields, last = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(last) < 3:
            continue
        major, _, minor = fields[2].partition(":")
        yield MountEntry(
            device=(int(major), int(minor)),
            root=unescaped(fields[3]),
            point=unescaped(fields[4]),
            options=tuple(fields[5].split(",")),
            kind=last[0],
            source=unescaped(last[1]),
            super_options=tuple(last[2].split(",")),
            number=int(fields[0]),
            parent=int(fields[1]),
        )


def unescaped(field: str) -> str:
    r"""Space, tab, newline and backslash are written as \040, \011, \012 and \134."""
    for code, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        field = field.replace(code, character)
    return field
