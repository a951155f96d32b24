"""A rootfs folder that is out to get something: links in the place of everything, odd files, too much of it."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from support.sandboxes import PROBE, ended, need_root, output

OVERLAYS = (False, True)


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy(PROBE, root / "bin" / "probe")
    return root


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What must not be reached: beside the rootfs, readable by all."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text("of the host")
    (folder / "passwd").write_text("root:x:4242:4242::/:/bin/sh\n")
    return folder


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("to", ["absolute", "dots"])
def test_links_to_the_host_in_every_place(rootfs: Path, outside: Path, to: str, overlay: bool) -> None:
    target = str(outside) if to == "absolute" else "../" * 20 + str(outside).lstrip("/")
    names = ("proc", "dev", "etc", "work", "tmp", "sys", "run", "home", "usr", "lib", "data")
    for name in names:
        (rootfs / name).symlink_to(target)
    image: dict[str, Any] = {"image": rootfs, "overlay": overlay}
    for name in ("etc", "usr", "lib", "data"):  # as in the image, and so leading nowhere
        result = rf.run(["probe", "try-open-read", f"/{name}/secret"], **image)
        assert result.stdout == b"ENOENT open\n", name
    assert output(rf.run(["probe", "stat", "/dev/null"], **image)).startswith(b"char ")
    for name in ("work", "tmp"):
        result = rf.run(["probe", "touch-out", f"/{name}/made"], **image)
        assert ended(result)[:2] == ("exited", 0)
    # A mount on such a link lands where it leads to inside, which is nowhere.
    with pytest.raises(rf.StartError) as caught:
        rf.run(["probe", "exit", "0"], mounts=[rf.Mount(outside, "/data")], **image)
    assert caught.value.step == "mounts"
    assert sorted(os.listdir(outside)) == ["passwd", "secret"]


def test_a_user_is_not_looked_up_in_the_hosts_files(rootfs: Path, outside: Path) -> None:
    (rootfs / "etc").symlink_to(outside)
    with pytest.raises(rf.CannotEnforce) as caught:
        rf.run(["probe", "exit", "0"], image=rootfs, user="someone")
    assert [one.rule for one in caught.value.unmet] == ["user"]
    (rootfs / "etc").unlink()
    (rootfs / "etc").mkdir()
    for make in ("fifo", "link"):
        passwd = rootfs / "etc" / "passwd"
        os.mkfifo(passwd) if make == "fifo" else passwd.symlink_to(outside / "passwd")
        with pytest.raises(rf.CannotEnforce):
            rf.run(["probe", "exit", "0"], image=rootfs, user="someone")
        (rootfs / "etc" / "passwd").unlink()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_odd_files_at_the_top(rootfs: Path, overlay: bool) -> None:
    need_root()  # for device nodes
    os.mkfifo(rootfs / "fifo")
    os.mknod(rootfs / "disk", stat.S_IFBLK | 0o666, os.stat("/").st_dev)
    os.mknod(rootfs / "mem", stat.S_IFCHR | 0o666, os.makedev(1, 1))
    (rootfs / "new\nline").mkdir()
    (rootfs / "a b,c:d\\e").mkdir()
    (rootfs / "a b,c:d\\e" / "f").write_text("in it")
    (rootfs / "bin" / "disk").unlink(missing_ok=True)
    os.mknod(rootfs / "bin" / "disk", stat.S_IFBLK | 0o666, os.stat("/").st_dev)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(rootfs / "socket"))
        image: dict[str, Any] = {"image": rootfs, "overlay": overlay}
        assert output(rf.run(["probe", "read", "/a b,c:d\\e/f"], **image)) == b"in it"
        for name in ("fifo", "disk", "mem", "socket"):
            assert rf.run(["probe", "stat", f"/{name}"], **image).stderr == b"ENOENT lstat\n"
        assert output(rf.run(["probe", "stat", "/new\nline"], **image)).startswith(b"dir 0755")
        # Below the top it is there, and can't be opened: nodev.
        for user in (None, 0):
            result = rf.run(["probe", "try-open-read", "/bin/disk"], user=user, **image)
            assert result.stdout == b"EACCES open\n"


def test_too_many_entries_at_the_top(rootfs: Path) -> None:
    for number in range(60):
        (rootfs / f"d{number}").mkdir()
    with pytest.raises(rf.SpecError, match="more than 40 folders and files"):
        rf.run(["probe", "exit", "0"], image=rootfs)
    for number in range(10_000):
        (rootfs / f"l{number}").symlink_to("bin")
    with pytest.raises(rf.SpecError, match="more than 200 entries"):
        rf.run(["probe", "exit", "0"], image=rootfs)


@pytest.fixture
def swapped(rootfs: Path, outside: Path) -> Iterator[Path]:
    """/data of the image is, from moment to moment, a folder or a link to outside."""
    (rootfs / "data").mkdir()
    (rootfs / "data" / "mine").write_text("of the image")
    (rootfs / "data" / "at").mkdir()
    stop = threading.Event()

    def swap() -> None:
        link, away = rootfs.parent / "link", rootfs.parent / "away"
        link.symlink_to(outside)
        while not stop.is_set():
            os.rename(rootfs / "data", away)
            os.rename(link, rootfs / "data")
            os.rename(rootfs / "data", link)
            os.rename(away, rootfs / "data")

    thread = threading.Thread(target=swap)
    thread.start()
    yield rootfs
    stop.set()
    thread.join()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_entry_that_is_swapped_for_a_link_under_way(swapped: Path, outside: Path, overlay: bool) -> None:
    """Whatever comes of it, it is never what lies outside."""
    (outside / "at").mkdir()
    seen = {b"of the image": 0, b"": 0}
    for number in range(150):
        mounts = [rf.Mount("/usr/share", "/data/at")] if number % 2 else []
        try:
            result = rf.run(["probe", "read", "/data/secret"], image=swapped, overlay=overlay, mounts=mounts)
        except (rf.StartError, rf.SpecError, rf.KernelError):
            continue
        assert b"of the host" not in result.stdout
        seen[b""] += 1
    assert seen[b""] > 0
    assert os.listdir(outside / "at") == []


@pytest.mark.parametrize("what", ["folder", "tmpfs"])
def test_a_mount_is_not_led_over_proc(rootfs: Path, tmp_path: Path, what: str) -> None:
    """By it the caller's folder would be what init reads back of the command, and no mask of /proc would be left."""
    (rootfs / "data").symlink_to("proc")
    (rootfs / "other").symlink_to("tmp")
    source = tmp_path / "source"
    source.mkdir()

    def mount(target: str) -> rf.Mount | rf.Tmpfs:
        return rf.Mount(source, target) if what == "folder" else rf.Tmpfs(target)

    assert rf.run(["probe", "exit", "0"], image=rootfs, mounts=[mount("/other")]).exit_code == 0
    with pytest.raises(rf.StartError) as caught:
        rf.run(["probe", "exit", "0"], image=rootfs, mounts=[mount("/data")])
    assert (caught.value.errno_name, caught.value.step) == ("EPERM", "mounts")
