"""Every probe of the catalogue, made at every level: the exact verdicts, and that each has a control here."""

from __future__ import annotations

import functools
import shutil

import pytest

from ringfence.comparison.isolation import Isolation
from ringfence.comparison.probes import Seen
from ringfence.comparison.probes_catalogue import PROBES
from ringfence.comparison.probes_place import probe_limits
from ringfence.comparison.probes_run import BARE, judge_all_probes, look
from ringfence.comparison.probes_runsc import RUNSC
from support.probes import VERDICTS
from support.sandboxes import LEVELS, need_root

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


def expected(isolation: str) -> dict[str, str]:
    found = {name: words[LEVELS.index(isolation)] for name, words in VERDICTS.items()}
    # Where this host's cgroups can't limit it, nothing is claimed.
    given = probe_limits(isolation).given()
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
    wrong = {
        name: (one["verdict"], one["evidence"])
        for name, one in found.items()
        if name in testable and one["verdict"] != expected(isolation)[name]
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
