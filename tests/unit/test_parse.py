"""What people write: sizes, times, paths, patterns."""

from __future__ import annotations

import time

import pytest

from ringfence.errors import SpecError
from ringfence.spec import parse


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("256M", 256 * 2**20),
        ("256MiB", 256 * 2**20),
        ("256m", 256 * 2**20),
        ("256MB", 256 * 10**6),
        ("1.5 GiB", 3 * 2**29),
        (" 10kB ", 10_000),
        ("10K", 10_240),
        ("1T", 2**40),
        ("7", 7),
        ("7B", 7),
        ("0.1K", 102),
        (4096, 4096),
        (1.5e6, 1_500_000),
        (2**62 + 1, 2**62 + 1),
    ],
)
def test_size(written: str | int | float, found: int) -> None:
    assert parse.size(written) == found


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("1.5s", 1_500_000_000),
        ("10ms", 10_000_000),
        ("2m", 120_000_000_000),
        ("2min", 120_000_000_000),
        ("1h", 3_600_000_000_000),
        ("1d", 86_400_000_000_000),
        ("100us", 100_000),
        ("100µs", 100_000),
        ("5ns", 5),
        ("10", 10_000_000_000),
        (10, 10_000_000_000),
        (0.25, 250_000_000),
        ("1.1s", 1_100_000_000),
        ("0.000000001s", 1),
    ],
)
def test_duration(written: str | int | float, found: int) -> None:
    assert parse.duration(written) == found


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("12Q", "memory: '12Q' has no known unit (use B, K, M, G, T, KiB, MiB, GiB, TiB)"),
        ("1.5.2M", "memory: '1.5.2M' is not a number with a unit"),
        ("M", "memory: 'M' is not a number with a unit"),
        ("", "memory: '' is not a number with a unit"),
        ("1e3", "memory: '1e3' has no known unit"),
        ("1_000", "memory: '1_000' has no known unit"),
        ("٣M", "memory: '٣M' is not a number with a unit"),
        (".5G", "memory: '.5G' is not a number with a unit"),
        ("5.G", "memory: '5.G' is not a number with a unit"),
        ("9" * 100, "is not a number with a unit"),
        (0, "memory must be positive, not 0"),
        ("0M", "memory must be positive, not 0M"),
        (-1, "memory must be positive, not -1"),
        ("-5M", "memory must be positive, not -5M"),
        (0.5, "memory must be positive, not 0.5"),
        (float("nan"), "memory must be a finite number, not nan"),
        (float("inf"), "memory must be a finite number, not inf"),
        (float("-inf"), "memory must be a finite number, not -inf"),
        (True, "memory must be a number or a str, not True"),
        (None, "memory must be a number or a str, not None"),
        (b"1M", "memory must be a number or a str, not b'1M'"),
        (2**63, "is too large"),
        ("9999999T", "memory: '9999999T' is too large"),
    ],
)
def test_size_refuses(written: str | int | float, sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse.size(written, "memory")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("written", ["1w", "ten", "1h30m", "", 0, -1.0, "-1s", float("nan"), True, "0s"])
def test_duration_refuses(written: str | int | float) -> None:
    with pytest.raises(SpecError, match="wall_time"):
        parse.duration(written, "wall_time")


def test_cpus() -> None:
    assert parse.cpus(2) == 2.0
    assert parse.cpus("0.5") == 0.5
    assert parse.cpus(0.01) == 0.01
    for bad in (0, -1, 0.001, 10_000, "half", "2cpus", float("inf"), True, ""):
        with pytest.raises(SpecError, match="cpus"):
            parse.cpus(bad)


def test_count() -> None:
    assert parse.count(64, "pids", 1, 100) == 64
    assert parse.count(" 64 ", "pids", 1, 100) == 64
    for bad in (0, -1, 101, "6.5", "x", "", True, "²", "9" * 100):
        with pytest.raises(SpecError, match="pids"):
            parse.count(bad, "pids", 1, 100)
    with pytest.raises(SpecError, match=r"pids must be a whole number, not 1\.5"):
        parse.count(1.5, "pids", 1, 100)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("a", b"a"),
        ("a/b.txt", b"a/b.txt"),
        ("./a/./b", b"a/b"),
        (b"\xff\xfe", b"\xff\xfe"),
        (".hidden", b".hidden"),
        ("..a", b"..a"),
        ("a b\n", b"a b\n"),
        ("x" * 255, b"x" * 255),
    ],
)
def test_relative_path(written: str | bytes, found: bytes) -> None:
    assert parse.relative_path(written, "files") == found


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("/x", "files: '/x' must be relative to the work directory, not absolute"),
        ("../x", "files: '../x' must not contain '..'"),
        ("a/../../x", "must not contain '..'"),
        ("a/..", "must not contain '..'"),
        ("a//b", "files: 'a//b' has an empty component"),
        ("a/", "files: 'a/' has an empty component"),
        ("", "files must not be empty"),
        (".", "files: '.' is the work directory itself"),
        ("a\0b", "contains a NUL byte"),
        ("x" * 256, "is longer than the kernel takes"),
        ("/".join(["x" * 200] * 30), "is longer than the kernel takes"),
        (7, "files must be a path, not 7"),
        ("\ud800", "files must be a path"),
    ],
)
def test_relative_path_refuses(written: str, sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse.relative_path(written, "files")
    assert sentence in str(caught.value)


def test_absolute_path() -> None:
    assert parse.absolute_path("/data", "target") == b"/data"
    assert parse.absolute_path("//data/./x/", "target") == b"/data/x"
    assert parse.absolute_path("/", "target") == b"/"
    for bad in ("data", "", "/a/../b", "/..", "/a\0"):
        with pytest.raises(SpecError, match="target"):
            parse.absolute_path(bad, "target")


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("a.csv", "a.csv", True),
        ("a.csv", "b.csv", False),
        ("*.csv", "a.csv", True),
        ("*.csv", ".csv", True),
        ("*.csv", ".hidden.csv", True),
        ("*.csv", "out/a.csv", False),
        ("*", "a", True),
        ("*", "a/b", False),
        ("out/*.csv", "out/a.csv", True),
        ("out/*.csv", "out/x/a.csv", False),
        ("out/*/a.csv", "out/x/a.csv", True),
        ("out/*/a.csv", "out/a.csv", False),
        ("**", "a", True),
        ("**", "a/b/c", True),
        ("out/**", "out/a/b", True),
        ("out/**", "out", True),
        ("out/**", "outer/a", False),
        ("**/a.csv", "a.csv", True),
        ("**/a.csv", "x/y/a.csv", True),
        ("**/a.csv", "x/y/ba.csv", False),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/x/y/b", True),
        ("a/**/b/*.c", "a/b/x/b/m.c", True),
        ("a/**/b/**/c", "a/b/b/c/x", False),
        ("a**", "abc", True),
        ("a**", "a/b", False),
        ("?", "a", True),
        ("?", "", False),
        ("?", "ab", False),
        ("?.txt", "é.txt", True),
        ("a?b", "a/b", False),
        ("[abc]", "b", True),
        ("[abc]", "d", False),
        ("[a-c]x", "bx", True),
        ("[!a-c]x", "bx", False),
        ("[^a-c]x", "dx", True),
        ("[]]", "]", True),
        ("[!]]", "]", False),
        ("[]a]", "a", True),
        ("[a-]", "-", True),
        ("[*]", "*", True),
        ("[*]", "a", False),
        ("[a", "[a", True),
        ("[", "[", True),
        ("[!", "[!", True),
        ("[a/b]", "a", False),
        ("a\\*", "a\\b", True),
        ("a.c", "abc", False),
        ("*a*b*c*", "xxaxxbxxcxx", True),
        ("*a*b*c*", "xxaxxcxxbxx", False),
        ("A", "a", False),
    ],
)
def test_match_pattern(pattern: str, path: str, matches: bool) -> None:
    assert parse.match_pattern(pattern.encode(), path.encode()) is matches


def test_match_pattern_takes_bytes_that_are_not_utf8() -> None:
    assert parse.match_pattern(b"*.\xff", b"a.\xff")
    assert parse.match_pattern(b"?", b"\xff")
    assert not parse.match_pattern(b"?", b"\xff\xfe")


def test_match_pattern_does_not_blow_up() -> None:
    # A backtracking regular expression takes years for these.
    started = time.monotonic()
    assert not parse.match_pattern(b"*a" * 100 + b"b", b"a" * 255)
    assert not parse.match_pattern(b"**/a/" * 100 + b"b", b"/".join([b"a"] * 1000))
    assert time.monotonic() - started < 2
