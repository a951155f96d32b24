"""Limits beyond memory and processes, what a sandbox used, and changing the limits of one that runs.

What version of cgroups this machine has decides what is tested; pure version 2 has its own test, in a guest.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

import ringfence as rf
from ringfence.levels.state import work_folder
from ringfence.linux import disks
from support.sandboxes import (
    EXITED_0,
    LOCAL_LEVELS,
    PROBE_FILE,
    applied,
    ended,
    host_without,
    need,
    need_cgroup,
    output,
    run_probe,
    unconfined_python,
)
from support.sandboxes import python as caller

IO_RULES = {"io_read": "4M", "io_write": "4M", "io_read_ops": 500, "io_write_ops": 500}


def version(controller: str) -> int:
    return rf.host().cgroups.controller(controller).version


def need_disk() -> None:
    """A disk below the work directories, for limits of input and output."""
    need_cgroup("io")
    found = disks.disk_of(work_folder(passable=rf.host().privileged))
    need("a disk below the work directories", not found.reason)


def python(isolation: str, code: str, *args: str, **options: Any) -> rf.Result:
    return rf.run(["/usr/bin/python3", "-I", "-S", "-c", code, *args], isolation=isolation, **options)


# ---- in force, as read back ----


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_swap_on_top_of_memory(isolation: str) -> None:
    need_cgroup("memory")
    found = applied(run_probe(isolation, "exit", "0", limits=rf.Limits(memory="64M", swap="16M")))
    assert (found["memory"].requested, found["memory"].effective) == (64 << 20, 64 << 20)
    assert (found["swap"].requested, found["swap"].effective) == (16 << 20, 16 << 20)
    # Without it memory and swap together are what was given as memory.
    found = applied(run_probe(isolation, "exit", "0", limits=rf.Limits(memory="64M")))
    assert found["memory"].effective == 64 << 20
    assert "swap" not in found


@pytest.mark.parametrize("weight", [1, 3, 100, 250, 10_000])
@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_cpu_weight(isolation: str, weight: int) -> None:
    need_cgroup("cpu")
    found = applied(run_probe(isolation, "exit", "0", limits=rf.Limits(cpu_weight=weight)))["cpu_weight"]
    assert (found.requested, found.effective) == (weight, weight)


ESCAPE = """
import os, sys
before = sorted(os.sched_getaffinity(0))
try:
    os.sched_setaffinity(0, {int(one) for one in sys.argv[1].split(",")})
    tried = "ok"
except OSError as error:
    tried = str(error.errno)
