"""The control groups of a process that somebody else made: where it is, what limits it there, what is used.

A limit above counts for all below, so what is told is the least on the way up, as far as this caller's own mounts show.
"""

from __future__ import annotations

import os

from ringfence._value import Plain
from ringfence.linux.surroundings import number, text
from ringfence.observe.proc import MountEntry, Proc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

__all__ = ["Bounds", "bounds"]

# Version 1 says "no limit" by the largest number of whole pages.
_NO_LIMIT = 1 << 60
# By version: the file of the limit and of what is used.
_MEMORY = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
_PIDS = {1: ("pids.max", "pids.current"), 2: ("pids.max", "pids.current")}


class Bounds(Plain):
    """paths: of each controller, that of version 2 as "". memory_bytes, pids, cpus: the limits, or None for none.

    memory_used_bytes, pids_used: of its own cgroup and below. devices: "all" where it may use every device node that it
    can make or is given, "listed" where only some, None where that can't be told, as of version 2. unknown: the
    controllers whose files this caller can't see, so that None says nothing of them.
    """

    __slots__ = ("cpus", "devices", "memory_bytes", "memory_used_bytes", "paths", "pids", "pids_used", "unknown")
    paths: dict[str, str]
    memory_bytes: int | None
    memory_used_bytes: int | None
    pids: int | None
    pids_used: int | None
    cpus: float | None
    devices: str | None
    unknown: tuple[str, ...]

    def __init__(
        self,
        *,
        paths: dict[str, str],
        memory_bytes: int | None = None,
        memory_used_bytes: int | None = None,
        pids: int | None = None,
        pids_used: int | None = None,
        cpus: float | None = None,
        devices: str | None = None,
        unknown: tuple[str, ...] = (),
    ) -> None:
        self._set(
            paths=paths,
            memory_bytes=memory_bytes,
            memory_used_bytes=memory_used_bytes,
            pids=pids,
            pids_used=pids_used,
            cpus=cpus,
            devices=devices,
            unknown=unknown,
        )


def bounds(process: Proc, mounts: Iterable[MountEntry]) -> Bounds:
    """mounts: this caller's own, by which the files are read."""
    paths = process.cgroups()
    mounted = list(mounts)
    found: dict[str, Any] = {}
    unknown = []
    for controller, (names, field) in {"memory": (_MEMORY, "memory_bytes"), "pids": (_PIDS, "pids")}.items():
        where = _where(controller, paths, mounted)
        if where is None:
            unknown.append(controller)
            continue
        version, top, below = where
        limit, used = names[version]
        found[field] = min(_limits(top, below, limit), default=None)
        found["memory_used_bytes" if controller == "memory" else "pids_used"] = number(top + below, used)
    where = _where("cpu", paths, mounted)
    if where is None:
        unknown.append("cpu")
    else:
        found["cpus"] = min(_cpus(*where), default=None)
    where = _where("devices", paths, mounted)
    if where is not None and where[0] == 1:
        listed = text(where[1] + where[2], "devices.list").splitlines()
        found["devices"] = ("all" if "a *:* rwm" in listed else "listed") if listed else None
    return Bounds(paths=paths, unknown=tuple(unknown), **found)


def _where(controller: str, paths: dict[str, str], mounts: list[MountEntry]) -> tuple[int, str, str] | None:
    """(version, mount point, path below it) of the process's cgroup with that controller."""
    for entry in mounts:
        if entry.kind == "cgroup" and controller in entry.super_options:
            version, path = 1, paths.get(controller)
        elif entry.kind == "cgroup2" and controller not in paths:
            version, path = 2, paths.get("")
        else:
            continue
        # A path that begins with /.. is outside of this caller's cgroup namespace.
        if path is None or path.startswith("/..") or not (path + "/").startswith(entry.root.rstrip("/") + "/"):
            continue
        below = path[len(entry.root.rstrip("/")) :].rstrip("/")
        if version == 1 or os.path.exists(f"{entry.point}{below}/cgroup.controllers"):
            return version, entry.point, below
    return None


def _upwards(top: str, below: str) -> Iterator[str]:
    while True:
        yield top + below
        if not below:
            return
        below = below.rpartition("/")[0]


def _limits(top: str, below: str, name: str) -> Iterator[int]:
    for folder in _upwards(top, below):
        limit = number(folder, name)
        if limit is not None and limit < _NO_LIMIT:
            yield limit


def _cpus(version: int, top: str, below: str) -> Iterator[float]:
    for folder in _upwards(top, below):
        if version == 2:
            words = text(folder, "cpu.max").split()
            quota, period = (words[0], words[1]) if len(words) == 2 else ("max", "0")
        else:
            quota, period = text(folder, "cpu.cfs_quota_us").strip(), text(folder, "cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)
