"""The verdicts, on facts that the probe recorded at each level (compare_facts.json: as root, Linux 6.18, cgroup v1)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ringfence.comparison.isolation import RESOURCES, Isolation, judge_all, other_kernel

RECORDED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("compare_facts.json").read_text())
HOST = RECORDED["bare"]

# process, container, vm
EXPECTED = {
    "kernel": ("shared", "shared", "own"),
    "memory": ("restricted", "restricted", "own"),
    "CPUs": ("shared", "shared", "own"),
    "processes": ("shared", "own", "own"),
    "signals": ("restricted", "own", "own"),
    "others' memory": ("restricted", "own", "own"),
    "users": ("restricted", "own", "own"),
    "capabilities": ("restricted", "restricted", "restricted"),
    "system calls": ("restricted", "restricted", "restricted"),
    "new privileges": ("restricted", "restricted", "restricted"),
    "mounts": ("shared", "own", "own"),
    "files": ("restricted", "restricted", "restricted"),
    "devices": ("restricted", "restricted", "own"),
    "kernel settings": ("restricted", "restricted", "own"),
    "network": ("restricted", "own", "own"),
    "IPC": ("restricted", "own", "own"),
    "keyrings": ("restricted", "restricted", "own"),
    "host name": ("restricted", "own", "own"),
    "cgroups": ("restricted", "own", "own"),
    "clock": ("restricted", "restricted", "own"),
}


def changed(level: str, **facts: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RECORDED[level]), **facts}


def with_attempts(level: str, **said: str) -> dict[str, Any]:
    return changed(level, attempts={**RECORDED[level]["attempts"], **said})


@pytest.mark.parametrize(("at", "level"), [(0, "process"), (1, "container"), (2, "vm")])
def test_the_verdicts_on_recorded_facts(at: int, level: str) -> None:
    found = {name: str(one.isolation) for name, one in judge_all(HOST, RECORDED[level]).items()}
    assert found == {name: words[at] for name, words in EXPECTED.items()}


def test_every_verdict_has_evidence() -> None:
    for level in RECORDED:
        assert all(one.evidence for one in judge_all(HOST, RECORDED[level]).values())


def test_the_host_against_itself_is_shared_in_everything() -> None:
    assert {one.isolation for one in judge_all(HOST, HOST).values()} == {Isolation.SHARED}


def test_nothing_is_claimed_of_what_was_not_seen() -> None:
    assert {one.isolation for one in judge_all(HOST, {}).values()} == {Isolation.UNKNOWN}


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda one: one.name)
@pytest.mark.parametrize("fact", sorted(HOST))
def test_a_missing_fact_never_makes_a_verdict_better(resource: Any, fact: str) -> None:
    """Less known inside may make a verdict unknown or weaker, but never stronger."""
    rank = {Isolation.UNKNOWN: 0, Isolation.SHARED: 1, Isolation.RESTRICTED: 2, Isolation.OWN: 3}
    for level in ("process", "container", "vm"):
        seen = resource.judge(HOST, RECORDED[level]).isolation
        unseen = resource.judge(HOST, changed(level, **{fact: None})).isolation
        assert rank[unseen] <= rank[seen]


def test_a_denial_whose_control_fails_proves_nothing() -> None:
    denied = dict.fromkeys(HOST["attempts"], "EPERM")
    host = {**HOST, "attempts": denied}
    found = judge_all(host, RECORDED["process"])
    for name in ("signals", "others' memory", "files", "keyrings", "clock", "network"):
        assert found[name].isolation is Isolation.UNKNOWN, name
        assert "no control" in found[name].evidence


@pytest.mark.parametrize(
    ("name", "attempt"),
    [
        ("signals", "kill"),
        ("others' memory", "procmem"),
        ("IPC", "shm"),
        ("keyrings", "keyctl"),
        ("clock", "settime"),
        ("network", "socket"),
        ("host name", "sethostname"),
    ],
)
def test_an_attempt_that_succeeds_is_told(name: str, attempt: str) -> None:
    found = judge_all(HOST, with_attempts("process", **{attempt: "ok"}))[name]
    assert "ok" in found.evidence
    if name != "others' memory":  # the two other ways to it are still denied
        assert found.isolation is Isolation.SHARED


def test_reaching_the_caller_from_another_pid_namespace_is_not_own() -> None:
    found = judge_all(HOST, with_attempts("container", kill="ok", procmem="ok"))
    assert found["signals"].isolation is Isolation.SHARED
    assert found["others' memory"].isolation is Isolation.RESTRICTED


def test_another_kernel_decides_where_inodes_cannot() -> None:
    # Both kernels number their first namespaces alike.
    inside = changed("vm", namespaces=HOST["namespaces"])
    assert judge_all(HOST, inside)["IPC"].isolation is Isolation.OWN
    assert other_kernel(HOST, inside) is True
    assert other_kernel(HOST, RECORDED["container"]) is False
    assert other_kernel(HOST, changed("vm", boot_id=None)) is True  # its release is another
    assert other_kernel(HOST, changed("container", boot_id=None)) is None


@pytest.mark.parametrize("level", ["process", "container"])
def test_a_level_on_this_kernel_has_no_other_whatever_the_boot_id_reads(level: str) -> None:
    """As where the caller's /proc/sys/kernel/random/boot_id, or the release, is covered by a mount."""
    inside = {**changed(level, boot_id="other", kernel_release="other"), "level": level}
    assert other_kernel(HOST, inside) is False
    found = judge_all(HOST, inside)
    assert found["kernel"].isolation is Isolation.SHARED
    words = {name: str(one.isolation) for name, one in found.items()}
    assert words == {name: str(one.isolation) for name, one in judge_all(HOST, RECORDED[level]).items()}
    # Of another tool's sandbox nothing but what is read is known.
    assert other_kernel(HOST, changed(level, boot_id="other")) is True


