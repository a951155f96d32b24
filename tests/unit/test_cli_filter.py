"""`ringfence run` with a filter and capabilities of the caller's own: what it passes on, and prints of denials."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ringfence as rf
from ringfence.cli.run import denials_table
from support.sandboxes import LOCAL_LEVELS, PROBE


def probe(isolation: str, options: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "ringfence", "run", "-i", isolation, *options, "--file", f"probe={PROBE}"]
    return subprocess.run([*command, "--", "./probe", *words], input=b"", capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_denials_are_a_table_or_in_the_json(isolation: str) -> None:
    options = ("--seccomp-mode", "report")
    done = probe(isolation, options, "try-sethostname", "other")
    assert done.returncode == 1
    table = done.stderr.decode().splitlines()
    assert table[0].split() == ["denied", "times", "answer", "first", "arguments"]
    assert table[1].split()[:3] == ["sethostname", "1", "EPERM"]
    silent = probe(isolation, options, "cwd")
    assert (silent.returncode, silent.stderr) == (0, b"ringfence: the filter denied nothing\n")
    found = json.loads(probe(isolation, (*options, "--json"), "try-sethostname", "other").stdout)
    assert [(one["call"], one["count"], one["errno"]) for one in found["denials"]] == [("sethostname", 1, "EPERM")]
    assert json.loads(probe(isolation, ("--json",), "cwd").stdout)["denials"] is None


def test_profiles_and_capabilities_reach_the_sandbox(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    rule = {"names": ["sethostname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    done = probe("container", ("--seccomp", str(profile)), "try-sethostname", "other")
    assert done.stdout == b"EIO sethostname\n"
    granted = ("--capability", "sys_chroot", "--capability", "NET_RAW", "--json")
    found = json.loads(probe("container", granted, "try-chroot").stdout)
    assert found["stdout"] == "ok\n"
    (row,) = (one for one in found["applied"] if one["rule"] == "capabilities")
    assert row["requested"] == row["effective"]["ambient"] == ["CAP_NET_RAW", "CAP_SYS_CHROOT"]
    refused = probe("process", ("--capability", "net_raw"), "cwd")
    assert refused.returncode == 125
    assert b"they would be the host's" in refused.stderr


def test_a_long_list_of_denials_is_cut() -> None:
    many = [rf.Denial(call=f"call{number}", count=1, errno=None) for number in range(40)]
    lines = denials_table(many).splitlines()
    assert len(lines) == 32
    assert lines[1].split() == ["call0", "1", "let", "through"]
    assert lines[-1] == "and 10 more"
