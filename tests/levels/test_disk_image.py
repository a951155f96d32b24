"""A disk of the user's own as a guest's root: raw and qcow2, a whole file system or a partition."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.levels.vm import template
from ringfence.levels.vm.sandbox import VmSandbox
from support import disks
from support.sandboxes import PROBE, applied, ended, need, need_level, output

LIMITS = rf.Limits(wall_time=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system with what an image must not decide: a /proc, a /work and a /tmp that lead elsewhere."""
    need_level("vm")
    at = tmp_path_factory.mktemp("disk") / "root"
    for name in ("bin", "etc", "usr/share", "work", "home/somebody"):
        (at / name).mkdir(parents=True)
    shutil.copy(PROBE, at / "bin" / "probe")
    (at / "etc" / "name").write_text("of the disk\n")
    (at / "home" / "somebody" / "f").write_text("not shown")
    (at / "etc" / "resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    (at / "proc").symlink_to("etc")
    (at / "tmp").symlink_to("/etc")
    (at / "share").symlink_to("usr/share")
    (at / "top").write_text("at the top")
    os.mkfifo(at / "pipe")
    return at


@pytest.fixture(scope="module")
def ext4(folder: Path) -> bytes:
    return disks.ext4(folder, folder.parent / "ext4.img")


def test_a_qcow2_of_a_whole_file_system_is_read_only_and_stays_as_it_is(ext4: bytes, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(disks.qcow2(ext4))
    before = image.read_bytes(), image.stat().st_mtime_ns
    with rf.Sandbox(isolation="vm", image=image, user=0) as sandbox:
        assert output(sandbox.run(["probe", "read", "/etc/name"])) == b"of the disk\n"
        assert output(sandbox.run(["probe", "read", "/top"])) == b"at the top"
        top = output(sandbox.run(["probe", "tree", "/home"])) + output(sandbox.run(["probe", "tree", "/tmp"]))
        assert top == b""
        result = sandbox.run(["probe", "try-open-write", "/etc/name"])
        assert result.stdout == b"EROFS open\n"
        assert sandbox.run(["probe", "read", "/pipe"]).stderr == b"ENOENT open\n"
        mounts = output(sandbox.run(["probe", "read", "/proc/self/mountinfo"])).decode().splitlines()
        found = {line.split()[4]: line.split(" - ")[1].split()[0] for line in mounts}
        assert {found[name] for name in ("/bin", "/etc", "/usr", "/top")} == {"ext4"}
        assert (found["/proc"], found["/tmp"], found["/work"]) == ("proc", "tmpfs", "tmpfs")
        assert applied(result)["files"].mechanism == "a qcow2 disk, read-only"
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before


def test_a_disk_that_ends_its_guest_ends_no_second_one(
    ext4: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the template lost over it."""
    image = tmp_path / "disk"
    image.write_bytes(ext4)
    forgotten: list[template.Template] = []
    ran = []

    def ends(opened: VmSandbox, *_: object, **__: object) -> None:
        ran.append(opened._guest.restored)
        raise rf.ProtocolError("the virtual machine ended")

    monkeypatch.setattr(template, "forget", forgotten.append)
    monkeypatch.setattr(VmSandbox, "_run", ends)
    with pytest.raises(rf.ProtocolError, match="machine ended"):
        rf.run(["true"], isolation="vm", image=image)
    assert (ran, forgotten) == ([True], [])


def test_an_overlay_over_the_second_partition_of_a_raw_disk(ext4: bytes, folder: Path, tmp_path: Path) -> None:
    """What comes first is a file system without a root in it. The layer is bounded by limits.disk, and told."""
    other = tmp_path / "boot"
    (other / "grub").mkdir(parents=True)
    image = tmp_path / "disk.qcow2"  # its name says nothing
    image.write_bytes(disks.partitioned(disks.ext4(other, tmp_path / "boot.img", "2M"), ext4))
    limits = rf.Limits(disk="8M")
    options: dict[str, Any] = {"isolation": "vm", "image": image, "overlay": True, "user": 0, "limits": limits}
    with rf.Sandbox(**options) as sandbox:
        assert ended(sandbox.run(["probe", "write", "/etc/name", "changed"])) == ("exited", 0, None)
        result = sandbox.run(["probe", "write", "/usr/share/new", "four"])
        changes = [(one.path, one.kind, one.size_bytes) for one in result.changes or ()]
        assert changes == [("/etc/name", "changed", 7), ("/usr/share/new", "created", 4)]
        assert sandbox.run(["probe", "mkfile", "/usr/big", "12M"]).stdout == b"ENOSPC write\n"
        result = sandbox.run(["probe", "mkfile", "/work/big", "12M"])
        assert ended(result) == ("disk", 1, None)
        assert applied(result)["disk"].effective == 8 << 20
        assert applied(result)["files"].mechanism == "a raw disk, read-only"


def test_a_disk_is_told_its_name_server(ext4: bytes, folder: Path, tmp_path: Path) -> None:
    """Where its /etc/resolv.conf leads to; where it has none, and none can be made, nothing runs."""
    need("/dev/net/tun", os.path.exists("/dev/net/tun"))
    image = tmp_path / "disk"
    image.write_bytes(ext4)
    result = rf.run(["probe", "read", "/etc/resolv.conf"], isolation="vm", image=image, network="nat")
    assert b"nameserver 192.0.0.1" in output(result)
    shutil.copytree(folder / "bin", tmp_path / "root" / "bin")
    (tmp_path / "root" / "etc").mkdir()
    image.write_bytes(disks.ext4(tmp_path / "root", tmp_path / "other.img"))
    options: dict[str, Any] = {"isolation": "vm", "image": image, "network": "nat"}
    with pytest.raises(rf.StartError) as caught:
        rf.run(["probe", "read", "/etc/resolv.conf"], **options)
    assert (caught.value.step, os.strerror(caught.value.errno or 0)) == ("mounts", "Read-only file system")
    result = rf.run(["probe", "read", "/etc/resolv.conf"], overlay=True, **options)
    assert b"nameserver 192.0.0.1" in output(result)


def test_a_disk_without_a_root_is_an_error_and_nothing_runs(folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    with pytest.raises(rf.StartError) as caught:
        rf.run(["true"], isolation="vm", image=image)
    assert (caught.value.step, caught.value.call, os.strerror(caught.value.errno or 0)) == (
        "disk",
        "file system",
        "No such device",
    )
    damaged = bytearray(disks.ext4(folder, tmp_path / "ext4.img", "16M", "-O", "^metadata_csum"))
    damaged[1024 + 0x60] |= 4  # needs_recovery: a journal is to be replayed, which a read-only disk can't have
    image.write_bytes(damaged)
    with pytest.raises(rf.StartError) as caught:
        rf.run(["true"], isolation="vm", image=image)
    assert (caught.value.call, os.strerror(caught.value.errno or 0)) == ("fsconfig create", "Read-only file system")


def test_a_damaged_disk_is_an_error_or_a_run_and_no_hang(ext4: bytes, tmp_path: Path) -> None:
    """Whatever the guest's kernel makes of it."""
    known = random.Random(11)
    for where in (range(1024, 4096), range(4096, 65536), range(len(ext4))):
        damaged = bytearray(ext4)
        for _ in range(200):
            damaged[known.choice(where)] = known.randrange(256)
        damaged[1080:1082] = b"\x53\xef"
        for image in (bytes(damaged), disks.qcow2(bytes(damaged))[:-100_000]):
            (tmp_path / "disk").write_bytes(image)
            start = time.monotonic()
            try:
                rf.run(["probe", "tree", "/etc"], isolation="vm", image=tmp_path / "disk", limits=LIMITS)
            except (rf.StartError, rf.ProtocolError, rf.CannotEnforce):
                pass
            assert time.monotonic() - start < 60


def test_what_would_open_another_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    need_level("vm")
    image = tmp_path / "disk"
    for field, value, said in (("backing_file_offset", 112, "backing"), ("incompatible_features", 4, "data file")):
        image.write_bytes(disks.qcow2_header(1 << 20, **{field: value}).ljust(1 << 20, b"\0"))
        with pytest.raises(rf.CannotEnforce) as caught:
            rf.run(["true"], isolation="vm", image=image)
        assert [(one.rule, said in one.reason) for one in caught.value.unmet] == [("image", True)]
    image.write_bytes(bytes(1 << 20))
    with pytest.raises(rf.CannotEnforce) as caught:
        rf.run(["true"], isolation="vm", image=image, user="nobody")
    assert [one.rule for one in caught.value.unmet] == ["user"]


@pytest.mark.parametrize("isolation", ["process", "container"])
def test_the_other_levels_refuse_a_disk_and_say_why(isolation: str, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    with pytest.raises(rf.CannotEnforce) as caught:
        rf.run(["true"], isolation=isolation, image=image)
    [one] = caught.value.unmet
    assert (one.rule, bool(one.reason), bool(one.help)) == ("image", True, True)
