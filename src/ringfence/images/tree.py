"""What an image shows at the top of a sandbox's file tree.

A sandbox's root is always a fresh tree of ringfence's own, and the image's top-level entries are put into it one by
one. So /proc, /dev, /tmp, /run, /home and the work directory are ours whatever the image holds in their place, a
symlink to the host's own included.
"""

from __future__ import annotations

import os
import stat

from ringfence._value import Value
from ringfence.errors import SpecError

__all__ = ["OWN_NAMES", "Entry", "entries", "host_entries", "host_secrets"]

# Made by ringfence in every sandbox; an image's own are never shown.
OWN_NAMES = frozenset((b"dev", b"home", b"proc", b"run", b"sys", b"tmp", b"work"))

# The host's userland: programs, libraries, configuration. All else (home, root, srv, var, mnt, boot, …) stays out.
_HOST_NAMES = (b"bin", b"etc", b"lib", b"lib32", b"lib64", b"libx32", b"opt", b"sbin", b"usr")

# What /etc holds that is nobody's business. Most of it is readable by root alone, and root's files belong to nobody in
# a sandbox; it is masked all the same.
_SECRETS = (
    b"/etc/shadow",
    b"/etc/shadow-",
    b"/etc/gshadow",
    b"/etc/gshadow-",
    b"/etc/sudoers",
    b"/etc/sudoers.d",
    b"/etc/security/opasswd",
    b"/etc/ssl/private",
    b"/etc/ssh",
    b"/etc/krb5.keytab",
    b"/etc/ipsec.secrets",
    b"/etc/ipsec.d",
    b"/etc/wireguard",
    b"/etc/openvpn",
    b"/etc/docker",
    b"/etc/kubernetes",
    b"/etc/rancher",
    b"/etc/NetworkManager/system-connections",
    b"/etc/wpa_supplicant",
    b"/etc/letsencrypt",
    b"/etc/ppp",
    b"/etc/cloud",
    b"/etc/boto.cfg",
    b"/etc/netrc",
    b"/etc/machine-id",
)


class Entry(Value):
    """A name at the top of an image. kind: "directory", "file" or "symlink". target: where a symlink points."""

    __slots__ = ("kind", "name", "target")
    name: bytes
    kind: str
    target: bytes

    def __init__(self, *, name: bytes, kind: str, target: bytes = b"") -> None:
        self._set(name=name, kind=kind, target=target)


def _entry(folder: bytes, name: bytes) -> Entry | None:
    path = os.path.join(folder, name)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(mode):
        return Entry(name=name, kind="symlink", target=os.readlink(path))
    if stat.S_ISDIR(mode):
        return Entry(name=name, kind="directory")
    # Sockets, FIFOs and devices at the top of an image have no use in a sandbox.
    return Entry(name=name, kind="file") if stat.S_ISREG(mode) else None


def entries(folder: str) -> list[Entry]:
    """The top-level entries of a rootfs folder, sorted, less those that ringfence makes itself."""
    path = os.fsencode(folder)
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise SpecError(f"image: {folder!r} can't be read ({error.strerror})") from None
    found = (_entry(path, name) for name in names if name not in OWN_NAMES)
    return [entry for entry in found if entry is not None]


def host_entries() -> list[Entry]:
    """The host's userland."""
    found = (_entry(b"/", name) for name in _HOST_NAMES)
    return [entry for entry in found if entry is not None]


def host_secrets() -> list[bytes]:
    """Paths of the host's userland that a sandbox must not show. Not all of them exist on every host."""
    return list(_SECRETS)
