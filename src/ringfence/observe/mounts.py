"""What a process with a mount namespace of its own was given of the host: in words, by its mount table."""

from __future__ import annotations

import os
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ringfence.observe.proc import MountEntry

    Places = Sequence[tuple[MountEntry, str]]

__all__ = [
    *("ENGINE", "FILES", "NODES", "SETTINGS", "WRITES"),
    *("host_path", "is_engine", "mounts_of_note", "places", "top", "visible"),
]

# How each note that is a way out begins; the sentence about the host's own tree is one of WRITES, or begins with FILES.
ENGINE = "the socket of an engine, which starts what it is told to, is there:"
SETTINGS = "the kernel's settings may be written to:"
WRITES = "may write to the host's"
NODES = "all device nodes of the host are in"
FILES = "sees the host's files, read-only"
# A file system of the kernel's own, by whose files the host is configured.
_KERNEL = ("proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs", "efivarfs")
# What shows the network namespace that it was mounted in, or is opened from: (kind, part of its file system).
_OF_THE_NETWORK = (("proc", "/sys/net"), ("sysfs", "/devices/virtual/net"), ("sysfs", "/class/net"))
# Device nodes that every container has.
_NODES = ("null", "zero", "full", "random", "urandom", "tty", "console", "ptmx")
_ENGINES = re.compile(r".*/(docker|podman|containerd|crio|cri-dockerd|libvirt-sock|buildkitd|snapd)[\w.-]*\.?sock(et)?")
# What lies on the host, and was made for this one alone: Docker's and Podman's /etc/hosts and the like, systemd's
# PrivateTmp, the empty nodes by which it hides a path, and what it and nspawn pass later mounts through.
_MADE_FOR_IT = re.compile(
    r".*/(containers|sandboxes|[a-z0-9]+-containers)/[0-9a-f]{64}/.*"
    r"|.*/systemd-private-[0-9a-f]{32}-[^/]+/tmp"
    r"|/run/systemd/(inaccessible|propagate|nspawn/propagate|nspawn/unix-export|incoming|unit-root)(/.*)?"
)
_MOST_NAMED = 3


def top(mounts: Sequence[MountEntry]) -> MountEntry | None:
    """What is mounted on "/", and is seen."""
    return next((entry for entry in visible(mounts) if entry.point == "/"), None)


def places(of_host: Sequence[MountEntry]) -> Places:
    """The host's mounts that are seen, each with where it lies, to name others by."""
    return [(entry, entry.point.rstrip("/")) for entry in visible(of_host)]


def host_path(entry: MountEntry, of_host: Places) -> str | None:
    """What it is called on the host: where a mount there shows the same part of the same file system."""
    best = None
    for other, point in of_host:
        root = other.root.rstrip("/")
        if other.device == entry.device and (entry.root + "/").startswith(root + "/"):
            path = (point + entry.root.rstrip("/")[len(root) :]) or "/"
            best = path if best is None or len(path) < len(best) else best
    return best


def is_engine(path: str) -> bool:
    """Whether a socket of that path is one of an engine, which starts what it is told to."""
    return _ENGINES.fullmatch(path) is not None


def visible(mounts: Sequence[MountEntry]) -> list[MountEntry]:
    """Without those that others lie over: on the same place, or on one above it that the same mount holds."""
    below: dict[int, set[str]] = {}
    by_number = {entry.number: entry for entry in mounts}
    for entry in mounts:
        if entry.parent != entry.number:
            below.setdefault(entry.parent, set()).add(entry.point)
    if len(by_number) < len(mounts):  # they have no numbers: the last one on a place is the one that is seen
        last = {entry.point: at for at, entry in enumerate(mounts)}
        return [entry for at, entry in enumerate(mounts) if last[entry.point] == at]
    known: dict[int, bool] = {}

    def is_reached(entry: MountEntry) -> bool:
        """Whether a path leads to its place, or to what lies there on top of it."""
        if entry.number not in known:
            known[entry.number] = True  # one that lies on itself is the first of all
            parent = by_number.get(entry.parent)
            on_it = parent is None or (is_reached if parent.point == entry.point else is_seen)(parent)
            beside = below.get(entry.parent, ())
            known[entry.number] = on_it and not any(above in beside for above in _above(entry.point))
        return known[entry.number]

    def is_seen(entry: MountEntry) -> bool:
        return is_reached(entry) and entry.point not in below.get(entry.number, ())

    return [entry for entry in mounts if is_seen(entry)]


def _above(point: str) -> list[str]:
    parts = point.strip("/").split("/")
    return ["/" + "/".join(parts[:count]) for count in range(len(parts))] if point != "/" else []


