"""`ringfence COMMAND`: finds the command, and turns what it raises into one line and an exit status."""

from __future__ import annotations

import atexit
import gc
import os
import sys

from ringfence.cli import output
from ringfence.cli._options import HelpAsked, UsageError, did_you_mean, two_columns
from ringfence.errors import CannotEnforce, RingfenceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

__all__ = ["COMMANDS", "REFUSED", "leave", "main"]

# name -> (module with main(argv) -> exit status, one line of help). A module is imported when it is called for.
COMMANDS = {
    "run": ("ringfence.cli.run", "run a command as a process, in a container or in a virtual machine"),
    "choose": ("ringfence.cli.choose", "say which level would do for what is required, and why not the others"),
    "compare": ("ringfence.cli.compare", "run a command at every level, and show what each isolates and costs"),
    "inspect": ("ringfence.cli.inspect", "show what a live process is, whoever made it, and what is weak about it"),
    "ps": ("ringfence.cli.ps", "list what runs here, as virtual machines, containers and processes"),
    "console": ("ringfence.cli.console", "boot an operating system of your own, and show its serial console"),
    "doctor": ("ringfence.cli.doctor", "show what this host can enforce, level by level, and what would help"),
    "setup": ("ringfence.cli.setup", "get what the levels need: QEMU, a kernel for guests, libseccomp"),
    "cache": ("ringfence.cli.cache", "list, check and remove what was made once and kept: kernels, disks, templates"),
    "bench": ("ringfence.cli.bench", "measure how long starts take, against other tools"),
}

# As timeout(1) and env(1) have it: the tool itself failed, so nothing is said of the workload.
REFUSED = 125
_INTERRUPTED = 130
_NOBODY_READS = 141
# Python's own, where its buffers could not be written.
_NOT_FLUSHED = 120


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (sys.argv[1:] by default) and returns its exit status. SystemExit is not raised by
    ringfence's own commands.
    """
    output.open_standard_streams()
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except HelpAsked as asked:
        return _print(asked.text)
    except BrokenPipeError:
        # The reader went away: as if SIGPIPE had ended us. stdout is pointed elsewhere, lest Python flush into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), output.STDOUT)
        return _NOBODY_READS
    except KeyboardInterrupt:
        return _INTERRUPTED
    except UsageError as error:
        output.complain(str(error), speaker="")
    except CannotEnforce as error:
        # Each rule with what would help, which the exception's own line leaves to its members.
        output.complain(f"{error.isolation} isolation can't enforce here: {'; '.join(map(str, error.unmet))}")
    except RingfenceError as error:
        output.complain(str(error))
    except OSError as error:
        output.complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception:
        # A bug of ours. Python would exit with 1, which may be the workload's own.
        import traceback

        traceback.print_exc()
    return REFUSED


def leave(status: int) -> NoReturn:
    """Ends this process with that status. Python would free all its objects first, one by one, for 4 ms."""
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, AttributeError):  # AttributeError: the caller has closed it, so Python has none
        status = status or _NOT_FLUSHED
    os._exit(status)


def _dispatch(words: list[str]) -> int:
    if not words:
        raise UsageError("ringfence: a command is missing; see ringfence --help")
    name, *rest = words
    if name in ("-h", "--help") or words == ["help"]:
        return _print(_help())
    if name in ("-V", "--version"):
        from ringfence import __version__

        return _print(f"ringfence {__version__}\n")
    if name == "help":
        name, rest = rest[0], ["--help"]
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        near = did_you_mean(name, list(COMMANDS)) or "; see ringfence --help"
        raise UsageError(f"ringfence: unknown {kind} {name!r}{near}")
    if name != "run":
        gc.enable()  # the others live long enough for it to pay; see bin/ringfence
    # Not importlib.import_module: half a millisecond, for the same.
    status: int = __import__(COMMANDS[name][0], fromlist=["main"]).main(rest)
    return status


def _print(text: str) -> int:
    output.write(output.STDOUT, text.encode())
    return 0


def _help() -> str:
    rows = [(name, help) for name, (_, help) in COMMANDS.items()]
    return (
        "Usage: ringfence COMMAND [OPTION]... [WORD]...\n\n"
        "Runs a command as a process, a container or a virtual machine, and shows what holds it.\n\n"
        f"Commands:\n{two_columns(rows)}\n\n"
        "'ringfence help COMMAND' explains one. 'ringfence --version' prints the version.\n"
    )
