"""Landlock: a process takes away its own right to reach files, TCP ports, and processes outside
(landlock(7)).

A ruleset is made here and handed as a file descriptor to the C side, which calls landlock_restrict_self(2) in
the workload. Rights that a ruleset handles are denied everywhere but beneath the paths that it allows.
"""

from __future__ import annotations

import os
import stat
import struct

from ringfence._value import Closing
from ringfence.linux.landlock_abi import DEVICE_CONTROL_ABI, NETWORK_ABI, SCOPES_ABI, TRUNCATE_ABI, abi, create_ruleset

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "ALL_FILES",
    "BIND_TCP",
    "CONNECT_TCP",
    "DEVICE_CONTROL_ABI",
    "NETWORK_ABI",
    "READ_ONLY",
    "SCOPES_ABI",
    "TRUNCATE_ABI",
    "WRITABLE_TREE",
    "Ruleset",
    "abi",
    "available",
    "describe",
    "device_access",
    "gaps",
    "host_read_only",
    "of_paths",
]

# Rights on files, of include/uapi/linux/landlock.h.
EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_CHAR = 1 << 6
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
MAKE_SOCK = 1 << 9
MAKE_FIFO = 1 << 10
MAKE_BLOCK = 1 << 11
MAKE_SYM = 1 << 12
REFER = 1 << 13
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15
# Rights on TCP ports, and what is scoped to the sandbox's own processes.
BIND_TCP = 1 << 0
CONNECT_TCP = 1 << 1
SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0
SCOPE_SIGNAL = 1 << 1

ALL_FILES = (1 << 16) - 1
READ_ONLY = EXECUTE | READ_FILE | READ_DIR
# A workload makes no device nodes, and gets the controls of a device only where one is allowed by its own
# path.
WRITABLE_TREE = ALL_FILES & ~(MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV)
_DEVICE = READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV
# Of these rights the kernel takes only some for a rule on what isn't a directory, and refuses the others
# (EINVAL).
_ON_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

# What is readable of the host: all but its devices. A terminal or a camera of the caller's could be listened to.
_TOP_EXCEPT = (b"dev",)
_DEVICES = (b"/dev/null", b"/dev/zero", b"/dev/full", b"/dev/random", b"/dev/urandom", b"/dev/tty")

# From which ABI on each is handled, and what a sandbox can still do below it.
_FILES_BY_ABI = ((2, REFER), (3, TRUNCATE), (5, IOCTL_DEV))
_GAPS = (
    (3, "truncate(2) of a file that may not be written"),
    (4, "TCP"),
    (5, "ioctl(2) on a device that is already readable"),
    (6, "signals to processes outside, abstract UNIX sockets"),
)
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2

_known_call: Callable[..., int] | None = None
_known_paths: dict[bytes, tuple[int, bool]] = {}
_top: list[bytes] | None = None


def available() -> tuple[bool, str]:
    """Whether Landlock can be used here, and what there is or is missing."""
    if abi():
        return True, f"Landlock ABI {abi()}"
    return (
        False,
        "this kernel has no Landlock (it needs Linux 5.13, CONFIG_SECURITY_LANDLOCK and lsm=landlock)",
    )


def gaps(version: int) -> tuple[str, ...]:
    """What a sandbox could still do with that ABI and couldn't with a newer one."""
    return tuple(gap for needed, gap in _GAPS if version < needed)


