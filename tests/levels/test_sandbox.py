"""A sandbox that stays: what lives on from one command to the next, and what doesn't."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ringfence as rf
from ringfence.levels.state import state
from support import leaks
from support.sandboxes import EXITED_0, LEVELS, LOCAL_LEVELS, ended, need_cgroup, output, python_json


@pytest.mark.parametrize("isolation", LEVELS)
def test_what_lives_on(isolation: str) -> None:
    with rf.Sandbox(isolation=isolation, env={"OWN": "1"}, files={"first": "1"}) as sandbox:
        assert output(sandbox.run(["sh", "-c", "cat first; echo 2 > second; exit 0"])) == b"1"
        assert output(sandbox.run(["cat", "second"])) == b"2\n"
        # A process that was left behind goes on, without the streams of the command that started it.
        sandbox.run(["sh", "-c", "setsid sh -c 'while [ ! -e stop ]; do sleep 0.02; done; echo $OWN > stopped' &"])
        assert ended(sandbox.run(["test", "-e", "stopped"])) == ("exited", 1, None)
        sandbox.write_file("stop", b"")
        waited = sandbox.run(["sh", "-c", "while [ ! -s stopped ]; do sleep 0.02; done; cat stopped"], wall_time="30s")
        assert output(waited) == b"1\n"


@pytest.mark.parametrize("isolation", LEVELS)
def test_each_command_has_its_own_result(isolation: str) -> None:
    with rf.Sandbox(isolation=isolation, limits=rf.Limits(output="1K")) as sandbox:
        assert ended(sandbox.run(["sh", "-c", "exit 7"])) == ("exited", 7, None)
        assert ended(sandbox.run(["sh", "-c", "kill -TERM $$"])) == ("signaled", None, 15)
        assert sandbox.run(["cat"], input="abc", text=True).stdout == "abc"
        assert output(sandbox.run(["sh", "-c", "echo $A$B"], env={"A": "a", "B": "b"})) == b"ab\n"
        assert output(sandbox.run(["sh", "-c", "echo $A"])) == b"\n"
        sandbox.write_file("below/x.csv", "1,2")
        assert sandbox.run(["pwd"], cwd="below").stdout.endswith(b"/below\n")
        assert sandbox.run(["pwd"], cwd="/usr").stdout == b"/usr\n"
        assert sandbox.run(["true"], collect=["*/*.csv"]).files == {"below/x.csv": b"1,2"}
        assert sandbox.run(["cat", "more"], files={"more": "m"}).stdout == b"m"
        with pytest.raises(rf.WorkloadFailed):
            sandbox.run(["false"], check=True)
        with pytest.raises(rf.StartError) as caught:
            sandbox.run(["no-such-command"])
        assert (caught.value.errno_name, caught.value.whole) == ("ENOENT", False)
        flooded = sandbox.run(["sh", "-c", "yes | head -c 5000; sleep 60"])
        assert (str(flooded.termination_reason), len(flooded.stdout), flooded.truncated) == ("output", 1024, True)
        assert len(sandbox.run(["sh", "-c", "yes | head -c 5000"], output="8K").stdout) == 5000
        assert ended(sandbox.run(["true"])) == EXITED_0


@pytest.mark.parametrize("isolation", LEVELS)
def test_a_limit_ends_all_that_runs_but_the_sandbox_stays(isolation: str) -> None:
    with rf.Sandbox(isolation=isolation) as sandbox:
        sandbox.run(["sh", "-c", "sleep 1000 & sleep 1001 & true"])
        late = sandbox.run(["sh", "-c", "echo begun; sleep 60"], wall_time="300ms")
        assert (str(late.termination_reason), late.stdout) == ("wall_time", b"begun\n")
        look = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done 2>/dev/null | grep -c '^sleep 100[01]'"
        if isolation != "process":  # there the host's own processes are seen too
            assert sandbox.run(["sh", "-c", look]).stdout == b"0\n"
        assert ended(sandbox.run(["true"])) == EXITED_0


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_memory_is_counted_for_each_command(isolation: str) -> None:
    need_cgroup("memory")
    with rf.Sandbox(isolation=isolation, limits=rf.Limits(memory="32M")) as sandbox:
        assert ended(sandbox.run(["true"])) == EXITED_0
        hog = sandbox.run(["python3", "-c", "x = b'x' * (200 << 20)"])
        assert str(hog.termination_reason) == "memory"
        small = sandbox.run(["sh", "-c", "exit 3"])
        assert ended(small) == ("exited", 3, None)
        busy = sandbox.run(["python3", "-c", "import time\nwhile time.process_time() < 0.3: pass"])
        idle = sandbox.run(["true"])
        assert busy.usage.cpu_ns is not None and idle.usage.cpu_ns is not None
        assert busy.usage.cpu_ns > 300e6 > 150e6 > idle.usage.cpu_ns > 0
        total = sandbox.stats().cpu_ns
        assert total is not None and total >= busy.usage.cpu_ns + idle.usage.cpu_ns


@pytest.mark.parametrize("isolation", LEVELS)
def test_files(isolation: str) -> None:
    with rf.Sandbox(isolation=isolation) as sandbox:
        sandbox.write_file("a/b", b"\x00\xff")
        sandbox.write_file("tool", "#!/bin/sh\necho ran\n", 0o755)
        assert output(sandbox.run(["./tool"])) == b"ran\n"
        sandbox.write_file("tool", "#!/bin/sh\necho anew\n", 0o755)
        assert output(sandbox.run(["./tool"])) == b"anew\n"
        assert sandbox.read_file("a/b") == b"\x00\xff"
        sandbox.run(["sh", "-c", "echo mine > out; ln -s /etc/passwd link; mkdir folder; mkfifo pipe; ln -s / up"])
        assert sandbox.read_file("out") == b"mine\n"
        assert sandbox.list_dir() == {"a/b": 2, "out": 5, "tool": 20}
        for name in ("link", "folder", "pipe", "none", "up/etc/passwd", "out/x"):
            with pytest.raises(FileNotFoundError):
                sandbox.read_file(name)
        for name in ("../x", "/x", ""):
            with pytest.raises(rf.SpecError):
                sandbox.read_file(name)
        with pytest.raises(rf.RingfenceError):
            sandbox.write_file("up/tmp/planted", b"")
        assert not os.path.exists("/tmp/planted")


@pytest.mark.parametrize("isolation", LEVELS)
def test_a_closed_sandbox(isolation: str) -> None:
    sandbox = rf.Sandbox(isolation=isolation)
    assert (sandbox.closed, sandbox.isolation) == (False, isolation)
    sandbox.close()
    sandbox.close()
    assert repr(sandbox) == f"<ringfence.Sandbox {isolation}, closed>"
    for call in (lambda: sandbox.run(["true"]), lambda: sandbox.read_file("x"), sandbox.pause, sandbox.stats):
        with pytest.raises(rf.RingfenceError, match="closed"):
            call()


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_sandbox_whose_init_was_killed(isolation: str) -> None:
    sandbox = rf.Sandbox(isolation=isolation)
    assert ended(sandbox.run(["true"])) == EXITED_0
    inner = sandbox._open
    assert inner is not None
    inner.kill()  # type: ignore[attr-defined]
    with pytest.raises(rf.RingfenceError):
        sandbox.run(["sleep", "60"])
    assert sandbox.closed


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_threads_take_turns(isolation: str) -> None:
    with rf.Sandbox(isolation=isolation) as sandbox:
        found: list[bytes] = []

        def work(number: int) -> None:
            for _ in range(5):
                found.append(sandbox.run(["sh", "-c", f"echo {number}"]).stdout)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))  # each tells what it raised
        assert sorted(found) == sorted(b"%d\n" % number for number in range(4) for _ in range(5))


def test_a_sandbox_is_not_a_forked_childs() -> None:
    found = python_json(FORKED)
    assert found == {"child": ["RingfenceError", "RingfenceError", "RingfenceError"], "parent": "still here\n"}


FORKED = r"""
import json, os
import ringfence as rf
sandbox = rf.Sandbox(isolation="container")
pool = rf.Pool(1, isolation="container")
sandbox.run(["true"])
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    found = []
    for call in (lambda: sandbox.run(["true"]), lambda: pool.run(["true"]), lambda: sandbox.write_file("x", "")):
        try:
            call()
            found.append("nothing")
        except Exception as error:
            found.append(type(error).__name__)
    sandbox.close()
    pool.close()
    os.write(write, json.dumps(found).encode())
    os._exit(0)
