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
import time

from ringfence._value import Closing
from ringfence.errors import KernelError
from ringfence.linux import read_text
from ringfence.linux.cgroups import files
from ringfence.linux.cgroups.values import (
    CONTROLLERS,
    NO_LIMITS,
    RULES,
    Base,
    Controller,
    InForce,
    Layout,
    Limits,
    Usage,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ringfence.linux.cgroups.home import Home

    Claim = Callable[..., None]

__all__ = ["CPU_PERIOD_US", "Cgroup", "Manager", "layout", "read_layout"]

# The kernel's own default period of the CPU quota, microseconds.
CPU_PERIOD_US = 100_000

# Controller to rules.
_RULES_OF = {
    "memory": ("memory", "swap"),
    "cpu": ("cpus", "cpu_weight"),
    "cpuset": ("cpuset",),
    "pids": ("pids",),
    "io": ("io_read", "io_write", "io_read_ops", "io_write_ops"),
}

_FIRST_WAIT_S = 0.0002
_LONGEST_WAIT_S = 0.02
# From the write to the last task being stopped; one in uninterruptible sleep is waited for.
_FREEZE_S = 5.0
# Where these are decides which version serves.
_CORE = {"memory", "pids", "cpu", "cpuacct"}
# What version 1 calls a controller, where that is another name.
_V1_NAMES = {"io": "blkio"}


class Manager(Closing, abc.ABC):
    """Makes the cgroups of this process's sandboxes. One for each process; `close` removes what it made."""

    version: int
    # What the base is called in each hierarchy; b"": a name of its own.
    base_name = b""

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
    def made(self) -> tuple[Base, ...]:
        """The base cgroups that are there by now."""

    @abc.abstractmethod
    def create(self, limits: Limits = NO_LIMITS, *, measure: bool = True, live: bool = False) -> Cgroup:
        """The cgroup of a new sandbox, its limits set and read back.

        measure: also where nothing is limited, so that `usage` knows memory and CPU time. live: with every controller
        that is usable, so that each limit can be changed later, and it can be frozen.
        A limit whose controller isn't usable raises KernelError; ask `usable` before.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Remove the base and its sandboxes. Raises KernelError EBUSY where one still has processes."""

    def _new_base(self, parent_fd: int) -> bytes:
        """Makes a base, claimed before; its name."""
        name = self.base_name or f"ringfence-{self.pid}-{os.urandom(4).hex()}".encode()
        if self._claim is not None:
            self._claim(parent_fd, name)
        files.make_directory(name, parent_fd)
        return name

    def _next_name(self) -> str:
        self._count += 1
        return f"s{self._count}"

    @property
    def asks(self) -> bool:
        """Whether somebody else, systemd, would have to be asked for the first cgroup."""
        return False


class Cgroup(abc.ABC):
    """The cgroup of one sandbox, in as many hierarchies as it takes.

    name: below the base. limits: as asked for. frozen: whether what is in it stands still, by `freeze`.
    It owns its descriptors; `remove` closes them.
    """

    name: str
    limits: Limits = NO_LIMITS
    frozen: bool = False

    def __init__(self, name: str, *, live: bool = False) -> None:
        self.name = name
        self._live = live
        self._changed = False  # by `update` or `freeze`: it isn't what a next sandbox asks for
        self._in_force: dict[str, InForce] = {}

    @property
    def in_force(self) -> tuple[InForce, ...]:
        """Each limit as read back."""
        return tuple(self._in_force[rule] for rule in RULES if rule in self._in_force)

    def limit(self, limits: Limits) -> None:
        """Sets each limit that isn't None, and reads it back. Raises KernelError."""
        self.limits = self.limits.changed_by(limits)
        for name in sorted(limits.controllers()):
            self._set_limits(name, self.limits)

    def update(self, limits: Limits) -> tuple[InForce, ...]:
        """Changes the limits of what runs in it; a None leaves its rule as it is. All that is in force afterwards.

        Raises KernelError, and all is as before then: ENOTSUP where it was made without the controller (`live` has all
        that are usable), EBUSY where more memory is in use than it is to have.
        """
        before, told = self.limits, dict(self._in_force)
        try:
            self.limit(limits)
        except BaseException as error:
            self.limits = before
            lost = [name for name in sorted(limits.controllers()) if not self._put_back(name, before)]
            self._in_force = told
            for rule in [one for name in lost for one in _RULES_OF[name] if one in told]:
                told[rule] = told[rule].replace(effective=None)
            if lost:
                error.add_note(f"what was before can't be set again either: {', '.join(lost)}")
            raise
        finally:
            self._changed = True
        return self.in_force

    def _put_back(self, controller: str, before: Limits) -> bool:
        """Whether all that a controller limits is as it was. The first error is the one to tell."""
        for rule in _RULES_OF[controller]:
            if not rule.startswith("io_"):
                # As if it were in force: that it was set may not have been noted, and what isn't in force isn't undone.
                self._in_force.setdefault(rule, InForce(rule=rule, requested=0, effective=None, mechanism=""))
        try:
            self._set_limits(controller, before)
        except KernelError as error:
            return error.errno in (errno.ENOTSUP, errno.ENOENT)  # it was made without that controller
        return True

    def _note(
        self, rule: str, requested: int | float | tuple[int, ...] | None, effective: object, mechanism: str
    ) -> None:
        """What a rule came to. requested None: it isn't limited, and isn't told."""
        if requested is None:
            self._in_force.pop(rule, None)
        else:
            found: InForce = InForce(rule=rule, requested=requested, effective=effective, mechanism=mechanism)  # type: ignore[arg-type]
            self._in_force[rule] = found

    @abc.abstractmethod
    def _set_limits(self, controller: str, limits: Limits) -> None:
        """Sets all that a controller limits, None to no limit, and notes what is read back. Raises KernelError."""

    def freeze(self) -> None:
        """Stops all that is in it; once it returns, nothing of it runs, until `thaw`.

        Raises KernelError: ENOTSUP where it was made without a freezer (`live` has one), EBUSY where a task doesn't
        stop within 5 s; it runs on then.
        """
        self._write_freezer(True)
        self.frozen = self._changed = True
        deadline = time.monotonic() + _FREEZE_S
        wait = _FIRST_WAIT_S
        while not self._is_frozen():
            if time.monotonic() >= deadline:
                self.thaw()
                raise KernelError("freeze", (self.name,), errno.EBUSY, "one of its processes hangs in the kernel")
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_S)

    def thaw(self) -> None:
        """Lets it go on. One that isn't frozen is left alone."""
        if self.frozen:
            self._write_freezer(False)
            self.frozen = False

    @abc.abstractmethod
    def _write_freezer(self, frozen: bool) -> None:
        """Raises KernelError."""

    @abc.abstractmethod
    def _is_frozen(self) -> bool:
        """Whether nothing of it runs."""

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

    @property
    def lasts(self) -> bool:
        """Whether it may be kept for another sandbox under the same limits, which can have it once it `is_clean`."""
        # Version 2 can't reset memory.peak before Linux 6.12, and its directory is one, not four.
        return False

    def is_clean(self) -> bool:
        """Whether another sandbox can have it, once it is `renew`ed: nothing is in it, and nothing that counts was
        left. Otherwise it is to be removed. Raises OSError.
        """
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
        import signal

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
                # Only now: what version 1 has frozen takes its signal when it thaws, and does nothing else before.
                self.thaw()
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
    paths = _own_paths(own)
    first: dict[str, bytes] = {}
    unified = b""
    mount: bytes | None = None
    foreign: set[str] = set()
    for root, mountpoint, kind, options in _mounts(mountinfo):
        names = [""] if kind == "cgroup2" else [name for name in CONTROLLERS if _V1_NAMES.get(name, name) in options]
        for name in names:
            inside = _inside(root, paths.get(_V1_NAMES.get(name, name)))
            if inside is None:
                foreign.add(name)
            elif name and name not in first:
                first[name] = mountpoint + inside
            elif not name and not unified:
                unified = mountpoint + inside
                mount = mountpoint if root == b"/" else None
    # A v1 mount of what nobody needs (a freezer for an old tool) doesn't make a host a hybrid one.
    one = bool((first.keys() | foreign) & _CORE)
    kind = "hybrid" if one and unified else "v1" if one else "v2" if unified else "none"
    home: Home | None = None
    if kind == "v2":
        from ringfence.linux.cgroups.home import find_home

        home = find_home(unified, mount)
    controllers = []
    for name in CONTROLLERS:
        if home is not None:
            controllers.append(home.judge(name, unified))
        elif name in first:
            controllers.append(_judge_v1(name, first[name]))
        else:
            reason = f"no {name} controller is mounted here"
            if name in foreign:
                reason = f"the {name} hierarchy that is mounted here doesn't show this process's own cgroup"
            elif unified:
                reason = f"the {name} controller isn't in version 1, as the others are (a mixed layout)"
            controllers.append(Controller(name=name, version=0, path=b"", usable=False, reason=reason))
    shown = home.describe() if home is not None else _v1_home(controllers)
    asks = home is not None and home.manager is not None
    return Layout(kind=kind, controllers=tuple(controllers), unified=unified, mount=mount, home=shown, by_systemd=asks)


def _judge_v1(name: str, path: bytes) -> Controller:
    from ringfence.linux.cgroups import v1

    return v1.judge(name, path)


def _v1_home(controllers: Iterable[Controller]) -> str:
    return "below this process's own, in each hierarchy" if any(one.usable for one in controllers) else ""


def _own_paths(own: str) -> dict[str, bytes]:
    """Controller to path of this process's own cgroup, from lines like "4:memory:/x"; version 2 is ""."""
    paths: dict[str, bytes] = {}
    for line in filter(None, own.split("\n")):
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            paths[name] = os.fsencode(path)
    return paths


def _mounts(mountinfo: str) -> Iterable[tuple[bytes, bytes, str, list[str]]]:
    """(root, mount point, "cgroup" or "cgroup2", superblock options) of each cgroup mount."""
    # Names in other lines may hold what splitlines ends a line at: only blank, tab, newline and backslash are escaped.
    for line in mountinfo.split("\n"):
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
        return read_text(path)
    except FileNotFoundError:  # no /proc
        return ""
