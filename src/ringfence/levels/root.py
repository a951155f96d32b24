"""The steps of a file tree that every sandbox with a root of its own has, and the host's userland as a ready one."""

from __future__ import annotations

import os

from ringfence.images import tree
from ringfence.images.kernel_mounts import kernel_mounts
from ringfence.levels.base import Ability
from ringfence.wire import messages
from ringfence.wire.messages import NODEV, NOEXEC, NOSUID, RDONLY, RECURSIVE, MountStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from io import FileIO

__all__ = [
    "HOST_TEMPLATE",
    "device_steps",
    "directories_above",
    "host_template",
    "kernel_places",
    "no_host_files",
    "own_directories",
    "private_steps",
]

# What the launcher knows the host's userland by; it is at /t/NAME.
HOST_TEMPLATE = b"host"

_DEVICES = (b"null", b"zero", b"full", b"random", b"urandom", b"tty")

# The OCI runtimes' masked and read-only paths (runtime-spec, config-linux.md; the lists are Docker's and Podman's).
_MASKED = (
    b"/proc/acpi",
    b"/proc/asound",
    b"/proc/interrupts",
    b"/proc/kcore",
    b"/proc/keys",
    b"/proc/latency_stats",
    b"/proc/sched_debug",
    b"/proc/scsi",
    b"/proc/timer_list",
    b"/proc/timer_stats",
)
_READONLY = (b"/proc/bus", b"/proc/fs", b"/proc/irq", b"/proc/sys", b"/proc/sysrq-trigger")


_private: dict[tuple[bool, bool, bool], tuple[MountStep, ...]] = {}


def private_steps(user: tuple[int, int], *, masks: bool = True, host_proc: bool = False) -> tuple[MountStep, ...]:
    """What is every sandbox's own: /proc, /tmp, /dev/shm, terminals; /run for root, who alone may write there. /home is
    an empty folder of the tree. masks: what /proc tells of the host, or would change there, is hidden. host_proc: it is
    the launcher's /proc, with all processes of the host, where a user namespace of its own may not mount that anew.
    """
    # Kept, as each start asks for them.
    key = (user[0] == 0, masks, host_proc)
    if key not in _private:
        _private[key] = _private_steps(*key)
    return _private[key]


def _private_steps(for_root: bool, masks: bool, host_proc: bool) -> tuple[MountStep, ...]:
    tmpfs = NOSUID | NODEV
    terminals = b"newinstance,ptmxmode=0666,mode=620"
    proc_flags = NOSUID | NODEV | NOEXEC
    steps = [
        messages.bind(b"/proc", b"/proc", proc_flags)
        if host_proc
        else messages.filesystem(b"/proc", b"proc", flags=proc_flags),
        messages.filesystem(b"/tmp", b"tmpfs", data=b"mode=1777,size=1g", flags=tmpfs),
        messages.filesystem(b"/dev/shm", b"tmpfs", data=b"mode=1777,size=256m", flags=tmpfs),
        messages.filesystem(b"/dev/pts", b"devpts", data=terminals, flags=NOSUID | NOEXEC),
    ]
    if for_root:
        steps.append(messages.filesystem(b"/run", b"tmpfs", data=b"mode=0755,size=64m", flags=tmpfs))
    if masks:
        steps += [messages.mask(path) for path in _MASKED]
        steps += [messages.readonly(path) for path in _READONLY]
    return tuple(steps)


def no_host_files() -> dict[str, Ability]:
    """The rules that a level with a file tree of its own needs none of: what isn't shown in it can't be reached."""
    found = {}
    for rule, help in (
        ("readable", "show just what it is to read: mounts=[Mount(path, path)], or image= for another userland"),
        ("writable", "use mounts=[Mount(path, path, writable=True)]"),
    ):
        reason = "its files are a tree of its own, in which nothing of the host is but the image and the mounts"
        found[rule] = Ability(rule=rule, reason=reason, help=help)
    return found


def own_directories() -> list[MountStep]:
    """What every sandbox's root has of its own."""
    steps = [messages.directory(path) for path in (b"/dev", b"/home", b"/run", b"/work", b"/var", b"/mnt", b"/root")]
    steps += [
        messages.directory(b"/proc", 0o555),
        messages.directory(b"/sys", 0o555),
        messages.directory(b"/tmp", 0o1777),
    ]
    steps += [messages.symlink(b"/var/tmp", b"/tmp"), messages.symlink(b"/var/run", b"/run")]
    return steps


def directories_above(target: bytes) -> list[MountStep]:
    """The directories on the way to a mount's target."""
    above = []
    while (target := os.path.dirname(target)) != b"/":
        above.append(target)
    return [messages.directory(path) for path in reversed(above)]


def device_steps(open_device: Callable[[bytes], bytes | int]) -> list[MountStep]:
    """/dev with only the standard nodes (runtime-spec, config-linux.md, "Default Devices").

    open_device: what is mounted for one of the host's nodes: its path as init sees it, or a descriptor.
    """
    steps = []
    for name in _DEVICES:
        steps.append(messages.file(b"/dev/" + name, mode=0o666))
        steps.append(messages.bind(b"/dev/" + name, open_device(b"/dev/" + name), NOSUID | NOEXEC))
    steps += [messages.directory(b"/dev/pts"), messages.directory(b"/dev/shm", 0o1777)]
    links = {b"fd": b"/proc/self/fd", b"stdin": b"fd/0", b"stdout": b"fd/1", b"stderr": b"fd/2", b"ptmx": b"pts/ptmx"}
    return steps + [messages.symlink(b"/dev/" + name, to) for name, to in links.items()]


def host_template(mountinfo: FileIO | None) -> list[MountStep]:
    """The host's userland as a ready tree, which the launcher makes, of what is mounted where it started. mountinfo: of
    that namespace.
    """
    steps = own_directories()
    for entry in tree.host_entries():
        at = b"/" + entry.name
        if entry.kind == "symlink":
            steps.append(messages.symlink(at, entry.target))
            continue
        steps.append(messages.directory(at) if entry.kind == "directory" else messages.file(at))
        steps.append(messages.bind(at, at, RDONLY | NOSUID | NODEV | RECURSIVE))
    steps += device_steps(lambda path: path)
    steps += [messages.mask(path) for path in (*tree.host_secrets(), *kernel_places(b"", mountinfo))]
    steps.append(messages.readonly(b"/"))
    return steps


def kernel_places(folder: bytes, also: FileIO | None = None) -> list[bytes]:
    """Where in a sandbox's root the kernel's own file systems would show, of what is mounted in the image: its folder,
    or b"" for the host's userland. also: the mountinfo of another mount namespace besides our own.
    """
    folders = [folder] if folder else [b"/" + name for name in tree.HOST_NAMES]
    return [
        place
        for point, _ in kernel_mounts(folders, also)
        if (place := point[len(folder) :]).strip(b"/").partition(b"/")[0] not in tree.OWN_NAMES
    ]
