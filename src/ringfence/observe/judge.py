"""What a process's facts come to: its kind, who made it, what is weak about it, and all that in one sentence."""

from __future__ import annotations

import os
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from ringfence.observe.groups import Bounds
    from ringfence.observe.inspection import Namespace
    from ringfence.observe.proc import MountEntry
    from ringfence.observe.vmm import Monitor

__all__ = ["judge", "mounts_of_note"]

_LONG = {
    "user": "user",
    "mnt": "mount",
    "pid": "PID",
    "net": "network",
    "ipc": "IPC",
    "uts": "UTS",
    "cgroup": "cgroup",
    "time": "time",
}
# Each of these, counting on the host, is a way to all of it; what it is in a word or two.
_POWER = {
    "CAP_SYS_MODULE": "can load kernel modules",
    "CAP_SYS_RAWIO": "can reach the hardware",
    "CAP_SYS_ADMIN": "can mount and administer the system",
    "CAP_SYS_PTRACE": "can look into every process",
    "CAP_BPF": "can load BPF programs",
    "CAP_DAC_READ_SEARCH": "can read every file",
    "CAP_DAC_OVERRIDE": "can write every file",
    "CAP_SYS_BOOT": "can reboot the host",
    "CAP_SETUID": "can become every user",
    "CAP_SETGID": "can become every group",
    "CAP_MKNOD": "can make device nodes",
    "CAP_NET_ADMIN": "can reconfigure its network",
    "CAP_SYS_TIME": "can set the clock",
    "CAP_CHOWN": "can give files away",
    "CAP_SETFCAP": "can give files capabilities",
    "CAP_KILL": "can signal every process",
    "CAP_NET_RAW": "can forge packets",
    "CAP_SYSLOG": "can read the kernel's log",
    "CAP_PERFMON": "can trace the kernel",
}
# As many are told one by one; the rest is counted.
_MOST_POWERS = 3
# A file system of the kernel's own, by whose files the host is configured.
_KERNEL = ("proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs", "efivarfs")
_ENGINE = "the socket of an engine, which starts what it is told to, is there:"
_SETTINGS = "the kernel's settings may be written to:"
# Device nodes that every container has.
_NODES = ("null", "zero", "full", "random", "urandom", "tty", "console", "ptmx")
_SOCKETS = re.compile(r".*/(docker|podman|containerd|crio|cri-dockerd|libvirt-sock|buildkitd|snapd)[\w.-]*\.?sock(et)?")
# By a part of a cgroup's path, or a program above it.
_MAKERS = (
    (re.compile(r"/kubepods"), "Kubernetes"),
    (re.compile(r"/docker[-/]"), "Docker"),
    (re.compile(r"/libpod[-_]"), "Podman"),
    (re.compile(r"/buildah-"), "Buildah"),
    (re.compile(r"/crio-"), "CRI-O"),
    (re.compile(r"/lxc(\.payload)?[./]"), "LXC"),
    (re.compile(r"/machine\.slice/machine-"), "systemd-nspawn"),
    (re.compile(r"/ringfence-\d+-[0-9a-f]{16}(/|$)"), "ringfence"),
    (re.compile(r"/([\w@.\\:-]+)\.service(/|$)"), "systemd"),
)


def judge(facts: dict[str, Any]) -> dict[str, Any]:
    """kind, maker, weak and verdict, from the facts of an `Inspection`."""
    namespaces: tuple[Namespace, ...] = facts["namespaces"]
    own = [one.name for one in namespaces if one.shared is False]
    kind = "vm" if facts["monitor"] is not None else "container" if {"mnt", "pid"} <= set(own) else "process"
    maker = _maker(facts["bounds"])
    weak = tuple(_weaknesses(facts, kind, own))
    return {"kind": kind, "maker": maker, "weak": weak, "verdict": _verdict(facts, kind, maker, own, weak)}


def _maker(bounds: Bounds) -> str:
    for path in bounds.paths.values():
        for pattern, maker in _MAKERS:
            if found := pattern.search(path):
                return f"systemd unit {found[1]}.service" if maker == "systemd" else maker
    return ""


# ---- what is weak ----


