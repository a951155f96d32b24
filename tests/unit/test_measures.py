"""The cost suite: its table, what is parsed of those that measure, what is made of samples."""

from __future__ import annotations

import pytest

from ringfence.comparison.measures import CATALOGUE, GROUPS, Measure

# ---- the table ----


def test_every_measure_says_what_it_is() -> None:
    assert len(CATALOGUE) >= 35
    assert {one.group for one in CATALOGUE.values()} == set(GROUPS)
    for name, one in CATALOGUE.items():
        found = one.to_json()
        assert (found["group"], found["unit"]) == (one.group, one.unit)
        assert found["what"].endswith("."), name
        assert found["better"] == ("higher" if "per_second" in one.unit else "lower")


@pytest.mark.parametrize(("group", "unit"), [("speed", "ns"), ("cpu", "ms")])
def test_a_measure_has_a_known_group_and_unit(group: str, unit: str) -> None:
    with pytest.raises(ValueError, match="no group"):
        Measure("new", group, "Something.", unit, "verb")
