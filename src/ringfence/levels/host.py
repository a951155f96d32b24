"""This machine, as far as the levels need to know it: one frozen value, probed once."""

from __future__ import annotations

import os

from ringfence._value import Value
from ringfence.linux import cgroups, ids, landlock, privileges, seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.linux.cgroups import Layout

__all__ = ["Host", "host"]


class Host(Value):
    """What this machine can enforce.

    kernel: its release. machine: the architecture, as uname(2) has it. privileged: as
    `linux.privileges` tells it. cgroups: their layout. landlock_abi: 0 is none.
    user_namespaces, seccomp: why they can't be used, or "".
    ids: why a privileged caller's sandboxes can't have ids of their own, and what would help; or None.
    """

    __slots__ = ("cgroups", "ids", "kernel", "landlock_abi", "machine", "privileged", "seccomp", "user_namespaces")
    kernel: str
    machine: str
    privileged: bool
    cgroups: Layout
    landlock_abi: int
    user_namespaces: str
    seccomp: str
    ids: tuple[str, str] | None

    def __init__(
        self,
        *,
        kernel: str,
        machine: str,
        privileged: bool,
        cgroups: Layout,
        landlock_abi: int,
        user_namespaces: str,
        seccomp: str,
        ids: tuple[str, str] | None = None,
    ) -> None:
        self._set(
            kernel=kernel,
            machine=machine,
            privileged=privileged,
            cgroups=cgroups,
            landlock_abi=landlock_abi,
            user_namespaces=user_namespaces,
            seccomp=seccomp,
            ids=ids,
        )


_known: Host | None = None


def host() -> Host:
    """This machine, probed on the first call."""
    global _known
    if _known is None:
        system = os.uname()
        privileged = privileges.privileged()
        usable, reason = seccomp.available()
        _known = Host(
            kernel=system.release,
            machine=system.machine,
            privileged=privileged,
            cgroups=cgroups.layout(),
            landlock_abi=landlock.abi(),
            user_namespaces=_why_no_user_namespaces(privileged),
            seccomp="" if usable else reason,
            ids=ids.why_not() if privileged else None,
        )
    return _known


def _number(path: str) -> int | None:
    try:
        with open(path, "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def _why_no_user_namespaces(privileged: bool) -> str:
    if not os.path.exists("/proc/self/ns/user"):
        return "this kernel has no user namespaces (CONFIG_USER_NS)"
    if _number("/proc/sys/user/max_user_namespaces") == 0:
        return "user namespaces are switched off (sysctl user.max_user_namespaces is 0)"
    if not privileged and _number("/proc/sys/kernel/unprivileged_userns_clone") == 0:
        return "user namespaces are for root only (sysctl kernel.unprivileged_userns_clone is 0)"
    if not privileged and _number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == 1:
        return "AppArmor restricts user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns is 1)"
    return ""
