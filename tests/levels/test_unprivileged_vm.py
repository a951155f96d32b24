"""The vm level of an unprivileged caller without subordinate ids, on both of QEMU's machines."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringfence import _cache
from ringfence.linux import surroundings
from support import leaks
from support.rootless import UID, Caller, caller
from support.sandboxes import need, need_level, need_root


@pytest.fixture(scope="module")
def alone() -> Iterator[Caller]:
    """A caller with nothing but its own id, and the guests' kernel in its cache."""
    need_root()
    need_level("vm")
    need("user namespaces", surroundings.find().no_user_namespaces(privileged=False) is None)
    with caller(subordinate=False) as found:
        kept = found.home / "cache" / "kernels"
        shutil.copytree(Path(_cache.root()) / "kernels", kept, symlinks=True)
        (found.home / "data").mkdir()
        for one in (*found.home.rglob("*"),):
            os.chown(one, UID, UID, follow_symlinks=False)
        yield found


ALL_OF_A_RUN = """
os.environ["RINGFENCE_MACHINE"], data = sys.argv[1:]
script = '''cat; cat given /data/theirs; id -u; stat -c %u /data/theirs; echo of the guest >/data/new
mkdir out; echo made >out/file; grep -E 'CapEff|NoNewPrivs|^Seccomp:' /proc/self/status; wc -l </proc/self/net/dev'''
r = rf.run(["sh", "-c", script], isolation="vm", input="from stdin ", files={"given": b"given "}, collect=["out/*"],
           mounts=[rf.Mount(data, "/data", writable=True)], limits=rf.Limits(memory="128M", pids=50, wall_time=60))
print(json.dumps({**show(r), "privileged": rf.host().privileged}))
"""


@pytest.mark.parametrize("board", ["microvm", "q35"])
def test_all_of_a_run(alone: Caller, board: str) -> None:
    data = alone.home / "data"
    for name in ("theirs", "new"):
        (data / name).unlink(missing_ok=True)
    (data / "theirs").write_text("theirs ")
    os.chown(data / "theirs", UID, UID)
    found: dict[str, Any] = alone.run(ALL_OF_A_RUN, board, str(data))
    assert not found["privileged"]
    assert found["ended"] == ["exited", 0, None], found
    lines = found["stdout"].splitlines()
    # Who it is in the guest owns what its caller owns outside.
    assert lines[:2] == ["from stdin given theirs 1000", "1000"]
    assert [line.split() for line in lines[2:5]] == [["CapEff:", "0" * 16], ["NoNewPrivs:", "1"], ["Seccomp:", "2"]]
    assert lines[5] == "3"  # two lines of a head, and lo
    assert found["files"] == {"out/file": "made\n"}
    assert (data / "new").read_text() == "of the guest\n"
    assert (data / "new").stat().st_uid == UID
    applied = found["applied"]
    assert applied["machine"][2] == f"QEMU {board}"
    assert applied["memory"][1] == str(128 << 20)
    assert applied["pids"][1] == "50"
    jail = applied["vmm jail"][1]
    assert all(name in jail for name in ("user", "mnt", "pid", "net", "ipc", "uts"))
    assert "capabilities none; seccomp mode 2" in jail


def test_nothing_is_left_of_a_killed_caller(alone: Caller) -> None:
    code = """
import ringfence as rf
with rf.Sandbox(isolation="vm") as sandbox:
    sandbox.run(["true"])
    print("runs", flush=True)
    sandbox.run(["sleep", "60"])
"""
    with alone.start(code) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"runs\n"
            assert any("qemu" in one for one in alone.left())
        finally:
            process.send_signal(signal.SIGKILL)
    assert leaks.settled(alone.left, leaks.GRACE_S) == []
