"""Sandboxes beside each other, and callers of every size."""

from __future__ import annotations

import errno
import threading
import time
from typing import Any

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
    python_json,
    run_probe,
)

# At the vm level each is a boot, two of which a small machine does at a time.
ROUNDS = {"process": 10, "container": 10, "vm": 1}


def in_threads(count: int, work: Any) -> None:
    """Runs work(number) in that many threads at once; raises what the first of them raised."""
    raised: list[BaseException] = []
    gate = threading.Barrier(count)

    def one(number: int) -> None:
        try:
            gate.wait(10)
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


@pytest.mark.parametrize("isolation", LEVELS)
def test_8_threads_at_once(isolation: str) -> None:
    def work(number: int) -> None:
        for turn in range(ROUNDS[isolation]):
            text = f"{number} {turn} " * 20_000
            result = run_probe(isolation, "cat", input=text, text=True)
            assert (ended(result), result.stdout == text) == (EXITED_0, True)

    in_threads(8, work)


def test_8_threads_across_the_levels_with_every_kind_of_end() -> None:
    def work(number: int) -> None:
        isolation = ("process", "container")[number % 2]
        for _ in range(5):
            assert ended(run_probe(isolation, "exit", str(number))) == ("exited", number, None)
            with pytest.raises(rf.StartError):
                rf.run(["no-such-command"], isolation=isolation)
            limited = run_probe(isolation, "stubborn", limits=rf.Limits(wall_time=0.05))
            assert limited.termination_reason == "wall_time"

    in_threads(8, work)


def test_two_at_once_have_different_ids() -> None:
    """Otherwise one could signal the other, or open its files."""
    seen: dict[str, list[int]] = {"process": [], "container": []}
    lock = threading.Lock()

    def work(number: int) -> None:
        isolation = ("process", "container")[number % 2]
        script = "cat /proc/self/uid_map; awk '/^Uid/ {print $2}' /proc/self/status; sleep 0.5"
        words = output(rf.run(["sh", "-c", script], isolation=isolation)).split()
        with lock:
            seen[isolation].append(int(words[3] if isolation == "process" else words[1]))

    in_threads(8, work)
    for ids in seen.values():
        assert len(set(ids)) == 4


BIG = """
import json, sys, time
import ringfence as rf
from support.sandboxes import run_probe, ended
def fastest(level, times):
    took = []
    for _ in range(times):
        begin = time.monotonic()
        assert ended(run_probe(level, "exit", "7")) == ("exited", 7, None)
        took.append(time.monotonic() - begin)
    return min(took)
times = {"process": 20, "container": 20, "vm": 1}
small = {level: fastest(level, times[level]) for level in ("process", "container")}
held = bytearray(1 << 30)
for at in range(0, len(held), 4096):
    held[at] = 1
big = {level: fastest(level, times[level]) for level in times}
resident = int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
print(json.dumps({"resident": resident, "small": small, "big": big}))
"""


def test_a_caller_with_1_gib_resident() -> None:
    """It works, and a fork of such a caller, which takes 20 ms and more, is nowhere in it."""
    seen = python_json(BIG)
    assert seen["resident"] >= 1 << 30
    for isolation in ("process", "container"):
        assert seen["big"][isolation] < seen["small"][isolation] + 0.015, seen
    assert seen["big"]["vm"] < 60


@pytest.mark.parametrize("isolation", LEVELS)
def test_a_memory_hog_harms_nobody_else(isolation: str) -> None:
    """Beside it another sandbox of each kind works on; so does the caller."""
    need_cgroup("memory")
    limits = rf.Limits(memory="64M", wall_time=60)
    small = run_probe(isolation, "exit", "0", limits=limits)
    assert applied(small)["memory"].effective == 64 << 20
    neighbours: dict[str, rf.Result] = {}

    def neighbour(name: str) -> None:
        script = "./probe hog 20M && sleep 1 && echo alive"
        neighbours[name] = rf.run(
            ["sh", "-c", script], isolation=name, files=PROBE_FILE, limits=rf.Limits(memory="64M")
        )

    threads = [threading.Thread(target=neighbour, args=(name,)) for name in ("process", "container")]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    reasons = [str(run_probe(isolation, "hog", "1G", limits=limits).termination_reason)]
    if isolation != "vm":
        reasons += [str(run_probe(isolation, "hog", "1G", limits=limits).termination_reason) for _ in range(5)]
    for thread in threads:
        thread.join()
    assert set(reasons) == {"memory"}
    for result in neighbours.values():
        assert output(result).endswith(b"hogged\nalive\n")


def test_many_in_a_row_leave_nothing() -> None:
    """The leak fixture looks after these 400: descriptors, cgroups, folders, processes."""
    for _ in range(200):
        for isolation in ("process", "container"):
            rf.run(["true"], isolation=isolation)


SHORT = """
import json, os, resource, sys
import ringfence as rf
from ringfence.levels.state import state
def fds():
    state().ready.clear()
    return len(os.listdir("/proc/self/fd"))
def run():
    return rf.run(["echo", "hi"], isolation=sys.argv[1]).stdout
for _ in range(4):
    run()
before, ends = fds(), []
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for limit in range(before // 2, 3 * before, 2):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    for _ in range(2):
        try:
            ends.append(run().decode())
        except OSError as error:
            ends.append(error.errno)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
for _ in range(3):
    run()
print(json.dumps({"ends": sorted(set(map(str, ends))), "last": ends[-1], "grown": fds() - before}))
"""


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_where_descriptors_are_short_runs_fail_and_leave_none(isolation: str) -> None:
    """Wherever on the way it is that there is no other one; and as soon as there are enough, all is well again."""
    told = python_json(SHORT, isolation)
    assert told["ends"] == [str(errno.EMFILE), "hi\n"]
    assert told["last"] == "hi\n"
    assert told["grown"] <= 0
