"""An image in a folder of another account, who puts something else in its place while root looks at it.

Each swap is at a known moment: after the look that a hook is in.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.errors import SpecError
from ringfence.images import disk, held, tree
from ringfence.levels.vm import console, images, mkfs
from support import disks, unprivileged
from support.sandboxes import PROBE, need_level, need_root, output

OTHER = 65432  # no account's


class Place:
    """x/root, which is named, and secret/root, which it becomes by a symlink in the place of x."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.secret = top / "secret"
        self.image = top / "x" / "root"
        for folder, text in ((self.image, "of the image"), (self.secret / "root", "of the host")):
            (folder / "bin").mkdir(parents=True)
            shutil.copy(PROBE, folder / "bin" / "probe")
            (folder / "data").mkdir()
            (folder / "data" / "f").write_text(text)
            (folder / "top").write_text(text)

    def swap(self) -> None:
        os.rename(self.top / "x", self.top / "away")
        os.symlink(self.secret, self.top / "x")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def after(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, count: int, swap: Callable[[], None]) -> list[int]:
    """Calls `swap` once, after the call of that number."""
    real = getattr(where, name)
    calls = [0]

    def hooked(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        calls[0] += 1
        if calls[0] == count:
            swap()
        return found

    monkeypatch.setattr(where, name, hooked)
    return calls


@pytest.mark.parametrize("overlay", [False, True])
def test_a_container_shows_what_it_listed(place: Place, monkeypatch: pytest.MonkeyPatch, overlay: bool) -> None:
    need_root()
    need_level("container")
    calls = after(monkeypatch, tree, "entries", 2, place.swap)
    result = rf.run(["probe", "read", "/data/f"], image=place.image, overlay=overlay)
    assert output(result) == b"of the image"
    assert calls == [2]
    assert (place.image / "data" / "f").read_text() == "of the host"  # by its path


@pytest.mark.parametrize("overlay", [False, True])
def test_a_symlink_on_the_way_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch, overlay: bool) -> None:
    """It wasn't there when the spec was made of the path."""
    need_level("container")
    after(monkeypatch, tree, "entries", 1, place.swap)
    with pytest.raises(SpecError, match="can't be read"):
        rf.run(["probe", "read", "/data/f"], image=place.image, overlay=overlay)


def test_an_entry_that_became_a_symlink_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    need_root()
    need_level("container")

    def swap() -> None:
        os.rename(place.image / "data", place.top / "away")
        os.symlink(place.secret / "root" / "data", place.image / "data")

    after(monkeypatch, tree, "entries", 2, swap)
    with pytest.raises(SpecError, match="data was replaced while it was looked at"):
        rf.run(["probe", "read", "/data/f"], image=place.image)


UNPRIVILEGED = """
import json, os, sys
from pathlib import Path
import ringfence as rf
from ringfence.images import tree
top, number = sys.argv[1], int(sys.argv[2])
real, calls = tree.entries, [0]
def hooked(*args):
    found = real(*args)
    calls[0] += 1
    if calls[0] == number:
        os.rename(top + "/x", top + "/away")
        os.symlink(top + "/secret", top + "/x")
    return found
tree.entries = hooked
try:
    said = rf.run(["probe", "read", "/data/f"], image=top + "/x/root").stdout.decode()
except rf.RingfenceError as error:
    said = type(error).__name__ + " " + str(error)
print(json.dumps(said))
"""


def test_an_unprivileged_callers_init_follows_no_symlink(place: Place) -> None:
    """Its init opens the image by its path, once more."""
    need_root()
    need_level("container")
    home = unprivileged.home() / "swapped"
    shutil.copytree(place.top, home, symlinks=True)
    for one in (home, *home.rglob("*")):
        os.chown(one, unprivileged.UID, unprivileged.UID, follow_symlinks=False)
    try:
        assert unprivileged.python_json(UNPRIVILEGED, str(home), "0") == "of the image"
        said = unprivileged.python_json(UNPRIVILEGED, str(home), "2")
        assert said.startswith("StartError") and "open_tree" in said
        assert (home / "x" / "root" / "data" / "f").read_text() == "of the host"
    finally:
        shutil.rmtree(home)


needs_mkfs = pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="needs mkfs.erofs (erofs-utils)")


def swapping_mkfs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swaps, lets the real one work, and swaps back: no stat of the folder tells it."""
    real = shutil.which("mkfs.erofs")
    tool = place.top / "fake" / "mkfs.erofs"
    tool.parent.mkdir()
    tool.write_text(
        f"""#!/bin/sh
