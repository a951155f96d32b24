"""ringfence on a host with nothing but cgroup v2. Where this host isn't one, a guest of our own is it
(test_inside_a_vm.py).
"""

from __future__ import annotations

import pytest

import ringfence as rf
from support.sandboxes import LOCAL_LEVELS, applied, need_v2, run_probe

LIMITS = rf.Limits(memory="32M", pids=16, cpus=0.5)


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_limits_are_those_of_cgroup_v2(isolation: str) -> None:
    need_v2()
    layout = rf.host().cgroups
    assert {one.name: one.reason for one in layout.controllers if not one.usable} == {}
    result = run_probe(isolation, "exit", "0", limits=LIMITS)
    assert result.ok
    assert result.usage.source == "cgroup v2"
    found = applied(result)
    for rule, value, file in (("memory", 32 << 20, "memory.max"), ("pids", 16, "pids.max"), ("cpus", 0.5, "cpu.max")):
        assert (found[rule].requested, found[rule].effective) == (value, value)
        assert f"cgroup v2 {file}" in found[rule].mechanism


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_limits_hold_on_cgroup_v2(isolation: str) -> None:
    need_v2()
    hog = run_probe(isolation, "hog", "96M", limits=rf.Limits(memory="32M", pids=16))
    assert hog.termination_reason == "memory"
    # memory.peak needs Linux 5.19.
    assert hog.usage.memory_peak_bytes is not None
    assert 16 << 20 < hog.usage.memory_peak_bytes <= 33 << 20
    bomb = run_probe(isolation, "forkbomb", "40", limits=rf.Limits(memory="32M", pids=16))
    assert bomb.stdout == b"forked 15 EAGAIN\n"
