"""`rf.inspect(pid)`: all that the kernel tells of how a live process is confined, and a verdict in one sentence."""

from __future__ import annotations

import errno
import os

from ringfence._value import Plain, Value
from ringfence.errors import KernelError
from ringfence.observe import judge
from ringfence.observe import mounts as tables
from ringfence.observe.groups import Bounds, bounds
from ringfence.observe.origin import Container, origin
from ringfence.observe.proc import MountEntry, Proc, pids
from ringfence.observe.vmm import Monitor, monitor
from ringfence.spec.boundary import NAMESPACES, capability_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Host", "Inspection", "Namespace", "examine", "inspect", "reference"]

_SETS = ("effective", "permitted", "inheritable", "bounding", "ambient")
_STATUS = ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")
# Membership in one of these is a way to root, or to all data.
_POWERFUL_GROUPS = ("docker", "podman", "lxd", "incus", "libvirt", "disk", "kvm", "sudo", "wheel", "shadow", "root")
_SOCKET = "socket:["


class Namespace(Plain):
    """name: "mnt", "pid", ... inode: None where this caller may not see it. shared: with the host (its first process as
    this caller sees it); None where that can't be told. others: how many other processes are in it, and the lowest of
    their pids; (0, None) where it is the process's alone or wasn't looked for.
    """

    __slots__ = ("first_other", "inode", "name", "others", "shared")
    name: str
    inode: int | None
    shared: bool | None
    others: int
    first_other: int | None

    def __init__(
        self, *, name: str, inode: int | None, shared: bool | None, others: int = 0, first_other: int | None = None
    ) -> None:
        self._set(name=name, inode=inode, shared=shared, others=others, first_other=first_other)


class Host(Value):
    """What processes are compared with. namespaces, mounts: of the first process of this /proc, or, where that may not
    be looked at, of this caller. own_mounts: of this caller. sockets: inodes of the IP and packet sockets of the first
    process's network; none where that may not be looked at. engines: paths of the sockets in it that belong to engines.
    groups: those of note, name by number.
    """

    __slots__ = ("engines", "groups", "mounts", "namespaces", "own_mounts", "sockets")
    namespaces: dict[str, int]
    mounts: tuple[MountEntry, ...]
    own_mounts: tuple[MountEntry, ...]
    sockets: frozenset[int]
    engines: tuple[str, ...]
    groups: dict[int, str]

    def __init__(
        self,
        *,
        namespaces: dict[str, int],
        mounts: tuple[MountEntry, ...],
        own_mounts: tuple[MountEntry, ...],
        sockets: frozenset[int],
        engines: tuple[str, ...],
        groups: dict[int, str],
    ) -> None:
        self._set(
            namespaces=namespaces,
            mounts=mounts,
            own_mounts=own_mounts,
            sockets=sockets,
            engines=engines,
            groups=groups,
        )


class Inspection(Value):
    """A live process, as the kernel told of it at one moment. What this caller may not read is None.

    pid, parent: as this caller counts. name: of its program (comm). argv, exe: its command line and program.
    kind: "process", "container" or "vm". maker: what seems to have made it, or "". container: which one of its, where
    that is told. unit: the service or scope of systemd's that it is in, or "". verdict: one sentence. weak: what
    makes it weaker than its kind could be, the worst first. namespaces: all eight. uid_map, gid_map: (first inside,
    first outside, count). uids: real, effective, saved, file system, as this caller counts. groups: of those that it
    is in, the ones that are a way to more, by name. capabilities: the five sets by name. capabilities_on_host: whether
    they count on the host, as its user namespace is the host's. seccomp: "none", "strict" or "filter"; filters: how
    many. label: of its security module. landlock: None, as the kernel tells nobody of it. root: of its file tree: "the
    host's", or of what kind. mounts: those of note, in words. sockets: those of the host's network that it holds though
    its own is another. bounds: its cgroups. monitor: where it is a VMM. partial: what this caller may not see.
    """

    __slots__ = (
        *("argv", "bounds", "capabilities", "capabilities_on_host", "container", "exe", "filters", "gid_map", "groups"),
        *("kind", "label", "landlock", "maker", "monitor", "mounts", "name", "namespaces", "no_new_privs", "parent"),
        *("partial", "pid", "resident_bytes", "root", "seccomp", "sockets", "uid_map", "uids", "unit", "verdict"),
        "weak",
    )
    pid: int
    parent: int
    name: str
    argv: tuple[str, ...]
    exe: str | None
    kind: str
    maker: str
    container: Container | None
    unit: str
    verdict: str
    weak: tuple[str, ...]
    namespaces: tuple[Namespace, ...]
    uids: tuple[int, ...]
    uid_map: tuple[tuple[int, int, int], ...]
    gid_map: tuple[tuple[int, int, int], ...]
    groups: tuple[str, ...]
    capabilities: dict[str, tuple[str, ...]]
    capabilities_on_host: bool | None
    no_new_privs: bool | None
    seccomp: str | None
    filters: int | None
    label: str | None
    landlock: bool | None
    root: str | None
    mounts: tuple[str, ...]
    sockets: int | None
    bounds: Bounds
    resident_bytes: int | None
    monitor: Monitor | None
    partial: tuple[str, ...]

    def __init__(self, **fields: Any) -> None:
        self._set(**fields)

    def namespace(self, name: str) -> Namespace:
        return next(one for one in self.namespaces if one.name == name)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        found = {name: getattr(self, name) for name in self._fields}
        found["namespaces"] = [one.to_json() for one in self.namespaces]
        found["bounds"] = self.bounds.to_json()
        found["container"] = None if self.container is None else self.container.to_json()
        found["monitor"] = None if self.monitor is None else self.monitor.to_json()
        return found


