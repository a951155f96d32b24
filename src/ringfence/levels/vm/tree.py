"""The file tree of a guest, as steps for its init: the same as a container's, of a share or a disk."""

from __future__ import annotations

import os

from ringfence.images import tree
from ringfence.levels.network.rules import RESOLV_CONF, NetworkFiles
from ringfence.levels.root import device_steps, directories_above, own_directories, private_steps
from ringfence.levels.vm.card import disk_files
from ringfence.levels.vm.identity import identity_steps
from ringfence.levels.vm.vmm import Share
from ringfence.spec.rules import Tmpfs
from ringfence.wire import layers, messages
from ringfence.wire.messages import BIND, INSIDE, NODEV, NOSUID, RDONLY, MountStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.spec import Mount, Spec

__all__ = ["HOME", "HOSTNAME", "guest_tree", "mount_shares"]

HOME = b"/work"
HOSTNAME = "ringfence"
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
    nat = spec.network.mode == "nat"
    files = NetworkFiles(spec.image, spec.hostname or HOSTNAME, user) if nat and not spec.image_is_disk else None
    if files is not None:
        if files.missing:  # below an overlay, as `card.unmet` sees to
            steps.append(messages.file(b"/etc/resolv.conf", RESOLV_CONF))
        steps += files.before
    # In a kernel of its own there is nothing of the host's to mask.
    steps += private_steps(user, masks=False)
    steps += files.after if files is not None else []
    if nat and spec.image_is_disk:
        steps += disk_files(spec.hostname or HOSTNAME, user)
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
    devices = device_steps(lambda path: path)  # of the guest's own devtmpfs
    # The host's own is one of its secrets, and not shown.
    own, own_mounted = identity_steps() if spec.image != "host" else ([], [])
    made = [*own, *(one for one in devices if one.kind != BIND)]
    bound = [*own_mounted, *(one for one in devices if one.kind == BIND)]
    if spec.image_is_disk:
        steps = [*own_directories(), layers.disk(b"/dev/vda", tree.OWN_NAMES), *made]
        return steps, [layers.disk_shown(overlay=spec.overlay), *bound]
    steps = [*own_directories(), messages.directory(_IMAGE)]
    if spec.image == "host":
        entries = tree.host_entries()
        shown = [_share(b"image", _IMAGE, writable=False, keep=True)]
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
    return steps + made, shown + bound


# What a machine shows of the host's folders is in two devices, whatever their number: a microvm has few.
_TAGS = {False: b"mounts", True: b"writable"}


def mount_shares(spec: Spec) -> list[Share]:
    """What the machine has to share for the spec's own mounts."""
    return [
        Share(
            tag=_TAGS[one.writable].decode(),
            name=str(number),
            source=one.source,
            writable=one.writable,
            secret=one.secret,
        )
        for number, one in enumerate(spec.mounts)
    ]


def _mounts(spec: Spec, user: tuple[int, int]) -> list[MountStep]:
    """The spec's own mounts, parents first. Each is a folder, or a file, of a share that is hidden in the end."""
    steps: list[MountStep] = []
    hidden = {writable: b"/." + _TAGS[writable] for writable in sorted({one.writable for one in spec.mounts})}
    for writable, at in hidden.items():
        steps += [messages.directory(at), _share(_TAGS[writable], at, writable=writable)]
    numbers = {mount.target: number for number, mount in enumerate(spec.mounts)}
    both: list[Mount | Tmpfs] = [*spec.mounts, *spec.tmpfs]
    for one in sorted(both, key=lambda one: one.target):
        steps += directories_above(one.target)
        if isinstance(one, Tmpfs):
            steps.append(messages.directory(one.target))
            steps.append(layers.tmpfs(one.target, one.size_bytes, one.mode, user))
            continue
        steps.append(messages.directory(one.target) if os.path.isdir(one.source) else messages.file(one.target))
        flags = NOSUID | NODEV | INSIDE | (0 if one.writable else RDONLY)
        steps.append(messages.bind(one.target, hidden[one.writable] + b"/%d" % numbers[one.target], flags))
    return steps + [messages.mask(at) for at in hidden.values()]


def _share(tag: bytes, target: bytes, *, writable: bool, keep: bool = False) -> MountStep:
    """keep: what was looked up or read once is not asked for again: for what the host doesn't change meanwhile. Else
    what the host writes is seen at once, as in a container's mount, and a walk of many names takes twice as long.
    """
    options = b"trans=virtio,version=9p2000.L,msize=512000,cache=" + (b"loose" if keep else b"mmap")
    flags = NOSUID | NODEV | (0 if writable else RDONLY)
    return messages.filesystem(target, b"9p", source=tag, data=options, flags=flags)
