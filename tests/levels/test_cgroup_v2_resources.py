"""Limits, usage, changes and freezing on a host with nothing but cgroup v2, and scopes from a real systemd there.

The host is a guest of our own whose command is its root, with every capability (support/guest.py). In it runs a
systemd that manages uid 1000, as on any machine where somebody has logged in.
"""

from __future__ import annotations

import json
import os
import sysconfig
from typing import Any

import pytest

import ringfence as rf
from ringfence.levels.base import Command
from ringfence.levels.vm import start
from ringfence.levels.vm.qemu import start_qemu
from ringfence.levels.vm.vmm import Machine, Vmm
from ringfence.spec import Spec
from support.guest import Guest
from support.sandboxes import PROBE_FILE, SOURCES, need, need_level, need_root

SYSTEMD = "/lib/systemd/systemd"

AS_ROOT = r"""
import errno, json, os, threading, time
# init hands out no more than a workload's limits need.
open("/sys/fs/cgroup/cgroup.subtree_control", "w").write("+cpuset +io")
import ringfence as rf
from ringfence.levels.state import state
from ringfence.linux.cgroups import IoLimits, Limits
from ringfence.wire import launcher

probe = {"probe": rf.File(open("/work/probe", "rb").read(), 0o755)}
found = {}

def told(result):
    return {
        "reason": str(result.termination_reason),
        "usage": result.usage.to_json(),
        "applied": {one.rule: [one.requested, one.effective, one.mechanism] for one in result.applied},
    }

def run(isolation, *args, **limits):
    return told(rf.run(["./probe", *args], isolation=isolation, files=probe, limits=rf.Limits(**limits)))

for isolation in ("process", "container"):
    here = found[isolation] = {
        "all": run(isolation, "spin-children", "3", "0.2", memory="64M", swap="8M", cpu_weight=250, cpuset=0, pids=30),
        "spin": run(isolation, "spin-children", "2", "1", cpus=0.2),
        "hog": run(isolation, "hog", "96M", memory="32M"),
    }
    try:
        run(isolation, "exit", "0", io_read="1M")
        here["io"] = ""
    except rf.CannotEnforce as error:
        here["io"] = str(error)
    with rf.Sandbox(isolation=isolation, limits=rf.Limits(memory="64M"), files=probe) as sandbox:
        here["set"] = [[one.rule, one.effective] for one in sandbox.set_limits(rf.Limits(memory="32M", pids=9, cpus=2))]
        here["after"] = told(sandbox.run(["./probe", "hog", "48M"]))
        sandbox.run(["/bin/sh", "-c", "while :; do :; done & exit 0"])
        sandbox.pause()
        before = sandbox.stats().cpu_ns
        time.sleep(0.3)
        still = sandbox.stats().cpu_ns == before
        sandbox.resume()
        time.sleep(0.5)
        here["pause"] = [still, sandbox.stats().cpu_ns > before]
        sandbox.pause()

device = tuple(map(int, open("/sys/block/vda/dev").read().split(":")))
live = state().cgroup(Limits(memory_bytes=64 << 20), live=True)
live.update(Limits(io=IoLimits(device=device, read_bytes=1 << 20, write_ops=50)))
found["live"] = {one.rule: one.effective for one in live.in_force}
live.remove()
launcher._at_exit()
found["left"] = [name for _, names, _ in os.walk("/sys/fs/cgroup") for name in names if "ringfence-" in name]
"""

