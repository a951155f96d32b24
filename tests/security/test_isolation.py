"""What a workload can see of where it runs, by the probe's own facts; and how the VMM is jailed."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.comparison.isolation import Isolation, judge_all
from support import leaks
from support.sandboxes import LEVELS, host_facts, need_root, output, run_probe, sandbox_facts

NONE = "0" * 16
OWN_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")


@pytest.mark.parametrize("isolation", LEVELS)
def test_privileges(isolation: str) -> None:
    facts, _ = sandbox_facts(isolation)
    bare = host_facts()
    assert facts["capabilities"] == dict.fromkeys(
        ("inheritable", "permitted", "effective", "bounding", "ambient"), NONE
    )
    assert (facts["no_new_privs"], facts["seccomp_mode"], facts["groups"]) == (1, 2, [])
    assert set(facts["uids"].values()) == set(facts["gids"].values())
    assert 0 not in facts["uids"].values()
    # The control: the caller has what the workload lacks.
    assert bare["no_new_privs"] == 0
    if os.geteuid() == 0:
        assert bare["capabilities"]["effective"] != NONE


USERS = {"container": 1000, "vm": 1000}


@pytest.mark.parametrize("isolation", LEVELS)
def test_user(isolation: str) -> None:
    need_root()
    uid = sandbox_facts(isolation)[0]["uids"]["real"]
    if isolation in USERS:
        assert uid == USERS[isolation]
    else:
        assert 0x71000000 <= uid < 0x7FFE0000


@pytest.mark.parametrize("user", [None, 0])
def test_the_user_of_a_sandbox_within_two_user_namespaces(user: int | None) -> None:
    """Its uid_map tells of the outer one, which is the sandbox's own: the id there is no id of the host's."""
    need_root()
    asked: dict[str, Any] = {} if user is None else {"user": user}
    for capabilities, known in (((), True), (["CAP_SYS_ADMIN"], False)):
        facts = json.loads(output(run_probe("container", "facts", capabilities=capabilities, **asked)))
        verdict = judge_all(host_facts(), facts)["users"]
        assert verdict.isolation is (Isolation.OWN if known else Isolation.UNKNOWN)
        assert ("can't be told" in verdict.evidence) is not known


@pytest.mark.parametrize("isolation", ["container", "vm"])
def test_namespaces_and_processes_are_its_own(isolation: str) -> None:
    facts, _ = sandbox_facts(isolation)
    bare = host_facts()
    if isolation == "container":
        assert {name for name in OWN_NAMESPACES if facts["namespaces"][name] != bare["namespaces"][name]} == set(
            OWN_NAMESPACES
        )
        assert facts["pids"] == [1, 2]
        assert facts["pid1_comm"] == "ringfence-core"
        assert facts["mount_count"] < 40
        assert all(line.endswith(":/") for line in facts["cgroup"].splitlines())
    else:
        assert facts["pid1_comm"] == "init"
        assert facts["kernel_release"] != bare["kernel_release"]
        assert facts["boot_id"] != bare["boot_id"]
        assert facts["memory_total_bytes"] < 1 << 30
    assert facts["interfaces"] == {"lo": {"up": True}}
    assert facts["sysv_shm_segments"] == 0
    assert facts["abstract_socket_count"] == 0


def test_a_process_shares_the_hosts_namespaces() -> None:
    """By design, and told so; what it can't do there is in test_denials."""
    facts, _ = sandbox_facts("process")
    assert {name: facts["namespaces"][name] for name in OWN_NAMESPACES} == {
        name: host_facts()["namespaces"][name] for name in OWN_NAMESPACES
    }


@pytest.mark.parametrize("isolation", ["container", "vm"])
def test_devices_and_mounts(isolation: str) -> None:
    facts, _ = sandbox_facts(isolation)
    assert facts["dev_entries"] == sorted(
        ["fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"]
    )
    modes = {where: mode for where, _, mode, _ in facts["mounts"]}
    assert modes["/"] == modes["/usr"] == modes["/etc"] == "ro"
    if host_facts()["machine_id"]:  # a fresh machine has none yet
        assert facts["machine_id"] in (None, "")


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def namespaces_of(pid: int) -> dict[str, str]:
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in OWN_NAMESPACES}


@pytest.fixture
def qemu() -> Any:
    """QEMU with a guest that sleeps."""
    need_root()
    results: list[rf.Result] = []
    limits = rf.Limits(wall_time=20, memory="128M")

    def sleep() -> None:
        results.append(rf.run(["sleep", "1.5"], isolation="vm", limits=limits))

    thread = threading.Thread(target=sleep)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not (found := [one for one in leaks.descendants(os.getpid()) if one.name.startswith("qemu")]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)
        yield found[0].pid
    finally:
        thread.join()
    assert results
    assert results[0].ok


def test_the_vmm_is_jailed(qemu: int) -> None:
    """As seen from outside: ids that nobody has, no capability, a filter, namespaces and a limited cgroup."""
    status = status_of(qemu)
    assert int(status["Uid"].split()[0]) >= 0x71000000
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {NONE}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Groups"]) == ("1", "2", "")
    ours, theirs = namespaces_of(os.getpid()), namespaces_of(qemu)
    assert [name for name in OWN_NAMESPACES if ours[name] == theirs[name]] == []
    interfaces = Path(f"/proc/{qemu}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    # Of the host's file systems it sees what the guest is shown and its own programs, none of it writable.
    mounts = [line.split() for line in Path(f"/proc/{qemu}/mountinfo").read_text().splitlines()]
    writable = {fields[4] for fields in mounts if "rw" in fields[5].split(",") and "/dev/vda" in fields}
    assert writable == set()
    (work,) = [set(fields[5].split(",")) for fields in mounts if fields[4] == "/work"]
    assert {"ro", "noexec"} <= work
    limits = [
        path / "memory.limit_in_bytes"
        for path in map(Path, leaks.cgroups_of(os.getpid()))
        for path in path.glob("s*")
        if (path / "tasks").exists() and str(qemu) in (path / "tasks").read_text().split()
        if (path / "memory.limit_in_bytes").exists()
    ]
    # Of one that is restored from a template, or of one that makes it.
    (limit,) = [int(path.read_text()) for path in limits]
    assert limit in ((2 * (128 + 128) + 256) << 20, (128 + 128 + 256) << 20)
    # Descriptors: its streams, the channel, its own files; nothing of the caller's.
    held = {os.readlink(f"/proc/{qemu}/fd/{fd}") for fd in os.listdir(f"/proc/{qemu}/fd")}
    kinds = ("/dev/null", "pipe:", "socket:", "anon_inode:", "/vm/", "/memfd:")
    assert {name for name in held if not name.startswith(kinds)} == set()
