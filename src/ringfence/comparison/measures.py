"""The cost suite of `compare`: what is measured of each level, one entry each in one table.

What an entry is measured by is named in it, and the modules that do it know nothing of each other: verbs of the probe
that time themselves inside (`inside.py`), starts and their ends (`starts.py`), many sandboxes at once (`density.py`),
networks (`traffic.py`), tools that others wrote (`tools.py`). docs/design/measures.md tells of each what it is.
"""

from __future__ import annotations

from ringfence._value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from ringfence.comparison.peers import Tool
    from ringfence.comparison.taken import Effort, Taken

    Part = Callable[
        [Iterable["Measure"], Sequence[Any], Effort, Callable[[str], None]], Mapping[str, Mapping[str, Taken]]
    ]

__all__ = ["CATALOGUE", "GROUPS", "Measure", "measure"]

# In the order of the table.
GROUPS = ("start", "launches", "memory", "cpu", "kernel", "files", "network", "tools")
_UNITS = ("ns", "bytes", "per_second", "bytes_per_second")


class Measure(Value):
    """One figure of a level. group: of GROUPS. what: a sentence. unit: "ns", "bytes", "per_second" or
    "bytes_per_second"; of the latter two more is better. by: what measures it, and which part of that.
    """

    __slots__ = ("by", "group", "name", "part", "unit", "what")
    name: str
    group: str
    what: str
    unit: str
    by: str
    part: str

    def __init__(self, name: str, group: str, what: str, unit: str, by: str, part: str = "") -> None:
        if group not in GROUPS or unit not in _UNITS:
            raise ValueError(f"{name}: no group {group!r} or no unit {unit!r}")
        self._set(name=name, group=group, what=what, unit=unit, by=by, part=part)

    @property
    def better(self) -> str:
        """Which is: "lower" or "higher"."""
        return "higher" if self.unit.endswith("per_second") else "lower"

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {"group": self.group, "what": self.what, "unit": self.unit, "better": self.better}


def _starts() -> tuple[Measure, ...]:
    def one(name: str, what: str) -> Measure:
        return Measure(name, "start", what, "ns", "starts", name)

    return (
        one("start_cold", "The first run of a Python process, from the call to its result."),
        one("start_warm", "A run right after another one, from the call to its result."),
        one("start_pooled", "A run in a sandbox that waited for it in a pool; bare, a start like any other."),
        one("start_boot", "A run in a guest that boots, without a template; nothing else has a kernel to boot."),
        one("first_output", "From the call until the first byte that the command prints has arrived."),
        one("teardown", "From the command's end until nothing of the sandbox is left."),
    )


def _many() -> tuple[Measure, ...]:
    launches = (
        Measure(
            f"launches_{ways}",
            "launches",
            f"Runs a second, one after the other in {ways} thread{'s' if ways > 1 else ''} of one Python process.",
            "per_second",
            "launches",
            str(ways),
        )
        for ways in (1, 2, 4)
    )
    memory = (
        Measure(f"memory_{kind}_{count}", "memory", f"{what}, of {count} that idle.", "bytes", "density", str(count))
        for kind, what in (
            ("pss", "What the processes of a sandbox hold (PSS): command, init, VMM, its share of the launcher"),
            ("machine", "How much less memory the machine has available for each sandbox (MemAvailable)"),
        )
        for count in (1, 10, 50)
    )
    return (*launches, *memory)


# Of those with a verb, `part` is the verb: one call of it gives all measures that name it.
_INSIDE = (
    Measure("cpu_integer", "cpu", "A million steps of a chain of integer operations.", "ns", "verb", "integer"),
    Measure("cpu_float", "cpu", "A million steps of a chain of floating-point operations.", "ns", "verb", "float"),
    Measure("cpu_python", "cpu", "A loop of ten thousand steps in Python, by the image's python3.", "ns", "python"),
    Measure("memory_bandwidth", "cpu", "Copying from one array to another.", "bytes_per_second", "verb", "copy"),
    Measure("system_call", "kernel", "One system call that does next to nothing (getppid).", "ns", "verb", "syscall"),
    Measure(
        "context_switch", "kernel", "A switch between two processes on one CPU, by a pipe.", "ns", "verb", "switch"
    ),
    Measure("page_fault", "kernel", "The first touch of a page of memory.", "ns", "verb", "fault"),
    Measure("process_start", "kernel", "A process that forks a child and waits for its end.", "ns", "verb", "fork"),
    Measure("file_create", "files", "Making an empty file in the work directory.", "ns", "verb", "metadata"),
    Measure("file_stat", "files", "Asking for its size.", "ns", "verb", "metadata"),
    Measure("file_unlink", "files", "Removing it.", "ns", "verb", "metadata"),
    Measure(
        "write_sequential", "files", "Writing a file from its beginning, unsynced.", "bytes_per_second", "verb", "io"
    ),
    Measure("read_sequential", "files", "Reading that file, which is in memory.", "bytes_per_second", "verb", "io"),
    Measure("write_random", "files", "Writing 4 KiB somewhere in that file, unsynced.", "ns", "verb", "io"),
    Measure("read_random", "files", "Reading 4 KiB from somewhere in it.", "ns", "verb", "io"),
    Measure("write_synced", "files", "Writing 4 KiB, until the disk has it (fdatasync).", "ns", "verb", "sync"),
)

