"""Where the cache folder is, and that nobody else can put anything there."""

from __future__ import annotations

import os
import stat

from ringfence.errors import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TooManyLinks", "root", "walk"]


def root(cache_dir: str | None = None) -> str:
    """The cache folder, made if it is missing: cache_dir, else $RINGFENCE_CACHE, else
    $XDG_CACHE_HOME/ringfence, else ~/.cache/ringfence (XDG Base Directory Specification).

    Raises SpecError where it's not an absolute path, or where another account could write there, or put something
    else in its place: what is kept in it is run later. The path that is returned has no symlink in it.
    """
    path = cache_dir or os.environ.get("RINGFENCE_CACHE") or os.path.join(_user_cache(), "ringfence")
    if not os.path.isabs(path):
        raise SpecError(f"the cache folder must be an absolute path, not {path!r}")
    real = _checked.get(path)
    if real is None or not os.path.isdir(real):
        real = _checked[path] = _resolved(path)
    return real


# What was asked for to what it is, of the folders that this process has looked at.
_checked: dict[str, str] = {}
_MOST_LINKS = 40  # as the kernel follows


def _resolved(path: str) -> str:
    """The path without symlinks. What is missing is made; whatever another account could replace is a SpecError."""

    def look(here: str, last: bool) -> os.stat_result:
        try:
            return _judge(here, path, whole=last)
        except FileNotFoundError:
            _make(here)
            return _judge(here, path, whole=last)

    try:
        return walk(path, look)
    except TooManyLinks:
        raise SpecError(f"the cache folder {path} has too many symlinks on its way") from None


class TooManyLinks(Exception):
    """More symlinks on a path than the kernel follows."""


def walk(path: str, look: Callable[[str, bool], os.stat_result]) -> str:
    """An absolute path without symlinks, found part by part. Raises TooManyLinks, OSError.

    look: is given each part of the way, symlinks too, and whether it is the last; it returns what lstat does, or
    raises.
    """
    real, links = "/", 0
    left = _parts(path)
    look(real, not left)
    while left:
        name = left.pop()
        if name == "..":
            real = os.path.dirname(real)
            continue
        here = os.path.join(real, name)
        if not stat.S_ISLNK(look(here, not left).st_mode):
            real = here
            continue
        links += 1
        if links > _MOST_LINKS:
            raise TooManyLinks
        target = os.readlink(here)
        real = "/" if target.startswith("/") else real
        left += _parts(target)
    return real


def _parts(path: str) -> list[str]:
    """The last one first."""
    return [one for one in reversed(path.split("/")) if one not in ("", ".")]


def _make(path: str) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass  # by another one of us, at the same time


def _judge(here: str, path: str, *, whole: bool) -> os.stat_result:
    """whole: it is the cache folder itself. Raises SpecError, OSError."""
    about = os.lstat(here)
    what = f"the cache folder {here}" if whole else f"{here}, on the way to the cache folder {path},"
    if about.st_uid not in (0, os.geteuid()):
        raise SpecError(f"{what} belongs to uid {about.st_uid}: name a folder of your own in RINGFENCE_CACHE")
    if stat.S_ISLNK(about.st_mode):
        return about
    if not stat.S_ISDIR(about.st_mode):
        raise SpecError(f"{what} is no folder")
    # In a sticky folder nobody else may rename or remove what is ours.
    if about.st_mode & 0o022 and (whole or not about.st_mode & stat.S_ISVTX):
        raise SpecError(f"{what} is writable by other accounts: run 'chmod go-w {here}'")
    return about


def _user_cache() -> str:
    # A relative $XDG_CACHE_HOME is to be ignored, says the specification.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return xdg if os.path.isabs(xdg) else os.path.expanduser("~/.cache")
