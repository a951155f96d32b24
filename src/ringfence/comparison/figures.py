"""Figures as people read them: three digits and a unit."""

from __future__ import annotations

from ringfence.errors import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

__all__ = ["digits", "duration", "figure", "size", "spread", "times", "visible"]


def digits(value: float) -> str:
    """Three of them, or all before the point: "1.50", "81.2", "312"."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def duration(ns: float) -> str:
    """Three digits and a unit: "1.50 s", "81.2 ms", "312 us"; below a microsecond nanoseconds."""
    for unit, ns_in_it in (("s", 10**9), ("ms", 10**6)):
        if ns >= ns_in_it:
            return f"{digits(ns / ns_in_it)} {unit}"
    return f"{ns / 1000:.0f} us" if ns >= 10_000 else f"{digits(ns / 1000)} us" if ns >= 1000 else f"{ns:.0f} ns"


def size(count: float) -> str:
    """ "1.50 GiB", "81.2 MiB", "312 KiB"."""
    for unit, bytes_in_it in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= bytes_in_it:
            return f"{digits(count / bytes_in_it)} {unit}"
    return f"{count / 1024:.0f} KiB"


def _rate(per_second: float) -> str:
    for unit, in_it in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if per_second >= in_it:
            return f"{digits(per_second / in_it)} {unit}/s"
    return f"{digits(per_second)} /s"


_SPELLED: dict[str, Callable[[float], str]] = {
    "ns": duration,
    "bytes": size,
    "per_second": _rate,
    "bytes_per_second": lambda rate: f"{size(rate)}/s",
}


def figure(value: float, unit: str) -> str:
    """A figure in one of the document's units; one of another unit is shown with it as it is."""
    spell = _SPELLED.get(unit)
    return spell(value) if spell else f"{digits(value)} {visible(unit)}"


def times(ratio: float) -> str:
    """A ratio: "x1.52"; a small one keeps its digits."""
    return f"x{digits(ratio)}" if ratio >= 0.1 else f"x{ratio:.2g}"


def spread(found: Mapping[str, Any], unit: str) -> str:
    """The tail of a row of samples, as far as there are enough of them to have one. found: a summary's document."""
    if found["n"] == 1:
        return "one run"
    if found["p99"] is not None:
        return f"p99 {figure(found['p99'], unit)}, n {found['n']}"
    return f"most {figure(found['max'], unit)}, n {found['n']}"


def visible(text: str) -> str:
    """`printable`, but for line ends, which stay."""
    return "\n".join(map(printable, text.split("\n")))
