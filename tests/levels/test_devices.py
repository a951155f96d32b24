"""Device nodes: only the standard ones unless asked for, with just the access that was asked for."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Any

import pytest

import ringfence as rf
from support.sandboxes import PROBE_FILE, applied, need_root, run_probe
from support.unprivileged import python_json

ZERO = os.makedev(1, 5)


@pytest.fixture
def node() -> Iterator[str]:
    """A device that only root and its group may use, as /dev/kvm is: /dev/zero by another name."""
    need_root()
    path = f"/dev/rf-test-{os.getpid()}"
    os.mknod(path, stat.S_IFCHR | 0o660, ZERO)
    os.chmod(path, 0o660)
    yield path
    os.unlink(path)


TRY = """
./probe try-open-read {0}; ./probe try-open-write {0}
chmod 666 {0} 2>/dev/null; ./probe try-open-read {0}; ./probe try-open-write {0}
"""
# What opening for reading and for writing gives, twice: a change of the mode changes nothing.
OPENED = {"r": ["ok", "EACCES open"], "w": ["EACCES open", "ok"], "rw": ["ok", "ok"]}


@pytest.mark.parametrize("options", [{}, {"user": 0}, {"overlay": True}, {"overlay": True, "user": 0}])
@pytest.mark.parametrize("access", OPENED)
def test_the_access_that_was_asked_for_and_no_other(node: str, access: str, options: dict[str, Any]) -> None:
    device = rf.Device(node, "/dev/sub/mine", access)
    script = TRY.format("/dev/sub/mine")
    result = rf.run(["sh", "-c", script], devices=[device], files=PROBE_FILE, **options)
    assert result.stdout.decode().splitlines() == OPENED[access] * 2
    one = applied(result)["device /dev/sub/mine"]
    assert (one.requested, one.effective) == (access, access)
    assert (os.stat(node).st_mode, os.stat(node).st_uid) == (stat.S_IFCHR | 0o660, 0)
    assert result.changes in (None, ())


def test_without_asking_it_is_not_there(node: str) -> None:
    assert run_probe("container", "try-open-read", node).stdout == b"ENOENT open\n"


def test_root_inside_with_every_capability_over_files_gets_no_more(node: str) -> None:
    device = rf.Device(node, "/dev/mine", "r")
    capable = ["dac_override", "fowner"]
    result = run_probe("container", "try-open-write", "/dev/mine", devices=[device], user=0, capabilities=capable)
    assert result.stdout == b"EACCES open\n"


def test_it_works_beside_a_standard_set(node: str) -> None:
    result = rf.run(["sh", "-c", "ls /dev; head -c 3 /dev/mine | od -An -c"], devices=[rf.Device(node, "/dev/mine")])
    names = result.stdout.decode().split()
    assert names[-3:] == ["\\0"] * 3
    wanted = "fd full mine null ptmx pts random shm stderr stdin stdout tty urandom zero"
    assert names[:-3] == wanted.split()


@pytest.mark.parametrize("target", ["/dev/null", "/dev/pts/5", "/dev/shm/x", "/dev/stdin", "/dev/.nodes/x"])
def test_what_is_the_sandboxs_own_cannot_be_replaced(target: str) -> None:
    with pytest.raises(rf.CannotEnforce) as caught:
        run_probe("container", "exit", "0", devices=[rf.Device("/dev/zero", target)])
    assert [one.rule for one in caught.value.unmet] == ["devices"]


def test_a_device_of_a_process(node: str) -> None:
    """Landlock opens it, as far as its mode lets the workload's uid."""
    with pytest.raises(rf.CannotEnforce) as caught:
        run_probe("process", "exit", "0", devices=[node])
    assert "mode 0660" in caught.value.unmet[0].reason
    os.chmod(node, 0o666)
    script = TRY.format(node)
    bare = rf.run(["sh", "-c", script], isolation="process", files=PROBE_FILE)
    assert bare.stdout.decode().splitlines() == ["EACCES open"] * 4
    for access, wanted in OPENED.items():
        device = rf.Device(node, access=access)
        result = rf.run(["sh", "-c", script], isolation="process", devices=[device], files=PROBE_FILE)
        assert result.stdout.decode().splitlines() == wanted * 2
        assert applied(result)[f"device {node}"].effective == access
    for options in (
        {"devices": [rf.Device(node, "/dev/elsewhere")]},
        {"devices": [rf.Device(node, access="w")], "readable": ["/"]},
    ):
        with pytest.raises(rf.CannotEnforce):
            run_probe("process", "exit", "0", **options)


def test_a_device_of_a_process_that_its_owner_may_use(node: str) -> None:
    result = run_probe("process", "try-open-write", node, devices=[node], user=0)
    assert result.stdout == b"ok\n"


def test_a_guest_has_none_of_the_hosts_devices() -> None:
    with pytest.raises(rf.CannotEnforce) as caught:
        run_probe("vm", "exit", "0", devices=["/dev/zero"])
    assert [one.rule for one in caught.value.unmet] == ["devices"]


UNPRIVILEGED = """
import json, sys, ringfence as rf
from ringfence.wire.launcher import probe_path
files = {"probe": rf.File(open(probe_path(), "rb").read(), 0o755)}
found = {}
for name, device in {
    "rw": rf.Device("/dev/zero", "/dev/z"),
    "r": rf.Device("/dev/zero", "/dev/z", "r"),
    "closed": rf.Device(sys.argv[1], "/dev/z"),
}.items():
    try:
        result = rf.run(["./probe", "try-open-write", "/dev/z"], devices=[device], files=files)
        found[name] = result.stdout.decode()
    except rf.CannotEnforce as error:
        found[name] = error.unmet[0].reason
print(json.dumps(found))
"""


def test_of_an_unprivileged_caller(node: str) -> None:
    found = python_json(UNPRIVILEGED, node)
    assert found["rw"] == "ok\n"
    assert "may do more than r" in found["r"]
    assert "may not do that" in found["closed"]
