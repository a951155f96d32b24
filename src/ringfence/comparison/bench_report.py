"""What `bench` measured, as tables for people."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from ringfence.comparison.bench import TARGETS
from ringfence.comparison.figures import digits, duration
from ringfence.comparison.profile import Profile
from ringfence.spec import ISOLATIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from rich.console import Console

    from ringfence.comparison.ablation import Ablation
    from ringfence.comparison.bench import Measurement
    from ringfence.comparison.statistics import Summary

__all__ = ["print_measurement", "print_parts"]


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
        what = "a start, and without a part" if level in ISOLATIONS else "a clone without it, and with it"
        table = Table(title=f"{level}: {what}", title_justify="left", title_style="bold")
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
        spell = digits if one.against else duration
        shown = "not measured" if figure is None else spell(figure)
        kept = figure is None or figure <= one.most
        verdict = Text("" if figure is None else "kept" if kept else "MISSED", style="green" if kept else "bold red")
        table.add_row(one.what, one.against or "-", spell(one.most), shown, verdict)
    return table
