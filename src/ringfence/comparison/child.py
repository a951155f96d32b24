"""Python processes of our own in which something is measured apart from this one: modules of the library, by -m."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["SOURCE", "answering", "environment", "module"]

# The library is found by a child as this process found it, installed or not.
SOURCE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs that module of this package. -P: nothing of the current directory is imported."""
    return [sys.executable, "-P", "-m", f"ringfence.comparison.{name}", *arguments]


def environment() -> dict[str, str]:
    """Ours, with the library where it is for us, and compiled once, as an installed one is."""
    path = os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": ""}


@contextlib.contextmanager
def answering(words: list[str], *, ready_s: float | None = None) -> Iterator[Callable[[str], str]]:
    """A process that says "ready", and then answers each line by one; it ends with its stdin. ready_s: how long it may
    take to be ready. Raises OSError with what it said instead, or where it ends without an answer.
    """
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True
    ) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def ask(line: str) -> str:
            asked.write(f"{line}\n")
            asked.flush()
            answer = answers.readline()
            if not answer:
                raise OSError(f"{words[3]} ended without an answer")
            return answer

        try:
            if ready_s is not None and not select.select([answers], [], [], ready_s)[0]:
                process.kill()
                raise OSError(f"not ready after {ready_s:.0f} s")
            said = answers.readline().strip()
            if said != "ready":
                raise OSError(said or "it ended without a word")
            yield ask
        finally:
            with contextlib.suppress(BrokenPipeError):
                asked.close()
