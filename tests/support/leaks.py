"""Snapshots of this machine, to assert that a sandbox left nothing behind.

Other test runs and other users of ringfence may be at work on the same machine. So what counts is what belongs to this
process: its descendants, the cgroups and folders that bear its number, and those of the callers that the tests started.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from ringfence.levels import state as state_module
from ringfence.wire import launcher as launcher_module

# A launcher that has just lost its Python is still cleaning up; the promise is 2 s.
GRACE_S = 2.0
_PREFIX = "ringfence-"
_Found = TypeVar("_Found")

# The processes of their own that tests started to be callers of ringfence.
callers: set[int] = set()


class Process(NamedTuple):
    """pid and start time together are one process and no other that got its pid later."""

    pid: int
    start: int
    parent: int
    name: str
    uid: int
    is_launcher: bool

    @property
    def key(self) -> tuple[int, int]:
        return self.pid, self.start


def _text(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096).decode(errors="replace")
    finally:
        os.close(fd)


def _process(pid: int) -> Process | None:
    try:
        about, _, rest = _text(f"/proc/{pid}/stat").rpartition(")")
        name = about.partition("(")[2]
        # Of a process that can't be dumped it is root's; init and the launcher are, a workload isn't.
        uid = os.stat(f"/proc/{pid}").st_uid
        core = name.startswith("ringfence-core")
        is_launcher = core and _text(f"/proc/{pid}/cmdline").startswith("ringfence-core\0launcher\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = rest.split()
    return Process(pid, int(fields[19]), int(fields[1]), name, uid, is_launcher)


def processes() -> dict[int, Process]:
    """All that runs on this machine, zombies too: pid to process."""
    found = (_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {one.pid: one for one in found if one is not None}


def _ancestors(one: Process, all_of_them: dict[int, Process]) -> list[Process]:
    found = []
    seen = {one.pid}
    parent = all_of_them.get(one.parent)
    while parent is not None and parent.pid not in seen:
        found.append(parent)
        seen.add(parent.pid)
        parent = all_of_them.get(parent.parent)
    return found


def descendants(pid: int) -> list[Process]:
    """All below that process, at this moment."""
    everyone = processes()
    return [one for one in everyone.values() if any(above.pid == pid for above in _ancestors(one, everyone))]


def _own_processes() -> list[Process]:
    """All that this process or a caller of these tests has below it, but for our own launcher. A workload that found
    its way out from under it is still in its cgroup, and shows there.
    """
    everyone = processes()
    me = os.getpid()
    running = launcher_module._launcher
    ours = (one for one in everyone.values() if any(above.pid == me for above in _ancestors(one, everyone)))
    return [one for one in ours if running is None or one.pid != running.pid]


def is_alive(one: Process) -> bool:
    """Whether it still runs: neither gone nor a zombie."""
    try:
        fields = _text(f"/proc/{one.pid}/stat").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(fields[19]) == one.start and fields[0] not in "ZX"


def run_folder_parent() -> Path:
    return Path(os.environ.get("TMPDIR", "/tmp"))


def _below(base: Path, pid: int) -> set[str]:
    """What is in our own folders ringfence-<pid>-<random>, and the whole folders of callers that have ended."""
    found = set()
    for one in base.glob(f"{_PREFIX}{pid}-*"):
        # Links say where the cgroups are, for whoever may have to remove them.
        inside = [below for below in one.iterdir() if not below.is_symlink()]
        found |= {str(below) for below in inside if below.is_dir() or base == run_folder_parent()}
    for caller in callers:
        found |= {str(one) for one in base.glob(f"{_PREFIX}{caller}-*")}
    return found


def cgroup_folders() -> list[Path]:
    """The folder of this process's own cgroup in each hierarchy that is mounted; of version 2 the one above as well,
    where ringfence makes its own if this one holds other processes.
    """
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        own[names] = path
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind not in ("cgroup", "cgroup2"):
            continue
        mounted = options.split(" ")[-1].split(",")
        for names, path in own.items():
            if (kind == "cgroup2" and not names) or (names and set(names.split(",")) <= set(mounted)):
                found.append(Path(before.split(" ")[4] + path))
                if kind == "cgroup2" and path != "/":
                    found.append(found[-1].parent)
    return found


def cgroups_of(pid: int) -> set[str]:
    """The cgroups that the process `pid` made, its bases included."""
    return {str(one) for folder in cgroup_folders() for one in folder.glob(f"{_PREFIX}{pid}-*")}


def run_folders_of(pid: int) -> set[str]:
    return {str(one) for one in run_folder_parent().glob(f"{_PREFIX}{pid}-*")}


def unix_sockets() -> dict[int, str]:
    """Inode to name of every Unix socket of this network namespace."""
    found = {}
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        found[int(fields[6])] = fields[7] if len(fields) > 7 else ""
    return found


def socket_inodes(pid: int) -> set[int]:
    """Of the sockets that a process has open."""
    found = set()
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith("socket:["):
                found.add(int(target[8:-1]))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass  # it ended while we looked, or it is none that an unprivileged user may look into
    return found


def host_mounts() -> set[str]:
    return set(Path("/proc/self/mountinfo").read_text().splitlines())


def interfaces() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def descriptors() -> list[str]:
    """What this process has open, sorted; without the numbers, which may be handed out in another order."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            # Pytest removes old temporary folders whenever it likes.
            target = os.readlink(f"/proc/self/fd/{name}").removesuffix(" (deleted)")
        except FileNotFoundError:  # the one that read the folder
            continue
        # Pytest's own, which come and go between the phases of a test; and templates, of which a few are kept.
        if not target.startswith(("/proc/", "/memfd:ringfence-memory", "/memfd:ringfence-state")):
            found.append(target.partition(":[")[0] if target.startswith(("pipe:[", "socket:[")) else target)
    return sorted(found)


