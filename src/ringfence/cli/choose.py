"""`ringfence choose`: which level `run -i auto` would take, and what speaks against the others."""

from __future__ import annotations

from ringfence.cli import output, run
from ringfence.cli._options import Option, Options
from ringfence.spec import AUTO, ISOLATIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.comparison.choice import Choice, Weighed

__all__ = ["OPTIONS", "as_text", "main"]

# What a command brings along or takes back has nothing to do with its boundary.
_NOT_HERE = ("isolation", "file", "collect", "collect-to", "force", "env", "no-stdin", "json", "applied", "help")

OPTIONS = Options(
    "ringfence choose",
    "[[--] COMMAND [ARGUMENT]...]",
    "Says which is the cheapest level that isolates what is required and can do what is asked for, on this host, with"
    " the evidence; and what speaks against each other one. Runs no command.",
    [
        Option("isolation", "look at this level only (auto: all)", short="i", choices=(*ISOLATIONS, AUTO)),
        *(one for one in run.OPTIONS.options if one.name not in _NOT_HERE),
        Option("json", "print it all as JSON"),
    ],
    """\
A requirement is a resource, as `ringfence compare` lists them, and how much of its own it has to be:

  own         one of its own: what is done there can't be seen or felt by the host's
  restricted  own, or the host's with less of it in reach than its caller has

The resources: kernel, memory, CPUs, processes, signals, others' memory, users, capabilities, system
calls, new privileges, mounts, files, devices, kernel settings, network, IPC, keyrings, host name,
cgroups, clock. Capitals don't matter, and "-" may stand for a blank: --require host-name=own.

The verdicts are those of a probe that looked around in a sandbox of these very options, here, and
without one. What they and a start took is kept in the cache, until the host, its settings, the
caller's privileges or ringfence change. What isn't known meets no requirement.

Exit status:
  0    there is such a level
  1    there is none
  125  ringfence refused or failed; one line on stderr says why
""",
)


def main(argv: Sequence[str]) -> int:
    """Runs `ringfence choose` and returns its exit status. Raises SpecError."""
    given = OPTIONS.parse(argv)
    for option in run.OPTIONS.options:
        given.values.setdefault(option.name, [] if option.repeatable else None)
    spec = run.spec_of(given, isolation=AUTO)
    from ringfence.comparison.choice import weigh
    from ringfence.levels.host import host

    run.tell_progress()
    found = weigh(spec, host(), all_levels=True)
    if given["json"]:
        output.write_json(found.to_json())
    else:
        output.write_line(output.STDOUT, as_text(found))
    return 0 if found.isolation is not None else 1


def as_text(choice: Choice) -> str:
    """A line for each requirement at each level, and the sentence of it all."""
    rows: list[tuple[str, ...]] = [("level", "start", "requirement", "", "verdict", "evidence")]
    for one in choice.levels:
        rows += _rows(one)
    return f"{output.columns(rows)}\n\n{choice.why}"


def _rows(one: Weighed) -> list[tuple[str, ...]]:
    start = "unknown" if one.start_ns is None else output.duration(one.start_ns)
    found: list[tuple[str, ...]] = []
    for unmet in one.unmet:
        help = f" [help: {unmet.help}]" if unmet.help else ""
        found.append((unmet.rule, "no", "refused", unmet.reason + help))
    for judged in one.judged:
        wanted = f"{judged.resource}={judged.required}"
        found.append((wanted, "yes" if judged.met else "no", judged.verdict, judged.evidence))
    if not found:
        found.append(("-", "yes", "", "it can do what is asked for"))
    return [
        (one.isolation, "-" if one.unmet else start, *row) if at == 0 else ("", "", *row)
        for at, row in enumerate(found)
    ]
