"""`bench --ablation` and `bench --profile`: that what is said to be left out is, and that a trace is read right."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ringfence.comparison import ablation, profile
from ringfence.comparison.bench_report import print_parts
from ringfence.comparison.report import console
from ringfence.levels.namespaces import own_namespaces
from support.sandboxes import need_root

ROUNDS = 2


@pytest.fixture(scope="module")
def measured() -> ablation.Ablation:
    need_root()
    return ablation.measure(ROUNDS)


def test_every_start_is_measured_as_often(measured: ablation.Ablation) -> None:
    assert not measured.skipped
    assert set(measured.samples) == set(measured.parts) == {"process", "container", ablation._ALONE}
    for level, samples in measured.samples.items():
        assert {len(taken) for taken in samples.values()} == {ROUNDS}
        assert [one.name for one in measured.parts[level]] == list(samples)
        assert measured.parts[level][0].cost_ns == 0
        if level != ablation._ALONE:
            assert any(name.startswith("without cgroup: ") for name in samples)
            assert {ablation._ANEW, ablation._AHEAD, ablation._TOLD} < set(samples)


def test_what_telling_applied_costs_is_held_against_the_same_run_without_it() -> None:
    samples = {"everything": [10, 10], ablation._ANEW: [20, 20], ablation._AHEAD: [5, 5], ablation._TOLD: [23, 23]}
    costs = {one.name: one.cost_ns for one in ablation.judge(samples)}
    assert costs == {"everything": 0, ablation._ANEW: -10, ablation._AHEAD: 15, ablation._TOLD: -3}


def test_each_namespace_alone_is_held_against_a_bare_clone(measured: ablation.Ablation) -> None:
    names = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
    wanted = [ablation._BARE, *(f"with {name}" for name in names), "with all of them"]
    assert list(measured.samples[ablation._ALONE]) == wanted
    assert all(took > 10_000 for taken in measured.samples[ablation._ALONE].values() for took in taken)
    found = {one.name: one.cost_ns for one in ablation.judge({ablation._BARE: [50, 50], "with net": [400, 400]})}
    assert found == {ablation._BARE: 0, "with net": 350}


def test_it_is_told_as_a_table_and_as_json(measured: ablation.Ablation, tmp_path: object) -> None:
    told = json.loads(json.dumps(measured.to_json()))
    assert told["parts"]["container"][0]["name"] == "everything"
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        print_parts(measured, console(nowhere))


CUTS = {
    "user namespace": "user",
    "network namespace": "net",
    "IPC namespace": "ipc",
    "UTS namespace, host name": "uts",
    "time namespace": "time",
    "cgroup namespace": "cgroup",
}


@pytest.mark.parametrize("name", [*CUTS, "seccomp filter"])
def test_what_is_left_out_is_left_out_and_nothing_else(name: str) -> None:
    need_root()
    ours = own_namespaces()
    started = ablation._start("container", ["/usr/bin/true"], ablation._cuts("container")[name])
    shared = {one for one, inode in started.namespaces.items() if inode == ours[one]}
    assert shared == ({CUTS[name]} if name in CUTS else set())
    assert (started.seccomp == 0) == (name == "seccomp filter")
    assert started.no_new_privs
    assert started.capabilities[:3] == (0, 0, 0)


def test_without_a_pid_namespace_there_is_no_proc_to_read_back_from() -> None:
    need_root()
    cut = ablation._cuts("container")["PID namespace, its /proc and what is read back from there"]
    assert ablation._start("container", ["/usr/bin/true"], cut).namespaces == {}


def test_landlock_is_left_out_of_a_process() -> None:
    need_root()
    argv = ["/usr/bin/true"]
    cuts = ablation._cuts("process")
    whole = ablation._start("process", argv, None)
    assert (whole.landlock, whole.seccomp) == (True, 2)
    assert not ablation._start("process", argv, cuts["Landlock"]).landlock
    assert ablation._start("process", argv, cuts["seccomp filter"]).seccomp == 0


def test_the_difference_is_of_the_medians() -> None:
    samples = {"everything": [100, 110, 120], "without it": [60, 70, 80]}
    whole, part = ablation.judge(samples)
    assert (whole.cost_ns, part.cost_ns) == (0, 40)
    assert part.low_ns <= 40 <= part.high_ns
    assert part.p99 is None


def line(pid: int, us: int, what: str) -> str:
    return f"          some-name-{pid}      [000] d..1.   100.{us:06}: {what}"


def switch(us: int, previous: int, following: int) -> str:
    what = (
        f"sched_switch: prev_comm=a prev_pid={previous} prev_prio=120 prev_state=S ==> next_comm=b next_pid={following}"
    )
    return line(previous, us, f"{what} next_prio=120")


PYTHON, LAUNCHER, INIT, COMMAND, NEXT = 10, 20, 30, 31, 32
TRACE = "\n".join(
    [
        line(PYTHON, 0, "tracing_mark_write: ringfence: begin"),
        line(PYTHON, 10, "sys_enter: NR 46 (3, 7f, 0, 0, 0, 0)"),
        line(PYTHON, 30, "sys_exit: NR 46 = 239"),
        switch(40, PYTHON, INIT),
        line(INIT, 50, "sys_enter: NR 47 (3, 7f, 0, 0, 0, 0)"),
        line(INIT, 55, "sys_exit: NR 47 = 239"),
        line(COMMAND, 60, f"sched_process_exec: filename=/probe pid={COMMAND} old_pid={COMMAND}"),
        line(LAUNCHER, 70, f"sched_process_fork: comm=a pid={LAUNCHER} child_comm=b child_pid={NEXT}"),
        line(NEXT, 72, "sys_enter: NR 47 (3, 7f, 0, 0, 0, 0)"),
        line(NEXT, 73, "sys_exit: NR 47 = 1"),
        switch(80, INIT, 0),
        switch(90, 0, PYTHON),
        line(PYTHON, 100, "tracing_mark_write: ringfence: end"),
    ]
)


def test_a_trace_is_read() -> None:
    found = profile.parse(TRACE, PYTHON, LAUNCHER)
    assert found is not None
    assert found.total_us == 100
    assert [(one.who, one.start_us, one.us) for one in found.steps] == [
        ("Python", 10, 20),
        ("init", 50, 5),
        ("command", 60, 0),
        ("next", 72, 1),
    ]
    assert found.running_us == {"Python": 50, "sandbox": 40, "both": 0, "none": 10}
    assert profile.parse(TRACE.rpartition("\n")[0], PYTHON, LAUNCHER) is None


def test_a_run_is_profiled() -> None:
    need_root()
    if not os.access("/sys/kernel/tracing/instances", os.W_OK):
        pytest.skip("tracefs isn't mounted, or can't be written to")
    done = subprocess.run(
        [sys.executable, "-m", "ringfence", "bench", "--profile", "container", "-n", "3"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "is executed" in done.stdout
    assert "who ran: Python" in done.stdout
    assert not [name for name in os.listdir("/sys/kernel/tracing/instances") if name.startswith("ringfence-")]
