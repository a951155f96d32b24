"""Thousands of starts in a row: nothing is left, nothing adds up, and the last start costs what the first one did.

What adds up would be memory and descriptors of this process and of the launcher, cgroups and namespaces of the kernel.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.comparison.sustained import endurance, growth
from ringfence.levels.state import state
from ringfence.levels.vm import template
from support import leaks
from support.sandboxes import EXITED_0, LOCAL_LEVELS, applied, ended, need_level

# How much more there may be after all starts than before: bytes of the two processes, which take memory by the page and
# by the arena; descriptors none. The kernel's own by a handful, whatever the number of starts, and as other processes
# come and go: it frees namespaces late, and in batches.
MOST_MORE = {
    "rss": 4 << 20,
    "launcher rss": 128 << 10,
    "descriptors": 0,
    "launcher descriptors": 1,
    "our cgroups": 0,
    "charged to them": 64 << 10,
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


def more(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    return {name: now[name] - value for name, value in before.items() if now[name] - value > MOST_MORE[name]}


def check(found: dict[str, Any]) -> None:
    parts = found["parts"]
    shown = [f"p50 {one['p50_ns'] / 1e6:.2f} ms, p99 {one['p99_ns'] / 1e6:.2f} ms, {one['growth']}" for one in parts]
    print(found["before"], *shown, sep="\n")
    assert leaks.settled(lambda: more(found["before"], growth()), 10) == {}
    first, later = parts[0]["p50_ns"], min(one["p50_ns"] for one in parts[len(parts) // 2 :])
    assert later < SLOWER * first + SLOWER_NS, f"{first} ns, then {later} at best"


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_thousand_in_a_row(isolation: str) -> None:
    check(endurance(1000, isolation, steps=4))


# Of the whole machine, on which others may run what they like. What adds up of ours is looked at by itself instead.
MACHINES = ("cgroups memory", "cgroups pids", "cgroups cpu", "cgroups cpuacct", "dying cgroups", "slab mem_cgroup")


def alone() -> dict[str, int]:
    """`growth`, with our own cgroups in place of the machine's.

    The kernel keeps a cgroup that was removed as long as a page is charged to it. That shows in the figures of the one
    that it was in, which is ours; a removed one without a page goes. A template's pages are charged to whichever guest
    touched them first, and stay as long as it does: so the templates in this process's memory are let go of.

    What is cached or mapped of files is left out: it comes and goes with the host's memory, and is charged to whoever
    reads it then.
    """
    state().ready.clear()
    template._loaded.clear()
    found = {name: value for name, value in growth().items() if name not in MACHINES}
    resident, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    found["rss"] = (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
    found["our cgroups"] = found["charged to them"] = 0
    for base in map(Path, leaks.cgroups_of(os.getpid())):
        found["our cgroups"] += sum(1 for one in base.iterdir() if one.is_dir())
        if (base / "memory.stat").exists():
            lines = dict(line.split() for line in (base / "memory.stat").read_text().splitlines())
            names = ("total_shmem", "total_rss") if "total_rss" in lines else ("shmem", "anon")  # version 1, or 2
            found["charged to them"] += sum(int(lines[name]) for name in names)
    return found


def restored(count: int) -> None:
    """Guests one after the other, each with a QEMU that waits for the next, and then two at a time."""

    def some(number: int) -> None:
        for _ in range(number):
            result = rf.run(["/usr/bin/true"], isolation="vm")
            assert ended(result) == EXITED_0
            assert applied(result)["start"].effective == "restored"

    def two(number: int) -> None:
        threads = [threading.Thread(target=some, args=(number,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    need_level("vm")
    two(2)  # two at a time have a work directory each, of which one is kept for each
    before = alone()
    some(count - count // 4)
    two(count // 8)
    assert leaks.settled(lambda: more(before, alone()), 20) == {}


def test_a_few_restored_guests_in_a_row() -> None:
    restored(16)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_thousand_restored_guests_in_a_row() -> None:
    restored(1000)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_ten_thousand_in_a_row(isolation: str) -> None:
    check(endurance(10_000, isolation))
