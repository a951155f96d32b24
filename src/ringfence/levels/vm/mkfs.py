"""mkfs.erofs over a folder that is held by a descriptor.

It takes a path, and resolves it anew for every file. So where we may, it runs in a mount namespace in which the folder
that is held is mounted at a place of ours; where not, only over a folder whose path nobody else can change.
"""

from __future__ import annotations

import os
import stat

from ringfence.errors import SpecError, Unavailable

__all__ = ["make", "need_room"]

_SECONDS = 1800
_PROBE_SECONDS = 10
_NAMESPACE = ("unshare", "--mount", "--propagation", "private", "--")
# The working directory is the folder, and stays it in the new namespace: no name is looked up.
_MOUNT = ("sh", "-c", 'mount --no-canonicalize --rbind . "$1" && shift && cd / && exec "$@"', "sh")
# It ends with us, however we end.
_TIED = ("setpriv", "--pdeathsig", "KILL")
_COMMAND = (
    "mkfs.erofs",
    "--quiet",
    # No extended attributes: a host's security labels mean nothing in the guest.
    "-x-1",
    # The files' own times: Python takes a .pyc as stale where its source's mtime isn't the one it knows.
    "--preserve-mtime",
    # The same tree gives the same bytes.
    "-U00000000-0000-0000-0000-000000000000",
)


def need_room(folder: str, where: str, size_bytes: int) -> None:
    """Raises Unavailable where the file system of `where` has less room: a sparse file costs its owner nothing, and its
    image all of its size.
    """
    about = os.statvfs(where)
    free = about.f_bavail * about.f_frsize
    if free < size_bytes:
        raise Unavailable(
            "vm",
            f"a disk image of {folder} may need {size_bytes >> 20} MiB with what must stay free, and the cache folder"
            f" has {free >> 20} MiB",
            "make room, or name another folder in RINGFENCE_CACHE",
        )


def make(folder: str, held: int, image: str) -> None:
    """Makes the image of a folder: its real path, and a descriptor of it. Raises SpecError, Unavailable."""
    import shutil
    import subprocess

    if shutil.which(_COMMAND[0]) is None:
        raise Unavailable(
            "vm",
            "mkfs.erofs, which makes a disk of a rootfs folder, is missing",
            "install the package erofs-utils (Debian: apt-get install erofs-utils), or run 'ringfence setup'",
        )
    prefix = _TIED if _works(_TIED) else ()
    source = f"{image}.source"
    if os.geteuid() == 0 and _works(_NAMESPACE):
        os.mkdir(source, 0o700)
        command = [*prefix, *_NAMESPACE, *_MOUNT, source, *_COMMAND, image, source]
    else:
        _judge_way(folder)
        command = [*prefix, *_COMMAND, image, folder]
    try:
        run = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
            cwd=f"/proc/self/fd/{held}",
            pass_fds=(held,),
        )
    except subprocess.TimeoutExpired:
        raise Unavailable("vm", f"mkfs.erofs took over {_SECONDS} s for {folder}") from None
    finally:
        if os.path.isdir(source):
            os.rmdir(source)
    if run.returncode:
        said = (run.stderr + run.stdout).decode(errors="replace").strip().splitlines()
        raise Unavailable("vm", f"mkfs.erofs {folder} failed with {run.returncode}: {' '.join(said[-2:])}")


def _works(prefix: tuple[str, ...]) -> bool:
    import subprocess

    try:
        run = subprocess.run(
            [*prefix, "true"], capture_output=True, stdin=subprocess.DEVNULL, timeout=_PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return run.returncode == 0


def _judge_way(folder: str) -> None:
    """Raises SpecError where another account can put something else in the place of a folder above."""
    here = os.path.dirname(folder)
    while True:
        about = os.lstat(here)
        reason = ""
        if not stat.S_ISDIR(about.st_mode):
            reason = "is no folder any more"
        elif about.st_uid not in (0, os.geteuid()):
            reason = f"belongs to uid {about.st_uid}"
        elif about.st_mode & 0o022 and not about.st_mode & stat.S_ISVTX:
            reason = "is writable by other accounts"
        if reason:
            raise SpecError(
                f"image: {here}, on the way to {folder}, {reason}, so it could be replaced while the folder is read:"
                " move the folder to a place of your own"
            )
        if here == "/":
            return
        here = os.path.dirname(here)
