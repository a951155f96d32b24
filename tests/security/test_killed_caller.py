"""A caller that is killed with SIGKILL in the middle of a run leaves nothing behind, within 2 seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import ringfence as rf
from support import leaks
from support.sandboxes import IN_A_GUEST, LEVELS, LOCAL_LEVELS, need, need_cgroup, need_root, python

# A daemon that left its session and its parent, deaf to SIGTERM, holding stdout; files in the work directory.
CALLER = """
import sys
from support.sandboxes import PROBE_FILE
import ringfence as rf
script = "mkdir -p deep/er && echo x > deep/er/f && ./probe orphan 600"
limits = rf.Limits(memory="96M", pids=30, cpus=1)
rf.run(["sh", "-c", script], isolation=sys.argv[1], files=PROBE_FILE, limits=limits)
print("it ended by itself", flush=True)
"""


def running_probes(caller: int) -> list[leaks.Process]:
    return [one for one in leaks.descendants(caller) if one.name in ("probe", "qemu-system-x86")]


def wait_until_it_runs(caller: subprocess.Popen[bytes], isolation: str) -> list[leaks.Process]:
    """Until the workload is there: two probes (itself and its daemon), or a guest that is on its way."""
    wanted = 1 if isolation == "vm" else 2
    deadline = time.monotonic() + 60
    while len(running_probes(caller.pid)) < wanted:
        assert caller.poll() is None, "the caller ended early"
        assert time.monotonic() < deadline, leaks.descendants(caller.pid)
        time.sleep(0.02)
    if isolation == "vm":
        # Restored, or in the middle of a template's boot.
        while not (probes := running_probes(caller.pid)) or cpu_ticks(probes[0].pid) < 10:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    return leaks.descendants(caller.pid)


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def what_is_left(caller: int, before: list[leaks.Process], sockets: set[int]) -> dict[str, object]:
    everyone = leaks.processes()
    alive = [one for one in before if one.pid in everyone and everyone[one.pid].start == one.start]
    open_sockets = sockets & leaks.unix_sockets().keys()
    found: dict[str, object] = {
        "processes": alive,
        "cgroups": leaks.cgroups_of(caller),
        "folders": leaks.run_folders_of(caller),
        "sockets": open_sockets,
    }
    return {kind: what for kind, what in found.items() if what}


@pytest.mark.parametrize("delay_s", [0.0, 0.3], ids=["at once", "a little later"])
@pytest.mark.parametrize("isolation", LEVELS)
def test_sigkill_in_the_middle_of_a_run(isolation: str, delay_s: float) -> None:
    mounts, interfaces = leaks.host_mounts(), leaks.interfaces()
    caller = python(CALLER, isolation)
    try:
        before = wait_until_it_runs(caller, isolation)
        time.sleep(delay_s)
        before = leaks.descendants(caller.pid) or before
        # There is something to be left behind: launcher, init and workload, cgroups, a folder, sockets.
        assert len(before) >= 3
        assert leaks.cgroups_of(caller.pid)
        folders = leaks.run_folders_of(caller.pid)
        assert folders
        sockets = {inode for one in before for inode in leaks.socket_inodes(one.pid)} & leaks.unix_sockets().keys()
        assert sockets
    finally:
        caller.kill()
        killed = time.monotonic()
        printed, _ = caller.communicate(timeout=10)
    assert (caller.returncode, printed) == (-signal.SIGKILL, b"")
    left = leaks.settled(lambda: what_is_left(caller.pid, before, sockets), leaks.GRACE_S)
    assert not left, f"{time.monotonic() - killed:.1f} s after SIGKILL: {left}"
    assert leaks.host_mounts() == mounts
    assert leaks.interfaces() == interfaces


MANY = """
import sys, threading
import ringfence as rf
from support.sandboxes import PROBE_FILE
def go(level):
    while True:
        rf.run(["sh", "-c", "./probe orphan-exit 60 detached; echo > f"], isolation=level, files=PROBE_FILE)
for number in range(8):
    threading.Thread(target=go, args=(("process", "container")[number % 2],), daemon=True).start()
print("started", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.011, 0.05, 0.2, 0.35, 0.5])
def test_sigkill_at_any_moment_of_many_runs(delay_s: float) -> None:
    """While sandboxes are being made, run and removed in 8 threads."""
    caller = python(MANY)
    try:
        assert caller.stdout is not None
        assert caller.stdout.readline() == b"started\n"
        time.sleep(delay_s)
        launchers = [one for one in leaks.descendants(caller.pid) if one.is_launcher]
    finally:
        caller.kill()
        caller.communicate(timeout=10)

    def left() -> list[object]:
        everyone = leaks.processes()
        alive = [one for one in launchers if one.pid in everyone and everyone[one.pid].start == one.start]
        return [*alive, *leaks.cgroups_of(caller.pid), *leaks.run_folders_of(caller.pid)]

    assert not leaks.settled(left, leaks.GRACE_S)


