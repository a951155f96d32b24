"""Guests that wait: QEMUs for the next run of a kind, and pools of restored ones that have run a command already."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.levels.base import Command, Outcome
from ringfence.levels.host import host
from ringfence.levels.state import state
from ringfence.levels.vm import start
from ringfence.levels.vm.sandbox import VmSandbox, _true_is_the_hosts
from ringfence.spec import Spec
from ringfence.wire.launcher import probe_path
from support import leaks
from support.sandboxes import EXITED_0, LOCAL_LEVELS, applied, ended, need_level, python


@pytest.fixture(autouse=True)
def _none_waits() -> Iterator[None]:
    need_level("vm")
    state().ready.clear()
    yield
    state().ready.clear()


def qemus(pid: int) -> list[leaks.Process]:
    return [one for one in leaks.descendants(pid) if one.name == "qemu-system-x86" and leaks.is_alive(one)]


def how(result: rf.Result) -> str:
    assert ended(result) == EXITED_0
    return applied(result)["start"].mechanism


def test_a_qemu_waits_for_the_next_run_of_its_kind_and_is_used_once() -> None:
    rf.run(["true"], isolation="vm")
    assert not qemus(os.getpid())  # a single run pays for no other
    rf.run(["true"], isolation="vm")
    (first,) = leaks.settled_to(lambda: qemus(os.getpid()))
    # Another kind gets none of it.
    other = rf.run(["true"], isolation="vm", hostname="other")
    assert "waited" not in how(other)
    assert "waited" in how(rf.run(["true"], isolation="vm"))
    (second,) = leaks.settled_to(lambda: qemus(os.getpid()))
    assert second.key != first.key


def test_one_that_was_ended_while_it_waited_is_not_used() -> None:
    for _ in range(2):
        rf.run(["true"], isolation="vm")
    (waiting,) = leaks.settled_to(lambda: qemus(os.getpid()))
    os.kill(waiting.pid, signal.SIGKILL)
    leaks.settled(lambda: leaks.is_alive(waiting), 5)
    assert "waited" not in how(rf.run(["true"], isolation="vm"))


def test_it_ends_by_itself_where_nobody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_IDLE_S", 0.3)
    for _ in range(2):
        rf.run(["true"], isolation="vm")
    assert not leaks.settled(lambda: state().ready._waiting, 5)
    assert not leaks.settled(lambda: qemus(os.getpid()), 5)
    assert "waited" not in how(rf.run(["true"], isolation="vm"))


WAITING = """
import sys, time
import ringfence as rf
if sys.argv[1] == "pool":
    pool = rf.Pool(2, isolation="vm")
    assert pool.wait_until_full(120)
else:
    for _ in range(2):
        rf.run(["true"], isolation="vm")
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("what", ["pool", "next"])
def test_all_that_wait_end_with_a_caller_that_is_killed(what: str) -> None:
    caller = python(WAITING, what)
    try:
        assert caller.stdout is not None
        assert caller.stdout.readline() == b"ready\n"
        wanted = 2 if what == "pool" else 1
        assert leaks.settled_to(lambda: len(qemus(caller.pid)) == wanted, 5)
        before = leaks.descendants(caller.pid)
        caller.send_signal(signal.SIGKILL)
        caller.wait(10)
        assert not leaks.settled(lambda: [one for one in before if leaks.is_alive(one)], 2)
        assert not leaks.settled(lambda: leaks.run_folders_of(caller.pid) or leaks.cgroups_of(caller.pid), 2)
    finally:
        caller.kill()
        caller.communicate()


def test_a_pool_of_guests_has_their_first_command_behind_it() -> None:
    began = time.monotonic()
    fresh = rf.run(["true"], isolation="vm")
    took = time.monotonic() - began
    with rf.Pool(2, isolation="vm", limits=rf.Limits(cpu_time=2, wall_time=60)) as pool:
        found, took_warm = [], []
        for number in range(4):
            assert pool.wait_until_full(60)
            began = time.monotonic()
            found.append(pool.run(["sh", "-c", f"cat given; echo {number} >given; id -u"], files={"given": "new\n"}))
            took_warm.append(time.monotonic() - began)
            assert how(found[-1])
        quick = pool.run(["true"])
    # Each has a guest of its own.
    assert [one.stdout for one in found] == [b"new\n1000\n"] * 4
    assert min(took_warm) < took
    assert quick.usage.startup_ns is not None and fresh.usage.startup_ns is not None
    assert quick.usage.startup_ns < fresh.usage.startup_ns / 2


def test_what_warmed_a_guest_up_is_not_the_callers() -> None:
    """Its CPU time counts neither to the limit nor to the usage."""
    with rf.Pool(1, isolation="vm", limits=rf.Limits(cpu_time=3, wall_time=60)) as pool:
        assert pool.wait_until_full(60)
        began = time.monotonic()
        result = pool.run(["sh", "-c", "while :; do :; done"])
        assert result.termination_reason == "cpu_time", result
        assert time.monotonic() - began > 2.5
        assert result.usage.cpu_ns is not None and 2.5e9 < result.usage.cpu_ns < 5e9


def test_nothing_of_what_warmed_a_guest_up_runs_on() -> None:
    left = b"echo left >given; setsid sleep 4321 & exit 0"
    seen = ["sh", "-c", "grep -lzx [4]321 /proc/[0-9]*/cmdline 2>/dev/null | wc -l; cat given"]
    with rf.Sandbox(isolation="vm", limits=rf.Limits(wall_time=60)) as sandbox:
        opened = sandbox._open
        assert isinstance(opened, VmSandbox)
        for warm, found in ((True, b"0\nleft\n"), (False, b"1\nleft\n")):
            opened._boot()
            opened._first(
                Command(
                    argv=(b"/bin/sh", b"-c", left),
                    env=((b"PATH", b"/usr/bin:/bin"),),
                    cwd=b"/work",
                    input=None,
                    wall_time_ns=None,
                    output_bytes=4096,
                    once=False,
                ),
                warm=warm,
            )
            assert sandbox.run(seen).stdout == found