def system_v_objects() -> set[str]:
    """Shared memory, semaphores and message queues, which live until somebody removes them: kind, id and owner."""
    found = set()
    for kind in ("shm", "sem", "msg"):
        lines = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()
        names = lines[0].split()
        for line in lines[1:]:
            fields = dict(zip(names, line.split(), strict=True))
            found.add(f"{kind} {line.split()[1]} of uid {fields['uid']}")
    return found


class Kept(NamedTuple):
    """What ringfence keeps on purpose for its next sandbox: empty work directories, their Landlock rulesets, empty
    cgroups. Only these are no leak, and only if nothing of the last sandbox is in them.
    """

    folders: frozenset[str]
    cgroups: frozenset[str]  # names below a base, the same in each hierarchy
    rulesets: int
    dirty: tuple[str, ...]
    bases: tuple[str, ...]  # the directories of the cgroups above these, and those that they are in


def kept() -> Kept:
    found = state_module._state
    if found is None:
        return Kept(frozenset(), frozenset(), 0, (), ())
    with found.lock:
        berths = [berth for free in found._berths.values() for berth in free]
        cgroups = [cgroup for free in found._cgroups.values() for cgroup in free]
        manager = found._manager
        made = manager.made() if manager is not None else ()
        bases = tuple(os.readlink(f"/proc/self/fd/{fd}") for one in made for fd in (one.fd, one.parent_fd))
        most = max([0, *map(len, found._berths.values()), *map(len, found._cgroups.values())])
    folders = {os.path.join(os.fsdecode(found.run_path), os.fsdecode(berth.name)) for berth in berths}
    dirty = [f"{folder} isn't empty" for folder in folders if os.listdir(folder)]
    dirty += [f"{cgroup.name} has processes" for cgroup in cgroups if cgroup.processes()]
    if most > 64:
        dirty.append(f"{most} are kept")
    slots = [berth.slot for berth in berths if berth.slot is not None]
    if len(slots) != len(set(slots)):
        dirty.append("two work directories have the same ids")
    return Kept(
        frozenset(folders),
        frozenset(cgroup.name for cgroup in cgroups),
        sum(len(berth.rulesets) for berth in berths),
        tuple(dirty),
        bases,
    )


def _held_by_what_is_kept(target: str, what: Kept) -> bool:
    parts = target.split("/")
    in_base = [at for at, part in enumerate(parts) if part.startswith(f"{_PREFIX}{os.getpid()}-")]
    return target in what.folders or any(parts[at + 1 : at + 2] and parts[at + 1] in what.cgroups for at in in_base)


Snapshot = dict[str, Counter[str]]


def snapshot() -> Snapshot:
    """Everything that a sandbox could have left, by kind; without what is kept on purpose.

    A sandbox that waits for the next run is ended first: it would not be told from one that was left.
    """
    if state_module._state is not None:
        state_module._state.ready.clear()
    pid = os.getpid()
    what = kept()
    open_now = Counter(target for target in descriptors() if not _held_by_what_is_kept(target, what))
    open_now.subtract({"anon_inode:[landlock-ruleset]": what.rulesets})
    # Each is made when a sandbox first needs its controller, and stays.
    open_now.subtract(what.bases)
    cgroups = {one for folder in cgroup_folders() for one in _below(folder, pid)}
    return {
        "processes": Counter(f"{one.name} {one.key}" for one in _own_processes()),
        "mounts": Counter(host_mounts()),
        "cgroups": Counter(one for one in cgroups if not _held_by_what_is_kept(one, what)),
        "interfaces": Counter(interfaces()),
        "sockets": Counter(name for name in unix_sockets().values() if "ringfence" in name),
        "run folders": Counter(_below(run_folder_parent(), pid) - what.folders),
        "System V IPC": Counter(system_v_objects()),
        "in what is kept": Counter(what.dirty),
        "descriptors": open_now,
    }


def leaked(before: Snapshot) -> dict[str, list[str]]:
    """What is there now and wasn't before, by kind; {} once nothing is. Waits up to GRACE_S for that."""

    def new() -> dict[str, list[str]]:
        more = {kind: sorted((now - before[kind]).elements()) for kind, now in snapshot().items()}
        return {kind: found for kind, found in more.items() if found}

    return settled(new, GRACE_S)


def settled(look: Callable[[], _Found], within_s: float) -> _Found:
    """What `look` finds once it finds nothing, or after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def settled_to(look: Callable[[], _Found], within_s: float = 1.0) -> _Found:
    """What `look` finds once it finds something, or after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
