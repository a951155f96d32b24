"""Control groups: where this process may make some, and what both versions of them have in common.

A `Manager` makes one base cgroup for this process, `ringfence-<pid>-<random>`, below the process's own
cgroup, when the first sandbox needs one; each sandbox is a child of it (s1, s2, ...). Everything goes by
directory descriptors, so nothing is looked up twice and a launcher that was given them can clean up after
this process was killed.

Sources: cgroups(7), Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst of the kernel.
"""

from __future__ import annotations

import abc
import errno
import os
import signal
import time

from ringfence._value import Value
from ringfence.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Self

    Claim = Callable[..., None]

__all__ = ["CONTROLLERS", "Base", "Cgroup", "Controller", "InForce", "Layout", "Manager", "Usage", "layout"]

# Those that ringfence uses. In version 2 the time of cpuacct is in every cgroup's cpu.stat, without a
# controller.
CONTROLLERS = ("memory", "pids", "cpu", "cpuacct")

# The kernel's own default period of the CPU quota, microseconds.
CPU_PERIOD_US = 100_000

_READ_SIZE = 65536
_FIRST_WAIT_S = 0.0002
_LONGEST_WAIT_S = 0.02


class Controller(Value):
    """One controller as this process finds it.

    name: one of CONTROLLERS. version: 1 or 2, or 0 where the kernel has none mounted.
    path: the directory of this process's own cgroup, or b"". usable: whether ringfence can make cgroups
    there.
    reason: why not, or "". help: what would help, or "".
    """

    __slots__ = ("help", "name", "path", "reason", "usable", "version")
    name: str
    version: int
    path: bytes
    usable: bool
    reason: str
    help: str

    def __init__(self, *, name: str, version: int, path: bytes, usable: bool, reason: str = "", help: str = "") -> None:
        self._set(name=name, version=version, path=path, usable=usable, reason=reason, help=help)


class Layout(Value):
    """How cgroups are mounted here: kind is "v1", "v2", "hybrid" (both) or "none"; controllers, one each."""

    __slots__ = ("controllers", "kind", "unified")
    kind: str
    controllers: tuple[Controller, ...]
    unified: bytes

    def __init__(self, *, kind: str, controllers: tuple[Controller, ...], unified: bytes = b"") -> None:
        """unified: the directory of this process's own cgroup of version 2, or b""."""
        self._set(kind=kind, controllers=controllers, unified=unified)

    def controller(self, name: str) -> Controller:
        """Raises KeyError where the name is none of CONTROLLERS."""
        return {one.name: one for one in self.controllers}[name]


class InForce(Value):
    """A limit as read back from the kernel.

    rule: "memory", "cpus" or "pids". requested, effective: bytes, CPUs or a count; an effective None is no
    limit.
    mechanism: the version and the file, such as "cgroup v1 memory.limit_in_bytes".
    """

    __slots__ = ("effective", "mechanism", "requested", "rule")
    rule: str
    requested: int | float
    effective: int | float | None
    mechanism: str

    def __init__(self, *, rule: str, requested: int | float, effective: int | float | None, mechanism: str) -> None:
        self._set(rule=rule, requested=requested, effective=effective, mechanism=mechanism)


class Usage(Value):
    """What a cgroup used. None is unknown: no such controller, or a kernel too old to say.

    memory_peak_bytes, memory_bytes: most and now. cpu_ns: user and system time of all that ever ran in it.
    oom_kills: processes that the kernel killed at the memory limit. pids_peak: most processes and threads at
    once.
    pids_refused: forks that the pids limit refused. throttled_ns: time that it waited for its CPU quota.
    source: "cgroup v1" or "cgroup v2".
    """

    __slots__ = (
        "cpu_ns",
        "memory_bytes",
        "memory_peak_bytes",
        "oom_kills",
        "pids_peak",
        "pids_refused",
        "source",
        "throttled_ns",
    )
    memory_peak_bytes: int | None
    memory_bytes: int | None
    cpu_ns: int | None
    oom_kills: int | None
    pids_peak: int | None
    pids_refused: int | None
    throttled_ns: int | None
    source: str

    def __init__(
        self,
        *,
        memory_peak_bytes: int | None = None,
        memory_bytes: int | None = None,
        cpu_ns: int | None = None,
        oom_kills: int | None = None,
        pids_peak: int | None = None,
        pids_refused: int | None = None,
        throttled_ns: int | None = None,
        source: str,
    ) -> None:
        self._set(
            memory_peak_bytes=memory_peak_bytes,
            memory_bytes=memory_bytes,
            cpu_ns=cpu_ns,
            oom_kills=oom_kills,
            pids_peak=pids_peak,
            pids_refused=pids_refused,
            throttled_ns=throttled_ns,
            source=source,
        )


