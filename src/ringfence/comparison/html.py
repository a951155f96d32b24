"""A comparison's document as one page: no script, no other file, nothing from the network, readable on a phone.

Everything in it that came from a workload, a file or a command line is text: the template escapes it, and the page's
own policy (Content-Security-Policy) forbids scripts, should that ever fail.
"""

from __future__ import annotations

import os

from ringfence.comparison.changes import samples
from ringfence.comparison.cost import differing
from ringfence.comparison.document import BARE
from ringfence.comparison.figures import figure, spread, times, visible
from ringfence.comparison.report import (
    COSTS,
    by_group,
    command_line,
    cost_ratio,
    interval,
    notes,
    remarks,
    title,
    with_any,
)
from ringfence.comparison.statistics import interval as bootstrap
from ringfence.errors import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from ringfence.comparison.changes import Changes

__all__ = ["need_packages", "page"]

_WORDS = ("own", "restricted", "shared", "unknown", "not testable")
_FEWEST = 3
_FACTS = (
    ("kernel", "kernel"),
    ("CPU", "cpu_model"),
    ("CPUs", "cpus"),
    ("a guest itself", "nested"),
    ("machine", "machine"),
    ("memory", "memory_bytes"),
    ("cgroups", "cgroups"),
    ("Landlock ABI", "landlock_abi"),
    ("run as root", "privileged"),
    ("load", "load"),
    ("Python", "python"),
)


def need_packages() -> None:
    """Raises SpecError, with the command that helps, where a package that a page takes isn't installed."""
    import importlib.util

    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise SpecError(f"--html needs {' and '.join(missing)}; run: pip install 'ringfence[report]'")


def page(document: dict[str, Any], changes: Changes | None = None) -> bytes:
    """The page, UTF-8. Raises SpecError where a package that it takes isn't installed."""
    need_packages()
    import jinja2

    folder = os.path.join(os.path.dirname(__file__), "page")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    text = environment.get_template("page.html.j2").render(**_content(document, changes))
    return text.encode("utf-8", "backslashreplace")


def _finalize(value: Any) -> Any:
    # What the template itself or a plot is made of is Markup, and has line ends.
    return value if hasattr(value, "__html__") or not isinstance(value, str) else visible(value)


def _content(document: dict[str, Any], changes: Changes | None) -> dict[str, Any]:
    """All that the template shows, as plain values."""
    levels = [one for one in document["levels"] if not one["unavailable"]]
    with_starts = [one for one in levels if samples(one, "startup_ns")]
    columns = _columns(levels, levels)
    looked_at, tried, measured = (with_any(levels, name) for name in ("isolation", "probes", "measures"))
    return {
        "command": command_line(document),
        "release": document["ringfence"],
        "schema": document["schema"],
        "date": document["machine"].get("date", ""),
        "facts": [(name, _fact(document["machine"].get(key), key)) for name, key in _FACTS],
        "columns": columns,
        "words": _WORDS,
        "cards": [_card(one, levels[0], at) for at, one in enumerate(levels)],
        "notes": [sentence for one in document["levels"] for sentence in notes(one)],
        "remarks": [sentence for one in document["levels"] for sentence in remarks(one)],
        "changes": changes,
        "looked_at": _columns(looked_at, levels),
        "resources": _resources(looked_at, levels),
        "tried": _columns(tried, levels),
        "groups": _probe_groups(document, tried, levels),
        "surface": _surface(levels),
        "costs": _costs(levels),
        "starts": _times(levels, "startup_ns"),
        "totals": _times(levels, "total_ns") if len(levels) > len(with_starts) else "",
        "cost_plot": _cost_plot(levels),
        "measured": _columns(measured, levels),
        "measures": _measures(document, measured, levels),
    }


