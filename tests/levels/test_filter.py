"""The filter that a spec asks for: profiles in JSON, none at all, and what it denied in the result."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.api import check_spec
from ringfence.levels.process import ProcessLevel
from ringfence.spec import Spec
from support.sandboxes import LEVELS, LOCAL_LEVELS, applied, host_facts, output, run_probe

PYTHON = "/usr/bin/python3"
ALLOW_ALL = {"defaultAction": "SCMP_ACT_ALLOW"}


# At the process level what lets everything through can't keep the network away.
NETWORK = {"process": "host", "container": "none", "vm": "none"}


def options(isolation: str, seccomp: Any) -> dict[str, Any]:
    return {"isolation": isolation, "network": NETWORK[isolation], "seccomp": seccomp}


def denying(*names: str, action: str = "SCMP_ACT_ERRNO", **more: Any) -> dict[str, Any]:
    return {**ALLOW_ALL, "syscalls": [{"names": list(names), "action": action, **more}]}


def python(code: str, **more: Any) -> rf.Result:
    prelude = "import ctypes, errno, os, signal, threading, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    return rf.run([PYTHON, "-I", "-S", "-c", prelude + code], **more)


def row(result: rf.Result) -> rf.Applied:
    return applied(result)["seccomp"]


# ---- profiles ----


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_profile_decides(isolation: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(denying("keyctl", errnoRet=5)))
    for profile in (str(path), json.loads(path.read_text())):
        result = run_probe(isolation, "try-keyctl", seccomp=profile, network=NETWORK[isolation])
        assert result.stdout == b"EIO keyctl\n"
        told = row(result)
        assert told.effective == told.requested is not None
        assert "sha256" in told.mechanism
    # The control: another profile lets it through.
    network = NETWORK[isolation]
    assert run_probe(isolation, "try-keyctl", seccomp=ALLOW_ALL, network=network).stdout == b"ok\n"
    assert run_probe(isolation, "try-keyctl", network=network).stdout == b"EPERM keyctl\n"


def test_a_profile_in_a_guest() -> None:
    result = run_probe("vm", "try-sethostname", seccomp=denying("sethostname", errnoRet=5))
    assert result.stdout == b"EIO sethostname\n"
    assert row(result).effective == "a profile in JSON, enforce"


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_profile_that_lets_nothing_be_read_back(isolation: str) -> None:
    """What is told of ids and capabilities doesn't depend on what the profile allows."""
    calls = ["open", "openat", "read", "readlink", "prlimit64", "getresuid", "getresgid", "uname", "clock_gettime"]
    result = rf.run(["/bin/true"], **options(isolation, denying(*calls)))
    told = applied(result)
    assert told["capabilities"].effective == "none"
    assert told["no_new_privs"].effective is True
    assert told["user"].effective not in ("0:0", None)
    assert told["seccomp"].effective == "a profile in JSON, enforce"


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
@pytest.mark.parametrize("mode", ["enforce", "report"])
def test_a_profile_without_execve_starts_nothing(isolation: str, mode: str) -> None:
    profile = denying("execve", errnoRet=13)
    with pytest.raises(rf.StartError) as caught:
        rf.run(["/bin/true"], **options(isolation, rf.Seccomp(profile, mode=mode)))
    assert (caught.value.call, caught.value.errno) == ("execve", 13)


def test_a_process_has_no_network_behind_any_profile() -> None:
    """By default it has none, and no profile opens it by allowing everything."""
    result = run_probe("process", "try-socket", "inet", "stream", seccomp=ALLOW_ALL)
    assert result.stdout == b"EPERM socket\n"
    assert applied(result)["network"].effective == "none"
    control = run_probe("process", "try-socket", "inet", "stream", seccomp=ALLOW_ALL, network="host")
    assert control.stdout == b"ok\n"


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_the_callers_keys_stay_out_of_reach(isolation: str) -> None:
    """A session's keys are anybody's who is in it, whatever his id."""
    code = "print(libc.syscall(250, 0, -3, 0, 0, 0))"  # KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING
    ours = subprocess.run(
        [PYTHON, "-c", f"import ctypes; libc = ctypes.CDLL(None); {code}"], capture_output=True, text=True, check=True
    )
    theirs = python(code, **options(isolation, "unconfined"))
    assert int(output(theirs)) != int(ours.stdout)


