"""`compare`: the same command bare and at every level; what each isolates and costs, and whether each did the same."""

from __future__ import annotations

import contextlib
import functools
import time

from ringfence import __version__
from ringfence._value import Value
from ringfence.api import level
from ringfence.comparison.cost import Run, bare_memory, bare_run, differences, level_run, run_json, summaries
from ringfence.comparison.document import BARE, SCHEMA
from ringfence.comparison.facts import bare_facts, level_facts
from ringfence.comparison.isolation import RESOURCES, Isolation, Verdict, judge_all
from ringfence.comparison.machine import machine_facts
from ringfence.comparison.measures import CATALOGUE, measure
from ringfence.comparison.peer_runs import open_peers, peer_run
from ringfence.comparison.peers import PEERS
from ringfence.comparison.probes_run import RUNSC, catalogue, judge_all_probes, look
from ringfence.comparison.statistics import Summary, ratio
from ringfence.comparison.surface import surfaces
from ringfence.errors import RingfenceError, SpecError, Unavailable
from ringfence.levels.host import host
from ringfence.spec import ISOLATIONS, Limits, Spec
from ringfence.spec.parse import count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from ringfence.comparison.peers import Tool

__all__ = ["BARE", "SCHEMA", "Comparison", "Isolation", "LevelReport", "Run", "Summary", "Verdict", "compare", "ratio"]

_MOST_REPEATS = {"vm": 3}  # of all others 20
# Where nobody says how often: a command that takes long is run less often than a quick one.
_BUDGET_NS = 6_000_000_000


class LevelReport(Value):
    """One column: `name` is "bare", a level, or another tool's, of which only the runs and the measures are known.

    unavailable, help: why the level did not run here, and what would help; "" where it did. The rest is empty then.
    runs: every run, in order. differences: how the first differs from the first bare one; a sentence each.
    varies: whether its own runs differ among themselves, so that a difference may be the command's own.
    accelerator: "kvm" or "tcg" at the vm level, else None. isolation: the verdicts, by resource. facts: all that the
    probe saw. memory_source: who measured the memory. probes, surface, measures: plain values as
    docs/design/comparison.md has them; {}, None and {} where they weren't asked for.
    """

    __slots__ = (
        "accelerator",
        "differences",
        "facts",
        "help",
        "isolation",
        "measures",
        "memory_source",
        "name",
        "probes",
        "runs",
        "surface",
        "unavailable",
        "varies",
    )
    name: str
    unavailable: str
    help: str
    accelerator: str | None
    runs: tuple[Run, ...]
    differences: tuple[str, ...]
    varies: bool
    isolation: dict[str, Verdict]
    facts: dict[str, Any]
    memory_source: str
    probes: dict[str, Any]
    surface: dict[str, Any] | None
    measures: dict[str, Any]

    def __init__(
        self,
        *,
        name: str,
        unavailable: str = "",
        help: str = "",
        accelerator: str | None = None,
        runs: Sequence[Run] = (),
        differences: Sequence[str] = (),
        varies: bool = False,
        isolation: Mapping[str, Verdict] | None = None,
        facts: Mapping[str, Any] | None = None,
        memory_source: str = "",
        probes: Mapping[str, Any] | None = None,
        surface: Mapping[str, Any] | None = None,
        measures: Mapping[str, Any] | None = None,
    ) -> None:
        self._set(
            name=name,
            unavailable=unavailable,
            help=help,
            accelerator=accelerator,
            runs=tuple(runs),
            differences=tuple(differences),
            varies=varies,
            isolation=dict(isolation) if isolation else {},
            facts=dict(facts) if facts else {},
            memory_source=memory_source,
            probes=dict(probes) if probes else {},
            surface=None if surface is None else dict(surface),
            measures=dict(measures) if measures else {},
        )

    @property
    def costs(self) -> dict[str, Summary | None]:
        """The median and the tail of each measure of `cost.MEASURES`, ns or bytes; None is unknown."""
        return summaries(self.runs)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            "name": self.name,
            "unavailable": self.unavailable or None,
            "help": self.help or None,
            "accelerator": self.accelerator,
            "differences": list(self.differences),
            "varies": self.varies,
            "isolation": {name: one.to_json() for name, one in self.isolation.items()},
            "probes": self.probes,
            "surface": self.surface,
            "measures": self.measures,
            "costs": {name: one.to_json() if one else None for name, one in self.costs.items()},
            "memory_source": self.memory_source,
            "runs": [run_json(one) for one in self.runs],
            "facts": self.facts,
        }


