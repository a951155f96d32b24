"""Ids that no account has: each running sandbox of a privileged caller gets a slot of its own, 65,536 of them.

They begin at 0x71000000 (1895825408), past the last range that systemd assigns to containers and below the one that it
keeps for foreign images (systemd's UIDS-GIDS.md); or they are the range that /etc/subuid and /etc/subgid give to the
name `ringfence`, as Docker has it with `dockremap`. A slot is held by a lock on its ids as bytes of a file, an open
file description lock (fcntl(2)): the kernel gives it up with the last process that holds the file open, however that
ended.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from _thread import allocate_lock

from ringfence._value import Value
from ringfence.errors import KernelError
from ringfence.linux import subids

__all__ = [
    "CONTAINER_IDS",
    "Range",
    "Slots",
    "anybody_has",
    "container_base",
    "process_uid",
    "range_",
    "slots",
    "whose",
    "why_not",
]

CONTAINER_IDS = 65536
# Up to 0x7FFE0000, where the ids of foreign images begin.
_FIRST, _COUNT = 0x71000000, 0x7FFE0000 - 0x71000000
# Below are accounts and what systemd hands out; above is more than a signed uid holds. The launcher insists on both.
_LOWEST, _HIGHEST = 65536, 2**31 - 1
_NAME = "ringfence"
_FOLDER = "/run/ringfence"
_F_OFD_SETLK = 37


class Range(Value):
    """The ids of all sandboxes, and where that is said. problem, help: why they can't be used, or ""."""

    __slots__ = ("count", "first", "help", "problem", "source")
    first: int
    count: int
    source: str
    problem: str
    help: str

    def __init__(self, *, first: int, count: int, source: str, problem: str = "", help: str = "") -> None:
        self._set(first=first, count=count, source=source, problem=problem, help=help)

    @property
    def slots(self) -> int:
        return self.count // CONTAINER_IDS

    @property
    def end(self) -> int:
        return self.first + self.count


def find_range(root: str = "/") -> Range:
    """The configured range, or the built-in one. root: where etc is, for tests. Collisions are told in `problem`."""
    uids = subids.ranges(os.path.join(root, "etc/subuid"))
    gids = subids.ranges(os.path.join(root, "etc/subgid"))
    ours = [[(first, count) for name, first, count in found if name == _NAME] for found in (uids, gids)]
    if not any(ours):
        found = Range(first=_FIRST, count=_COUNT, source="built in")
    elif len(ours[0]) != 1 or ours[0] != ours[1]:
        return Range(
            first=_FIRST,
            count=_COUNT,
            source="/etc/subuid, /etc/subgid",
            problem=f"/etc/subuid and /etc/subgid don't give the same one range to {_NAME}",
            help=f"one line {_NAME}:{_FIRST}:{_COUNT} (or another range) in each, or none",
        )
    else:
        first, count = ours[0][0]
        found = Range(first=first, count=count - count % CONTAINER_IDS, source="/etc/subuid, /etc/subgid")
        if first < _LOWEST or found.count < CONTAINER_IDS or found.end > _HIGHEST:
            return found.replace(
                problem=f"the range {_NAME}:{first}:{count} in /etc/subuid is too small, too low or too high",
                help=f"at least {CONTAINER_IDS} ids between {_LOWEST} and {_HIGHEST}",
            )
    taken = _taken(root, found, uids, gids)
    if taken:
        return found.replace(
            problem=f"the ids of sandboxes, {found.first} to {found.end - 1}, are partly {taken}'s",
            help=f"give sandboxes others: a line {_NAME}:START:COUNT in /etc/subuid and the same in /etc/subgid",
        )
    return found


def _taken(root: str, ours: Range, uids: list[tuple[str, int, int]], gids: list[tuple[str, int, int]]) -> str:
    """Whose an id of ours is as well, by the files; "" where nobody's."""
    for file, field in (("etc/passwd", 2), ("etc/group", 2), ("etc/passwd", 3)):
        for name, value in subids.accounts(os.path.join(root, file), field):
            if ours.first <= value < ours.end:
                return f"{name} of /{file}"
    for file, found in (("/etc/subuid", uids), ("/etc/subgid", gids)):
        for name, first, count in found:
            if name != _NAME and first < ours.end and ours.first < first + count:
                return f"{name} of {file}"
    return ""


def whose(first: int, count: int, root: str = "/") -> str:
    """Whose one of these ids is, by the accounts and by what /etc/subuid and /etc/subgid give; "" where nobody's."""
    uids, gids = (subids.ranges(os.path.join(root, "etc", name)) for name in ("subuid", "subgid"))
    if taken := _taken(root, Range(first=first, count=count, source=""), uids, gids):
        return taken
    ours = find_range(root)
    return f"{_NAME} of {ours.source}" if first < ours.end and ours.first < first + count else ""


_range: Range | None = None


def range_() -> Range:
    """This host's, found on the first call."""
    global _range
    if _range is None:
        _range = find_range()
    return _range


def why_not() -> tuple[str, str] | None:
    """Why sandboxes can't have ids of their own here, and what would help; None where they can."""
    found = range_()
    return (found.problem, found.help) if found.problem else None


def process_uid(slot: int) -> int:
    """The uid, and gid, of a workload at the process level: the slot's first."""
    return container_base(slot)


def container_base(slot: int) -> int:
    """The host's id of a container's id 0; CONTAINER_IDS follow."""
    return range_().first + slot * CONTAINER_IDS


def anybody_has(uid: int) -> bool:
    """Whether a process with that real uid is there. It looks at all processes."""
    # Not by the owner of /proc/PID, which is root where the process isn't dumpable.
    wanted = b"\nUid:\t%d\t" % uid
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/status", "rb") as file:
                    if wanted in file.read(4096):
                        return True
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
    return False


class Slots:
    """The slots that this process holds. `fileno()` must stay open in whoever outlives it with sandboxes running."""

    def __init__(self, folder: str = _FOLDER) -> None:
        os.makedirs(folder, mode=0o755, exist_ok=True)
        self._fd = os.open(os.path.join(folder, "ids.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._free: list[int] = []
        self.count = range_().slots
        # Where to look next: spread, so that two processes don't walk over each other's slots.
        self._next = os.getpid() * 61 % self.count
        self._lock = allocate_lock()

    def fileno(self) -> int:
        return self._fd

    def take(self) -> int:
        """A slot that nobody else on this host has. KernelError (EAGAIN) where all are taken."""
        with self._lock:
            if self._free:
                return self._free.pop()
            for _ in range(self.count):
                slot = self._next
                self._next = (slot + 1) % self.count
                if self._try(slot):
                    return slot
        raise KernelError(
            "fcntl", ["F_OFD_SETLK"], errno.EAGAIN, f"all {self.count} sandbox ids of this host are taken"
        )

    def give_back(self, slot: int) -> None:
        """The sandbox is gone. The slot stays locked, for the next sandbox of this process."""
        with self._lock:
            self._free.append(slot)

    def _try(self, slot: int) -> bool:
        # struct flock: l_type, l_whence, l_start, l_len, l_pid. By the ids themselves: while the range is being changed
        # there may be users of the old one.
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, container_base(slot), CONTAINER_IDS, 0)
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
_lock = allocate_lock()


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
    _lock = allocate_lock()
    if _slots is not None:
        _slots.close()
        _slots = None


os.register_at_fork(after_in_child=_after_fork_in_child)