# ---- no filter ----


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_unconfined(isolation: str) -> None:
    without: dict[str, Any] = {"seccomp": "unconfined", "network": NETWORK[isolation]}
    result = run_probe(isolation, "facts", **without)
    facts = json.loads(output(result))
    assert facts["seccomp_mode"] == host_facts()["seccomp_mode"]
    told = applied(result)
    assert (told["seccomp"].requested, told["seccomp"].effective) == ("unconfined, enforce", "unconfined")
    # The other barriers are there.
    assert told["no_new_privs"].effective is True
    assert told["capabilities"].effective == "none"
    refused = run_probe(isolation, "try-create", "/usr/new", **without)
    assert refused.stdout == (b"EACCES open\n" if isolation == "process" else b"EROFS open\n")


# ---- what was denied ----


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_denials_are_listed(isolation: str) -> None:
    code = """
for _ in range(3):
    assert libc.sethostname(b"name", 4) == -1 and ctypes.get_errno() == errno.EPERM
assert libc.syscall(999, 7, 8, 9) == -1 and ctypes.get_errno() == errno.ENOSYS
libc.socket(40, 1, 0)
print(sorted(os.listdir("/proc/self/fd")))
"""
    result = python(code, isolation=isolation, seccomp=rf.Seccomp(mode="report"))
    assert output(result) == b"['0', '1', '2', '3']\n"  # the last is the directory's own: no listener
    found = {one.call: one for one in result.denials or ()}
    assert (found["sethostname"].count, found["sethostname"].errno) == (3, "EPERM")
    assert found["sethostname"].arguments[1] == 4
    assert (found["syscall_999"].count, found["syscall_999"].errno) == (1, "ENOSYS")
    assert found["syscall_999"].arguments[:3] == (7, 8, 9)
    assert found["socket"].arguments[:2] == (40, 1)
    assert row(result).effective == "default, report"
    # Nobody looks by default, and nothing else is different.
    silent = python(code, isolation=isolation)
    assert output(silent) == output(result)
    assert silent.denials is None


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_an_ordinary_run_denies_nothing(isolation: str) -> None:
    result = rf.run(["/bin/sh", "-c", "echo a | cat"], isolation=isolation, seccomp=rf.Seccomp(mode="report"))
    assert output(result) == b"a\n"
    assert result.denials == ()


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_an_audit_lets_through_what_it_lists(isolation: str) -> None:
    code = "print(libc.syscall(250, 0, -3, 1, 0, 0) > 0)"
    denied = python(code, isolation=isolation)
    audited = python(code, **options(isolation, rf.Seccomp(mode="audit")))
    assert (output(denied), output(audited)) == (b"False\n", b"True\n")
    assert [(one.call, one.count, one.errno) for one in audited.denials or ()] == [("keyctl", 1, None)]
    assert row(audited).effective == "default, audit"


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_profile_reports_too_and_an_audit_spares_what_it_kills(isolation: str) -> None:
    profile = {
        **ALLOW_ALL,
        "syscalls": [
            {"names": ["sethostname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 71},
            {"names": ["setdomainname"], "action": "SCMP_ACT_KILL_PROCESS"},
        ],
    }
    code = """
libc.sethostname(b"a", 1)
print(ctypes.get_errno(), flush=True)
libc.setdomainname(b"a", 1)
print("alive")
"""
    reported = python(code, **options(isolation, rf.Seccomp(profile, mode="report")))
    assert (reported.stdout, reported.signal) == (b"71\n", 31)
    assert [(one.call, one.errno) for one in reported.denials or ()] == [("sethostname", "EPROTO")]
    audited = python(code, **options(isolation, rf.Seccomp(profile, mode="audit")))
    assert output(audited).endswith(b"\nalive\n")
    assert {one.call for one in audited.denials or ()} == {"sethostname", "setdomainname"}


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_workload_gets_no_listener_of_its_own(isolation: str) -> None:
    """It could let through what ours denies."""
    code = """
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]
allow = (6).to_bytes(2, "little") + b"\\0\\0" + (0x7fff0000).to_bytes(4, "little")
filter = Filter(1, allow)
for flags in (0, 8):
    ctypes.set_errno(0)
    print(libc.syscall(317, 1, flags, ctypes.byref(filter)), errno.errorcode.get(ctypes.get_errno()))
"""
    result = python(code, isolation=isolation, seccomp=rf.Seccomp(mode="report"))
    assert output(result) == b"0 None\n-1 EBUSY\n"
    # The control: without ours it would get one, a descriptor.
    control = python(code.replace("(0, 8)", "(8,)"), isolation=isolation)
    assert output(control).split()[1] == b"None"


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_storm_of_denied_calls_starves_no_clock(isolation: str) -> None:
    code = """
for _ in range(3):
    if os.fork() == 0:
        break
number = 10000 + os.getpid() % 1000 * 100000
while True:
    libc.syscall(number, 0)
    number += 1
"""
    limits = rf.Limits(wall_time=1.5, pids=16)
    began = time.monotonic()
    result = python(code, isolation=isolation, seccomp=rf.Seccomp(mode="report"), limits=limits)
    assert result.termination_reason == "wall_time"
    assert time.monotonic() - began < 15
    assert result.denials is not None
    assert len(result.denials) <= 513
    assert result.denials[-1].call == "others"
    assert sum(one.count for one in result.denials) > 1000


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_killed_while_it_waits_for_an_answer(isolation: str) -> None:
    code = """
children = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        while True:
            libc.sethostname(b"a", 1)
    children.append(child)
time.sleep(0.2)
for child in children:
    os.kill(child, signal.SIGKILL)
print([os.waitpid(child, 0)[1] for child in children])
"""
    result = python(code, isolation=isolation, seccomp=rf.Seccomp(mode="report"))
    assert output(result) == b"[9, 9, 9, 9, 9, 9, 9, 9]\n"


@pytest.mark.parametrize("mode", ["report", "audit"])
def test_denials_in_a_guest_are_listed_by_its_init(mode: str) -> None:
    code = """
for _ in range(3):
    print(libc.syscall(250, 0, -3, 1, 0, 0) > 0, ctypes.get_errno())
libc.syscall(999, 7, 8, 9)
for number in range(300):
    libc.syscall(10000 + number)
"""
    result = python(code, isolation="vm", seccomp=rf.Seccomp(mode=mode))
    assert output(result) == (b"False 1\n" if mode == "report" else b"True 0\n") * 3
    denials = result.denials
    assert denials is not None
    named = {one.call: one for one in denials}
    assert (named["keyctl"].count, named["keyctl"].errno) == (3, "EPERM" if mode == "report" else None)
    assert named["keyctl"].arguments[1:3] == (2**64 - 3, 1)
    assert named["syscall_999"].arguments[:3] == (7, 8, 9)
    # 256 are listed, and the rest counted.
    assert len(denials) == 257
    assert sum(one.count for one in denials) == 3 + 1 + 300 + 0
    assert denials[-1].call == "others"


def test_a_guest_without_execve_starts_nothing() -> None:
    """What denies execve is answered too, while init itself stands still."""
    profile = denying("execve", errnoRet=13)
    with pytest.raises(rf.StartError) as caught:
        rf.run(["/bin/true"], isolation="vm", seccomp=rf.Seccomp(profile, mode="report"))
    assert (caught.value.call, caught.value.errno) == ("execve", 13)


# ---- a sandbox that stays ----


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_each_command_has_its_own_denials(isolation: str) -> None:
    code = "import ctypes; libc = ctypes.CDLL(None); [libc.sethostname(b'a', 1) for _ in range({})]"

    def denied(times: int) -> list[tuple[str, int]]:
        result = sandbox.run([PYTHON, "-I", "-S", "-c", code.format(times)])
        return [(one.call, one.count) for one in result.denials or ()]

    with rf.Sandbox(isolation=isolation, seccomp=rf.Seccomp(mode="report")) as sandbox:
        assert denied(2) == [("sethostname", 2)]
        before = len(os.listdir("/proc/self/fd"))
        for times in (1, 0, 3):
            assert denied(times) == ([("sethostname", times)] if times else [])
        # A listener is closed once nobody has its filter any more; the last one's end may not have been seen yet.
        assert len(os.listdir("/proc/self/fd")) <= before + 1


# ---- refusals ----


def unmet(host: rf.Host | None = None, **options: Any) -> dict[str, rf.Unmet]:
    with pytest.raises(rf.CannotEnforce) as caught:
        check_spec(Spec.make(["true"], **options), on=host)
    return {one.rule: one for one in caught.value.unmet}


def refused(seccomp: Any, *, host: rf.Host | None = None, help: bool = False, **more: Any) -> str:
    found = unmet(host, seccomp=seccomp, **more)
    assert list(found) == ["seccomp"]
    return found["seccomp"].help if help else found["seccomp"].reason


class TestRefusals:
    def test_no_filter_and_no_network_at_the_process_level(self) -> None:
        for loose in ("unconfined", rf.Seccomp(mode="audit")):
            for network in (None, "none"):
                assert "kept by the filter" in refused(loose, isolation="process", network=network)
            check_spec(Spec.make(["true"], isolation="process", seccomp=loose, network="host"))
        profile = {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"]}
        if os.uname().machine == "x86_64":
            assert "can't be kept for X86" in refused(profile, isolation="process")

    @pytest.mark.parametrize("isolation", LEVELS)
    def test_nothing_to_report(self, isolation: str) -> None:
        wanted = rf.Seccomp("unconfined", mode="report")
        with pytest.raises(rf.CannotEnforce, match="nothing is denied"):
            check_spec(Spec.make(["true"], isolation=isolation, seccomp=wanted, network=NETWORK[isolation]))

    @pytest.mark.parametrize("isolation", LEVELS)
    def test_what_a_profile_asks_for_in_vain(self, isolation: str) -> None:
        profile = denying("mount", action="SCMP_ACT_NOTIFY")
        assert "nobody here would answer" in refused(profile, isolation=isolation)
        with pytest.raises(rf.SpecError, match="which is none"):
            check_spec(Spec.make(["true"], isolation=isolation, seccomp=denying("mount", action="DENY")))

    def test_a_file_that_changed_after_it_was_checked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(ALLOW_ALL))
        real = ProcessLevel.check

        def check(level: ProcessLevel, spec: Spec, host: rf.Host) -> None:
            real(level, spec, host)
            path.write_text(json.dumps(denying("mount", action="SCMP_ACT_TRACE")))

        monkeypatch.setattr(ProcessLevel, "check", check)
        with pytest.raises(rf.CannotEnforce, match="no tracer"):
            rf.run(["true"], isolation="process", seccomp=str(path))

    def test_an_unprivileged_caller(self) -> None:
        """What only the filter keeps, where the workload's id is the caller's own."""
        host = rf.host().replace(privileged=False)
        limits = rf.Limits(pids=10)
        for loose in ("unconfined", rf.Seccomp(mode="audit"), ALLOW_ALL):
            assert "owns its cgroup" in refused(loose, host=host, isolation="container", limits=limits)
            check_spec(Spec.make(["true"], isolation="container", seccomp=loose), on=host)
            # At the process level UNIX sockets lead to systemd, where it runs: not with `allow`, which takes no filter.
            assert "seccomp" in unmet(host, isolation="process", network="host", limits=limits, seccomp=loose)
        ways = ["mount", "move_mount", "fsmount", "open_tree", "open_tree_attr"]
        check_spec(Spec.make(["true"], isolation="container", seccomp=denying(*ways), limits=limits), on=host)
        for way in ways:
            others = denying(*(one for one in ways if one != way))
            assert way in refused(others, host=host, isolation="container", limits=limits, help=True)
        check_spec(Spec.make(["true"], isolation="process", seccomp=denying("clone3"), limits=limits), on=host)
        assert "owns its cgroup" in refused(denying(*ways), host=host, isolation="process", limits=limits)

    def test_without_landlock_no_filter_keeps_it_from_other_processes(self) -> None:
        """/proc/PID/mem is opened, read and written to, as any file is."""
        strict = denying("clone3", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd")
        host = rf.host().replace(privileged=False, landlock_abi=0)
        for wanted in ("unconfined", ALLOW_ALL, strict, rf.Seccomp(mode="report")):
            assert "look into" in refused(wanted, host=host, isolation="process", network="host")
        if rf.host().privileged:
            # As root each sandbox has a user of its own, unless it is given one.
            bare = rf.host().replace(landlock_abi=0)
            check_spec(Spec.make(["true"], isolation="process", seccomp=strict, network="host"), on=bare)
            assert "look into" in refused(strict, host=bare, isolation="process", network="host", user=1000)
