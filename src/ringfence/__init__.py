"""ringfence: run a command as a process, a container or a virtual machine, through one API.

    import ringfence as rf

    result = rf.run(["python3", "job.py"], isolation="container", files={"job.py": b"print(6*7)"})
    result.exit_code, result.stdout, result.applied

`run` does the work; `Limits`, `Mount`, `Network` and their like say under which rules; a `Result` tells how it ended,
what it used, and what was in force. `Sandbox` stays and takes several commands, `Pool` keeps sandboxes waiting.
`choose` tells which level would do, and why.
`Console` boots an operating system of your own, and is its serial console.
`inspect` tells what any live process is, `survey` all of this host's.
Everything that is raised derives from `RingfenceError`.
"""

from __future__ import annotations

from ringfence import api
from ringfence.api import run
from ringfence.errors import (
    CannotEnforce,
    KernelError,
    ProtocolError,
    RingfenceError,
    SpecError,
    StartError,
    Unavailable,
    Unmet,
    WorkloadFailed,
)
from ringfence.levels.host import Host, host
from ringfence.result import Applied, Change, Denial, Result, TerminationReason, Usage
from ringfence.spec import Device, File, Kernel, Limits, Mount, Namespaces, Network, Seccomp, Tmpfs

__all__ = [
    "Applied",
    "CannotEnforce",
    "Change",
    "Choice",
    "Comparison",
    "Console",
    "Denial",
    "Device",
    "File",
    "Host",
    "Inspection",
    "Kernel",
    "KernelError",
    "Limits",
    "Mount",
    "Namespaces",
    "Network",
    "Pool",
    "ProtocolError",
    "Result",
    "RingfenceError",
    "Sandbox",
    "Seccomp",
    "SpecError",
    "StartError",
    "TerminationReason",
    "Tmpfs",
    "Unavailable",
    "Unmet",
    "Usage",
    "WorkloadFailed",
    "choose",
    "compare",
    "host",
    "inspect",
    "run",
    "survey",
]

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ringfence.comparison import Comparison, compare
    from ringfence.comparison.choice import Choice, choose
    from ringfence.levels.vm.console import Console
    from ringfence.observe import Inspection, inspect, survey
    from ringfence.pool import Pool
    from ringfence.sandbox import Sandbox
    from ringfence.spec import Spec


def _choose(spec: Spec, machine: Host) -> Spec:
    from ringfence.comparison import choice

    return choice.settled(spec, machine)


api.chooser = _choose


def __getattr__(name: str) -> Any:
    """What most callers never use, imported when first used."""
    if name in ("Choice", "choose"):
        from ringfence.comparison import choice

        return getattr(choice, name)
    if name in ("Comparison", "compare"):
        from ringfence import comparison

        return getattr(comparison, name)
    if name in ("Inspection", "inspect", "survey"):
        from ringfence import observe

        return getattr(observe, name)
    if name == "Console":
        from ringfence.levels.vm.console import Console

        return Console
    if name == "Sandbox":
        from ringfence.sandbox import Sandbox

        return Sandbox
    if name == "Pool":
        from ringfence.pool import Pool

        return Pool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
