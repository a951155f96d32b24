"""A comparison's document as tables for a terminal: of the plain dict, so a saved file is shown as a fresh one is."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ringfence.comparison.cost import differing
from ringfence.comparison.document import BARE
from ringfence.comparison.figures import figure, spread, times, visible
from ringfence.errors import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, TextIO

    from ringfence.comparison.changes import Changes

__all__ = ["COSTS", "STYLES", "console", "cost_ratio", "print_changes", "print_comparison", "title"]

STYLES = {"own": "bold green", "restricted": "yellow", "shared": "red", "unknown": "dim", "not testable": "dim"}
# A file or a pipe has no width of its own; wide enough that no figure is broken.
_WIDTH_WITHOUT_TERMINAL = 130
# With more columns than this there is no room in them for evidence, tails and the like.
_ROOMY = 5
# (what a row is called, its key in "costs", its unit)
COSTS = (
    ("start", "startup_ns", "ns"),
    ("command", "wall_ns", "ns"),
    ("teardown", "teardown_ns", "ns"),
    ("total", "total_ns", "ns"),
    ("CPU time", "cpu_ns", "ns"),
    ("peak memory", "memory_peak_bytes", "bytes"),
)


def console(file: TextIO | None = None) -> Console:
    """For a terminal as wide as it is, for anything else wide enough; without colours there."""
    target = file if file is not None else sys.stdout
    width = None if target.isatty() else _WIDTH_WITHOUT_TERMINAL
    return Console(file=target, width=width, highlight=False)


def print_comparison(document: dict[str, Any], to: Console) -> None:
    """Whether the output was the same, what was isolated, what got through, and what it cost."""
    # One that didn't run would be a column of nothing; why it didn't is told below.
    levels = [one for one in document["levels"] if not one["unavailable"]]
    to.print(_line(f"The same command, {len(levels)} ways: {command_line(document)}", "bold"))
    to.print(_output_table(levels))
    to.print(_isolation_table(with_any(levels, "isolation")))
    if probed := with_any(levels, "probes"):
        to.print(_probe_table(document["probes"], probed))
    if reached := with_any(levels, "surface"):
        to.print(_surface_table(reached))
    to.print(_cost_table(levels))
    if measured := with_any(levels, "measures"):
        to.print(_measure_table(document["measures"], measured))
    for one in document["levels"]:
        for note in (*notes(one), *remarks(one)):
            to.print(_line(note))


def with_any(levels: Sequence[dict[str, Any]], section: str) -> list[dict[str, Any]]:
    """Those that have something in a section: of other tools little is looked at."""
    return [one for one in levels if one[section]]


def command_line(document: dict[str, Any]) -> str:
    """The command in one line; what is no UTF-8 as escapes."""
    return " ".join(map(_word, document["argv"]))


def _word(word: str) -> str:
    try:
        return word.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return visible(word)  # of a file, and no word that a command line can have


def title(level: dict[str, Any]) -> str:
    """ "vm (tcg)"."""
    return f"{level['name']} ({level['accelerator']})" if level["accelerator"] else str(level["name"])


def notes(level: dict[str, Any]) -> list[str]:
    """How a level didn't do what it should have: it didn't run, or did something else."""
    name = level["name"]
    if level["unavailable"]:
        return [f"{name}: did not run: {level['unavailable']}" + (f" ({level['help']})" if level["help"] else "")]
    found = [f"{name}: {sentence}" for sentence in level["differences"]]
    if level["varies"]:
        found.append(f"{name}: its own output varies from run to run")
    return found


def remarks(level: dict[str, Any]) -> list[str]:
    """What is to be known of a level's figures: how another tool was run, what could not be measured."""
    name, found = level["name"], []
    if level["facts"].get("note"):  # another tool
        found.append(f"{name}: {level['facts'].get('tool') or name}: {level['facts']['note']}")
    return found + [f"{name}: not measured: {sentence}" for sentence in unmeasured(level["measures"])]


