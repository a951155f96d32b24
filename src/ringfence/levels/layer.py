"""The writable layer of a sandbox: what bounds the disk that it may use, makes its root writable, and tells what was
changed.

Init keeps all that a workload may write to in its work directory, where limits.disk bounds it, and in its root, where
it has an overlay, in one file system. Where that has a size it is a tmpfs of the sandbox's own: the one quota that
takes neither a privilege nor a file system that was made for it.
"""

from __future__ import annotations

import os

from ringfence.errors import Unmet
from ringfence.levels.workdir import WorkDirectory
from ringfence.result import Applied, Change
from ringfence.wire import layers
from ringfence.wire.frames import Type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ringfence.levels.host import Host
    from ringfence.spec import Spec
    from ringfence.wire.frames import Frame
    from ringfence.wire.messages import MountStep

__all__ = [
    "DEFAULT_LAYER_BYTES",
    "OVERLAY_KERNEL",
    "Layer",
    "mounts_below",
    "overlay_unmet",
    "why_no_overlay",
]

# Of an overlay without limits.disk where only memory can hold it.
DEFAULT_LAYER_BYTES = 1 << 30
# overlayfs over mounts that map ids; overlayfs in a user namespace with its marks in a tmpfs's user.* attributes.
OVERLAY_KERNEL, _MEMORY_LAYER_KERNEL = (5, 19), (6, 6)
_MOST_CHANGES = 65536
_known: dict[tuple[str, bool], tuple[str, str] | None] = {}


def _release(host: Host) -> tuple[int, int]:
    major, _, rest = host.kernel.partition(".")
    minor = rest.partition(".")[0].partition("-")[0]
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0)


def why_no_overlay(host: Host) -> tuple[str, str] | None:
    """(reason, help) where this host has no overlay for a sandbox; None where it has."""
    key = (host.kernel, host.privileged)
    if key not in _known:
        _known[key] = _look_for_overlay(host)
    return _known[key]


def _look_for_overlay(host: Host) -> tuple[str, str] | None:
    release = _release(host)
    if release < OVERLAY_KERNEL:
        return f"overlayfs over mapped ids needs Linux 5.19, and this is {host.kernel}", "use a newer kernel"
    if not host.privileged and release < _MEMORY_LAYER_KERNEL:
        return f"an unprivileged caller's overlay needs Linux 6.6, and this is {host.kernel}", "run as root"
    with open("/proc/filesystems", "rb") as file:
        known = b"\toverlay\n" in file.read()
    if not known and not os.path.exists(f"/lib/modules/{host.kernel}/kernel/fs/overlayfs"):
        return "this kernel has no overlayfs", "load the module: modprobe overlay"
    return None


def overlay_unmet(spec: Spec, host: Host) -> list[Unmet]:
    """What of this spec's overlay can't be had, beyond `why_no_overlay`."""
    if not spec.overlay or why_no_overlay(host) is not None:
        return []
    if spec.limits.disk_bytes is not None and _release(host) < _MEMORY_LAYER_KERNEL:
        reason = (
            f"a layer with a size is a tmpfs, which takes overlayfs's marks from Linux 6.6 on: this is {host.kernel}"
        )
        return [Unmet("overlay", True, reason, "leave limits.disk out")]
    if host.privileged:
        if spec.image == "host" and "CAP_SYS_ADMIN" in spec.capabilities:
            # What masks the host's secrets is mounted in the sandbox's own namespace here, and root's files are root's.
            reason = "with CAP_SYS_ADMIN it could unmount what hides the host's secrets from it"
            return [Unmet("overlay", True, reason, "leave the capability out, or use a rootfs folder as image")]
        return []
    help = "run as root, or use a rootfs folder of your own as image"
    if spec.image == "host":
        reason = "the host's files are root's, whom an unprivileged caller can't map: they couldn't be changed"
        return [Unmet("overlay", True, reason, help)]
    if os.stat(spec.image).st_uid != os.geteuid():
        reason = f"{spec.image} belongs to somebody whom an unprivileged caller can't map: it couldn't be changed"
        return [Unmet("overlay", True, reason, help)]
    return []


