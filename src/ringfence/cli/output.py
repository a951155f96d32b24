"""What the commands write: all of it, in bytes, past Python's own buffers."""

from __future__ import annotations

import os

from ringfence.errors import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

__all__ = [
    "STDERR",
    "STDIN",
    "STDOUT",
    "columns",
    "complain",
    "duration",
    "open_standard_streams",
    "printable",
    "progress",
    "size",
    "write",
    "write_json",
    "write_line",
]

STDIN, STDOUT, STDERR = 0, 1, 2
_NAMES = {STDIN: "stdin", STDOUT: "stdout", STDERR: "stderr"}


def open_standard_streams() -> None:
    """Where the caller has closed one of the three, opens it to nothing: else a descriptor of ours would get its number
    and the workload's output would go there. Reading is at its end at once; writing fails with EBADF, as it would have.
    """
    for fd in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # takes the lowest number, which is this one


def write(fd: int, data: bytes | memoryview) -> None:
    """All of it. Raises OSError, whose filename says which stream; waits where one that somebody made non-blocking is
    full.
    """
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(fd, left) :]
        except BlockingIOError:
            import select

            select.select([], [fd], [])
        except OSError as error:
            error.filename = _NAMES[fd]
            raise


def write_line(fd: int, text: str) -> None:
    """A line, whatever is in it: what a locale can't say is shown as Python would."""
    write(fd, (text + "\n").encode("utf-8", "backslashreplace"))


def complain(text: str, speaker: str = "ringfence: ") -> None:
    """One line on stderr, begun with who speaks. Never fails: there would be nowhere to say so."""
    try:
        write_line(STDERR, printable(speaker + text))
    except OSError:
        pass


def write_json(value: Any) -> None:
    """One line of JSON on stdout."""
    import json

    # In ASCII, so that a file's name that is no UTF-8 is a valid document too.
    write(STDOUT, json.dumps(value).encode("ascii") + b"\n")


def columns(rows: Sequence[Sequence[str]], *, indent: int = 0) -> str:
    """Rows as aligned text, two blanks between columns, a line each. The last column is as long as it is."""
    safe = [[printable(cell) for cell in row] for row in rows]
    count = max((len(row) for row in safe), default=0)
    widths = [max((len(row[at]) for row in safe if at < len(row)), default=0) for at in range(count)]
    lines = []
    for row in safe:
        line = "  ".join(cell.ljust(widths[at]) for at, cell in enumerate(row))
        lines.append((" " * indent + line).rstrip())
    return "\n".join(lines)


def progress() -> Callable[[str], None] | None:
    """Where stderr is a terminal, what tells there of long work; else None."""
    if not os.isatty(STDERR):
        return None

    def tell(text: str) -> None:
        complain(f"{text} ...")

    return tell


def size(count: int) -> str:
    """Bytes in the largest unit that they are a whole number of: 268435456 is "256M", 1000 is "1000"."""
    for unit, bytes_in_it in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count and count % bytes_in_it == 0:
            return f"{count // bytes_in_it}{unit}"
    return str(count)


def duration(ns: int) -> str:
    """Nanoseconds as people write them: "1.5s", "81.2ms", "3us"."""
    for unit, ns_in_it in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if ns >= ns_in_it:
            return f"{ns / ns_in_it:.3g}{unit}" if ns < 1000 * ns_in_it else f"{ns / ns_in_it:.0f}{unit}"
    return f"{ns}ns"
