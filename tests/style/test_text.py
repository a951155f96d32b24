"""Small rules that no linter knows."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {"build", "dist", "__pycache__", "corpus", "_core"}
TEXTS = {".py", ".c", ".h", ".md", ".toml", ".in", ".cfg", ".yml", ".yaml", ".sh", ""}

# In pieces, so that this file doesn't break its own rules.
UNFINISHED = re.compile("|".join(rf"\b{a}{b}\b" for a, b in [("TO", "DO"), ("FIX", "ME"), ("XX", "X"), ("HA", "CK")]))
HOSTS = re.compile(
    "|".join(
        rf"{name}\.{top}\b"
        for name, top in [
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("debian", "org/debian"),
            ("deb.debian", "org"),
            ("npmjs", "org"),
            ("crates", "io"),
        ]
    )
)
# Python's import of ringfence stays quick without these; what needs one of them imports it where it needs it.
SLOW = {
    "argparse",
    "asyncio",
    "dataclasses",
    "inspect",
    "json",
    "pathlib",
    "re",
    "shutil",
    "subprocess",
    "tempfile",
    "typing",
}


def texts() -> Iterator[Path]:
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in SKIPPED and not name.endswith(".egg-info") and (name[0] != "." or name == ".ci")
        ]
        for name in files:
            path = Path(folder, name)
            if path.suffix in TEXTS:
                yield path


def lines(pattern: re.Pattern[str]) -> list[str]:
    """Where it is found, as file:line: text."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]


def test_the_rules_see_the_files() -> None:
    names = {str(path.relative_to(ROOT)) for path in texts()}
    assert {
        "Makefile",
        ".ci/run",
        "core/init.c",
        "core/rf.h",
        "src/ringfence/api.py",
        "docs/design/protocol.md",
    } <= names
    assert lines(re.compile("^int rf_init_main"))


def test_nothing_is_unfinished() -> None:
    assert lines(UNFINISHED) == []


def test_no_package_registry_is_named() -> None:
    """Which one serves is the user's own setting."""
    assert lines(HOSTS) == []


def test_no_path_of_a_developers_machine() -> None:
    # Beside the checkout and above it, wherever this one is.
    assert lines(re.compile(re.escape(str(ROOT)) + r"\b")) == []


@pytest.mark.parametrize("folder", ["src", "core", "examples"])
def test_every_python_file_says_what_it_is_for(folder: str) -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*.py")
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_every_c_file_says_what_it_is_for() -> None:
    silent = [path.name for path in (ROOT / "core").rglob("*.[ch]") if not path.read_text().startswith("/* ")]
    assert silent == []


def test_whitespace() -> None:
    assert [line for line in lines(re.compile(r"[ \t]$")) if not line.split(":")[0].endswith(".md")] == []
    assert [path.name for path in texts() if path.stat().st_size and not path.read_bytes().endswith(b"\n")] == []


def test_import_is_light() -> None:
    program = "import sys; before = set(sys.modules); import ringfence; print(*sorted(set(sys.modules) - before))"
    # Without site, whose .pth files import what they like.
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    loaded = set(done.stdout.split())
    assert "ringfence.api" in loaded
    assert loaded & SLOW == set()
