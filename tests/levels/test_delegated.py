"""An unprivileged user whom an administrator has given a cgroup, without systemd: cgroup v1, and the hybrid layout.

That of version 2 is tested in a guest (test_cgroup_v2_resources.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from support.sandboxes import SOURCES, need, need_cgroup, need_root

UID = 65_432  # no account's
CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "cpuset", "io", "freezer")

CODE = r"""
import json, os, sys, time
import ringfence as rf

found = {"usable": {one.name: [one.usable, one.reason] for one in rf.host().cgroups.controllers}}
limits = dict(memory="64M", swap="8M", cpus=0.5, cpu_weight=50, cpuset=int(sys.argv[1]), pids=20)
for isolation in ("process", "container"):
    here = found[isolation] = {}
    try:
        command = ["/bin/sh", "-c", "id -u; grep Cpus_allowed_list /proc/self/status"]
        ran = rf.run(command, isolation=isolation, limits=rf.Limits(**limits), text=True)
        here["stdout"] = ran.stdout.split()
        here["applied"] = {one.rule: one.effective for one in ran.applied}
        here["source"] = ran.usage.source
        with rf.Sandbox(isolation=isolation) as sandbox:
            sandbox.run(["/bin/sh", "-c", "while :; do :; done & exit 0"])
            sandbox.pause()
            before = sandbox.stats().cpu_ns
            time.sleep(0.2)
            here["paused"] = sandbox.stats().cpu_ns == before
            sandbox.resume()
            here["set"] = [[one.rule, one.effective] for one in sandbox.set_limits(rf.Limits(memory="32M", pids=9))]
    except rf.CannotEnforce as error:
        here["refused"] = sorted(one.rule for one in error.unmet)
print(json.dumps(found))
"""


@pytest.fixture
def delegated() -> Iterator[dict[str, Path]]:
    """A cgroup of that user's in each hierarchy that version 1 has, below this process's own."""
    need_root()
    made: dict[str, Path] = {}
    for name in CONTROLLERS:
        need_cgroup(name)
        controller = rf.host().cgroups.controller(name)
        need("cgroup v1", controller.version == 1)
        folder = Path(os.fsdecode(controller.path)) / f"delegated-{os.getpid()}"
        made[name] = folder
        if folder.exists():
            continue  # controllers that are mounted together
        folder.mkdir()
        for file in ("cpuset.cpus", "cpuset.mems"):
            if (folder / file).exists():
                (folder / file).write_text((folder.parent / file).read_text())
        for path in (folder, folder / "cgroup.procs", folder / "tasks"):
            os.chown(path, UID, UID)
    yield made
    for folder in set(made.values()):
        assert [one.name for one in folder.iterdir() if one.is_dir()] == []
        folder.rmdir()


@pytest.fixture
def home() -> Iterator[Path]:
    """What that user can read: this package, wherever it is installed from."""
    folder = Path(tempfile.mkdtemp(prefix="delegated-"))
    try:
        shutil.copytree(SOURCES / "ringfence", folder / "ringfence")
        for path in Path(sysconfig.get_path("purelib")).glob("pyseccomp*"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        (folder / "home").mkdir()
        os.chown(folder / "home", UID, UID)
        yield folder
    finally:
        shutil.rmtree(folder)


def as_user(home: Path, cgroups: set[Path], code: str, *args: str) -> Any:
    joins = "".join(f"echo 0 >{folder}/tasks && " for folder in cgroups)
    user = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "/usr/bin/python3", "-c", code, *args]
    done = subprocess.run(
        ["/bin/sh", "-c", joins + 'exec "$@"', "sh", *user],
        env={"PYTHONPATH": str(home), "HOME": str(home / "home"), "PATH": "/usr/bin:/bin"},
        cwd=home / "home",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_limits_in_a_delegated_cgroup(delegated: dict[str, Path], home: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    found = as_user(home, set(delegated.values()), CODE, str(cpu))
    assert {name: usable for name, (usable, _) in found["usable"].items()} == dict.fromkeys(CONTROLLERS, True)
    for isolation in ("process", "container"):
        here = found[isolation]
        inside = str(UID) if isolation == "process" else "1000"
        assert here["stdout"] == [inside, "Cpus_allowed_list:", str(cpu)]
        applied = here["applied"]
        assert (applied["memory"], applied["swap"], applied["pids"]) == (64 << 20, 8 << 20, 20)
        assert (applied["cpus"], applied["cpu_weight"], applied["cpuset"]) == (0.5, 50, [cpu])
        assert here["source"] == "cgroup v1"
        assert here["paused"] is True
        assert here["set"] == [["memory", 32 << 20], ["pids", 9]]


def test_without_one_every_limit_is_refused(home: Path) -> None:
    """The control: the same user, in this process's own cgroups."""
    need_root()
    need("cgroup v1", rf.host().cgroups.controller("memory").version == 1)
    found = as_user(home, set(), CODE, "0")
    assert not any(usable for usable, _ in found["usable"].values())
    assert all("isn't writable for this user (not delegated)" in reason for _, reason in found["usable"].values())
    for isolation in ("process", "container"):
        assert found[isolation]["refused"] == ["cpu_weight", "cpus", "cpuset", "memory", "pids", "swap"]


