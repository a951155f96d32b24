"""`ringfence bench`: how long starts take on this machine, against other tools and against what is promised."""

from __future__ import annotations

import sys

from ringfence.cli import output
from ringfence.cli._options import Option, Options
from ringfence.spec.parse import count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    from ringfence.cli._options import Parsed

__all__ = ["OPTIONS", "main"]

_GROUPS = ("start", "pool", "caller", "import", "vm")
_MET, _MISSED = 0, 1


def _rounds(word: str) -> int:
    return count(word, "rounds", 1, 1_000_000)


def _groups(word: str) -> tuple[str, ...]:
    names = tuple(word.split(","))
    for name in names:
        if name not in _GROUPS:
            raise ValueError(f"must be of {', '.join(_GROUPS)}, not {name!r}")
    return names


OPTIONS = Options(
    "ringfence bench",
    "",
    "Measures how long starts take, interleaved with subprocess, bubblewrap, crun and runc where they are installed.",
    [
        Option(
            "rounds", "how often each is started (200; a vm at most 3 times)", short="n", metavar="N", convert=_rounds
        ),
        Option("groups", "what to measure, by commas (start,pool,caller,import,vm)", metavar="NAMES", convert=_groups),
        Option("ablation", "instead, measure what each part of a boundary costs, by leaving it out"),
        Option(
            "profile", "instead, show where the time of one run goes", choices=("process", "container"), metavar="LEVEL"
        ),
        Option("sustained", "what adds up instead: 2000 starts (or --rounds), 1000 idle sandboxes, 10,000 in a row"),
        Option("vm", "instead, what a guest costs: booted, restored, pooled; its memory (30 rounds, or --rounds)"),
        Option("json", "print every sample and the machine's facts as JSON"),
    ],
    """\
start: one start by each tool. pool: a container of a pool. caller: with 0, 1 and 8 GiB in the caller, and with 1000
more mounts, which are made in
a mount namespace of their own. import: the library's import. vm: a start in a virtual machine.

--profile needs root and tracefs: it reads the kernel's own trace of the median of so many runs.

--sustained: launches per second, back to back and two at a time, against bubblewrap and crun; half as many sandboxes
that idle; five times as many starts in a row, and what of ringfence or the kernel has grown after them. This takes
minutes.

Exit status:
  0    no promise was missed
  1    one was; a busy machine is a reason too
  125  ringfence refused or failed; one line on stderr says why
""",
)


def _inside(given: Parsed) -> int:
    """What a start is made of."""
    if (given["groups"] is not None) + bool(given["ablation"]) + (given["profile"] is not None) > 1:
        raise OPTIONS.error("--groups, --ablation and --profile: only one of them")
    from ringfence.comparison import ablation, profile

    rounds = given["rounds"] or 200
    measured: ablation.Ablation | profile.Profile
    if given["ablation"]:
        measured = ablation.measure(rounds, output.progress())
    else:
        measured = profile.measure(given["profile"], rounds)
    if given["json"]:
        output.write_json(measured.to_json())
    else:
        from ringfence.comparison.bench_report import print_parts
        from ringfence.comparison.report import console

        print_parts(measured, console())
        sys.stdout.flush()
    return _MET


def main(argv: Sequence[str]) -> int:
    """Runs `ringfence bench` and returns its exit status."""
    given = OPTIONS.parse(argv)
    if given["sustained"]:
        return _sustained(given["rounds"] or 2000, given["json"])
    if given["vm"]:
        return _guests(given["rounds"] or 30, given["json"])
    if given["ablation"] or given["profile"]:
        return _inside(given)
    from ringfence.comparison.bench import TARGETS, measure

    found = measure(given["rounds"] or 200, given["groups"] or _GROUPS, output.progress())
    if given["json"]:
        output.write_json(found.to_json())
    else:
        from ringfence.comparison.bench_report import print_measurement
        from ringfence.comparison.report import console

        print_measurement(found, console())
        sys.stdout.flush()
    summaries = found.summaries()
    figures = [(one.found(summaries), one.most) for one in TARGETS]
    return _MISSED if any(figure is not None and figure > most for figure, most in figures) else _MET


def _guests(rounds: int, as_json: bool) -> int:
    from ringfence.comparison import guests

    return _told(guests.measure(rounds, output.progress()), guests.lines, as_json)


def _sustained(count: int, as_json: bool) -> int:
    from ringfence.comparison import sustained

    return _told(sustained.measure(count, output.progress()), sustained.lines, as_json)


def _told(found: dict[str, Any], lines: Callable[[dict[str, Any]], Iterable[str]], as_json: bool) -> int:
    if as_json:
        output.write_json(found)
    else:
        for line in lines(found):
            output.write_line(output.STDOUT, line)
    return _MET
