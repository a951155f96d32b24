"""What a level isolates with the rules of one spec: what the probe saw there, less what the spec itself opens.

The probe looks for what every sandbox has. A spec's mounts, devices, joined namespaces and profiles may open more than
it looks for, so each of these lowers the verdicts that it touches, to what is true in any case.
"""

from __future__ import annotations

import os
import stat

from ringfence.comparison.isolation import RESOURCES, Isolation, Verdict, judge_all, other_kernel
from ringfence.errors import RingfenceError, SpecError
from ringfence.images.kernel_mounts import kernel_mount_of, kernel_mounts
from ringfence.spec import NAMESPACES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ringfence.comparison.choice.measure import Here
    from ringfence.spec import Spec

__all__ = ["lowered", "named", "verdicts"]

_ORDER = (Isolation.UNKNOWN, Isolation.SHARED, Isolation.RESTRICTED, Isolation.OWN)
_ALL = tuple(one.name for one in RESOURCES)
# What is decided by a namespace: that of another sandbox, joined, is as much not its own as the host's.
_BY_NAMESPACE = {
    "user": ("users", "capabilities"),
    "mnt": ("mounts", "files", "devices"),
    "pid": ("processes", "signals", "others' memory"),
    "net": ("network",),
    "ipc": ("IPC",),
    "uts": ("host name",),
    "cgroup": ("cgroups",),
    "time": ("clock",),
}
# What is denied by system calls as well: with a filter, by that.
_BY_FILTER = (
    *("signals", "others' memory", "files", "devices", "kernel settings", "network", "IPC", "keyrings", "host name"),
    *("mounts", "clock"),
)
# What no file system can open.
_NOT_BY_FILES = frozenset(("kernel", "memory", "CPUs", "capabilities", "system calls", "new privileges", "users"))
# Documentation/admin-guide/devices.txt: null, zero, full, random, urandom and tty, which every process may use.
_STANDARD = frozenset(((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0)))
# tun, fuse and kvm; sound; of graphics the nodes that only render, as those before them set a screen's mode.
_HARMLESS = _STANDARD - {(5, 0)} | {(10, 200), (10, 229), (10, 232)}
_SOUND, _GRAPHICS, _FIRST_RENDERER = 116, 226, 128
# Of a folder that may be written to so many entries are looked at for device nodes; some 10 ms.
_MOST_ENTRIES = 20_000


