from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence import _cache
from ringfence.errors import SpecError, Unavailable
from ringfence.levels.vm import images

needs_mkfs = pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="needs mkfs.erofs (erofs-utils)")


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "root fs, with a comma"
    (root / "bin").mkdir(parents=True)
    (root / "etc").mkdir()
    (root / "bin/tool").write_bytes(b"#!/bin/sh\n" * 1000)
    (root / "bin/tool").chmod(0o4755)
    (root / "etc/empty").touch()
    os.link(root / "bin/tool", root / "bin/hard")
    os.symlink("bin/tool", root / "link")
    os.symlink("/nonexistent/far/away", root / "dangling")
    os.mkfifo(root / "etc/fifo")
    Path(os.fsdecode(bytes(root) + b"/etc/caf\xe9")).write_text("x")
    with open(root / "etc/sparse", "wb") as file:
        file.truncate(300_000)
    os.utime(root / "etc/empty", (1_000_000_000, 1_000_000_000))
    return root


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def same_size_and_time(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"#!/bin/SH\n" * 1000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def another_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("bin/tooL")


def deep(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "file").touch()


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda root: append(root / "bin/tool"),
    "content of the same size and time": lambda root: same_size_and_time(root / "bin/tool"),
    "mode": lambda root: (root / "bin/tool").chmod(0o755),
    "time": lambda root: os.utime(root / "etc/empty", (5, 5)),
    "a new file": lambda root: (root / "etc/new").touch(),
    "a file removed": lambda root: (root / "etc/empty").unlink(),
    "a name": lambda root: (root / "etc/empty").rename(root / "etc/Empty"),
    "a link's target": lambda root: another_link(root / "link"),
    "a file deep down": lambda root: deep(root / "a/b/c"),
    "the folder's own mode": lambda root: root.chmod(0o700),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_gives_another_digest(rootfs: Path, change: str) -> None:
    before = images.tree_digest(str(rootfs))
    assert images.tree_digest(str(rootfs)) == before
    CHANGES[change](rootfs)
    assert images.tree_digest(str(rootfs)) != before


def test_reading_is_no_change(rootfs: Path) -> None:
    before = images.tree_digest(str(rootfs))
    (rootfs / "bin/tool").read_bytes()
    os.listdir(rootfs / "bin")
    assert images.tree_digest(str(rootfs)) == before


@needs_mkfs
def test_the_image_is_made_once(rootfs: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    said: list[str] = []
    path = images.erofs_disk(str(rootfs), cache, progress=said.append)
    assert len(said) == 1
    about = os.stat(path)
    assert about.st_size == 64 << 20  # a class of sizes, so that one template serves several images
    assert 10_000 < about.st_blocks * 512 < 1 << 20  # the rest is a hole
    # The superblock's magic number, at 1024.
    assert Path(path).read_bytes()[1024:1028] == b"\xe2\xe1\xf5\xe0"
    assert images.erofs_disk(str(rootfs) + "/", cache, progress=said.append) == path
    os.symlink(rootfs, tmp_path / "alias")
    with pytest.raises(SpecError, match="is not a folder"):
        images.erofs_disk(str(tmp_path / "alias"), cache)
    assert len(said) == 1
    assert os.stat(path).st_ino == about.st_ino

    with open(path, "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    assert images.erofs_disk(str(rootfs), cache, progress=said.append) == path
    assert len(said) == 2
    assert b"damage" not in Path(path).read_bytes()[4990:5010]
    os.truncate(path, 8192)
    assert images.erofs_disk(str(rootfs), cache, progress=said.append) == path
    assert len(said) == 3
    assert os.stat(path).st_size == 64 << 20

    append(rootfs / "bin/tool")
    assert images.erofs_disk(str(rootfs), cache, progress=said.append) != path
    assert len(said) == 4


@needs_mkfs
def test_the_image_holds_the_tree(rootfs: Path, tmp_path: Path) -> None:
    if shutil.which("fsck.erofs") is None or shutil.which("dump.erofs") is None:
        pytest.skip("needs fsck.erofs and dump.erofs (erofs-utils)")
    path = images.erofs_disk(str(rootfs), str(tmp_path / "cache"))
    out = tmp_path / "out"
    subprocess.run(["fsck.erofs", f"--extract={out}", path], check=True, capture_output=True)
    assert (out / "bin/tool").read_bytes() == b"#!/bin/sh\n" * 1000
    assert (out / "etc/sparse").read_bytes() == bytes(300_000)
    assert os.readlink(out / "link") == "bin/tool"
    assert os.readlink(out / "dangling") == "/nonexistent/far/away"
    assert sorted(os.listdir(bytes(out / "etc"))) == sorted(os.listdir(bytes(rootfs / "etc")))
    shown = subprocess.run(["dump.erofs", "--path=/bin/tool", path], check=True, capture_output=True, text=True)
    # dump.erofs shows no more of the mode than this.
    assert "Access: 0755" in shown.stdout
    assert f"Uid: {os.geteuid()}" in shown.stdout
    assert "Links: 2" in shown.stdout
    shown = subprocess.run(["dump.erofs", "--path=/etc/empty", path], check=True, capture_output=True, text=True)
    assert "2001-09-09" in shown.stdout


@needs_mkfs
def test_only_the_newest_images_of_a_folder_are_kept(rootfs: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    made = []
    for _ in range(5):
        append(rootfs / "bin/tool")
        made.append(images.erofs_disk(str(rootfs), cache))
    other = tmp_path / "other"
    other.mkdir()
    images.erofs_disk(str(other), cache)
    assert [os.path.exists(path) for path in made] == [False, False, True, True, True]


@needs_mkfs
def test_all_images_together_are_bounded(rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder whose image was made longest ago goes first; what was made just now stays, however large it is."""
    cache = str(tmp_path / "cache")
    made = []
    for number in range(3):
        folder = tmp_path / f"folder{number}"
        folder.mkdir()
        (folder / "f").write_bytes(os.urandom(500_000))
        made.append(images.erofs_disk(str(folder), cache))
        monkeypatch.setattr(images, "MOST_CACHED_BYTES", 1_200_000)
    assert [os.path.exists(path) for path in made] == [False, True, True]
    monkeypatch.setattr(images, "MOST_CACHED_BYTES", 1000)
    last = images.erofs_disk(str(rootfs), cache)
    assert [os.path.exists(path) for path in [*made, last]] == [False, False, False, True]


@pytest.mark.parametrize(("size", "found"), [(1, 64 << 20), (64 << 20, 64 << 20), ((64 << 20) + 1, 128 << 20)])
def test_a_disk_has_one_of_few_sizes(size: int, found: int) -> None:
    assert images.size_class(size) == found


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match="is not a folder"):
        images.erofs_disk(str(tmp_path / "file"), str(tmp_path / "cache"))
    with pytest.raises(SpecError, match="ENOENT"):
        images.erofs_disk(str(tmp_path / "missing"), str(tmp_path / "cache"))


def test_too_much(rootfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images.tree_digest(str(rootfs))
    monkeypatch.setattr(images, "MAX_ENTRIES", 5)
    with pytest.raises(SpecError, match="at most 5 entries"):
        images.tree_digest(str(rootfs))
    monkeypatch.setattr(images, "MAX_ENTRIES", 1000)
    monkeypatch.setattr(images, "MAX_BYTES", 200_000)
    with pytest.raises(SpecError, match="too large"):
        images.tree_digest(str(rootfs))


def test_a_sparse_file_does_not_fill_the_host(rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner pays nothing for it, and an image has no holes."""
    fake_mkfs(tmp_path, monkeypatch, f"touch '{tmp_path}/ran'; exit 3")
    cache = str(tmp_path / "cache")
    with open(rootfs / "etc/sparse", "wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(SpecError, match="too large"):
        images.erofs_disk(str(rootfs), cache)
    about = os.statvfs(tmp_path)
    os.truncate(rootfs / "etc/sparse", 1 << 30)
    short = [*about[:4], (1 << 30) // about.f_frsize, *about[5:]]  # less than the file and what stays free
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(short))
    with pytest.raises(Unavailable, match=r"may need 1280 MiB .* the cache folder has 1024 MiB") as caught:
        images.erofs_disk(str(rootfs), cache)
    assert "RINGFENCE_CACHE" in caught.value.help
    assert left(tmp_path / "cache") == []
    assert not (tmp_path / "ran").exists()


def test_an_unreadable_folder_is_named(rootfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refuse(path: object) -> object:
        # Root may read everything, so that the real thing can't fail here.
        if os.fsencode(path).endswith(b"/etc"):  # type: ignore[arg-type]
            raise PermissionError(13, "Permission denied", path)
        return real(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SpecError, match=r"/etc can't be read: EACCES"):
        images.tree_digest(str(rootfs))


def test_no_mkfs(rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Unavailable, match=r"mkfs\.erofs") as caught:
        images.erofs_disk(str(rootfs), str(tmp_path / "cache"))
    assert "apt-get install erofs-utils" in caught.value.help


def fake_mkfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    tool = tmp_path / "fake/mkfs.erofs"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{text}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")


def left(cache: Path) -> list[str]:
    return [name for _, folders, _ in os.walk(cache) for name in folders if "." in name]


def test_a_tree_that_changes_while_it_is_read(rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mkfs(tmp_path, monkeypatch, f'for image; do :; done; echo x >> "{rootfs}/etc/empty"; : > "$5"')
    with pytest.raises(SpecError, match="changed while it was read"):
        images.erofs_disk(str(rootfs), str(tmp_path / "cache"))
    assert left(tmp_path / "cache") == []


MAKER = """
import sys
from ringfence.levels.vm import images
images.erofs_disk(sys.argv[1], sys.argv[2])
"""


def test_mkfs_ends_with_its_caller_and_what_it_made_is_removed(
    rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file, cache = tmp_path / "pid", tmp_path / "cache"
    fake_mkfs(tmp_path, monkeypatch, f"echo $$ > '{pid_file}.new'; mv '{pid_file}.new' '{pid_file}'; exec sleep 60")
    with subprocess.Popen([sys.executable, "-c", MAKER, str(rootfs), str(cache)]) as maker:
        wait_until(pid_file.exists)
        fd = os.pidfd_open(int(pid_file.read_text()))
        try:
            _cache.sweep(str(cache))
            assert left(cache) != []  # it lives, and holds the lock
            maker.kill()
            maker.wait()
            assert select.select([fd], [], [], 10)[0]
        finally:
            os.close(fd)
    assert left(cache) != []
    _cache.sweep(str(cache))
    assert left(cache) == []


def wait_until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_mkfs_that_fails(rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mkfs(tmp_path, monkeypatch, "echo 'no space' >&2; exit 3")
    with pytest.raises(Unavailable, match="failed with 3: no space"):
        images.erofs_disk(str(rootfs), str(tmp_path / "cache"))
    assert left(tmp_path / "cache") == []
