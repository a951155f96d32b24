"""Ids that no account has: each running sandbox of a privileged caller gets a slot of its own.

The ids begin at 0x70000000 (1879048192), past the last range that systemd assigns to containers and below the one
that it keeps for foreign images (systemd's UIDS-GIDS.md). A slot is held by a lock on one byte of a file, an open file
description lock (fcntl(2)): the kernel gives it up with the last process that holds the file open, however that ended.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading

from ringfence.errors import KernelError

__all__ = ["SLOTS", "Slots", "container_base", "process_uid", "slots"]

_PROCESS_BASE = 0x70000000
_CONTAINER_BASE = 0x71000000
CONTAINER_IDS = 65536
# As many as fit below 0x7FFE0000, where the ids of foreign images begin.
SLOTS = (0x7FFE0000 - _CONTAINER_BASE) // CONTAINER_IDS
_FOLDER = "/run/ringfence"
_F_OFD_SETLK = 37


def process_uid(slot: int) -> int:
    """The uid, and gid, of a workload at the process level."""
    return _PROCESS_BASE + slot


def container_base(slot: int) -> int:
    """The host's id of a container's id 0; CONTAINER_IDS follow."""
    return _CONTAINER_BASE + slot * CONTAINER_IDS


class Slots:
    """The slots that this process holds. `fileno()` must stay open in whoever outlives it with sandboxes running."""

    def __init__(self, folder: str = _FOLDER) -> None:
        os.makedirs(folder, mode=0o755, exist_ok=True)
        self._fd = os.open(os.path.join(folder, "ids.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._free: list[int] = []
        # Where to look next: spread, so that two processes don't walk over each other's slots.
        self._next = os.getpid() * 61 % SLOTS
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._fd

    def take(self) -> int:
        """A slot that nobody else on this host has. KernelError (EAGAIN) where all are taken."""
        with self._lock:
            if self._free:
                return self._free.pop()
            for _ in range(SLOTS):
                slot = self._next
                self._next = (slot + 1) % SLOTS
                if self._try(slot):
                    return slot
        raise KernelError("fcntl", ["F_OFD_SETLK"], errno.EAGAIN, f"all {SLOTS} sandbox ids of this host are taken")

    def give_back(self, slot: int) -> None:
        """The sandbox is gone. The slot stays locked, for the next sandbox of this process."""
        with self._lock:
            self._free.append(slot)

    def _try(self, slot: int) -> bool:
        # struct flock: l_type, l_whence, l_start, l_len, l_pid.
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, slot, 1, 0)
        try:
            fcntl.fcntl(self._fd, _F_OFD_SETLK, lock)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise KernelError("fcntl", ["F_OFD_SETLK"], error.errno or 0) from None
        return True

    def close(self) -> None:
        os.close(self._fd)


_slots: Slots | None = None
_lock = threading.Lock()


def slots() -> Slots:
    """This process's slots, opened on first use."""
    global _slots
    with _lock:
        if _slots is None:
            _slots = Slots()
        return _slots


def _after_fork_in_child() -> None:
    # The child shares the parent's open file description, and with it the locks: it must take slots of its own.
    global _slots, _lock
    _lock = threading.Lock()
    if _slots is not None:
        _slots.close()
        _slots = None


os.register_at_fork(after_in_child=_after_fork_in_child)
