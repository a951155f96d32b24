"""What changed between two comparisons: a budget for what a boundary isolates and what a start costs.

Worse is: a verdict further down in own > restricted > shared, or one that can't be told any more; a system call that
was denied and is reached; a level that is gone, and one of which the old comparison says nothing; output that differs
from the bare command's and didn't; and a start that takes longer beyond noise. That last one takes three things
together, so that a busy machine is no regression: the 95 % interval of the ratio of medians lies above 1; the median is
above the old one by more than the tolerance's share *and* its time; and ratio and interval are so in relation to the
bare command of the same comparison too, which has nothing of ringfence's in it.
"""

from __future__ import annotations

import functools
import random
import statistics

from ringfence._value import Plain, Value
from ringfence.comparison.document import BARE, level_named
from ringfence.comparison.figures import duration, figure, times
from ringfence.comparison.statistics import interval
from ringfence.spec import ISOLATIONS
from ringfence.spec.parse import duration as parse_duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

__all__ = ["Change", "Changes", "Tolerance", "changes_between"]

# What can't be told stands beside the order, not at its end: "not testable here" is no weaker boundary.
_RANK = {"own": 3, "restricted": 2, "shared": 1}
# Facts of the machine that make figures of two comparisons incomparable, and those that are only told.
_SAME_FOR_TIMES = ("cpu_model", "kernel")
_TOLD = ("machine", "cpus", "nested", "memory_bytes", "cgroups", "landlock_abi", "privileged")
# With fewer there is no interval: of three against three, all above all is one case in twenty.
_FEWEST_RUNS = 3
_RESAMPLES = 400
_MOST_NAMES = 8
_NO_BUDGET = "there is nothing to hold it against, save that comparison anew"


class Tolerance(Value):
    """How much longer a start may take: by this share of the old median, or by less than this time, nanoseconds."""

    __slots__ = ("share", "time_ns")
    share: float
    time_ns: int

    def __init__(self, share: float = 0.10, time_ns: int = 200_000) -> None:
        if not 0 <= share <= 100 or time_ns < 0:
            raise ValueError(f"must be a share from 0 % and a time from 0, not {share} and {time_ns} ns")
        self._set(share=share, time_ns=time_ns)

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """Of "10%", or "10%,0.2ms". ValueError where it is neither."""
        first, comma, time = text.partition(",")
        number = first.strip()
        try:
            if not number.endswith("%"):
                raise ValueError
            share = float(number[:-1]) / 100
        except ValueError:
            raise ValueError(f"must be PERCENT% or PERCENT%,TIME, not {text!r}") from None
        return cls(share, parse_duration(time.strip()) if comma else 200_000)


class Change(Plain):
    """kind: "worse", "better" or "changed". about: "level", "output", "isolation", "probe", "surface", "start", "cost".
    name: of the resource, probe or cost, or "". sentence: for people.
    """

    __slots__ = ("about", "kind", "level", "name", "sentence")
    kind: str
    level: str
    about: str
    name: str
    sentence: str

    def __init__(self, *, kind: str, level: str, about: str, name: str, sentence: str) -> None:
        self._set(kind=kind, level=level, about=about, name=name, sentence=sentence)


class Changes(Value):
    """since: what it was compared with. changes: the worst first. notes: what couldn't be compared, and why."""

    __slots__ = ("changes", "notes", "since")
    since: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    def __init__(self, *, since: str, changes: Sequence[Change], notes: Sequence[str]) -> None:
        order = ("worse", "better", "changed")
        ranked = sorted(changes, key=lambda one: order.index(one.kind))
        self._set(since=since, changes=tuple(ranked), notes=tuple(dict.fromkeys(notes)))

    @property
    def worse(self) -> tuple[Change, ...]:
        """Those that fail a budget."""
        return tuple(one for one in self.changes if one.kind == "worse")

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            "since": self.since,
            "worse": len(self.worse),
            "changes": [one.to_json() for one in self.changes],
            "notes": list(self.notes),
        }


