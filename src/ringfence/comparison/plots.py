"""The plots of the page, as SVG that takes its colours and its font from the page around it.

Drawn with colours that stand for a name and are replaced by the page's variables, so one drawing serves light and dark.
Text stays text. Nothing in them names another place: no metadata, no declaration of a document type.
"""

from __future__ import annotations

import io
import re
import statistics

from ringfence._value import Value
from ringfence.comparison.figures import duration, visible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from matplotlib.axes import Axes

__all__ = ["Mark", "Row", "draw_ratios", "draw_times"]

# As wide as a phone shows it at about its own size.
_WIDTH_INCHES = 3.7
_ROW_INCHES = 0.33
_FONT_POINTS = 9
_LABEL_LETTERS = 15
# A colour here is only a name: each is replaced by a variable of the page.
_INK, _QUIET, _LINE = "#010101", "#020202", "#030303"
_NAMED = {_INK: "--fg", _QUIET: "--muted", _LINE: "--line"}
_LEVELS = 10
_NAMED.update({f"#0101{16 + at:02x}": f"--level-{at}" for at in range(_LEVELS)})
_SETTINGS: dict[Any, Any] = {
    "font.size": _FONT_POINTS,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _QUIET,
    "axes.linewidth": 0.8,
    "xtick.color": _QUIET,
    "ytick.color": _INK,
    "text.color": _INK,
}


class Mark(Value):
    """A ratio of a level. level: its number, which is its colour. low, high: its interval, or None."""

    __slots__ = ("high", "level", "low", "ratio")
    level: int
    ratio: float
    low: float | None
    high: float | None

    def __init__(self, *, level: int, ratio: float, low: float | None, high: float | None) -> None:
        self._set(level=level, ratio=ratio, low=low, high=high)


class Row(Value):
    """What the ratios of a row are of."""

    __slots__ = ("marks", "name")
    name: str
    marks: tuple[Mark, ...]

    def __init__(self, *, name: str, marks: Sequence[Mark]) -> None:
        self._set(name=name, marks=tuple(marks))