def unmeasured(measures: dict[str, dict[str, Any]]) -> list[str]:
    """What has no figures and why, a sentence for each reason."""
    why: dict[str, list[str]] = {}
    for name, one in measures.items():
        if one["unavailable"]:
            why.setdefault(one["unavailable"], []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in why.items()]


def cost_ratio(level: dict[str, Any], bare: dict[str, Any], measure: str) -> float | None:
    """Of the medians, to the bare run; None where there is none to tell."""
    found, base = level["costs"].get(measure), bare["costs"].get(measure)
    # What the guest's own cgroup counts lacks the VMM: figures of two instruments have no ratio.
    alike = measure != "memory_peak_bytes" or level["memory_source"] == bare["memory_source"]
    if level["name"] == BARE or found is None or base is None or not base["p50"] or not alike:
        return None
    return float(found["p50"] / base["p50"])


def _plain(text: str, style: str = "") -> Text:
    """What may come from a workload, without what would move a terminal's cursor."""
    return Text(visible(text), style=style)


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)


def _none(word: str = "-") -> Text:
    return Text(word, style="dim")


def _table(heading: str, levels: Sequence[dict[str, Any]], *first: str) -> Table:
    table = Table(title=_plain(heading, "bold"), title_justify="left", expand=False, padding=(0, 1))
    for name in first or ("",):
        table.add_column(name, no_wrap=len(first) > 1)
    for one in levels:
        table.add_column(_plain(title(one)), ratio=1, overflow="fold")
    return table


def _output_table(levels: Sequence[dict[str, Any]]) -> Table:
    table = _table("Output", levels)
    for name in ("ending", "stdout", "stderr", "files"):
        cells = []
        for one in levels:
            if not one["runs"]:
                cells.append(_none())
                continue
            run = one["runs"][0]
            shown = {
                "ending": run["ending"],
                "stdout": f"{run['stdout_bytes']} bytes",
                "stderr": f"{run['stderr_bytes']} bytes",
                "files": f"{len(run['files'])} collected",
            }[name]
            other = differing(one["differences"])[name]
            judged = "DIFFERENT" if other else "identical"
            if one["name"] != BARE:
                shown = judged if len(levels) > _ROOMY else f"{shown}, {judged}"
            cells.append(_plain(shown, "bold red" if other else ""))
        table.add_row(name, *cells)
    return table


def _verdict(found: dict[str, Any] | None, evidence: bool) -> Text:
    if found is None:
        return _none()
    word = found["verdict"]
    if not evidence:
        return Text(word, style=STYLES[word])
    return Text.assemble((word, STYLES[word]), "\n", _plain(found["evidence"], "dim"))


def _isolation_table(levels: Sequence[dict[str, Any]]) -> Table:
    table = _table("Isolation", levels)
    evidence = len(levels) <= _ROOMY
    table.show_lines = evidence
    for resource in dict.fromkeys(name for one in levels for name in one["isolation"]):
        table.add_row(_plain(resource), *(_verdict(one["isolation"].get(resource), evidence) for one in levels))
    return table


def _probe_table(catalogue: dict[str, Any], levels: Sequence[dict[str, Any]]) -> Table:
    """How many of each verdict, group by group."""
    heading = f"Probes: what {len(catalogue)} attempts inside gave (--probes shows each, with its evidence)"
    table = _table(heading, levels, "group")
    groups: dict[str, list[str]] = {}
    for name, one in by_group(catalogue):
        groups.setdefault(one["group"], []).append(name)
    for group, names in groups.items():
        found = [[one["probes"][name]["verdict"] for name in names if name in one["probes"]] for one in levels]
        table.add_row(_plain(group), *(_counts(one, ", " if len(levels) <= _ROOMY else "\n") for one in found))
    return table


