"""Which namespaces a container has of its own, shares with the host, or joins.

A container without anything of this is what `OWN` says; `namespace_rules` judges and opens what a spec says of them.
"""

from __future__ import annotations

import os

from ringfence.spec.boundary import NAMESPACES

__all__ = ["FLAGS", "OWN", "Joined", "Shared", "ours", "own_namespaces"]

# CLONE_NEW* of include/uapi/linux/sched.h.
FLAGS = {
    "user": 0x10000000,
    "mnt": 0x00020000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
    "time": 0x00000080,
}
# Made by the command itself, once it has joined its cgroups: the root of the namespace is the cgroup that it is in.
_LATER = ("cgroup",)


class Joined:
    """A namespace that exists already. fd: the caller closes it. label: as it was asked for."""

    __slots__ = ("fd", "inode", "label", "name")

    def __init__(self, name: str, fd: int, label: str) -> None:
        self.name = name
        self.fd = fd
        self.inode = os.fstat(fd).st_ino
        self.label = label


class Shared:
    """What each of a container's namespaces is: "own", "host" or `Joined`. clone_flags: of those made at the start."""

    __slots__ = ("clone_flags", "joined", "kinds", "offsets_ns")

    def __init__(self, kinds: dict[str, str | Joined], offsets_ns: tuple[int, int] | None) -> None:
        self.kinds = kinds
        self.offsets_ns = offsets_ns
        self.clone_flags = sum(FLAGS[name] for name, kind in kinds.items() if kind == "own" and name not in _LATER)
        self.joined = [kind for kind in kinds.values() if isinstance(kind, Joined)]

    def is_own(self, name: str) -> bool:
        return self.kinds[name] == "own"


OWN = Shared(dict.fromkeys(NAMESPACES, "own"), None)

_known: dict[str, tuple[int, int]] = {}


def ours() -> dict[str, tuple[int, int]]:
    """(device, inode) of our own namespaces, which don't change in a process's life unless it changes them itself."""
    if not _known:
        for name in NAMESPACES:
            try:
                about = os.stat(f"/proc/self/ns/{name}")
            except FileNotFoundError:
                continue  # a kernel without it
            _known[name] = about.st_dev, about.st_ino
    return _known


def own_namespaces() -> dict[str, int]:
    """The inodes of our own namespaces."""
    return {name: inode for name, (_, inode) in ours().items()}