LAUNCHER_KILLED = """
import sys, os, signal, threading, time
import ringfence as rf
from ringfence.wire.launcher import launcher
from support import leaks
from support.sandboxes import run_probe, ended
def kill():
    while len(below := leaks.descendants(os.getpid())) < 4:  # launcher, init, workload, its daemon
        time.sleep(0.1)
    print([one.pid for one in below], flush=True)
    os.kill(launcher().pid, signal.SIGKILL)
threading.Thread(target=kill).start()
try:
    how = str(run_probe(sys.argv[1], "orphan", "60").termination_reason)
except rf.ProtocolError:
    how = "ProtocolError"
print(how, flush=True)
try:
    after = ended(run_probe(sys.argv[1], "exit", "3"))
except rf.ProtocolError as error:  # it is told once; the next request starts another launcher
    after = ended(run_probe(sys.argv[1], "exit", "3"))
print(after, flush=True)
"""


@pytest.mark.parametrize("isolation", ["process", "container"])
def test_sigkill_of_the_launcher(isolation: str) -> None:
    """Its sandboxes die with it; the caller's run tells so at once, and the next one has a new launcher."""
    begin = time.monotonic()
    caller = python(LAUNCHER_KILLED, isolation)
    printed, _ = caller.communicate(timeout=60)
    assert caller.returncode == 0
    assert time.monotonic() - begin < (50 if IN_A_GUEST else 20), "the run waited for the workload's own end"
    below, how, after = printed.decode().splitlines()
    assert how in ("killed", "ProtocolError")
    assert after == "('exited', 3, None)"
    pids = {int(pid) for pid in below.strip("[]").split(",")}
    assert len(pids) >= 4  # launcher, init, workload, its daemon

    def left() -> set[str]:
        alive = {f"pid {pid}" for pid in pids if os.path.exists(f"/proc/{pid}")}
        return alive | leaks.run_folders_of(caller.pid) | leaks.cgroups_of(caller.pid)

    assert not leaks.settled(left, leaks.GRACE_S)


def test_an_exception_in_the_middle_of_a_run_leaves_nothing() -> None:
    """KeyboardInterrupt, say: by a signal to a caller that waits for its workload."""
    code = """
import sys, os, signal, threading
import ringfence as rf
from support.sandboxes import run_probe
from support import leaks
run_probe("process", "exit", "0"); run_probe("container", "exit", "0")
before = leaks.snapshot()
for isolation in ("process", "container"):
    threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        run_probe(isolation, "orphan", "60")
    except KeyboardInterrupt:
        print("interrupted", isolation)
print(leaks.leaked(before))
"""
    caller = python(code)
    printed, _ = caller.communicate(timeout=60)
    assert (caller.returncode, printed.decode()) == (0, "interrupted process\ninterrupted container\n{}\n")
    assert not os.path.exists(f"/proc/{caller.pid}")


# Denied calls without end, each of which waits for an answer of the caller's.
ASKING = """
import sys
import ringfence as rf
code = "import ctypes, os; os.fork(); os.fork()\\nwhile True: ctypes.CDLL(None).sethostname(b'a', 1)"
rf.run(["/usr/bin/python3", "-I", "-S", "-c", code], isolation=sys.argv[1], seccomp=rf.Seccomp(mode="report"))
"""


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_sigkill_while_a_filter_waits_for_an_answer(isolation: str) -> None:
    caller = python(ASKING, isolation)
    try:
        deadline = time.monotonic() + 60
        while len([one for one in leaks.descendants(caller.pid) if one.name == "python3"]) < 4:
            assert time.monotonic() < deadline, leaks.descendants(caller.pid)
            time.sleep(0.02)
        # Stopped it answers nobody, so that all of them wait in the kernel when it dies.
        os.kill(caller.pid, signal.SIGSTOP)
        time.sleep(0.2)
        before = leaks.descendants(caller.pid)
    finally:
        caller.kill()
        caller.communicate()
    deadline = time.monotonic() + 2
    while left := what_is_left(caller.pid, before, set()):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