def draw_times(name: str, rows: Sequence[tuple[str, int, Sequence[float]]]) -> str:
    """Every sample, a row for each level: (its title, its number, nanoseconds)."""

    def draw(axes: Axes) -> None:
        for at, (_, level, samples) in enumerate(rows):
            colour = _colour(level)
            # Of equal ones none hides another: a low-discrepancy sequence, so that the same samples look the same.
            spread = [at + 0.26 * (((number * 0.618034) % 1) - 0.5) * 2 for number in range(len(samples))]
            axes.plot(samples, spread, "o", color=colour, markersize=4, alpha=0.45, markeredgewidth=0)
            median = statistics.median(samples)
            axes.plot([median, median], [at - 0.36, at + 0.36], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.annotate(
                duration(median), (max(samples), at), (7, 0), textcoords="offset points", va="center", color=_INK
            )
        _finish(axes, [title for title, _, _ in rows], range(len(rows)), duration, 1.9)

    return _svg(name, len(rows) * _ROW_INCHES, draw)


def draw_ratios(name: str, rows: Sequence[Row]) -> str:
    """Ratios to the bare run, a row for each of what was measured, in it a mark with its interval for each level."""
    # A row is as high as its marks, or its name, need; in units of a row with little in it.
    heights = [max(1.0, 0.45 + 0.33 * len(row.marks), 0.55 * _broken(row.name).count("\n") + 0.75) for row in rows]
    tops = [sum(heights[:at]) - 0.5 for at in range(len(rows))]
    middles = [top + height / 2 for top, height in zip(tops, heights, strict=True)]

    def draw(axes: Axes) -> None:
        axes.axvline(1, color=_QUIET, linewidth=1, dashes=(3, 2), zorder=0)
        for at, row in enumerate(rows):
            if at % 2:
                axes.axhspan(tops[at], tops[at] + heights[at], color=_LINE, alpha=0.25, linewidth=0, zorder=-1)
            middle = (len(row.marks) - 1) / 2
            for number, mark in enumerate(row.marks):
                height, colour = middles[at] + (number - middle) * 0.33, _colour(mark.level)
                if mark.low is not None and mark.high is not None:
                    axes.plot([mark.low, mark.high], [height] * 2, color=colour, linewidth=2, solid_capstyle="round")
                axes.plot([mark.ratio], [height], "o", color=colour, markersize=5.5, markeredgewidth=0)
        _finish(axes, [row.name for row in rows], middles, lambda ratio: f"x{_plain(ratio)}", 1.25)
        axes.set_ylim(sum(heights) - 0.45, -0.55)

    return _svg(name, sum(heights) * _ROW_INCHES, draw)


def _colour(level: int) -> str:
    return f"#0101{16 + level % _LEVELS:02x}"


def _plain(value: float) -> str:
    return f"{value:g}" if value < 1000 else f"{value / 1000:g}k" if value < 1e6 else f"{value:.0e}"


def _finish(
    axes: Axes, names: Sequence[str], places: Sequence[float], spell: Callable[[float], str], room: float
) -> None:
    """A logarithmic axis with few round labels, a row for each name with the first on top, and no frame."""
    axes.set_xscale("log")
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_yticks(places, [_broken(name) for name in names])
    low, high = axes.dataLim.intervalx
    low, high = low / 1.25, high * room
    axes.set_xlim(low, high)
    ticks = _ticks(low, high)
    axes.set_xticks(ticks, [spell(one).replace(".00", "").replace(".0 ", " ") for one in ticks])
    axes.xaxis.set_minor_locator(_nothing())
    axes.grid(axis="x", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _nothing() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _ticks(low: float, high: float) -> list[float]:
    """At most five or so round numbers of a logarithmic axis."""
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [one for one in _round(low, high, steps) if low <= one <= high]
        if len(found) <= 5:
            break
    return found[:: 1 + (len(found) - 1) // 5]


def _round(low: float, high: float, steps: Sequence[float]) -> Iterator[float]:
    for power in range(-9, 15):
        yield from (step * 10.0**power for step in steps)


def _broken(name: str) -> str:
    """In lines that leave room for the plot."""
    lines = [""]
    for word in visible(name).split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > _LABEL_LETTERS:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(line if len(line) <= _LABEL_LETTERS + 5 else line[: _LABEL_LETTERS + 4] + "…" for line in lines)


def _svg(name: str, height_inches: float, draw: Callable[[Axes], None]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": visible(name)}):
        drawing = Figure(figsize=(_WIDTH_INCHES, height_inches + 0.42), layout="constrained")
        FigureCanvasSVG(drawing)
        drawing.patch.set_alpha(0)
        axes = drawing.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        out = io.StringIO()
        drawing.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_a_page(out.getvalue())


def _for_a_page(text: str) -> str:
    """Just the svg element, as HTML has it: no names of other places, the page's colours and its font."""
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # What stands between the tags are labels, with their < and > as references: those are left as they are.
    parts = re.split(r"(<[^>]*>)", text)
    used = {name for tag in parts[1::2] for name in re.findall(r"(?:#|url\(#)([\w-]+)", tag)}
    parts[1::2] = [_tag_for_a_page(tag, used) for tag in parts[1::2]]
    parts[::2] = [part if part.strip() else re.sub(r"\n\s*", "\n", part) for part in parts[::2]]
    return "".join(parts).strip()


def _tag_for_a_page(tag: str, used: set[str]) -> str:
    tag = re.sub(r' xmlns(:\w+)?="[^"]*"', "", tag)
    tag = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", tag)
    tag = re.sub(r'<svg ([^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', r"<svg \1", tag)
    tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag)
    for colour, variable in _NAMED.items():
        tag = tag.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", tag)