def mounts_below(folders: Iterable[bytes]) -> list[bytes]:
    """Mount points of this namespace below these folders, without those below another one of them. A lower layer shows
    what is beneath them, which nobody meant to be seen.
    """
    inside = tuple(folder + b"/" for folder in folders)
    found: list[bytes] = []
    with open("/proc/self/mountinfo", "rb") as file:
        points = sorted({line.split(b" ")[4] for line in file})
    for point in points:
        path = point.decode("unicode_escape").encode("latin-1") if b"\\" in point else point
        if path.startswith(inside) and not (found and path.startswith(found[-1] + b"/")):
            found.append(path)
    return found


class Layer:
    """What init told of the file systems that it made. `fd`: the layer's directory, or -1."""

    __slots__ = ("_end", "_made", "_workdir", "fd", "sizes")

    def __init__(self) -> None:
        self.fd = -1
        self.sizes: dict[bytes, tuple[int, int]] = {}
        self._end = layers.LayerEnd()
        self._workdir: WorkDirectory | None = None
        self._made: set[bytes] = set()

    def take(self, frame: Frame) -> bool:
        """Whether the frame was one of these. Raises ProtocolError."""
        if frame.type == Type.SIZES:
            if frame.fds and self.fd < 0:
                self.fd = frame.fds.pop()
            self.sizes = layers.parse_sizes(frame.payload)
            return True
        if frame.type == Type.LAYER_END:
            self._end.add(frame.payload, _MOST_CHANGES + 1024)
            return True
        return False

    def made_by_us(self, steps: Iterable[MountStep]) -> None:
        """Steps that leave something in the layer which is no change of the workload's."""
        self._made.update(step.target for step in steps)

    def begin(self) -> None:
        """Another command: what was told at the end of the last one is told anew."""
        self._end = layers.LayerEnd()

    @property
    def workdir(self) -> WorkDirectory:
        """The work directory, which is the layer's first place."""
        if self._workdir is None:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._workdir = WorkDirectory.of(os.open("place/0", flags, dir_fd=self.fd))
        return self._workdir

    def full(self) -> bool:
        """Whether nothing more could be written at the command's end, or no file be made."""
        return self._end.free is not None and 0 in self._end.free

    def changes(self) -> tuple[Change, ...]:
        found = []
        for path in sorted(self._end.changes):
            kind, what, size = self._end.changes[path]
            if path in self._made and what in ("directory", "file") and kind != "deleted":
                continue
            found.append(
                Change(path=os.fsdecode(path), kind=kind, what=what, size_bytes=size if what == "file" else None)
            )
        return tuple(found)

    def applied(self, spec: Spec, by: str = "by statfs") -> list[Applied]:
        found = []
        whole = self.sizes.get(b"/")
        if spec.limits.disk_bytes is not None:
            what = "the work directory and the overlay's layer" if spec.overlay else "the work directory"
            inodes = f", {whole[1]} inodes" if whole else ""
            found.append(
                Applied(
                    rule="disk",
                    requested=spec.limits.disk_bytes,
                    effective=whole[0] if whole else None,
                    mechanism=f"a tmpfs for {what}{inodes}, {by}; in memory, and counted as such",
                )
            )
        for one in spec.tmpfs:
            size = self.sizes.get(one.target)
            found.append(
                Applied(
                    rule=f"tmpfs {os.fsdecode(one.target)}",
                    requested=one.size_bytes,
                    effective=size[0] if size else None,
                    mechanism=f"tmpfs, {by}; in memory, and counted as such",
                )
            )
        if spec.overlay:
            where = f"a tmpfs of {whole[0]} bytes" if whole else "a folder of its own on disk"
            found.append(
                Applied(rule="overlay", requested=True, effective=True, mechanism=f"overlayfs, upper in {where}")
            )
            if not self._end.complete:
                found.append(
                    Applied(
                        rule="changes",
                        requested=None,
                        effective="incomplete",
                        mechanism=f"it made more than {_MOST_CHANGES} entries, too deep a tree, or too long a path",
                    )
                )
        return found

    def close(self) -> None:
        if self._workdir is not None:
            os.close(self._workdir.fd)
            self._workdir = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
