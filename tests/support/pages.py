"""The pages of docs/ that teach: each is a session of a shell, whose commands are run and whose output is compared.

A fenced block of the kind `console` holds commands, a line each that begins with "# " (and goes on in lines that begin
with "> "), and below each what it prints. In that, "…" stands for any text within a line, a line that is just "…" for
any number of lines; what is of the machine or of the moment stands for any other of its kind (`_LOOSE`): pids, inode
numbers and all other numbers of four digits or more, releases of kernels, times, sizes; and so do two blanks or more.
Everything else has to be as it is.

    python -m support.pages --write docs/learn/*.md     (in tests/) runs pages and puts what was printed into them
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

__all__ = ["ROOT", "Block", "Step", "blocks", "matches", "pages", "run", "steps"]

ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ROOT / "src"
_FENCE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What is told by another number next time, and by what such a thing is known.
_LOOSE = (
    (r"\b\d+\.\d+\.\d+-[-\w.]+", "a kernel's release"),
    (r"\b\d[\d.]* ?(?:ns|us|ms|s|K|kB|M|MB|KiB|MiB|GiB)\b", "a time or a size"),
    (r"(?<=x)\d[\d.]*", "a ratio"),
    (r"^\d+(?=: an? )", "the pid that inspect begins with"),
    (r"(?<=\()\d+(?= is one\))", "the pid of a neighbour"),
    (r"(?<=/proc/)\d+", "a pid in a path"),
    (r"(?<=/ringfence-)\d+-[0-9a-f]{16}", "a run folder"),
    (r"\d{4,}", "a long number"),
    (r"  +", "blanks of a column"),
)
_LOOSE_PART = re.compile("|".join(f"({pattern})" for pattern, _ in _LOOSE), re.MULTILINE)
_END, _PAGE = "\x1e", "\x1d"
_REMOVE_BOX = '[ ! -d "${box:-}" ] || until rmdir "$box" 2>/dev/null; do sleep 0.1; done'
_SECONDS = 180


class Step(NamedTuple):
    """A command, and what the page says that it prints. line: where it is in its file."""

    command: str
    printed: str
    line: int


class Block(NamedTuple):
    """A fenced block: where its text begins and ends, and the steps in it."""

    start: int
    end: int
    steps: list[Step]


def pages() -> list[Path]:
    """Those that have commands to run."""
    found = [ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "learn").glob("*.md"))]
    return [one for one in found if steps(one)]


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        first = text.count("\n", 0, match.start(1)) + 1
        found.append(Block(match.start(1), match.end(1), _steps(match[1], first)))
    return found


def steps(path: Path) -> list[Step]:
    return [one for block in blocks(path) for one in block.steps]


def _steps(text: str, first: int) -> list[Step]:
    found: list[Step] = []
    for number, line in enumerate(text.splitlines(), first):
        if line.startswith("# "):
            found.append(Step(line[2:], "", number))
        elif line.startswith("> ") or line == ">":
            assert found, f"line {number} goes on with a command that there isn't"
            found[-1] = found[-1]._replace(command=f"{found[-1].command}\n{line[2:]}")
        else:
            assert found, f"line {number} is printed by no command"
            found[-1] = found[-1]._replace(printed=f"{found[-1].printed}{line}\n")
    return found


def matches(expected: str, got: str) -> bool:
    """Whether what was printed is what the page says."""
    parts = []
    for line in expected.splitlines():
        if line.strip() == "…":
            parts.append(r"(?:[^\n]*\n)*?")
        else:
            parts.append("[^\n]*".join(map(_pattern, line.split("…"))) + "\n")
    return re.fullmatch("".join(parts), got, re.MULTILINE) is not None


def _pattern(text: str) -> str:
    """A regular expression for a text, in which what is loose matches all of its kind."""
    found, at = "", 0
    for match in _LOOSE_PART.finditer(text):
        pattern = _LOOSE[(match.lastindex or 1) - 1][0]
        found += re.escape(text[at : match.start()]) + f"(?:{pattern})"
        at = match.end()
    return found + re.escape(text[at:])


def run(sessions: list[list[Step]]) -> list[list[str]]:
    """What each command of each page prints: a shell and an empty folder for a page, as root, in namespaces of their
    own. What a page leaves running is ended.
    """
    with tempfile.TemporaryDirectory(prefix="ringfence-page-") as folder:
        os.chmod(folder, 0o755)
        tools = Path(folder) / "bin"
        tools.mkdir()
        for name, words in {"ringfence": "-m ringfence ", "python3": ""}.items():
            shim = tools / name
            shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words}"$@"\n')
            shim.chmod(0o755)
        for number, page in enumerate(sessions):
            work = Path(folder) / str(number)
            work.mkdir()
            script = "".join(f"{{ {one.command}\n}} </dev/null\nprintf '{_END}'\n" for one in page)
            # A cgroup that the page has made has to be empty before it can be removed.
            script += f"exec 2>/dev/null; kill -9 -1; {_REMOVE_BOX}\nprintf '{_PAGE}'\n"
            (work / ".session").write_text(script)
        every = f"for page in $(seq 0 {len(sessions) - 1}); do"
        program = [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--ipc", "--uts"),
            *("bash", "-c"),
            f"ip link set lo up; {every} (cd {shlex.quote(folder)}/$page && bash --norc .session); done",
        ]
        own = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(_SOURCES), "HOME": folder}
        own |= {"LC_ALL": "C.UTF-8", "RINGFENCE_CACHE": _cache()}
        printed = _output(program, {**os.environ, **own})
    some = [one.split(_END) for one in printed.split(_PAGE)]
    some += [[]] * len(sessions)
    return [found[: len(page)] for page, found in zip(sessions, some, strict=False)]


def _output(words: list[str], environment: dict[str, str]) -> str:
    """What a program prints; as far as it comes, where it doesn't end."""
    try:
        printed = subprocess.run(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS,
            check=False,
        ).stdout
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"") + b"\nthis took too long: the page was ended\n"
    return printed.decode("utf-8", "replace")


def _cache() -> str:
    """The one that this process uses, whatever HOME is there."""
    from ringfence import _cache

    return _cache.root()


def _write(paths: list[Path]) -> None:
    """Puts what was printed in the place of what no longer matches."""
    for path, printed in zip(paths, run([steps(path) for path in paths]), strict=True):
        text = path.read_text(encoding="utf-8")
        outputs = iter(printed)
        for block, some in reversed([(one, [next(outputs) for _ in one.steps]) for one in blocks(path)]):
            new = ""
            for step, got in zip(block.steps, some, strict=True):
                command = re.sub(r"^> $", ">", step.command.replace("\n", "\n> "), flags=re.MULTILINE)
                new += f"# {command}\n" + (step.printed if matches(step.printed, got) else got)
            text = text[: block.start] + new + text[block.end :]
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        _write([Path(name).resolve() for name in sys.argv[2:]])
