"""What an image shows at the top of a sandbox's file tree.

A sandbox's root is always a fresh tree of ringfence's own, and the image's top-level entries are put into it one by
one. So /proc, /dev, /tmp, /run, /home and the work directory are ours whatever the image holds in their place, a
symlink to the host's own included.
"""

from __future__ import annotations

import errno
import os
import stat

from ringfence._value import Value
from ringfence.errors import SpecError

__all__ = ["HOST_NAMES", "OWN_NAMES", "Entry", "entries", "host_entries", "host_secrets"]

# Made by ringfence in every sandbox; an image's own are never shown.
OWN_NAMES = frozenset((b"dev", b"home", b"proc", b"run", b"sys", b"tmp", b"work"))

# The host's userland: programs, libraries, configuration. All else (home, root, srv, var, mnt, boot, …) stays out.
HOST_NAMES = (b"bin", b"etc", b"lib", b"lib32", b"lib64", b"libx32", b"opt", b"sbin", b"usr")

# Each folder and file at the top takes a descriptor of the plan, of which there are 64.
_MOST_SHOWN = 40
_MOST_NAMES = 200

_known_secrets: list[bytes] = []


class Entry(Value):
    """A name at the top of an image. kind: "directory", "file" or "symlink". target: where a symlink points."""

    __slots__ = ("kind", "name", "target")
    name: bytes
    kind: str
    target: bytes

    def __init__(self, *, name: bytes, kind: str, target: bytes = b"") -> None:
        self._set(name=name, kind=kind, target=target)


def _entry(folder: bytes, name: bytes) -> Entry | None:
    path = os.path.join(folder, name)
    try:
        mode = os.lstat(path).st_mode
        target = os.readlink(path) if stat.S_ISLNK(mode) else b""
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise
        return None  # it isn't there, or is no link any more: somebody changes the image
    if target:
        return Entry(name=name, kind="symlink", target=target)
    if stat.S_ISDIR(mode):
        return Entry(name=name, kind="directory")
    # Sockets, FIFOs and devices at the top of an image have no use in a sandbox.
    return Entry(name=name, kind="file") if stat.S_ISREG(mode) else None


def entries(folder: str, held: int | None = None) -> list[Entry]:
    """The top-level entries of a rootfs folder, sorted, less those that ringfence makes itself. held: a descriptor of
    the folder; None: it is opened here.
    """
    if held is not None:
        return _entries(folder, held)
    from ringfence.images.held import open_real

    try:
        held = open_real(folder)
    except OSError as error:
        raise SpecError(f"image: {folder!r} can't be read ({error.strerror})") from None
    try:
        return _entries(folder, held)
    finally:
        os.close(held)


def _entries(folder: str, held: int) -> list[Entry]:
    path = b"/proc/self/fd/%d" % held
    names: list[bytes] = []
    try:
        with os.scandir(path) as listed:
            for one in listed:
                names.append(one.name)
                if len(names) > _MOST_NAMES:
                    raise SpecError(f"image: {folder!r} has more than {_MOST_NAMES} entries at its top")
    except OSError as error:
        raise SpecError(f"image: {folder!r} can't be read ({error.strerror})") from None
    found = (_entry(path, name) for name in sorted(names) if name not in OWN_NAMES)
    shown = [entry for entry in found if entry is not None]
    if sum(entry.kind != "symlink" for entry in shown) > _MOST_SHOWN:
        raise SpecError(f"image: {folder!r} has more than {_MOST_SHOWN} folders and files at its top")
    return shown


def host_entries() -> list[Entry]:
    """The host's userland."""
    found = (_entry(b"/", name) for name in HOST_NAMES)
    return [entry for entry in found if entry is not None]


def host_secrets() -> list[bytes]:
    """Paths of the host's userland that a sandbox must not show: those of the known ones that this host had when it was
    first asked.
    """
    if not _known_secrets:
        from ringfence.images.masked import MASKED

        _known_secrets.extend(path for path in MASKED if os.path.lexists(path))
    return list(_known_secrets)
