"""A kernel of the user's own: `kernel=`, with our init in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ringfence as rf
from ringfence.levels.vm import kernel
from support.sandboxes import PROBE, SOURCES, applied, need_level, output

# What the one here lacks. Debian's cloud kernel lacks it, too.
LEFT_OUT = ("9p", "9pnet", "9pnet_virtio")


class Own(NamedTuple):
    """A kernel that says that it is another one, its modules without 9p, and an image for its guests."""

    path: Path
    modules: Path
    release: str
    image: Path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    need_level("vm")
    found = kernel.find()
    assert found is not None
    folder = tmp_path_factory.mktemp("own")
    before = found.release.encode()
    # Of the same length, so that nothing in it moves. Modules name the release that they were built for.
    release = (b"0" if before[:1] != b"0" else b"1") + before[1:]
    (folder / "vmlinux").write_bytes(Path(found.vmlinux).read_bytes().replace(before, release))
    modules = folder / "lib/modules" / release.decode()
    (modules / "kernel/drivers").mkdir(parents=True)
    for name in set(os.listdir(found.modules)) - {f"{one}.ko" for one in LEFT_OUT}:
        data = Path(found.modules, name).read_bytes()
        (modules / "kernel/drivers" / name).write_bytes(data.replace(before, release))
    (modules / "modules.builtin").write_text("".join(f"kernel/lib/{one}.ko\n" for one in sorted(found.builtin)))
    (folder / "image/bin").mkdir(parents=True)
    shutil.copy(PROBE, folder / "image/bin/probe")
    return Own(folder / "vmlinux", modules, release.decode(), folder / "image")


def test_two_kernels_side_by_side(own: Own) -> None:
    """Both run at once; the same image, the same command, two answers."""
    chosen = rf.Kernel(own.path, append="ringfence_test=1")  # its modules are found beside it
    with (
        rf.Sandbox(isolation="vm", image=own.image) as usual,
        rf.Sandbox(isolation="vm", image=own.image, kernel=chosen) as other,
    ):
        results = [one.run(["probe", "read", "/proc/sys/kernel/osrelease"]) for one in (usual, other, usual)]
        releases = [output(one).decode().strip() for one in results]
        words = output(other.run(["probe", "read", "/proc/cmdline"])).split()
    prepared = kernel.find()
    assert prepared is not None
    assert releases == [prepared.release, own.release, prepared.release]
    rows = [applied(one)["kernel"] for one in results]
    assert [one.effective for one in rows] == releases
    assert [one.requested for one in rows] == [None, str(own.path), None]
    assert b"ringfence_test=1" in words


def refused(**options: Any) -> list[tuple[str, str]]:
    with pytest.raises(rf.CannotEnforce) as caught:
        rf.run(["true"], **options)
    assert all(one.help for one in caught.value.unmet)
    return [(one.rule, one.reason) for one in caught.value.unmet]


def test_what_its_modules_do_not_give_is_refused_before_anything_starts(own: Own) -> None:
    start = time.monotonic()
    for more in ({}, {"image": own.image, "mounts": [rf.Mount(own.image, "/data")]}):
        [(rule, reason)] = refused(isolation="vm", kernel=rf.Kernel(own.path, own.modules), **more)
        assert rule == "kernel" and f"{own.release} has no 9p" in reason
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("isolation", ["process", "container"])
def test_the_other_levels_refuse_it_and_say_why(isolation: str, own: Own) -> None:
    [(rule, reason)] = refused(isolation=isolation, kernel=own.path)
    assert rule == "kernel" and "the host's kernel" in reason


def test_one_that_does_not_come_up_ends_soon_and_its_console_is_told(own: Own) -> None:
    start = time.monotonic()
    with pytest.raises(rf.ProtocolError, match=r"did not boot.*console: .*Kernel panic") as caught:
        rf.run(["true"], isolation="vm", image=own.image, kernel=rf.Kernel(own.path, append="rdinit=/none"))
    assert len(str(caught.value)) < 1000
    assert time.monotonic() - start < 60


def test_what_is_no_kernel(own: Own, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"no kernel" * 1000)
    [(rule, reason)] = refused(isolation="vm", kernel=tmp_path / "text")
    assert rule == "kernel" and "neither" in reason
    # Swapped once the spec was made: for what only the caller may read.
    shutil.copy(own.path, tmp_path / "vmlinux")
    chosen = rf.Kernel(tmp_path / "vmlinux", own.modules)
    (tmp_path / "vmlinux").unlink()
    (tmp_path / "vmlinux").symlink_to(own.path)
    [(rule, reason)] = refused(isolation="vm", image=own.image, kernel=chosen)
    assert rule == "kernel" and "replaced" in reason


def test_the_command(own: Own) -> None:
    words: list[str | Path] = ["--kernel", own.path, "--kernel-modules", own.modules, "--append", "ringfence_test=1"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ringfence", "run", "-i", "vm", "--image", own.image, *words, "--no-stdin"),
            *("probe", "read", "/proc/sys/kernel/osrelease"),
        ],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.decode().strip()) == (0, own.release), done.stderr