def changes_between(
    old: dict[str, Any], new: dict[str, Any], *, tolerance: Tolerance | None = None, allow_unknown: bool = False
) -> Changes:
    """What changed from one comparison's document to another's.

    allow_unknown: a verdict that can't be told any more is told of, and isn't worse.
    """
    tolerance = tolerance or Tolerance()
    machine = old["machine"]
    since = f"the comparison of {machine.get('date', 'an unknown date')} by ringfence {old['ringfence']}"
    notes = [*_hosts(old, new)]
    if old["argv"] != new["argv"]:
        notes.append("the command was another")
    found: list[Change] = []
    for before in old["levels"]:
        name = before["name"]
        after = level_named(new, name)
        judged = _level_changes(before, after, allow_unknown, notes)
        if after is not None and not before["unavailable"] and not after["unavailable"]:
            judged = [*judged, *_times(old, new, name, tolerance, notes)]
        # The bare run is the control and other tools are no promise of ours: of them it is only told.
        found += judged if name in ISOLATIONS else [one.replace(kind="changed") for one in judged]
    for after in new["levels"]:
        if after["name"] in ISOLATIONS and not after["unavailable"] and level_named(old, after["name"]) is None:
            told = f"that comparison has no such level: {_NO_BUDGET}, or leave it out by --levels"
            found.append(Change(kind="worse", level=after["name"], about="level", name="", sentence=told))
    return Changes(since=since, changes=found, notes=notes)