# What a workload does to lift its limits by its own cgroup's files, and what that came to.
LIFTS = r"""
import json, os, sys
import ringfence as rf
from ringfence.api import execute, level, run_spec
from ringfence.levels import filter
from ringfence.spec import Spec

files = r'''
import os
with open("/proc/self/cgroup") as file:
    [own] = [line.split(":", 2)[2].strip() for line in file if line.split(":")[1] == "pids"]
with open("/sys/fs/cgroup/pids" + own + "/pids.max", "w") as file:
    file.write("max")
print("lifted")
'''
unshared = "unshare -U -r -m -C sh -c 'mount -t cgroup -o pids none /tmp && echo max >/tmp/pids.max && echo lifted'"
detached = r'''
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
call = lambda *arguments: libc.syscall(*arguments)
assert libc.unshare(0x10000000 | 0x20000 | 0x02000000) == 0  # user, mount, cgroup
context = call(430, b"cgroup", 0)  # fsopen; these numbers are every architecture's
call(431, context, 0, b"pids", None, 0)  # fsconfig
call(431, context, 6, None, None, 0)
mount = call(432, context, 0, 0)  # fsmount, attached nowhere
os.write(os.open("pids.max", os.O_WRONLY, dir_fd=mount), b"max")
print("lifted")
'''
python = "/usr/bin/python3"
profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
    {"names": ["mount", "move_mount", "clone3"], "action": "SCMP_ACT_ERRNO"}]}
host = rf.host()
cases = {
    "no Landlock": ("process", [python, "-c", files], None, host.replace(landlock_abi=0)),
    "no filter": ("container", ["/bin/sh", "-c", unshared], None, host.replace(seccomp="no libseccomp")),
    "a detached mount": ("container", [python, "-c", detached], profile, host),
}

def attempt(name, on, unchecked=False):
    isolation, argv, seccomp, _ = cases[name]
    spec = Spec.make(argv, isolation=isolation, limits=rf.Limits(pids=20), seccomp=seccomp, text=True)
    if unchecked:
        filter._judged = lambda *_: []  # a profile is judged a second time, when it is compiled
        with level(isolation).open(spec, on) as sandbox:
            return execute(sandbox, spec, 0, once=True).stdout.strip()
    try:
        return run_spec(spec, on).stdout.strip()
    except rf.CannotEnforce as error:
        return sorted(one.rule for one in error.unmet)

refused = {name: attempt(name, case[3]) for name, case in cases.items()}
print(json.dumps({name: [refused[name], attempt(name, case[3], True)] for name, case in cases.items()}))
"""


def test_a_limit_that_could_be_lifted_is_refused(delegated: dict[str, Path], home: Path) -> None:
    """And could be: each is tried once more without the check."""
    found = as_user(home, set(delegated.values()), LIFTS)
    assert found == {
        "no Landlock": [["pids"], "lifted"],
        "no filter": [["pids"], "lifted"],
        "a detached mount": [["seccomp"], "lifted"],
    }
