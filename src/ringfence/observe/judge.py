"""What a process's facts come to: its kind, who made it, what is weak about it, and all that in one sentence."""

from __future__ import annotations

import os

from ringfence.observe.mounts import ENGINE, FILES, NODES, SETTINGS, WRITES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ringfence.observe.groups import Bounds
    from ringfence.observe.inspection import Namespace
    from ringfence.observe.origin import Container
    from ringfence.observe.vmm import Monitor

__all__ = ["judge"]

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
# Each of these, counting on the host, is a way to all of it or to much of it; what it is in a word or two, and the
# namespaces that leave of it only what is in them, where all of these are its own. CAP_MKNOD is judged by the cgroup.
_POWER = {
    "CAP_SYS_MODULE": ("can load kernel modules", ()),
    "CAP_SYS_RAWIO": ("can reach the hardware", ()),
    "CAP_SYS_ADMIN": ("can mount and administer the system", ()),
    "CAP_SYS_PTRACE": ("can look into every process", ("pid",)),
    "CAP_BPF": ("can load BPF programs", ()),
    # By its handle, past what is mounted: open_by_handle_at(2).
    "CAP_DAC_READ_SEARCH": ("can read every file", ()),
    "CAP_MKNOD": ("can make and use every device node", ()),
    "CAP_DAC_OVERRIDE": ("can write every file", ("mnt",)),
    "CAP_SYS_BOOT": ("can reboot the host", ("pid",)),
    "CAP_SETUID": ("can become every user", ("mnt", "pid")),
    "CAP_SETGID": ("can become every group", ("mnt", "pid")),
    "CAP_NET_ADMIN": ("can reconfigure its network", ("net",)),
    "CAP_SYS_TIME": ("can set the clock", ()),
    "CAP_CHOWN": ("can give files away", ("mnt",)),
    "CAP_SETFCAP": ("can give files capabilities", ("mnt",)),
    "CAP_KILL": ("can signal every process", ("pid",)),
    "CAP_NET_RAW": ("can forge packets", ("net",)),
    "CAP_SYSLOG": ("can read the kernel's log", ()),
    "CAP_PERFMON": ("can trace the kernel", ()),
}
# As many are told one by one; the rest is counted.
_MOST_POWERS = 3
_ALL_OF_IT = f"{WRITES} / at "


def judge(facts: dict[str, Any]) -> dict[str, Any]:
    """kind, maker, weak and verdict, from the facts of an `Inspection`."""
    namespaces: tuple[Namespace, ...] = facts["namespaces"]
    own = [one.name for one in namespaces if one.shared is False]
    is_container = "mnt" in own and ("pid" in own or facts["container"] is not None)
    kind = "vm" if facts["monitor"] is not None else "container" if is_container else "process"
    weak = tuple(_weaknesses(facts, kind, own))
    return {"kind": kind, "weak": weak, "verdict": _verdict(facts, kind, own, weak)}


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
    first = [note for note in ways_out if note.startswith(ENGINE)]
    first += [note for note in ways_out if note.startswith(_ALL_OF_IT)]
    yield from first
    if on_host is not False:
        powers = _powers(held, facts, own)
        yield from powers[:_MOST_POWERS]
        more = len(held) - len(powers[:_MOST_POWERS])
        if powers and more:
            yield f"has {more} more {_capabilities(more)} on the host"
        if root_outside:
            yield "is root on the host too: no user namespace"
        if held and not powers:
            yield f"has {more} {_capabilities(more)} on the host"
    elif root_outside:
        yield "its user is root on the host"
    # The kernel's files and device nodes belong to root of the host: for nobody else do they open.
    as_root = root_outside or (on_host is not False and "CAP_DAC_OVERRIDE" in held)
    ways_out = [note for note in ways_out if note not in first]
    yield from (note for note in ways_out if as_root or not note.startswith((SETTINGS, NODES)))
    if facts["sockets"]:
        yield f"holds {facts['sockets']} sockets of the host's network"
    yield from _of_its_groups(facts, own)
    for name, what in (
        ("mnt", "sees the host's files"),
        ("pid", "sees and may signal the host's processes"),
        ("net", "shares the host's network, abstract sockets too"),
        ("ipc", "shares the host's System V and POSIX IPC"),
    ):
        if kind != "process" and name not in own and _is_shared(facts, name):
            yield what
    if facts["seccomp"] == "none":
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
    if kind == "container" and on_host and not root_outside and facts["uids"]:
        yield f"is uid {facts['uids'][1]} on the host too: no user namespace"


