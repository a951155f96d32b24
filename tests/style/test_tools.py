"""The linters, the type checker and the compilers' warnings, as tests. Their settings are in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The tools of the environment that runs this test, not whatever the PATH has.
BIN = Path(sys.executable).parent


def run(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "NO_COLOR": "1", **environment},
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff_check() -> None:
    run([str(BIN / "ruff"), "check", "--quiet", "."])


def test_ruff_format() -> None:
    run([str(BIN / "ruff"), "format", "--check", "--quiet", "."])


def test_mypy_strict() -> None:
    run([str(BIN / "mypy")])


def test_imports_go_down_only() -> None:
    run([str(BIN / "lint-imports")])


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_c_without_warnings(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here; 'make test' installs it")
    run([sys.executable, "core/build.py", "--strict", str(tmp_path)], CC=compiler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ringfence-core", "ringfence-probe"]
