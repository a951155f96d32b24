"""Every probe of the catalogue, made at every level: the exact verdicts, and that each has a control here."""

from __future__ import annotations

import functools
import os
import secrets
import select
import shutil
import signal
import time
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

import ringfence as rf
from ringfence.comparison.isolation import Isolation
from ringfence.comparison.probes import Seen
from ringfence.comparison.probes_catalogue import PROBES
from ringfence.comparison.probes_place import Holder, Place, probe_limits
from ringfence.comparison.probes_run import BARE, judge_all_probes, look
from ringfence.comparison.probes_runsc import RUNSC
from support import unprivileged
from support.probes import VERDICTS
from support.sandboxes import LEVELS, PROBE, need_root, python, unconfined

# A control that may fail on a machine that is fit for all other tests, and why.
MAY_LACK = {
    "module-load": "a kernel without modules",
    "module-load-file": "a kernel without modules",
    "module-remove": "a kernel without modules",
    "kernel-replace": "a kernel without kexec",
    "memory-physical": "a kernel without /dev/mem",
    "memory-kernel-core": "a kernel without /proc/kcore",
    "kernel-addresses": "a kernel that hides them from root, too",
    "files-read-homes": "a root without a file",
    "user-groups": "a caller without supplementary groups",
    "network-crypto-socket": "a kernel without AF_ALG",
    "network-vsock-socket": "a kernel without AF_VSOCK",
    "limit-raise": "a root without CAP_SYS_RESOURCE",
    "limit-out-of-memory-order": "a root without CAP_SYS_RESOURCE",
    "capability-replace-executable": "a root without CAP_SYS_RESOURCE",
    "call-32-bit": "a kernel without 32-bit programs",
    "call-x32": "a kernel without x32",
    "devices-disk": "a root on no block device, or one that a device cgroup denies",
    "devices-virtual-machines": "a machine without virtualisation",
    "devices-fuse": "a kernel without FUSE",
    "devices-loop": "a kernel without loop devices",
    "devices-ports": "a kernel without port access",
    "devices-port-level": "a kernel without port access",
    "devices-terminal-input": "a kernel that has TIOCSTI switched off",
    "tunable-magic-keys": "a kernel without magic keys",
    "tunable-hotplug": "a kernel without a hotplug helper",
    "accounting": "a kernel without process accounting",
    "quota": "a kernel without quotas",
    "call-userfaultfd": "a kernel without userfaultfd",
    "clock-namespace": "a kernel without time namespaces",
    "ipc-posix-queue": "a kernel without message queues",
    "channel-posix-queue": "a kernel without message queues",
    "channel-vsock": "a kernel without local vsock",
    "attack-descriptors": "a caller with fewer descriptors than the attack takes",
    "processes-root-of-another": "a host that hides them",
}


@functools.cache
def looked() -> tuple[dict[str, Seen], dict[str, str]]:
    """All probes at all levels, made once."""
    return look(LEVELS, lambda _: None)


def verdicts(name: str) -> dict[str, dict[str, str]]:
    seen, refused = looked()
    assert refused == {}
    return judge_all_probes(seen[BARE], seen[name])


def expected(isolation: str, given: Iterable[str]) -> dict[str, str]:
    """given: the limits that a sandbox of that level gets here."""
    found = {name: words[LEVELS.index(isolation)] for name, words in VERDICTS.items()}
    # Where this host's cgroups can't limit it, nothing is claimed.
    for attack, rule in (("attack-fork-bomb", "pids"), ("attack-memory", "memory"), ("attack-disk", "disk")):
        if rule not in given:
            found[attack] = "shared"
    return found


def test_every_probe_has_its_expectation() -> None:
    assert set(VERDICTS) == {one.name for one in PROBES}


def test_the_control_of_every_probe_succeeds_here() -> None:
    """But for what this machine lacks; and of those most succeed on any."""
    need_root()
    found = {name: one for name, one in verdicts(BARE).items() if one["verdict"] != "shared"}
    assert {name: one["evidence"] for name, one in found.items() if name not in MAY_LACK} == {}
    assert {one["verdict"] for one in found.values()} <= {str(Isolation.NOT_TESTABLE)}
    assert all(one["evidence"].startswith(("the control fails: ", "the processors")) for one in found.values())
    assert len(PROBES) - len(found) >= 60


@pytest.mark.parametrize("isolation", LEVELS)
def test_the_verdicts(isolation: str) -> None:
    need_root()
    bare, found = verdicts(BARE), verdicts(isolation)
    testable = {name for name, one in bare.items() if one["verdict"] == "shared"}
    wanted = expected(isolation, probe_limits(isolation).given())
    wrong = {
        name: (one["verdict"], one["evidence"])
        for name, one in found.items()
        if name in testable and one["verdict"] != wanted[name]
    }
    assert wrong == {}
    assert all(found[name]["verdict"] == "not testable" for name in found.keys() - testable)


@pytest.mark.parametrize("isolation", LEVELS)
def test_the_evidence_names_call_and_errno(isolation: str) -> None:
    need_root()
    found = verdicts(isolation)
    for name, evidence in {
        "files-mount": "mount: EPERM",
        "reboot": "reboot: EPERM",
        "call-bpf": "bpf: EPERM",
        "user-new-namespace-clone3": "clone3: ENOSYS",
    }.items():
        assert found[name]["evidence"].startswith(evidence)
        assert found[name]["control"] == "ok"