def _powers(held: set[str], facts: dict[str, Any], own: list[str]) -> list[str]:
    """What its capabilities lead to outside of its own namespaces, the worst first."""
    # A mount namespace whose tree is the host's holds nothing back.
    confining = set(own) - ({"mnt"} if _sees_the_hosts_tree(facts) else set())
    found = []
    for name, (what, namespaces) in _POWER.items():
        if name not in held or (namespaces and confining.issuperset(namespaces)):
            continue
        if name != "CAP_MKNOD" or facts["bounds"].devices == "all":
            found.append(f"{what} ({name})")
    return found


def _capabilities(number: int) -> str:
    return "capability that counts" if number == 1 else "capabilities that count"


def _sees_the_hosts_tree(facts: dict[str, Any]) -> bool:
    return (facts["root"] or "").startswith("the host's")


def _of_its_groups(facts: dict[str, Any], own: list[str]) -> Iterator[str]:
    """A group is a way to more where the host's files are seen, which are told by its number."""
    if facts["capabilities_on_host"] is False or ("mnt" in own and not _sees_the_hosts_tree(facts)):
        return
    is_root = facts["uids"][1:2] == (0,)
    if groups := [name for name in facts["groups"] if not (is_root and name == "root")]:
        yield f"is in the groups {', '.join(groups)}"


def _of_a_plain_process(facts: dict[str, Any]) -> Iterator[str]:
    held = set(facts["capabilities"]["effective"])
    is_root = facts["uids"][1:2] == (0,)
    if is_root:
        yield "runs as root" if held else "runs as root, though without capabilities"
    powers = _powers(held, facts, [])
    if not is_root or len(powers) < len(_POWER) // 2:
        yield from powers[:_MOST_POWERS]
    if not is_root:
        yield from _of_its_groups(facts, [])


def _is_shared(facts: dict[str, Any], name: str) -> bool:
    return any(one.name == name and one.shared for one in facts["namespaces"])


def _is_a_way_out(note: str) -> bool:
    return note.startswith((ENGINE, WRITES, NODES, SETTINGS))


# ---- the sentence ----


def _verdict(facts: dict[str, Any], kind: str, own: list[str], weak: tuple[str, ...]) -> str:
    shared = [one.name for one in facts["namespaces"] if one.shared]
    parts = [_beginning(facts, kind, own)]
    if own:
        parts[0] += f": its own {_listed([_LONG[name] for name in own])} namespace{'s' if len(own) > 1 else ''}"
        if shared:
            parts.append(f"shares the {_listed([_LONG[name] for name in shared])} one{'s' if len(shared) > 1 else ''}")
    if "namespaces" in facts["partial"]:
        parts.append(f"its {'other ' if own else ''}namespaces may not be seen by this user")
    elif not own and not _shares_all(facts):
        parts.append("not all of its namespaces can be seen")  # as of one that has ended, but for its parent
    told = [note for note in facts["mounts"] if note.startswith(FILES)] if kind == "process" else []
    parts += [*weak[:_MOST_POWERS], *told]
    return "; ".join(parts)


def _shares_all(facts: dict[str, Any]) -> bool:
    """Whether it was seen to have no namespace of its own; of the kinds that every kernel with namespaces has."""
    shared = {one.name: one.shared for one in facts["namespaces"]}
    return all(shared.get(name) for name in ("user", "mnt", "pid", "net", "ipc", "uts"))


def _made_by(facts: dict[str, Any]) -> str:
    found: Container | None = facts["container"]
    if not facts["maker"]:
        return ""
    names = [found.name or found.id[:12]] if found is not None else []
    names += [f"image {found.image}"] if found is not None and found.image else []
    names = [name for name in names if name]
    return f", made by {facts['maker']}" + (f" ({', '.join(names)})" if names else "")


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
        text += ", its monitor jailed in a container" if jailed else "" if own else ", its monitor not jailed"
        return text + _made_by(facts)
    if kind == "container":
        return "a container" + _made_by(facts)
    maker, unit = facts["maker"], facts["unit"]
    of = f" of the {maker}" if unit and maker.endswith(unit) else f" of {maker}" if maker else ""
    if own:
        return f"a process{of}, confined in part" if not maker or unit else f"a process, confined in part by {maker}"
    confined = []
    if facts["seccomp"] == "filter":
        confined.append("a seccomp filter")
    if facts["no_new_privs"]:
        confined.append("no_new_privs")
    if facts["label"] and not facts["label"].startswith("unconfined"):
        confined.append(f"the security label {facts['label']}")
    name = os.path.basename(facts["exe"] or "") or facts["name"]
    plain = f"a process ({name}){of}" + (" that shares all with the host" if _shares_all(facts) else "")
    return plain + (f", with {_listed(confined)}" if confined else "")


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
