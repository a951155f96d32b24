"""Sizes, overlays and what was changed, of a caller without any privilege."""

from __future__ import annotations

import os
import shutil

import pytest

from support.sandboxes import PROBE
from support.unprivileged import UID, home, python_json

SCRIPT = """
import json, sys, ringfence as rf
from ringfence.wire.launcher import probe_path
root, others = sys.argv[1:]
files = {"probe": rf.File(open(probe_path(), "rb").read(), 0o755)}
def changes(result):
    return [[one.path, one.kind] for one in result.changes]
found = {}
result = rf.run(["./probe", "mkfile", "big", "32M"], files=files, limits=rf.Limits(disk="8M"), collect=["big"])
found["disk"] = [str(result.termination_reason), len(result.files["big"])]
result = rf.run(["./probe", "mkfile", "/data/big", "2M"], files=files, mounts=[rf.Tmpfs("/data", "1M")])
found["tmpfs"] = [result.stdout.decode(), [one.effective for one in result.applied if one.rule == "tmpfs /data"]]
for user in (None, 0):
    for limits in (rf.Limits(), rf.Limits(disk="4M")):
        result = rf.run(["probe", "write", "/etc/name", "new"], image=root, overlay=True, user=user, limits=limits)
        found[f"overlay {user} {limits.disk_bytes}"] = [result.stdout.decode(), changes(result)]
result = rf.run(["probe", "touch-out", "/etc/made"], image=root, overlay=True)
found["made"] = changes(result)
result = rf.run(["probe", "mkfile", "/etc/big", "8M"], image=root, overlay=True, limits=rf.Limits(disk="4M"))
found["full"] = str(result.termination_reason)
for name, options in (("host", {}), ("others", {"image": others})):
    try:
        rf.run(["true"], overlay=True, **options)
        found[name] = "ran"
    except rf.CannotEnforce as error:
        found[name] = error.unmet[0].rule + ": " + error.unmet[0].reason
print(json.dumps(found))
"""


@pytest.fixture
def rootfs() -> str:
    root = home() / "root"
    shutil.rmtree(root, ignore_errors=True)
    (root / "bin").mkdir(parents=True)
    (root / "etc").mkdir()
    shutil.copy(PROBE, root / "bin" / "probe")
    (root / "etc" / "name").write_text("of the image\n")
    for one in (root, *root.rglob("*")):
        os.chown(one, UID, UID)
    return str(root)


def test_sizes_and_overlays(rootfs: str) -> None:
    found = python_json(SCRIPT, rootfs, "/usr")
    assert found["disk"][0] == "disk"
    assert 4 << 20 < found["disk"][1] <= 8 << 20
    assert found["tmpfs"] == ["ENOSPC write\n", [1 << 20]]
    for user in (None, 0):
        for size in (None, 4 << 20):
            assert found[f"overlay {user} {size}"] == ["ok\n", [["/etc/name", "changed"]]]
    assert found["made"] == [["/etc/made", "created"]]
    assert found["full"] == "disk"
    assert "couldn't be changed" in found["host"]
    assert "couldn't be changed" in found["others"]
    with open(f"{rootfs}/etc/name", encoding="ascii") as file:
        assert file.read() == "of the image\n"
