"""Limits: what ends a workload, what it had printed until then, and that nothing of it lives on.

Every test that eats memory or forks without end first sees its limits in force in a small run with the same ones.
"""

from __future__ import annotations

import time

import pytest

import ringfence as rf
from support.sandboxes import (
    EXITED_0,
    LEVELS,
    LOCAL_LEVELS,
    PROBE_FILE,
    applied,
    ended,
    need_cgroup,
    output,
    run_probe,
)

# On top of a limit's time: a busy machine, and under emulation a guest that notices late.
LATE_S = {"process": 2.0, "container": 2.0, "vm": 8.0}


def assert_in_force(isolation: str, limits: rf.Limits) -> None:
    """Before anything dangerous: the limits as the kernel tells them."""
    result = run_probe(isolation, "exit", "0", limits=limits)
    assert ended(result) == EXITED_0
    found = applied(result)
    for rule, value in (("memory", limits.memory_bytes), ("pids", limits.pids)):
        if value is not None:
            assert found[rule].effective == value, found[rule]


@pytest.mark.parametrize("isolation", LEVELS)
def test_wall_time_against_a_process_that_ignores_sigterm(isolation: str) -> None:
    begin = time.monotonic()
    result = run_probe(isolation, "stubborn", "60", limits=rf.Limits(wall_time=0.5))
    wall = result.usage.wall_ns
    assert result.termination_reason == "wall_time"
    assert (result.exit_code, result.signal, result.stdout) == (None, 9, b"ready\n")
    assert result.shell_status == 124
    assert wall is not None
    assert 500_000_000 <= wall <= (0.5 + LATE_S[isolation]) * 1e9
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("detached", [(), ("detached",)], ids=["holds stdout", "detached"])
@pytest.mark.parametrize("isolation", LEVELS)
def test_wall_time_reaches_who_called_setsid_and_forked_twice(isolation: str, detached: tuple[str, ...]) -> None:
    """That nothing of it is alive afterwards is what the leak fixture asserts."""
    result = run_probe(isolation, "orphan", "60", *detached, limits=rf.Limits(wall_time=0.5))
    assert result.termination_reason == "wall_time"
    assert result.stdout.startswith(b"ready ")


@pytest.mark.parametrize("detached", [(), ("detached",)], ids=["holds stdout", "detached"])
@pytest.mark.parametrize("isolation", LEVELS)
def test_a_daemon_that_is_left_behind_dies_with_the_command(isolation: str, detached: tuple[str, ...]) -> None:
    begin = time.monotonic()
    result = run_probe(isolation, "orphan-exit", "60", *detached)
    assert ended(result) == EXITED_0
    assert result.stdout.startswith(b"ready ")
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("isolation", LEVELS)
def test_cpu_time_is_of_all_its_processes(isolation: str) -> None:
    result = run_probe(isolation, "spin-children", "4", "60", limits=rf.Limits(cpu_time=0.6, wall_time=60))
    assert result.termination_reason == "cpu_time"
    assert (result.exit_code, result.signal, result.stdout) == (None, 9, b"ready 4\n")
    used = result.usage.cpu_ns
    assert used is not None
    assert 600_000_000 <= used <= 3_000_000_000


@pytest.mark.parametrize("isolation", LEVELS)
def test_a_sleeper_uses_no_cpu_time(isolation: str) -> None:
    result = run_probe(isolation, "closeout", "1", limits=rf.Limits(cpu_time=0.9))
    assert ended(result) == ("exited", 7, None)


@pytest.mark.parametrize("isolation", LEVELS)
def test_memory(isolation: str) -> None:
    need_cgroup("memory")
    limits = rf.Limits(memory="64M", wall_time=60)
    assert_in_force(isolation, limits)
    result = run_probe(isolation, "hog", "1G", limits=limits)
    assert result.termination_reason == "memory"
    assert result.exit_code is None
    # What it had printed is kept, up to the last 16 MiB step below the limit.
    assert result.stdout == b"".join(b"touched %d\n" % (step << 24) for step in (1, 2, 3))
    peak = result.usage.memory_peak_bytes
    assert peak is not None
    assert 56 << 20 <= peak <= 64 << 20


@pytest.mark.parametrize("isolation", LEVELS)
def test_memory_below_the_limit_is_there(isolation: str) -> None:
    need_cgroup("memory")
    result = run_probe(isolation, "hog", "48M", limits=rf.Limits(memory="64M"))
    assert output(result).endswith(b"hogged\n")


# On v2 all of the cgroup dies together (memory.oom.group), so that nothing goes on with a part missing.
AFTER_A_CHILD = {"v1": (EXITED_0, b"child 137\n"), "v2": (("memory", None, 9), b"")}


@pytest.mark.parametrize("isolation", LEVELS)
def test_memory_of_a_child_counts_and_the_command_may_go_on(isolation: str) -> None:
    """The kernel takes the largest process. A shell that lived on and succeeded was not ended by the limit."""
    need_cgroup("memory")
    limits = rf.Limits(memory="64M", wall_time=60)
    assert_in_force(isolation, limits)
    script = "./probe hog 1G >/dev/null; echo child $?"
    result = rf.run(["sh", "-c", script], isolation=isolation, limits=limits, files=PROBE_FILE)
    assert (ended(result), result.stdout) == AFTER_A_CHILD[
        "v2" if isolation in LOCAL_LEVELS and result.usage.source == "cgroup v2" else "v1"
    ]


@pytest.mark.parametrize("isolation", LEVELS)
def test_pids_against_a_fork_bomb(isolation: str) -> None:
    need_cgroup("pids")
    limits = rf.Limits(pids=20, memory="64M", wall_time=60)
    assert_in_force(isolation, limits)
    result = run_probe(isolation, "forkbomb", "1000", limits=limits)
    assert output(result) == b"forked 19 EAGAIN\n"


@pytest.mark.parametrize("isolation", LEVELS)
def test_a_fork_bomb_that_never_stops(isolation: str) -> None:
    """Each process forks for as long as it lives, so whoever kills them one by one always comes too late."""
    need_cgroup("pids")
    limits = rf.Limits(pids=40, memory="96M", wall_time=3)
    assert_in_force(isolation, limits)
    code = "import os\nprint('begun', flush=True)\nwhile True:\n try: os.fork()\n except OSError: pass"
    result = rf.run(["/usr/bin/python3", "-c", code], isolation=isolation, limits=limits)
    assert (result.termination_reason, result.stdout) == ("wall_time", b"begun\n")


@pytest.mark.parametrize("isolation", LEVELS)
def test_cpus(isolation: str) -> None:
    """Two spinning processes at half a CPU get half a CPU."""
    result = run_probe(isolation, "spin-children", "2", "2", limits=rf.Limits(cpus=0.5))
    assert ended(result) == EXITED_0
    assert applied(result)["cpus"].effective == 0.5
    usage = result.usage
    assert usage.cpu_ns is not None
    assert usage.wall_ns is not None
    assert usage.cpu_ns <= 0.65 * usage.wall_ns
    assert usage.cpu_ns >= 0.1 * usage.wall_ns
