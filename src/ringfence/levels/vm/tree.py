"""The file tree of a guest, as steps for its init: the same as a container's, of a share or a disk."""

from __future__ import annotations

import os

from ringfence.images import tree
from ringfence.levels.root import device_steps, directories_above, own_directories, private_steps
from ringfence.spec.rules import Tmpfs
from ringfence.wire import layers, messages
from ringfence.wire.messages import BIND, INSIDE, NODEV, NOSUID, RDONLY, MountStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.spec import Mount, Spec

__all__ = ["HOME", "guest_tree"]

HOME = b"/work"
_IMAGE = b"/.image"


def guest_tree(spec: Spec, user: tuple[int, int], memory_bytes: int) -> tuple[list[MountStep], list[MountStep]]:
    """All steps, and of these the ones that make the spec's own mounts. memory_bytes: the guest's."""
    uid, gid = user
    disk = spec.limits.disk_bytes
    steps, shown = _skeleton(spec)
    if disk is not None or spec.overlay:
        steps.insert(0, layers.memory_layer(disk if disk is not None else memory_bytes // 2))
    if spec.overlay:
        # What is mounted comes after what is made: only that is below the overlay.
        steps.append(layers.overlay(b"/", None))
    steps += shown
    # In a kernel of its own there is nothing of the host's to mask.
    steps += private_steps(user, masks=False)
    if disk is not None:
        steps.append(layers.place(HOME, 0o700))
    else:
        work = b"mode=0700,uid=%d,gid=%d" % (uid, gid)
        steps.append(messages.filesystem(HOME, b"tmpfs", data=work, flags=NOSUID | NODEV))
    mounted = _mounts(spec, user)
    steps += [*mounted, messages.mask(_IMAGE), *(() if spec.overlay else (messages.readonly(b"/"),))]
    return steps, mounted


def _skeleton(spec: Spec) -> tuple[list[MountStep], list[MountStep]]:
    """What a root is made of before anything is mounted in it, and the mounts: of the image and of the devices."""
    steps = [*own_directories(), messages.directory(_IMAGE)]
    if spec.image == "host":
        entries = tree.host_entries()
        shown = [_share(b"image", _IMAGE, writable=False)]
    else:
        entries = tree.entries(spec.image)
        flags = RDONLY | NOSUID | NODEV
        # "ro" too: a file system that may be written to can't be made of a read-only disk (EACCES).
        shown = [messages.filesystem(_IMAGE, b"erofs", source=b"/dev/vda", data=b"ro", flags=flags)]
    for entry in entries:
        at = b"/" + entry.name
        if entry.kind == "symlink":
            steps.append(messages.symlink(at, entry.target))
            continue
        steps.append(messages.directory(at) if entry.kind == "directory" else messages.file(at))
        if spec.overlay and entry.kind == "directory":
            shown.append(layers.overlay(at, _IMAGE + at, inside=True))
        else:
            shown.append(messages.bind(at, _IMAGE + at, RDONLY | NOSUID | NODEV | INSIDE))
    devices = device_steps(lambda path: path)  # of the guest's own devtmpfs
    steps += [step for step in devices if step.kind != BIND]
    return steps, shown + [step for step in devices if step.kind == BIND]


def _mounts(spec: Spec, user: tuple[int, int]) -> list[MountStep]:
    """The spec's own mounts, parents first."""
    numbers = {mount.target: number for number, mount in enumerate(spec.mounts)}
    both: list[Mount | Tmpfs] = [*spec.mounts, *spec.tmpfs]
    steps: list[MountStep] = []
    for one in sorted(both, key=lambda one: one.target):
        if isinstance(one, Tmpfs):
            steps += [*directories_above(one.target), messages.directory(one.target)]
            steps.append(layers.tmpfs(one.target, one.size_bytes, one.mode, user))
        else:
            tag = b"mount%d" % numbers[one.target]
            steps += _mount_steps(tag, one.source, one.target, writable=one.writable)
    return steps


def _share(tag: bytes, target: bytes, *, writable: bool) -> MountStep:
    # cache=loose keeps what was read; nobody but us changes a read-only share's files while the guest is there.
    options = b"trans=virtio,version=9p2000.L,msize=512000,cache=" + (b"mmap" if writable else b"loose")
    flags = NOSUID | NODEV | (0 if writable else RDONLY)
    return messages.filesystem(target, b"9p", source=tag, data=options, flags=flags)


def _mount_steps(tag: bytes, source: bytes, target: bytes, *, writable: bool) -> list[MountStep]:
    """A share shows a folder; a single file is in a folder of its own there, and bound to its place."""
    steps = directories_above(target)
    if os.path.isdir(source):
        return [*steps, messages.directory(target), _share(tag, target, writable=writable)]
    hidden = b"/." + tag
    flags = NOSUID | NODEV | INSIDE | (0 if writable else RDONLY)
    return [
        *steps,
        messages.file(target),
        messages.directory(hidden),
        _share(tag, hidden, writable=writable),
        messages.bind(target, hidden + b"/file", flags),
        messages.mask(hidden),
    ]
