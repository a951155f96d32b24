"""Cgroups of version 2: one hierarchy for all controllers.

Its rule that shapes this module: a cgroup that hands controllers to its children can hold no processes itself
(but for the root of the hierarchy). This process sits in a cgroup, so a base with controllers can only be
made - below its own cgroup, where that is the root, or once everything in it, being only this process and its
  descendants, has moved to a leaf of its own, `ringfence-self`;
- else beside its own cgroup, where the parent is delegated to this user and hands out controllers already.
Neither is done to a cgroup that holds other processes or isn't writable for this user: there is a reason
instead.
"""

from __future__ import annotations

import errno
import os
import time

from ringfence._value import Value
from ringfence.errors import KernelError
from ringfence.linux.cgroups import base
from ringfence.linux.cgroups.base import Base, Cgroup, Controller, InForce, Layout, Manager, Usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Home", "V2Cgroup", "V2Manager", "find_home", "judge"]

_WANTED = ("memory", "pids", "cpu")
_SELF = "ringfence-self"
_MOVE_ROUNDS = 10
_HELP = "run it under: systemd-run --user --scope -p Delegate=yes"


class Home(Value):
    """Where the base can be made: path, and with which controllers. move: whether this process moves first.

    reason: why nowhere, or "".
    """

    __slots__ = ("controllers", "move", "path", "reason")
    path: bytes
    controllers: frozenset[str]
    move: bool
    reason: str

    def __init__(
        self,
        *,
        path: bytes = b"",
        controllers: Iterable[str] = (),
        move: bool = False,
        reason: str = "",
    ) -> None:
        self._set(path=path, controllers=frozenset(controllers), move=move, reason=reason)


def find_home(own: bytes) -> Home:
    """Where a base can be made for a process whose own cgroup is at `own`. Changes nothing."""
    fd = base.open_directory(own)
    try:
        reason = _not_writable(own)
        offered = _words(fd, "cgroup.controllers")
        # Only the root has no cgroup.type.
        kind = base.read(fd, "cgroup.type")
        others = 0 if kind is None else len([pid for pid in base.read_pids(fd) if not _is_ours(pid)])
    finally:
        os.close(fd)
    if not reason and kind is None:
        return Home(path=own, controllers=offered)
    if not reason and kind is not None and kind.strip() != "domain":
        reason = f"this process's own cgroup is of type {kind.strip()}"
    if not reason and others:
        reason = f"this process's own cgroup holds {others} other processes"
    if not reason:
        return Home(path=own, controllers=offered, move=True)
    parent = os.path.dirname(own)
    if os.path.exists(parent + b"/cgroup.subtree_control") and not _not_writable(parent):
        parent_fd = base.open_directory(parent)
        try:
            handed_out = _words(parent_fd, "cgroup.subtree_control")
        finally:
            os.close(parent_fd)
        if handed_out & set(_WANTED):
            return Home(path=parent, controllers=handed_out)
    return Home(reason=reason)


def judge(name: str, own: bytes, home: Home) -> Controller:
    """Whether ringfence can make cgroups with that controller."""
    reason = home.reason
    # The CPU time is in every cgroup's cpu.stat.
    if not reason and name != "cpuacct" and name not in home.controllers:
        reason = f"the {name} controller isn't delegated to {os.fsdecode(home.path)}"
    return Controller(name=name, version=2, path=own, usable=not reason, reason=reason, help=_HELP if reason else "")