cd '{place.top}' && mv x away && ln -s secret x && touch swapped
{real} "$@"
status=$?
rm x && mv away x
exit $status
"""
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")


@needs_mkfs
def test_a_disk_is_made_of_the_folder_that_was_looked_at(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    need_root()
    os.chown(place.top / "x", OTHER, OTHER)
    swapping_mkfs(place, monkeypatch)
    path = images.erofs_disk(str(place.image), str(place.top / "cache"))
    content = Path(path).read_bytes()
    assert (place.top / "swapped").exists()
    assert b"of the image" in content
    assert b"of the host" not in content
    assert sorted(os.listdir(os.path.dirname(path))) == ["disk.erofs", "seal"]
    assert str(place.top).encode() not in Path("/proc/self/mountinfo").read_bytes()


@needs_mkfs
def test_without_a_mount_namespace_a_way_that_others_can_change_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_root()
    real = mkfs._works
    monkeypatch.setattr(mkfs, "_works", lambda prefix: prefix != mkfs._NAMESPACE and real(prefix))
    cache = str(place.top / "cache")
    assert b"of the image" in Path(images.erofs_disk(str(place.image), cache)).read_bytes()
    (place.image / "data" / "f").write_text("of the image, once more")
    (place.top / "x").chmod(0o777)
    with pytest.raises(SpecError, match=r"x, on the way to .*, is writable by other accounts"):
        images.erofs_disk(str(place.image), cache)
    (place.top / "x").chmod(0o755)
    os.chown(place.top / "x", OTHER, OTHER)
    with pytest.raises(SpecError, match=f"x, on the way to .*, belongs to uid {OTHER}"):
        images.erofs_disk(str(place.image), cache)
    os.chown(place.top / "x", 0, 0)
    assert b"once more" in Path(images.erofs_disk(str(place.image), cache)).read_bytes()


def another(path: Path) -> None:
    """Another file in its place, of the same content."""
    shutil.copy(path, path.parent / "other")
    os.rename(path.parent / "other", path)


def link(path: Path) -> None:
    os.rename(path, path.parent / "other")
    os.symlink("other", path)


def pipe(path: Path) -> None:
    os.unlink(path)
    os.mkfifo(path)


@pytest.mark.parametrize("swap", [another, link, pipe])
def test_a_disk_that_was_replaced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: Callable[[Path], None]
) -> None:
    need_level("vm")
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    calls = after(monkeypatch, disk, "inspect", 2, lambda: swap(image))
    with pytest.raises(SpecError, match="disk was replaced while it was looked at"):
        rf.run(["true"], isolation="vm", image=image)
    assert calls == [2]


@pytest.mark.parametrize("which", ["kernel", "initrd", "disk"])
def test_a_file_of_a_system_that_was_replaced_is_refused(tmp_path: Path, which: str) -> None:
    need_level("vm")
    files = {name: tmp_path / name for name in ("kernel", "initrd", "disk")}
    for path in files.values():
        path.write_bytes(bytes(1 << 20))
    system = console.System(**{name: os.fsencode(path) for name, path in files.items()})  # type: ignore[arg-type]
    another(files[which])
    with pytest.raises(SpecError, match=f"{which} was replaced while it was looked at"):
        console._start(system)


def test_a_systems_qcow2_has_nothing_behind_it(tmp_path: Path) -> None:
    """Whatever its header says once it was looked at: QEMU is told so."""
    (tmp_path / "disk").write_bytes(disks.qcow2(bytes(1 << 20)))
    system = console.System(disk=os.fsencode(tmp_path / "disk"))
    given = [os.fsdecode(one) for one in console.arguments(system, "tcg", b"qemu")]
    drive = given[given.index("-drive") + 1]
    before, _, node = drive.partition("file=json:")
    assert before == "if=none,id=disk,snapshot=on,werror=report,rerror=report,"
    assert json.loads(node.replace(",,", ",")) == {
        "driver": "qcow2",
        "read-only": True,
        "file": {"driver": "file", "filename": "/vm/disk", "read-only": True, "locking": "off"},
        "backing": None,
    }


def test_a_symlink_that_is_swapped_while_it_is_resolved(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.top / "link").symlink_to("x")

    def no_link(path: Any, **_: Any) -> str:
        raise OSError(22, os.strerror(22), path)  # as for a folder

    monkeypatch.setattr(os, "readlink", no_link)
    with pytest.raises(SpecError, match="Invalid argument"):
        rf.run(["probe", "exit", "0"], image=place.top / "link" / "root")


def test_a_path_without_symlinks(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    fd = held.open_real(str(tmp_path) + "/a//./b/")
    try:
        assert os.path.samestat(os.fstat(fd), (tmp_path / "a" / "b").stat())
    finally:
        os.close(fd)
    for path in ("link/b", "a/none"):
        with pytest.raises(OSError, match="directory"):
            held.open_real(str(tmp_path / path))


def test_what_is_no_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To open a device may do something: rewind a tape, arm a watchdog."""
    real = os.open
    flags_used = []

    def spy(path: Any, flags: int, *args: Any, **options: Any) -> int:
        flags_used.append(flags)
        return real(path, flags, *args, **options)

    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "open", spy)
    with pytest.raises(SpecError, match="no regular file"):
        disk.inspect(str(tmp_path / "pipe"))
    assert flags_used and all(flags & os.O_PATH for flags in flags_used)
