"""Which disk a folder is on, as the kernel counts input and output: by the whole disk, not by partition."""

from __future__ import annotations

import os

from ringfence._value import Value

__all__ = ["WRITEBACK_FILE_SYSTEMS", "Disk", "disk_of"]

# Those whose pages, when they are written back later, are still on the account of the cgroup that wrote them
# (cgroup-v2.rst, "Writeback"; SB_I_CGROUPWB in the kernel's sources).
WRITEBACK_FILE_SYSTEMS = frozenset(("btrfs", "ext2", "ext4", "f2fs", "xfs"))


class Disk(Value):
    """device: (major, minor) of the whole disk, or None. reason: why there is none, or "". file_system: its type, such
    as "ext4", or "" where /proc doesn't tell.
    """

    __slots__ = ("device", "file_system", "reason")
    device: tuple[int, int] | None
    file_system: str
    reason: str

    def __init__(self, *, device: tuple[int, int] | None = None, file_system: str = "", reason: str = "") -> None:
        self._set(device=device, file_system=file_system, reason=reason)


def disk_of(path: bytes, *, blocks: bytes = b"/sys/dev/block", mountinfo: str = "/proc/self/mountinfo") -> Disk:
    """The disk that holds a folder. blocks, mountinfo: for tests."""
    number = os.stat(path).st_dev
    major, minor = os.major(number), os.minor(number)
    file_system = _file_system(f"{major}:{minor}", mountinfo)
    shown = os.fsdecode(path)
    if major == 0:
        # tmpfs, overlay, 9p, NFS; btrfs too, which may be spread over several disks.
        kind = file_system or "a file system"
        return Disk(file_system=file_system, reason=f"{shown} is on {kind} without one block device of its own")
    node = os.path.realpath(os.path.join(blocks, b"%d:%d" % (major, minor)))
    if not os.path.isdir(node):
        return Disk(file_system=file_system, reason=f"/sys doesn't show the device {major}:{minor} of {shown}")
    if os.path.exists(node + b"/partition"):
        node = os.path.dirname(node)
    with open(node + b"/dev", "rb") as file:
        whole, _, part = file.read().strip().partition(b":")
    return Disk(device=(int(whole), int(part)), file_system=file_system)


def _file_system(device: str, mountinfo: str) -> str:
    try:
        with open(mountinfo, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for line in file:
                before, _, after = line.partition(" - ")
                if before.split(" ")[2] == device:
                    return after.partition(" ")[0]
    except FileNotFoundError:
        pass
    return ""
