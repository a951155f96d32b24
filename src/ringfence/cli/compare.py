"""`ringfence compare`: one command bare and at every level; tables, a page or JSON of it, and what changed since."""

from __future__ import annotations

import os
import sys

from ringfence.cli import output
from ringfence.cli._inputs import read_file
from ringfence.cli._options import Option, Options, name_and_path
from ringfence.spec import ISOLATIONS, Limits
from ringfence.spec.parse import count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ringfence.cli._options import Parsed
    from ringfence.comparison.changes import Changes

__all__ = ["OPTIONS", "main"]

_SAME, _NOT_ALL = 0, 1
# What says how a command is run, and so says nothing of a comparison that was saved.
_OF_A_RUN = (
    *("levels", "repeat", "input", "file", "collect"),
    *("memory", "cpus", "pids", "timeout", "cpu-time", "measures", "peers", "save"),
)


def _levels(word: str) -> tuple[str, ...]:
    names = tuple(word.split(","))
    for name in names:
        if name not in ISOLATIONS:
            raise ValueError(f"must be of {', '.join(ISOLATIONS)}, not {name!r}")
    return names


def _repeat(word: str) -> int:
    return count(word, "repeat", 1, 100_000)


def _tolerance(word: str) -> Any:
    from ringfence.comparison.changes import Tolerance

    return Tolerance.parse(word)


OPTIONS = Options(
    "ringfence compare",
    "[--] [COMMAND [ARGUMENT]...]",
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
        Option("surface", "try every system call inside each level; show how many reach the host's kernel"),
        Option("measures", "take the whole cost suite too: minutes, whatever the command"),
        Option("peers", "run it by bwrap, crun, runc, runsc and podman as well, where they are installed"),
        Option("json", "print all that was measured as JSON"),
        Option("html", "write it as one page, with plots and all evidence (pip install 'ringfence[report]')",
               metavar="FILE"),
        Option("save", "write that JSON to a file, for --against and --load", metavar="FILE"),
        Option("load", "show a comparison that was saved, and run nothing", metavar="FILE"),
        Option("against", "tell what changed since a comparison that was saved, and fail where it is worse",
               metavar="FILE"),
        Option("tolerance", 'how much longer a start may take than then: a share, and a time (10%,0.2ms)',
               metavar="PERCENT%[,TIME]", convert=_tolerance),
        Option("allow-unknown", "with --against: a verdict that can't be told any more is not worse"),
    ],
    """\
The command runs without a boundary as well, with your privileges: don't compare what you don't trust.

Worse than a comparison that was saved (--against) is: a verdict further down in own, restricted, shared, or one that
can't be told any more; a system call that is reached and was denied; a level that is gone or doesn't run any more, and
one of which that comparison says nothing (it didn't run then, or wasn't tried); output that differs from the bare
command's and didn't; a start that takes longer beyond noise: the interval of its ratio is above 1 and it is above the
tolerance, both by itself and in relation to the bare command. Starts are compared on the same CPU model and kernel
only. docs/design/comparison.md has the JSON, and the whole rule.

Exit status:
  0    every level ran, and did what the bare command did; with --against, nothing is worse
  1    a level can't run here, or did something else; with --against, something is worse
  125  ringfence refused or failed; one line on stderr says why
""",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Runs `ringfence compare` and returns its exit status. Raises what `compare` raises."""
    given = OPTIONS.parse(argv)
    _check(given)
    from ringfence.comparison.document import load, save, write_file

    # What is asked of files is found out before anything is run: that may take minutes.
    old = None if given["against"] is None else load(given["against"])
    for name in ("save", "html"):
        if given[name] is not None:
            _writable(f"--{name}", given[name])
    if given["html"] is not None:
        from ringfence.comparison.html import need_packages

        need_packages()
    document = _compared(given) if given["load"] is None else load(given["load"])
    if given["save"] is not None:
        save(document, given["save"])
    changes = None
    if old is not None:
        from ringfence.comparison.changes import changes_between

        changes = changes_between(old, document, tolerance=given["tolerance"], allow_unknown=given["allow-unknown"])
    if given["html"] is not None:
        from ringfence.comparison.html import page

        write_file(given["html"], page(document, changes))
    _show(given, document, changes)
    if changes is not None:
        return _NOT_ALL if changes.worse else _SAME
    return _SAME if document["identical"] and document["complete"] else _NOT_ALL


def _check(given: Parsed) -> None:
    """Raises the command's own error where its words don't go together."""
    if given["load"] is None and not given.operands:
        raise OPTIONS.error("a command is missing; see ringfence compare --help")
    if given["load"] is not None:
        if given.operands:
            raise OPTIONS.error("with --load nothing is run: there can be no command")
        for name in _OF_A_RUN:
            if given[name]:
                raise OPTIONS.error(f"with --load nothing is run: there can be no --{name}")
    if given["against"] is None:
        for name in ("tolerance", "allow-unknown"):
            if given[name]:
                raise OPTIONS.error(f"--{name} is for --against")


def _writable(option: str, path: str) -> None:
    from ringfence.comparison.document import may_be_replaced

    folder = os.path.dirname(os.path.realpath(path))
    in_place = not may_be_replaced(path)  # /dev/stdout
    if os.path.isdir(path) or not (in_place or (os.path.isdir(folder) and os.access(folder, os.W_OK))):
        raise OPTIONS.error(f"{option}: {path}: can't be written")


def _compared(given: Parsed) -> dict[str, Any]:
    """Runs the command, and returns the comparison's document."""
    from ringfence.comparison import compare

    return compare(
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
        measures=bool(given["measures"]),
        peers=bool(given["peers"]),
        surface=given["surface"],
        tell=output.progress(),
    ).to_json()


def _show(given: Parsed, document: dict[str, Any], changes: Changes | None) -> None:
    """The comparison, and what changed, as JSON or as tables."""
    if given["json"]:
        output.write_json(document if changes is None else {**document, "changes": changes.to_json()})
        return
    from ringfence.comparison.report import console, print_changes, print_comparison

    to = console()
    print_comparison(document, to)
    if given["probes"]:
        from ringfence.comparison.probes_table import print_probes

        print_probes(document, to)
    if changes is not None:
        print_changes(changes, to)
    sys.stdout.flush()


def _input(path: str | None) -> bytes | None:
    if path is None:
        return None
    if path == "-":
        return sys.stdin.buffer.read()
    return read_file(OPTIONS, "--input", path).data
