"""Callers of ringfence without privileges, for tests that root runs."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import leaks
from support.sandboxes import SOURCES

# Of no account, and far from ringfence's own ids.
UID = 61234


@functools.cache
def _readable_copy() -> Path:
    """The package and these helpers, where any user may read them: a checkout is often in a home directory."""
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="readable-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(SOURCES / "ringfence", folder / "ringfence", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(__file__).parent, folder / "support", ignore=shutil.ignore_patterns("__pycache__"))
    import pyseccomp  # type: ignore[import-untyped]

    source = Path(pyseccomp.__file__)
    if source.name == "__init__.py":
        shutil.copytree(source.parent, folder / "pyseccomp")
    else:
        shutil.copy(source, folder)
    home = folder / "home"
    home.mkdir()
    for one in (folder, *folder.rglob("*")):
        one.chmod(0o755 if one.is_dir() or one.stat().st_mode & 0o100 else 0o644)
    os.chown(home, UID, UID)
    return folder


def home() -> Path:
    """A folder of that user's own."""
    return _readable_copy() / "home"


def _interpreter() -> str:
    """A Python that any user may start: that of the system, as a virtual environment may be out of their reach."""
    return os.path.realpath(sys.executable)


@contextmanager
def caller(code: str, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process of that user, with ringfence and pytest's plain helpers to import; ended at the latest here."""
    env = {"PYTHONPATH": str(_readable_copy()), "HOME": str(home()), "PATH": os.environ["PATH"]}
    if "TMPDIR" in os.environ:
        env["TMPDIR"] = os.environ["TMPDIR"]
    command = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", _interpreter(), "-c", code, *args]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/") as process:
        leaks.callers.add(process.pid)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def python_json(code: str, *args: str, timeout: float = 120) -> Any:
    """What such a process prints, as JSON. It must end well."""
    with caller(code, *args) as process:
        printed, complaints = process.communicate(timeout=timeout)
    assert process.returncode == 0, complaints.decode()
    return json.loads(printed)
