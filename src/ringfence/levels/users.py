"""Who a workload runs as inside an image."""

from __future__ import annotations

import errno
import os
import stat

from ringfence.errors import SpecError

__all__ = ["resolve"]

_MOST_BYTES = 1 << 20


def resolve(user: tuple[int, int] | str, image: str) -> tuple[int, int]:
    """(uid, gid) of a user of the image; names are looked up in its /etc/passwd and /etc/group. Raises SpecError."""
    if isinstance(user, tuple):
        return user
    name, colon, group = user.partition(":")
    uid, gid = _passwd(name, image)
    if colon:
        gid = int(group) if group.isdecimal() else _lookup("etc/group", group, image)[0]
    return uid, gid


def _passwd(name: str, image: str) -> tuple[int, int]:
    if name.isdecimal():
        return int(name), int(name)
    ids = _lookup("etc/passwd", name, image)
    return ids[0], ids[1]


def _open_in_image(folder: str, file: str) -> int:
    """A regular file of an image, of which no part may be a symlink: it could lead to the host's own."""
    above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        below = os.open(
            os.path.dirname(file), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above
        )
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            fd = os.open(os.path.basename(file), flags, dir_fd=below)
        finally:
            os.close(below)
    finally:
        os.close(above)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "it is no regular file")


def _lookup(file: str, name: str, image: str) -> list[int]:
    """The numbers of a line "name:password:number:number:…"."""
    folder = "/" if image == "host" else image
    if os.path.isfile(folder):
        raise SpecError(f"user: {name!r} can't be looked up: /{file} is on a disk, which only the guest reads")
    try:
        fd = _open_in_image(folder, file)
    except OSError as error:
        raise SpecError(f"user: {name!r} can't be looked up: /{file} of the image: {error.strerror}") from None
    try:
        text = os.read(fd, _MOST_BYTES).decode("utf-8", "replace")
    finally:
        os.close(fd)
    for line in text.splitlines():
        fields = line.split(":")
        if fields[0] == name and len(fields) > 3:
            return [int(field) for field in fields[2:4] if field.isdecimal()]
    raise SpecError(f"user: the image's /{file} has no {name!r}")
