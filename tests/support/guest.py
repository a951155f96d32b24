"""A guest of our own as the host of these tests: Debian's kernel, nothing but cgroup v2, root or an unprivileged user.

What a workload never gets, this guest's command does: it is root with every capability, and sees its kernel's cgroups.
The guest itself is jailed like every other one.
"""

from __future__ import annotations

import os
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import ringfence as rf
from ringfence.levels.base import Command
from ringfence.levels.vm import VmSandbox
from ringfence.spec import Spec
from ringfence.wire import guest_messages, messages
from ringfence.wire.messages import MountStep

REPOSITORY = Path(__file__).resolve().parents[2]
ALL_CAPABILITIES = (1 << 41) - 1
UID = 1000

# Both callers at once, each on a CPU. The user's cgroup is delegated as a service manager does it; the suite's own
# processes are the only ones in it. What is printed at the end is what is left when all is over.
SCRIPT = """
cd /repo || exit
sed 's/[a-z]*/+&/g' /sys/fs/cgroup/cgroup.controllers >/tmp/controllers
cat /tmp/controllers >/sys/fs/cgroup/cgroup.subtree_control || exit
mkdir /sys/fs/cgroup/user /tmp/user /tmp/root || exit
chown UID:UID /tmp/user /sys/fs/cgroup/user /sys/fs/cgroup/user/cgroup.procs /sys/fs/cgroup/user/cgroup.threads \
    /sys/fs/cgroup/user/cgroup.subtree_control || exit
suite() {
    who=$1; shift
    export HOME=/tmp/$who
    timeout -s INT SECONDS "$@" python3 -m pytest -p pytest_timeout -p support.in_a_guest -p no:cacheprovider \
        --junitxml=/tmp/$who/junit.xml --override-ini=junit_logging=all --tb=short -q SELECTION >/tmp/$who/printed 2>&1
    echo $? >/tmp/$who/status
}
suite root &
suite user sh -c 'echo 0 >/sys/fs/cgroup/user/cgroup.procs &&
    exec setpriv --reuid UID --regid UID --clear-groups "$@"' - &
wait
for who in user root; do mkdir /work/$who; cp /tmp/$who/junit.xml /tmp/$who/printed /tmp/$who/status /work/$who/; done
find /sys/fs/cgroup -name 'ringfence-*'
ls -d /tmp/ringfence-* 2>/dev/null
cat /proc/[0-9]*/comm | grep -e ringfence -e probe
exit 0
"""


class Guest(VmSandbox):
    """A guest whose command is root with every capability, and sees /sys with the guest's cgroups."""

    def _plan(self) -> messages.Plan:
        plan = guest_messages.GuestPlan()
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


class Case(NamedTuple):
    """A test that ran in the guest. how: "passed", "failed", "skipped"; text: why, and what it printed."""

    name: str
    how: str
    text: str
    seconds: float


class Suite(NamedTuple):
    """One caller's run: pytest's exit status, all that it printed, each test."""

    status: int
    printed: str
    cases: list[Case]


def run_suites(*selection: str, seconds: int, everything: bool) -> tuple[dict[str, Suite], str]:
    """Runs these tests in one guest as root and as an unprivileged user: by caller, and what was left in the end.

    seconds: how long each may take. everything: also what is left out of the usual run (`in_a_guest.LONG`).
    """
    words = {"UID": str(UID), "SECONDS": str(seconds), "SELECTION": " ".join(f"'{one}'" for one in selection)}
    script = SCRIPT
    for word, value in words.items():
        script = script.replace(word, value)
    paths = ["/repo/src", "/repo/tests", "/repo/tests/unit", "/repo/core", "/site"]
    spec = Spec.make(
        ["/bin/bash", "-c", script],
        isolation="vm",
        user=0,
        env={
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "RINGFENCE_TEST_IN_A_GUEST": "everything" if everything else "some",
            "TERM": "dumb",
        },
        mounts=[rf.Mount(REPOSITORY, "/repo"), rf.Mount(sysconfig.get_path("purelib"), "/site")],
        collect=["*/*"],
        limits=rf.Limits(cpus=2, memory="1536M", wall_time=seconds + 60),
    )
    with Guest(spec, rf.host()) as guest:
        command = Command(
            argv=spec.argv,
            env=spec.environment(b"/work"),
            cwd=b"/work",
            input=None,
            wall_time_ns=spec.limits.wall_time_ns,
            output_bytes=1 << 20,
            once=False,
        )
        outcome = guest.run(command)
        said = f"{outcome.stopped} {outcome.exited} {outcome.stdout!r} {outcome.stderr!r}"
        assert outcome.exited is not None and outcome.exited.exit_code == 0, said
        files = guest.collect(spec.collect, 64 << 20)
    suites = {}
    for who in ("root", "user"):
        printed = files[f"{who}/printed"].decode(errors="replace")
        assert f"{who}/junit.xml" in files, printed
        status = int(files[f"{who}/status"])
        suites[who] = Suite(status, printed, _cases(files[f"{who}/junit.xml"]))
    return suites, outcome.stdout.decode()


def _cases(xml: bytes) -> list[Case]:
    found = []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        how, text = "passed", []
        for part in case:
            if part.tag in ("failure", "error"):
                how = "failed"
            elif part.tag == "skipped" and how == "passed":
                how = "skipped"
            if part.tag in ("failure", "error", "skipped"):
                text.append(part.get("message", ""))
            if how == "failed" and part.text:
                text.append(part.text)
        found.append(Case(name, how, "\n".join(text), float(case.get("time", 0))))
    return found
