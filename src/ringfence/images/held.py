"""What a caller named, opened once: whoever may write to a folder on the way could swap it between two looks.

Paths here are real ones, as the spec resolved them. A symlink on the way is one that was put there since, and would
lead to what only the caller may read; without any, others can put there no more than what is theirs anyway.
"""

from __future__ import annotations

import os
import stat

from ringfence.errors import SpecError

__all__ = ["beneath", "entry", "open_real", "regular", "replaced"]

_FOLDER = os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC


def replaced(path: str | bytes, rule: str = "image") -> SpecError:
    return SpecError(f"{rule}: {os.fsdecode(path)} was replaced while it was looked at")


def open_real(path: str | bytes) -> int:
    """A descriptor (O_PATH) of a real path, no part of which is a symlink. Raises OSError: ENOTDIR where one is."""
    root = os.open(b"/", _FOLDER)
    try:
        return beneath(root, os.fsencode(path))
    finally:
        os.close(root)


def beneath(folder: int, path: bytes) -> int:
    """The same, from a folder on. Without parts it is the folder itself. The last part may be a symlink."""
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    here = os.open(b".", _FOLDER, dir_fd=folder)
    try:
        for number, part in enumerate(parts, start=1):
            flags = _FOLDER if number < len(parts) else _FOLDER & ~os.O_DIRECTORY
            below = os.open(part, flags, dir_fd=here)
            os.close(here)
            here = below
    except BaseException:
        os.close(here)
        raise
    return here


def entry(folder: int, name: bytes, kind: str) -> int:
    """A descriptor of what is in a folder by that name. Raises SpecError where it isn't a "directory" or "file"."""
    try:
        found = beneath(folder, name)
    except OSError:
        raise replaced(name) from None
    is_kind = stat.S_ISDIR if kind == "directory" else stat.S_ISREG
    if not is_kind(os.fstat(found).st_mode):
        os.close(found)
        raise replaced(name)
    return found


def regular(path: str | bytes, expected: tuple[int, int], rule: str = "image") -> int:
    """A descriptor (O_PATH) of the regular file with that (st_dev, st_ino). Raises SpecError."""
    try:
        found = open_real(path)
    except OSError:
        raise replaced(path, rule) from None
    about = os.fstat(found)
    if not stat.S_ISREG(about.st_mode) or (about.st_dev, about.st_ino) != expected:
        os.close(found)
        raise replaced(path, rule)
    return found
