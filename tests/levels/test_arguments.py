"""What the workload is given: arguments, environment, directory, descriptors."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from support.sandboxes import LEVELS, host_facts, output, python_json, run_probe, sandbox_facts

TRICKY: list[str | bytes] = [
    "",
    "a b",
    "  ",
    "line\nbreak\ttab",
    "'single' \"double\" `back`",
    "$HOME ${PATH} $(id) %s \\n \\",
    "; rm -rf / #",
    "-n",
    "--",
    "*?[x]",
    "grüße",
    b"\xff\xfe not UTF-8 \x80",
    b"\x01\x02\x7f",
    "a=b",
    "",
]


def raw(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else os.fsencode(value)


@pytest.mark.parametrize("isolation", LEVELS)
def test_arguments_arrive_as_they_are(isolation: str) -> None:
    printed = output(run_probe(isolation, "argv", *TRICKY, "x" * (100 << 10)))
    assert printed.split(b"\0")[:-1] == [*map(raw, TRICKY), b"x" * (100 << 10)]


def environment(printed: bytes) -> dict[bytes, bytes]:
    entries = [entry.partition(b"=") for entry in printed.split(b"\0")[:-1]]
    found = {name: value for name, _, value in entries}
    assert len(found) == len(entries)
    return found


HOMES = {"container": b"/work", "vm": b"/work"}


@pytest.mark.parametrize("isolation", LEVELS)
def test_environment_is_clean_and_takes_any_value(isolation: str) -> None:
    given: dict[str | bytes, str | bytes] = {f"V{number}": value for number, value in enumerate(TRICKY)}
    given[b"bytes \xff name"] = b"\xff"
    given["LONG"] = "x" * (100 << 10)
    given["LANG"] = "xx_XX"
    os.environ["RINGFENCE_TEST_SECRET"] = "the caller's own"
    try:
        seen = environment(output(run_probe(isolation, "env", env=given)))
    finally:
        del os.environ["RINGFENCE_TEST_SECRET"]
    home = seen.pop(b"HOME")
    assert home == HOMES.get(isolation, home)
    assert seen == {
        b"PATH": b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        b"TERM": b"dumb",
        **{raw(name): raw(value) for name, value in given.items()},
    }


@pytest.mark.parametrize("isolation", LEVELS)
def test_default_environment(isolation: str) -> None:
    facts, _ = sandbox_facts(isolation)
    assert sorted(facts["environment_names"]) == ["HOME", "LANG", "PATH", "TERM"]


@pytest.mark.parametrize("isolation", LEVELS)
def test_cwd_is_the_work_directory(isolation: str) -> None:
    facts, _ = sandbox_facts(isolation)
    if isolation == "process":
        # A real folder of the host, which is gone by now.
        assert os.path.basename(os.path.dirname(facts["cwd"])).startswith(f"ringfence-{os.getpid()}-")
        assert not os.path.exists(facts["cwd"])
    else:
        assert facts["cwd"] == "/work"


INHERITING = """
import json, os, sys
from support.sandboxes import run_probe, output
kept = [os.open("/etc/passwd", os.O_RDONLY), *os.pipe()]
for fd in kept:
    os.set_inheritable(fd, True)
os.dup2(kept[0], 200)
print(json.dumps([output(run_probe(level, "ls-fds")).decode() for level in sys.argv[1:]]))
"""


def fds(printed: str) -> list[int]:
    return [int(line.split()[0]) for line in printed.splitlines()]


def test_no_descriptor_leaks_into_the_workload() -> None:
    """A caller with inheritable descriptors of its own, open before ringfence is started."""
    for printed in python_json(INHERITING, *LEVELS):
        assert fds(printed) == [0, 1, 2], printed


def test_control_an_inheritable_descriptor_does_reach_a_bare_process() -> None:
    from support.sandboxes import PROBE

    fd = os.open("/etc/passwd", os.O_RDONLY)
    try:
        os.set_inheritable(fd, True)
        done = subprocess.run([PROBE, "ls-fds"], capture_output=True, check=True, close_fds=False, text=True)
    finally:
        os.close(fd)
    assert fd in fds(done.stdout)


@pytest.mark.parametrize("isolation", LEVELS)
def test_signals_are_as_a_fresh_process_has_them(isolation: str) -> None:
    """Python itself ignores SIGPIPE and SIGXFSZ; a workload that inherits that behaves oddly."""
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
    facts, _ = sandbox_facts(isolation)
    assert (facts["signals_ignored"], facts["signals_blocked"]) == ("0" * 16, "0" * 16)


@pytest.mark.parametrize("isolation", LEVELS)
def test_a_session_and_a_umask_of_its_own(isolation: str) -> None:
    facts, _ = sandbox_facts(isolation)
    assert facts["sid"] == facts["pid"] == facts["pgid"]
    assert host_facts()["sid"] != host_facts()["pid"]
    assert facts["controlling_terminal"] is False
    assert facts["umask"] == 0o022
