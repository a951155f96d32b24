"""What is measured of many starts and of many sandboxes, in small."""

from __future__ import annotations

import os

import pytest

from ringfence.comparison import sustained
from support.sandboxes import LOCAL_LEVELS, need_level, need_root


@pytest.fixture(autouse=True)
def levels_are_there() -> None:
    for isolation in LOCAL_LEVELS:
        need_level(isolation)


def test_rates_are_of_all_launches() -> None:
    found = sustained.rates(6, tools=("subprocess", "container"))
    assert list(found) == [
        "subprocess, 1 at a time",
        "container, 1 at a time",
        "subprocess, 2 at a time",
        "container, 2 at a time",
    ]
    for row in found.values():
        assert len(row["samples_ns"]) == 6
        assert len(row["per_second"]) == 1
        assert 0 < min(row["samples_ns"]) < 30e9
    # One after the other: the rate is that of the samples.
    alone = found["subprocess, 1 at a time"]
    assert alone["per_second"][0] <= 6e9 / sum(alone["samples_ns"]) * 1.01


def test_a_tool_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "bwrap isn't installed" in sustained.rates(2, tools=("bwrap",))["bwrap"]["skipped"]


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_idle_sandboxes_are_counted_and_gone(isolation: str) -> None:
    need_root()  # init's memory is root's to read
    found = sustained.idle(5, isolation)
    assert (found["count"], found["isolation"]) == (5, isolation)
    # The launcher, and for each an init and a command; another one may be in the making.
    assert found["processes"] >= 11
    assert 16 << 10 < found["init_pss_bytes"] < 2 << 20
    assert 16 << 10 < found["command_pss_bytes"] < 2 << 20
    assert 0 < found["start_s"] < 60
    assert 0 < found["end_s"] < 60
    assert 0 <= found["killed_s"] < 60


def test_endurance_tells_of_each_part() -> None:
    found = sustained.endurance(6, "process", steps=2)
    assert [len(part) for part in found["parts"]] == [3, 3]
    assert found["parts"][0]["p50_ns"] <= found["parts"][0]["p99_ns"]
    assert found["before"].keys() == found["parts"][1]["growth"].keys()
    assert found["parts"][1]["growth"]["descriptors"] == len(os.listdir("/proc/self/fd"))


def test_what_is_told_to_people() -> None:
    growth = {"rss": 100, "descriptors": 7}
    part = {"p50_ns": 2_000_000, "p99_ns": 3_000_000, "growth": growth}
    found = {
        "rates": {
            "container, 1 at a time": {"per_second": [300.0, 400.0, 500.0], "samples_ns": [1_000_000, 2_000_000]},
            "crun": {"skipped": "crun isn't installed"},
        },
        "idle": [
            {
                "count": 1000,
                "isolation": "container",
                "each_bytes": {"machine": 409_600, "kernel": 307_200},
                "init_pss_bytes": 40_960,
                "command_pss_bytes": 51_200,
                "caller_bytes_each": 2048,
                "start_s": 2.5,
                "end_s": 1.25,
                "killed_s": 0.5,
            }
        ],
        "endurance": [
            {"count": 10, "isolation": "process", "before": {"rss": 90, "descriptors": 7}, "parts": [part, part]}
        ],
    }
    assert sustained.lines(found) == [
        "container, 1 at a time: 400 launches a second (p50 1.00 ms, p99 2.00 ms, n 2)",
        "crun: crun isn't installed",
        "1000 idle sandboxes, container: 400 KiB each (the kernel's 300, init's 40, the command's 50, the caller's 2); "
        "started in 2.50 s, ended in 1.25 s, gone 0.50 s after a SIGKILL of the caller",
        "10 starts in a row, process: p50 2.00 ms at first, 2.00 ms in the end; p99 3.00 ms, 3.00 ms",
        "  more than before: rss +10, descriptors +0",
    ]
