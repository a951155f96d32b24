"""Probes for people: every verdict with its evidence, from the document alone."""

from __future__ import annotations

from ringfence.comparison.figures import visible
from ringfence.comparison.isolation import Isolation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from rich.console import Console

__all__ = ["counts", "print_probes"]

_WORDS = (Isolation.OWN, Isolation.RESTRICTED, Isolation.SHARED, Isolation.NOT_TESTABLE)
_STYLES = {"own": "bold green", "restricted": "yellow", "shared": "red", "not testable": "dim"}


def counts(probes: Mapping[str, Mapping[str, str]]) -> str:
    """ "63 probes: 41 own, 20 restricted, 1 shared, 1 not testable"."""
    verdicts = [one["verdict"] for one in probes.values()]
    return f"{len(verdicts)} probes: " + ", ".join(f"{verdicts.count(str(word))} {word}" for word in _WORDS)


def print_probes(document: Mapping[str, Any], to: Console) -> None:
    """Every probe, group by group: each verdict with its evidence."""
    from rich.table import Table
    from rich.text import Text

    columns = [one for one in document["levels"] if one["probes"]]
    groups: dict[str, list[str]] = {}
    for name, about in document["probes"].items():
        groups.setdefault(about["group"], []).append(name)
    for group, names in groups.items():
        heading = Text(visible(group), style="bold")
        table = Table(title=heading, title_justify="left", padding=(0, 1), show_lines=True)
        table.add_column("", ratio=2, overflow="fold")
        for one in columns:
            told = counts({name: one["probes"][name] for name in names if name in one["probes"]})
            column = Text(visible(f"{one['name']}\n{told.partition(': ')[2]}"))
            table.add_column(column, ratio=3, overflow="fold")
        for name in names:
            cells = []
            for one in columns:
                found = one["probes"].get(name)
                if found is None:  # a comparison may have looked at less of one
                    cells.append(Text("-", style="dim"))
                    continue
                cells.append(
                    Text.assemble(
                        (found["verdict"], _STYLES[found["verdict"]]), "\n", (visible(found["evidence"]), "dim")
                    )
                )
            tries = visible(document["probes"][name]["tries"])
            table.add_row(Text.assemble((visible(name), "bold"), "\n", (tries, "dim")), *cells)
        to.print(table)