class Comparison(Value):
    """argv: the command. machine: where it was compared. levels: the bare run first, then each level, in order.
    probes, measures: what the levels' probes and measures are, by name.
    """

    __slots__ = ("argv", "levels", "machine", "measures", "probes")
    argv: tuple[bytes, ...]
    machine: dict[str, Any]
    probes: dict[str, Any]
    measures: dict[str, Any]
    levels: tuple[LevelReport, ...]

    def __init__(
        self,
        *,
        argv: Sequence[bytes],
        machine: Mapping[str, Any],
        levels: Sequence[LevelReport],
        probes: Mapping[str, Any] | None = None,
        measures: Mapping[str, Any] | None = None,
    ) -> None:
        self._set(
            argv=tuple(argv),
            machine=dict(machine),
            probes=dict(probes) if probes else {},
            measures=dict(measures) if measures else {},
            levels=tuple(levels),
        )

    def __getitem__(self, name: str) -> LevelReport:
        """The column "bare", "process", "container" or "vm". KeyError where it wasn't asked for."""
        for one in self.levels:
            if one.name == name:
                return one
        raise KeyError(name)

    @property
    def identical(self) -> bool:
        """Whether every level that ran printed, wrote and returned what the bare command did. Of ours alone."""
        return not any(one.differences for one in self.levels if one.name in ISOLATIONS)

    @property
    def complete(self) -> bool:
        """Whether every level that was asked for ran. Other tools needn't be here."""
        return not any(one.unavailable for one in self.levels if one.name in ISOLATIONS)

    def to_json(self) -> dict[str, Any]:
        """The document of docs/design/comparison.md, for json.dumps: everything but the output itself. Words that are
        no UTF-8 are kept by surrogateescape.
        """
        return {
            "schema": SCHEMA,
            "ringfence": __version__,
            "argv": [word.decode("utf-8", "surrogateescape") for word in self.argv],
            "machine": self.machine,
            "identical": self.identical,
            "complete": self.complete,
            "probes": self.probes,
            "measures": self.measures,
            "levels": [one.to_json() for one in self.levels],
        }


