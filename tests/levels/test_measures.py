"""The cost suite at the levels: each measure once, quickly, and whether it sees a difference that is there."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import ringfence as rf
from ringfence.comparison import BARE, inside
from ringfence.comparison.measures import CATALOGUE, measure
from ringfence.comparison.places import Bare, Level
from ringfence.comparison.taken import QUICK, Taken
from support.sandboxes import LEVELS, LOCAL_LEVELS, need_cgroup, need_level

# What is of no level but needs other programs, or takes long: tested by themselves.
INSIDE = [name for name, one in CATALOGUE.items() if one.by in ("verb", "python")]
STARTS = ["start_warm", "first_output", "teardown", "launches_1", "launches_2"]
TRAFFIC = ["host_latency", "host_throughput"]
# A guest takes its time: what tells most about it.
OF_A_GUEST = ["cpu_integer", "system_call", "context_switch", "page_fault", "file_create", "loopback_latency"]


@functools.cache
def measured(isolation: str) -> dict[str, dict[str, dict[str, Any]]]:
    need_level(isolation)
    names = [*OF_A_GUEST, *TRAFFIC] if isolation == "vm" else [*STARTS, *INSIDE, *TRAFFIC, "memory_pss_1"]
    # In the order of the table, as `measure` has them.
    return measure([isolation], names=[name for name in CATALOGUE if name in names], effort=QUICK.replace(rounds=2))


@pytest.mark.parametrize("isolation", LEVELS)
def test_every_measure_has_figures_and_a_ratio(isolation: str) -> None:
    found = measured(isolation)
    assert list(found) == [BARE, isolation]
    without = {name: one["unavailable"] for name, one in found[isolation].items() if one["unavailable"]}
    assert not without
    for name, one in found[isolation].items():
        assert one["summary"]["n"] == len(one["samples"]) > 0
        assert all(sample > 0 for sample in one["samples"]), name
        assert one["source"].startswith("built in"), one["source"]
        if name != "teardown":  # a bare process has nothing to tear down
            assert one["ratio"] == one["summary"]["p50"] / found[BARE][name]["summary"]["p50"]
    assert found[BARE]["system_call"]["ratio"] is None


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_on_the_hosts_kernel_work_costs_about_what_it_costs_bare(isolation: str) -> None:
    for name in ("cpu_integer", "cpu_float", "system_call", "page_fault", "memory_bandwidth", "file_stat"):
        assert 0.2 < measured(isolation)[isolation][name]["ratio"] < 5, name


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_what_a_boundary_adds_is_seen(isolation: str) -> None:
    found = measured(isolation)[isolation]
    assert found["start_warm"]["ratio"] > 1
    assert found["launches_1"]["ratio"] < 1
    assert found["memory_pss_1"]["ratio"] > 1  # init, and the launcher
    # A command's first byte can't come before it was started, nor after all was over.
    assert found["first_output"]["summary"]["min"] < 10 * found["start_warm"]["summary"]["max"]


def test_a_guest_under_emulation_pays_for_the_kernel() -> None:
    found = measured("vm")["vm"]
    for name in ("system_call", "page_fault", "host_latency"):
        assert found[name]["ratio"] > 1.2, name
    assert found["cpu_integer"]["ratio"] > 0.5
    assert found["file_create"]["source"] == "built in, tmpfs"


def test_a_twentieth_of_a_cpu_shows_as_that_much_more_time() -> None:
    """The positive check that these figures can tell a difference."""
    need_level("container")
    need_cgroup("cpu")
    # Samples longer than a period of the quota, so that each has its share of waiting.
    effort = QUICK.replace(samples=2, sample_us=300_000)

    def integer(limits: rf.Limits | None) -> float:
        with Level("container", limits) as place:
            taken = inside.take([CATALOGUE["cpu_integer"]], [place], effort, lambda said: None)
        found: Taken = taken["container"]["cpu_integer"]
        assert not found.unavailable, found.unavailable
        return min(found.samples)  # the least disturbed: a busy machine slows the one without a limit most

    free, slowed = integer(None), integer(rf.Limits(cpus=0.05))
    assert 3 < slowed / free < 40, (free, slowed)


def test_a_place_where_it_can_not_run_is_told_and_the_others_go_on() -> None:
    need_level("process")
    names = ["loopback_latency", "cpu_integer"]
    wanted = [CATALOGUE[name] for name in names]
    with Bare() as bare, Level("process") as place:
        place.call = lambda argv, *, network=False: Level.call(place, argv)  # type: ignore[method-assign]
        found = inside.take(wanted, [bare, place], QUICK, lambda said: None)
    assert "EPERM socket" in found["process"]["loopback_latency"].unavailable
    assert not found["bare"]["loopback_latency"].unavailable
    assert found["process"]["cpu_integer"].samples
