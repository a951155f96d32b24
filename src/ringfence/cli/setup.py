"""`ringfence setup`: gets what the levels need, once. A second call finds it all and takes no time."""

from __future__ import annotations

from ringfence import _setup
from ringfence.cli import output
from ringfence.cli._options import Option, Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence._setup import Step

__all__ = ["main"]

OPTIONS = Options(
    "ringfence setup",
    "",
    "Gets what the levels need: QEMU, erofs-utils and libseccomp by the system's package manager (as root), and a"
    " kernel for guests, which is only unpacked into the cache and never installed.",
    [
        Option(
            "level",
            "only what this level needs (all)",
            metavar="|".join(_setup.LEVELS),
            repeatable=True,
            choices=_setup.LEVELS,
        ),
        Option("json", "print one line of JSON"),
    ],
    """
Exit status:
  0     everything is there
  1     something isn't; its line says why, and which command gets it
""",
)

_MARKS = {"present": "ok", "done": "done", "needs": "needed", "failed": "failed"}


def main(argv: Sequence[str]) -> int:
    """Runs `ringfence setup` and returns its exit status."""
    given = OPTIONS.parse(argv)
    found = _setup.steps(given["level"] or _setup.LEVELS, progress=output.progress())
    if given["json"]:
        output.write_json([{name: getattr(one, name) for name in one._fields} for one in found])
    else:
        output.write_line(output.STDOUT, as_text(found))
    return 0 if all(one.ok for one in found) else 1


def as_text(found: Sequence[Step]) -> str:
    """A line a step, and then the commands that somebody has to run."""
    text = output.columns([(_MARKS[one.state], one.name, one.detail) for one in found])
    commands = [one.command for one in found if not one.ok and one.command]
    if commands:
        # One command may get several of them.
        lines = "\n".join(f"  {output.printable(command)}" for command in dict.fromkeys(commands))
        text += f"\n\nTo get what is missing, run:\n{lines}"
    return text
