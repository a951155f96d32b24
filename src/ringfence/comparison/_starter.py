"""A process that starts sandboxes on demand, prepared in a way that its parent mustn't be: `python -m` this module.

Arguments: a kind, a number, and an empty folder that the parent removes. "resident": a caller with that many GiB of
memory; "mounts": one among that many more mounts; "crun": not ours but crun, without the unified cgroup hierarchy in
sight. It says "ready", or why it can't; then for each line that it reads it makes one start and says how long that
took, in nanoseconds. It ends with its stdin.

What is mounted is mounted in a mount namespace of its own, which ends with it: the host's mounts are not touched.
"""

from __future__ import annotations

import mmap
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_COMMAND = ["/usr/bin/true"]
_CLONE_NEWNS, _MS_NOSUID_NODEV, _MS_REC, _MS_PRIVATE = 0x00020000, 6, 0x4000, 1 << 18
_MNT_DETACH = 2
_PAGE = 4096
# Memory that has to stay resident.
_kept: list[mmap.mmap] = []


def main() -> int:
    kind, number, folder = sys.argv[1:]
    try:
        start = {"resident": _resident, "mounts": _mounts, "crun": _crun}[kind](int(number), folder)
        start()
    except Exception as error:
        # One line, whatever it was: the parent tells it as the reason.
        print(f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
        return 1
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter_ns()
        start()
        print(time.perf_counter_ns() - began, flush=True)
    return 0


def _container() -> None:
    from ringfence import Limits, run

    run(_COMMAND, isolation="container", limits=Limits(memory="256M", pids=64), check=True)


def _resident(gib: int, _: str) -> Callable[[], None]:
    if gib:
        held = mmap.mmap(-1, gib << 30)
        for at in range(0, len(held), _PAGE):
            held[at] = 1
        _kept.append(held)
    return _container


def _mounts(count: int, folder: str) -> Callable[[], None]:
    mount = _own_mounts()
    mount("tmpfs", folder, "tmpfs", _MS_NOSUID_NODEV)
    for index in range(count):
        os.mkdir(f"{folder}/{index}")
        mount("tmpfs", f"{folder}/{index}", "tmpfs", _MS_NOSUID_NODEV)
    return _container


def _crun(_: int, folder: str) -> Callable[[], None]:
    import ctypes

    from ringfence.comparison.peers import oci_runtime

    _own_mounts()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        unified = [line.split()[4] for line in file if " - cgroup2 " in line]
    # crun 1.8 refuses the hybrid layout wherever it sees it, also with its cgroup manager off.
    for target in unified if os.path.isdir("/sys/fs/cgroup/memory") else ():
        ctypes.CDLL(None).umount2(os.fsencode(target), _MNT_DETACH)
    peer = oci_runtime("crun", _COMMAND, folder)
    if peer.start is None:
        raise OSError(peer.reason)
    return peer.start


def _own_mounts() -> Callable[[str, str, str, int], None]:
    """A mount namespace of our own; returns mount(2)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def checked(result: int, call: str) -> None:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{call}: {os.strerror(number)}")

    def mount(source: str, target: str, fstype: str, flags: int) -> None:
        made = libc.mount(source.encode(), target.encode(), fstype.encode(), ctypes.c_ulong(flags), None)
        checked(made, f"mount({target})")

    checked(libc.unshare(_CLONE_NEWNS), "unshare(CLONE_NEWNS)")
    mount("none", "/", "none", _MS_REC | _MS_PRIVATE)
    return mount


if __name__ == "__main__":
    sys.exit(main())
