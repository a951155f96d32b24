"""What a level isolates: one verdict for each resource, judged from what the probe saw.

A judge is a pure function of two sets of facts (see `facts`): `host`, seen without any boundary, and `inside`. It never
claims what wasn't seen: a missing fact is "unknown", with the reason, and so is a denial whose positive control failed,
because what is denied to everybody says nothing of the boundary. Judging the host against itself has to give "shared".
"""

from __future__ import annotations

import enum

from ringfence._value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    Facts = Mapping[str, Any]
    Judge = Callable[[Facts, Facts], "Verdict"]

__all__ = ["RESOURCES", "Isolation", "Resource", "Verdict", "judge_all", "namespace", "other_kernel"]


class Isolation(enum.StrEnum):
    """What a workload has of one resource."""

    OWN = "own"
    """One of its own: what it does there can't be seen or felt by the host's."""
    RESTRICTED = "restricted"
    """The host's, with less of it in reach than the caller has."""
    SHARED = "shared"
    """The host's, as the caller has it."""
    UNKNOWN = "unknown"
    """It could not be seen."""
    NOT_TESTABLE = "not testable"
    """Of a probe: it would show nothing here, as its control fails or the host lacks what it is about."""


class Verdict(Value):
    """isolation: the word. evidence: what was seen, short enough for a cell of a table."""

    __slots__ = ("evidence", "isolation")
    isolation: Isolation
    evidence: str

    def __init__(self, isolation: Isolation, evidence: str) -> None:
        self._set(isolation=isolation, evidence=evidence)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {"verdict": str(self.isolation), "evidence": self.evidence}


class Resource(Value):
    """A row of the table. judge(host, inside) gives the verdict."""

    __slots__ = ("judge", "name")
    name: str
    judge: Judge

    def __init__(self, name: str, judge: Judge) -> None:
        self._set(name=name, judge=judge)


def judge_all(host: Facts, inside: Facts) -> dict[str, Verdict]:
    """The verdict on every resource, by its name."""
    return {one.name: one.judge(host, inside) for one in RESOURCES}


def _own(evidence: str) -> Verdict:
    return Verdict(Isolation.OWN, evidence)


def _restricted(evidence: str) -> Verdict:
    return Verdict(Isolation.RESTRICTED, evidence)


def _shared(evidence: str) -> Verdict:
    return Verdict(Isolation.SHARED, evidence)


def _unknown(evidence: str) -> Verdict:
    return Verdict(Isolation.UNKNOWN, evidence)


# ---- what the judges ask ----

# Where no other kernel runs, whatever is read there.
_ON_THIS_KERNEL = ("bare", "process", "container")


def _missing(facts: Facts, name: str) -> str:
    return f"{name} can't be read: {facts.get(f'{name}_errno') or 'not reported'}"


def other_kernel(host: Facts, inside: Facts) -> bool | None:
    """Whether another kernel runs inside; None where that can't be told.

    What the caller's /proc shows can be covered by a mount, so nothing that is read decides where the level itself
    does: a process and a container run on the host's kernel by construction. Elsewhere (a guest, another tool) it is
    the boot id, which the kernel makes at random as it starts (random(4)), so that it names one run of one kernel.
    """
    if inside.get("level") in _ON_THIS_KERNEL:
        return False
    ids = host.get("boot_id"), inside.get("boot_id")
    if all(ids):
        return ids[0] != ids[1]
    releases = host.get("kernel_release"), inside.get("kernel_release")
    # Of the same release there may still be two.
    return True if all(releases) and releases[0] != releases[1] else None


def namespace(kind: str, host: Facts, inside: Facts) -> Verdict:
    """Of a namespace alone. Inode numbers of two kernels can't be compared: there the kernel decides for all."""
    other = other_kernel(host, inside)
    if other:
        return _own("its own kernel's")
    theirs, ours = (facts.get("namespaces") or {} for facts in (host, inside))
    if other is None:
        return _unknown("whether the kernel is the host's can't be told")
    if kind not in ours or kind not in theirs or ours[kind] is None or theirs[kind] is None:
        lacking = inside if ours.get(kind) is None else host
        return _unknown(_missing(lacking.get("namespaces") or {}, kind))
    if ours[kind] == theirs[kind]:
        return _shared(f"{kind}:[{ours[kind]}], the host's")
    return _own(f"{kind}:[{ours[kind]}], not the host's")


