"""Whose the files of a mount are, inside and outside, on file systems that can map ids and on those that can't."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.sandboxes import SOURCES, need_root

OWNER = 12345

# In a mount namespace of its own: what it mounts is gone with it.
CODE = """
import json, os, subprocess, sys
import ringfence as rf
folder, kind, owner, writable = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "writable"
os.chmod(folder, 0o755)
if kind != "disk":
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
for name in ("data", "lower", "upper", "work"):
    os.mkdir(f"{folder}/{name}")
data = f"{folder}/data"
lower = f"{folder}/lower" if kind == "overlay" else data
with open(f"{lower}/f", "w") as file:
    file.write("private")
os.chmod(f"{lower}/f", 0o600)
os.chown(f"{lower}/f", owner, owner)
os.chown(lower, owner, owner)
if kind == "overlay":
    layers = ",".join(f"{name}dir={folder}/{name}" for name in ("lower", "upper", "work"))
    subprocess.run(["mount", "-t", "overlay", "none", "-o", layers, data], check=True)
script = "stat -c %u:%g /m/f; cat /m/f; echo new > /m/new && stat -c %u:%g /m/new"
try:
    r = rf.run(["sh", "-c", script], mounts=[rf.Mount(data, "/m", writable=writable)])
except rf.SpecError as error:
    print(json.dumps(str(error)))
else:
    [how] = [one.mechanism for one in r.applied if one.rule == "mount /m"]
    outside = {name: os.stat(f"{data}/{name}").st_uid for name in os.listdir(data)}
    print(json.dumps([r.stdout.decode().split(), r.stderr.decode(), outside, how]))
"""


def run(folder: Path, kind: str, *, writable: bool) -> Any:
    need_root()
    folder.parent.chmod(0o755)
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", CODE]
    arguments = [str(folder), kind, str(OWNER), "writable" if writable else "read-only"]
    env = {**os.environ, "PYTHONPATH": str(SOURCES)}
    done = subprocess.run([*command, *arguments], env=env, stdout=subprocess.PIPE, check=True, timeout=120)
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["disk", "tmpfs"])
def test_a_mounts_owner_is_the_workload_inside_and_stays_itself_outside(tmp_path: Path, kind: str) -> None:
    stdout, stderr, outside, how = run(tmp_path, kind, writable=True)
    assert (stdout, stderr) == (["1000:1000", "private1000:1000"], "")
    assert outside == {"f": OWNER, "new": OWNER}
    assert how == "bind, mount_setattr"


def test_where_ids_cannot_be_mapped_a_writable_mount_is_refused(tmp_path: Path) -> None:
    said = run(tmp_path, "overlay", writable=True)
    assert said == f"mounts: the file system of {tmp_path}/data can't map ids, so nothing could be written there"


def test_where_ids_cannot_be_mapped_a_read_only_one_is_nobodys_and_that_is_told(tmp_path: Path) -> None:
    stdout, stderr, outside, how = run(tmp_path, "overlay", writable=False)
    assert stdout == ["65534:65534"]
    assert "Permission denied" in stderr
    assert outside == {"f": OWNER}
    assert how == "bind, mount_setattr; its file system can't map ids: all are nobody's"