print(before, tried)
"""


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_cpuset_and_the_workload_cannot_undo_it(isolation: str) -> None:
    need_cgroup("cpuset")
    cpus = sorted(os.sched_getaffinity(0))
    need("a second CPU", len(cpus) > 1)
    inside, outside = cpus[1], cpus[0]
    result = python(isolation, ESCAPE, str(outside), limits=rf.Limits(cpuset=inside))
    assert output(result) == f"[{inside}] 22\n".encode()  # EINVAL: none of those is in the set
    assert applied(result)["cpuset"].effective == (inside,)
    assert applied(result)["cpuset"].requested == (inside,)
    # Unconfined the same attempt goes well.
    assert unconfined_python(ESCAPE, str(outside)) == f"{cpus} ok\n".encode()
    assert output(python(isolation, ESCAPE, str(outside))) == f"{cpus} ok\n".encode()


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_input_from_the_disk(isolation: str) -> None:
    """12 MiB past the page cache, at 6 MiB a second."""
    need_disk()
    files = {"data": b"x" * (12 << 20)}
    code = (
        "import mmap, os, time\n"
        "fd = os.open('data', os.O_RDONLY | os.O_DIRECT)\n"
        "os.fsync(fd)\n"
        "page = mmap.mmap(-1, 1 << 20)\n"
        "begin = time.monotonic()\n"
        "while os.readv(fd, [page]): pass\n"
        "print(time.monotonic() - begin)\n"
    )
    limits = rf.Limits(io_read="6M", io_read_ops=10_000)
    limited = python(isolation, code, files=files, limits=limits)
    free = python(isolation, code, files=files)
    found = applied(limited)
    assert (found["io_read"].effective, found["io_read_ops"].effective) == (6 << 20, 10_000)
    assert float(output(limited)) > 1.5
    assert float(output(free)) < 1.0
    assert limited.usage.io_read_bytes is not None
    assert limited.usage.io_read_bytes >= 12 << 20
    # Without the controller init tells, of what it has reaped.
    assert free.usage.io_read_bytes is not None
    assert free.usage.io_read_bytes >= 12 << 20


# ---- what is refused ----


def refused(isolation: str, on: Any = None, **limits: Any) -> dict[str, tuple[str, str | None]]:
    from ringfence.api import run_spec
    from ringfence.spec import Spec

    with pytest.raises(rf.CannotEnforce) as caught:
        run_spec(Spec.make(["true"], isolation=isolation, limits=rf.Limits(**limits)), on=on)
    return {one.rule: (one.reason, one.help) for one in caught.value.unmet}


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_writes_are_refused_where_they_are_on_nobodys_account(isolation: str) -> None:
    need_disk()
    need("cgroup v1", version("io") == 1)
    found = refused(isolation, io_write="4M", io_write_ops=100)
    assert set(found) == {"io_write", "io_write_ops"}
    for reason, help in found.values():
        assert "page cache" in reason
        assert help is not None
        assert "cgroup v2" in help


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_folder_without_a_disk(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_disk()
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    reason, help = refused(isolation, io_read="4M")["io_read"]
    assert reason == "/dev/shm is on tmpfs without one block device of its own"
    assert help is not None


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_cpus_that_are_not_there(isolation: str) -> None:
    need_cgroup("cpuset")
    reason, _ = refused(isolation, cpuset="0,8191")["cpuset"]
    assert reason.startswith("ringfence's own cgroup may not use CPU 8191, only 0")


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_without_the_controllers_each_rule_is_refused(isolation: str) -> None:
    """sched_setaffinity would be something else than a cpuset: the workload could undo it."""
    lacking = host_without("memory", "cpu", "cpuset", "io")
    limits = dict(memory="64M", swap=0, cpus=1, cpu_weight=50, cpuset=0, **IO_RULES)
    found = refused(isolation, on=lacking, **limits)
    assert set(found) == set(limits)
    assert {reason for reason, _ in found.values()} == {
        f"no {name} controller is mounted here" for name in ("memory", "cpu", "cpuset", "io")
    }


def test_a_guest_has_no_swap_and_no_disk_to_limit() -> None:
    from ringfence.api import level

    able = level("vm").abilities(rf.host())
    for rule in ("swap", *IO_RULES):
        assert not able[rule].available
        assert able[rule].reason
        assert able[rule].help


# ---- usage ----


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_throttling_is_told(isolation: str) -> None:
    """Two spinning processes at a fifth of a CPU wait most of the time; without the limit they never wait for it."""
    need_cgroup("cpu")
    result = run_probe(isolation, "spin-children", "2", "1", limits=rf.Limits(cpus=0.2))
    assert ended(result) == EXITED_0
    usage = result.usage
    assert usage.throttled_ns is not None
    assert usage.cpu_ns is not None
    assert usage.wall_ns is not None
    assert usage.throttled_ns > 10_000_000  # a busy machine leaves less to be held back
    assert usage.cpu_ns < 0.45 * usage.wall_ns
    free = run_probe(isolation, "spin-children", "2", "1", limits=rf.Limits(cpus=4)).usage
    assert free.throttled_ns == 0


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_memory_kills_are_counted(isolation: str) -> None:
    need_cgroup("memory")
    limits = rf.Limits(memory="64M", wall_time=60)
    assert applied(run_probe(isolation, "exit", "0", limits=limits))["memory"].effective == 64 << 20
    result = run_probe(isolation, "hog", "1G", limits=limits)
    assert result.termination_reason == "memory"
    assert result.usage.oom_kills == 1
    assert run_probe(isolation, "hog", "16M", limits=limits).usage.oom_kills == 0


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_user_and_system_time(isolation: str) -> None:
    need_cgroup("cpuacct")
    user = run_probe(isolation, "spin", "0.3").usage
    code = "import os\nfd = os.open('/dev/zero', os.O_RDONLY)\nfor _ in range(60): os.read(fd, 1 << 24)"
    system = python(isolation, code).usage
    shares = []
    for usage in (user, system):
        assert usage.cpu_ns is not None
        assert usage.cpu_user_ns is not None
        assert usage.cpu_system_ns is not None
        assert abs(usage.cpu_user_ns + usage.cpu_system_ns - usage.cpu_ns) <= 2000  # v2 tells whole microseconds
        shares.append(usage.cpu_user_ns / usage.cpu_ns)
    assert shares[0] > 0.8
    assert shares[1] < 0.5


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_most_processes_at_once(isolation: str) -> None:
    need_cgroup("pids")
    result = run_probe(isolation, "spin-children", "5", "0.1", limits=rf.Limits(pids=77))
    assert ended(result) == EXITED_0
    assert result.usage.pids_peak in (6, None)  # None before Linux 6.1
    assert json.loads(json.dumps(result.to_json()))["usage"]["pids_peak"] == result.usage.pids_peak


# ---- a sandbox that stays ----


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_limits_of_a_living_sandbox(isolation: str) -> None:
    for name in ("memory", "cpu", "cpuset", "pids"):
        need_cgroup(name)
    cpu = max(os.sched_getaffinity(0))
    with rf.Sandbox(isolation=isolation, limits=rf.Limits(memory="128M"), files=PROBE_FILE) as sandbox:
        assert ended(sandbox.run(["./probe", "hog", "96M"])) == EXITED_0
        found = {one.rule: one for one in sandbox.set_limits(rf.Limits(memory="64M", cpus=0.2, pids=20, cpuset=cpu))}
        effective = {rule: found[rule].effective for rule in ("memory", "cpus", "pids", "cpuset")}
        assert effective == {"memory": 64 << 20, "cpus": 0.2, "pids": 20, "cpuset": (cpu,)}
        hog = sandbox.run(["./probe", "hog", "96M"])
        assert (hog.termination_reason, hog.usage.oom_kills) == ("memory", 1)
        spin = sandbox.run(["./probe", "spin-children", "2", "1"])
        assert (ended(spin), spin.usage.oom_kills) == (EXITED_0, 0)
        assert applied(spin)["cpus"].effective == 0.2
        assert spin.usage.throttled_ns is not None
        assert spin.usage.throttled_ns > 10_000_000
        assert sandbox.stats().oom_kills == 1
        with pytest.raises(rf.CannotEnforce, match="fixed when the sandbox is opened"):
            sandbox.set_limits(rf.Limits(cpu_time=5))


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_paused_nothing_of_it_runs(isolation: str) -> None:
    need_cgroup("freezer")
    with rf.Sandbox(isolation=isolation) as sandbox:
        assert ended(sandbox.run(["sh", "-c", "while :; do :; done & exit 0"])) == EXITED_0
        sandbox.pause()
        before = sandbox.stats().cpu_ns
        with pytest.raises(rf.SpecError, match="paused"):
            sandbox.run(["true"])
        time.sleep(0.3)
        assert sandbox.stats().cpu_ns == before
        sandbox.resume()
        deadline = time.monotonic() + 10
        while sandbox.stats().cpu_ns == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sandbox.stats().cpu_ns != before
        assert ended(sandbox.run(["true"])) == EXITED_0
        sandbox.pause()  # and closed so


FROZEN = """
import os, signal, sys, threading, time
import ringfence as rf
from ringfence.api import check_spec
from ringfence.levels.base import Command
from ringfence.spec import Spec

spec = Spec.make(["/bin/sh", "-c", "sleep 60 & sleep 60"], isolation=sys.argv[1])
level, host = check_spec(spec)
sandbox = level.open(spec, host, stays=True)
command = Command(argv=spec.argv, env=spec.environment(sandbox.home), cwd=sandbox.home, input=None, wall_time_ns=None,
                  output_bytes=1000, once=False)
threading.Thread(target=sandbox.run, args=(command,), daemon=True).start()
deadline = time.monotonic() + 30
while len(sandbox.cgroup.processes()) < 3 and time.monotonic() < deadline:
    time.sleep(0.01)
sandbox.cgroup.freeze()
print(len(sandbox.cgroup.processes()), sandbox.cgroup.frozen, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_killed_caller_leaves_nothing_frozen(isolation: str) -> None:
    """Version 1 lets nothing die that is frozen. That nothing of it is left is what the leak fixture asserts."""
    need_cgroup("freezer")
    with caller(FROZEN, isolation) as process:
        printed, _ = process.communicate(timeout=60)
    assert printed == b"3 True\n"
    assert process.returncode == -9
