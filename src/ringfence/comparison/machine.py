"""What a measurement has to tell of the machine that it was taken on."""

from __future__ import annotations

import os
import platform
import time

from ringfence.levels.host import host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["machine_facts"]


def machine_facts() -> dict[str, Any]:
    """For json.dumps. memory_bytes: of the whole machine. nested: whether it is itself a guest; None is unknown."""
    known = host()
    cpu = _cpu()
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": known.kernel,
        "machine": known.machine,
        "cpu_model": cpu.get("model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "nested": "hypervisor" in cpu["flags"].split() if "flags" in cpu else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cgroups": known.cgroups.kind,
        "landlock_abi": known.landlock_abi,
        "privileged": known.privileged,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def _cpu() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, colon, value = line.partition(":")
                if not colon:
                    break
                found[name.strip()] = value.strip()
    except OSError:
        pass
    return found