def inspect(pid: int) -> Inspection:
    """What a live process is, whoever made it: its namespaces, ids, capabilities, filter, cgroup, files, and a verdict.

    pid: as this caller counts. Root sees all of it; another user all of its own processes and part of others'
    (`partial`). Raises KernelError where there is no such process, or it ends meanwhile.
    """
    return examine(pid, reference(), company=True)


def reference() -> Host:
    """The host, as this caller sees it."""
    with Proc(os.getpid()) as own:
        own_mounts = tuple(own.mounts() or ())
        namespaces, mounts = own.namespaces(), own_mounts
    sockets = frozenset[int]()
    engines: tuple[str, ...] = ()
    try:
        with Proc(1) as first:
            found = first.namespaces()
            if found.keys() >= namespaces.keys():
                namespaces, mounts = found, tuple(first.mounts() or own_mounts)
                sockets, engines = _network_sockets(first), _engines(first)
    except KernelError:
        pass  # no process 1 here
    return Host(
        namespaces=namespaces,
        mounts=mounts,
        own_mounts=own_mounts,
        sockets=sockets,
        engines=engines,
        groups=_groups_of_note(),
    )


def examine(pid: int, host: Host, *, company: bool = False, proc: str = "/proc") -> Inspection:
    """As `inspect`, with a host that was looked at before. company: whether to count who shares its namespaces."""
    with Proc(pid, proc) as process:
        found = _facts(process, host)
        if not found["status_read"]:
            raise KernelError("read", [f"{proc}/{pid}/status"], errno.ESRCH, "it ended meanwhile")
    del found["status_read"]
    if company:
        found["namespaces"] = _with_company(pid, found["namespaces"], proc)
    found |= judge.judge(found)
    return Inspection(**found)


def _facts(process: Proc, host: Host) -> dict[str, Any]:
    status = process.status()
    partial = []
    own = process.namespaces()
    if not own:
        partial.append("namespaces")
    mounts = process.mounts()
    if mounts is None:
        partial.append("mounts")
    told = {} if own else _told_otherwise(status, mounts, process, host)
    namespaces = tuple(
        Namespace(
            name=name,
            inode=own.get(name),
            shared=own[name] == host.namespaces[name] if name in own and name in host.namespaces else told.get(name),
        )
        for name in NAMESPACES
    )
    shared = {one.name: one.shared for one in namespaces}
    exe = process.link("exe")
    descriptors = process.descriptors()
    if descriptors is None:
        partial.append("descriptors")
    argv = process.argv()
    uids = tuple(int(word) for word in status.get("Uid", "").split())
    resident = status.get("VmRSS", "").split()[:1]
    seccomp = status.get("Seccomp")
    filters = status.get("Seccomp_filters")
    label = process.text("attr/current")
    return {
        "status_read": bool(status),
        "pid": process.pid,
        "parent": int(status.get("PPid", "0")),
        "name": status.get("Name", ""),
        "argv": argv,
        "exe": exe,
        "namespaces": namespaces,
        "uids": uids,
        "uid_map": process.id_map("uid_map"),
        "gid_map": process.id_map("gid_map"),
        "groups": _powerful(status, host),
        "capabilities": {
            name: capability_names(int(status.get(field, "0"), 16)) for name, field in zip(_SETS, _STATUS, strict=True)
        },
        "capabilities_on_host": shared["user"],
        "no_new_privs": _flag(status.get("NoNewPrivs")),
        "seccomp": {"0": "none", "1": "strict", "2": "filter"}.get(seccomp or ""),
        "filters": int(filters) if filters is not None else None,
        "label": label.rstrip("\n\0") or None if label is not None else None,
        "landlock": None,
        "root": _root(mounts, shared["mnt"], process, host),
        "mounts": _mounts_of_note(mounts or [], host, shared),
        "sockets": _foreign_sockets(descriptors, shared["net"], host),
        "bounds": (limits := bounds(process, host.own_mounts)),
        **_origin(process, int(status.get("PPid", "0")), limits, mounts or [], host, confined=shared["mnt"] is False),
        "resident_bytes": int(resident[0]) * 1024 if resident else None,
        "monitor": monitor(argv, exe, descriptors, process.threads),
        "partial": tuple(partial),
    }


