"""`Result.applied` tells what the workload itself sees of its own restrictions."""

from __future__ import annotations

import json
from typing import Any

import pytest

import ringfence as rf
from support.sandboxes import LEVELS, applied, host_facts, need_cgroup, output, run_probe

LIMITS = {"memory": "96M", "cpus": 1, "pids": 33, "wall_time": 100, "cpu_time": 30, "output": "3M"}
OWN_NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time")


def told(result: rf.Result) -> dict[str, Any]:
    return {rule: one.effective for rule, one in applied(result).items()}


@pytest.mark.parametrize("isolation", LEVELS)
def test_what_was_asked_is_in_force_and_seen_inside(isolation: str) -> None:
    need_cgroup("memory")
    need_cgroup("pids")
    result = run_probe(isolation, "facts", limits=rf.Limits(**LIMITS))  # type: ignore[arg-type]
    facts = json.loads(output(result))
    rules = applied(result)
    for rule, value in {
        "memory": 96 << 20,
        "cpus": 1.0,
        "pids": 33,
        "wall_time": 100_000_000_000,
        "cpu_time": 30_000_000_000,
        "output": 3 << 20,
    }.items():
        assert (rules[rule].requested, rules[rule].effective) == (value, value), rule
        assert rules[rule].mechanism
    # The rest is what nobody asked for, and its truth is inside.
    assert rules["user"].requested is None
    assert rules["user"].effective == f"{facts['uids']['effective']}:{facts['gids']['effective']}"
    assert rules["capabilities"].effective == "none"
    assert set(facts["capabilities"].values()) == {"0" * 16}
    assert rules["no_new_privs"].effective is True
    assert facts["no_new_privs"] == 1
    assert rules["seccomp"].effective == "filter"
    assert facts["seccomp_mode"] == 2
    # 1, not 0: a core_pattern that is a program of the host's takes no notice of 0, but of 1 (fs/coredump.c).
    assert facts["rlimits"]["core"] == [1, 1]
    assert facts["rlimits"]["cpu"] == [32, 32]
    assert rules["network"].effective == "none"
    assert result.usage.source


@pytest.mark.parametrize("isolation", ["process", "container"])
def test_namespaces_are_told_by_their_inodes(isolation: str) -> None:
    result = run_probe(isolation, "facts")
    seen = json.loads(output(result))["namespaces"]
    rules = told(result)
    here = host_facts()["namespaces"]
    for name in OWN_NAMESPACES:
        assert rules[f"namespace {name}"] == seen[name]
        assert (seen[name] == here[name]) == (isolation == "process"), name


def test_a_container_in_the_hosts_network_says_so() -> None:
    result = run_probe("container", "facts", network="host")
    seen = json.loads(output(result))
    assert seen["namespaces"]["net"] == host_facts()["namespaces"]["net"] == told(result)["namespace net"]
    assert told(result)["network"] == "host"


def test_a_guest_tells_its_own_kernel_and_how_its_vmm_is_jailed() -> None:
    result = run_probe("vm", "facts")
    rules, facts = told(result), json.loads(output(result))
    assert rules["kernel"] == facts["kernel_release"] != host_facts()["kernel_release"]
    assert rules["hostname"] == facts["hostname"]
    assert rules["accelerator"] == result.accelerator
    jail = rules["vmm jail"]
    assert all(name in jail for name in OWN_NAMESPACES)
    assert "capabilities none" in jail
    assert "seccomp mode 2" in jail


@pytest.mark.parametrize("isolation", LEVELS)
def test_the_result_is_plain_data(isolation: str) -> None:
    from support.sandboxes import sandbox_facts

    _, result = sandbox_facts(isolation)
    assert json.loads(json.dumps([one.to_json() for one in result.applied]))