def named(require: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Requirements under the names that `compare` has for them: "host-name" is "host name", "ipc" is "IPC".

    Raises SpecError for a name that is none.
    """
    known = {_plain(name): name for name in _ALL}
    found: dict[str, str] = {}
    for name, word in require:
        if _plain(name) not in known:
            raise SpecError(f"require: there is no resource {name!r}; there are {', '.join(_ALL)}")
        resource = known[_plain(name)]
        if found.setdefault(resource, word) != word:
            raise SpecError(f"require: {resource!r} is given twice, as own and as restricted")
    return tuple((name, found[name]) for name in _ALL if name in found)


def _plain(name: str) -> str:
    return name.lower().replace("-", " ").replace("_", " ").replace("'", "")


def verdicts(spec: Spec, here: Here) -> dict[str, Verdict]:
    """Resource by resource, what a sandbox of that spec isolates here, at the level that it names."""
    try:
        bare, inside = here.facts(spec)
    except (RingfenceError, OSError) as error:
        unknown = Verdict(Isolation.UNKNOWN, f"the probe gave no facts: {error}")
        return dict.fromkeys(_ALL, unknown)
    # Limits that were asked for are enforced, or the run is refused: of how much, the spec says.
    limits = {"memory": spec.limits.memory_bytes, "cpus": spec.limits.cpus}
    found = judge_all(bare, {**inside, "applied": limits})
    return lowered(found, spec, own_kernel=bool(other_kernel(bare, inside)))


def lowered(found: Mapping[str, Verdict], spec: Spec, *, own_kernel: bool) -> dict[str, Verdict]:
    """Verdicts, with what the spec opens taken off."""
    verdicts = dict(found)

    def lower(names: Iterable[str], most: Isolation, why: str) -> None:
        for name in names:
            one = verdicts[name]
            if _ORDER.index(one.isolation) > _ORDER.index(most):
                verdicts[name] = Verdict(most, f"{why}; else {one.isolation}: {one.evidence}")

    if not own_kernel:
        # Whatever its root is, the files in it are in a file system of the host's.
        lower(["files"], Isolation.RESTRICTED, "its root holds the host's files")
        for name in NAMESPACES:
            if getattr(spec.namespaces, name) not in ("own", "host"):
                lower(_BY_NAMESPACE[name], Isolation.SHARED, f"the {name} namespace is another's, joined")
    for mount in spec.mounts:
        shown = os.fsdecode(mount.source)
        lower(["files"], Isolation.RESTRICTED, f"the host's {shown} is mounted")
    devices, trees = _opened(spec)
    for path in spec.writable:
        # Landlock opens a node by the folder that it is in, as any other file.
        found_there = [] if kernel_files(path) else _devices_below(path)
        if found_there is None:
            lower(["devices"], Isolation.UNKNOWN, f"{os.fsdecode(path)} has too much in it to be looked through")
        devices += found_there or ()
    for tree in trees:
        if kernel_files(tree):
            others = [name for name in _ALL if name not in _NOT_BY_FILES]
            lower(others, Isolation.UNKNOWN, f"what {os.fsdecode(tree)} opens of the kernel isn't known")
    for device in devices:
        shown = os.fsdecode(device)
        lower(["devices"], Isolation.SHARED, f"the host's {shown} can be used")
        if not _opens_only_itself(device):
            # /dev/mem is all of the kernel, /dev/sg0 a whole disk.
            lower(_ALL, Isolation.UNKNOWN, f"what {shown} opens isn't known")
    if spec.seccomp.mode == "audit":
        lower(["system calls"], Isolation.SHARED, "the filter only tells, in the mode audit")
    elif spec.seccomp.profile not in ("default", "unconfined"):
        lower(["system calls"], Isolation.UNKNOWN, "what a profile of one's own denies isn't known")
        if isinstance(spec.seccomp.profile, bytes):
            # One that is in the spec as text is what was measured. Of a path another file may have been.
            lower(_BY_FILTER, Isolation.UNKNOWN, f"{os.fsdecode(spec.seccomp.profile)} may be another by now")
    return verdicts


def _opened(spec: Spec) -> tuple[list[bytes], list[bytes]]:
    """(devices of the host that a spec names, everything else of it that may hold the kernel's own files)."""
    devices = [one.source for one in spec.devices]
    trees = [one.source for one in spec.mounts]
    if spec.image != "host":
        trees.append(os.fsencode(spec.image))
    for path in (*(spec.readable or ()), *spec.writable):
        kind, number = _node(path)
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            if kind != stat.S_IFCHR or number not in _STANDARD:
                devices.append(path)
        elif path in spec.writable or _holds_devices(path):
            # All but /dev can be read by default, and was while it was measured.
            trees.append(path)
    return devices, trees


def _devices_below(folder: bytes) -> list[bytes] | None:
    """Device nodes in a folder, but those that every process may use. None where that can't be told of all of it."""
    found: list[bytes] = []
    waiting, left = [folder] if os.path.isdir(folder) else [], _MOST_ENTRIES
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    left -= 1
                    if left < 0:
                        return None
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif not (entry.is_file(follow_symlinks=False) or entry.is_symlink()):
                        kind, number = _node(entry.path)
                        if kind == stat.S_IFBLK or (kind == stat.S_IFCHR and number not in _STANDARD):
                            found.append(entry.path)
        except PermissionError:
            continue  # it isn't the workload's to look into either, who has no more rights than we
        except OSError:
            return None
    return found


def _holds_devices(path: bytes) -> bool:
    real = os.path.realpath(path)
    return real == b"/" or _is_below(real, b"/dev")


def _node(path: bytes) -> tuple[int, tuple[int, int]]:
    """(the kind of a file, the number of a device); zeros where there is none."""
    try:
        about = os.stat(path)
    except OSError:
        return 0, (0, 0)
    return stat.S_IFMT(about.st_mode), (os.major(about.st_rdev), os.minor(about.st_rdev))


def _opens_only_itself(path: bytes) -> bool:
    """Whether a device is one of those that give their user nothing else of the host's."""
    kind, (major, minor) = _node(path)
    renders = major == _GRAPHICS and minor >= _FIRST_RENDERER
    return kind == stat.S_IFCHR and ((major, minor) in _HARMLESS or major == _SOUND or renders)


def kernel_files(path: bytes) -> bool:
    """Whether a path is, holds or lies in a file system of the kernel's own; also where that can't be told."""
    real = os.path.realpath(path)
    try:
        return bool(kernel_mount_of(real, b"unlisted") or kernel_mounts([real]))
    except (OSError, ValueError):
        return True


def _is_below(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder.rstrip(b"/") + b"/")
