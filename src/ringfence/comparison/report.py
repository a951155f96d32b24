"""A comparison as tables for people. The only module here that imports rich."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ringfence.comparison import BARE
from ringfence.comparison.bench import TARGETS
from ringfence.comparison.isolation import Isolation
from ringfence.comparison.probes_table import print_counts
from ringfence.comparison.profile import Profile
from ringfence.comparison.statistics import ratio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, TextIO

    from ringfence.comparison import Comparison, LevelReport
    from ringfence.comparison.ablation import Ablation
    from ringfence.comparison.bench import Measurement
    from ringfence.comparison.statistics import Summary

__all__ = ["console", "duration", "print_comparison", "print_measurement", "print_parts", "size", "spread"]

_STYLES = {
    Isolation.OWN: "bold green",
    Isolation.RESTRICTED: "yellow",
    Isolation.SHARED: "red",
    Isolation.UNKNOWN: "dim",
    Isolation.NOT_TESTABLE: "dim",
}
# A file or a pipe has no width of its own; wide enough that no figure is broken.
_WIDTH_WITHOUT_TERMINAL = 130
_ROWS = (
    ("start", "startup_ns"),
    ("command", "wall_ns"),
    ("teardown", "teardown_ns"),
    ("total", "total_ns"),
    ("CPU time", "cpu_ns"),
    ("peak memory", "memory_peak_bytes"),
)


def console(file: TextIO | None = None) -> Console:
    """For a terminal as wide as it is, for anything else wide enough; without colours there."""
    target = file if file is not None else sys.stdout
    width = None if target.isatty() else _WIDTH_WITHOUT_TERMINAL
    return Console(file=target, width=width, highlight=False)


def duration(ns: float) -> str:
    """Three digits and a unit: "1.50 s", "81.2 ms", "312 us"."""
    for unit, ns_in_it in (("s", 10**9), ("ms", 10**6)):
        if ns >= ns_in_it:
            return f"{_digits(ns / ns_in_it)} {unit}"
    return f"{ns / 1000:.0f} us"


def size(count: float) -> str:
    """ "1.50 GiB", "81.2 MiB", "312 KiB"."""
    for unit, bytes_in_it in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= bytes_in_it:
            return f"{_digits(count / bytes_in_it)} {unit}"
    return f"{count / 1024:.0f} KiB"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def spread(found: Summary, shown: str) -> str:
    """The tail of a row of samples, as far as there are enough of them to have one. shown: "time" or "size"."""
    spell = duration if shown == "time" else size
    if found.n == 1:
        return "one run"
    if found.p99 is not None:
        return f"p99 {spell(found.p99)}, n {found.n}"
    return f"most {spell(found.most)}, n {found.n}"


def print_comparison(comparison: Comparison, to: Console) -> None:
    """Whether the output was the same, what was isolated, and what it cost."""
    command = " ".join(word.decode("utf-8", "backslashreplace") for word in comparison.argv)
    to.print(Text(f"The same command, {len(comparison.levels)} ways: {command}", style="bold"))
    to.print(_output_table(comparison))
    to.print(_isolation_table(comparison))
    print_counts(comparison.to_json(), to)
    to.print(_cost_table(comparison))
    for one in comparison.levels:
        for note in _notes(one):
            to.print(Text(note))


def _title(one: LevelReport) -> str:
    return f"{one.name} ({one.accelerator})" if one.accelerator else one.name


def _table(title: str, comparison: Comparison) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", expand=False, padding=(0, 1))
    table.add_column("")
    for one in comparison.levels:
        table.add_column(_title(one), ratio=1, overflow="fold")
    return table


def _output_table(comparison: Comparison) -> Table:
    table = _table("Output", comparison)
    for name in ("ending", "stdout", "stderr", "files"):
        cells: list[Text] = []
        for one in comparison.levels:
            if one.unavailable:
                cells.append(Text("-", style="dim"))
                continue
            first, base = one.runs[0], comparison[BARE].runs[0]
            value = getattr(first, name)
            if name == "files":
                shown = f"{len(value)} collected"
            else:
                shown = value if name == "ending" else f"{len(value)} bytes"
            same = value == getattr(base, name)
            if one.name == BARE:
                cells.append(Text(shown))
            else:
                cells.append(Text(f"{shown}, {'identical' if same else 'DIFFERENT'}", style="" if same else "bold red"))
        table.add_row(name, *cells)
    return table


def _isolation_table(comparison: Comparison) -> Table:
    table = _table("Isolation", comparison)
    table.show_lines = True
    for resource in comparison[BARE].isolation:
        cells = []
        for one in comparison.levels:
            verdict = one.isolation.get(resource)
            if verdict is None:
                cells.append(Text("-", style="dim"))
            else:
                cells.append(
                    Text.assemble((str(verdict.isolation), _STYLES[verdict.isolation]), "\n", (verdict.evidence, "dim"))
                )
        table.add_row(resource, *cells)
    return table


def _cost_table(comparison: Comparison) -> Table:
    table = _table("Cost: the median, its ratio to bare, the tail", comparison)
    base = comparison[BARE].costs
    for title, measure in _ROWS:
        cells = []
        for one in comparison.levels:
            found = one.costs[measure]
            kind = "size" if measure == "memory_peak_bytes" else "time"
            if found is None:
                # subprocess has nothing to tear down.
                none = one.unavailable or (one.name == BARE and measure == "teardown_ns")
                cells.append(Text("-" if none else "unknown", style="dim"))
                continue
            shown = size(found.p50) if kind == "size" else duration(found.p50)
            # What the guest's own cgroup counts lacks the VMM: figures of two instruments have no ratio.
            alike = kind == "time" or one.memory_source == comparison[BARE].memory_source
            times = ratio(found, base[measure]) if one.name != BARE and alike else None
            source = f"\n{one.memory_source}" if kind == "size" and one.memory_source else ""
            cells.append(
                Text.assemble(
                    shown,
                    f"  x{_digits(times)}" if times is not None else "",
                    (f"\n{spread(found, kind)}{source}", "dim"),
                )
            )
        table.add_row(title, *cells)
    return table


def _notes(one: LevelReport) -> list[str]:
    if one.unavailable:
        return [f"{one.name}: did not run: {one.unavailable}" + (f" ({one.help})" if one.help else "")]
    notes = [f"{one.name}: {sentence}" for sentence in one.differences]
    if one.varies:
        notes.append(f"{one.name}: its own output varies from run to run")
    return notes


def print_measurement(measured: Measurement, to: Console) -> None:
    """What each start takes, and how that stands against what is promised."""
    summaries = measured.summaries()
    table = Table(title="Starts, interleaved", title_justify="left", title_style="bold")
    table.add_column("what")
    for name in ("p50", "p99", "most", "n"):
        table.add_column(name, justify="right")
    for name, found in summaries.items():
        if found is not None:
            p99 = "-" if found.p99 is None else duration(found.p99)
            table.add_row(name, duration(found.p50), p99, duration(found.most), str(found.n))
    to.print(table)
    to.print(_target_table(summaries))
    for name, reason in measured.skipped.items():
        to.print(Text(f"not measured: {name}: {reason}"))
    to.print(_machine_line(measured.machine))


def _machine_line(machine: Mapping[str, Any]) -> Text:
    return Text(
        f"{machine['cpus']} CPUs ({machine['cpu_model']}), Linux {machine['kernel']}, cgroups {machine['cgroups']},"
        f" {'a guest itself' if machine['nested'] else 'not known to be a guest'}, load {machine['load']},"
        f" Python {machine['python']}, {machine['date']}",
        style="dim",
    )


def print_parts(measured: Ablation | Profile, to: Console) -> None:
    """What a start is made of: what each part costs, or what happens when."""
    if isinstance(measured, Profile):
        print_profile(measured, to)
    else:
        print_ablation(measured, to)


def print_profile(measured: Profile, to: Console) -> None:
    """What each process does in each 50 microseconds of a run."""
    title = f"rf.run, {measured.isolation}: the median run of those traced, {measured.run.total_us} us"
    table = Table(title=title, title_justify="left", title_style="bold")
    names = ("Python", "init", "command", "launcher", "next")
    for name in ("from us", *names):
        table.add_column(name, justify="right" if name == "from us" else "left", overflow="fold")
    for start, what in measured.bins():
        table.add_row(str(start), *(what.get(name, "") for name in names))
    to.print(table)
    phases = ", ".join(f"{name} {us:.0f}" for name, us in measured.phases_us.items())
    to.print(f"us, untraced: {phases}: until init hands the command over, until its end is known, until all is gone")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in measured.shares.items())
    to.print(f"who ran: {shares} (Python alone, the sandbox's processes alone, both at once, none of ours)")
    to.print(f"median of a run: {measured.untraced_us:.0f} us; while it is traced {measured.traced_us:.0f}")
    to.print(_machine_line(measured.machine))


def print_ablation(measured: Ablation, to: Console) -> None:
    """What each part of a boundary costs."""
    for level, parts in measured.parts.items():
        table = Table(title=f"{level}: a start, and without a part", title_justify="left", title_style="bold")
        table.add_column("what")
        for name in ("p50", "p99", "the part costs", "95 % of it"):
            table.add_column(name, justify="right")
        for one in parts:
            p99 = "-" if one.p99 is None else duration(one.p99)
            costs = ("", "") if one.name == parts[0].name else (_signed(one.cost_ns), _span(one.low_ns, one.high_ns))
            table.add_row(one.name, duration(one.p50), p99, *costs)
        to.print(table)
    for level, reason in measured.skipped.items():
        to.print(Text(f"not measured: {level}: {reason}"))
    to.print(_machine_line(measured.machine))


def _signed(nanoseconds: float) -> str:
    return f"{nanoseconds / 1000:+.0f} us"


def _span(low: float, high: float) -> str:
    return f"{low / 1000:+.0f} to {high / 1000:+.0f}"


def _target_table(summaries: Mapping[str, Summary | None]) -> Table:
    table = Table(title="Promises: a ratio of medians, or a median", title_justify="left", title_style="bold")
    for name in ("what", "against", "at most", "found", ""):
        table.add_column(name)
    for one in TARGETS:
        figure = one.found(summaries)
        spell = _digits if one.against else duration
        shown = "not measured" if figure is None else spell(figure)
        kept = figure is None or figure <= one.most
        verdict = Text("" if figure is None else "kept" if kept else "MISSED", style="green" if kept else "bold red")
        table.add_row(one.what, one.against or "-", spell(one.most), shown, verdict)
    return table
