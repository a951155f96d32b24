"""What is said of a row of samples. Small and exact, so that every figure can be checked by hand.

Starts on a shared machine have long tails, so nothing here is a mean: medians are compared, and a p90 or a p99 is only
told of enough samples to have one.
"""

from __future__ import annotations

import math
import random
import statistics

from ringfence._value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["Summary", "block_interval", "interval", "percentile", "ratio", "summarize"]

# Below these it is the largest sample or next to it, and says more of the machine than of what was measured.
_ENOUGH_FOR_P90 = 10
_ENOUGH_FOR_P99 = 100
_RESAMPLES = 400


class Summary(Value):
    """n samples, in their own unit. p90, p99: None where there are fewer than 10, or 100."""

    __slots__ = ("least", "most", "n", "p50", "p90", "p99")
    n: int
    p50: float
    p90: float | None
    p99: float | None
    least: float
    most: float

    def __init__(self, *, n: int, p50: float, p90: float | None, p99: float | None, least: float, most: float) -> None:
        self._set(n=n, p50=p50, p90=p90, p99=p99, least=least, most=most)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            "n": self.n,
            "p50": self.p50,
            "p90": self.p90,
            "p99": self.p99,
            "min": self.least,
            "max": self.most,
        }


def percentile(samples: Sequence[float], q: float) -> float:
    """The smallest sample that q percent of all are not above (nearest rank). ValueError where there is none."""
    if not samples or not 0 < q <= 100:
        raise ValueError(f"no percentile {q} of {len(samples)} samples")
    return sorted(samples)[math.ceil(q / 100 * len(samples)) - 1]


def summarize(samples: Sequence[float | None]) -> Summary | None:
    """Of the samples that are known; None where none is."""
    known = [one for one in samples if one is not None]
    if not known:
        return None
    return Summary(
        n=len(known),
        p50=statistics.median(known),
        p90=percentile(known, 90) if len(known) >= _ENOUGH_FOR_P90 else None,
        p99=percentile(known, 99) if len(known) >= _ENOUGH_FOR_P99 else None,
        least=min(known),
        most=max(known),
    )


def ratio(above: Summary | None, below: Summary | None) -> float | None:
    """Of the medians; None where one is unknown or the lower one is 0."""
    if above is None or below is None or not below.p50:
        return None
    return above.p50 / below.p50


def interval(above: Sequence[float], below: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The interval that the ratio of the medians lies in with that confidence, by the bootstrap's percentiles.

    The same samples always give the same interval. Efron and Tibshirani, An Introduction to the Bootstrap (1993), 13.
    """
    chance = random.Random(len(above) * 1_000_003 + len(below))
    found = sorted(
        statistics.median(chance.choices(above, k=len(above))) / statistics.median(chance.choices(below, k=len(below)))
        for _ in range(_RESAMPLES)
    )
    aside = int(_RESAMPLES * (1 - confidence) / 2)
    return found[aside], found[-1 - aside]


def block_interval(
    above: Sequence[Sequence[float]], below: Sequence[Sequence[float]], confidence: float = 0.95
) -> tuple[float, float]:
    """As `interval`, of samples that were taken in blocks, one of each side in each round.

    Samples of a block have their moment in common, so they aren't independent: `interval` would be too narrow. Here
    whole rounds are drawn, the same for both sides, as what disturbed a round disturbed both (the block bootstrap:
    Efron and Tibshirani, 8.6). Where one side has fewer rounds each is drawn by itself. ValueError where one has none.
    """
    if not above or not below:
        raise ValueError("no interval of no rounds")
    chance = random.Random(len(above) * 1_000_003 + len(below))
    found = []
    for _ in range(_RESAMPLES):
        over = [chance.randrange(len(above)) for _ in above]
        under = over if len(above) == len(below) else [chance.randrange(len(below)) for _ in below]
        found.append(
            statistics.median([one for at in over for one in above[at]])
            / statistics.median([one for at in under for one in below[at]])
        )
    found.sort()
    aside = int(_RESAMPLES * (1 - confidence) / 2)
    return found[aside], found[-1 - aside]
