"""A workload whose user owns its cgroup, as an unprivileged caller's does: what would let it lift a limit that was
asked for is refused. That it would have worked is shown in test_delegated.py.
"""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.api import check_spec
from ringfence.levels import owned
from ringfence.linux.cgroups import systemd
from ringfence.spec import Spec
from support.sandboxes import LOCAL_LEVELS, need, need_cgroup, need_level, need_root

LIMITS = rf.Limits(memory="64M", pids=20)


@pytest.fixture
def unprivileged() -> rf.Host:
    """What is judged here is nothing that an older Landlock would lack."""
    for rule in sorted(LIMITS.asked):
        need_cgroup(rule)
    return rf.host().replace(privileged=False, landlock_abi=7)


def unmet(host: rf.Host, **options: Any) -> dict[str, str]:
    try:
        check_spec(Spec.make(["true"], **options), on=host)
    except rf.CannotEnforce as error:
        return {one.rule: one.reason for one in error.unmet}
    return {}


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_without_a_filter_no_limit_holds(unprivileged: rf.Host, isolation: str) -> None:
    bare = unprivileged.replace(seccomp="there is no libseccomp")
    found = unmet(bare, isolation=isolation, limits=LIMITS)
    assert sorted(found) == ["memory", "pids"]
    assert all("owns its cgroup" in reason and "libseccomp" in reason for reason in found.values())
    # The control: with the default filter, without a limit, and as root, whose cgroup it is then.
    assert unmet(unprivileged, isolation=isolation, limits=LIMITS) == {}
    assert unmet(bare, isolation=isolation, limits=rf.Limits(output="1M")) == {}
    if rf.host().privileged:
        rooted = rf.host().replace(seccomp=bare.seccomp)
        assert unmet(rooted, isolation=isolation, limits=LIMITS) == {}


def test_without_a_filter_a_guests_jail_holds_no_limit(unprivileged: rf.Host) -> None:
    bare = unprivileged.replace(seccomp="there is no libseccomp")
    limits = rf.Limits(memory="64M", cpus=1, pids=20)
    need_level("vm")
    found = unmet(bare, isolation="vm", limits=limits)
    assert sorted(found) == ["cpus", "memory"]  # pids are the guest's own kernel's
    assert unmet(unprivileged, isolation="vm", limits=limits) == {}


def test_a_process_without_landlock_keeps_nothing(unprivileged: rf.Host) -> None:
    bare = unprivileged.replace(landlock_abi=0)
    limits = rf.Limits(memory="64M", pids=20, wall_time=5, output="1M")
    assert sorted(unmet(bare, isolation="process", limits=limits, network="none")) == [
        *("memory", "network", "output", "pids", "wall_time"),
    ]
    # What nobody asked for is applied as far as it goes, and told; a container doesn't need Landlock for any of it.
    assert unmet(bare, isolation="process") == {}
    assert unmet(bare, isolation="container", limits=limits, network="none") == {}
    if rf.host().privileged:
        rooted = rf.host().replace(landlock_abi=0)
        assert unmet(rooted, isolation="process", limits=limits, network="none") == {}
        assert sorted(unmet(rooted, isolation="process", limits=limits, network="none", user=1000)) == ["network"]
        assert sorted(unmet(rooted, isolation="process", limits=limits, user=0)) == ["memory", "pids"]


def test_that_processes_are_within_reach_is_told() -> None:
    from ringfence.api import run_spec

    need("root", rf.host().privileged)
    spec = Spec.make(["true"], isolation="process", user=1000)
    told = {one.rule: one for one in run_spec(spec, rf.host().replace(landlock_abi=0)).applied}
    assert told["other processes of its user"].effective is None
    assert "other processes of its user" not in {one.rule for one in run_spec(spec).applied}


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_cgroups_are_not_among_what_is_writable(unprivileged: rf.Host, isolation: str, tmp_path: Path) -> None:
    need_root()  # who may write there
    ways = ["mount", "move_mount", "fsmount", "open_tree", "open_tree_attr"]
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ways, "action": "SCMP_ACT_ERRNO"}]}
    for number, place in enumerate(
        ("/sys/fs/cgroup", os.fsdecode(rf.host().cgroups.controller("memory").path), "/sys")
    ):
        link = tmp_path / str(number)  # a process sees a mount where it is on the host, which can't be below /sys
        link.symlink_to(place)
        target = link if isolation == "process" else "/data"

        def judged(writable: bool, link: Path = link, target: Path | str = target, **more: Any) -> dict[str, str]:
            mount = rf.Mount(link, target, writable=writable, secret=True)
            return unmet(unprivileged, isolation=isolation, mounts=[mount], **more)

        assert "could change its limits" in judged(True, limits=LIMITS)["mounts"]
        assert judged(True) == {}
        assert judged(False, limits=LIMITS) == {}
        # Seen read-only they are enough for clone3, with CLONE_INTO_CGROUP.
        assert list(judged(False, limits=LIMITS, seccomp=profile)) == ["seccomp"]
    if isolation == "process":
        found = unmet(unprivileged, isolation=isolation, writable=["/sys/fs/cgroup"], limits=LIMITS)
        assert list(found) == ["writable"]
        assert unmet(unprivileged, isolation=isolation, readable=["/"], limits=LIMITS) == {}


