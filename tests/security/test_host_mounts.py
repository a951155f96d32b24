"""A sandbox's mounts stay its own, on a host whose mounts are all shared too, as they are under systemd."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import ringfence as rf

def mounts():
    with open("/proc/self/mountinfo") as file:
        return sorted(" ".join(line.split()[2:]) for line in file)

before = mounts()
assert all("shared:" in line for line in before if " / / " in line), before
result = rf.run(["/bin/true"], isolation=sys.argv[1])
assert result.ok, result
after = mounts()
assert before == after, sorted(set(after) ^ set(before))
print("unchanged", len(after))
"""


@pytest.mark.parametrize("isolation", ["process", "container", "vm"])
def test_nothing_of_a_sandbox_appears_among_shared_mounts_of_the_host(isolation: str) -> None:
    """open_tree(2) of a shared mount makes a peer of it, and a mask below a peer would hide the host's own file."""
    if os.geteuid() != 0:
        pytest.skip("needs root: CAP_SYS_ADMIN to make a namespace whose mounts are shared")
    shared = 'mount --make-rshared / && exec "$@"'
    run = subprocess.run(
        [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            shared,
            "sh",
            sys.executable,
            "-c",
            SCRIPT,
            isolation,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("unchanged")
