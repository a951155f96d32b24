"""What a level isolates with the rules of one spec: what the probe saw there, less what the spec itself opens.

The probe looks for what every sandbox has. A spec's mounts, devices, joined namespaces and profiles may open more than
it looks for, so each of these lowers the verdicts that it touches, to what is true in any case.
"""

from __future__ import annotations

import os
import stat

from ringfence.comparison.isolation import RESOURCES, Isolation, Verdict, judge_all, other_kernel
from ringfence.errors import RingfenceError, SpecError
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
# What no file system can open.
_NOT_BY_FILES = frozenset(("kernel", "memory", "CPUs", "capabilities", "system calls", "new privileges", "users"))
# File systems whose files are no data, but the kernel itself (proc_filesystems(5)).
_OF_THE_KERNEL = frozenset(
    (
        *("proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "mqueue", "debugfs", "tracefs", "securityfs"),
        *("bpf", "configfs", "fusectl", "pstore", "efivarfs", "binfmt_misc", "nsfs", "selinuxfs", "resctrl"),
    )
)
# Documentation/admin-guide/devices.txt: null, zero, full, random, urandom, tun, fuse, kvm; sound and graphics.
_HARMLESS = frozenset(((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (10, 200), (10, 229), (10, 232)))
_HARMLESS_MAJORS = frozenset((116, 226))


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
        if kernel_files(mount.source):
            others = [name for name in _ALL if name not in _NOT_BY_FILES]
            lower(others, Isolation.UNKNOWN, f"what {shown} opens of the kernel isn't known")
    for device in spec.devices:
        shown = os.fsdecode(device.source)
        lower(["devices"], Isolation.SHARED, f"the host's {shown} can be used")
        if not _opens_only_itself(device.source):
            # /dev/mem is all of the kernel, /dev/sg0 a whole disk.
            lower(_ALL, Isolation.UNKNOWN, f"what {shown} opens isn't known")
    if spec.seccomp.mode == "audit":
        lower(["system calls"], Isolation.SHARED, "the filter only tells, in the mode audit")
    elif spec.seccomp.profile not in ("default", "unconfined"):
        lower(["system calls"], Isolation.UNKNOWN, "what a profile of one's own denies isn't known")
    return verdicts


def _opens_only_itself(path: bytes) -> bool:
    """Whether a device is one of those that give their user nothing else of the host's."""
    try:
        about = os.stat(path)
    except OSError:
        return False
    number = os.major(about.st_rdev), os.minor(about.st_rdev)
    return stat.S_ISCHR(about.st_mode) and (number in _HARMLESS or number[0] in _HARMLESS_MAJORS)


def kernel_files(path: bytes) -> bool:
    """Whether a path is, holds or lies in a file system of the kernel's own; also where that can't be told."""
    try:
        real = os.path.realpath(path)
        with open("/proc/self/mountinfo", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return True
    nearest, kind = b"", b""
    for line in lines:
        before, _, after = line.partition(b" - ")
        point = _unescaped(before.split(b" ")[4])
        fstype = after.split(b" ")[0]
        # proc_pid_mountinfo(5): the later of two mounts on one point covers the other.
        if _is_below(real, point) and len(point) >= len(nearest):
            nearest, kind = point, fstype
        if _is_below(point, real) and fstype.decode(errors="replace") in _OF_THE_KERNEL:
            return True
    return not nearest or kind.decode(errors="replace") in _OF_THE_KERNEL


def _is_below(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder.rstrip(b"/") + b"/")


def _unescaped(point: bytes) -> bytes:
    """mountinfo has blanks, tabs, newlines and backslashes as three octal digits."""
    parts = point.split(b"\\")
    return parts[0] + b"".join(bytes([int(one[:3], 8) & 0xFF]) + one[3:] for one in parts[1:])
