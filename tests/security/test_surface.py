"""Which system calls reach the host's kernel from each level, against what the filters are meant to let through; and
that trying them all does no harm, as an unconfined root too.
"""

from __future__ import annotations

import functools
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from ringfence.comparison.surface import surfaces
from ringfence.linux import seccomp
from support.sandboxes import LEVELS, PROBE, need_root

# The kernel's own first check says EPERM, whatever the filter.
OF_THE_KERNEL = {"setgroups"}
# Newer kernels let these two past every filter (kernel/seccomp.c, seccomp_uprobe_exception); called by a program itself
# they do nothing.
PAST_ANY_FILTER = {"uretprobe", "uprobe"}
# Allowed by their arguments; the probe's are those that are let through.
BY_ARGUMENT = {
    *(
        "clone",
        "ioctl",
        "personality",
        "socket",
        "socketpair",
        "open",
        "openat",
        "creat",
        "chmod",
        "fchmod",
        "fchmodat",
    ),
    *("fchmodat2", "mkdir", "mkdirat", "mknod", "mknodat"),
}
FILTERED = {"process": seccomp.for_process("none", tcp_only=False, listen=True, shared_user=False)}
FILTERED["container"] = FILTERED["vm"] = seccomp.policy(namespaces=True)


SYNC = seccomp.library().resolve_syscall(seccomp.library().system_arch(), "sync")


@functools.cache
def surface() -> dict[str, Any]:
    return surfaces(LEVELS, lambda _: None)


@pytest.mark.parametrize("isolation", LEVELS)
def test_what_is_reached_is_what_the_filter_lets_through(isolation: str) -> None:
    """Of a vm: what QEMU can reach, in its jail."""
    calls = surface()[isolation]["calls"]
    allowed, denied = set(FILTERED[isolation].allowed), set(FILTERED[isolation].denied)
    reachable = {name for name, word in calls.items() if word == "reachable"}
    refused = {name: word for name, word in calls.items() if word.startswith("denied")}
    assert reachable - allowed - BY_ARGUMENT - PAST_ANY_FILTER == set()
    assert set(refused) & allowed == OF_THE_KERNEL
    assert {name for name in refused if name in denied and refused[name] != "denied EPERM"} == set()
    others = {name: word for name, word in refused.items() if name not in denied | OF_THE_KERNEL | BY_ARGUMENT}
    assert set(others.values()) <= {"denied ENOSYS"}
    assert len(reachable) > 200


@pytest.mark.parametrize("isolation", LEVELS)
def test_the_surface_is_smaller_than_without_a_boundary(isolation: str) -> None:
    need_root()
    bare, inside = surface()["bare"], surface()[isolation]
    assert bare["denied"] == bare["unknown"] == inside["unknown"] == 0
    assert inside["reachable"] + inside["denied"] == bare["reachable"]
    assert inside["absent"] == bare["absent"]
    for name in ("bpf", "ptrace", "mount", "keyctl", "io_uring_setup", "unshare", "kexec_file_load", "reboot"):
        if bare["calls"][name] == "reachable":
            assert inside["calls"][name] == "denied EPERM", name


def test_a_guests_own_kernel_is_told_beside_it() -> None:
    found = surface()
    assert all(found[name]["guest"] is None for name in ("bare", "process", "container"))
    if "vm" in found:
        assert found["vm"]["by"] == "QEMU, in its jail"
        assert found["vm"]["guest"]["reachable"] > 200


def state_of_the_machine() -> dict[str, str]:
    found = {
        path: Path(path).read_text()
        for path in (
            *("/proc/sysvipc/shm", "/proc/sysvipc/msg", "/proc/sysvipc/sem", "/proc/self/mountinfo", "/proc/swaps"),
            *("/proc/sys/kernel/hostname", "/proc/sys/kernel/domainname", "/proc/self/cgroup", "/proc/self/uid_map"),
        )
        if Path(path).exists()
    }
    return found | {"nice": str(os.nice(0)), "umask": oct(os.umask(0o022)), "cwd": os.getcwd()}


def test_every_call_as_an_unconfined_root_does_no_harm(tmp_path: Path) -> None:
    """In a session with a terminal of nobody's, and a directory of its own."""
    need_root()
    sleeper = subprocess.Popen(["sleep", "100"])
    before, wall, steady = state_of_the_machine(), time.time(), time.monotonic()
    try:
        done = subprocess.run([PROBE, "surface"], capture_output=True, check=True, cwd=tmp_path, timeout=60)
        assert sleeper.poll() is None, "a process was killed"
    finally:
        sleeper.kill()
        sleeper.wait()
    assert done.stderr == b""
    said = dict(line.split(maxsplit=1) for line in done.stdout.decode().splitlines())
    # Called with whatever arguments, sync writes back all that the machine has changed: it isn't called.
    assert sorted(map(int, said)) == [number for number in range(481) if number != SYNC]
    assert set(said.values()) >= {"EBADF", "EFAULT", "EINVAL", "ENOSYS", "exits"}
    assert "EPERM" not in said.values()  # else a denial inside could not be told
    after = state_of_the_machine()
    assert after == before
    assert abs((time.time() - wall) - (time.monotonic() - steady)) < 0.5, "the clock was set"
    assert list(tmp_path.iterdir()) == []