def _attempt(facts: Facts, name: str) -> str | None:
    """ "ok", "ERRNO call", or None where it wasn't tried."""
    said: str | None = (facts.get("attempts") or {}).get(name)
    return said


def _reach(host: Facts, inside: Facts, names: Sequence[tuple[str, str]]) -> Verdict | None:
    """Whether those attempts on the host's things succeed inside, each (name, words). None where none has a control."""
    controlled = [(name, words) for name, words in names if _attempt(host, name) == "ok"]
    if not controlled or any(_attempt(inside, name) is None for name, _ in controlled):
        return None
    denied = [(words, _attempt(inside, name)) for name, words in controlled if _attempt(inside, name) != "ok"]
    shown = ", ".join(f"{words}: {(said or '').split(' ')[0]}" for words, said in denied)
    if len(denied) == len(controlled):
        return _restricted(shown)
    allowed = ", ".join(words for name, words in controlled if _attempt(inside, name) == "ok")
    return _restricted(f"{shown}; but {allowed}: ok") if denied else _shared(f"{allowed}: ok")


def _all_denied(host: Facts, inside: Facts, names: Sequence[tuple[str, str]]) -> bool:
    return not any(_attempt(inside, name) == "ok" for name, _ in names if _attempt(host, name) == "ok")


def _no_control(names: str) -> Verdict:
    return _unknown(f"no control: {names} fails without a boundary too, or wasn't tried")


def _megabytes(count: object) -> str:
    if not isinstance(count, (int, float)):
        return "unknown"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


# ---- the judges ----


def _kernel(host: Facts, inside: Facts) -> Verdict:
    other = other_kernel(host, inside)
    release = inside.get("kernel_release")
    if other is None or not release:
        return _unknown(_missing(inside, "boot_id"))
    if not other:
        same = inside.get("boot_id") == host.get("boot_id")
        return _shared(f"{release}, " + ("the same boot id" if same else "the host's: this level has no other"))
    return _own(f"{release}, the host {host.get('kernel_release')}; another boot id")


def _memory(host: Facts, inside: Facts) -> Verdict:
    total = inside.get("memory_total_bytes")
    if total is None:
        return _unknown(_missing(inside, "memory_total_bytes"))
    if other_kernel(host, inside):
        return _own(f"{_megabytes(total)} of its own, the host has {_megabytes(host.get('memory_total_bytes'))}")
    limit = (inside.get("applied") or {}).get("memory")
    if limit is not None and limit >= total:
        return _shared(f"all {_megabytes(total)}, the limit of {_megabytes(limit)} is no less")
    if limit is not None:
        return _restricted(f"at most {_megabytes(limit)} of the host's {_megabytes(total)}")
    return _shared(f"all {_megabytes(total)}, no limit asked for")


def _cpus(host: Facts, inside: Facts) -> Verdict:
    ours, theirs = inside.get("affinity"), host.get("affinity")
    if not ours or not theirs:
        return _unknown(_missing(inside, "affinity"))
    if other_kernel(host, inside):
        return _own(f"{len(ours)} virtual, of the host's {len(theirs)}")
    quota = (inside.get("applied") or {}).get("cpus")
    if quota is not None and quota < len(theirs):
        return _restricted(f"the time of {quota:g}, of the host's {len(theirs)}")
    if len(ours) < len(theirs):
        return _restricted(f"{len(ours)} of the host's {len(theirs)}")
    if quota is not None:
        return _shared(f"all {len(ours)}, the limit of {quota:g} is no less")
    return _shared(f"all {len(ours)}, no limit asked for")


def _processes(host: Facts, inside: Facts) -> Verdict:
    verdict = namespace("pid", host, inside)
    seen, there = inside.get("pid_count"), host.get("pid_count")
    if seen is None or there is None:
        return verdict
    return verdict.replace(evidence=f"{verdict.evidence}; {seen} visible, {there} on the host")


def _signals(host: Facts, inside: Facts) -> Verdict:
    if other_kernel(host, inside):
        return _own("its own kernel's processes only")
    tried = [("kill", "kill the caller")]
    reached = _reach(host, inside, tried)
    if reached is None:
        return _no_control("kill")
    return _own(reached.evidence) if _apart(host, inside) and _all_denied(host, inside, tried) else reached