AS_USER = r"""
import json, os
import ringfence as rf
from ringfence.wire import launcher

def where(pid):
    return open(f"/proc/{pid}/cgroup").read().strip().removeprefix("0::")

own = where("self")
layout = rf.host().cgroups
found = {"home": layout.home, "usable": {one.name: one.usable for one in layout.controllers}}
probe = {"probe": rf.File(open("/tmp/u/probe", "rb").read(), 0o755)}
plain = rf.run(["./probe", "exit", "0"], isolation="process", files=probe)
found["plain"] = [plain.usage.source, where(launcher.launcher().pid) == own]
for isolation in ("process", "container"):
    limits = rf.Limits(memory="32M", pids=30, cpus=0.5)
    hog = rf.run(["./probe", "hog", "96M"], isolation=isolation, files=probe, limits=limits)
    found[isolation] = [str(hog.termination_reason), {one.rule: one.effective for one in hog.applied}]
found["launcher"] = where(launcher.launcher().pid)
# At the process level the workload could ask systemd itself. It is refused, and tried once more without the check.
leaves = '''
import os, time
from ringfence.linux.dbus import Bus, Variant
def own(): return open("/proc/self/cgroup").read().strip()
before = own()
scope = ("away.scope", "fail", [("PIDs", Variant("au", [os.getpid()]))], [])
with Bus("/run/user/1000/systemd/private", hello=False) as bus:
    manager = "org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"
    bus.call(*manager, "StartTransientUnit", "ssa(sv)a(sa(sv))", scope)
for _ in range(200):
    if own() != before: break
    time.sleep(0.02)
print(before, own())
'''
from ringfence.api import execute, level, run_spec
from ringfence.spec import Spec
options = {"isolation": "process", "network": "host", "env": {"PYTHONPATH": "/src:/site"}, "text": True}
spec = Spec.make(["/usr/bin/python3", "-c", leaves], limits=rf.Limits(pids=30), **options)
try:
    found["leaves"] = [run_spec(spec).stdout]
except rf.CannotEnforce as error:
    found["leaves"] = [[one.rule for one in error.unmet]]
with level("process").open(spec, rf.host()) as sandbox:
    ran = execute(sandbox, spec, 0, once=True)
found["leaves"] += (ran.stdout or ran.stderr).split()
found["moved"] = where("self") != own
launcher._at_exit()
print(json.dumps(found))
"""

WITH_SYSTEMD = r"""
import shutil, subprocess

def write(path, text):
    open(path, "w").write(text)

TOP = "/sys/fs/cgroup"
write(TOP + "/cgroup.subtree_control", "+memory +pids +cpu +io +cpuset")
os.mkdir(TOP + "/user")
write(TOP + "/user/cgroup.subtree_control", "+memory +pids +cpu +io +cpuset")
manager = TOP + "/user/manager"
os.mkdir(manager)
os.mkdir(manager + "/session")  # of root, as a session is: not delegated
for path in (manager, *(f"{manager}/cgroup.{name}" for name in ("procs", "subtree_control", "threads"))):
    os.chown(path, 1000, 1000)
for path in ("/run/systemd/system", "/run/user/1000", "/tmp/u"):
    os.makedirs(path)
for path in ("/run/user/1000", "/tmp/u"):
    os.chown(path, 1000, 1000)
os.chmod("/run/user/1000", 0o700)
shutil.copy("/work/probe", "/tmp/u/probe")
os.chmod("/tmp/u/probe", 0o755)
env = {"XDG_RUNTIME_DIR": "/run/user/1000", "HOME": "/tmp/u", "PATH": "/usr/bin:/bin", "PYTHONPATH": "/src:/site",
       "PYTHONDONTWRITEBYTECODE": "1"}

def command(cgroup, *argv):
    user = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"]
    return ["/bin/sh", "-c", f'echo 0 >{cgroup}/cgroup.procs; exec "$@"', "sh", *user, *argv]

daemon = subprocess.Popen(command(manager, SYSTEMD, "--user"), env=env, stderr=subprocess.DEVNULL)
for _ in range(300):
    if os.path.exists("/run/user/1000/systemd/private") or daemon.poll() is not None:
        break
    time.sleep(0.1)
time.sleep(0.5)
done = subprocess.run(command(manager + "/session", "/usr/bin/python3", "-c", AS_USER), env=env, capture_output=True,
                      text=True, cwd="/tmp/u")
found["user"] = json.loads(done.stdout) if done.returncode == 0 else done.stderr
for _ in range(50):  # systemd removes an empty scope in its own time
    scopes = [name for _, names, _ in os.walk(TOP) for name in names if "ringfence-" in name]
    if not scopes:
        break
    time.sleep(0.1)
found["scopes"] = scopes
daemon.terminate()
daemon.wait()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both told. One guest for all: its boot takes most of the time."""
    disk = tmp_path_factory.mktemp("disk") / "disk"
    disk.write_bytes(bytes(8 << 20))

    def with_disk(machine: Machine, *more: Any, **named: Any) -> Vmm:
        return start_qemu(machine.replace(disks=(str(disk),)), *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "start_qemu", with_disk)
        patch.setattr(start.Guest, "_find", lambda _: None)  # no template has that disk
        return _run()


