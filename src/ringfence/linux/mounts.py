"""Detached mounts: taken in this process's mount namespace, attached in a sandbox's.

Sources: open_tree(2), mount_setattr(2).
"""

from __future__ import annotations

import errno
import os
import struct

from ringfence.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["clone_tree", "new_tmpfs", "set_idmap"]

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_IDMAP = 0x00100000
_MS_PRIVATE = 1 << 18
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6
_MOUNT_ATTR_NOSUID = 2

_known_calls: tuple[Callable[..., int], Callable[..., int]] | None = None


def clone_tree(path: bytes, *, recursive: bool = True, follow: bool = True, at: int = _AT_FDCWD) -> int:
    """A detached, private copy of the mount at `path`, with those below it; a descriptor that the caller closes.

    follow: whether a symlink in the last place is followed. at: a descriptor (O_PATH will do) of what is meant, with an
    empty path.

    Needs CAP_SYS_ADMIN and Linux 5.12. Raises KernelError.
    """
    open_tree, mount_setattr = _calls()
    below = _AT_RECURSIVE if recursive else 0
    end = (0 if follow else _AT_SYMLINK_NOFOLLOW) | (0 if path else _AT_EMPTY_PATH)
    fd = open_tree(at, path, _OPEN_TREE_CLONE | os.O_CLOEXEC | below | end)
    try:
        # A copy of a shared mount, as every mount is under systemd, is its peer: what is mounted below the copy would
        # appear on the host too.
        attributes = struct.pack("=QQQQ", 0, 0, _MS_PRIVATE, 0)
        mount_setattr(fd, b"", _AT_EMPTY_PATH | below, attributes, len(attributes))
    except BaseException:
        os.close(fd)
        raise
    return fd


def set_idmap(mount: int, user_namespace: int) -> bool:
    """Shows a detached mount's files with ids as that user namespace maps them: uid 0 on disk is its uid 0.

    False where the file system can't (EINVAL) or the mount has a map already (EPERM). Linux 5.12. Raises KernelError.
    """
    _, mount_setattr = _calls()
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd.
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, user_namespace)
    try:
        mount_setattr(mount, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, attributes, len(attributes))
    except KernelError as error:
        if error.errno in (errno.EINVAL, errno.EPERM):
            return False
        raise
    return True


def new_tmpfs(options: bytes) -> int:
    """A detached tmpfs, nosuid, with these options ("size=64k,mode=0755"); a descriptor that the caller closes.

    Needs CAP_SYS_ADMIN and Linux 5.2. Raises KernelError. Sources: fsopen(2), fsconfig(2), fsmount(2).
    """
    from ringfence.linux._syscall import system_call

    fsconfig = system_call("fsconfig", "iIzzi")
    context = system_call("fsopen", "zI")(b"tmpfs", _FSOPEN_CLOEXEC)
    try:
        for option in options.split(b","):
            name, _, value = option.partition(b"=")
            fsconfig(context, _FSCONFIG_SET_STRING, name, value, 0)
        fsconfig(context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return system_call("fsmount", "iII")(context, _FSMOUNT_CLOEXEC, _MOUNT_ATTR_NOSUID)
    finally:
        os.close(context)


def _calls() -> tuple[Callable[..., int], Callable[..., int]]:
    global _known_calls
    if _known_calls is None:
        from ringfence.linux._syscall import system_call

        _known_calls = (
            system_call("open_tree", "izI"),
            system_call("mount_setattr", "izIzL"),
        )
    return _known_calls
