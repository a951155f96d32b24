"""This machine, as far as the levels need to know it: one frozen value, probed once."""

from __future__ import annotations

import os

from ringfence._value import Value
from ringfence.linux import cgroups, ids, privileges, seccomp
from ringfence.linux import landlock_abi as landlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.linux.cgroups import Layout

__all__ = ["Host", "host"]


class Host(Value):
    """What this machine can enforce.

    kernel: its release. machine: the architecture, as uname(2) has it. privileged: as
    `linux.privileges` tells it. cgroups: their layout. landlock_abi: 0 is none; asked of the kernel when it is first
    wanted, as a container mostly isn't in need of it.
    user_namespaces, seccomp: why they can't be used, or ""; user_namespaces_help: what would help.
    ids: why a privileged caller's sandboxes can't have ids of their own, and what would help; or None.
    """

    __slots__ = (
        "cgroups",
        "ids",
        "kernel",
        "landlock_abi",
        "machine",
        "privileged",
        "seccomp",
        "user_namespaces",
        "user_namespaces_help",
    )
    kernel: str
    machine: str
    privileged: bool
    cgroups: Layout
    landlock_abi: int
    user_namespaces: str
    seccomp: str
    ids: tuple[str, str] | None
    user_namespaces_help: str

    def __init__(
        self,
        *,
        kernel: str,
        machine: str,
        privileged: bool,
        cgroups: Layout,
        landlock_abi: int | None = None,
        user_namespaces: str,
        seccomp: str,
        ids: tuple[str, str] | None = None,
        user_namespaces_help: str = "",
    ) -> None:
        self._set(
            kernel=kernel,
            machine=machine,
            privileged=privileged,
            cgroups=cgroups,
            user_namespaces=user_namespaces,
            seccomp=seccomp,
            ids=ids,
            user_namespaces_help=user_namespaces_help,
        )
        if landlock_abi is not None:
            self._set(landlock_abi=landlock_abi)

    def __getattr__(self, name: str) -> int:
        if name != "landlock_abi":
            raise AttributeError(f"a Host has no {name!r}")
        self._set(landlock_abi=landlock.abi())
        return self.landlock_abi


_known: Host | None = None


def host() -> Host:
    """This machine, probed on the first call."""
    global _known
    if _known is None:
        system = os.uname()
        privileged = privileges.privileged()
        usable, reason = seccomp.available()
        why, help = _user_namespaces(privileged)
        _known = Host(
            kernel=system.release,
            machine=system.machine,
            privileged=privileged,
            cgroups=cgroups.layout(),
            user_namespaces=why,
            user_namespaces_help=help,
            seccomp="" if usable else reason,
            ids=ids.why_not() if privileged else None,
        )
    return _known


def _user_namespaces(privileged: bool) -> tuple[str, str]:
    """Why they don't serve, and what would help; ("", "") where nothing stands in the way."""
    from ringfence.linux import surroundings

    # A privileged caller's /proc is mounted anew, whatever lies over this one: its long table needs no look.
    quick = surroundings.find(mounts=not privileged, engine=False)
    if quick.no_user_namespaces(privileged=privileged) is None:
        return "", ""
    from ringfence.wire.launcher import core_path

    found = surroundings.find(helper=core_path(), mounts=not privileged)
    return found.no_user_namespaces(privileged=privileged, helper=core_path()) or ("", "")