def test_only_the_hosts_own_program_warms_a_guest_up(tmp_path: Path) -> None:
    def warms(**options: Any) -> bool:
        return _true_is_the_hosts(Spec.make(["-"], isolation="vm", **options))

    assert warms()
    assert warms(mounts=[rf.Mount(tmp_path, "/mnt/x"), rf.Tmpfs("/srv/x")])
    assert not warms(image=str(tmp_path))
    for place in ("/usr/bin", "/usr/lib/x", "/bin", "/lib/x", "/lib64/x", "/etc/x"):
        assert not warms(mounts=[rf.Mount(tmp_path, place)]), place
    assert not warms(mounts=[rf.Tmpfs("/usr/lib")])


def test_with_an_image_a_guest_is_warmed_up_by_the_program_of_its_init(tmp_path: Path) -> None:
    """Under all restrictions of a command, and with nothing of the image run: its names are those of other programs."""
    os.makedirs(tmp_path / "usr/bin")
    for name in ("true", "ringfence", "probe"):
        shutil.copyfile(probe_path(), tmp_path / "usr/bin" / name)
        os.chmod(tmp_path / "usr/bin" / name, 0o755)
    tmp_path.chmod(0o755)
    wanted = Spec.make(["/usr/bin/probe", "exit", "0"], isolation="vm", image=str(tmp_path))
    with VmSandbox(wanted, host(), stays=True) as sandbox:
        said: list[Outcome] = []
        first = sandbox._first

        def noting(*given: Any, **more: Any) -> Any:
            said.append(first(*given, **more))
            return said[-1]

        sandbox._first = noting  # type: ignore[method-assign]
        sandbox.prepare()
        (warm,) = said
        # Its words are those of nothing in the image.
        assert (bytes(warm.stdout), bytes(warm.stderr)) == (b"warm\n", b"warm\n")
        assert warm.exited is not None and warm.exited.exit_code == 0 and warm.started is not None
        # It was restricted as every command is.
        assert warm.started.ids == (1000,) * 6 and warm.started.no_new_privs == 1 and warm.started.seccomp == 2
        assert not any(warm.started.capabilities)
        command = Command(
            argv=wanted.argv,
            env=wanted.environment(b"/work"),
            cwd=b"/work",
            input=None,
            wall_time_ns=None,
            output_bytes=4096,
            once=False,
        )
        # Init's program is for nothing else.
        with pytest.raises(rf.StartError, match="warmed up"):
            sandbox._run(command, own=True)
        again = sandbox.run(command).exited
        assert again is not None and again.exit_code == 0


def test_a_pool_may_have_a_command_of_the_callers_behind_it() -> None:
    """Under a command's own restrictions; what it wrote stays, what it started doesn't, and its time isn't counted."""
    warm = (
        "import os, time; os.fork() or time.sleep(4321); t = time.monotonic()\nwhile time.monotonic() < t + 1: pass\n"
    )
    warm += "print('as much as a command may print' * 1000)\n"
    warm += "open('left', 'w').write(f'{os.getuid()} {os.getcwd()} {os.environ[\"A\"]}')"
    limits = rf.Limits(cpu_time=20, wall_time=60)
    with rf.Pool(1, isolation="vm", warm=["python3", "-c", warm], limits=limits, env={"A": "b"}) as pool:
        assert pool.wait_until_full(60)
        result = pool.run(["sh", "-c", "grep -lzx [4]321 /proc/[0-9]*/cmdline 2>/dev/null | wc -l; cat left"])
    assert result.stdout == b"0\n1000 /work b"
    assert result.usage.cpu_ns is not None and result.usage.cpu_ns < 0.9e9


def test_a_pool_whose_warm_up_fails_is_none() -> None:
    for argv, said in (
        # What it printed doesn't move a cursor.
        (["sh", "-c", r"printf '\033[2Jwhy\n' >&2; exit 3"], r"didn't end well \(status 3\): sh:  \[2Jwhy"),
        (["sh", "-c", "kill -9 $$"], r"didn't end well \(signal 9\)"),
        (["sleep", "60"], "didn't end well \\(wall_time\\)"),
        (["/there/is/none"], "/there/is/none"),
    ):
        with pytest.raises(rf.RingfenceError, match=said):
            rf.Pool(1, isolation="vm", warm=argv, limits=rf.Limits(wall_time=2))
    with pytest.raises(rf.SpecError, match="leave it out"):
        rf.Pool(1, isolation="container", warm=["true"])


@pytest.mark.parametrize("isolation", [*LOCAL_LEVELS, "vm"])
def test_a_pool_that_nobody_uses_falls_asleep_and_wakes_up(isolation: str) -> None:
    with rf.Pool(2, isolation=isolation, idle=1.0) as pool:
        assert pool.wait_until_full(60)
        assert leaks.settled_to(lambda: [1] if pool.waiting == 0 else [], 10)
        assert not leaks.settled(lambda: qemus(os.getpid()), 5)
        assert ended(pool.run(["true"])) == EXITED_0
        assert leaks.settled_to(lambda: [1] if pool.waiting == 2 else [], 30)
    with pytest.raises(rf.SpecError, match="idle"):
        rf.Pool(1, isolation=isolation, idle=-1)