class V2Manager(Manager):
    """One base, with the controllers that its home hands out."""

    version = 2

    def __init__(self, found: Layout, home: Home | None = None, claim: Callable[..., None] | None = None) -> None:
        super().__init__(found, claim)
        self._home = home if home is not None else find_home(found.unified)
        self._base: Base | None = None
        self._moved = False

    def bases(self) -> tuple[Base, ...]:
        return () if self._home.reason else (self._made_base(),)

    def _made_base(self) -> Base:
        if self._base is None:
            if self._home.reason:
                raise KernelError("mkdir", ("cgroup",), errno.EACCES, self._home.reason)
            wanted = [name for name in _WANTED if name in self._home.controllers]
            parent_fd = base.open_directory(self._home.path)
            name = b""
            made = -1
            try:
                if self._home.move and wanted:
                    self._move_to_leaf(parent_fd)
                _hand_out(parent_fd, wanted)
                name = self._new_base(parent_fd)
                made = base.open_directory(name, parent_fd)
                _hand_out(made, wanted)
            except BaseException:
                if made >= 0:
                    os.close(made)
                if name:
                    base.remove_directory(name, parent_fd)
                self._move_back(parent_fd)
                os.close(parent_fd)
                raise
            self._base = Base(fd=made, name=name, parent_fd=parent_fd)
        return self._base

    def create(
        self,
        *,
        memory_bytes: int | None = None,
        cpus: float | None = None,
        pids: int | None = None,
        measure: bool = True,
    ) -> V2Cgroup:
        for name, value in (("memory", memory_bytes), ("cpu", cpus), ("pids", pids)):
            if value is not None and name not in self._home.controllers:
                raise KernelError("mkdir", (name,), errno.ENOTSUP, self.usable(name).reason)
        parent = self._made_base()
        name = self._next_name()
        base.make_directory(name, parent.fd)
        made = V2Cgroup(name, parent.fd)
        try:
            made.limit(memory_bytes, cpus, pids)
        except BaseException:
            made.remove()
            raise
        return made

    def close(self) -> None:
        if self._base is None:
            return
        base.remove_children(self._base.fd)
        base.remove_directory(self._base.name, self._base.parent_fd)
        self._move_back(self._base.parent_fd)
        os.close(self._base.fd)
        os.close(self._base.parent_fd)
        self._base = None

    def _move_to_leaf(self, own_fd: int) -> None:
        """Make room: this process and its descendants go to a leaf, still under the same limits."""
        if self._claim is not None:
            self._claim(own_fd, os.fsencode(_SELF), True)
        base.make_directory(_SELF, own_fd)
        self._moved = True
        leaf_fd = base.open_directory(_SELF, own_fd)
        try:
            _move(own_fd, leaf_fd)
        finally:
            os.close(leaf_fd)

    def _move_back(self, own_fd: int) -> None:
        if not self._moved:
            return
        self._moved = False
        for name in _words(own_fd, "cgroup.subtree_control"):
            base.set_and_read(own_fd, "cgroup.subtree_control", f"-{name}")
        leaf_fd = base.open_directory(_SELF, own_fd)
        try:
            _move(leaf_fd, own_fd)
        finally:
            os.close(leaf_fd)
        base.remove_directory(_SELF, own_fd)


class V2Cgroup(Cgroup):
    """One directory, with all the controllers that its base hands out."""

    def __init__(self, name: str, parent_fd: int) -> None:
        self.name = name
        self.in_force = ()
        self._prefix = name + "/"
        self._parent_fd = parent_fd
        self._join: tuple[int, ...] = ()
        self._cpu_fd = -1

    def limit(self, memory_bytes: int | None, cpus: float | None, pids: int | None) -> None:
        """Set each limit that isn't None, and read it back."""
        found = []
        if memory_bytes is not None:
            found.append(self._limit_memory(memory_bytes))
        if cpus is not None:
            quota = f"{round(cpus * base.CPU_PERIOD_US)} {base.CPU_PERIOD_US}"
            used, period = self._set("cpu.max", quota).split()
            found.append(
                InForce(
                    rule="cpus",
                    requested=cpus,
                    effective=None if used == "max" else int(used) / int(period),
                    mechanism="cgroup v2 cpu.max",
                )
            )
        if pids is not None:
            effective = _number_or_max(self._set("pids.max", str(pids)))
            found.append(InForce(rule="pids", requested=pids, effective=effective, mechanism="cgroup v2 pids.max"))
        self.in_force = tuple(found)

    def _limit_memory(self, memory_bytes: int) -> InForce:
        limit = _number_or_max(self._set("memory.max", str(memory_bytes)))
        mechanism = "cgroup v2 memory.max"
        try:
            swap = _number_or_max(self._set("memory.swap.max", "0"))
            limit = None if limit is None or swap is None else limit + swap
            mechanism += " and memory.swap.max"
        except KernelError as error:
            # No such file: this kernel has no swap, or doesn't count it, which _has_swap tells apart.
            if error.errno != errno.ENOENT or _has_swap():
                raise
        # At the limit all of the sandbox dies, not one process of it: it has one cause of death. Linux 4.19.
        if base.read(self._parent_fd, self._prefix + "memory.oom.group") is not None:
            self._set("memory.oom.group", "1")
        return InForce(rule="memory", requested=memory_bytes, effective=limit, mechanism=mechanism)

    def join_fds(self) -> tuple[int, ...]:
        if not self._join:
            self._join = (base.open_to_write(self._prefix + "cgroup.procs", self._parent_fd),)
        return self._join

    def cpu_fd(self) -> int:
        if self._cpu_fd < 0:
            self._cpu_fd = base.open_to_read(self._prefix + "cpu.stat", self._parent_fd)
        return self._cpu_fd

    def cpu_ns(self) -> int | None:
        key, value = os.pread(self.cpu_fd(), 4096, 0).split(maxsplit=2)[:2]
        return int(value) * 1000 if key == b"usage_usec" else None

    def usage(self) -> Usage:
        throttled_us = base.read_keyed(self._parent_fd, self._prefix + "cpu.stat").get("throttled_usec")
        return Usage(
            # memory.peak needs Linux 5.19, pids.peak 6.1; older kernels don't say.
            memory_peak_bytes=base.read_number(self._parent_fd, self._prefix + "memory.peak"),
            memory_bytes=base.read_number(self._parent_fd, self._prefix + "memory.current"),
            cpu_ns=self.cpu_ns(),
            oom_kills=base.read_keyed(self._parent_fd, self._prefix + "memory.events").get("oom_kill"),
            pids_peak=base.read_number(self._parent_fd, self._prefix + "pids.peak"),
            pids_refused=base.read_keyed(self._parent_fd, self._prefix + "pids.events").get("max"),
            throttled_ns=None if throttled_us is None else throttled_us * 1000,
            source="cgroup v2",
        )

    def processes(self) -> set[int]:
        return base.read_pids(self._parent_fd, self._prefix)

    def kill(self, timeout_s: float = 2.0) -> None:
        try:
            fd = base.open_to_write(self._prefix + "cgroup.kill", self._parent_fd)
        except FileNotFoundError:  # before Linux 5.14
            self._kill_each(timeout_s)
            return
        deadline = time.monotonic() + timeout_s
        try:
            while self.processes():
                os.write(fd, b"1")
                self._pause(deadline)
        finally:
            os.close(fd)

    def _rmdir(self) -> None:
        base.rmdir_if_there(self.name, self._parent_fd)

    def _close(self) -> None:
        for fd in (*self._join, *([self._cpu_fd] if self._cpu_fd >= 0 else [])):
            os.close(fd)
        self._join, self._cpu_fd = (), -1

    def _set(self, name: str, value: str) -> str:
        return base.set_and_read(self._parent_fd, self._prefix + name, value)