def _other_memory(host: Facts, inside: Facts) -> Verdict:
    tried = [("procmem", "memory"), ("environ", "environment"), ("ptrace", "ptrace")]
    reached = _reach(host, inside, tried)
    if reached is None:
        return _no_control("reading the caller's memory")
    reached = reached.replace(evidence=f"the caller's {reached.evidence}")
    return _own(reached.evidence) if _apart(host, inside) and _all_denied(host, inside, tried) else reached


def _apart(host: Facts, inside: Facts) -> bool:
    """Whether the workload's processes are counted apart from the host's."""
    return bool(other_kernel(host, inside)) or namespace("pid", host, inside).isolation is Isolation.OWN


def _users(host: Facts, inside: Facts) -> Verdict:
    verdict = namespace("user", host, inside)
    ours, theirs = (facts.get("uids") or {} for facts in (host, inside))
    uid, caller = theirs.get("effective"), ours.get("effective")
    if uid is None or caller is None or verdict.isolation is Isolation.UNKNOWN:
        return verdict
    if verdict.isolation is Isolation.SHARED:
        if uid != caller:
            return _restricted(f"uid {uid}, the caller is {caller}")
        return _shared(f"uid {uid}, as the caller")
    if other_kernel(host, inside):
        return _own(f"uid {uid} of its own kernel")
    outside = _outside_id(inside.get("uid_map"), uid)
    if outside is None or not _is_of_the_host(inside, uid, outside, caller):
        return _unknown(f"uid {uid}: which one that is outside can't be told")
    if outside == caller:
        # Of files, signals and limits of a user the host has it as the caller (user_namespaces(7)).
        return _restricted(f"uid {uid} is {outside} outside, as the caller")
    return _own(f"uid {uid} is {outside} outside")


def _is_of_the_host(inside: Facts, uid: int, outside: int, caller: int) -> bool:
    """Whether an id of uid_map is the host's. The map tells of the user namespace above, which may be one of the
    sandbox's own: there each id is mapped to itself. Where root is mapped too, files of the host's root tell which.
    """
    if outside != uid:
        return True
    root = _inside_id(inside.get("uid_map"), 0)
    return outside == caller if root is None else inside.get("proc_owner") == root


def _outside_id(uid_map: object, uid: int) -> int | None:
    return next((outside + uid - first for first, outside, count in _map(uid_map) if 0 <= uid - first < count), None)


def _inside_id(uid_map: object, uid: int) -> int | None:
    return next((first + uid - outside for first, outside, count in _map(uid_map) if 0 <= uid - outside < count), None)


def _map(uid_map: object) -> Iterator[tuple[int, int, int]]:
    """user_namespaces(7): each line is the first id inside, the first outside, how many."""
    for line in str(uid_map or "").splitlines():
        fields = line.split()
        if len(fields) == 3 and all(field.isdecimal() for field in fields):
            first, outside, count = map(int, fields)
            yield first, outside, count


def _capabilities(host: Facts, inside: Facts) -> Verdict:
    sets = inside.get("capabilities") or {}
    held = {name: sets.get(name) for name in ("effective", "permitted", "inheritable", "bounding", "ambient")}
    if any(value is None for value in held.values()):
        return _unknown(_missing(sets, next(name for name, value in held.items() if value is None)))
    numbers = {name: int(str(value), 16) for name, value in held.items()}
    caller = host.get("capabilities") or {}
    theirs = {name: int(str(caller.get(name) or "0"), 16) for name in held}
    if numbers == theirs:
        count = numbers["effective"].bit_count()
        return _shared(f"{count} effective, {numbers['bounding'].bit_count()} in the bounding set, as the caller")
    if not any(numbers.values()):
        return _restricted("none, in all five sets")
    counts = ", ".join(f"{name} {value.bit_count()}" for name, value in numbers.items() if value)
    more = any(numbers[name] & ~theirs[name] for name in held)
    if more and namespace("user", host, inside).isolation is not Isolation.OWN:
        return _shared(f"{counts}: more than the caller")
    return _restricted(counts)


_CALLS = (
    ("bpf", "bpf"),
    ("io_uring", "io_uring_setup"),
    ("mount", "mount"),
    ("perf", "perf_event_open"),
    ("module", "init_module"),
    ("reboot", "reboot"),
    ("unshare_user", "unshare"),
    ("userfaultfd", "userfaultfd"),
)


