"""Whatever a workload leaves behind ends with it, and with its caller: each way to get out from under init."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from support import leaks, unprivileged
from support.sandboxes import LOCAL_LEVELS, need_root, python

# Started by the workload: each way leaves a process that bears MARK in its environment, and tells when it is there.
WAYS = r"""
import ctypes, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
CLONE, CLONE_PARENT, SUBREAPER = 56 if os.uname().machine == "x86_64" else 220, 0x8000, 36
told, tell = os.pipe()

def stay():
    os.write(tell, b".")
    while True:
        time.sleep(60)

def daemonize():
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    os.umask(0)
    for fd in range(tell):
        os.close(fd)

def set_apart():  # setsid and fork twice
    os.setsid()
    if os.fork():
        os._exit(0)
    stay()

def daemon():
    daemonize()
    stay()

def subreaper():  # what it leaves doesn't go up to init, but to it
    assert libc.prctl(SUBREAPER, 1, 0, 0, 0) == 0
    if os.fork() == 0:
        daemonize()
        stay()
    stay()

def renamed():  # by exec under another name, and with another one in /proc/PID/comm
    os.setsid()
    os.write(tell, b".")
    os.execve("/bin/sleep", ["[kworker/0:0]", "1000"], {"MARK": os.environ["MARK"]})

def thread_name():
    libc.prctl(15, b"kthreadd", 0, 0, 0)
    stay()

def stopped():
    os.write(tell, b".")
    os.kill(os.getpid(), signal.SIGSTOP)
    stay()

def deaf():
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    stay()

def no_exit_signal():  # a child that wait(2) without __WCLONE doesn't see
    if libc.syscall(CLONE, 0, None, None, None, None) == 0:
        daemonize()
        stay()
    os._exit(0)

def sister():  # a child of its parent's, not its own
    if libc.syscall(CLONE, CLONE_PARENT | signal.SIGCHLD, None, None, None, None) == 0:
        stay()
    os._exit(0)

def hopper():  # never the same pid for long
    os.setsid()
    os.write(tell, b".")
    while True:
        if os.fork():
            os._exit(0)
        time.sleep(0.002)

def vforked():  # its parent waits in the kernel for it to exec
    os.write(tell, b".")
    libc.system(b"exec sleep 1000")

ways = (set_apart, daemon, subreaper, renamed, thread_name, stopped, deaf, no_exit_signal, sister, hopper, vforked)
chosen = [way for way in ways if sys.argv[1] in ("all", way.__name__)]
assert chosen
for way in chosen:
    if os.fork() == 0:
        way()
os.read(told, 1)
wanted = len(chosen) + sum(way is subreaper for way in chosen) - 1
while wanted > 0:
    wanted -= len(os.read(told, wanted))
print("left", flush=True)
if sys.argv[2] == "stay":
    time.sleep(60)
"""
NAMES = (
    *("set_apart", "daemon", "subreaper", "renamed", "thread_name", "stopped", "deaf", "no_exit_signal", "sister"),
    *("hopper", "vforked", "all"),
)
CALLER = r"""
import json, sys
import ringfence as rf
isolation, way, then, mark, code = sys.argv[1:]
print("starting", flush=True)
result = rf.run(["/usr/bin/python3", "-S", "-c", code, way, then], isolation=isolation, env={"MARK": mark})
print(json.dumps([result.exit_code, result.stdout.decode(), result.stderr.decode()]), flush=True)
if result.termination_reason == "killed":
    # The launcher is gone: the next one removes what it had to.
    for _ in range(2):
        try:
            rf.run(["true"], isolation=isolation)
        except rf.ProtocolError:
            pass
"""


def marked(mark: str) -> list[int]:
    """All processes that bear the mark, by what exec gave them. The caller has it as an argument, init not at all."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                if f"MARK={mark}".encode() in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(int(name))
    return found


@contextlib.contextmanager
def calling(who: str, *args: str) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        if who == "unprivileged":
            caller = stack.enter_context(unprivileged.caller(CALLER, *args))
        else:
            caller = stack.enter_context(python(CALLER, *args))
        try:
            yield caller
        finally:
            caller.kill()


@pytest.mark.parametrize("way", NAMES)
@pytest.mark.parametrize("who", ["root", "unprivileged"])
@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_nothing_outlives_the_command(isolation: str, who: str, way: str) -> None:
    """When run() returns, all of it is gone: no grace."""
    need_root()
    mark = os.urandom(8).hex()
    with calling(who, isolation, way, "end", mark, WAYS) as caller:
        assert caller.stdout.readline() == b"starting\n"
        ended = json.loads(caller.stdout.readline())
        assert marked(mark) == []
        assert ended == [0, "left\n", ""]


@pytest.mark.parametrize("who", ["root", "unprivileged"])
@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_nothing_outlives_the_caller(isolation: str, who: str) -> None:
    """2 s after a SIGKILL of Python; the control is that they were all there."""
    need_root()
    mark = os.urandom(8).hex()
    with calling(who, isolation, "all", "stay", mark, WAYS) as caller:
        assert caller.stdout.readline() == b"starting\n"
        wait_until(lambda: len(marked(mark)) >= 11, 30)
        time.sleep(0.2)
        caller.kill()
        caller.wait()
        assert leaks.settled(lambda: marked(mark), 2) == []


@pytest.mark.parametrize("who", ["root", "unprivileged"])
def test_nothing_outlives_the_launcher(who: str) -> None:
    """Killed by SIGKILL, it leaves init to end the sandbox, and the run is told."""
    need_root()
    mark = os.urandom(8).hex()
    for isolation in LOCAL_LEVELS:
        with calling(who, isolation, "all", "stay", mark, WAYS) as caller:
            assert caller.stdout.readline() == b"starting\n"
            wait_until(lambda: len(marked(mark)) >= 11, 30)
            (launcher,) = [one for one in leaks.descendants(caller.pid) if one.parent == caller.pid]
            os.kill(launcher.pid, 9)
            assert leaks.settled(lambda: marked(mark), 2) == []
            assert caller.wait(30) == 0


def wait_until(look: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.02)


TERMINATES_INIT = """
import ringfence as rf
result = rf.run(["sh", "-c", "kill -TERM 1; kill -HUP 1; kill -KILL 1; sleep 0.2; echo alive"], isolation="container")
print('"' + result.stdout.decode().strip() + '"')
"""


def test_a_container_does_not_end_its_init(capfd: pytest.CaptureFixture[str]) -> None:
    """Of an unprivileged caller init is of the workload's own user, so it may send signals; PID 1 takes none."""
    need_root()
    assert unprivileged.python_json(TERMINATES_INIT) == "alive"
    script = "kill -TERM 1; kill -KILL 1; sleep 0.2; echo alive"
    assert rf.run(["sh", "-c", script], isolation="container", user="root").stdout == b"alive\n"


def test_leave_to_be_urgent_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that may raise priorities (here it is only said to) takes that away from its workloads."""
    import resource

    real = resource.getrlimit
    generous = {resource.RLIMIT_NICE: (40, 40), resource.RLIMIT_RTPRIO: (99, 99)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: generous.get(which) or real(which))
    rows = {one.rule: one.effective for one in rf.run(["true"], isolation="process").applied}
    assert rows["rlimit nice"] == [0, 0]
    assert rows["rlimit rtprio"] == [0, 0]
