"""An unprivileged caller's subordinate ids: what /etc/subuid and /etc/subgid give it, for newuidmap to map.

Sources: subuid(5), newuidmap(1), user_namespaces(7).
"""

from __future__ import annotations

import os

from ringfence._value import Value
from ringfence.linux import subids

__all__ = ["HELPERS", "IDS", "Subordinate", "find", "maps"]

# Ids of a container, 0 and up.
IDS = 65536
# Where the launcher looks for them (core/users.c); the package is uidmap in Debian.
HELPERS = ("/usr/bin/newuidmap", "/usr/bin/newgidmap")

Extents = tuple[tuple[int, int], ...]


class Subordinate(Value):
    """The caller's ranges, (first, count) each. reason, help: why they can't be used, or "" with ranges."""

    __slots__ = ("gids", "help", "reason", "uids")
    uids: Extents
    gids: Extents
    reason: str
    help: str

    def __init__(self, *, uids: Extents = (), gids: Extents = (), reason: str = "", help: str = "") -> None:
        self._set(uids=uids, gids=gids, reason=reason, help=help)

    @property
    def usable(self) -> bool:
        return not self.reason


def find(root: str = "/") -> Subordinate:
    """Those of the caller's account. root: where etc and usr are, for tests."""
    import pwd

    uid = os.geteuid()
    try:
        about = pwd.getpwuid(uid)
    except KeyError:
        return Subordinate(reason=f"uid {uid} has no account", help="give it one, as newuidmap wants it")
    if about.pw_gid != os.getegid():
        reason = f"your group, {os.getegid()}, isn't that of your account, {about.pw_gid}: newgidmap doesn't map it"
        return Subordinate(reason=reason, help="log in anew, or newgrp")
    missing = [path for path in HELPERS if not os.access(os.path.join(root, path[1:]), os.X_OK)]
    if missing:
        return Subordinate(
            reason=f"{' and '.join(missing)} missing", help="install the package uidmap (Debian, Ubuntu)"
        )
    names = (about.pw_name, str(uid))
    found = {}
    for file in ("subuid", "subgid"):
        every = subids.ranges(os.path.join(root, "etc", file))
        found[file] = tuple((first, count) for name, first, count in every if name in names)
        if not found[file]:
            help = f"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {about.pw_name}"
            return Subordinate(reason=f"/etc/{file} has no line for {about.pw_name}", help=help)
    if _no_new_privs():
        return Subordinate(reason="no_new_privs is set for this process: newuidmap gets no privilege", help="unset it")
    return Subordinate(uids=found["subuid"], gids=found["subgid"])


def _no_new_privs() -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return any(line.split() == ["NoNewPrivs:", "1"] for line in file)


def maps(given: Subordinate, uid: int, gid: int) -> tuple[bytes, bytes]:
    """The id maps of a container whose workload is uid:gid: that is the caller outside, so that it owns there what the
    caller owns, and the other way; every other id below IDS is a subordinate one, as far as there are some.
    """
    return _map(uid, os.geteuid(), given.uids), _map(gid, os.getegid(), given.gids)


def _map(workload: int, caller: int, ranges: Extents) -> bytes:
    extents = [(workload, caller, 1)]
    inside = 0
    for first, count in ranges:
        while count > 0 and inside < IDS:
            if inside == workload:
                inside += 1
                continue
            most = (workload if inside < workload else IDS) - inside
            taken = min(count, most)
            extents.append((inside, first, taken))
            inside, first, count = inside + taken, first + taken, count - taken
    return b"\n".join(b"%d %d %d" % extent for extent in sorted(extents))


_known: Subordinate | None = None


def known() -> Subordinate:
    """This process's, found on the first call."""
    global _known
    if _known is None:
        _known = find()
    return _known
