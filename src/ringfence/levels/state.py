"""What this process keeps for all its sandboxes: the launcher, a run folder, cgroups, ids.

Each is handed to the launcher as it is made, so that it is gone when this process is, however it ended.
"""

from __future__ import annotations

import os
import threading

from ringfence.linux import cgroups, ids, mounts
from ringfence.wire import messages
from ringfence.wire.launcher import OWN_CGROUP, OWN_HELD, OWN_TREE, Launcher, launcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.linux.cgroups import Cgroup, Manager

__all__ = ["State", "state"]


class State:
    """Bound to one launcher: a new launcher (after a fork, or should one have died) gets a new State."""

    def __init__(self, helper: Launcher) -> None:
        self.launcher = helper
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self.lock = threading.Lock()
        self.pid = os.getpid()
        self._count = 0
        self._manager: Manager | None = None
        parent = os.environb.get(b"TMPDIR", b"/tmp")
        if not os.path.isabs(parent) or not os.path.isdir(parent):
            parent = b"/tmp"
        name = b"ringfence-%d-%s" % (self.pid, os.urandom(4).hex().encode())
        parent_fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # The launcher first: a folder that it doesn't know of would outlive a SIGKILL.
            helper.own(OWN_TREE, parent_fd, name)
            # Others may pass through, to a work directory that lets them in, but not look around.
            os.mkdir(name, 0o711, dir_fd=parent_fd)
            self.run_fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=parent_fd)
        finally:
            os.close(parent_fd)
        self.run_path = os.path.join(os.path.realpath(parent), name)
        if helper.own_mounts:
            helper.own(OWN_HELD, ids.slots().fileno(), b"ids")
            tree = mounts.clone_tree(self.run_path)
            try:
                flags = messages.NOSUID | messages.NODEV
                helper.template(b"run", [messages.bind(b"/", tree, flags)])
            finally:
                os.close(tree)

    def next_name(self) -> bytes:
        """A name that no other sandbox of this process has."""
        with self.lock:
            self._count += 1
            return b"w%d" % self._count

    def cgroup(self, *, memory_bytes: int | None, cpus: float | None, pids: int | None) -> Cgroup | None:
        """A new sandbox's cgroup; None where nothing is limited and nothing can be measured here."""
        with self.lock:
            if self._manager is None:
                self._manager = cgroups.open_manager(cgroups.layout())
                for base in self._manager.bases():
                    self.launcher.own(OWN_CGROUP, base.parent_fd, base.name)
            if not any(one.usable for one in self._manager.layout.controllers):
                return None
            return self._manager.create(memory_bytes=memory_bytes, cpus=cpus, pids=pids)

    def template(self, name: bytes, steps: Sequence[messages.MountStep]) -> None:
        """Makes a tree in the launcher's namespace, unless it is there."""
        with self.lock:
            if name not in self.launcher.templates:
                self.launcher.template(name, steps)


_state: State | None = None
_lock = threading.Lock()


def state() -> State:
    """This process's state, made on first use."""
    global _state
    helper = launcher()
    found = _state
    if found is None or found.launcher is not helper:
        with _lock:
            if _state is None or _state.launcher is not helper:
                _state = State(helper)
            found = _state
    return found


def _after_fork_in_child() -> None:
    global _state, _lock
    _lock = threading.Lock()
    _state = None


os.register_at_fork(after_in_child=_after_fork_in_child)