def compare(
    argv: Sequence[Any],
    *,
    levels: Iterable[str] = ISOLATIONS,
    input: bytes | bytearray | memoryview | str | None = None,
    env: Mapping[Any, Any] | None = None,
    files: Mapping[Any, Any] | None = None,
    collect: Iterable[Any] = (),
    limits: Limits | None = None,
    repeat: int | None = None,
    probes: bool = True,
    surface: bool = False,
    measures: bool = False,
    peers: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Comparison:
    """Runs a command bare and at each level, interleaved, and looks at what each level isolates.

    argv, input, env, files, collect, limits: as for `run`; the bare command knows no limit but the wall time.
    levels: of "process", "container" and "vm". repeat: how often at each; by default 20 times, 3 in a VM, and less
    often where the command takes long. probes: whether each probe of `probes_catalogue` is made, too. surface: whether
    every system call is tried. measures: take the cost suite too (`measures.CATALOGUE`), which is of no command; it
    takes minutes. peers: run the command by other tools as well (`peers.PEERS`), whatever of them is installed, without
    limits; of them runsc is probed, too. tell: is called with what is being done.

    A level that can't run here, or that can't enforce a limit that was asked for, is a column that says why. Raises
    SpecError, and StartError where the bare command can't be started.
    """
    names = tuple(dict.fromkeys(levels))
    if repeat is not None:
        count(repeat, "repeat", 1, 100_000)
    if not names:
        raise SpecError("levels must not be empty")
    patterns = tuple(collect)
    specs = {
        name: Spec.make(argv, isolation=name, input=input, env=env, files=files, collect=patterns, limits=limits)
        for name in names
    }
    tell = tell or _silent
    bare = next(iter(specs.values()))
    refused = {name: reason for name, spec in specs.items() if (reason := _refused(spec)) is not None}
    with contextlib.ExitStack() as stack:
        tools: dict[str, Tool] = {}
        if peers:
            tools, missing = open_peers(stack, tell)
            refused.update(missing)
        able = {name: spec for name, spec in specs.items() if name not in refused}
        runs = _measure(bare, able, tools, repeat, refused, tell)
        tell("the isolation of the bare process")
        unconfined = bare_facts()
        found = [_bare_report(bare, runs[BARE], unconfined)]
        for name in (*names, *(PEERS if peers else ())):
            if name in refused:
                found.append(LevelReport(name=name, unavailable=refused[name][0], help=refused[name][1]))
            elif name in tools:
                found.append(_peer_report(tools[name], runs))
            else:
                tell(f"the isolation of the {name} level")
                found.append(_report(name, runs, limits, unconfined))
        taken: dict[str, dict[str, Any]] = {}
        if measures:
            ran = [one.name for one in found if not one.unavailable]
            taken = measure(
                [name for name in ran if name in ISOLATIONS],
                [tools[name] for name in ran if name in tools],
                tell=tell,
            )
    columns = [one.name for one in found if not one.unavailable]
    verdicts = _probed([name for name in columns if name in (*ISOLATIONS, RUNSC)], tell) if probes else {}
    reached = surfaces([name for name in columns if name in ISOLATIONS], tell) if surface else {}
    return Comparison(
        argv=bare.argv,
        machine=machine_facts(),
        levels=[
            one.replace(measures=taken.get(one.name), probes=verdicts.get(one.name), surface=reached.get(one.name))
            for one in found
        ],
        probes=catalogue() if probes else None,
        measures={name: one.to_json() for name, one in CATALOGUE.items()} if measures else None,
    )


def _silent(_: str) -> None:
    pass


def _refused(spec: Spec) -> tuple[str, str] | None:
    """Why that level can't run that spec here, and what would help; None where it can."""
    boundary, machine = level(spec.isolation), host()
    missing = boundary.unavailable(machine, spec)
    if missing is not None:
        return missing
    try:
        boundary.check(spec, machine)
    except RingfenceError as error:
        return str(error), ""
    return None


def _measure(
    bare: Spec,
    specs: Mapping[str, Spec],
    tools: Mapping[str, Tool],
    repeat: int | None,
    refused: dict[str, tuple[str, str]],
    tell: Callable[[str], None],
) -> dict[str, list[Run]]:
    """Every run, interleaved: what disturbs the machine for a while disturbs all of them alike. A level whose first run
    is refused, and another tool that fails at any, go to `refused`.
    """
    takes: dict[str, Callable[[], Run]] = {BARE: functools.partial(bare_run, bare)}
    takes.update({name: functools.partial(level_run, spec) for name, spec in specs.items()})
    takes.update({name: functools.partial(_by_tool, bare, tool) for name, tool in tools.items()})
    wanted: dict[str, int] = {}
    samples: dict[str, list[Run]] = {}
    for name, take in takes.items():
        tell(f"the first run, {name}")
        began = time.monotonic_ns()
        try:
            first = take()
        except Unavailable as error:
            refused[name] = error.reason, error.help
            continue
        took = max(1, time.monotonic_ns() - began)
        wanted[name] = repeat if repeat is not None else max(1, min(_MOST_REPEATS.get(name, 20), _BUDGET_NS // took))
        # The first starts the launcher and fills caches, so it counts only where it is the only one.
        samples[name] = [first] if wanted[name] == 1 else []
    for turn in range(max(wanted.values())):
        for name, taken in samples.items():
            if len(taken) >= wanted[name] or (name in tools and name in refused):
                continue
            tell(f"run {turn + 1} of {wanted[name]}, {name}")
            try:
                taken.append(takes[name]())
            except Unavailable as error:
                if name not in tools:
                    raise
                refused[name] = error.reason, error.help
    return samples


def _by_tool(spec: Spec, tool: Tool) -> Run:
    """Raises Unavailable where it fails: it is no level of ours, so that isn't the comparison's failure."""
    try:
        return peer_run(spec, tool)
    except (RingfenceError, OSError) as error:
        raise Unavailable(tool.name, str(error)) from error


def _probed(names: Sequence[str], tell: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """The verdict of every probe, by column."""
    seen, missing = look(names, tell)
    found = {name: judge_all_probes(seen[BARE], one) for name, one in seen.items()}
    return found | {name: judge_all_probes(seen[BARE], None, reason) for name, reason in missing.items()}


def _bare_report(spec: Spec, runs: Sequence[Run], unconfined: Mapping[str, Any]) -> LevelReport:
    peak, source = bare_memory(spec)
    measured = [one.replace(memory_peak_bytes=peak) if at == 0 else one for at, one in enumerate(runs)]
    return LevelReport(
        name=BARE,
        runs=measured,
        varies=_varies(runs),
        isolation=judge_all(unconfined, unconfined),
        facts=unconfined,
        memory_source=source,
    )


def _report(
    name: str, runs: Mapping[str, Sequence[Run]], limits: Limits | None, unconfined: Mapping[str, Any]
) -> LevelReport:
    facts: dict[str, Any] = {}
    try:
        facts = level_facts(name, limits=limits)
        verdicts = judge_all(unconfined, facts)
    except RingfenceError as error:
        # The command ran, so its figures stand; under its limits the probe may still not fit.
        verdicts = {one.name: Verdict(Isolation.UNKNOWN, f"the probe gave no facts: {error}") for one in RESOURCES}
    return LevelReport(
        name=name,
        accelerator=facts.get("accelerator"),
        runs=runs[name],
        differences=differences(runs[BARE][0], runs[name][0]),
        varies=_varies(runs[name]),
        isolation=verdicts,
        facts=facts,
        memory_source=runs[name][0].source,
    )


def _peer_report(tool: Tool, runs: Mapping[str, Sequence[Run]]) -> LevelReport:
    return LevelReport(
        name=tool.name,
        runs=runs[tool.name],
        differences=differences(runs[BARE][0], runs[tool.name][0]),
        varies=_varies(runs[tool.name]),
        facts={"tool": tool.version, "note": tool.note},
    )


def _varies(runs: Sequence[Run]) -> bool:
    return any(differences(runs[0], other) for other in runs[1:])