def test_each_namespace_shared_is_told_as_shared() -> None:
    names = {"pid": "processes", "user": "users", "mnt": "mounts", "ipc": "IPC", "net": "network", "uts": "host name"}
    for kind, name in names.items():
        inside = changed(
            "container", namespaces={**RECORDED["container"]["namespaces"], kind: HOST["namespaces"][kind]}
        )
        assert judge_all(HOST, inside)[name].isolation is not Isolation.OWN, kind


def test_capabilities_in_any_set_are_counted() -> None:
    sets = {**RECORDED["process"]["capabilities"], "bounding": "0000000000000400"}
    found = judge_all(HOST, changed("process", capabilities=sets))["capabilities"]
    assert found.evidence == "bounding 1"


def test_limits_and_missing_limits_on_memory() -> None:
    found = judge_all(HOST, changed("container", applied={}))["memory"]
    assert found.isolation is Isolation.SHARED
    assert "at most 256 MiB" in judge_all(HOST, RECORDED["container"])["memory"].evidence


def test_a_limit_that_is_no_less_than_what_there_is_restricts_nothing() -> None:
    total, count = HOST["memory_total_bytes"], len(HOST["affinity"])
    for level in ("process", "container"):
        all_of_it = judge_all(HOST, changed(level, applied={"memory": total, "cpus": float(count)}))
        assert (all_of_it["memory"].isolation, all_of_it["CPUs"].isolation) == (Isolation.SHARED, Isolation.SHARED)
        less = judge_all(HOST, changed(level, applied={"memory": total - 1, "cpus": count - 0.5}))
        assert (less["memory"].isolation, less["CPUs"].isolation) == (Isolation.RESTRICTED, Isolation.RESTRICTED)


def test_a_writable_host_tree_is_shared() -> None:
    found = judge_all(HOST, with_attempts("process", write_etc="ok", write_usr="ok"))["files"]
    assert found.isolation is Isolation.SHARED
    half = judge_all(HOST, with_attempts("process", write_etc="ok"))["files"]
    assert half.isolation is Isolation.RESTRICTED
    assert "but writing /etc: ok" in half.evidence


def test_a_tree_without_host_files_is_own_only_on_another_kernel() -> None:
    mounts = [["/", "tmpfs", "ro", "none"], ["/proc", "proc", "rw", "proc"]]
    assert judge_all(HOST, changed("vm", mounts=mounts))["files"].isolation is Isolation.OWN
    assert judge_all(HOST, changed("container", mounts=mounts))["files"].isolation is Isolation.RESTRICTED


@pytest.mark.parametrize("root", ["overlay", "rpool/ROOT/debian", "server:/export"])
def test_on_a_host_whose_root_is_on_no_disk_of_its_own_no_files_are_own(root: str) -> None:
    mounts = [["/", "overlay", "rw", root], ["/proc", "proc", "rw", "proc"]]
    on_it = {**HOST, "mounts": mounts}
    assert judge_all(on_it, on_it)["files"].isolation is Isolation.SHARED
    for level in ("process", "container"):
        inside = changed(level, mounts=[["/usr", "overlay", "ro", root]])
        assert judge_all(on_it, inside)["files"].isolation is Isolation.RESTRICTED


def test_the_id_outside_is_told() -> None:
    inside = changed("container", uid_map="0 1000000 65536", uids={"effective": 5})
    assert judge_all(HOST, inside)["users"].evidence == "uid 5 is 1000005 outside"


def test_an_id_of_a_user_namespace_in_between_is_not_taken_for_the_hosts() -> None:
    def verdict(uid_map: str, uid: int, owner: int | None, caller: int = 0) -> tuple[Isolation, str]:
        host = {**HOST, "uids": {**HOST["uids"], "effective": caller}}
        inside = changed("container", uid_map=uid_map, uids={"effective": uid}, proc_owner=owner)
        found = judge_all(host, inside)["users"]
        return found.isolation, found.evidence

    unknown = Isolation.UNKNOWN
    # With CAP_SYS_ADMIN a command's user namespace is in another one of the sandbox's, each id mapped to itself.
    assert verdict("0 0 65536", 1000, 65534) == (unknown, "uid 1000: which one that is outside can't be told")
    assert verdict("0 0 65536", 0, 65534)[0] is verdict("0 0 65536", 0, None)[0] is unknown
    assert verdict("1000 1000 1", 1000, 65534, 61234)[0] is unknown
    # Such a map may be one to the host's own ids.
    assert verdict("0 0 65536", 1000, 0) == (Isolation.OWN, "uid 1000 is 1000 outside")
    assert verdict("0 0 65536", 0, 0)[0] is Isolation.RESTRICTED
    assert verdict("1000 1000 1", 1000, 65534, 1000)[0] is Isolation.RESTRICTED


def test_a_user_that_is_the_caller_outside_is_not_its_own() -> None:
    caller = {**HOST, "uids": {**HOST["uids"], "effective": 1000}}
    inside = changed("container", uid_map="0 1000 1", uids={"effective": 0})
    assert judge_all(caller, inside)["users"].isolation is Isolation.RESTRICTED
    assert judge_all(HOST, inside)["users"].isolation is Isolation.OWN
    assert judge_all(caller, {**inside, "uid_map": None})["users"].isolation is Isolation.UNKNOWN
