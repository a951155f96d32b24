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
    """For json.dumps. memory_bytes: of the whole machine. nested: whether it is itself a guest. mounts: how many this
    process sees. None is unknown.
    """
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
        "governor": _line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "clocksource": _line("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "transparent_hugepage": _chosen(_line("/sys/kernel/mm/transparent_hugepage/enabled")),
        "mounts": _mounts(),
        "swap_bytes": _swap_bytes(),
        "python": platform.python_version(),
    }


def _line(path: str) -> str | None:
    """The first line of a file; None where it can't be read, or has none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().strip() or None
    except OSError:
        return None


def _chosen(choices: str | None) -> str | None:
    """Of "always [madvise] never" what is chosen."""
    if choices is None or "[" not in choices:
        return None
    return choices.partition("[")[2].partition("]")[0]


def _mounts() -> int | None:
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return None


def _swap_bytes() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("SwapTotal:")), None)
    except OSError:
        return None


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
