"""`ringfence compare`: one command bare and at every level, in three tables: its output, its isolation, its cost."""

from __future__ import annotations

import os
import sys

from ringfence.cli import output
from ringfence.cli._inputs import name_and_path, read_file
from ringfence.cli._options import Option, Options
from ringfence.spec import ISOLATIONS, Limits
from ringfence.spec.parse import count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["OPTIONS", "main"]

_SAME, _NOT_ALL = 0, 1


def _levels(word: str) -> tuple[str, ...]:
    names = tuple(word.split(","))
    for name in names:
        if name not in ISOLATIONS:
            raise ValueError(f"must be of {', '.join(ISOLATIONS)}, not {name!r}")
    return names


def _repeat(word: str) -> int:
    return count(word, "repeat", 1, 100_000)


OPTIONS = Options(
    "ringfence compare",
    "[--] COMMAND [ARGUMENT]...",
    "Runs a command without a boundary and at every level, with the same input, and shows whether it did the same, what"
    " was isolated, and what it cost.",
    [
        Option("levels", "the levels, by commas (process,container,vm)", metavar="NAMES", convert=_levels),
        Option("repeat", "how often at each (20, in a vm 3, less where it takes long)", metavar="N", convert=_repeat),
        Option("input", "what the command reads from its stdin; - is ours", metavar="FILE"),
        Option("file", "put a copy of a file into the work directory", metavar="NAME=PATH", repeatable=True,
               convert=name_and_path),
        Option("collect", 'compare files of the work directory too: "out/*.csv"', metavar="PATTERN", repeatable=True),
        Option("memory", 'how much memory it may use at a level, swap included: "256M"', metavar="SIZE"),
        Option("cpus", "how many CPUs it may use at a level: 0.5", metavar="NUMBER"),
        Option("pids", "how many processes and threads it may have at a level", metavar="N"),
        Option("timeout", 'how long it may run, also without a boundary: "10s"', metavar="TIME"),
        Option("cpu-time", 'how much CPU time it may use at a level: "5s"', metavar="TIME"),
        Option("probes", "show every probe of the isolation with its evidence, not just how many"),
        Option("json", "print all that was measured as JSON"),
    ],
    """\
The command runs without a boundary as well, with your privileges: don't compare what you don't trust.

Exit status:
  0    every level ran, and did what the bare command did
  1    a level can't run here, or did something else
  125  ringfence refused or failed; one line on stderr says why
""",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Runs `ringfence compare` and returns its exit status. Raises what `compare` raises."""
    given = OPTIONS.parse(argv)
    if not given.operands:
        raise OPTIONS.error("a command is missing; see ringfence compare --help")
    from ringfence.comparison import compare

    found = compare(
        [os.fsencode(word) for word in given.operands],
        levels=given["levels"] or ISOLATIONS,
        input=_input(given["input"]),
        files={name: read_file(OPTIONS, "--file", path) for name, path in given["file"]},
        collect=given["collect"],
        limits=Limits(
            memory=given["memory"],
            cpus=given["cpus"],
            pids=given["pids"],
            wall_time=given["timeout"],
            cpu_time=given["cpu-time"],
        ),
        repeat=given["repeat"],
        tell=output.progress(),
    )
    if given["json"]:
        output.write_json(found.to_json())
    else:
        from ringfence.comparison.report import console, print_comparison

        print_comparison(found, console())
        if given["probes"]:
            from ringfence.comparison.probes_table import print_probes

            print_probes(found.to_json(), console())
        sys.stdout.flush()
    return _SAME if found.identical and found.complete else _NOT_ALL


def _input(path: str | None) -> bytes | None:
    if path is None:
        return None
    if path == "-":
        return sys.stdin.buffer.read()
    return read_file(OPTIONS, "--input", path).data
