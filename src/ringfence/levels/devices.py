"""Device nodes of the host in a sandbox: who may use one there, and by what.

A mount's read-only flag doesn't keep anybody from writing to a device, and the host's own node belongs to nobody in a
user namespace. So a privileged caller's container gets nodes of its own, on a tmpfs that was made outside its user
namespace: they belong to the host's root, and their group is the workload's, with just the access that was asked for.
Neither the workload, who doesn't own them, nor root inside, to whom their owner means nothing, can change that. An
unprivileged caller can't make nodes; there the host's own is shown, where the caller's rights are those asked for.
"""

from __future__ import annotations

import os
import stat

from ringfence.errors import Unmet
from ringfence.levels.shown import outside_gid
from ringfence.wire import messages
from ringfence.wire.messages import INSIDE, NOEXEC, NOSUID, RDONLY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ringfence.levels.container import ContainerSandbox
    from ringfence.spec import Device, Spec
    from ringfence.wire.messages import MountStep

__all__ = ["container_steps", "container_unmet", "process_unmet", "shown"]

_FOLDER = b"/dev/.nodes"
_READ, _WRITE = 4, 2
_BITS = {"r": _READ, "w": _WRITE, "rw": _READ | _WRITE}
_STANDARD = frozenset(b"/dev/" + name for name in (b"null", b"zero", b"full", b"random", b"urandom", b"tty", b"ptmx"))
_TAKEN = (b"/dev/pts", b"/dev/shm", b"/dev/fd", b"/dev/stdin", b"/dev/stdout", b"/dev/stderr", _FOLDER)


def shown(device: Device) -> tuple[bytes, bytes, str]:
    """As `levels.base.requested` has it."""
    return device.source, device.target, device.access


def _mode_allows(about: os.stat_result, uid: int, gid: int) -> int:
    """What the mode lets somebody without capabilities do, by those two ids alone."""
    shift = 6 if about.st_uid == uid else 3 if about.st_gid == gid else 0
    return stat.S_IMODE(about.st_mode) >> shift & (_READ | _WRITE)


def _callers_rights(source: bytes) -> int:
    return (_READ if os.access(source, os.R_OK) else 0) | (_WRITE if os.access(source, os.W_OK) else 0)


def _misplaced(device: Device) -> Unmet | None:
    target = device.target
    if target in _STANDARD or any(target == one or target.startswith(one + b"/") for one in _TAKEN):
        reason = f"{os.fsdecode(target)} is there already, and is the sandbox's own"
        return Unmet("devices", shown(device), reason, "choose another target")
    return None


def container_unmet(spec: Spec, *, privileged: bool) -> list[Unmet]:
    """What of the spec's devices a container can't have."""
    found = [one for one in map(_misplaced, spec.devices) if one is not None]
    if privileged:
        return found
    for device in spec.devices:
        wanted = _BITS[device.access]
        name = os.fsdecode(device.source)
        by_mode = _mode_allows(os.stat(device.source), os.geteuid(), os.getegid())
        # What the caller has by a supplementary group, the workload may have or not.
        if wanted & ~by_mode:
            reason = f"the caller's own uid and gid may not do that with {name}"
            found.append(Unmet("devices", shown(device), reason, "run as root, or change the node's owner"))
        elif _callers_rights(device.source) & ~wanted:
            reason = f"the caller may do more than {device.access} with {name}, and only root can take that away"
            found.append(Unmet("devices", shown(device), reason, "ask for 'rw', or run as root"))
    return found


def process_unmet(spec: Spec, *, privileged: bool) -> list[Unmet]:
    """The same of a process, which opens the host's own node: its mode is one half of it, Landlock the other."""
    found = []
    uid, gid = spec.user if isinstance(spec.user, tuple) else (-1, -1)  # a uid that owns nothing
    for device in spec.devices:
        name = os.fsdecode(device.source)
        about = os.stat(device.source)
        allowed = _mode_allows(about, uid, gid) if privileged else _callers_rights(device.source)
        help = "use isolation='container'"
        if device.source != device.target:
            reason = f"a process sees the host's paths: {name} can't appear elsewhere"
        elif _BITS[device.access] & ~allowed:
            reason = f"the workload's uid may not do that with {name} (mode {stat.S_IMODE(about.st_mode):04o})"
            help = "name its owner by user=, or use isolation='container'"
        elif _opened_besides(spec, device) & ~_BITS[device.access]:
            reason = f"another rule opens {name} for more than {device.access!r}"
            help = "leave /dev out of readable, writable and mounts"
        else:
            continue
        found.append(Unmet("devices", shown(device), reason, help))
    return found


def _opened_besides(spec: Spec, device: Device) -> int:
    """What the spec's paths allow for a device by themselves."""
    real = os.path.realpath(device.source)

    def covered(paths: Iterable[bytes]) -> bool:
        return any(real == path or real.startswith(path.rstrip(b"/") + b"/") for path in map(os.path.realpath, paths))

    read = _READ if covered(spec.readable or ()) else 0
    writable = [*spec.writable, *(mount.source for mount in spec.mounts if mount.writable)]
    return _READ | _WRITE if covered(writable) else read


def container_steps(sandbox: ContainerSandbox, above: Callable[[bytes], list[MountStep]]) -> list[MountStep]:
    """The steps that put the spec's devices into /dev. above: makes the directories on the way to a target."""
    devices = sandbox.spec.devices
    steps: list[MountStep] = []
    flags = RDONLY | NOSUID | NOEXEC
    if sandbox.privileged:
        steps.append(messages.directory(_FOLDER, 0o755))
        steps.append(messages.bind(_FOLDER, sandbox.keep_fd(_nodes(devices, outside_gid(sandbox))), flags))
    for number, device in enumerate(devices):
        steps += [*above(device.target), messages.file(device.target, mode=0)]
        if sandbox.privileged:
            steps.append(messages.bind(device.target, _FOLDER + b"/%d" % number, flags | INSIDE))
        else:
            steps.append(messages.bind(device.target, device.source, flags))
    if sandbox.privileged:
        steps.append(messages.mask(_FOLDER))
    return steps


def _nodes(devices: tuple[Device, ...], gid: int) -> int:
    """A detached tmpfs with a node for each device, named by its number; a descriptor that the caller closes."""
    from ringfence.linux import mounts

    fd = mounts.new_tmpfs(b"mode=0755,size=64k,nr_inodes=%d" % (len(devices) + 2))
    try:
        for number, device in enumerate(devices):
            about = os.stat(device.source)
            kind = stat.S_IFMT(about.st_mode)
            name = b"%d" % number
            # The umask is the caller's, so the mode is set once more.
            os.mknod(name, kind, about.st_rdev, dir_fd=fd)
            os.chown(name, 0, gid, dir_fd=fd)
            os.chmod(name, _BITS[device.access] << 3, dir_fd=fd)
    except BaseException:
        os.close(fd)
        raise
    return fd