def _system_calls(host: Facts, inside: Facts) -> Verdict:
    mode, theirs = inside.get("seccomp_mode"), host.get("seccomp_mode")
    if mode is None or theirs is None:
        return _unknown(_missing(inside if mode is None else host, "seccomp_mode"))
    count = inside.get("seccomp_filters")
    tried = [name for name, _ in _CALLS if _attempt(host, name) == "ok"]
    refused = [name for name in tried if _attempt(inside, name) not in (None, "ok")]
    seen = f"{len(refused)} of {len(tried)} risky calls refused"
    if mode == 2 and (theirs != 2 or (count or 0) > (host.get("seccomp_filters") or 0)):
        filters = f"{count} filter{'s' if count != 1 else ''}" if count is not None else "a filter"
        return _restricted(f"{filters}; {seen}")
    return _shared(f"no filter of its own; {seen}")


def _new_privileges(host: Facts, inside: Facts) -> Verdict:
    bit, theirs = inside.get("no_new_privs"), host.get("no_new_privs")
    if bit is None:
        return _unknown(_missing(inside, "no_new_privs"))
    if bit and not theirs:
        return _restricted("no_new_privs is set: no setuid program helps")
    if bit:
        return _shared("no_new_privs is set, as for the caller")
    return _shared("setuid programs give their privileges")


def _mounts(host: Facts, inside: Facts) -> Verdict:
    verdict = namespace("mnt", host, inside)
    count, theirs = inside.get("mount_count"), host.get("mount_count")
    if count is None or theirs is None:
        return verdict
    return verdict.replace(evidence=f"{verdict.evidence}; {count} mounts, {theirs} on the host")


def _files(host: Facts, inside: Facts) -> Verdict:
    """Of the host's files: which are in sight, and can they be written?"""
    theirs, ours = host.get("mounts"), inside.get("mounts")
    if ours is None or theirs is None:
        return _unknown(_missing(inside if ours is None else host, "mounts"))
    disks = {source for _, _, _, source in theirs if source.startswith("/")}
    # Over 9p and virtiofs a guest sees a folder of the host's.
    hosts = [(target, fstype) for target, fstype, _, source in ours if source in disks or fstype in ("9p", "virtiofs")]
    folders = [target for target, _ in hosts]
    other = other_kernel(host, inside)
    if not folders and other:
        return _own("none of the host's file systems is mounted")
    if not folders and other is None:
        return _unknown("whether the kernel is the host's can't be told")
    reached = _reach(host, inside, [("write_etc", "writing /etc"), ("write_usr", "writing /usr")])
    if reached is None:
        return _no_control("writing /etc/passwd and /usr")
    if not folders:
        # On a host whose root is an overlay, a ZFS or an NFS no source is a disk's; the kernel has them all alike.
        return reached.replace(evidence=f"in file systems of the host's kernel; {reached.evidence}")
    if "/" in folders:
        return reached.replace(evidence=f"the host's tree; {reached.evidence}")
    shown = ", ".join(sorted(folder for folder in folders if folder.count("/") == 1 and not folder.startswith("/.")))
    through = " over 9p" if any(fstype == "9p" for _, fstype in hosts) else ""
    return reached.replace(evidence=f"the host's {shown}{through}; {reached.evidence}")


def _devices(host: Facts, inside: Facts) -> Verdict:
    ours, theirs = inside.get("dev_entries"), host.get("dev_entries")
    if ours is None or theirs is None:
        return _unknown(_missing(inside if ours is None else host, "dev_entries"))
    if other_kernel(host, inside):
        return _own(f"{len(ours)} in /dev, of virtual hardware; {len(theirs)} on the host")
    if len(ours) < len(theirs):
        return _restricted(f"{len(ours)} in /dev, {len(theirs)} on the host")
    closed = [path for path in ("/dev/kmsg", "/dev/kvm") if _opens(host, path) and not _opens(inside, path)]
    if closed:
        return _restricted(f"all {len(ours)} in /dev in sight; {', '.join(closed)} can't be opened")
    return _shared(f"all {len(ours)} in /dev")


def _opens(facts: Facts, path: str) -> bool:
    return ((facts.get("sensitive_files") or {}).get(path) or {}).get("read") == "ok"