def _run() -> dict[str, Any]:
    need_root()
    need_level("vm")
    parts = [AS_ROOT]
    if os.path.exists(SYSTEMD):
        parts += [f"SYSTEMD = {SYSTEMD!r}\nAS_USER = {AS_USER!r}", WITH_SYSTEMD]
    parts.append("print(json.dumps(found))")
    spec = Spec.make(
        ["/usr/bin/python3", "-c", "\n".join(parts)],
        isolation="vm",
        user=0,
        env={"PYTHONPATH": "/src:/site", "PYTHONDONTWRITEBYTECODE": "1"},
        files=PROBE_FILE,
        mounts=[rf.Mount(SOURCES, "/src"), rf.Mount(sysconfig.get_path("purelib"), "/site")],
        limits=rf.Limits(wall_time=240),
    )
    with Guest(spec, rf.host()) as guest:
        outcome = guest.run(
            Command(
                argv=spec.argv,
                env=spec.environment(b"/work"),
                cwd=b"/work",
                input=None,
                wall_time_ns=spec.limits.wall_time_ns,
                output_bytes=1 << 20,
                once=True,
            )
        )
    assert outcome.exited is not None
    assert outcome.exited.exit_code == 0, outcome.stderr.decode()
    told: dict[str, Any] = json.loads(outcome.stdout)
    return told


@pytest.mark.parametrize("inside", ["process", "container"])
def test_vm_limits_and_usage_on_pure_cgroup_v2(found: dict[str, Any], inside: str) -> None:
    ran = found[inside]
    applied = ran["all"]["applied"]
    assert applied["memory"] == [64 << 20, 64 << 20, "cgroup v2 memory.max"]
    assert applied["swap"] == [8 << 20, 8 << 20, "cgroup v2 memory.swap.max"]
    assert applied["cpu_weight"] == [250, 250, "cgroup v2 cpu.weight"]
    assert applied["cpuset"] == [[0], [0], "cgroup v2 cpuset.cpus.effective"]
    assert applied["pids"][:2] == [30, 30]
    usage = ran["all"]["usage"]
    assert usage["source"] == "cgroup v2"
    assert usage["pids_peak"] == 4
    assert abs(usage["cpu_user_ns"] + usage["cpu_system_ns"] - usage["cpu_ns"]) <= 2000
    # Three that spin on one CPU wait for it.
    assert usage["cpu_pressure_ns"] > 10_000_000
    assert usage["memory_pressure_ns"] is not None
    assert usage["io_pressure_ns"] is not None
    assert ran["spin"]["usage"]["throttled_ns"] > 10_000_000
    assert ran["all"]["usage"]["throttled_ns"] == 0
    assert (ran["hog"]["reason"], ran["hog"]["usage"]["oom_kills"] > 0) == ("memory", True)
    assert "/tmp is on tmpfs without one block device of its own" in ran["io"]


@pytest.mark.parametrize("inside", ["process", "container"])
def test_vm_changes_and_freezing_on_pure_cgroup_v2(found: dict[str, Any], inside: str) -> None:
    ran = found[inside]
    assert ran["set"] == [["memory", 32 << 20], ["cpus", 2.0], ["pids", 9]]
    assert ran["after"]["reason"] == "memory"
    assert ran["pause"] == [True, True]


def test_vm_limits_of_a_disk_on_pure_cgroup_v2(found: dict[str, Any]) -> None:
    assert found["live"] == {"memory": 64 << 20, "io_read": 1 << 20, "io_write_ops": 50}
    assert found["left"] == []


def test_vm_scope_of_a_real_systemd(found: dict[str, Any]) -> None:
    """An unprivileged user whose own cgroup isn't delegated has limits all the same, and is itself not moved."""
    need("systemd, for the guest's userland", os.path.exists(SYSTEMD))
    user = found["user"]
    assert isinstance(user, dict), user
    assert user["home"].startswith("in a scope that systemd is asked for by /run/user/1000/")
    assert all(user["usable"].values())
    assert user["plain"] == ["wait4", True]  # nobody is asked where nothing is limited
    for isolation in ("process", "container"):
        reason, applied = user[isolation]
        assert reason == "memory"
        assert (applied["memory"], applied["pids"], applied["cpus"]) == (32 << 20, 30, 0.5)
    assert user["launcher"].startswith("/user/manager/app.slice/ringfence-")
    assert user["launcher"].endswith(".scope/ringfence-self")
    assert user["moved"] is False
    # What it would do for a workload that asks: pids isn't limited there.
    refused, before, after = user["leaves"]
    assert refused == ["pids"]
    assert "ringfence-" in before
    assert after.endswith("/away.scope")
    assert found["scopes"] == []