class Ruleset(Closing):
    """A ruleset that is being built. It owns its file descriptor `fd`; a context manager closes it.

    handled_files, handled_network, scoped: the rights that it takes away, as the constants of this module.
    version: the ABI that it was made for. Raises KernelError, and ENOSYS is one where there is no Landlock.
    """

    def __init__(
        self,
        *,
        deny_network: bool = False,
        network: int = 0,
        scope: bool = True,
        files: bool = True,
        version: int | None = None,
    ) -> None:
        """deny_network: no TCP port may be bound or connected to. network: the rights on TCP ports that only
        `allow_port` gives. scope: no signals and no abstract UNIX sockets to processes outside. files: whether
        any right on files is taken away. version: an older ABI than the kernel's, for tests.
        """
        self.version = abi() if version is None else version
        self.handled_files = _files(self.version) if files else 0
        if deny_network:
            network = BIND_TCP | CONNECT_TCP
        self.handled_network = network if self.version >= NETWORK_ABI else 0
        self.scoped = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL if scope and self.version >= SCOPES_ABI else 0
        attributes = struct.pack("=QQQ", self.handled_files, self.handled_network, self.scoped)
        # An older kernel takes only the fields that it knows.
        size = 24 if self.version >= SCOPES_ABI else 16 if self.version >= NETWORK_ABI else 8
        self._add_rule = _add_rule_call()
        self.fd = create_ruleset()(attributes[:size], size, 0)

    def allow(self, fd: int, access: int) -> None:
        """Allow rights on the file, or beneath the directory, that `fd` (O_PATH will do) refers to.

        Rights that this ABI doesn't know are left out: they aren't denied either.
        """
        rule = struct.pack("=Qi", access & self.handled_files, fd)
        self._add_rule(self.fd, _RULE_PATH_BENEATH, rule, 0)

    def allow_path(self, path: bytes, access: int) -> bool:
        """Allow rights on one of the host's fixed paths; False where it isn't there.

        The path is opened once in the life of this process and kept, so it is for paths that don't change.
        """
        found = _known_path(path)
        if found is None:
            return False
        fd, is_directory = found
        self.allow(fd, access if is_directory else access & _ON_A_FILE)
        return True

    def allow_port(self, port: int, access: int) -> None:
        """Allow rights on a TCP port, of whatever address. Those that aren't handled are left out."""
        access &= self.handled_network
        if access:
            self._add_rule(self.fd, _RULE_NET_PORT, struct.pack("=QQ", access, port), 0)

    def describe(self) -> str:
        """What it takes away, in a line: "Landlock ABI 7: files, TCP, signals, abstract UNIX sockets"."""
        return _describe(self.version, bool(self.handled_network), bool(self.scoped))

    def detach(self) -> int:
        """The file descriptor, which is the caller's to close from now on."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.detach())


def device_access(access: str) -> int:
    """The rights on a device node of "r", "w" or "rw": its controls go with either."""
    read = READ_FILE if "r" in access else 0
    return read | (WRITE_FILE | TRUNCATE if "w" in access else 0) | IOCTL_DEV


def host_read_only(
    writable: Iterable[int], *, deny_network: bool, scope: bool = True, version: int | None = None
) -> Ruleset:
    """All of the host but its devices readable and executable; writable only what is beneath the given directories.

    writable: file descriptors of directories. deny_network, scope, version: as for `Ruleset`.
    The harmless devices (null, zero, full, random, urandom, tty) can be written and controlled. What the
    workload's uid can't do, this doesn't allow either. Raises KernelError.
    """
    ruleset = Ruleset(deny_network=deny_network, scope=scope, version=version)
    try:
        _allow_host(ruleset)
        _allow_devices(ruleset)
        for fd in writable:
            ruleset.allow(fd, WRITABLE_TREE)
    except BaseException:
        ruleset.close()
        raise
    return ruleset


def of_paths(
    readable: Iterable[int] | None, writable: Iterable[int], *, network: int = 0, version: int | None = None
) -> Ruleset:
    """Readable and executable only what is beneath `readable` and `writable`, and the harmless devices. readable: None
    is what it is for `host_read_only`.

    readable, writable: file descriptors (O_PATH will do) of directories, files or devices. A device gets its controls
    where it is in `writable` by itself. network, version: as for `Ruleset`. Raises KernelError.
    """
    ruleset = Ruleset(network=network, version=version)
    try:
        _allow_devices(ruleset)
        if readable is None:
            _allow_host(ruleset)
        for fds, access, device in ((readable or (), READ_ONLY, READ_FILE), (writable, WRITABLE_TREE, _DEVICE)):
            for fd in fds:
                mode = os.fstat(fd).st_mode
                if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                    ruleset.allow(fd, device)
                else:
                    ruleset.allow(fd, access if stat.S_ISDIR(mode) else access & _ON_A_FILE)
    except BaseException:
        ruleset.close()
        raise
    return ruleset


def _allow_host(ruleset: Ruleset) -> None:
    """Rules only ever add rights, so what isn't to be had is left out: the top's entries are named one by one."""
    global _top
    if _top is None:
        found = (b"/" + name for name in os.listdir(b"/") if name not in _TOP_EXCEPT)
        _top = [path for path in found if not os.path.islink(path)]
    ruleset.allow_path(b"/", READ_DIR)
    for path in _top:
        ruleset.allow_path(path, READ_ONLY)
    ruleset.allow_path(b"/dev/shm", READ_ONLY)


def _allow_devices(ruleset: Ruleset) -> None:
    for path in _DEVICES:
        ruleset.allow_path(path, _DEVICE)


def describe(*, deny_network: bool) -> str:
    """`Ruleset.describe` of what `host_read_only` makes here."""
    version = abi()
    return _describe(version, deny_network and version >= NETWORK_ABI, version >= SCOPES_ABI)


def _describe(version: int, network: bool, scoped: bool) -> str:
    parts = ["files"]
    if network:
        parts.append("TCP")
    if scoped:
        parts += ["signals", "abstract UNIX sockets"]
    return f"Landlock ABI {version}: {', '.join(parts)}"


def _files(version: int) -> int:
    """The rights on files that an ABI knows."""
    rights = ALL_FILES
    for needed, right in _FILES_BY_ABI:
        if version < needed:
            rights &= ~right
    return rights


def _known_path(path: bytes) -> tuple[int, bool] | None:
    """A descriptor of it, and whether it is a directory."""
    if path not in _known_paths:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return None  # it isn't there, or isn't ours to see
        _known_paths[path] = (fd, stat.S_ISDIR(os.fstat(fd).st_mode))
    return _known_paths[path]


def _add_rule_call() -> Callable[..., int]:
    global _known_call
    if _known_call is None:
        from ringfence.linux._syscall import system_call

        _known_call = system_call("landlock_add_rule", "iizI")
    return _known_call