os.waitpid(pid, 0)
child = json.loads(os.read(read, 1000))
parent = sandbox.run(["echo", "still here"], text=True).stdout
pool.run(["true"], check=True)
sandbox.close()
pool.close()
print(json.dumps({"child": child, "parent": parent}))
"""


# ---- pools ----


@pytest.mark.parametrize("isolation", LEVELS)
def test_a_pool_gives_each_run_a_sandbox_of_its_own(isolation: str) -> None:
    with rf.Pool(2 if isolation != "vm" else 1, isolation=isolation, files={"given": "g"}) as pool:
        assert pool.wait_until_full(120)
        for _ in range(3 if isolation != "vm" else 2):
            script = "cat given more; ls; echo left > left; (echo > /tmp/left) 2> /dev/null; true"
            done = pool.run(["sh", "-c", script], files={"more": "m"})
            assert output(done) == b"gmgiven\nmore\n"
        assert pool.wait_until_full(120)
    with pytest.raises(rf.RingfenceError, match="closed"):
        pool.run(["true"])


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_pool_under_many_threads(isolation: str) -> None:
    with rf.Pool(3, isolation=isolation, limits=rf.Limits(wall_time="20s")) as pool:
        found: list[bytes] = []

        def work(number: int) -> None:
            for index in range(10):
                found.append(pool.run(["sh", "-c", f"echo {number} {index} $(ls | wc -l); touch x"]).stdout)

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(work, range(6)))  # each tells what it raised
        assert sorted(found) == sorted(b"%d %d 0\n" % (number, index) for number in range(6) for index in range(10))
        late = pool.run(["sleep", "60"], wall_time="200ms")
        assert str(late.termination_reason) == "wall_time"
        with pytest.raises(rf.StartError):
            pool.run(["no-such-command"])
        assert ended(pool.run(["true"])) == EXITED_0


def test_a_pool_that_is_forgotten_ends() -> None:
    rf.Pool(2, isolation="container").run(["true"])
    # What is left is looked for after the test.


def test_a_pool_says_what_is_wrong_at_once(tmp_path: Path) -> None:
    with pytest.raises(rf.CannotEnforce):
        rf.Pool(1, isolation="process", hostname="x")
    with pytest.raises(rf.SpecError):
        rf.Pool(0)
    with pytest.raises(TypeError, match="hostname"), rf.Pool(1, isolation="process") as pool:
        pool.run(["true"], hostname="x")  # type: ignore[call-arg]


def test_a_pool_whose_caller_exits_without_closing_it() -> None:
    started = time.monotonic()
    assert python_json(ABANDONED) == 0
    assert time.monotonic() - started < 20


ABANDONED = r"""
import ringfence as rf
pool = rf.Pool(3, isolation="container")
print(pool.run(["true"]).exit_code)
"""


KILLER = """
import os
if os.fork() == 0:
    os.setsid()
    while True:
        try:
            os.kill(-1, 9)
        except OSError:
            pass