def _columns(shown: Sequence[dict[str, Any]], levels: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What heads each column: its title, and the number that is its colour everywhere."""
    return [{"title": title(one), "at": levels.index(one)} for one in shown]


def _fact(value: Any, key: str) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return figure(value, "bytes") if key == "memory_bytes" else str(value)


# ---- what is isolated ----


def _count(words: Iterable[str]) -> list[tuple[str, int]]:
    """How often each word, those that there are."""
    given = list(words)
    return [(word, given.count(word)) for word in _WORDS if word in given]


def _card(level: dict[str, Any], bare: dict[str, Any], at: int) -> dict[str, Any]:
    # Other tools don't tell when the command began.
    what, measure = ("start", "startup_ns") if level["costs"].get("startup_ns") else ("whole call", "total_ns")
    time, memory = level["costs"].get(measure), level["costs"].get("memory_peak_bytes")
    ratio = cost_ratio(level, bare, measure)
    other = [name for name, is_so in differing(level["differences"]).items() if is_so]
    return {
        "title": title(level),
        "at": at,
        "counts": _count(one["verdict"] for one in (*level["isolation"].values(), *level["probes"].values())),
        "what": what,
        "time": "unknown" if time is None else figure(time["p50"], "ns"),
        "ratio": "" if ratio is None else times(ratio),
        "memory": "" if memory is None else figure(memory["p50"], "bytes"),
        "output": "the measure" if level["name"] == BARE else f"{', '.join(other)} differ" if other else "identical",
        "differs": bool(other),
    }


def _cells(
    shown: Sequence[dict[str, Any]], levels: Sequence[dict[str, Any]], section: str, name: str
) -> list[dict[str, Any]]:
    """A verdict for each level; the word "" where there is none."""
    found = []
    for one in shown:
        verdict = one[section].get(name)
        found.append(
            {
                "title": title(one),
                "at": levels.index(one),
                "word": verdict["verdict"] if verdict else "",
                "evidence": verdict["evidence"] if verdict else "",
                "control": (verdict or {}).get("control", ""),
            }
        )
    return found


def _resources(shown: Sequence[dict[str, Any]], levels: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for one in shown for name in one["isolation"])
    return [
        {"name": name, "tries": "", "why": "", "control": "", "cells": _cells(shown, levels, "isolation", name)}
        for name in names
    ]


def _probe_groups(
    document: dict[str, Any], shown: Sequence[dict[str, Any]], levels: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, one in by_group(document["probes"]):
        if not any(name in level["probes"] for level in shown):
            continue
        cells = _cells(shown, levels, "probes", name)
        controls = dict.fromkeys(cell["control"] for cell in cells if cell["control"])
        # One control serves all levels, mostly; then it stands above them once.
        control = next(iter(controls)) if len(controls) == 1 else ""
        row = {"name": name, "tries": one["tries"], "why": one["why"], "control": control, "cells": cells}
        groups.setdefault(one["group"], []).append(row)
    found = []
    for group, rows in groups.items():
        counts = [_count(row["cells"][at]["word"] for row in rows) for at in range(len(shown))]
        found.append({"name": group, "rows": rows, "counts": counts})
    return found


def _surface(levels: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """How many system calls are reached, and all of them by how each level answers."""
    tried = [one for one in levels if one["surface"] is not None]
    if not tried:
        return None
    names = dict.fromkeys(name for one in tried for name in one["surface"]["calls"])
    patterns: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        answers = tuple(one["surface"]["calls"].get(name, "not tried") for one in tried)
        patterns.setdefault(answers, []).append(name)
    return {
        "levels": [
            {
                "title": title(one),
                "at": levels.index(one),
                # Of a guest it is the VMM that reaches the host's kernel.
                "by": one["surface"].get("by") or "",
                "guest": one["surface"].get("guest"),
                "counts": [(kind, one["surface"][kind]) for kind in _KINDS if one["surface"].get(kind)],
            }
            for one in tried
        ],
        "titles": [title(one) for one in tried],
        "patterns": sorted(
            (
                {"answers": list(answers), "calls": sorted(calls), "same": len(set(answers)) == 1}
                for answers, calls in patterns.items()
            ),
            key=lambda one: (one["same"], -len(one["calls"])),
        ),
    }


_KINDS = ("reachable", "denied", "absent", "unknown")


# ---- what it costs ----


def _costs(levels: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for name, measure, unit in COSTS:
        cells = []
        for one in levels:
            summary, ratio = one["costs"].get(measure), cost_ratio(one, levels[0], measure)
            cells.append(
                {
                    "figure": "" if summary is None else figure(summary["p50"], unit),
                    "ratio": "" if ratio is None else times(ratio),
                    "tail": "" if summary is None else spread(summary, unit),
                    "source": one["memory_source"] if unit == "bytes" and summary is not None else "",
                }
            )
        found.append({"name": name, "what": "", "cells": cells})
    return found


def _times(levels: Sequence[dict[str, Any]], measure: str) -> str:
    """Every run of each level that has a start, or a whole call."""
    from ringfence.comparison.plots import draw_times

    rows = [(title(one), at, samples(one, measure)) for at, one in enumerate(levels)]
    rows = [row for row in rows if row[2] and min(row[2]) > 0]
    return draw_times(measure, rows) if rows else ""


def _cost_plot(levels: Sequence[dict[str, Any]]) -> str:
    from ringfence.comparison.plots import Mark, Row, draw_ratios

    rows = []
    for name, measure, _ in COSTS:
        marks = []
        base = samples(levels[0], measure)
        for at, one in enumerate(levels):
            ratio, ours = cost_ratio(one, levels[0], measure), samples(one, measure)
            if ratio is not None and ratio > 0:
                enough = min(len(base), len(ours)) >= _FEWEST and min(base) > 0 and min(ours) > 0
                low, high = bootstrap(ours, base) if enough else (None, None)
                marks.append(Mark(level=at, ratio=ratio, low=low, high=high))
        if marks:
            rows.append(Row(name=name, marks=marks))
    return draw_ratios("costs", rows) if rows else ""


def _measures(
    document: dict[str, Any], shown: Sequence[dict[str, Any]], levels: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    from ringfence.comparison.plots import Mark, Row, draw_ratios

    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, one in by_group(document["measures"]):
        if any(name in level["measures"] for level in shown):
            groups.setdefault(one["group"], []).append((name, one))
    found = []
    for group, members in groups.items():
        rows, table = [], []
        for name, one in members:
            marks = []
            for level in shown:
                result = level["measures"].get(name)
                if result is not None and result["ratio"] is not None and result["ratio"] > 0:
                    low, high = (None if not end or end < 0 else end for end in (result["low"], result["high"]))
                    marks.append(Mark(level=levels.index(level), ratio=result["ratio"], low=low, high=high))
            if marks:
                more = " (more is better)" if one["better"] == "higher" else ""
                rows.append(Row(name=name + more, marks=marks))
            cells = [_measure_cell(level["measures"].get(name), one["unit"]) for level in shown]
            table.append({"name": name, "what": one["what"], "better": one["better"], "cells": cells})
        plot = draw_ratios(f"measures {group}", rows) if rows else ""
        found.append({"name": group, "plot": plot, "rows": table})
    return found


def _measure_cell(found: dict[str, Any] | None, unit: str) -> dict[str, str]:
    if found is None or found["summary"] is None:
        why = (found or {}).get("unavailable") or ""
        return {"figure": "", "ratio": "", "tail": why, "source": ""}
    ratio = "" if found["ratio"] is None else times(found["ratio"])
    if ratio and found["low"] is not None and found["high"] is not None:
        ratio += f" ({interval(found)})"
    return {
        "figure": figure(found["summary"]["p50"], unit),
        "ratio": ratio,
        "tail": spread(found["summary"], unit),
        "source": found["source"] or "",
    }