LAUNCHERS_KILLED = """
import os, signal, sys, time
import ringfence as rf
from ringfence.wire.launcher import launcher
def run():
    for isolation in ("process", "container"):
        rf.run(["true"], isolation=isolation, limits=rf.Limits(memory="64M"), check=True)
run()
fds = []
for number in range(int(sys.argv[1])):
    os.kill(launcher().pid, signal.SIGKILL)
    try:
        run()
    except rf.ProtocolError:  # told once
        run()
    fds.append(len(os.listdir("/proc/self/fd")))
from support import leaks
def is_zombie(pid):
    try:
        return " Z " in leaks._text(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return False
below = [one.pid for one in leaks.descendants(os.getpid()) if one.parent == os.getpid()]
zombies = sum(map(is_zombie, below))
print(fds[len(fds) // 2], fds[-1], zombies, flush=True)
if sys.argv[2] == "killed":
    os.kill(launcher().pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "exit":
    os.kill(launcher().pid, signal.SIGKILL)
"""


def test_launchers_may_die_any_number_of_times() -> None:
    """Each new one takes over what the old one had to remove; nothing adds up."""
    caller = python(LAUNCHERS_KILLED, "20", "no more")
    printed, _ = caller.communicate(timeout=60)
    assert caller.returncode == 0
    halfway, last, zombies = map(int, printed.split())
    assert zombies == 0
    assert last <= halfway + 4  # one may just be waiting for its turn
    assert not leaks.run_folders_of(caller.pid) | leaks.cgroups_of(caller.pid)


def test_a_caller_whose_launcher_was_killed_leaves_nothing_at_its_exit() -> None:
    caller = python(LAUNCHERS_KILLED, "1", "exit")
    caller.communicate(timeout=60)
    assert caller.returncode == 0
    assert not leaks.run_folders_of(caller.pid) | leaks.cgroups_of(caller.pid)


def test_what_a_caller_and_its_launcher_left_is_removed_by_the_next_one() -> None:
    """Nobody can remove it when both are killed at once. The next Python process that uses ringfence does."""
    caller = python(LAUNCHERS_KILLED, "1", "killed")
    caller.communicate(timeout=60)
    assert caller.returncode == -signal.SIGKILL
    assert leaks.run_folders_of(caller.pid)
    living = python(
        "import sys, ringfence as rf; rf.run(['true'], isolation='process'); print(1, flush=True); input()",
        stdin=subprocess.PIPE,
    )
    assert living.stdout is not None
    assert living.stdout.readline() == b"1\n"
    folders = leaks.run_folders_of(living.pid)
    assert folders
    after = python("import ringfence as rf; rf.run(['true'], isolation='process')")
    after.communicate(timeout=60)
    assert after.returncode == 0
    assert not leaks.run_folders_of(caller.pid) | leaks.cgroups_of(caller.pid)
    assert leaks.run_folders_of(living.pid) == folders  # what isn't left over stays
    living.communicate(b"\n", timeout=60)


KILLED_ELSEWHERE = """
import os, signal, sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
import ringfence as rf
from ringfence.wire.launcher import launcher
rf.run(["true"], isolation="container", limits=rf.Limits(memory="64M"))
os.kill(launcher().pid, signal.SIGSTOP)  # so that it doesn't see our end first
os.kill(launcher().pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("gone", [False, True], ids=["still there", "gone"])
def test_what_is_left_in_another_cgroup_is_found(gone: bool) -> None:
    """Who removes it needn't be in the cgroup of the one that was killed, nor need that cgroup be there any more."""
    need_root()
    need_cgroup("memory")
    memory = rf.host().cgroups.controller("memory")
    need("cgroup v1", memory.version == 1)  # on version 2 the place may be a scope of systemd's, which it removes
    folder = Path(os.fsdecode(memory.path)) / f"elsewhere-{os.getpid()}"
    folder.mkdir()
    try:
        caller = python(KILLED_ELSEWHERE, str(folder))
        caller.communicate(timeout=60)
        assert caller.returncode == -signal.SIGKILL
        assert leaks.run_folders_of(caller.pid)
        (left,) = folder.glob(f"ringfence-{caller.pid}-*")
        if gone:
            remove_cgroups(folder)
        after = python("import ringfence as rf; rf.run(['true'], isolation='process')")
        after.communicate(timeout=60)
        assert after.returncode == 0
        assert not leaks.run_folders_of(caller.pid)
        assert not left.exists()
    finally:
        if folder.exists():
            remove_cgroups(folder)


def remove_cgroups(folder: Path) -> None:
    for below in sorted(folder.rglob("*/"), reverse=True):
        below.rmdir()
    folder.rmdir()