def _counts(words: Sequence[str], between: str) -> Text:
    """ "4 own, 1 shared", each in its colour."""
    parts = [(f"{words.count(word)} {word}", style) for word, style in STYLES.items() if word in words]
    return Text(between).join(Text(*part) for part in parts) if parts else _none()


def by_group(catalogue: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """A catalogue's entries in its own order, but each group together, where its first entry stands."""
    groups = list(dict.fromkeys(one["group"] for one in catalogue.values()))
    return sorted(catalogue.items(), key=lambda item: groups.index(item[1]["group"]))


def _surface_table(levels: Sequence[dict[str, Any]]) -> Table:
    table = _table("System calls of the host's kernel", levels)
    for name in ("reachable", "denied", "absent"):
        cells = [_none() if one["surface"] is None else Text(str(one["surface"][name])) for one in levels]
        table.add_row(name, *cells)
    tried = [one["surface"] for one in levels]
    if any(one and one.get("by") for one in tried):
        table.add_row("by", *(_none() if one is None else _plain(one.get("by") or "the workload") for one in tried))
    return table


def _cost_table(levels: Sequence[dict[str, Any]]) -> Table:
    table = _table("Cost: the median, its ratio to bare, the tail", levels)
    bare = levels[0]
    for name, measure, unit in COSTS:
        cells = []
        for one in levels:
            found = one["costs"].get(measure)
            if found is None:
                # subprocess has nothing to tear down.
                none = not one["runs"] or (one["name"] == BARE and measure == "teardown_ns")
                cells.append(_none("-" if none else "unknown"))
                continue
            ratio = cost_ratio(one, bare, measure)
            shown = Text(figure(found["p50"], unit) + (f"  {times(ratio)}" if ratio is not None else ""))
            if len(levels) <= _ROOMY:
                source = f"\n{one['memory_source']}" if unit == "bytes" and one["memory_source"] else ""
                shown.append(f"\n{spread(found, unit)}{visible(source)}", style="dim")
            cells.append(shown)
        table.add_row(name, *cells)
    return table


def _measure_table(catalogue: dict[str, Any], levels: Sequence[dict[str, Any]]) -> Table:
    table = _table("Measures: the median, its ratio to bare with its 95 % interval", levels, "group", "measure")
    last = None
    for name, one in by_group(catalogue):
        if last is not None and one["group"] != last:
            table.add_section()
        cells = (_measured(level["measures"].get(name), one["unit"], len(levels) <= _ROOMY) for level in levels)
        table.add_row(_plain(one["group"] if one["group"] != last else "", "bold"), _plain(name), *cells)
        last = one["group"]
    return table


def _measured(found: dict[str, Any] | None, unit: str, roomy: bool) -> Text:
    if found is None or found["summary"] is None:
        return _none()
    shown = Text(figure(found["summary"]["p50"], unit))
    if found["ratio"] is not None:
        shown.append(f"\n{times(found['ratio'])}", style="bold")
        if roomy and found["low"] is not None and found["high"] is not None:
            shown.append(f" {interval(found)}", style="dim")
    return shown


def interval(found: dict[str, Any]) -> str:
    """ "1.20 to 1.31"."""
    return f"{times(found['low'])[1:]} to {times(found['high'])[1:]}"


# ---- what changed ----


def print_changes(changes: Changes, to: Console) -> None:
    """What changed since a saved comparison, the worst first, and what it means for the exit status."""
    to.print(_line(f"Since {changes.since}", "bold"))
    for note in changes.notes:
        to.print(_line(f"  note: {note}", "dim"))
    for one in changes.changes:
        style = {"worse": "bold red", "better": "green"}.get(one.kind, "")
        to.print(Text.assemble(("  ", ""), (f"{one.kind:7}", style), _line(f" {one.level}: {one.sentence}")))
    worse = len(changes.worse)
    to.print(
        Text(
            f"{worse} worse than it was" if worse else "Nothing is worse than it was", "bold red" if worse else "green"
        )
    )
