"""The leak fixture itself: each kind of thing that a sandbox could leave behind is seen, and named."""

from __future__ import annotations

import os
import subprocess

import pytest

import ringfence as rf
from ringfence.levels.state import state
from support import leaks
from support.sandboxes import need_cgroup, need_root


def test_each_kind_of_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    need_root()
    need_cgroup("memory")
    monkeypatch.setattr(leaks, "GRACE_S", 0.05)
    before = leaks.snapshot()
    assert leaks.leaked(before) == {}
    run_folder = os.fsdecode(state().run_path) + "/w-left"
    base = sorted(leaks.cgroups_of(os.getpid()))[0]
    queue = subprocess.run(["/usr/bin/python3", "-c", MAKE_QUEUE], check=True, capture_output=True, text=True)
    process = subprocess.Popen(["/bin/sleep", "60"])
    fd = os.open("/etc/hostname", os.O_RDONLY)
    os.mkdir(run_folder)
    os.mkdir(base + "/s-left")
    try:
        found = leaks.leaked(before)
    finally:
        process.kill()
        process.wait()
        os.close(fd)
        os.rmdir(run_folder)
        os.rmdir(base + "/s-left")
        subprocess.run(["/usr/bin/python3", "-c", REMOVE_QUEUE, queue.stdout.strip()], check=True)
    assert found.keys() == {"processes", "descriptors", "run folders", "cgroups", "System V IPC"}
    assert [str(process.pid) in one for one in found["processes"]] == [True]
    assert found["descriptors"] == ["/etc/hostname"]
    assert found["run folders"] == [run_folder]
    assert found["cgroups"] == [base + "/s-left"]
    assert found["System V IPC"] == [f"msg {queue.stdout.strip()} of uid 0"]


MAKE_QUEUE = "import ctypes; print(ctypes.CDLL(None).msgget(0, 0o1600))"
REMOVE_QUEUE = "import ctypes, sys; sys.exit(ctypes.CDLL(None).msgctl(int(sys.argv[1]), 0, None) != 0)"


def test_what_is_left_in_a_kept_work_directory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "GRACE_S", 0.05)
    rf.run(["true"], isolation="process")
    before = leaks.snapshot()
    folder = next(iter(leaks.kept().folders))
    path = os.path.join(folder, "left")
    with open(path, "w"):
        pass
    try:
        assert leaks.leaked(before) == {"in what is kept": [f"{folder} isn't empty"]}
    finally:
        os.unlink(path)
