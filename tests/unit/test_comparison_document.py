"""The comparison's document: what the schema takes and refuses, and how files of it are read and written."""

from __future__ import annotations

import copy
import errno
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from comparison_parts import a_document, gone

import ringfence as rf
from ringfence.comparison import compare
from ringfence.comparison.document import SCHEMA, WORDS, check, load, save, schema, write_file

VALIDATOR = jsonschema.Draft202012Validator(schema())


def words(rule: Any) -> set[str]:
    """Each word of JSON Schema that a schema uses."""
    if isinstance(rule, list):
        return set().union(*map(words, rule)) if rule else set()
    if not isinstance(rule, dict):
        return set()
    found = set(rule)
    for name, inner in rule.items():
        if name in ("properties", "$defs"):
            found |= set().union(*map(words, inner.values()))
        elif name not in ("const", "enum", "required"):
            found |= words(inner)
    return found


def test_the_schema_is_one_and_uses_only_what_the_reader_knows() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert words(schema()) <= WORDS


def test_a_real_comparison_is_as_the_schema_says(tmp_path: Path) -> None:
    found = compare(["true"], levels=("process", "container"), repeat=2).to_json()
    VALIDATOR.validate(found)
    check(found)
    assert found["schema"] == SCHEMA
    assert found["ringfence"] == rf.__version__
    save(found, str(tmp_path / "saved.json"))
    assert load(str(tmp_path / "saved.json")) == found


@pytest.mark.parametrize("document", [a_document(), a_document(gone("vm")), {**a_document(), "later": {"more": 1}}])
def test_a_document_with_everything_and_one_with_little_are_taken(document: dict[str, Any]) -> None:
    VALIDATOR.validate(document)
    check(document)


def changed(way: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    document = copy.deepcopy(a_document())
    way(document)
    return document


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Sets the place that the path leads to to its last member."""
    *way, name, value = path

    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for step in way:
            place = place[step]
        place[name] = value

    return change


# What is wrong, and what has to be said of it. Each was looked at by hand.
WRONG: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda d: d.pop("levels"), "/levels is missing"),
    (lambda d: d.pop("probes"), "/probes is missing"),
    (put("levels", []), "/levels must not be empty"),
    (put("argv", []), "/argv must not be empty"),
    (put("argv", "true"), "/argv must be array, not 'true'"),
    (put("argv", 0, 7), "/argv/0 must be string, not 7"),
    (put("identical", 1), "/identical must be boolean, not 1"),
    (put("machine", "cpus", 0), "/machine/cpus must be at least 1"),
    (put("machine", "cpus", True), "/machine/cpus must be integer, not True"),
    (put("levels", 1, "isolation", "kernel", "verdict", "fine"), "/levels/1/isolation/kernel/verdict must be of"),
    (put("levels", 1, "isolation", "kernel", "own"), "/levels/1/isolation/kernel must be object, not 'own'"),
    (lambda d: d["levels"][1]["isolation"]["kernel"].pop("evidence"), "/levels/1/isolation/kernel/evidence is missing"),
    (lambda d: d["levels"][2]["probes"]["kill-host"].pop("control"), "/levels/2/probes/kill-host/control is missing"),
    (put("levels", 1, "surface", "calls", "bpf", 1), "/levels/1/surface/calls/bpf must be string"),
    (put("levels", 1, "surface", "denied", -1), "/levels/1/surface/denied must be at least 0"),
    (
        put("levels", 1, "measures", "getpid", "samples", 0, "fast"),
        "/levels/1/measures/getpid/samples/0 must be number",
    ),
    (put("levels", 1, "measures", "getpid", "summary", "n", 0), "/levels/1/measures/getpid/summary/n must be at least"),
    (put("levels", 0, "runs", 0, "startup_ns", "1 ms"), "/levels/0/runs/0/startup_ns must be"),
    (lambda d: d["levels"][0]["runs"][0].pop("total_ns"), "/levels/0/runs/0/total_ns is missing"),
    (put("levels", 0, "costs", "wall_ns", {"n": 1}), "/levels/0/costs/wall_ns/p50 is missing"),
    (put("measures", "getpid", "better", "faster"), "/measures/getpid/better must be of"),
    (put("probes", "kill-host", "why", None), "/probes/kill-host/why must be string, not None"),
]


@pytest.mark.parametrize(("way", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_is_wrong_is_refused_with_its_place_by_us_and_by_jsonschema(
    way: Callable[[dict[str, Any]], object], said: str
) -> None:
    document = changed(way)
    assert not VALIDATOR.is_valid(document)
    with pytest.raises(rf.SpecError) as refused:
        check(document)
    assert said in str(refused.value)


def test_levels_have_names_of_their_own_and_begin_with_the_bare_one() -> None:
    for way in (put("levels", 0, "name", "first"), put("levels", 2, "name", "process")):
        with pytest.raises(rf.SpecError, match="levels must begin with 'bare'"):
            check(changed(way))


@pytest.mark.parametrize("version", [0, 2, "1", True, None, 1.5])
def test_another_version_is_refused(version: Any) -> None:
    with pytest.raises(rf.SpecError, match=r"this ringfence reads version 1: save it anew"):
        check({**a_document(), "schema": version})


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"schema": NaN}', b"nothing", b'"schema"', b"[]", b"{}", b"1"]
    + [b'{"schema": 1, "levels": [%s]}' % figure for figure in (b"1e999", b"-1e999", b"1" + b"0" * 400, b"1e300")],
)
def test_a_file_that_is_no_comparison_is_refused_in_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(rf.SpecError) as refused:
        load(str(tmp_path / "file"))
    assert str(tmp_path / "file") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(str(tmp_path / "none"))


# ---- writing ----


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    """A reader sees one or the other, whole; nothing else is left in the folder."""
    path = tmp_path / "out"
    write_file(str(path), b"a" * 1_000_000)
    seen = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            data = path.read_bytes()
            seen.add((data[:1], len(data)))

    reader = threading.Thread(target=look)
    reader.start()
    for at in range(50):
        write_file(str(path), bytes([b"ab"[at % 2]]) * 1_000_000)
    stop.set()
    reader.join()
    assert seen <= {(b"a", 1_000_000), (b"b", 1_000_000)}
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_file(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_stays_one_and_the_mode_is_the_umasks(tmp_path: Path) -> None:
    os.symlink("real", tmp_path / "link")
    before = os.umask(0o027)
    try:
        write_file(str(tmp_path / "link"), b"data")
    finally:
        os.umask(before)
    assert os.readlink(tmp_path / "link") == "real"
    assert (tmp_path / "real").read_bytes() == b"data"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640


def test_a_file_that_is_replaced_stays_as_private_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, 1234, 1235)
    about = path.stat()
    write_file(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (path.stat().st_uid, path.stat().st_gid) == (about.st_uid, about.st_gid)


def test_a_file_whose_group_cannot_be_kept_is_no_other_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EPERM, "chown")

    path = tmp_path / "out"
    path.write_bytes(b"old")
    path.chmod(0o664)
    monkeypatch.setattr(os, "fchown", denied)
    write_file(str(path), b"new")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o604)


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_file(str(tmp_path / "pipe"), b"data")
    reader.join()
    assert got == [b"data"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_saved_file_is_ascii_whatever_the_command_was(tmp_path: Path) -> None:
    document = {**a_document(), "argv": ["a\udcff", "ü", "\x1b[2J"]}
    save(document, str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved").read_text("ascii"))["argv"] == document["argv"]
    assert load(str(tmp_path / "saved"))["argv"] == document["argv"]