class Base(Value):
    """A base cgroup in one hierarchy, for whoever cleans up after this process.

    fd: its directory. parent_fd: the directory that it is in, where `name` is to be removed.
    Both belong to the Manager.
    """

    __slots__ = ("fd", "name", "parent_fd")
    fd: int
    name: bytes
    parent_fd: int

    def __init__(self, *, fd: int, name: bytes, parent_fd: int) -> None:
        self._set(fd=fd, name=name, parent_fd=parent_fd)


class Manager(abc.ABC):
    """Makes the cgroups of this process's sandboxes. One for each process; `close` removes what it made."""

    version: int

    def __init__(self, found: Layout, claim: Claim | None = None) -> None:
        """claim: called with (parent directory, name) before each base is made, and with True after these before
        this process goes down into a leaf of that name, so that whoever puts it right after a crash knows of it
        before it is there.
        """
        self.layout = found
        self.pid = os.getpid()
        self._claim = claim
        self._count = 0

    def usable(self, controller: str) -> Controller:
        """A controller as this manager can use it: `.usable`, `.reason`, `.help`. Raises KeyError."""
        return self.layout.controller(controller)

    @abc.abstractmethod
    def bases(self) -> tuple[Base, ...]:
        """The base cgroup in each hierarchy, made on the first call; none where none can be made.

        Raises KernelError.
        """

    @abc.abstractmethod
    def create(
        self,
        *,
        memory_bytes: int | None = None,
        cpus: float | None = None,
        pids: int | None = None,
        measure: bool = True,
    ) -> Cgroup:
        """The cgroup of a new sandbox, its limits set and read back.

        memory_bytes: no swap comes on top. cpus: the quota. pids: processes and threads.
        measure: also where nothing is limited, so that `usage` knows memory and CPU time.
        A limit whose controller isn't usable raises KernelError; ask `usable` before.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Remove the base and its sandboxes. Raises KernelError EBUSY where one still has processes."""

    def _new_base(self, parent_fd: int) -> bytes:
        """Makes a base, claimed before; its name."""
        name = f"ringfence-{self.pid}-{os.urandom(4).hex()}".encode()
        if self._claim is not None:
            self._claim(parent_fd, name)
        make_directory(name, parent_fd)
        return name

    def _next_name(self) -> str:
        self._count += 1
        return f"s{self._count}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Cgroup(abc.ABC):
    """The cgroup of one sandbox, in as many hierarchies as it takes.

    name: below the base. in_force: each limit as read back. It owns its descriptors; `remove` closes them.
    """

    name: str
    in_force: tuple[InForce, ...]

    @abc.abstractmethod
    def join_fds(self) -> tuple[int, ...]:
        """Files into each of which a process writes "0" to join. They belong to the cgroup."""

    @abc.abstractmethod
    def cpu_fd(self) -> int | None:
        """A file that tells the CPU time, for whoever watches a limit; None where nothing does.

        Version 1: a number of nanoseconds (cpuacct.usage). Version 2: a line "usage_usec N" (cpu.stat).
        It belongs to the cgroup, and is to be read by pread(2).
        """

    @abc.abstractmethod
    def cpu_ns(self) -> int | None:
        """The CPU time so far, by one read, for whoever watches a limit."""

    @abc.abstractmethod
    def usage(self) -> Usage:
        """What it used until now; to be asked before `remove`."""

    def is_clean(self) -> bool:
        """Whether it can be had by another sandbox under the same limits, once that is `renew`ed: nothing is in it, and
        nothing that counts was left. Otherwise it is to be removed.
        """
        # Version 2 can't reset memory.peak before Linux 6.12, and its directory is one, not four.
        return False

    def renew(self) -> None:
        """Set the counters of one that is clean to their beginning. Raises OSError."""
        raise OSError(errno.ENOTSUP, "not for this version")

    @abc.abstractmethod
    def processes(self) -> set[int]:
        """The pids in it, as this process's PID namespace shows them."""

    @abc.abstractmethod
    def kill(self, timeout_s: float = 2.0) -> None:
        """SIGKILL to all that is in it, until nothing is. Raises KernelError EBUSY where processes are left
        after `timeout_s` seconds.
        """

    @abc.abstractmethod
    def _rmdir(self) -> None:
        """Remove its directories. Raises OSError EBUSY while a process is still on its way out."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Close its descriptors."""

    def remove(self, timeout_s: float = 2.0) -> bool:
        """Remove it; False where processes are still in it after `timeout_s` seconds. Once True, always
        True.
        """
        wait = _FIRST_WAIT_S
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._rmdir()
            except OSError as error:
                # A killed process leaves its cgroup only at the end of its exit.
                if error.errno != errno.EBUSY:
                    raise KernelError("rmdir", (self.name,), error.errno or 0) from error
            else:
                self._close()
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_S)

    def _kill_each(self, timeout_s: float) -> None:
        """SIGKILL to each process by pidfd, round by round, until there is none.

        A pid from cgroup.procs can be another process's by the time that it is opened, so it is looked up a
        second time once the pidfd holds it: only what is in the cgroup then is signalled.
        """
        deadline = time.monotonic() + timeout_s
        while found := self.processes():
            held: dict[int, int] = {}
            try:
                for pid in found:
                    try:
                        held[pid] = os.pidfd_open(pid)
                    except ProcessLookupError:
                        continue
                for pid in self.processes() & held.keys():
                    try:
                        signal.pidfd_send_signal(held[pid], signal.SIGKILL)
                    except ProcessLookupError:
                        continue
            finally:
                for fd in held.values():
                    os.close(fd)
            self._pause(deadline)

    def _pause(self, deadline: float) -> None:
        """Wait a little for processes to die. Raises KernelError after the deadline (time.monotonic)."""
        if time.monotonic() >= deadline:
            raise KernelError("kill", (self.name,), errno.EBUSY, "its processes don't die")
        time.sleep(_FIRST_WAIT_S)


