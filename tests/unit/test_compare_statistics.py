"""Medians, tails, ratios and their intervals."""

from __future__ import annotations

import pytest

from ringfence.comparison.statistics import block_interval, interval, percentile, ratio, summarize


def test_percentiles_are_by_nearest_rank() -> None:
    samples = list(range(100, 0, -1))
    assert percentile(samples, 50) == 50
    assert percentile(samples, 99) == 99
    assert percentile(samples, 100) == 100
    assert percentile([7], 1) == percentile([7], 99) == 7


@pytest.mark.parametrize(("samples", "q"), [([], 50), ([1], 0), ([1], 101)])
def test_a_percentile_of_nothing_is_refused(samples: list[int], q: float) -> None:
    with pytest.raises(ValueError, match="no percentile"):
        percentile(samples, q)


def test_a_summary_has_a_p99_only_of_a_hundred() -> None:
    few = summarize(list(range(99)))
    enough = summarize(list(range(100)))
    assert few is not None
    assert few.p99 is None
    assert (few.n, few.least, few.most, few.p50) == (99, 0, 98, 49)
    assert enough is not None
    assert enough.p99 == 98


def test_a_summary_has_a_p90_only_of_ten() -> None:
    few, enough = summarize(list(range(9))), summarize(list(range(10)))
    assert few is not None
    assert enough is not None
    assert (few.p90, enough.p90) == (None, 8)
    assert enough.to_json() == {"n": 10, "p50": 4.5, "p90": 8, "p99": None, "min": 0, "max": 9}


def test_unknown_samples_are_left_out_and_none_is_none() -> None:
    found = summarize([None, 3, None, 5])
    assert found is not None
    assert (found.n, found.p50) == (2, 4)
    assert summarize([None]) is None
    assert summarize([]) is None


def test_ratio_of_medians() -> None:
    assert ratio(summarize([2, 4, 6]), summarize([2])) == 2
    assert ratio(summarize([2]), None) is None
    assert ratio(None, summarize([2])) is None
    assert ratio(summarize([2]), summarize([0])) is None


def test_the_interval_holds_the_ratio_and_narrows() -> None:
    above = [200 + i % 10 for i in range(60)]
    below = [100 + i % 10 for i in range(60)]
    low, high = interval(above, below)
    assert 1.8 < low <= 204.5 / 104.5 <= high < 2.1
    assert interval(above, below) == (low, high)
    wide = interval([100, 300], [100, 100])
    assert wide[1] - wide[0] > high - low


def test_an_outlier_does_not_move_the_interval_much() -> None:
    low, high = interval([100] * 40 + [100_000], [100] * 41)
    assert low == high == 1


def test_the_interval_of_rounds_is_as_wide_as_the_rounds_differ() -> None:
    """Each round is twice as slow on one side, while the machine's own speed changes from round to round."""
    speeds = (100, 140, 90, 200, 120, 160)
    below = [[speed + i for i in range(10)] for speed in speeds]
    above = [[2 * one for one in block] for block in below]
    assert block_interval(above, below) == (2, 2)  # what a round has for both sides is no doubt about their ratio
    # Where the sides go up and down by themselves there is: more than samples that were independent would leave.
    shuffled = [above[at] for at in (3, 0, 5, 1, 4, 2)]
    low, high = block_interval(shuffled, below)
    narrow = interval([one for block in shuffled for one in block], [one for block in below for one in block])
    assert low < 2 < high
    assert high - low > narrow[1] - narrow[0]
    assert block_interval(shuffled, below) == (low, high)
    with pytest.raises(ValueError, match="no rounds"):
        block_interval([], below)
