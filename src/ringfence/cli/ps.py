"""`ringfence ps`: everything that runs here, as virtual machines, containers and processes."""

from __future__ import annotations

from ringfence.cli import output
from ringfence.cli._options import Option, Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.observe import Group

__all__ = ["OPTIONS", "main"]

OPTIONS = Options(
    "ringfence ps",
    "",
    "Lists everything that runs on this host, grouped as what it is: virtual machines, containers with all their"
    " processes, plain processes. Threads of the kernel are left out.",
    [
        Option("all", "list plain processes one by one, not just how many", short="a"),
        Option("json", "print one line of JSON, with all that inspect tells of the first process of each"),
    ],
    """
Memory is what is resident, added up: pages that are shared count more than once. As root all is seen.
""",
)

_TITLES = {"vm": "virtual machines", "container": "containers", "process": "processes"}


def main(argv: Sequence[str]) -> int:
    given = OPTIONS.parse(argv)
    if given.operands:
        raise OPTIONS.error(f"unknown word {given.operands[0]!r}; see ringfence ps --help")
    from ringfence.observe import survey

    groups = survey()
    if given["json"]:
        output.write_json([one.to_json() for one in groups])
        return 0
    for kind, title in _TITLES.items():
        found = [one for one in groups if one.kind == kind]
        memory = sum(one.resident_bytes for one in found)
        output.write_line(output.STDOUT, f"{title}: {len(found)}, {memory >> 20} MiB")
        if found and (kind != "process" or given["all"]):
            head = ("PID", "PROCESSES", "MiB", "UID", "NAME", "WHAT")
            output.write_line(output.STDOUT, output.columns([head, *map(_row, found)], indent=2))
    return 0


def _row(group: Group) -> tuple[str, ...]:
    first = group.first
    uid = str(first.uids[1]) if first.uids else "?"
    count = str(len(group.pids))
    called = (first.container.name or first.container.id[:12]) if first.container is not None else ""
    return (
        str(first.pid),
        count,
        str(group.resident_bytes >> 20),
        uid,
        f"{called} ({first.name})" if called else first.name,
        "; ".join(first.verdict.split("; ")[:3]),
    )
