"""Plots of a report, as SVG files that look the same wherever they are shown.

Drawn here: the same figures give the same bytes, whichever version of a plotting library there is.
"""

from __future__ import annotations

import html
import math
from typing import NamedTuple

__all__ = ["Bar", "bars", "matrix"]

_FONT = "font-family=\"'Segoe UI', Helvetica, Arial, sans-serif\""
_INK, _QUIET, _LINE, _PAPER = "#1f2328", "#59636e", "#d1d9e0", "#ffffff"


class Bar(NamedTuple):
    """A row of a plot: its name, its length, how that is spelled, its colour."""

    name: str
    value: float
    shown: str
    colour: str


def _text(
    x: float, y: float, text: str, *, size: int = 12, colour: str = _INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
        f"{html.escape(text)}</text>\n"
    )


def _picture(title: str, width: float, height: float, inner: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'role="img" {_FONT}>\n<title>{html.escape(title)}</title>\n'
        f'<rect width="100%" height="100%" rx="6" fill="{_PAPER}"/>\n'
        f"{_text(16, 26, title, size=14, bold=True)}{inner}</svg>\n"
    )


def bars(title: str, rows: list[Bar], *, logarithmic: bool) -> str:
    """A bar for each row, with its name on the left and its figure behind it."""
    names, room, line = 290.0, 330.0, 22.0
    values = [one.value for one in rows if one.value > 0] or [1.0]
    low, high = min(values) / 2, max(values)
    inner = ""
    for at, one in enumerate(rows):
        y = 44 + at * line
        if one.value <= 0:
            share = 0.0
        elif logarithmic:
            share = math.log(one.value / low) / math.log(high / low)
        else:
            share = one.value / high
        inner += _text(names - 8, y + 13, one.name if len(one.name) <= 46 else one.name[:45] + "…", anchor="end")
        length = max(1.0, share * room)
        inner += f'<rect x="{names:.1f}" y="{y:.1f}" width="{length:.1f}" height="16" rx="2" fill="{one.colour}"/>\n'
        inner += _text(names + share * room + 6, y + 13, one.shown, colour=_QUIET)
    if logarithmic:
        inner += _text(names, 44 + len(rows) * line + 14, "logarithmic", size=10, colour=_QUIET)
    return _picture(title, names + room + 90, 44 + len(rows) * line + (24 if logarithmic else 12), inner)


def matrix(title: str, columns: list[str], rows: dict[str, list[str]], colours: dict[str, str]) -> str:
    """A coloured cell for each row and column, with its word in it."""
    names, cell, line = 130.0, 112.0, 24.0
    inner = ""
    for at, column in enumerate(columns):
        inner += _text(names + at * cell + cell / 2, 52, column, anchor="middle", bold=True)
    for at, (name, words) in enumerate(rows.items()):
        y = 62 + at * line
        inner += _text(names - 10, y + 15, name, anchor="end")
        for place, word in enumerate(words):
            x = names + place * cell
            inner += (
                f'<rect x="{x + 1.5:.1f}" y="{y:.1f}" width="{cell - 3:.1f}" height="{line - 3:.1f}" rx="3" '
                f'fill="{colours.get(word, _LINE)}"/>\n'
            )
            inner += _text(x + cell / 2, y + 15, word, colour="#ffffff", anchor="middle")
    return _picture(title, names + len(columns) * cell + 16, 62 + len(rows) * line + 12, inner)
