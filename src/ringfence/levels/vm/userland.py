"""The host's userland for a guest that may change it in an overlay.

Elsewhere root's files are nobody's in a sandbox. A copy that can be changed must have an owner, so here what is the
host's root's is root's in the guest. What only root may read stays so all the same: QEMU, which reads for the guest,
runs under another id of its jail, whoever the workload is.
"""

from __future__ import annotations

from ringfence.errors import Unmet
from ringfence.images import tree
from ringfence.levels.layer import mounts_below
from ringfence.levels.shown import as_it_is, masks, roots_own
from ringfence.levels.users import resolve
from ringfence.wire import messages
from ringfence.wire.messages import NODEV, NOEXEC, NOFOLLOW, NOSUID, RDONLY, RECURSIVE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.levels.container import ContainerSandbox
    from ringfence.levels.host import Host
    from ringfence.spec import Spec
    from ringfence.wire.messages import MountStep

__all__ = ["overlay_unmet", "owned_userland"]

# Each takes a descriptor of the frame that plans the jail, of which there are 64.
_MOST_MOUNTED = 36
_KEPT = RDONLY | NOSUID | NODEV | NOEXEC | NOFOLLOW


def overlay_unmet(spec: Spec, host: Host) -> list[Unmet]:
    """Why this spec can't have an overlay over the host's userland."""
    reason = help = ""
    if not host.privileged:
        reason = "the host's files are root's, whom an unprivileged caller can't map: they couldn't be changed"
        help = "run as root, or use a rootfs folder as image"
    elif spec.mounts and 0 in _user(spec):
        # What owns a mount is QEMU's user, and that can't be root here.
        reason = "root in the guest can have an overlay over the host's files, or mounts, as one server serves both"
        help = "leave the mounts or user=0 out, or use a rootfs folder as image"
    elif len(below := mounts_below(_folders())) + len(spec.mounts) > _MOST_MOUNTED:
        reason = f"{len(below)} file systems are mounted below the host's userland: more than QEMU's jail can be given"
        help = "unmount some, or use a rootfs folder as image"
    return [Unmet("overlay", True, reason, help)] if reason else []


def _folders() -> list[bytes]:
    return [b"/" + entry.name for entry in tree.host_entries() if entry.kind == "directory"]


def _user(spec: Spec) -> tuple[int, int]:
    return resolve(spec.user, spec.image) if spec.user is not None else (1000, 1000)


def owned_userland(jail: ContainerSandbox, at: bytes) -> list[MountStep]:
    """The steps that show it beneath `at` in QEMU's jail."""
    steps = []
    for entry in tree.host_entries():
        if entry.kind == "symlink":
            continue  # the guest makes its own
        path = b"/" + entry.name
        steps.append(messages.directory(at + path) if entry.kind == "directory" else messages.file(at + path))
        steps.append(messages.bind(at + path, roots_own(jail, path), _KEPT))
    hidden = masks(jail, None, at)
    masked = {step.target for step in hidden}
    for point in mounts_below(_folders()):
        if at + point in masked:
            continue
        # Of a file system of its own nothing is known: its files are nobody's.
        steps.append(messages.bind(at + point, as_it_is(jail, point), _KEPT | RECURSIVE))
    return steps + hidden