_NETWORK = (
    Measure(
        "loopback_latency", "network", "A byte there and back by TCP, within the sandbox.", "ns", "verb", "loopback"
    ),
    Measure(
        "loopback_throughput", "network", "A stream by TCP, within the sandbox.", "bytes_per_second", "verb", "loopback"
    ),
    Measure("host_latency", "network", "A byte from the host to a server in the sandbox and back.", "ns", "traffic"),
    Measure(
        "host_throughput",
        "network",
        "A stream from the host to a server in the sandbox.",
        "bytes_per_second",
        "traffic",
    ),
)

_TOOLS = (
    Measure("fio_read", "tools", "Random reads of 4 KiB by fio, of a file in memory.", "per_second", "tool", "fio"),
    Measure("fio_write", "tools", "Sequential writes by fio.", "bytes_per_second", "tool", "fio"),
    Measure("sysbench_cpu", "tools", "Prime numbers by sysbench: events.", "per_second", "tool", "sysbench_cpu"),
    Measure("sysbench_memory", "tools", "Writes by sysbench.", "bytes_per_second", "tool", "sysbench_memory"),
    Measure(
        "stress_switch", "tools", "Context switches by stress-ng: operations.", "per_second", "tool", "stress_switch"
    ),
)

CATALOGUE: dict[str, Measure] = {one.name: one for one in (*_starts(), *_many(), *_INSIDE, *_NETWORK, *_TOOLS)}


def _parts() -> dict[str, Part]:
    """By `Measure.by`, in this order: what comes first is measured on a machine with the fewest sandboxes open."""
    from ringfence.comparison import density, inside, starts, tools, traffic

    return {
        "density": density.memory,
        "starts": starts.take,
        "launches": density.launches,
        "verb": inside.take,
        "python": inside.take,
        "traffic": traffic.take,
        "tool": tools.take,
    }


def measure(
    levels: Sequence[str],
    peers: Sequence[Tool] = (),
    *,
    effort: Effort | None = None,
    names: Iterable[str] | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """The cost suite, bare and at each level and peer, interleaved: by place ("bare", "vm", "runc") and measure, as
    docs/design/comparison.md has it.

    effort: how much is taken; all there is by default. names: of CATALOGUE; all by default. tell: is called with what
    is being done. A measure that can't be taken at a place says why in "unavailable". Raises Unavailable where a
    level can't run here at all, KeyError for a name that isn't known.
    """
    from ringfence.comparison.document import BARE
    from ringfence.comparison.places import Bare, Level, Other
    from ringfence.comparison.taken import FULL, judged

    wanted = [CATALOGUE[name] for name in (CATALOGUE if names is None else names)]
    effort = FULL if effort is None else effort
    places = [Bare(), *(Level(one) for one in levels), *(Other(one) for one in peers)]
    found: dict[str, dict[str, dict[str, Any]]] = {one.name: {} for one in places}
    try:
        for by, part in _parts().items():
            measures = [one for one in wanted if one.by == by]
            if not measures:
                continue
            taken = part(measures, places, effort, tell or _silent)
            for place in places:
                for one in measures:
                    bare = None if place.name == BARE else taken[BARE][one.name]
                    found[place.name][one.name] = judged(taken[place.name][one.name], bare)
    finally:
        for place in places:
            place.close()
    return {place: {one.name: taken[one.name] for one in wanted} for place, taken in found.items()}


def _silent(_: str) -> None:
    return
