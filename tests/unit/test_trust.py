"""What is run unjailed is nobody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ringfence import _trust
from ringfence.errors import Unavailable
from ringfence.levels.vm import emulator
from support.sandboxes import need_root

OTHER = 65432  # no account's


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Beneath x, by a symlink. It leaves a file where it is run."""
    path = tmp_path / "x" / "real"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\necho QEMU emulator version 7.2.0\n")
    path.chmod(0o755)
    (tmp_path / "link").symlink_to("x/real")
    return tmp_path / "link"


def test_what_is_ours(program: Path) -> None:
    assert _trust.why_not_ours(str(program)) == ""
    assert _trust.why_not_ours(f"{program.parent}/x/../x/./real") == ""
    program.unlink()
    program.symlink_to(program)
    assert "too many symlinks" in _trust.why_not_ours(str(program))
    with pytest.raises(FileNotFoundError):
        _trust.why_not_ours("/nonexistent/qemu")


@pytest.mark.parametrize("name", ["x", "x/real"])
def test_what_others_may_write_to(program: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = program.parent / name
    one.chmod(0o775)
    assert _trust.why_not_ours(str(program)) == f"{one} is writable by other accounts"
    monkeypatch.setenv("RINGFENCE_QEMU", str(program))
    with pytest.raises(Unavailable, match=r"isn't run as QEMU: .* is writable by other accounts"):
        emulator.look()
    assert not (program.parent / "ran").exists()


@pytest.mark.parametrize("name", ["x", "x/real", "link"])
def test_what_belongs_to_others(program: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_root()
    one = program.parent / name
    os.chown(one, OTHER, OTHER, follow_symlinks=False)
    monkeypatch.setenv("RINGFENCE_QEMU", str(program))
    with pytest.raises(Unavailable, match=f"{name} belongs to uid {OTHER}"):
        emulator.look()
    assert not (program.parent / "ran").exists()
    os.chown(one, 0, 0, follow_symlinks=False)
    with pytest.raises(Unavailable, match="without the machines"):
        emulator.look()
    assert (program.parent / "ran").exists()
