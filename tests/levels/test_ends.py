"""How a workload ends, and how a command that can't be started is told."""

from __future__ import annotations

import errno
import signal

import pytest

import ringfence as rf
from support.sandboxes import EXITED_0, IN_A_GUEST, LEVELS, ended, run_probe

# Every status where a start is cheap; at the vm level, which boots for each, and within a guest those at the edges.
EDGES = (0, 1, 42, 255)
LOCAL_STATUSES = EDGES if IN_A_GUEST else range(256)
STATUSES = {"process": LOCAL_STATUSES, "container": LOCAL_STATUSES, "vm": EDGES}


@pytest.mark.parametrize("isolation", LEVELS)
def test_exit_statuses(isolation: str) -> None:
    for status in STATUSES[isolation]:
        result = run_probe(isolation, "exit", str(status))
        assert ended(result) == ("exited", status, None)
        assert result.ok == (status == 0)
        assert (result.stdout, result.stderr, result.truncated, result.files) == (b"", b"", False, {})
        assert result.isolation == isolation
        assert result.accelerator in (("kvm", "tcg") if isolation == "vm" else (None,))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGSEGV", "SIGABRT", "SIGPIPE"])
@pytest.mark.parametrize("isolation", LEVELS)
def test_death_by_signal(isolation: str, name: str) -> None:
    number = int(signal.Signals[name])
    result = run_probe(isolation, "signal", str(number))
    assert ended(result) == ("signaled", None, number)
    assert result.shell_status == 128 + number


NOT_STARTED: dict[str, tuple[str, dict[str, bytes | tuple[bytes, int]], int]] = {
    "not found": ("no-such-command", {}, errno.ENOENT),
    "not found by path": ("./no-such-command", {}, errno.ENOENT),
    "not executable": ("./plain", {"plain": b"#!/bin/sh\n"}, errno.EACCES),
    "a directory": ("/usr", {}, errno.EACCES),
    "missing interpreter": ("./script", {"script": (b"#!/no/such/interpreter\n", 0o755)}, errno.ENOENT),
    "no program": ("./words", {"words": (b"only words", 0o755)}, errno.ENOEXEC),
}


@pytest.mark.parametrize("case", NOT_STARTED)
@pytest.mark.parametrize("isolation", LEVELS)
def test_a_command_that_cannot_start(isolation: str, case: str) -> None:
    command, files, number = NOT_STARTED[case]
    with pytest.raises(rf.StartError) as caught:
        rf.run([command], isolation=isolation, files=files)
    error = caught.value
    assert (error.errno, error.step, error.call, error.detail) == (number, "exec", "execve", command)
    assert errno.errorcode[number] in str(error)
    assert command in str(error)


def test_the_same_program_does_start() -> None:
    """The control of the cases above: it was the mode, the interpreter and the name."""
    for isolation in LEVELS:
        result = rf.run(["./script"], isolation=isolation, files={"script": (b"#!/bin/sh\nexit 3\n", 0o755)})
        assert ended(result) == ("exited", 3, None)


@pytest.mark.parametrize("isolation", LEVELS)
def test_check_raises_with_the_result(isolation: str) -> None:
    with pytest.raises(rf.WorkloadFailed) as caught:
        rf.run(["sh", "-c", "echo before; exit 9"], isolation=isolation, check=True)
    assert ended(caught.value.result) == ("exited", 9, None)
    assert caught.value.result.stdout == b"before\n"
    assert "9" in str(caught.value)


def test_check_lets_success_pass() -> None:
    for isolation in ("process", "container"):
        assert ended(run_probe(isolation, "exit", "0", check=True)) == EXITED_0


@pytest.mark.parametrize("isolation", LEVELS)
def test_usage_is_of_the_workload(isolation: str) -> None:
    """One second of CPU is seen as about that, by a clock that doesn't start late or end early."""
    result = run_probe(isolation, "spin", "1")
    usage = result.usage
    assert ended(result) == EXITED_0
    assert usage.wall_ns is not None
    assert usage.cpu_ns is not None
    assert usage.memory_peak_bytes is not None
    assert usage.wall_ns >= 900_000_000
    # A busy machine gives the workload less than a whole CPU, never more than one.
    assert 100_000_000 <= usage.cpu_ns <= 1.2 * usage.wall_ns
    assert 100_000 <= usage.memory_peak_bytes <= 64 << 20
    assert usage.startup_ns is not None
    assert usage.teardown_ns is not None
    assert usage.startup_ns > 0
    assert usage.teardown_ns > 0
    assert usage.source


# Ten times as much under emulation, where a start is system calls and page faults.
START_NS = 100_000_000 if IN_A_GUEST else 1_500_000


@pytest.mark.parametrize("isolation", ["process", "container"])
def test_wall_time_covers_the_cpu_time_of_a_short_run(isolation: str) -> None:
    """One process with one thread can't use more CPU than time passes."""
    for _ in range(20):
        usage = run_probe(isolation, "facts").usage
        assert usage.wall_ns is not None
        assert usage.cpu_ns is not None
        # The cgroup counts what the command did between joining it and its exec as well: some 0.2 ms.
        assert usage.wall_ns >= usage.cpu_ns - START_NS, usage