"""


@pytest.mark.parametrize("seccomp", [None, rf.Seccomp(mode="report")], ids=["enforced", "reported"])
def test_what_is_killed_before_it_was_restricted_never_counts_as_started(seccomp: rf.Seccomp | None) -> None:
    """A leftover of the same user kills whatever starts, at any moment of its start."""
    killed = 0
    ends: set[tuple[str, bool]] = set()
    with rf.Sandbox(isolation="container", seccomp=seccomp, files={"killer.py": KILLER}) as sandbox:
        sandbox.run(["python3", "killer.py"])
        for _ in range(60):
            try:
                done = sandbox.run(["true"], wall_time="20s")
            except rf.StartError as error:
                ends.add((error.errno_name, error.whole))
                killed += 1
                continue
            killed += done.signal == 9
            found = {one.rule: one.effective for one in done.applied}
            assert (found["capabilities"], found["no_new_privs"]) == ("none", True)
            assert found["seccomp"] is not None
            assert found["user"] == "1000:1000"
    assert killed, "the control: nothing was killed"
    assert ends <= {("ECANCELED", False)}


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_pool_that_gets_no_thread_leaves_no_sandbox(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rf.run(["true"], isolation=isolation)
    state().ready.clear()
    before = {one.key for one in leaks.descendants(os.getpid())}

    def fails(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fails)
    with pytest.raises(RuntimeError, match="new thread"):
        rf.Pool(1, isolation=isolation)
    assert not leaks.settled(lambda: [one for one in leaks.descendants(os.getpid()) if one.key not in before], 2)