def test_what_shows_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_cgroup("memory")
    (tmp_path / "link").symlink_to("/sys/fs/cgroup")
    for place in ("/", "/sys", "/sys/fs", "/sys/fs/cgroup", "/sys/fs/cgroup/", tmp_path / "link", "/no/such"):
        assert owned.shows_cgroups(str(place)), place
    for place in ("/usr", "/sys/kernel", tmp_path):
        assert not owned.shows_cgroups(str(place)), place
    line = b"1 2 0:99 / /a\\040b\xc3\xa9/c rw - cgroup2 none rw\n"
    with monkeypatch.context() as patch:
        patch.setattr(owned, "open", lambda *_: io.BytesIO(line), raising=False)
        patch.setattr(os.path, "realpath", lambda _: b"/a b\xc3\xa9")
        assert owned.shows_cgroups("/")
        patch.setattr(os.path, "realpath", lambda _: b"/a b")
        assert not owned.shows_cgroups("/")
    held = os.open("/sys/fs", os.O_PATH)
    assert owned.shows_cgroups(held)
    os.close(held)


def test_systemd_would_move_it_elsewhere(
    unprivileged: rf.Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """StartTransientUnit and AttachProcessesToUnit, over any UNIX socket of its user's."""
    monkeypatch.setattr(owned, "_BOOTED", str(tmp_path))
    found = unmet(unprivileged, isolation="process", network="host", limits=LIMITS)
    assert sorted(found) == ["memory", "pids"]
    assert all("systemd" in reason for reason in found.values())
    if rf.host().privileged:
        assert unmet(rf.host(), isolation="process", network="host", limits=LIMITS) == {}
        assert sorted(unmet(rf.host(), isolation="process", network="host", limits=LIMITS, user=1000)) == [
            "memory",
            "pids",
        ]
    for harmless in ("none", rf.Network("host", allow=["*:443"])):
        assert unmet(unprivileged, isolation="process", network=harmless, limits=LIMITS) == {}
    assert unmet(unprivileged, isolation="container", network="host", limits=LIMITS) == {}
    # In a container it takes a socket that is mounted, read-only or not.
    folder = tmp_path / "runtime"
    (folder / "systemd").mkdir(parents=True)
    places = [str(folder / "systemd" / "private"), str(folder / "bus"), "/no/such"]
    monkeypatch.setattr(systemd, "places", lambda: places)
    (tmp_path / "other").mkdir()
    with socket.socket(socket.AF_UNIX) as manager, socket.socket(socket.AF_UNIX) as bus:
        manager.bind(str(folder / "systemd" / "private"))
        bus.bind(str(folder / "bus"))
        for shown in (folder, folder / "bus", folder / "systemd", tmp_path):
            mounts = [rf.Mount(shown, "/data", secret=True)]
            asked: dict[str, Any] = {"isolation": "container", "mounts": mounts}
            assert list(unmet(unprivileged, limits=LIMITS, **asked)) == ["mounts"], shown
            assert unmet(unprivileged, **asked) == {}
        mounts = [rf.Mount(tmp_path / "other", "/data", secret=True)]
        assert unmet(unprivileged, isolation="container", mounts=mounts, limits=LIMITS) == {}
    monkeypatch.setattr(owned, "_BOOTED", str(tmp_path / "missing"))
    assert unmet(unprivileged, isolation="process", network="host", limits=LIMITS) == {}
