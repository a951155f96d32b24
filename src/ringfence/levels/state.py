"""What this process keeps for all its sandboxes: the launcher, a run folder, cgroups, ids.

Each is handed to the launcher as it is made, so that it is gone when this process is, however it ended.
"""

from __future__ import annotations

import atexit
import os
import stat
from _thread import allocate_lock

from ringfence.errors import KernelError, RingfenceError
from ringfence.levels import leftovers
from ringfence.levels.ready import Ready
from ringfence.levels.workdir import WorkDirectory
from ringfence.linux import cgroups, ids
from ringfence.wire import messages
from ringfence.wire.launcher import OWN_CGROUP, OWN_HELD, OWN_LEAF, OWN_TREE, Launcher, end_launcher, launcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeVar

    from ringfence.linux.cgroups import Cgroup, Limits, Manager

    _Kind = TypeVar("_Kind")
    _One = TypeVar("_One")

__all__ = ["Berth", "State", "state", "work_folder"]

# Berths kept of each kind, cgroups kept of each set of limits.
_MOST_KEPT = 64


class Berth:
    """What a sandbox occupies on the host, and the next one can have after it: ids and an empty work directory.

    slot: of ids, or None. rulesets: Landlock rulesets made for this work directory, by what else they say.
    """

    __slots__ = ("kind", "name", "rulesets", "slot", "workdir")

    def __init__(self, kind: str, name: bytes, slot: int | None, workdir: WorkDirectory) -> None:
        self.kind = kind
        self.name = name
        self.slot = slot
        self.workdir = workdir
        self.rulesets: dict[str, int] = {}


class State:
    """One for each process; a forked child makes its own. Should the launcher die, it goes on with another one."""

    def __init__(self, helper: Launcher) -> None:
        self.launcher = helper
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self.lock = allocate_lock()
        self.pid = os.getpid()
        self.ready = Ready()
        self._count = 0
        self._manager: Manager | None = None
        self._berths: dict[str, list[Berth]] = {}
        self._cgroups: dict[Limits, list[Cgroup]] = {}
        parent = work_folder(passable=helper.own_mounts)
        self._parent_fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # What the launcher was told to remove: (kind, directory that it is in, name).
        self._owned: list[tuple[int, int, bytes]] = []
        try:
            self.run_fd = self._make_folder()
        except BaseException:
            os.close(self._parent_fd)
            os.close(self.null)
            raise
        self.run_path = os.path.join(os.path.realpath(parent), self._name)
        self._equip(helper)

    def _make_folder(self) -> int:
        """The run folder, held."""
        while True:
            # One name for it and the cgroups: what bears it is dead once the folder's lock is free.
            self._name = b"ringfence-%d-%s" % (self.pid, os.urandom(8).hex().encode())
            # The launcher first: a folder that it doesn't know of would outlive a SIGKILL.
            self._own(OWN_TREE, self._parent_fd, self._name)
            os.mkdir(self._name, 0o700, dir_fd=self._parent_fd)
            try:
                made = os.open(self._name, leftovers.FOLDER, dir_fd=self._parent_fd)
            except FileNotFoundError:
                continue
            if leftovers.hold(made):
                return made
            os.close(made)

    def _equip(self, helper: Launcher) -> None:
        """What a launcher needs of us as root: the locks of our ids, and the run folder in its mount namespace."""
        if helper.own_mounts:
            helper.own(OWN_HELD, ids.slots().fileno(), b"ids")
            flags = messages.NOSUID | messages.NODEV
            helper.template(b"run", [messages.bind(b"/", self.run_path, flags)])

    def _own(self, kind: int, parent_fd: int, name: bytes) -> None:
        # The list first: should the launcher die in between, it is by the list that the next one hears of it.
        one = (kind, parent_fd, name)
        self._owned.append(one)
        try:
            self.launcher.own(*one)
        except BaseException:
            self._owned.remove(one)
            raise

    def take(self, helper: Launcher) -> None:
        """The launcher died before its time: another one takes over what that one had to remove."""
        self.ready.clear()
        # The folder last: should this one be killed as well meanwhile, it is by the folder that the rest is found.
        for kind, parent_fd, name in sorted(self._owned, key=lambda one: one[0] == OWN_TREE):
            helper.own(kind, parent_fd, name)
        self._equip(helper)
        with self.lock:
            if self._manager is not None and self._manager.asks:
                # systemd's scope was the launcher's, and ended with it.
                self._manager, self._cgroups = None, {}
        self.launcher = helper

    def adopt_leftovers(self) -> None:
        """Has the launcher remove, with what is ours, what others left who died together with their launchers."""
        for name, parents in leftovers.find(self._parent_fd):
            try:
                for parent_fd in parents:
                    self.launcher.own(OWN_CGROUP, parent_fd, name)
                # The folder last: until then it is what tells of the others.
                self.launcher.own(OWN_TREE, self._parent_fd, name)
            finally:
                for parent_fd in parents:
                    os.close(parent_fd)

    def _kept(self, all_kept: Mapping[_Kind, list[_One]], kind: _Kind) -> _One | None:
        """One that an earlier sandbox left, and that is the caller's from now on."""
        with self.lock:
            free = all_kept.get(kind)
            return free.pop() if free else None

    # ---- berths ----

    def berth(self, kind: str, owner_of: Callable[[int], tuple[int, int]] | None) -> Berth:
        """A place for a sandbox: one that an earlier sandbox left clean, or a new one.

        kind: berths are used again for the same kind only. owner_of: who owns the work directory, by the slot of ids;
        None where ringfence isn't privileged: then there is no slot, and the owner is the caller.
        """
        while (kept := self._kept(self._berths, kind)) is not None:
            if _is_pristine(kept.workdir):
                return kept
            self.drop(kept)
        with self.lock:
            self._count += 1
            name = b"w%d" % self._count
        slot = ids.slots().take() if owner_of is not None else None
        try:
            owner = owner_of(slot) if owner_of is not None and slot is not None else None
            return Berth(kind, name, slot, WorkDirectory(self.run_fd, name, owner))
        except BaseException:
            if slot is not None:
                ids.slots().give_back(slot)
            raise

    def leave(self, berth: Berth) -> None:
        """The sandbox is gone. Its berth is kept where nothing of it shows, and removed otherwise. The next one looks
        once more, when nobody waits for it.
        """
        if berth.workdir.is_untouched() or (_is_pristine(berth.workdir) and berth.workdir.renew()):
            with self.lock:
                free = self._berths.setdefault(berth.kind, [])
                if len(free) < _MOST_KEPT:
                    free.append(berth)
                    return
        self.drop(berth)

    def drop(self, berth: Berth) -> None:
        """Removes it."""
        for fd in berth.rulesets.values():
            os.close(fd)
        try:
            berth.workdir.remove()
        except OSError:
            return  # something of it stays until the launcher removes it, and so do its ids
        if berth.slot is not None:
            ids.slots().give_back(berth.slot)

    def folder(self, owner: tuple[int, int]) -> WorkDirectory:
        """A folder that is a sandbox's own and never another one's; its user removes it."""
        with self.lock:
            self._count += 1
            name = b"o%d" % self._count
        return WorkDirectory(self.run_fd, name, owner)

    # ---- cgroups ----

    def cgroup(self, limits: Limits, *, live: bool = False, timed: bool = False) -> Cgroup | None:
        """A sandbox's cgroup; None where nothing is limited and nothing can be measured here.

        live: for a sandbox whose limits may be changed, or that may be frozen. timed: whether its CPU time is limited.
        systemd isn't asked for a place where all that would be done there is to measure.
        """
        while not live and (kept := self._kept(self._cgroups, limits)) is not None:
            try:
                if kept.is_clean():
                    kept.renew()
                    return kept
            except OSError:
                pass  # it was removed by somebody
            self._remove_cgroup(kept)
        with self.lock:
            if self._manager is None:
                self._manager = cgroups.open_manager(cgroups.layout(), self._claim_cgroup, self.launcher.pid)
                self._manager.base_name = self._name
            if not any(one.usable for one in self._manager.layout.controllers):
                return None
            needed = timed or limits is not cgroups.NO_LIMITS
            asks = self._manager.asks
            if asks and not needed and not live:
                return None
            try:
                return self._manager.create(limits, live=live)
            except KernelError:
                # A sandbox that stays may want to be paused later. That it can't be is told then.
                if needed or not asks:
                    raise
                return None

    def _claim_cgroup(self, parent_fd: int, name: bytes, leaf: bool = False) -> None:
        if not leaf:
            leftovers.note(self.run_fd, parent_fd)
        self._own(OWN_LEAF if leaf else OWN_CGROUP, parent_fd, name)

    def leave_cgroup(self, cgroup: Cgroup) -> None:
        """The sandbox is gone. Its cgroup is kept for another one under the same limits, or removed."""
        if cgroup.lasts:
            with self.lock:
                free = self._cgroups.setdefault(cgroup.limits, [])
                if len(free) < _MOST_KEPT and len(self._cgroups) <= _MOST_KEPT:
                    free.append(cgroup)
                    return
        self._remove_cgroup(cgroup)

    def _remove_cgroup(self, cgroup: Cgroup) -> None:
        if not cgroup.remove():
            cgroup.kill()
            cgroup.remove()

    def template(self, name: bytes, make: Callable[[], Sequence[messages.MountStep]]) -> None:
        """Makes a tree in the launcher's namespace, unless it is there."""
        if name in self.launcher.templates:
            return
        with self.lock:
            if name in self.launcher.templates:
                return
            self.launcher.template(name, make())