# What is weaker at the levels of an unprivileged caller, whose own user the workload is.
OF_AN_UNPRIVILEGED_CALLER: dict[str, dict[str, str]] = {
    "process": {
        "user-outside": "shared",
        "processes-descriptors": "shared",  # their numbers, and nothing that they lead to
        "capability-sets": "shared",  # there is none; the bounding set stays
    },
    "container": {"user-outside": "restricted"},  # mapped, but to the caller
}
AS_USER = """
import json
from ringfence.comparison.probes_place import probe_limits
from ringfence.comparison.probes_run import judge_all_probes, look
seen, refused = look(["process", "container"], lambda _: None)
assert not refused, refused
found = {name: judge_all_probes(seen["bare"], one) for name, one in seen.items()}
print(json.dumps([found, {name: list(probe_limits(name).given()) for name in ("process", "container")}]))
"""


def test_the_verdicts_of_an_unprivileged_caller() -> None:
    """Those that have a control: what nobody but root can do shows nothing."""
    need_root()
    found, given = unprivileged.python_json(AS_USER)
    testable = {name for name, one in found["bare"].items() if one["verdict"] != "not testable"}
    assert len(testable) >= 60
    for isolation, weaker in OF_AN_UNPRIVILEGED_CALLER.items():
        wanted = expected(isolation, given[isolation]) | weaker
        if "pids" not in given[isolation] and isolation == "process":
            wanted["cgroup-membership"] = "shared"  # no cgroups of its own
        verdicts = {name: one["verdict"] for name, one in found[isolation].items() if name in testable}
        assert verdicts == {name: wanted[name] for name in testable}


def test_roots_of_their_own_close_what_shared_files_open(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The two channels of containers that see the same files; the control is a root that they share."""
    folder = tmp_path_factory.mktemp("roots")
    for one in (folder, *folder.parents[:2]):
        one.chmod(0o755)
    for name in ("one", "two"):
        for inner in ("usr/share", "etc", "tmp", "proc", "dev"):
            (folder / name / inner).mkdir(parents=True)
        shutil.copy(PROBE, folder / name / "usr/probe")
    for second, said in (("two", ["ENOENT flock", "ENOENT read"]), ("one", ["ok", "ok"])):
        with (
            rf.Sandbox(isolation="container", image=str(folder / "one")) as holder,
            rf.Sandbox(isolation="container", image=str(folder / second)) as finder,
        ):
            held = holder.run(["/usr/probe", "hold", "abc", "60", "background"], text=True).stdout
            assert "lock ok\nevents ok\n" in held
            found = [finder.run(["/usr/probe", "find", mark, "abc"], text=True).stdout for mark in ("lock", "events")]
            assert [one.strip() for one in found] == said


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_what_asks_a_holder_to_end_has_it_remove_its_marks_first(by: signal.Signals) -> None:
    """Ctrl-C goes to all of a terminal's foreground; and the holder isn't in ours."""
    token = secrets.token_hex(4)
    holder = Holder(token)
    assert os.getsid(holder.process.pid) == holder.process.pid
    assert unconfined("find", "sysv-msg", token) == (0, b"ok\n")
    holder.check()
    holder.process.send_signal(by)
    assert holder.process.wait(10) == 0
    with pytest.raises(rf.ProtocolError, match="had ended"):
        holder.check()
    holder.close()
    for mark in ("tmp", "dev-shm", "sysv-shm", "sysv-msg", "sysv-sem", "queue", "key"):
        assert unconfined("find", mark, token)[0] == 1, mark


def test_a_level_is_not_told_where_the_marks_outside_had_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """What wasn't found then would look like one of its own."""
    real = Place.ask_all

    def ask_all(place: Place, names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        if place.level != BARE:
            os.kill(int(names["victim"]), signal.SIGTERM)
            time.sleep(0.1)
        return real(place, names)

    monkeypatch.setattr(Place, "ask_all", ask_all)
    seen, refused = look(["process"], lambda _: None)
    assert set(seen) == {BARE}
    assert refused == {"process": "what holds marks outside had ended before the probes"}


def test_keys_are_none_that_mean_a_new_one_each_time() -> None:
    """IPC_PRIVATE is 0: a token of zeros would be found by nobody."""
    holder = Holder("000000")
    try:
        assert unconfined("find", "sysv-shm", "000000") == (0, b"ok\n")
    finally:
        holder.close()


def test_nothing_is_left_of_a_comparison_that_is_killed() -> None:
    """Of the process that holds marks outside, which is the only one without a boundary."""
    code = """
from ringfence.comparison.probes_place import Holder
import time
print(Holder("abcdef12").process.pid, flush=True)
time.sleep(60)
"""
    with python(code) as caller:
        assert caller.stdout is not None
        pid = int(caller.stdout.readline())
        holder = os.pidfd_open(pid)
        try:
            assert unconfined("find", "key", "abcdef12") == (0, b"ok\n")
            caller.kill()
            caller.wait()
            assert select.select([holder], [], [], 10)[0], "it lives on"
        finally:
            os.close(holder)
    for mark in ("tmp", "dev-shm", "abstract", "tcp", "sysv-shm", "sysv-msg", "sysv-sem", "queue", "key"):
        assert unconfined("find", mark, "abcdef12")[0] == 1, mark


@pytest.mark.skipif(
    shutil.which("runsc") is None, reason="gVisor's runsc is optional: where it isn't, there is no column"
)
def test_gvisor_is_told_by_its_own_kernel() -> None:
    need_root()
    seen, refused = look([RUNSC], lambda _: None)
    assert refused == {}
    found = judge_all_probes(seen[BARE], seen[RUNSC])
    assert {
        name: found[name]["verdict"] for name in ("kernel-release", "files-mount", "call-bpf", "channel-file-lock")
    } == {
        "kernel-release": "own",
        "files-mount": "own",
        "call-bpf": "own",
        "channel-file-lock": "own",
    }
    # Its kernel has no limits of ours, and is not judged by them.
    assert found["attack-memory"]["verdict"] == "not testable"
