"""`ringfence console`: a whole operating system of the user's own, and its serial console on this terminal."""

from __future__ import annotations

import os
import select
import time

from ringfence.cli import output
from ringfence.cli._options import Option, Options, UsageError
from ringfence.errors import ProtocolError
from ringfence.spec import parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["main"]

_END_KEY = b"\x1d"  # Ctrl-]
_TIMED_OUT = 124
_READ_BYTES = 4096

OPTIONS = Options(
    "ringfence console",
    "",
    "Boots an operating system of your own, with its own kernel and init, in a jailed virtual machine without a"
    " network, and shows its serial console. Its disk is never written to: what it writes is gone with it.",
    [
        Option("kernel", "a kernel image to boot: a bzImage, or an ELF with a PVH note", metavar="FILE"),
        Option("initrd", "its initial RAM disk", metavar="FILE"),
        Option("append", "its command line; Linux needs console=ttyS0 in it", metavar="WORDS"),
        Option("disk", "a raw or qcow2 disk image; without a kernel it is booted from", metavar="FILE"),
        Option("memory", "the machine's memory (512M)", metavar="SIZE"),
        Option("writes", "how much of what it writes to its disk is kept, in memory (256M)", metavar="SIZE"),
        Option("cpus", "its CPUs (1)", metavar="N", convert=int),
        Option("timeout", "end it after that time", metavar="TIME"),
    ],
    """
On a terminal every key goes to the system but Ctrl-], which ends it.

Exit status:
  0     the machine was switched off from within, or by Ctrl-]
  124   the time was up
  125   ringfence itself refused or failed
""",
)


def main(argv: Sequence[str]) -> int:
    """Runs `ringfence console` and returns its exit status."""
    from ringfence.levels.vm.console import Console

    given = OPTIONS.parse(argv)
    if given.operands:
        raise UsageError(f"ringfence console: unexpected word {given.operands[0]!r}")
    until = None
    if given["timeout"] is not None:
        until = time.monotonic() + parse.duration(given["timeout"], "timeout") / 1e9
    with Console(
        kernel=given["kernel"],
        initrd=given["initrd"],
        disk=given["disk"],
        append=given["append"] or "",
        memory=given["memory"] or "512M",
        cpus=given["cpus"] or 1,
        writes=given["writes"] or "256M",
    ) as console:
        before = _raw()
        try:
            return _carry(console, until)
        finally:
            if before is not None:
                import termios

                termios.tcsetattr(0, termios.TCSADRAIN, before)


def _raw() -> list[Any] | None:
    """Has the terminal hand on each key as it is. How it was, or None where there is none."""
    if not os.isatty(0):
        return None
    import termios
    import tty

    before = termios.tcgetattr(0)
    tty.setraw(0)
    return before


def _carry(console: Any, until: float | None) -> int:
    """Both ways, until the machine is off, the key, or the time."""
    poll = select.poll()
    poll.register(console.fileno(), select.POLLIN)
    poll.register(0, select.POLLIN)
    terminal = os.isatty(0)
    while True:
        left = None if until is None else max(0, int((until - time.monotonic()) * 1000))
        found = [fd for fd, _ in poll.poll(left)]
        if not found and left is not None:
            return _TIMED_OUT
        if console.fileno() in found:
            data = console.read(10)
            if not data:
                break
            output.write(output.STDOUT, data)
        if 0 in found:
            typed = os.read(0, _READ_BYTES)
            if not typed:
                poll.unregister(0)  # what it still prints is awaited
            elif terminal and _END_KEY in typed:
                return 0
            else:
                try:
                    console.write(typed)
                except ProtocolError:
                    poll.unregister(0)  # it is over, which its output's end tells
    console.wait(10)
    return 0
