"""Where cgroups of version 2 can be made.

Its rule that shapes this module: a cgroup that hands controllers to its children can hold no processes itself
(but for the root of the hierarchy). This process sits in a cgroup, so a base with controllers can only be
made - below its own cgroup, where that is the root, or once everything in it, being only this process and its
  descendants, has moved to a leaf of its own, `ringfence-self`;
- else in a scope that systemd is asked for, where it runs here and answers this user (`systemd`);
- else beside its own cgroup, where the parent is delegated to this user and hands out controllers already.
Neither is done to a cgroup that holds other processes or isn't writable for this user: there is a reason
instead.
"""

from __future__ import annotations

import os

from ringfence._value import Value
from ringfence.linux.cgroups import files
from ringfence.linux.cgroups.values import Controller

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ringfence.linux.cgroups.systemd import Systemd

__all__ = ["WANTED", "Home", "find_home", "is_ours", "words"]

# Handed out to every sandbox; the others only once one asks for them, as each makes a cgroup dearer.
WANTED = ("memory", "pids", "cpu")
# In every cgroup of version 2, without a controller.
_CORE = ("cpuacct", "freezer")
_BOOTED = "/run/systemd/system"  # sd_booted(3)
_HELP = "run it under: systemd-run --user --scope -p Delegate=yes, or have the cgroup delegated to this user"


class Home(Value):
    """Where the base can be made: path, and with which controllers. move: whether this process moves first.

    manager: of systemd, which has to be asked for a place first; path is the manager's own then. reason: why nowhere,
    or "".
    """

    __slots__ = ("controllers", "manager", "move", "path", "reason")
    path: bytes
    controllers: frozenset[str]
    move: bool
    manager: Systemd | None
    reason: str

    def __init__(
        self,
        *,
        path: bytes = b"",
        controllers: Iterable[str] = (),
        move: bool = False,
        manager: Systemd | None = None,
        reason: str = "",
    ) -> None:
        self._set(path=path, controllers=frozenset(controllers), move=move, manager=manager, reason=reason)

    def describe(self) -> str:
        """In words, for people; "" where there is none."""
        if self.reason:
            return ""
        if self.manager is not None:
            return f"in a scope that systemd is asked for by {self.manager.socket}, when a limit is first needed"
        moved = ", once this process is in a leaf of it" if self.move else ""
        return f"below {os.fsdecode(self.path)}{moved}"

    def judge(self, name: str, own: bytes) -> Controller:
        """Whether ringfence can make cgroups with that controller. own: this process's."""
        reason = self.reason
        if not reason and name not in _CORE and name not in self.controllers:
            reason = f"the {name} controller isn't delegated to {os.fsdecode(self.path)}"
        return Controller(
            name=name, version=2, path=own, usable=not reason, reason=reason, help=_HELP if reason else ""
        )


def find_home(own: bytes, mount: bytes | None = None) -> Home:
    """Where a base can be made for a process whose own cgroup is at `own`. Changes nothing.

    mount: where the root of the hierarchy is mounted, to ask systemd; None asks nobody.
    """
    fd = files.open_directory(own)
    try:
        reason = _not_writable(own)
        offered = words(fd, "cgroup.controllers")
        # Only the root has no cgroup.type.
        kind = files.read(fd, "cgroup.type")
        others = 0 if kind is None else len([pid for pid in files.read_pids(fd) if not is_ours(pid)])
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
    manager = _systemd(mount)
    if not isinstance(manager, str):
        return Home(path=manager.path, controllers=manager.controllers, manager=manager)
    parent = os.path.dirname(own)
    if os.path.exists(parent + b"/cgroup.subtree_control") and not _not_writable(parent):
        parent_fd = files.open_directory(parent)
        try:
            handed_out = words(parent_fd, "cgroup.subtree_control")
        finally:
            os.close(parent_fd)
        if handed_out & set(WANTED):
            return Home(path=parent, controllers=handed_out)
    return Home(reason=f"{reason}, and {manager}" if manager else reason)


def _systemd(mount: bytes | None) -> Systemd | str:
    """The manager to ask, or why there is none; "" where nobody would expect one."""
    if mount is None or not os.path.isdir(_BOOTED):
        return ""
    from ringfence.linux.cgroups import systemd

    return systemd.find(mount)


def is_ours(pid: int) -> bool:
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
            return _is_gone(pid)  # and in nobody's way
    return pid == own


def _is_gone(pid: int) -> bool:
    """That /proc doesn't show a process doesn't mean that there is none: proc(5), hidepid."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _not_writable(path: bytes) -> str:
    """Why a base can't be made in that cgroup: all three have to be delegated, says cgroup-v2.rst."""
    reason = files.may_make_directories(path)
    for name in (b"cgroup.procs", b"cgroup.subtree_control"):
        if not reason and not os.access(path + b"/" + name, os.W_OK, effective_ids=True):
            reason = f"{os.fsdecode(path + b'/' + name)} isn't writable for this user (not delegated)"
    return reason


def words(fd: int, name: str) -> set[str]:
    return set((files.read(fd, name) or "").split())
