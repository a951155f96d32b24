"""The cache folder: only what nobody else can have put there is taken."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence import _cache, _cache_folder
from ringfence.errors import SpecError
from support.sandboxes import need_root

OTHER = 65432  # no account's


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    _cache_folder._checked.clear()
    yield
    _cache_folder._checked.clear()


def fill(folder: str) -> None:
    Path(folder, "below").mkdir()
    Path(folder, "below", "file").write_bytes(b"content")
    Path(folder, "top").write_bytes(b"content")


def entry(folder: Path) -> Path:
    return Path(_cache.obtain("kind", "key", fill, cache_dir=str(folder)))


def test_an_entry_is_taken_and_a_link_on_the_way_resolved(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real").mkdir(0o700)
    made = entry(tmp_path / "link" / "cache")
    assert made == tmp_path / "real" / "cache" / "kind" / "key"
    assert _cache.find("kind", "key", str(tmp_path / "real" / "cache")) == str(made)


def test_images_and_guests_are_the_callers_alone(tmp_path: Path) -> None:
    """Also where the cache folder is open to others; and no folder is ever open to be written to."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o755)
    (cache / "templates").mkdir()
    (cache / "templates").chmod(0o755)  # by an earlier version
    before = os.umask(0)
    try:
        for kind in ("templates", "erofs/own", "kernels/own"):
            _cache.obtain(kind, "key", fill, cache_dir=str(cache))
    finally:
        os.umask(before)
    modes = {name: (cache / name).stat().st_mode & 0o777 for name in ("templates", "erofs", "erofs/own", "kernels/own")}
    assert modes == {"templates": 0o700, "erofs": 0o700, "erofs/own": 0o700, "kernels/own": 0o755}


def test_an_entry_of_a_wide_umask_is_taken(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert _cache.intact(str(entry(tmp_path / "cache")))
    finally:
        os.umask(before)


@pytest.mark.parametrize("level", ["the folder", "above it", "further above"])
def test_a_folder_that_another_account_could_replace_is_refused(tmp_path: Path, level: str) -> None:
    cache = tmp_path / "a" / "b" / "cache"
    entry(cache)
    place = {"the folder": cache, "above it": cache.parent, "further above": cache.parent.parent}[level]
    for mode in (0o770, 0o707):
        _cache_folder._checked.clear()
        place.chmod(mode)
        with pytest.raises(SpecError, match="is writable by other accounts"):
            _cache.root(str(cache))
    # Sticky, others can't replace what is ours in it; but they could add entries to the cache folder itself.
    place.chmod(0o1777)
    if level == "the folder":
        with pytest.raises(SpecError, match="is writable by other accounts"):
            _cache.root(str(cache))
    else:
        assert _cache.root(str(cache)) == str(cache)
    place.chmod(0o755)
    _cache_folder._checked.clear()
    need_root()
    os.chown(place, OTHER, OTHER)
    with pytest.raises(SpecError, match=f"belongs to uid {OTHER}"):
        _cache.root(str(cache))


def test_a_link_of_another_account_leads_nowhere(tmp_path: Path) -> None:
    """Such as into that account's own mount namespace, by /proc/PID/root, where root seems to own everything."""
    need_root()
    theirs = tmp_path / "theirs"
    theirs.mkdir(0o755)
    (theirs / "cache").mkdir(0o700)
    os.chown(theirs, OTHER, OTHER)
    (tmp_path / "link").symlink_to(theirs / "cache")
    with pytest.raises(SpecError, match=f"{theirs}, on the way to the cache folder .* belongs to uid {OTHER}"):
        _cache.root(str(tmp_path / "link"))
    # Nor does it where it leads to a folder of root's: it isn't for others to say where root writes.
    (theirs / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "mine").mkdir(0o700)
    with pytest.raises(SpecError, match=f"belongs to uid {OTHER}"):
        _cache.root(str(theirs / "link"))
    (tmp_path / "planted").symlink_to("mine")
    os.chown(tmp_path / "planted", OTHER, OTHER, follow_symlinks=False)
    with pytest.raises(SpecError, match=f"belongs to uid {OTHER}"):
        _cache.root(str(tmp_path / "planted"))


def test_odd_ways_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SpecError, match="too many symlinks"):
        _cache.root(str(tmp_path / "loop"))
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(SpecError, match="is no folder"):
            _cache.root(str(tmp_path / name))
    assert _cache.root(f"{tmp_path}//a/./b/../c/") == str(tmp_path / "a" / "c")


@pytest.mark.parametrize("what", [".", "seal", "top", "below", "below/file"])
def test_an_entry_that_another_account_could_change_is_made_anew(tmp_path: Path, what: str) -> None:
    made = entry(tmp_path / "cache")
    assert _cache.intact(str(made))
    (made / what).chmod((made / what).stat().st_mode | 0o020)
    assert not _cache.intact(str(made))
    assert entry(tmp_path / "cache") == made
    assert _cache.intact(str(made))
    need_root()
    os.chown(made / what, OTHER, OTHER)
    assert not _cache.intact(str(made))


@pytest.mark.parametrize("what", ["seal", "top", "below"])
def test_a_link_is_no_file_of_an_entry(tmp_path: Path, what: str) -> None:
    made = entry(tmp_path / "cache")
    (made / what).rename(tmp_path / "moved")
    (made / what).symlink_to(tmp_path / "moved")
    assert not _cache.intact(str(made))


def test_a_name_for_an_entry_leads_to_one_of_its_kind(tmp_path: Path) -> None:
    made = entry(tmp_path / "cache")
    (made.parent / "current").symlink_to("key")
    assert _cache.find("kind", "current", str(tmp_path / "cache"))
    other = Path(_cache.obtain("other", "key", fill, cache_dir=str(tmp_path / "cache")))
    (made.parent / "elsewhere").symlink_to(other)
    assert _cache.find("kind", "elsewhere", str(tmp_path / "cache")) is None


def test_a_seal_names_nothing_outside(tmp_path: Path) -> None:
    made = entry(tmp_path / "cache")
    (tmp_path / "file").write_bytes(b"content")
    digest = _cache.sha256_of(str(tmp_path / "file"))
    (made / "seal").write_text(f"{digest} 0 ../../../file\n")
    assert not _cache.intact(str(made))


def test_a_seal_that_is_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    made = entry(tmp_path / "cache")
    (made / "seal").unlink()
    os.mkfifo(made / "seal")
    assert not _cache.intact(str(made))
