"""Whether this process may do on this host what ringfence does as root."""

from __future__ import annotations

import os

from ringfence.linux import ids, read_text

__all__ = ["privileged"]

# Of capability.h: to make files another id's, kill and become it, mount, and write its maps.
_NEEDED = {"CAP_CHOWN": 0, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SYS_ADMIN": 21}

_known: bool | None = None


def privileged() -> bool:
    """Root with the capabilities that it takes, in a user namespace that has the ids of sandboxes.

    Root of a container mostly isn't: Docker's default set lacks CAP_SYS_ADMIN. Such a caller is an unprivileged one.
    """
    global _known
    if _known is None:
        _known = os.geteuid() == 0 and _has_capabilities() and _has_ids()
    return _known


def _has_capabilities() -> bool:
    lines = read_text("/proc/self/status").split("\n")
    effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    return all(effective >> bit & 1 for bit in _NEEDED.values())


def _has_ids() -> bool:
    first, last = ids.range_().first, ids.range_().end
    ranges = [tuple(int(word) for word in line.split()) for line in read_text("/proc/self/uid_map").splitlines()]
    return any(inside <= first and last <= inside + count for inside, _, count in ranges)