def _weaknesses(facts: dict[str, Any], kind: str, own: list[str]) -> Iterator[str]:
    """The worst first: what leads out of it, then what is shared, then what nothing limits."""
    if not own and kind == "process":
        yield from _of_a_plain_process(facts)
        return
    on_host = facts["capabilities_on_host"]
    root_outside = facts["uids"][1:2] == (0,)
    held = set(facts["capabilities"]["effective"]) | set(facts["capabilities"]["permitted"])
    ways_out = [note for note in facts["mounts"] if _is_a_way_out(note)]
    yield from (note for note in ways_out if note.startswith(_ENGINE))
    ways_out = [note for note in ways_out if not note.startswith(_ENGINE)]
    if on_host is not False:
        powers = [f"{what} ({name})" for name, what in _POWER.items() if name in held]
        yield from powers[:_MOST_POWERS]
        if len(powers) > _MOST_POWERS:
            yield f"has {len(powers) - _MOST_POWERS} more capabilities that count on the host"
        if root_outside:
            yield "is root on the host too: no user namespace"
    elif root_outside:
        yield "its user is root on the host"
    # The kernel's files belong to root of the host: to nobody else they are writable in name only.
    inside = on_host is False and not root_outside
    yield from (note for note in ways_out if not (inside and note.startswith(_SETTINGS)))
    if facts["sockets"]:
        yield f"holds {facts['sockets']} sockets of the host's network"
    if facts["groups"] and on_host is not False:
        yield f"is in the groups {', '.join(facts['groups'])}"
    for name, what in (
        ("mnt", "sees the host's files"),
        ("pid", "sees and may signal the host's processes"),
        ("net", "shares the host's network, abstract sockets too"),
        ("ipc", "shares the host's System V and POSIX IPC"),
    ):
        if kind != "process" and name not in own and _is_shared(facts, name):
            yield what
    if facts["seccomp"] == "none" and kind != "process":
        yield "no seccomp filter: every system call of the host's kernel is open"
    if facts["no_new_privs"] is False:
        yield "may gain privileges by set-user-ID programs (no_new_privs is off)"
    bounds: Bounds = facts["bounds"]
    missing = [
        what
        for what, limit, controller in (
            ("memory", bounds.memory_bytes, "memory"),
            ("processes", bounds.pids, "pids"),
            ("CPU", bounds.cpus, "cpu"),
        )
        if limit is None and controller not in bounds.unknown
    ]
    if missing and kind != "process":
        yield f"nothing limits its {' and '.join(missing) if len(missing) < 3 else ', '.join(missing)}"


def _of_a_plain_process(facts: dict[str, Any]) -> Iterator[str]:
    if facts["uids"][1:2] == (0,):
        yield "runs as root"
    elif held := facts["capabilities"]["effective"]:
        powers = [f"{_POWER[name]} ({name})" for name in _POWER if name in held]
        yield from powers[:_MOST_POWERS]
    if facts["groups"] and facts["uids"][1:2] != (0,):
        yield f"is in the groups {', '.join(facts['groups'])}"


def _is_shared(facts: dict[str, Any], name: str) -> bool:
    return any(one.name == name and one.shared for one in facts["namespaces"])


def _is_a_way_out(note: str) -> bool:
    return note.startswith((_ENGINE, "may write to the host's", "all device nodes", _SETTINGS))


# ---- mounts ----


def mounts_of_note(mounts: Iterable[MountEntry], of_host: Iterable[MountEntry]) -> tuple[str, ...]:
    """In words: sockets of engines, the host's files that may be written to, the kernel's own files, device nodes."""
    places = [(entry.device, entry.root.rstrip("/"), entry.point.rstrip("/")) for entry in of_host]
    seen = list(mounts)
    found, settings = [], []
    for entry in seen:
        if _hidden(entry, seen):
            continue
        host_path = _on_host(entry, places)
        if _SOCKETS.fullmatch(entry.root):
            found.append(f"{_ENGINE} {entry.point}")
        elif entry.kind in _KERNEL:
            if entry.writable and not (entry.kind == "proc" and _is_guarded(entry, seen)):
                settings.append(entry.point)
        elif entry.kind == "devtmpfs" and entry.root == "/":
            found.append(f"all device nodes of the host are in {entry.point}")
        elif host_path is not None and entry.point != "/" and os.path.basename(host_path) not in _NODES:
            if entry.writable:
                found.append(f"may write to the host's {host_path} at {entry.point}")
            elif not _is_system(host_path):
                found.append(f"sees the host's {host_path} at {entry.point}, read-only")
    if settings:
        found.append(f"{_SETTINGS} {_listed(_tops(settings))}")
    return tuple(dict.fromkeys(found))


