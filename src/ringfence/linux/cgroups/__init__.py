"""Control groups: limits of memory, CPU, processes and I/O, and what was used of them."""

from __future__ import annotations

import os

from ringfence.linux.cgroups.base import Cgroup, Manager, layout
from ringfence.linux.cgroups.values import NO_LIMITS, RULES, Base, Controller, InForce, IoLimits, Layout, Limits, Usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "NO_LIMITS",
    "RULES",
    "Base",
    "Cgroup",
    "Controller",
    "InForce",
    "IoLimits",
    "Layout",
    "Limits",
    "Manager",
    "Usage",
    "layout",
    "manager",
    "open_manager",
]

_known_manager: Manager | None = None


def manager() -> Manager:
    """This process's manager; a forked child gets one of its own. No cgroup is made yet."""
    global _known_manager
    if _known_manager is None or _known_manager.pid != os.getpid():
        _known_manager = open_manager(layout())
    return _known_manager


def open_manager(found: Layout, claim: Callable[..., None] | None = None, helper: int | None = None) -> Manager:
    """A manager for a layout. Where no controller is usable it can still say why, by `usable`.

    helper: the process that starts the sandboxes, for a scope of systemd's.
    """
    if found.kind == "v2":
        from ringfence.linux.cgroups.v2 import V2Manager

        return V2Manager(found, claim=claim, helper=helper)
    from ringfence.linux.cgroups.v1 import V1Manager

    return V1Manager(found, claim)
