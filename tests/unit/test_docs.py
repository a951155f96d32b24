"""The documents agree with the code: examples run and print what they say, and what is named exists."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from support.sandboxes import SOURCES, need_level

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md")])
# Made by a build, so a checkout may lack it.
BUILT = {"src/ringfence/_core"}
# Pages of the site that are made as it is built; test_site.py looks at links to these.
MADE_FOR_THE_SITE = {ROOT / "docs" / "reference" / "cli.md", ROOT / "docs" / "reference" / "api.md"}
# What such a command prints is of the machine that it ran on.
OF_THE_MACHINE = ("uname", "--applied")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


class Fence(NamedTuple):
    """A fenced block. kind: the word behind its backquotes. follows: the kind of block right before it, or ""."""

    kind: str
    text: str
    line: int


def fences(path: Path) -> list[Fence]:
    found = []
    kind, block, start = "", [], 0
    inside = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            block.append(line)
        elif inside:
            found.append(Fence(kind, "\n".join(block) + "\n", start))
            inside = False
        else:
            kind, block, start, inside = line[3:].strip(), [], number, True
    assert not inside, f"{name_of(path)}:{start}: the block has no end"
    return found


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# ---- examples ----


def examples() -> list[tuple[str, str, str]]:
    """Each Python block of the README, and what the text block behind it says that it prints."""
    blocks = fences(ROOT / "README.md")
    found = []
    for one, after in zip(blocks, [*blocks[1:], Fence("", "", 0)], strict=True):
        if one.kind == "python":
            found.append((f"README.md:{one.line}", one.text, after.text if after.kind == "text" else ""))
    return found


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCES), **more}


def need_levels_of(text: str) -> None:
    for isolation in ("process", "container", "vm"):
        if re.search(rf"\b{isolation}\b", text):
            need_level(isolation)


def test_the_readme_has_examples_at_both_cheap_levels() -> None:
    codes = [code for _, code, _ in examples()]
    assert len(codes) >= 4
    assert all(any(f'"{isolation}"' in code for code in codes) for isolation in ("process", "container"))


@pytest.mark.parametrize(("where", "code", "printed"), examples(), ids=[one[0] for one in examples()])
def test_an_example_prints_what_the_readme_says(where: str, code: str, printed: str, tmp_path: Path) -> None:
    need_levels_of(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert printed, f"{where} doesn't say what it prints"
    assert done.stdout == printed
    assert list(tmp_path.iterdir()) == []


def commands(path: Path) -> list[tuple[str, str, str]]:
    """Each command line of a document's console blocks, with the lines below it."""
    found = []
    for block in fences(path):
        if block.kind != "console":
            continue
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            line, _, printed = part.partition("\n")
            found.append((f"{name_of(path)}: {line}", line, printed))
    return found


ALL_COMMANDS = [one for path in DOCUMENTS for one in commands(path)]
RUNNABLE = [
    one for one in ALL_COMMANDS if "ringfence run" in one[1] and not any(word in one[1] for word in OF_THE_MACHINE)
]


@pytest.mark.parametrize(("where", "line", "printed"), RUNNABLE, ids=[one[0] for one in RUNNABLE])
def test_a_command_prints_what_the_document_says(where: str, line: str, printed: str, tmp_path: Path) -> None:
    need_levels_of(line)
    shim = tmp_path / "ringfence"
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ringfence "$@"\n')
    shim.chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", line],
        cwd=tmp_path,
        env=environment(PATH=f"{tmp_path}:{os.environ['PATH']}"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == printed, where


def test_there_are_commands_that_run() -> None:
    assert len(RUNNABLE) >= 2
    assert len(ALL_COMMANDS) >= 10


@pytest.mark.parametrize(("where", "line", "printed"), ALL_COMMANDS, ids=[one[0] for one in ALL_COMMANDS])
def test_a_command_line_is_one_that_there_is(where: str, line: str, printed: str) -> None:
    """Its options are parsed by the command itself; a make target is in the Makefile; a file is in the repository."""
    from ringfence.cli.main import COMMANDS

    words = shlex.split(line.rpartition(" | ")[2])
    if words[0] == "ringfence":
        assert words[1] in COMMANDS, where
        module = __import__(COMMANDS[words[1]][0], fromlist=["OPTIONS"])
        module.OPTIONS.parse(words[2:])
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), where
    elif words[0].startswith(".venv/"):
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), where
    else:
        assert words == ["pip", "install", "."] or (ROOT / words[0]).is_file(), where