def _hand_out(fd: int, controllers: Iterable[str]) -> None:
    """Let a cgroup's children have those controllers. Raises KernelError; EBUSY with processes in it."""
    missing = [name for name in controllers if name not in _words(fd, "cgroup.subtree_control")]
    if missing:
        base.set_and_read(fd, "cgroup.subtree_control", " ".join(f"+{name}" for name in missing))


def _move(from_fd: int, to_fd: int) -> None:
    """Move this process and its descendants from one cgroup to another, until none is left there."""
    for _ in range(_MOVE_ROUNDS):
        pids = [pid for pid in base.read_pids(from_fd) if _is_ours(pid)]
        if not pids:
            return
        fd = base.open_to_write("cgroup.procs", to_fd)
        try:
            for pid in pids:
                try:
                    os.write(fd, str(pid).encode())
                except ProcessLookupError:
                    continue
                except OSError as error:
                    raise KernelError("write", ("cgroup.procs", pid), error.errno or 0) from error
        finally:
            os.close(fd)


def _is_ours(pid: int) -> bool:
    """Whether it is this process or a descendant of it."""
    own = os.getpid()
    while pid > 1:
        if pid == own:
            return True
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                # The command's name, in parentheses, can have spaces and parentheses itself.
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return True  # gone, so it is in nobody's way
    return pid == own


def _not_writable(path: bytes) -> str:
    """Why a base can't be made in that cgroup: all three have to be delegated, says cgroup-v2.rst."""
    reason = base.may_make_directories(path)
    for name in (b"cgroup.procs", b"cgroup.subtree_control"):
        if not reason and not os.access(path + b"/" + name, os.W_OK, effective_ids=True):
            reason = f"{os.fsdecode(path + b'/' + name)} isn't writable for this user (not delegated)"
    return reason


def _words(fd: int, name: str) -> set[str]:
    return set((base.read(fd, name) or "").split())


def _number_or_max(text: str) -> int | None:
    return None if text == "max" else int(text)


def _has_swap() -> bool:
    try:
        with open("/proc/swaps", "rb") as file:
            return len(file.read().splitlines()) > 1
    except OSError:
        return True  # unknown, so the limit might leak into swap
