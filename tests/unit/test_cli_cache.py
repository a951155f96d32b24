"""`ringfence cache`: a cache folder of a test's own, with entries of several kinds."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ringfence import _cache
from ringfence.cli.main import main

DAY = 86400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three templates that were used today, two and forty days ago; a disk of a folder; what is no entry."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RINGFENCE_CACHE", str(folder))
    for days, key in ((0, "new"), (2, "older"), (40, "old")):
        entry("templates", key, 200_000, days)
    entry("erofs/0123", "disk", 4096, 1)
    (folder / "kvm-0").write_text("a verdict")
    (folder / "templates/.new-1-2").mkdir()
    os.symlink("new", folder / "templates/current")
    return folder


def entry(kind: str, key: str, size: int, days: int) -> None:
    def fill(scratch: str) -> None:
        Path(scratch, "data").write_bytes(b"x" * size)
        Path(scratch, "sub").mkdir()
        Path(scratch, "sub/more").write_bytes(b"y")

    path = _cache.obtain(kind, key, fill)
    used = time.time() - days * DAY
    os.utime(path, (used, used))


def listed(capfd: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["cache", "list", "--json", *words]) == 0
    found: list[dict[str, Any]] = json.loads(capfd.readouterr().out)
    return found


def keys(found: list[dict[str, Any]]) -> list[str]:
    return [one["key"] for one in found]


def test_the_list_has_every_entry_the_last_used_first(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = listed(capfd)
    assert keys(found) == ["new", "disk", "older", "old"]
    assert [one["kind"] for one in found] == ["templates", "erofs/0123", "templates", "templates"]
    assert 200_000 <= found[0]["bytes"] < 250_000
    assert keys(listed(capfd, "--kind", "erofs/0123")) == ["disk"]
    assert main(["cache"]) == 0
    printed = capfd.readouterr().out
    assert all(word in printed for word in ("templates", "older", "0.2 MB", "in all"))


def test_prune_by_size_and_by_age(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "prune"]) == 0
    assert main(["cache", "prune", "--unused-for", "30d"]) == 0
    capfd.readouterr()
    assert keys(listed(capfd)) == ["new", "disk", "older"]
    assert main(["cache", "--json", "prune", "--max-size", "300K"]) == 0
    assert keys(json.loads(capfd.readouterr().out)) == ["older"]
    assert keys(listed(capfd)) == ["new", "disk"]
    # No run makes a kernel anew, so none goes that isn't meant.
    entry("kernels", "kernel", 4096, 100)
    assert main(["cache", "prune", "--unused-for", "1h", "--max-size", "1M"]) == 0
    capfd.readouterr()
    assert keys(listed(capfd)) == ["new", "kernel"]
    assert main(["cache", "prune", "--unused-for", "1h", "--kind", "kernels"]) == 0
    capfd.readouterr()
    assert keys(listed(capfd)) == ["new"]


def test_verify_removes_what_is_damaged_and_nothing_else(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = [(one["key"], one["used_ns"]) for one in listed(capfd)]
    assert main(["cache", "verify"]) == 0
    capfd.readouterr()
    assert [(one["key"], one["used_ns"]) for one in listed(capfd)] == before
    # The stat data as they were: only who reads the bytes sees it.
    data = cache / "templates/older/data"
    seal = (cache / "templates/older/seal").read_text()
    data.write_bytes(b"z" * 200_000)
    (cache / "templates/older/seal").write_text(
        "".join(
            f"{line.split(' ', 2)[0]} {_cache._fingerprint(str(cache / 'templates/older' / line.split(' ', 2)[2]))}"
            f" {line.split(' ', 2)[2]}\n"
            for line in seal.splitlines()
        )
    )
    assert _cache.intact(str(cache / "templates/older"))
    assert main(["cache", "verify"]) == 1
    assert "damaged, removed" in capfd.readouterr().out
    assert keys(listed(capfd)) == ["new", "disk", "old"]


def test_clear_leaves_no_entry(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear", "--kind", "templates"]) == 0
    capfd.readouterr()
    assert keys(listed(capfd)) == ["disk"]
    assert main(["cache", "clear"]) == 0
    capfd.readouterr()
    assert listed(capfd) == []
    assert (cache / "kvm-0").exists()


@pytest.mark.parametrize(
    "words", [["what"], ["list", "more"], ["list", "--max-size", "1M"], ["prune", "--max-size", "much"]]
)
def test_nonsense_is_refused(cache: Path, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["cache", *words]) == 125
    assert capfd.readouterr().err.count("\n") == 1


def test_a_limit_keeps_what_was_used_last(cache: Path) -> None:
    _cache.limit("templates", 300_000, keep="old")
    assert sorted(key for key, _, _ in _cache.entries("templates")) == ["new", "old"]
    _cache.limit("templates", 0)
    assert not _cache.entries("templates")
