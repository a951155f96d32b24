"""What the plan and init say of file systems that can be written to: the layer, overlays, sizes, changes.

See "Steps of the file tree", SIZES and LAYER_END in docs/design/protocol.md.
"""

from __future__ import annotations

import struct

from ringfence.errors import ProtocolError
from ringfence.wire import frames
from ringfence.wire.messages import INSIDE, NODEV, NOFOLLOW, NOSUID, TOLD, MountStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "LayerEnd",
    "directory_layer",
    "disk",
    "disk_shown",
    "memory_layer",
    "overlay",
    "parse_sizes",
    "place",
    "tmpfs",
]

# The steps of a file tree.
_MOST_SIZES = 256
_KINDS = {1: "created", 2: "changed", 3: "deleted"}
_WHAT = {0: None, ord("f"): "file", ord("d"): "directory", ord("l"): "symlink", ord("o"): "other"}
# A byte of a size costs nothing, an inode some 1 KiB of the kernel's memory.
_LEAST_INODES = 1024
_PAGE_BYTES = 4096
_PATH_BYTES = 4095
_MOST_PATHS_BYTES = 64 << 20


def _options(size_bytes: int, mode: int) -> bytes:
    inodes = max(size_bytes // _PAGE_BYTES, _LEAST_INODES)
    return b"mode=%04o,size=%d,nr_inodes=%d" % (mode, size_bytes, inodes)


def tmpfs(target: bytes, size_bytes: int, mode: int, owner: tuple[int, int]) -> MountStep:
    """A tmpfs whose size init tells."""
    data = _options(size_bytes, mode) + b",uid=%d,gid=%d" % owner
    return MountStep(5, target, fstype=b"tmpfs", data=data, flags=NOSUID | NODEV | TOLD)


def memory_layer(size_bytes: int) -> MountStep:
    """The layer, as a tmpfs of its own."""
    return MountStep(8, b"/", fstype=b"tmpfs", data=_options(size_bytes, 0o755), flags=TOLD)


def directory_layer(source: bytes) -> MountStep:
    """The layer, in a directory that is empty."""
    return MountStep(8, b"/", source=source)


def overlay(target: bytes, source: bytes | int | None, *, inside: bool = False, hide: bytes = b"") -> MountStep:
    """An overlay of the layer over `source`; without one, with the target /, over all that was made before.

    hide: the folder below `source`, from its /, of which what isn't open to everybody is masked; or none.
    """
    if isinstance(source, int):
        return MountStep(9, target, fd=source, data=hide)
    return MountStep(9, target, source=source or b"", data=hide, flags=NOFOLLOW | (INSIDE if inside else 0))


def place(target: bytes, mode: int) -> MountStep:
    """A directory of the layer, which belongs to the command's user."""
    return MountStep(10, target, mode=mode)


def disk(device: bytes, without: Iterable[bytes]) -> MountStep:
    """A guest's: finds the file system on a disk, and makes the names at its top, less those of `without`."""
    return MountStep(11, b"/", source=device, data=b",".join(sorted(without)))


def disk_shown(*, overlay: bool) -> MountStep:
    """A guest's: shows what is in the folders and files that `disk` made; overlay: with the layer over each folder."""
    return MountStep(11, b"/", mode=1 if overlay else 0)


def parse_sizes(payload: bytes) -> dict[bytes, tuple[int, int]]:
    """{target: (bytes, inodes)} of SIZES."""
    found: dict[bytes, tuple[int, int]] = {}
    for tag, data in frames.attributes(payload):
        if tag != 1 or len(data) < 17 or not data.endswith(b"\0"):
            raise ProtocolError(f"SIZES has the attribute {tag} of {len(data)} bytes")
        if len(found) >= _MOST_SIZES:
            raise ProtocolError("SIZES tells of more file systems than a plan has")
        size, inodes = struct.unpack_from("<QQ", data)
        found[data[16:-1]] = (size, inodes)
    return found


class LayerEnd:
    """What LAYER_END frames say, gathered: the other side may be a guest, so it is bounded.

    free: (bytes, inodes), or None. changes: {path: (kind, what, size)}. complete: whether init saw everything.
    """

    __slots__ = ("_paths_bytes", "_told", "changes", "complete", "free")

    def __init__(self) -> None:
        self.free: tuple[int, int] | None = None
        self.changes: dict[bytes, tuple[str, str | None, int]] = {}
        self.complete = True
        self._told = self._paths_bytes = 0

    def add(self, payload: bytes, most: int) -> None:
        for tag, data in frames.attributes(payload):
            if tag == 1 and len(data) == 16:
                first, second = struct.unpack("<QQ", data)
                self.free = (first, second)
            elif tag == 2:
                self._add_change(data)
                if self._told > most:
                    raise ProtocolError("LAYER_END tells of more changes than it may")
            elif tag == 3 and not data:
                self.complete = False
            else:
                raise ProtocolError(f"LAYER_END has the attribute {tag} of {len(data)} bytes")

    def _add_change(self, data: bytes) -> None:
        path = data[10:-1]
        bad = not 12 <= len(data) <= 11 + _PATH_BYTES or data[-1] != 0 or not path.startswith(b"/") or b"\0" in path
        if bad or not _plain(path.split(b"/")[1:]):
            raise ProtocolError("LAYER_END names a path that is none")
        kind, what, size = struct.unpack_from("<BBQ", data)
        if kind not in _KINDS or what not in _WHAT or (kind == 3) != (what == 0):
            raise ProtocolError(f"LAYER_END tells of a change of the unknown kind {kind}")
        self._told += 1
        self._paths_bytes += len(path)
        if self._paths_bytes > _MOST_PATHS_BYTES:
            self.complete = False  # names of 4 KB each, as nobody makes them but to fill our memory
            return
        self.changes[path] = (_KINDS[kind], _WHAT[what], size)


def _plain(names: Iterable[bytes]) -> bool:
    return all(name not in (b"", b".", b"..") for name in names)