# ---- names ----


def slug(heading: str) -> str:
    """The anchor of a heading, as repository hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(one) for one in re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)}


def broken_links(path: Path) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        if there in MADE_FOR_THE_SITE:
            continue
        if not there.exists() or (anchor and anchor not in anchors(there)):
            found.append(target)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "# One thing\n[ok](#one-thing) [ok](a.md#one-thing) [bad](#two) [bad](b.md) [ok](https://x.example)\n"
    )
    assert broken_links(document) == ["#two", "b.md"]


def missing_files(text: str) -> list[str]:
    """Names in backquotes that begin with a folder of the repository and aren't there."""
    found = []
    for name in re.findall(r"`((?:core|src|tests|docs|examples|\.ci)/[\w./*-]*)(?:::[\w:]+)?`", text):
        if name.rstrip("/") not in BUILT and not any(ROOT.glob(name.rstrip("/"))):
            found.append(name)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_that_are_named_exist(path: Path) -> None:
    assert missing_files(prose(path)) == []


def test_a_file_that_is_not_there_is_found() -> None:
    assert missing_files("`core/init.c` `core/probe_*.c` `tests/unit/` `src/none.py` `core/no_*.c`") == [
        "src/none.py",
        "core/no_*.c",
    ]


def defined(path: Path) -> set[str]:
    """The tests of a file: "test_x" and "TestX::test_y"."""
    found = set()
    for one in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(one, ast.FunctionDef):
            found.add(one.name)
        elif isinstance(one, ast.ClassDef):
            found |= {f"{one.name}::{inner.name}" for inner in one.body if isinstance(inner, ast.FunctionDef)}
    return {name for name in found if name.split("::")[-1].startswith("test_")}


TESTS_NAMED = re.compile(r"(tests/[\w/]+\.py)::([\w:]+)")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_tests_that_are_named_exist(path: Path) -> None:
    named = set(TESTS_NAMED.findall(path.read_text(encoding="utf-8")))
    assert [f"{file}::{test}" for file, test in sorted(named) if test not in defined(ROOT / file)] == []


def test_every_promise_names_its_test() -> None:
    """In the tables of the specification that have a column for it."""
    promises = []
    asserted = False
    for line in (ROOT / "SPECIFICATION.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            asserted = False
        elif line.startswith("| promise | test |"):
            asserted = True
        elif asserted and not line.startswith("|---"):
            promises.append(line)
    assert len(promises) > 50
    assert [line for line in promises if not TESTS_NAMED.search(line) and "`make fuzz`" not in line] == []


def test_the_targets_are_those_that_bench_measures() -> None:
    from ringfence.comparison.bench import TARGETS

    section = (ROOT / "SPECIFICATION.md").read_text(encoding="utf-8").partition("## 4.")[2]
    rows = [line for line in section.splitlines() if line.startswith("|") and line.rstrip(" |").endswith("asserted")]
    told = [tuple(re.findall(r"≤ ([\d.]+)(?: ms)? \|", row)) for row in rows]
    units = [1 if one.against else 1e6 for one in TARGETS]
    bench = [(f"{one.most / unit:g}", f"{one.ceiling / unit:g}") for one, unit in zip(TARGETS, units, strict=True)]
    assert sorted(told) == sorted(bench)


def test_every_public_name_of_the_api_is_there() -> None:
    """What the README uses of `rf` is exported."""
    import ringfence as rf

    used = set(re.findall(r"\brf\.(\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert used <= set(rf.__all__)
