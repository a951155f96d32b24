"""Which run folders are nobody's any more: that of a process out of sight isn't, from its first moment on."""

from __future__ import annotations

import fcntl
import os
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.levels import leftovers, state


def gone_pid() -> int:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    return pid


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, leftovers.FOLDER)
    yield fd
    os.close(fd)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    """A run folder as it is first made, of a process that isn't seen: it ended, or is in another PID namespace."""
    path = tmp_path / f"ringfence-{gone_pid()}-{'a' * 16}"
    path.mkdir(0o700)
    fd = os.open(path, leftovers.FOLDER)
    yield fd
    os.close(fd)


def test_one_that_is_held_is_somebodys(parent: int, folder: int) -> None:
    assert leftovers.hold(folder)
    assert leftovers.find(parent) == []
    fcntl.flock(folder, fcntl.LOCK_UN)
    [(name, cgroups)] = leftovers.find(parent)
    assert name.startswith(b"ringfence-")
    assert cgroups == []


def test_one_that_is_about_to_be_held_is_somebodys(parent: int, folder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert leftovers.find(parent) == []
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert len(leftovers.find(parent)) == 1


def test_one_of_a_process_that_lives_is_never_taken(parent: int, tmp_path: Path) -> None:
    path = tmp_path / f"ringfence-{os.getpid()}-{'b' * 16}"
    path.mkdir()
    path.chmod(0o711)
    assert leftovers.find(parent) == []


def test_one_that_was_removed_meanwhile_is_not_held(
    folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where its process was stopped for so long that another one took it for dead: it makes another one."""
    real, names = leftovers.hold, []

    def late(fd: int) -> bool:
        names.append(os.readlink(f"/proc/self/fd/{fd}"))
        if len(names) == 1:
            os.rmdir(names[0])
        return real(fd)

    for one in tmp_path.iterdir():
        one.rmdir()
    assert not real(folder)
    monkeypatch.setattr(leftovers, "hold", late)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    told: list[bytes] = []
    helper = types.SimpleNamespace(own_mounts=False, own=lambda kind, parent, name: told.append(name))
    made = state.State(helper)  # type: ignore[arg-type]
    try:
        assert len(names) == 2
        assert os.readlink(f"/proc/self/fd/{made.run_fd}") == names[1]
        assert [os.path.basename(name).encode() for name in names] == told
        assert made._name == told[1]
        assert os.path.isdir(names[1])
    finally:
        for fd in (made.run_fd, made._parent_fd, made.null):
            os.close(fd)
