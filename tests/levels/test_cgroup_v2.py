"""ringfence on a host with nothing but cgroup v2: inside a guest of our own, as its root.

What a workload never gets, this one guest does: it stands for the host here, and is jailed like every guest.
"""

from __future__ import annotations

import json
import os
import sysconfig
import time

import ringfence as rf
from ringfence.levels.base import Command
from ringfence.levels.vm import VmSandbox
from ringfence.spec import Spec
from ringfence.wire import messages
from ringfence.wire.messages import MountStep
from support.sandboxes import PROBE_FILE, SOURCES, need_level, need_root

ALL_CAPABILITIES = (1 << 41) - 1

SCRIPT = """
import json, os, sys
import ringfence as rf
from ringfence.linux import cgroups

probe = {"probe": rf.File(open("/work/probe", "rb").read(), 0o755)}

def run(isolation, *args, **limits):
    result = rf.run(["./probe", *args], isolation=isolation, files=probe, limits=rf.Limits(**limits))
    return {
        "reason": str(result.termination_reason),
        "stdout": result.stdout.decode(),
        "stderr": result.stderr.decode(),
        "peak": result.usage.memory_peak_bytes,
        "cpu": result.usage.cpu_ns,
        "source": result.usage.source,
        "applied": {one.rule: [one.requested, one.effective, one.mechanism] for one in result.applied},
    }

layout = cgroups.layout()
found = {"kind": layout.kind, "usable": {one.name: [one.usable, one.reason] for one in layout.controllers}}
for isolation in ("process", "container"):
    found[isolation] = {
        "plain": run(isolation, "exit", "0", memory="32M", pids=16, cpus=0.5),
        "memory": run(isolation, "hog", "96M", memory="32M", pids=16, wall_time=60),
        "pids": run(isolation, "forkbomb", "40", memory="32M", pids=16),
        "cpu_time": run(isolation, "spin", "60", cpu_time=1, wall_time=60),
    }
from ringfence.wire import launcher
launcher._at_exit()
found["left"] = [name for _, names, _ in os.walk("/sys/fs/cgroup") for name in names if "ringfence-" in name]
found["run"] = [name for name in os.listdir("/tmp") if name.startswith("ringfence-")]
print(json.dumps(found))
"""


class RootOfAGuest(VmSandbox):
    """A guest whose command is root with every capability, and sees /sys with the guest's cgroups."""

    def _plan(self) -> messages.Plan:
        plan = messages.Plan()
        plan.guest(realtime_ns=time.time_ns(), entropy=os.urandom(64), memory_bytes=0, pids=0, cpu_ns=0)
        plan.hostname(b"host")
        plan.loopback()
        plan.mounts(self._tree())
        plan.ids(0, 0)
        plan.capabilities(ALL_CAPABILITIES)
        plan.flags(enter=True, no_new_privs=False)
        plan.workdir(b"/work")
        return plan

    def _tree(self) -> list[MountStep]:
        *steps, seal = super()._tree()
        sys = [messages.filesystem(b"/sys", b"sysfs"), messages.filesystem(b"/sys/fs/cgroup", b"cgroup2")]
        return [*steps, *sys, seal]


def test_limits_on_pure_cgroup_v2() -> None:
    need_root()
    need_level("vm")

    spec = Spec.make(
        ["/usr/bin/python3", "-c", SCRIPT],
        isolation="vm",
        user=0,
        env={"PYTHONPATH": "/src:/site", "PYTHONDONTWRITEBYTECODE": "1"},
        files=PROBE_FILE,
        mounts=[rf.Mount(SOURCES, "/src"), rf.Mount(sysconfig.get_path("purelib"), "/site")],
        limits=rf.Limits(wall_time=240),
    )
    with RootOfAGuest(spec, rf.host()) as guest:
        command = Command(
            argv=spec.argv,
            env=spec.environment(b"/work"),
            cwd=b"/work",
            input=None,
            wall_time_ns=spec.limits.wall_time_ns,
            output_bytes=1 << 20,
            once=True,
        )
        outcome = guest.run(command)
    assert outcome.exited is not None
    assert outcome.exited.exit_code == 0, outcome.stderr.decode()
    found = json.loads(outcome.stdout)
    assert found["kind"] == "v2"
    # Those that the guest's init hands on; test_cgroup_v2_resources.py has them all.
    missing = {name: why for name, (usable, why) in found["usable"].items() if not usable}
    assert missing.keys() <= {"cpuset", "io"}, missing
    for isolation in ("process", "container"):
        _check(found[isolation])
    assert found["left"] == []
    assert found["run"] == []


def _check(ran: dict[str, dict[str, object]]) -> None:
    applied = ran["plain"]["applied"]
    assert isinstance(applied, dict)
    assert applied["memory"][:2] == [32 << 20, 32 << 20]
    assert "cgroup v2 memory.max" in applied["memory"][2]
    assert applied["pids"][:2] == [16, 16]
    assert "cgroup v2 pids.max" in applied["pids"][2]
    assert applied["cpus"][:2] == [0.5, 0.5]
    assert "cgroup v2 cpu.max" in applied["cpus"][2]
    assert ran["plain"]["reason"] == "exited"
    assert ran["plain"]["source"] == "cgroup v2"
    assert ran["memory"]["reason"] == "memory"
    peak = ran["memory"]["peak"]
    assert isinstance(peak, int)
    assert 16 << 20 < peak <= 33 << 20
    assert ran["pids"]["stdout"] == "forked 15 EAGAIN\n"
    assert ran["cpu_time"]["reason"] == "cpu_time"
