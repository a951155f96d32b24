"""What a workload could undo of its limits that owns its own cgroup: one that is the caller's own user.

Such a cgroup's files can be written to by whoever reaches them, and a process can be moved out of it by whoever has the
means. What stands between is a filter, Landlock, or a file tree without cgroups in it; where nothing does, a limit that
was asked for is refused. Imported only where the workload's user is the cgroup's owner and a limit is asked for.
"""

from __future__ import annotations

import os

from ringfence.errors import Unmet
from ringfence.levels.base import requested

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.levels.host import Host
    from ringfence.spec import Spec

__all__ = ["CGROUP_LIMITS", "is_owner", "shows_cgroups", "unmet", "why_not_writable"]

# What a cgroup of the sandbox enforces.
CGROUP_LIMITS = frozenset(
    (
        *("memory", "swap", "cpus", "cpu_weight", "cpuset", "pids", "cpu_time"),
        *("io_read", "io_write", "io_read_ops", "io_write_ops"),
    )
)
# By which calls a container could see cgroups that it wasn't shown: a file system of them can be mounted in a user
# namespace of its own, and one that isn't attached anywhere is reached by its descriptor.
_MOUNTING = ("mount", "move_mount", "fsmount", "open_tree", "open_tree_attr")
# CLONE_INTO_CGROUP takes any descriptor of a directory, also one that is read-only or was only opened as a path.
_CLONING = ("clone3",)
# Where systemd runs, it moves a user's processes to another cgroup at their own request (sd_booted(3)).
_BOOTED = "/run/systemd/system"


def is_owner(spec: Spec, host: Host) -> bool:
    """Whether the workload's user, as the host sees it, is the one whom the sandbox's cgroup belongs to."""
    if not host.privileged:
        return True
    return spec.isolation == "process" and isinstance(spec.user, tuple) and spec.user[0] == os.geteuid()


def unmet(spec: Spec, host: Host, may: Callable[..., bool]) -> list[Unmet]:
    """The limits of a spec that its workload could lift. may: whether its filter allows one of these calls."""
    limits = spec.asked & CGROUP_LIMITS
    found: list[Unmet] = []
    if not limits:
        return found

    def refuse(rules: frozenset[str], reason: str, help: str) -> None:
        found.extend(Unmet(rule, requested(spec, rule), reason, help) for rule in sorted(rules))

    shared = not host.privileged or spec.user is not None
    network = spec.network
    reaches = spec.isolation == "process" and shared and network.mode == "host" and network.allow is None
    if reaches and os.path.isdir(_BOOTED):
        reason = "the workload could connect to systemd, which moves its user's processes out of a cgroup on request"
        refuse(limits, reason, "use network='none', allow=['*:*'] (which is TCP alone), or isolation='container'")
    elif spec.isolation == "container" and spec.mounts and os.path.isdir(_BOOTED):
        for mount in spec.mounts:
            if is_owner(spec, host) and _shows_systemd(mount.source):
                reason = (
                    "systemd could be connected to there, and moves its user's processes out of a cgroup on request"
                )
                help = "mount less, or leave the limits out"
                found.append(Unmet("mounts", os.fsdecode(mount.source), reason, help))
    if not is_owner(spec, host):
        return found
    ways: tuple[str, ...] = _CLONING
    if spec.isolation != "process":
        shown = [mount for mount in spec.mounts if shows_cgroups(mount.source)]
        ways = _MOUNTING + (_CLONING if shown else ())
        # At the process level a path is judged by `levels.reach`, once it is open.
        for mount in shown:
            if mount.writable:
                reason, help = why_not_writable(mount.source), "leave cgroups out of what is writable"
                found.append(Unmet("mounts", os.fsdecode(mount.source), reason, help))
    if may(*ways):
        reason = "the workload's user owns its cgroup, and could leave or change it and its limits"
        if "seccomp" in spec.asked:
            help = f"use a profile that allows none of {', '.join(ways)}, or run as root"
            refuse(frozenset(("seccomp",)), reason, help)
        else:
            refuse(limits, f"{reason}: {host.seccomp}", "install libseccomp: 'ringfence setup', or run as root")
    return found


def _shows_systemd(source: bytes) -> bool:
    """Whether one of its sockets is there, or below. A mount that is read-only doesn't keep from connecting."""
    from ringfence.linux.cgroups import systemd

    above = os.path.realpath(source)
    sockets = [os.path.realpath(os.fsencode(one)) for one in systemd.places() if os.path.exists(one)]
    return any(one == above or one.startswith(above.rstrip(b"/") + b"/") for one in sockets)


def why_not_writable(path: bytes) -> str:
    return f"the workload's user owns its cgroup, and could change its limits below {os.fsdecode(path)}"


def shows_cgroups(path: bytes | str | int) -> bool:
    """Whether a file system of cgroups is there, above or below. Where the kernel doesn't say, it is."""
    devices, places = set(), []
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            for line in file:
                fields, _, kind = line.partition(b" - ")
                if kind.startswith(b"cgroup"):
                    words = fields.split(b" ")
                    devices.add(words[2])
                    places.append(words[4].decode("unicode_escape").encode("latin-1"))  # \040 is a space
        number = os.stat(path).st_dev
        where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.path.realpath(path)
    except OSError:
        return True
    above = os.fsencode(where).rstrip(b"/") + b"/"
    return b"%d:%d" % (os.major(number), os.minor(number)) in devices or any(one.startswith(above) for one in places)