def _hosts(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    ours, theirs = new["machine"], old["machine"]
    for fact in (*_SAME_FOR_TIMES, *_TOLD):
        if ours.get(fact) != theirs.get(fact):
            yield f"another host: {fact} was {theirs.get(fact)}, is {ours.get(fact)}"
    if not _same_host(old, new):
        yield "times aren't compared across hosts: the CPU model or the kernel is another; verdicts are"


def _same_host(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return all(
        old["machine"].get(fact) is not None and old["machine"].get(fact) == new["machine"].get(fact)
        for fact in _SAME_FOR_TIMES
    )


# ---- what is isolated ----


def _level_changes(
    before: dict[str, Any], after: dict[str, Any] | None, allow_unknown: bool, notes: list[str]
) -> list[Change]:
    name = before["name"]
    about_level = functools.partial(Change, level=name, about="level", name="")
    if before["unavailable"]:
        if after is None or after["unavailable"]:
            return []
        # Whatever it isolates would be no less than nothing.
        return [about_level(kind="worse", sentence=f"it didn't run then ({before['unavailable']}): {_NO_BUDGET}")]
    if after is None:
        return [about_level(kind="worse", sentence="it is gone: this comparison has no such level")]
    if after["unavailable"]:
        return [about_level(kind="worse", sentence=f"it doesn't run any more: {after['unavailable']}")]
    found = [*_output(before, after)]
    for about, what in (("isolation", "isolation"), ("probe", "probes")):
        if after[what] and not before[what]:
            told = f"there were no verdicts of its {what} then: {_NO_BUDGET}"
            found.append(Change(kind="worse", level=name, about=about, name="", sentence=told))
    found += _verdicts(name, "isolation", before["isolation"], after["isolation"], allow_unknown)
    found += _verdicts(name, "probe", before["probes"], after["probes"], allow_unknown)
    if before["surface"] is None or after["surface"] is None:
        if (before["surface"] is None) != (after["surface"] is None):
            notes.append("system calls aren't compared: only one of the two tried them (--surface)")
        return found
    return [*found, *_surface(name, before["surface"]["calls"], after["surface"]["calls"])]


def _output(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    make = functools.partial(Change, level=before["name"], about="output", name="")
    if after["differences"] and not before["differences"]:
        told = f"it did what the bare command did, and doesn't: {'; '.join(after['differences'])}"
        # What varies by itself says nothing of the boundary.
        yield make(kind="changed" if after["varies"] or before["varies"] else "worse", sentence=told)
    elif before["differences"] and not after["differences"]:
        yield make(kind="better", sentence="it does what the bare command does, and didn't")


def _verdicts(
    level: str, about: str, before: dict[str, Any], after: dict[str, Any], allow_unknown: bool
) -> Iterator[Change]:
    unknown = "changed" if allow_unknown else "worse"
    if before and not after:
        if any(one["verdict"] in _RANK for one in before.values()):
            yield Change(
                kind=unknown, level=level, about=about, name="", sentence=f"none of {len(before)} verdicts is told"
            )
        return
    for name, was in before.items():
        now = after.get(name, {"verdict": "unknown", "evidence": "it wasn't looked at"})
        had, has = _RANK.get(was["verdict"]), _RANK.get(now["verdict"])
        if had == has:
            continue
        if has is None:
            kind = unknown
        elif had is None:
            kind = "changed"
        else:
            kind = "worse" if has < had else "better"
        sentence = f"{name} was {was['verdict']}, is {now['verdict']}: {now['evidence']}"
        yield Change(kind=kind, level=level, about=about, name=name, sentence=sentence)


def _surface(level: str, before: dict[str, str], after: dict[str, str]) -> Iterator[Change]:
    make = functools.partial(Change, level=level, about="surface", name="")
    ways = (
        ("worse", "reached that {was} denied", "denied", "reachable"),
        # A newer kernel has calls that the older one lacked.
        ("changed", "reached that {was}n't there", "absent", "reachable"),
        ("better", "denied that {was} reached", "reachable", "denied"),
    )
    for kind, words, had, has in ways:
        names = [
            name
            for name, was in before.items()
            if was.split()[0] == had and after.get(name, "").partition(" ")[0] == has
        ]
        if names:
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            calls, were = ("system calls are", "were") if len(names) > 1 else ("system call is", "was")
            shown = ", ".join(names[:_MOST_NAMES]) + more
            yield make(kind=kind, sentence=f"{len(names)} {calls} {words.format(was=were)}: {shown}")


# ---- what it costs ----

# (what it is called, its key in a run, its unit, how small a difference is nobody's concern)
_COSTS = (
    ("the command", "wall_ns", "ns", 1_000_000),
    ("teardown", "teardown_ns", "ns", 200_000),
    ("CPU time", "cpu_ns", "ns", 1_000_000),
    ("peak memory", "memory_peak_bytes", "bytes", 1 << 20),
)


def _times(
    old: dict[str, Any], new: dict[str, Any], name: str, tolerance: Tolerance, notes: list[str]
) -> Iterator[Change]:
    if not _same_host(old, new):
        return
    pair = [level_named(document, name) for document in (old, new)]
    before, after = (one or {} for one in pair)
    if before["accelerator"] != after["accelerator"]:
        notes.append(
            f"{name}: times aren't compared: it ran by {before['accelerator']}, runs by {after['accelerator']}"
        )
        return
    starts = [_starts(one) for one in (before, after)]
    if min(map(len, starts)) < _FEWEST_RUNS:
        if name in ISOLATIONS:
            few = " and ".join(str(len(one)) for one in starts)
            notes.append(f"{name}: starts aren't compared: {few} runs, and it takes {_FEWEST_RUNS} (--repeat)")
        return
    bare = [_starts(level_named(document, BARE) or {"runs": []}) for document in (old, new)]
    yield from _start(name, starts, bare, tolerance)
    if old["argv"] == new["argv"]:
        yield from _costs(name, before, after, tolerance)
        yield from _measures(name, old["measures"], before["measures"], after["measures"], tolerance)


def samples(level: dict[str, Any], measure: str) -> list[float]:
    """What the runs of a level's part gave for a measure, where it is known."""
    return [one[measure] for one in level["runs"] if one[measure] is not None]


def _starts(level: dict[str, Any]) -> list[float]:
    """Those that took some time: none takes none, whatever a file says."""
    return [one for one in samples(level, "startup_ns") if one > 0]


def _start(
    name: str, starts: Sequence[Sequence[float]], bare: Sequence[Sequence[float]], tolerance: Tolerance
) -> Iterator[Change]:
    was, now = map(statistics.median, starts)
    low, high = interval(starts[1], starts[0])
    told = f"a start takes {duration(now)}, took {duration(was)}: {times(now / was)} ({_span(low, high)})"
    make = functools.partial(Change, level=name, about="start", name="start")
    if low > 1 and now / was > 1 + tolerance.share and now - was > tolerance.time_ns:
        if min(map(len, bare)) < _FEWEST_RUNS or name == BARE:
            yield make(kind="worse", sentence=told)
            return
        relative = (now / was) / (statistics.median(bare[1]) / statistics.median(bare[0]))
        beside = _interval_beside(starts, bare)
        told += f"; in relation to the bare command {times(relative)} ({_span(*beside)})"
        worse = beside[0] > 1 and relative > 1 + tolerance.share
        yield make(kind="worse" if worse else "changed", sentence=told + ("" if worse else ": so does all else here"))
    elif high < 1 and now / was < 1 - tolerance.share and was - now > tolerance.time_ns:
        yield make(kind="better", sentence=told)


def _interval_beside(starts: Sequence[Sequence[float]], bare: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The 95 % interval of how much more the level's median grew than the bare command's, by the bootstrap."""
    chance = random.Random(len(starts[0]) * 1_000_003 + len(starts[1]))

    def median(row: Sequence[float]) -> float:
        return statistics.median(chance.choices(row, k=len(row)))

    found = sorted(
        (median(starts[1]) / median(starts[0])) / (median(bare[1]) / median(bare[0])) for _ in range(_RESAMPLES)
    )
    aside = int(_RESAMPLES * 0.025)
    return found[aside], found[-1 - aside]


def _costs(name: str, before: dict[str, Any], after: dict[str, Any], tolerance: Tolerance) -> Iterator[Change]:
    for what, measure, unit, concern in _COSTS:
        rows = samples(before, measure), samples(after, measure)
        if measure == "memory_peak_bytes" and before["memory_source"] != after["memory_source"]:
            continue
        spell = functools.partial(figure, unit=unit)
        yield from _cost(name, what, rows, concern, tolerance, spell)


def _measures(
    name: str, catalogue: dict[str, Any], before: dict[str, Any], after: dict[str, Any], tolerance: Tolerance
) -> Iterator[Change]:
    for what in (name for name in catalogue if name in before and name in after):
        was, now = before[what], after[what]
        if was["source"] == now["source"]:
            spell = functools.partial(figure, unit=catalogue[what]["unit"])
            yield from _cost(name, what, (was["samples"], now["samples"]), 0, tolerance, spell)


def _cost(
    level: str,
    what: str,
    rows: tuple[Sequence[float], Sequence[float]],
    concern: float,
    tolerance: Tolerance,
    spell: Callable[[float], str],
) -> Iterator[Change]:
    """A cost that is another than it was. Only told: it is the command's and the machine's as much as the level's."""
    if min(map(len, rows)) < _FEWEST_RUNS or min(min(row) for row in rows) <= 0:
        return
    was, now = map(statistics.median, rows)
    low, high = interval(rows[1], rows[0])
    grown = low > 1 and now / was > 1 + tolerance.share
    shrunk = high < 1 and now / was < 1 - tolerance.share
    if (grown or shrunk) and abs(now - was) > concern:
        sentence = f"{what}: {spell(now)}, was {spell(was)}: {times(now / was)} ({_span(low, high)})"
        yield Change(kind="changed", level=level, about="cost", name=what, sentence=sentence)


def _span(low: float, high: float) -> str:
    return f"{times(low)[1:]} to {times(high)[1:]}"
