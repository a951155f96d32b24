"""Runs of the probe at a level, and what this machine promises to the tests."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.levels.host import Host
from ringfence.linux.cgroups import Layout
from ringfence.wire.launcher import probe_path
from support import leaks

LOCAL_LEVELS = ("process", "container")  # on the host's kernel, where a start costs next to nothing
# Inside a guest of our own (test_inside_a_vm.py) there is no third one.
IN_A_GUEST = "RINGFENCE_TEST_IN_A_GUEST" in os.environ
LEVELS = LOCAL_LEVELS if IN_A_GUEST else (*LOCAL_LEVELS, "vm")

SOURCES = Path(rf.__file__).resolve().parents[1]
PROBE = probe_path()
# The probe in the work directory, and an argv[0] for it there, at every level.
PROBE_FILE = {"probe": rf.File(Path(PROBE).read_bytes(), 0o755)}
PROBE_NAME = "./probe"

# What a machine must have for every test to run. A skip for one of these is a failure where CI promised it:
# RINGFENCE_CI_PROMISES=all, or a list of these names with commas.
PROMISES = frozenset(
    (
        "root",
        *(f"cgroup {name}" for name in ("memory", "pids", "cpu", "cpuacct", "cpuset", "io", "freezer")),
        "user namespaces",
        "Landlock",
        "libseccomp",
        "newuidmap",
        "vm level",
        "/dev/net/tun",
        "cgroup v1",
        "a second CPU",
        "a disk below the work directories",
        "systemd, for the guest's userland",
        "a browser without a window",
    )
)
# Debian's packages of other tools that are looked at, and no more: too heavy for CI, so "all" doesn't promise them.
# `make test-long` has them.
FOREIGN = frozenset(f"Debian's {name}" for name in ("bubblewrap", "crun", "runc", "podman", "docker.io", "lxc"))
FOREIGN |= {"Debian's systemd-container", "packages of the registries"}
# What nobody promises: another tool may refuse a host on which it is installed.
OTHERS = frozenset(f"a host that {name} takes" for name in ("bwrap", "crun", "runc", "runsc", "podman"))
OTHERS |= {"Debian's runsc"}


def need(what: str, present: bool) -> None:
    """Skips where this machine lacks `what`; fails where CI promised it."""
    assert what in PROMISES | FOREIGN | OTHERS, what
    if present:
        return
    promised = os.environ.get("RINGFENCE_CI_PROMISES", "").split(",")
    if what in promised or ("all" in promised and what in PROMISES) or ("foreign" in promised and what in FOREIGN):
        pytest.fail(f"CI promised {what}, and it isn't there")
    pytest.skip(f"this machine lacks: {what}")


def need_root() -> None:
    need("root", os.geteuid() == 0)


def need_level(isolation: str) -> None:
    """The level itself, and what its tests take for granted."""
    host = rf.host()
    if isolation == "process":
        need("Landlock", host.landlock_abi > 0)
    else:
        need("user namespaces", not host.user_namespaces)
    need("libseccomp", not host.seccomp)
    if isolation == "vm":
        from ringfence.api import level

        need("vm level", level("vm").unavailable(host) is None)


def need_v2() -> None:
    """Not among what CI promises of its machine: there the guest of test_inside_a_vm.py is that host."""
    kind = rf.host().cgroups.kind
    if kind != "v2":
        pytest.skip(f"this host's cgroups are {kind}; what needs v2 alone runs in a guest of test_inside_a_vm.py")


def need_cgroup(controller: str) -> None:
    need(f"cgroup {controller}", rf.host().cgroups.controller(controller).usable)


def run_probe(isolation: str, *args: str | bytes, files: dict[Any, Any] | None = None, **options: Any) -> rf.Result:
    """One run of the probe with these arguments."""
    return rf.run([PROBE_NAME, *args], isolation=isolation, files={**PROBE_FILE, **(files or {})}, **options)


def ended(result: rf.Result) -> tuple[str, int | None, int | None]:
    """How it ended, in one value that is easy to compare and to read in a failure."""
    return str(result.termination_reason), result.exit_code, result.signal


EXITED_0 = ("exited", 0, None)


def output(result: rf.Result) -> bytes:
    """The stdout of a run that went well."""
    assert (ended(result), result.stderr) == (EXITED_0, b""), result
    found: bytes = result.stdout
    return found


def applied(result: rf.Result) -> dict[str, rf.Applied]:
    """Rule to what is in force."""
    found = {one.rule: one for one in result.applied}
    assert len(found) == len(result.applied), "a rule is told twice"
    return found


@functools.cache
def sandbox_facts(isolation: str) -> tuple[dict[str, Any], rf.Result]:
    """What the probe sees inside a sandbox with every default, and that run."""
    result = run_probe(isolation, "facts")
    found: dict[str, Any] = json.loads(output(result))
    return found, result


@functools.cache
def host_facts() -> dict[str, Any]:
    """The same, unconfined: the positive control."""
    found: dict[str, Any] = json.loads(unconfined("facts")[1])
    return found


def unconfined(*args: str, cwd: str | Path = "/") -> tuple[int, bytes]:
    """The probe, run by nothing but subprocess: (exit status, stdout)."""
    done = subprocess.run([PROBE, *args], capture_output=True, check=False, timeout=60, cwd=cwd)
    return done.returncode, done.stdout


def unconfined_python(code: str, *args: str) -> bytes:
    """The stdout of Python, run by nothing but subprocess. It must end well."""
    command = ["/usr/bin/python3", "-I", "-S", "-c", code, *args]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout


def host_without(*controllers: str) -> Host:
    """This host, but that these controllers of cgroups can't be used."""
    found = rf.host()
    changed = tuple(
        one.replace(usable=False, reason=f"no {one.name} controller is mounted here", help="mount it")
        if one.name in controllers
        else one
        for one in found.cgroups.controllers
    )
    layout: Layout = found.cgroups.replace(controllers=changed)
    host: Host = found.replace(cgroups=layout)
    return host


def python(code: str, *args: str, **options: Any) -> subprocess.Popen[bytes]:
    """Another Python process that can import ringfence and support, as a caller with a life of its own."""
    paths = [str(SOURCES), str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    caller = subprocess.Popen([sys.executable, "-c", code, *args], env=env, stdout=subprocess.PIPE, **options)
    leaks.callers.add(caller.pid)
    return caller


def python_json(code: str, *args: str, timeout: float = 120) -> Any:
    """What such a process prints, as JSON. It must end well."""
    with python(code, *args) as caller:
        try:
            printed, _ = caller.communicate(timeout=timeout)
        except BaseException:
            caller.kill()
            raise
    assert caller.returncode == 0, printed
    return json.loads(printed)
