"""What is mounted of the kernel's own below a folder: a proc tells of the host's processes, a sysfs of its devices, and
what is written there changes the host. An image, or a folder of a chroot's, may have them mounted.
"""

from __future__ import annotations

import os
import select
from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from io import FileIO

__all__ = ["kernel_mount_of", "kernel_mounts"]

# File systems without a disk of their own (`nodev` in /proc/filesystems) that hold files all the same.
_DATA = frozenset(
    (
        *(b"tmpfs", b"ramfs", b"overlay", b"aufs", b"unionfs", b"ecryptfs", b"shiftfs", b"9p", b"virtiofs", b"zfs"),
        *(b"nfs", b"nfs4", b"cifs", b"smb3", b"smbfs", b"ceph", b"afs", b"coda", b"lustre", b"beegfs", b"gpfs"),
        *(b"orangefs", b"pvfs2", b"ubifs", b"jffs2", b"vboxsf", b"vmhgfs", b"prl_fs", b"bcachefs"),
    )
)

_Points = list[tuple[bytes, bytes]]
# What mountinfo said last, and that file: most starts find it unchanged.
_known: _Points | None = None
_watched: FileIO | None = None
_namespace = 0
_lock = allocate_lock()


def kernel_mounts(folders: list[bytes], pid: int | None = None) -> _Points:
    """(mount point, type) of what is the kernel's at these folders (real paths) and below, without those below another
    one of them. pid: of whose mount namespace besides this process's own.
    """
    inside = tuple(folder.rstrip(b"/") + b"/" for folder in folders)
    found: _Points = []
    for path, kind in _points(pid):
        if (path + b"/").startswith(inside) and not (found and (path + b"/").startswith(found[-1][0] + b"/")):
            found.append((path, kind))
    return found


def kernel_mount_of(path: bytes) -> bytes:
    """The type of what a real path lies in, where that is the kernel's; b"" elsewhere."""
    return next((kind for point, kind in reversed(_points(None)) if (path + b"/").startswith(point + b"/")), b"")


def _points(pid: int | None) -> _Points:
    """All of the kernel's, sorted: what is above another one comes first."""
    if pid is None:
        with _lock:
            return _own_points()
    with open("/proc/self/mountinfo", "rb", 0) as file:
        text = file.read()
    try:
        with open(f"/proc/{pid}/mountinfo", "rb", 0) as file:
            text += file.read()
    except PermissionError:
        pass  # without CAP_SYS_PTRACE: its namespace is a copy of ours, made a moment ago
    return _parse(text)


def _own_points() -> _Points:
    """The kernel tells by poll whether a mount was made or removed since the file was opened, or polled (proc(5))."""
    global _watched, _namespace, _known
    namespace = os.stat("/proc/self/ns/mnt").st_ino
    if _watched is None or namespace != _namespace:
        if _watched is not None:
            _watched.close()
            _watched = None
        _watched, _namespace = open("/proc/self/mountinfo", "rb", 0), namespace  # noqa: SIM115
        _known = None
    changed = select.poll()
    changed.register(_watched.fileno(), select.POLLPRI)
    if changed.poll(0) or _known is None:
        _known = None  # should reading fail
        _watched.seek(0)
        _known = _parse(_watched.read())
    return _known


def _parse(text: bytes) -> _Points:
    kinds: dict[bytes, set[bytes]] = {}
    for line in text.splitlines():
        fields, _, rest = line.partition(b" - ")
        point = fields.split(b" ")[4]
        if b"\\" in point:  # \040 is a space
            point = point.decode("unicode_escape").encode("latin-1")
        kinds.setdefault(point, set()).add(rest.partition(b" ")[0])
    on_disk = _on_disk()
    found = []
    for point, here in kinds.items():
        strange = {kind for kind in here if kind not in on_disk and kind not in _DATA and not _is_fuse(kind)}
        # What autofs has mounted hangs on the same point.
        if len(here) > 1:
            strange.discard(b"autofs")
        if strange:
            found.append((point, min(strange)))
    return sorted(found, key=lambda one: one[0] + b"/")


def _is_fuse(kind: bytes) -> bool:
    return kind in (b"fuse", b"fuseblk") or kind.startswith((b"fuse.", b"fuseblk."))


def _on_disk() -> set[bytes]:
    """The file systems that need a disk. The kernel doesn't list what only it can mount, as nsfs."""
    with open("/proc/filesystems", "rb") as file:
        return {line.strip() for line in file if not line.startswith(b"nodev")}


def _after_fork_in_child() -> None:
    # The child shares the open file, and with it what was told of changes.
    global _watched, _known, _lock
    _lock = allocate_lock()
    if _watched is not None:
        _watched.close()
    _watched = _known = None


os.register_at_fork(after_in_child=_after_fork_in_child)