def _told_otherwise(
    status: dict[str, str], mounts: list[MountEntry] | None, process: Proc, host: Host
) -> dict[str, bool]:
    """Which namespaces are shared, where this caller may not see which they are: by what all may read of a process."""
    found = {}
    if mounts and host.own_mounts:
        # Each mount has a number of its own, and is in one namespace.
        numbers = {entry.number for entry in host.own_mounts}
        found["mnt"] = any(entry.number in numbers for entry in mounts)
    if pids_inside := status.get("NSpid", "").split():
        found["pid"] = len(pids_inside) == 1
    with Proc(os.getpid()) as caller:
        if (ids := process.id_map("uid_map")) and ids != caller.id_map("uid_map"):
            found["user"] = False
    return found


def _flag(text: str | None) -> bool | None:
    return None if text is None else text == "1"


def _groups_of_note() -> dict[int, str]:
    import grp

    found = {}
    for name in _POWERFUL_GROUPS:
        try:
            found[grp.getgrnam(name).gr_gid] = name
        except KeyError:
            continue
    return found


def _powerful(status: dict[str, str], host: Host) -> tuple[str, ...]:
    """The groups of note that it is in, by their names on this host."""
    numbers = {int(word) for word in status.get("Groups", "").split()}
    numbers |= {int(word) for word in status.get("Gid", "").split()[1:2]}
    return tuple(name for number, name in host.groups.items() if number in numbers)


def _origin(
    process: Proc, parent: int, limits: Bounds, mounts: list[MountEntry], host: Host, *, confined: bool
) -> dict[str, Any]:
    file = ""
    if confined:
        named = next((entry for entry in mounts if entry.point == "/etc/hostname"), None)
        file = (tables.host_path(named, tables.places(host.own_mounts)) or "") if named is not None else ""
    found = origin(process, parent, limits.paths, file, confined=confined)
    maker = found.maker or (f"systemd unit {found.unit}" if found.unit else "")
    return {"maker": maker, "container": found.container, "unit": found.unit}


def _mounts_of_note(mounts: list[MountEntry], host: Host, shared: dict[str, bool | None]) -> tuple[str, ...]:
    if shared["mnt"] is not False:
        return ()
    return tables.mounts_of_note(mounts, host.mounts, engines=host.engines, own_network=shared["net"] is False)


def _root(mounts: list[MountEntry] | None, shared: bool | None, process: Proc, host: Host) -> str | None:
    """What its file tree begins with, in words."""
    path = process.link("root")
    if shared and path is not None:
        return "the host's" if path == "/" else f"the host's, below {path} (chroot)"
    if mounts is None:
        return None
    top = tables.top(mounts)
    if top is None:
        return "none of its mounts (chroot)"
    writable = "writable" if top.writable else "read-only"
    if tables.host_path(top, tables.places(host.mounts)) == "/":
        return f"the host's, {writable}, with mounts of its own"
    below = f", {top.root} of it" if top.root not in ("/", "") else ""
    return f"its own: {top.kind} ({top.source}{below}), {writable}"


def _engines(process: Proc) -> tuple[str, ...]:
    """The paths of sockets of engines, of all UNIX sockets of its network namespace."""
    found = set()
    for line in (process.text("net/unix") or "").splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and words[7].startswith("/") and tables.is_engine(words[7]):
            found.add(os.path.realpath(words[7]))
    return tuple(sorted(found))


def _network_sockets(process: Proc) -> frozenset[int]:
    """The inodes of the IP and packet sockets of its network namespace."""
    found = set()
    for name in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet"):
        for line in (process.text(f"net/{name}") or "").splitlines()[1:]:
            words = line.split()
            at = 8 if name == "packet" else 9
            if len(words) > at and words[at].isdecimal():
                found.add(int(words[at]))
    return frozenset(found)


def _foreign_sockets(descriptors: dict[int, str] | None, shared: bool | None, host: Host) -> int | None:
    """How many sockets of the host's network it holds though it is in another network namespace."""
    if shared is not False:
        return 0 if shared else None
    if descriptors is None:
        return None
    held = {int(link[len(_SOCKET) : -1]) for link in descriptors.values() if link.startswith(_SOCKET)}
    return len(held & host.sockets)


def _with_company(pid: int, namespaces: tuple[Namespace, ...], proc: str) -> tuple[Namespace, ...]:
    """With whom it shares those that aren't the host's."""
    wanted = {(one.name, one.inode) for one in namespaces if one.shared is False}
    others: dict[tuple[str, int | None], list[int]] = {}
    for other in pids(proc) if wanted else []:
        if other == pid:
            continue
        try:
            with Proc(other, proc) as process:
                for pair in wanted & set(process.namespaces().items()):
                    others.setdefault(pair, []).append(other)
        except KernelError:
            continue  # it ended meanwhile
    return tuple(
        one.replace(others=len(found), first_other=found[0]) if (found := others.get((one.name, one.inode))) else one
        for one in namespaces
    )
