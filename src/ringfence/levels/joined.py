"""Whose ids a container has that joins a user namespace: what `user=` means there, and who that is outside."""

from __future__ import annotations

import os

from ringfence.errors import CannotEnforce, SpecError, Unmet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.levels.namespaces import Joined

__all__ = ["Maps", "maps_of", "outside"]

# (first id inside, first id outside, how many), as /proc/PID/uid_map has it.
Maps = tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]


def maps_of(user: Joined) -> Maps:
    """The id maps of a user namespace, which never change: read of a process that is in it.

    Raises SpecError where none is that we may look at: there is no other way to read them (user_namespaces(7)).
    """
    wanted = os.fstat(user.fd)
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            folder = os.open(f"/proc/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue  # it has ended
        try:
            # By the folder's descriptor: a process that takes the number later isn't in it.
            about = os.stat("ns/user", dir_fd=folder)
            if (about.st_dev, about.st_ino) == (wanted.st_dev, wanted.st_ino):
                maps = _read("uid_map", folder), _read("gid_map", folder)
                if all(maps):
                    return maps
        except OSError:
            continue  # it has ended, or is another account's
        finally:
            os.close(folder)
    raise SpecError(f"namespaces: user: no process of {user.label} can be seen that tells its id maps")


def _read(name: str, folder: int) -> list[tuple[int, int, int]]:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        lines = os.read(fd, 1 << 16).decode("ascii").splitlines()
    finally:
        os.close(fd)
    found = []
    for line in lines:
        inside, outer, count = (int(word) for word in line.split())
        found.append((inside, outer, count))
    return found


def _translate(extents: list[tuple[int, int, int]], value: int, *, back: bool = False) -> int | None:
    for inside, outer, count in extents:
        here, there = (outer, inside) if back else (inside, outer)
        if here <= value < here + count:
            return there + value - here
    return None


def outside(
    maps: Maps, asked: tuple[int, int] | None, default: tuple[int, int], *, privileged: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """((uid, gid) inside, the same outside) of a workload in a joined user namespace.

    asked: by user=, or None: then `default` where the namespace has it, else its first ids. Unprivileged, always who
    the caller is in there: a work directory can't be given to anybody else. Raises CannotEnforce.
    """
    uids, gids = maps
    if not privileged:
        mine = (_translate(uids, os.geteuid(), back=True), _translate(gids, os.getegid(), back=True))
        if mine[0] is None or mine[1] is None:
            refused = Unmet("namespaces", "user", "your own ids have no meaning in that namespace", "run as root")
            raise CannotEnforce("container", [refused])
        if asked is not None and asked != mine:
            reason = f"you are {mine[0]}:{mine[1]} in that namespace, and can be nobody else"
            raise CannotEnforce("container", [Unmet("user", asked, reason, "leave user out, or run as root")])
        return (mine[0], mine[1]), (os.geteuid(), os.getegid())
    wanted = asked
    if wanted is None:
        has_default = _translate(uids, default[0]) is not None and _translate(gids, default[1]) is not None
        wanted = default if has_default else (uids[0][0], gids[0][0])
    uid, gid = _translate(uids, wanted[0]), _translate(gids, wanted[1])
    if uid is None or gid is None:
        reason = "the joined user namespace has no such id"
        raise CannotEnforce("container", [Unmet("user", asked, reason, "choose one of its /proc/PID/uid_map")])
    if uid == 0 or gid == 0:
        # Such as that of a container whose root is the host's: what root owns on the host would be the workload's.
        reason = f"{wanted[0]}:{wanted[1]} of the joined user namespace is root on the host, in part at least"
        raise CannotEnforce("container", [Unmet("user", asked, reason, "choose another of its ids by user=")])
    return wanted, (uid, gid)