_known_layout: Layout | None = None


def layout() -> Layout:
    """How cgroups are mounted for this process, and which it may use. Looked up once."""
    global _known_layout
    if _known_layout is None:
        _known_layout = read_layout(_text("/proc/self/mountinfo"), _text("/proc/self/cgroup"))
    return _known_layout


def read_layout(mountinfo: str, own: str) -> Layout:
    """The layout from the texts of /proc/self/mountinfo (proc_pid_mountinfo(5)) and /proc/self/cgroup."""
    from ringfence.linux.cgroups import v1, v2

    paths = _own_paths(own)
    first: dict[str, bytes] = {}
    unified = b""
    foreign: set[str] = set()
    for root, mountpoint, kind, options in _mounts(mountinfo):
        names = [""] if kind == "cgroup2" else [name for name in CONTROLLERS if name in options]
        for name in names:
            inside = _inside(root, paths.get(name))
            if inside is None:
                foreign.add(name)
            elif name and name not in first:
                first[name] = mountpoint + inside
            elif not name and not unified:
                unified = mountpoint + inside
    one = bool(first) or bool(foreign - {""})
    kind = "hybrid" if one and unified else "v1" if one else "v2" if unified else "none"
    home = v2.find_home(unified) if unified and kind == "v2" else None
    controllers = []
    for name in CONTROLLERS:
        if name in first:
            controllers.append(v1.judge(name, first[name]))
        elif home is not None:
            controllers.append(v2.judge(name, unified, home))
        else:
            reason = f"no {name} controller is mounted here"
            if name in foreign:
                reason = f"the {name} hierarchy that is mounted here doesn't show this process's own cgroup"
            elif unified:
                reason = f"the {name} controller isn't in version 1, as the others are (a mixed layout)"
            controllers.append(Controller(name=name, version=0, path=b"", usable=False, reason=reason))
    return Layout(kind=kind, controllers=tuple(controllers), unified=unified)


def _own_paths(own: str) -> dict[str, bytes]:
    """Controller to path of this process's own cgroup, from lines like "4:memory:/x"; version 2 is ""."""
    paths: dict[str, bytes] = {}
    for line in own.splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            paths[name] = os.fsencode(path)
    return paths


def _mounts(mountinfo: str) -> Iterable[tuple[bytes, bytes, str, list[str]]]:
    """(root, mount point, "cgroup" or "cgroup2", superblock options) of each cgroup mount."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, rest = after.partition(" ")
        if kind in ("cgroup", "cgroup2"):
            fields = before.split(" ")
            yield _unescaped(fields[3]), _unescaped(fields[4]), kind, rest.split(" ")[-1].split(",")


def _inside(root: bytes, own: bytes | None) -> bytes | None:
    """Where a mount of `root` shows the cgroup `own`: b"" or b"/...", or None where it doesn't."""
    # A path that begins with /.. is outside of this process's cgroup namespace.
    if own is None or own.startswith(b"/..") or root.startswith(b"/.."):
        return None
    if root == b"/":
        return own.rstrip(b"/")
    if own == root or own.startswith(root + b"/"):
        return own[len(root) :]
    return None


def _unescaped(field: str) -> bytes:
    r"""Space, tab, newline and backslash are written as \040, \011, \012 and \134."""
    for code, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        field = field.replace(code, character)
    return os.fsencode(field)


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except FileNotFoundError:  # no /proc
        return ""


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
