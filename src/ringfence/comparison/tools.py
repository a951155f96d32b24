"""Measures by tools that others wrote: fio, sysbench and stress-ng, where they are installed and seen inside.

They are there so that the small built-in ones can be held against them. Each runs once a round, and warms itself up.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess

from ringfence._value import Value
from ringfence.comparison.taken import reason, start
from ringfence.errors import RingfenceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ringfence.comparison.measures import Measure
    from ringfence.comparison.places import Place
    from ringfence.comparison.taken import Effort, Taken

__all__ = ["TOOLS", "fio", "stress_switch", "sysbench_cpu", "sysbench_memory", "take"]

_ROUNDS = 2
_MIB = 1 << 20


def fio(printed: str) -> tuple[str, dict[str, float]]:
    """Who measured, and the figures, of fio's JSON with the jobs fio_read and fio_write. Raises ValueError."""
    told = json.loads(printed)
    try:
        jobs = {one["jobname"]: one for one in told["jobs"]}
        if any(one["error"] for one in jobs.values()):
            raise ValueError("fio tells of an error")
        figures = {
            "fio_read": float(jobs["fio_read"]["read"]["iops"]),
            "fio_write": float(jobs["fio_write"]["write"]["bw_bytes"]),
        }
        version = str(told["fio version"]).replace("fio-", "fio ")
    except (KeyError, TypeError) as error:
        raise ValueError(f"fio's JSON lacks {error}") from None
    return version, _positive(figures)


def _positive(figures: dict[str, float]) -> dict[str, float]:
    for name, value in figures.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} can't be {value}")
    return figures


def _found(pattern: str, printed: str, what: str) -> str:
    found = re.search(pattern, printed, re.MULTILINE)
    if found is None:
        raise ValueError(f"{what} printed no such line: {pattern}")
    return found[1]


def _sysbench(name: str, pattern: str, factor: int, printed: str) -> tuple[str, dict[str, float]]:
    version = _found(r"^sysbench (\S+)", printed, "sysbench")
    value = float(_found(pattern, printed, "sysbench")) * factor
    return f"sysbench {version}", _positive({name: value})


def sysbench_cpu(printed: str) -> tuple[str, dict[str, float]]:
    """As `fio`, of what `sysbench cpu run` prints."""
    return _sysbench("sysbench_cpu", r"events per second:\s+([\d.]+)$", 1, printed)


def sysbench_memory(printed: str) -> tuple[str, dict[str, float]]:
    """As `fio`, of what `sysbench memory run` prints."""
    return _sysbench("sysbench_memory", r"MiB transferred \(([\d.]+) MiB/sec\)$", _MIB, printed)


def stress_switch(printed: str) -> tuple[str, dict[str, float]]:
    """As `fio`, of `stress-ng --version`, and what it prints with --metrics-brief."""
    version = _found(r"^stress-ng, version (\S+)", printed, "stress-ng")
    # bogo ops, seconds of real, user and system time, and by the first of them
    rate = _found(r"\]\s+switch\s+\d+\s+[\d.]+\s+[\d.]+\s+[\d.]+\s+([\d.]+)\s+[\d.]+", printed, "stress-ng")
    return f"stress-ng {version}", _positive({"stress_switch": float(rate)})


class _Tool(Value):
    """package: Debian's. argv: what is run inside. parse: of what that prints."""

    __slots__ = ("argv", "package", "parse", "program")
    program: str
    package: str
    argv: tuple[str, ...]
    parse: Callable[[str], tuple[str, dict[str, float]]]

    def __init__(self, program: str, argv: Sequence[str], parse: Callable[[str], tuple[str, dict[str, float]]]) -> None:
        self._set(program=program, package=program, argv=tuple(argv), parse=parse)


_FIO = ("fio", "--output-format=json", "--ioengine=psync", "--filename=fio-file", "--size=4M", "--invalidate=0",
        "--runtime=500ms", "--time_based", "--stonewall", "--name=fio_write", "--rw=write", "--bs=64k",
        "--name=fio_read", "--rw=randread", "--bs=4k", "--unlink=1")  # fmt: skip
# By `part` of the measure. A shell, as stress-ng tells its version by another call.
TOOLS = {
    "fio": _Tool("fio", _FIO, fio),
    "sysbench_cpu": _Tool("sysbench", ("sysbench", "cpu", "--time=1", "run"), sysbench_cpu),
    "sysbench_memory": _Tool("sysbench", ("sysbench", "memory", "--time=1", "run"), sysbench_memory),
    "stress_switch": _Tool(
        "stress-ng",
        ("sh", "-c", "stress-ng --version && stress-ng --switch 1 --timeout 1 --metrics-brief 2>&1"),
        stress_switch,
    ),
}


def take(
    measures: Iterable[Measure], places: Sequence[Place], effort: Effort, tell: Callable[[str], None]
) -> Mapping[str, Mapping[str, Taken]]:
    """By place and measure. One call gives all measures of its tool."""
    found = start([one.name for one in measures], [one.name for one in places])
    parts: dict[str, list[str]] = {}
    for one in measures:
        parts.setdefault(one.part, []).append(one.name)
    for part, names in parts.items():
        tool = TOOLS[part]
        if shutil.which(tool.program) is None:
            for place in places:
                for name in names:
                    found[place.name][name].give_up(f"{tool.program} isn't installed (Debian's package {tool.package})")
            continue
        for turn in range(min(_ROUNDS, effort.rounds)):
            for place in places:
                tell(f"{', '.join(names)}: {place.name}, round {turn + 1} of {min(_ROUNDS, effort.rounds)}")
                _once(tool, place, {name: found[place.name][name] for name in names})
    return found


def _once(tool: _Tool, place: Place, taken: dict[str, Taken]) -> None:
    if any(one.unavailable for one in taken.values()):
        return
    try:
        source, figures = tool.parse(place.call(tool.argv).stdout.decode("utf-8", "replace"))
        for name, one in taken.items():
            one.blocks.append([figures[name]])
            one.source = source
    except (RingfenceError, OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        for one in taken.values():
            one.give_up(reason(error))
