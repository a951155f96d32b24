"""Thousands of starts in a row: nothing is left, nothing adds up, and the last start costs what the first one did.

What adds up would be memory and descriptors of this process and of the launcher, cgroups and namespaces of the kernel.
"""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.comparison.sustained import endurance, growth
from support import leaks
from support.sandboxes import LOCAL_LEVELS

# How much more there may be after all starts than before: bytes of the two processes, which take memory by the page and
# by the arena; descriptors none. The kernel's own by a handful, whatever the number of starts, and as other processes
# come and go: it frees namespaces late, and in batches.
MOST_MORE = {
    "rss": 4 << 20,
    "launcher rss": 128 << 10,
    "descriptors": 0,
    "launcher descriptors": 1,
    "cgroups memory": 30,
    "cgroups pids": 10,
    "cgroups cpu": 10,
    "cgroups cpuacct": 20,
    "dying cgroups": 30,
    "slab net_namespace": 60,
    "slab pid_namespace": 100,
    "slab user_namespace": 100,
    "slab mem_cgroup": 100,
    "slab mnt_cache": 400,
    "slab nsproxy": 150,
}
# A busy machine is the usual one; what adds up is slower by much.
SLOWER, SLOWER_NS = 1.5, 1_000_000


def more(before: dict[str, int]) -> dict[str, int]:
    now = growth()
    return {name: now[name] - value for name, value in before.items() if now[name] - value > MOST_MORE[name]}


def check(found: dict[str, Any]) -> None:
    parts = found["parts"]
    shown = [f"p50 {one['p50_ns'] / 1e6:.2f} ms, p99 {one['p99_ns'] / 1e6:.2f} ms, {one['growth']}" for one in parts]
    print(found["before"], *shown, sep="\n")
    assert leaks.settled(lambda: more(found["before"]), 10) == {}
    first, later = parts[0]["p50_ns"], min(one["p50_ns"] for one in parts[len(parts) // 2 :])
    assert later < SLOWER * first + SLOWER_NS, f"{first} ns, then {later} at best"


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_thousand_in_a_row(isolation: str) -> None:
    check(endurance(1000, isolation, steps=4))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_ten_thousand_in_a_row(isolation: str) -> None:
    check(endurance(10_000, isolation))
