"""Whether what a path leads to is nobody's but root's and the caller's own: what is run unjailed has to be."""

from __future__ import annotations

import os
import stat

from ringfence._cache_folder import TooManyLinks, walk

__all__ = ["why_not_ours"]


class _NotOurs(Exception):
    pass


def why_not_ours(path: str) -> str:
    """Why another account could change the file at an absolute path, or put another one in its place; "" if none could.

    Raises OSError where a part of it is missing.
    """
    try:
        walk(path, _look)
    except _NotOurs as why:
        return str(why)
    except TooManyLinks:
        return f"{path} has too many symlinks on its way"
    return ""


def _look(here: str, last: bool) -> os.stat_result:
    about = os.lstat(here)
    if about.st_uid not in (0, os.geteuid()):
        raise _NotOurs(f"{here} belongs to uid {about.st_uid}")
    if stat.S_ISLNK(about.st_mode):
        return about
    if not last and not stat.S_ISDIR(about.st_mode):
        raise _NotOurs(f"{here} is no folder")
    # In a sticky folder nobody else may rename or remove what is ours.
    sticky = stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX
    if about.st_mode & 0o022 and not sticky:
        raise _NotOurs(f"{here} is writable by other accounts")
    return about