def _kernel_settings(host: Facts, inside: Facts) -> Verdict:
    path = "/proc/sys/kernel/core_pattern"
    found = [((facts.get("sensitive_files") or {}).get(path) or {}).get("write") for facts in (host, inside)]
    if None in found:
        return _unknown("/proc/sys wasn't tried")
    if other_kernel(host, inside):
        return _own(f"its own kernel's; writing /proc/sys: {found[1]}")
    if found[0] != "ok":
        return _no_control("writing /proc/sys")
    return _shared("writing /proc/sys: ok") if found[1] == "ok" else _restricted(f"writing /proc/sys: {found[1]}")


def _network(host: Facts, inside: Facts) -> Verdict:
    verdict = namespace("net", host, inside)
    interfaces = inside.get("interfaces")
    names = "interfaces unknown" if interfaces is None else f"{', '.join(interfaces) or 'no interface'}"
    if interfaces is not None and list(interfaces) == ["lo"]:
        names = "lo only"
    if verdict.isolation is Isolation.SHARED:
        reached = _reach(host, inside, [("socket", "an internet socket")])
        if reached is None:
            return _no_control("socket")
        return reached.replace(evidence=f"the host's {len(interfaces or ())} interfaces; {reached.evidence}")
    return verdict.replace(evidence=f"{verdict.evidence}; {names}")


def _ipc(host: Facts, inside: Facts) -> Verdict:
    verdict = namespace("ipc", host, inside)
    if verdict.isolation is not Isolation.SHARED:
        return verdict
    reached = _reach(host, inside, [("shm", "System V shared memory")])
    # That the namespace is shared is known, with or without a control.
    return reached.replace(evidence=f"{verdict.evidence}; {reached.evidence}") if reached is not None else verdict


def _keyrings(host: Facts, inside: Facts) -> Verdict:
    if other_kernel(host, inside):
        return _own("its own kernel's")
    reached = _reach(host, inside, [("keyctl", "keyctl")])
    if reached is None:
        return _no_control("keyctl")
    keys = inside.get("key_count")
    return reached if keys is None else reached.replace(evidence=f"{reached.evidence}; {keys} keys visible")


def _host_name(host: Facts, inside: Facts) -> Verdict:
    verdict = namespace("uts", host, inside)
    name = inside.get("hostname")
    if verdict.isolation is Isolation.SHARED:
        reached = _reach(host, inside, [("sethostname", "sethostname")])
        return (reached or _no_control("sethostname")).replace(evidence=f"{name}; {(reached or verdict).evidence}")
    return verdict.replace(evidence=f"{name}; {verdict.evidence}")


def _cgroups(host: Facts, inside: Facts) -> Verdict:
    verdict = namespace("cgroup", host, inside)
    ours, theirs = inside.get("cgroup"), host.get("cgroup")
    if verdict.isolation is Isolation.SHARED and ours and theirs and ours != theirs:
        return _restricted(f"one of its own below the caller's; {verdict.evidence}")
    return verdict


def _clock(host: Facts, inside: Facts) -> Verdict:
    if other_kernel(host, inside):
        return _own("its own kernel's")
    reached = _reach(host, inside, [("settime", "setting the wall clock")])
    if reached is None:
        return _no_control("settimeofday")
    # time_namespaces(7): of the monotonic and the boot clock only; the wall clock has none.
    offsets = namespace("time", host, inside)
    apart = "; time namespace its own" if offsets.isolation is Isolation.OWN else ""
    return reached.replace(evidence=f"the host's; {reached.evidence}{apart}")


RESOURCES = (
    Resource("kernel", _kernel),
    Resource("memory", _memory),
    Resource("CPUs", _cpus),
    Resource("processes", _processes),
    Resource("signals", _signals),
    Resource("others' memory", _other_memory),
    Resource("users", _users),
    Resource("capabilities", _capabilities),
    Resource("system calls", _system_calls),
    Resource("new privileges", _new_privileges),
    Resource("mounts", _mounts),
    Resource("files", _files),
    Resource("devices", _devices),
    Resource("kernel settings", _kernel_settings),
    Resource("network", _network),
    Resource("IPC", _ipc),
    Resource("keyrings", _keyrings),
    Resource("host name", _host_name),
    Resource("cgroups", _cgroups),
    Resource("clock", _clock),
)
