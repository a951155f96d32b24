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
        *(b"tmpfs", b"ramfs", b"rootfs", b"overlay", b"aufs", b"unionfs", b"ecryptfs", b"shiftfs", b"9p", b"virtiofs"),
        *(b"nfs", b"nfs4", b"cifs", b"smb3", b"smbfs", b"ceph", b"afs", b"coda", b"lustre", b"beegfs", b"gpfs"),
        *(b"orangefs", b"pvfs2", b"ubifs", b"jffs2", b"vboxsf", b"vmhgfs", b"prl_fs", b"bcachefs", b"zfs"),
    )
)

_Points = list[tuple[bytes, bytes]]
# A mount point: (the place of its last mount in the list, the type of one there that is the kernel's, or b"").
_Table = dict[bytes, tuple[int, bytes]]
# With those that are the kernel's, sorted: what is above another one comes first.
_Mounted = tuple[_Table, _Points]
# What mountinfo said last, that file, and of which namespace and root: most starts find it unchanged.
_known: _Mounted | None = None
_watched: FileIO | None = None
_seen_from: tuple[int, ...] = ()
_lock = allocate_lock()


def kernel_mounts(folders: list[bytes], also: FileIO | None = None) -> _Points:
    """(mount point, type) of what is the kernel's at these folders (real paths) and below, without those below another
    one of them. also: the open mountinfo of another mount namespace, which is looked at besides this thread's own.
    """
    inside = tuple(folder.rstrip(b"/") + b"/" for folder in folders)
    _, points = _own_mounts()
    if also is not None:
        also.seek(0)
        points = sorted({*points, *_parse(also.read())[1]}, key=_in_order)
    found: _Points = []
    for path, kind in points:
        if (path + b"/").startswith(inside) and not (found and (path + b"/").startswith(found[-1][0] + b"/")):
            found.append((path, kind))
    return found


def kernel_mount_of(path: bytes, unlisted: bytes = b"") -> bytes:
    """The type of what a real path lies in, where that is the kernel's; b"" elsewhere. A mount that was made later
    above the nearest one may cover that, so it counts too. unlisted: where no mount is listed above, as in a chroot.
    """
    table, _ = _own_mounts()
    above = [(len(at), *table[at]) for at in table if (path + b"/").startswith(at.rstrip(b"/") + b"/")]
    if not above:
        return unlisted
    _, nearest, kind = max(above)
    return kind or next((one for _, number, one in above if one and number > nearest), b"")


def _own_mounts() -> _Mounted:
    with _lock:
        return _read_where_it_changed()


def _read_where_it_changed() -> _Mounted:
    """The kernel tells by poll whether a mount was made or removed since the file was opened, or polled (proc(5)). What
    it lists is what can be reached from the root of whoever opened it.
    """
    global _watched, _seen_from, _known
    root = os.stat("/")
    seen_from = os.stat("/proc/thread-self/ns/mnt").st_ino, root.st_dev, root.st_ino
    if _watched is None or seen_from != _seen_from:
        if _watched is not None:
            _watched.close()
            _watched = None
        _watched, _seen_from = open("/proc/thread-self/mountinfo", "rb", 0), seen_from  # noqa: SIM115
        _known = None
    changed = select.poll()
    changed.register(_watched.fileno(), select.POLLPRI)
    if changed.poll(0) or _known is None:
        _known = None  # should reading fail
        _watched.seek(0)
        _known = _parse(_watched.read())
    return _known


def _parse(text: bytes) -> _Mounted:
    kinds: dict[bytes, tuple[int, set[bytes]]] = {}
    # Not splitlines: of a name only blank, tab, newline and backslash are escaped, and a carriage return is part of it.
    for number, line in enumerate(text.split(b"\n")):
        if not line:
            continue
        fields, _, rest = line.partition(b" - ")
        point = fields.split(b" ")[4]
        if b"\\" in point:  # \040 is a space
            point = point.decode("unicode_escape").encode("latin-1")
        _, here = kinds.get(point, (0, set[bytes]()))
        kinds[point] = number, here | {rest.partition(b" ")[0]}
    on_disk = _on_disk()
    table: _Table = {}
    for point, (number, here) in kinds.items():
        strange = {kind for kind in here if kind not in on_disk and kind not in _DATA and not _is_fuse(kind)}
        # What autofs has mounted hangs on the same point.
        if len(here) > 1:
            strange.discard(b"autofs")
        table[point] = number, min(strange, default=b"")
    return table, sorted(((point, kind) for point, (_, kind) in table.items() if kind), key=_in_order)


def _in_order(one: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    return one[0] + b"/", one[1]


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