def _is_pristine(workdir: WorkDirectory) -> bool:
    """What can't be looked at is none."""
    try:
        return workdir.is_pristine()
    except OSError:
        return False


def work_folder(*, passable: bool) -> bytes:
    """Where the run folder is, and so all work directories: $TMPDIR, else /tmp. passable: only one that a workload's
    own uid can pass through, which it has to as root.
    """
    wanted = os.environb.get(b"TMPDIR", b"/tmp")
    if not os.path.isabs(wanted) or not os.path.isdir(wanted):
        return b"/tmp"
    here = os.path.realpath(wanted)
    while passable and here != b"/":
        if not os.stat(here).st_mode & stat.S_IXOTH:
            return b"/tmp"
        here = os.path.dirname(here)
    return wanted


_state: State | None = None
_lock = allocate_lock()
# A launcher that dies at the very end has another one do its work, but not for ever.
_MOST_LAUNCHERS = 5


def state() -> State:
    """This process's state, made on first use."""
    global _state
    helper = launcher()
    found = _state
    if found is None or found.launcher is not helper:
        with _lock:
            if _state is None:
                _state = State(helper)
                atexit.register(_at_exit)
            elif _state.launcher is not helper:
                _state.take(helper)
            found = _state
    return found


def _at_exit() -> None:
    """The launcher ends, and removes everything; should it have died before, another one does."""
    for _ in range(_MOST_LAUNCHERS):
        try:
            found = state()
            found.adopt_leftovers()
        except (RingfenceError, OSError):
            continue  # this launcher is dead too
        if end_launcher():
            return


def _after_fork_in_child() -> None:
    global _state, _lock
    _lock = allocate_lock()
    if _state is not None:
        _state.ready.forget()
    _state = None
    atexit.unregister(_at_exit)


os.register_at_fork(after_in_child=_after_fork_in_child)
