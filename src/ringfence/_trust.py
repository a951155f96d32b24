"""Whether what a path leads to is nobody's but root's and the caller's own: what is run unjailed has to be."""

from __future__ import annotations

import os
import stat

__all__ = ["why_not_ours"]

_MOST_LINKS = 40  # as the kernel follows


def why_not_ours(path: str) -> str:
    """Why another account could change the file at an absolute path, or put another one in its place; "" if none could.

    Raises OSError where a part of it is missing.
    """
    here, links = "/", 0
    left = [one for one in reversed(path.split("/")) if one not in ("", ".")]
    if reason := _why_not("/", last=False):
        return reason
    while left:
        name = left.pop()
        if name == "..":
            here = os.path.dirname(here)
            continue
        below = os.path.join(here, name)
        if reason := _why_not(below, last=not left):
            return reason
        if not stat.S_ISLNK(os.lstat(below).st_mode):
            here = below
            continue
        links += 1
        if links > _MOST_LINKS:
            return f"{path} has too many symlinks on its way"
        target = os.readlink(below)
        here = "/" if target.startswith("/") else here
        left += [one for one in reversed(target.split("/")) if one not in ("", ".")]
    return ""


def _why_not(here: str, *, last: bool) -> str:
    about = os.lstat(here)
    if about.st_uid not in (0, os.geteuid()):
        return f"{here} belongs to uid {about.st_uid}"
    if stat.S_ISLNK(about.st_mode):
        return ""
    if not last and not stat.S_ISDIR(about.st_mode):
        return f"{here} is no folder"
    # In a sticky folder nobody else may rename or remove what is ours.
    sticky = stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX
    return f"{here} is writable by other accounts" if about.st_mode & 0o022 and not sticky else ""
