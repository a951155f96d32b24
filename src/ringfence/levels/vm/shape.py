"""The machine that a spec asks for."""

from __future__ import annotations

import math
import os

from ringfence.errors import Unavailable
from ringfence.levels.users import resolve
from ringfence.levels.vm import card, emulator, initramfs, kernel, modules
from ringfence.levels.vm.template import machine_memory
from ringfence.levels.vm.tree import mount_shares
from ringfence.levels.vm.vmm import Machine, Share
from ringfence.linux import ids
from ringfence.wire.launcher import core_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.levels.vm.kernel import GuestKernel
    from ringfence.spec import Spec

__all__ = ["KERNEL_BYTES", "USER", "guest_kernel", "machine_for", "user_of"]

USER = (1000, 1000)
# What the guest's own kernel and init take, on top of what the workload may use.
KERNEL_BYTES = 128 << 20
# Enough for this much; beyond it, what it takes to keep account of each page (64 of 4096 bytes), and as much again.
_SMALL_BYTES, _PAGES_OF_PAGES = 1 << 30, 32
_DEFAULT_MEMORY_BYTES = 512 << 20

# Where the initramfs of a kernel and an init is: to read init to find out takes 2 ms.
_initramfs: dict[tuple[object, ...], str] = {}


def guest_kernel(spec: Spec | None = None) -> GuestKernel:
    """The kernel that guests have, or that of a spec's own. Raises SpecError, Unavailable."""
    if spec is not None and spec.kernel is not None:
        from ringfence.levels.vm import own_kernel

        return own_kernel.prepare(spec.kernel)
    found = kernel.find()
    if found is None:  # it was there a moment ago
        raise Unavailable("vm", "the guest's kernel isn't prepared", "run 'ringfence setup'")
    return found


def user_of(spec: Spec) -> tuple[int, int]:
    """(uid, gid) of the command in the guest."""
    return resolve(spec.user, spec.image) if spec.user is not None else USER


def machine_for(spec: Spec, found: GuestKernel, accelerator: str) -> Machine:
    """The machine for that spec. Makes disks and initramfs where they are missing. Raises SpecError, Unavailable."""
    shares, disks, disk_format, disk_identity = [], [], "raw", None
    if spec.image == "host":
        shares.append(Share(tag="image", source=None, writable=False, owned=spec.overlay))
    elif spec.image_is_disk:
        from ringfence.images import disk

        given = disk.inspect(spec.image)
        disks.append(given.path)
        disk_format, disk_identity = given.format, given.identity
    else:
        from ringfence.levels.vm import images

        disks.append(images.erofs_disk(spec.image))
    shares += mount_shares(spec)
    limits = spec.limits
    memory = _DEFAULT_MEMORY_BYTES
    if limits.memory_bytes is not None:
        pages = max(0, limits.memory_bytes - _SMALL_BYTES) // _PAGES_OF_PAGES
        memory = limits.memory_bytes + pages + KERNEL_BYTES
    qemu = emulator.look()
    user = user_of(spec)
    shown = user if max(user) < ids.CONTAINER_IDS else USER
    return Machine(
        kernel=found.vmlinux,
        initramfs=_initramfs_of(found, for_disks=spec.image_is_disk),
        memory_bytes=machine_memory(memory),
        cpus=max(1, math.ceil(limits.cpus or 1)),
        accelerator=accelerator,
        shares=tuple(shares),
        disks=tuple(disks),
        disk_format=disk_format,
        disk_identity=disk_identity,
        # The guest's user is QEMU's on the host, so that both see the same owners in a share. But never root where
        # root's files are root's: it reads for whoever is in the guest (userland.py).
        user=USER if spec.overlay and spec.image == "host" and 0 in user else shown,
        cpu_weight=limits.cpu_weight,
        cpuset=limits.cpuset,
        sets=(*(("overlay",) if spec.overlay else ()), *(modules.LOADED_AHEAD if spec.image_is_disk else ())),
        card=card.of(spec),
        append=spec.kernel.append if spec.kernel is not None else "",
        board=qemu.machine(),
        program=qemu.path,
    )


def _initramfs_of(found: GuestKernel, *, for_disks: bool) -> str:
    core = core_path()
    about = os.stat(core)
    key = (for_disks, found.digest, found.vmlinux, core, about.st_size, about.st_mtime_ns, about.st_ino)
    path = _initramfs.get(key)
    if path is None or not os.path.exists(path):
        build = initramfs.for_disks if for_disks else initramfs.build
        _initramfs[key] = path = build(found, core)
    return path