def _tops(points: list[str]) -> list[str]:
    """Without those that lie below another one."""
    return [one for one in dict.fromkeys(points) if not any(one.startswith(f"{other}/") for other in points)]


def _hidden(entry: MountEntry, mounts: list[MountEntry]) -> bool:
    """Whether another mount lies on the same place, later."""
    after = mounts[mounts.index(entry) + 1 :]
    return any(other.point == entry.point for other in after)


def _is_guarded(proc: MountEntry, mounts: list[MountEntry]) -> bool:
    """Whether /proc/sys below it is read-only or hidden, as OCI's runtimes have it."""
    wanted = f"{proc.point.rstrip('/')}/sys"
    return any(entry.point == wanted and not entry.writable for entry in mounts)


def _on_host(entry: MountEntry, places: list[tuple[tuple[int, int], str, str]]) -> str | None:
    """What it is called on the host: where a mount there shows the same part of the same file system."""
    best = None
    for device, root, point in places:
        if device == entry.device and (entry.root + "/").startswith(root + "/"):
            path = (point + entry.root.rstrip("/")[len(root) :]) or "/"
            best = path if best is None or len(path) < len(best) else best
    return best


def _is_system(path: str) -> bool:
    """What any userland shows of itself, and device nodes that every container has."""
    top = path.split("/")[1] if "/" in path else ""
    return top in ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "opt", "dev", "nix", "gnu")


# ---- the sentence ----


def _verdict(facts: dict[str, Any], kind: str, maker: str, own: list[str], weak: tuple[str, ...]) -> str:
    shared = [one.name for one in facts["namespaces"] if one.shared]
    begin = _beginning(facts, kind, own)
    by = f", made by {maker}" if maker and kind != "process" else f" of {maker}" if maker else ""
    parts = [begin + by]
    if own:
        parts[0] += f": its own {_listed([_LONG[name] for name in own])} namespace{'s' if len(own) > 1 else ''}"
        if shared:
            parts.append(f"shares the {_listed([_LONG[name] for name in shared])} one{'s' if len(shared) > 1 else ''}")
    elif "namespaces" in facts["partial"]:
        parts.append("its namespaces may not be seen by this user")
    parts += weak[:_MOST_POWERS]
    return "; ".join(parts)


def _beginning(facts: dict[str, Any], kind: str, own: list[str]) -> str:
    found: Monitor | None = facts["monitor"]
    if found is not None:
        how = {"kvm": "on KVM", "tcg": "emulated (TCG)"}.get(found.accelerator or "", "")
        what = "an application kernel" if found.program == "gVisor" else "a virtual machine"
        text = f"{what} by {found.program if found.program != 'unknown' else 'an unknown monitor'}"
        text += f", {how}" if how else f", platform {found.accelerator}" if found.accelerator else ""
        size = [f"{found.cpus} CPU{'s' if found.cpus != 1 else ''}"] if found.cpus else []
        size += [f"{found.memory_bytes >> 20} MiB"] if found.memory_bytes else []
        text += f" ({', '.join(size)})" if size else ""
        jailed = {"mnt", "pid"} <= set(own)
        if jailed:
            return text + ", its monitor jailed in a container"
        return text if own else text + ", its monitor not jailed"
    if kind == "container":
        return "a container"
    if own:
        return "a process, confined in part"
    confined = []
    if facts["seccomp"] == "filter":
        confined.append("a seccomp filter")
    if facts["no_new_privs"]:
        confined.append("no_new_privs")
    if facts["label"] and not facts["label"].startswith("unconfined"):
        confined.append(f"the security label {facts['label']}")
    name = os.path.basename(facts["exe"] or "") or facts["name"]
    plain = f"a process ({name}) that shares all with the host"
    return plain + (f", with {_listed(confined)}" if confined else "")


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