def mounts_of_note(
    mounts: Sequence[MountEntry],
    of_host: Sequence[MountEntry],
    *,
    engines: Iterable[str] = (),
    own_network: bool = False,
) -> tuple[str, ...]:
    """In words: sockets of engines, the host's files that may be written to, the kernel's own files, device nodes.

    engines: the paths of sockets of engines on the host. own_network: whether its network namespace is its own.
    """
    named = places(of_host)
    seen = visible(mounts)
    tree = next((entry for entry in seen if entry.point == "/" and host_path(entry, named) == "/"), None)
    found = _of_the_hosts_tree(tree, seen, named) if tree is not None else []
    shown: list[tuple[str, str, bool]] = []  # (where, of the host, writable)
    settings = []
    sockets = [entry.point for entry in seen if is_engine(entry.root)]
    for entry in seen:
        path = host_path(entry, named)
        if is_engine(entry.root):
            continue
        if entry.kind in _KERNEL or (path or "").startswith("/sys/"):
            if entry.writable and not _is_harmless(entry, seen, own_network):
                settings.append(entry.point)
        elif entry.kind == "devtmpfs" and entry.root == "/":
            found.append(f"{NODES} {entry.point}")
        elif path is None or entry.point == "/" or _is_its_own(entry, path):
            continue
        elif tree is not None and path == entry.point:
            continue  # told with the tree
        elif not _is_implied(entry.point, path, entry.writable, shown):
            shown.append((entry.point, path, entry.writable))
            sockets += [entry.point + one[len(path.rstrip("/")) :] for one in engines if _is_below(one, path)]
            if entry.writable:
                found.append(f"{WRITES} {path} at {entry.point}")
            elif entry.point != path or not _is_system(path):
                found.append(f"sees the host's {path} at {entry.point}, read-only")
    if sockets:
        found.insert(0, f"{ENGINE} {_listed(list(dict.fromkeys(sockets)))}")
    if settings:
        found.append(f"{SETTINGS} {_listed(_tops(settings))}")
    return tuple(dict.fromkeys(found))


def _of_the_hosts_tree(tree: MountEntry, seen: Sequence[MountEntry], named: Places) -> list[str]:
    """It sees the host's tree as its own one, as a unit of systemd's does: which of it, as opposed to the host, is
    read-only.
    """
    writable_there = {point or "/": entry.writable for entry, point in named}
    same = [entry for entry in seen if entry.point != "/" and host_path(entry, named) == entry.point]
    same = [entry for entry in same if entry.kind not in _KERNEL and entry.kind != "devtmpfs"]
    same = [entry for entry in same if not _is_its_own(entry, entry.point)]
    same = [entry for entry in same if not entry.point.startswith(("/sys/", "/proc/"))]
    if not tree.writable:
        but = _tops([entry.point for entry in same if entry.writable])
        return [FILES + (f", but for {_listed(but)}" if but else "")]
    but = _tops([entry.point for entry in same if not entry.writable and writable_there.get(entry.point, True)])
    return [f"{WRITES} files where its user may" + (f", but for {_listed(but)}" if but else "")]


def _is_implied(point: str, path: str, writable: bool, shown: list[tuple[str, str, bool]]) -> bool:
    """Whether a folder of the host's that was told already holds it at the same place, with no fewer rights; all of the
    host holds it wherever it is.
    """
    return any(
        _is_below(point, where)
        and (of_host == "/" or (_is_below(path, of_host) and point[len(where) :] == path[len(of_host) :]))
        and (rights or not writable)
        for where, of_host, rights in shown
    )


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _is_its_own(entry: MountEntry, path: str) -> bool:
    if os.path.basename(path) in _NODES or (entry.kind == "devpts" and entry.root != "/"):
        return True  # a terminal that it was given
    return _MADE_FOR_IT.fullmatch(path) is not None


def _is_harmless(entry: MountEntry, mounts: Iterable[MountEntry], own_network: bool) -> bool:
    if entry.kind == "proc" and entry.root == "/":
        return _is_guarded(entry, mounts)
    if entry.kind == "cgroup" and any(option.startswith("name=") for option in entry.super_options):
        return True  # no controller's: nothing is limited there
    return own_network and (entry.kind, entry.root) in _OF_THE_NETWORK


def _is_guarded(proc: MountEntry, mounts: Iterable[MountEntry]) -> bool:
    """Whether /proc/sys below it is read-only or hidden, as OCI's runtimes have it."""
    wanted = f"{proc.point.rstrip('/')}/sys"
    return any(entry.point == wanted and not entry.writable for entry in mounts)


def _tops(points: list[str]) -> list[str]:
    """Without those that lie below another one."""
    return [one for one in dict.fromkeys(points) if not any(one.startswith(f"{other}/") for other in points)]


def _is_system(path: str) -> bool:
    """What any userland shows of itself, and device nodes that every container has."""
    first = path.split("/")[1] if "/" in path else ""
    return first in ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "opt", "dev", "nix", "gnu")


def _listed(words: list[str]) -> str:
    if len(words) > _MOST_NAMED + 1:
        words = [*words[:_MOST_NAMED], f"{len(words) - _MOST_NAMED} more"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
