"""`ringfence run`: one command behind a boundary, with the streams and the exit status that it would have without."""

from __future__ import annotations

import errno
import gc
import os

from ringfence.api import check_spec, run_spec
from ringfence.cli import output
from ringfence.cli._inputs import name_and_path, read_file
from ringfence.cli._options import Option, Options
from ringfence.cli.main import REFUSED
from ringfence.errors import SpecError, StartError
from ringfence.result import TerminationReason
from ringfence.spec import ISOLATIONS, File, Limits, Mount, Spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.cli._options import Parsed
    from ringfence.result import Applied, Result

__all__ = ["OPTIONS", "main"]

_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
_READ_BYTES = 1 << 20
# What the numbers of `Applied` are in, where that isn't plain from the rule.
_UNITS = {"memory": "bytes", "output": "bytes", "disk": "bytes", "wall_time": "ns", "cpu_time": "ns"}


def _variable(word: str) -> tuple[bytes, bytes]:
    """K=V, or K for the caller's own."""
    name, equals, value = os.fsencode(word).partition(b"=")
    if not name:
        raise ValueError(f"must be NAME=VALUE or NAME, not {word!r}")
    if not equals:
        if name not in os.environb:
            raise ValueError(f"{word} is not set here: give it a value, as {word}=...")
        value = os.environb[name]
    return name, value


def _mount(word: str) -> Mount:
    source, _, rest = word.partition(":")
    target, colon, mode = rest.partition(":")
    if not target or mode not in ("", "ro", "rw") or (colon and not mode):
        raise ValueError(f"must be SOURCE:TARGET, SOURCE:TARGET:ro or SOURCE:TARGET:rw, not {word!r}")
    return Mount(source, target, writable=mode == "rw")


OPTIONS = Options(
    "ringfence run",
    "[--] COMMAND [ARGUMENT]...",
    "Runs a command behind a boundary and ends as it does. What is asked for and can't be enforced here is an error,"
    " and then nothing is started.",
    [
        Option("isolation", "the boundary (container)", short="i", choices=ISOLATIONS),
        Option("memory", 'how much memory it may use, swap included: "256M"', metavar="SIZE"),
        Option("cpus", "how many CPUs it may use: 0.5", metavar="NUMBER"),
        Option("pids", "how many processes and threads it may have at once", metavar="NUMBER"),
        Option("timeout", 'the wall_time limit, from its start: "10s", "1.5m"', metavar="TIME"),
        Option("cpu-time", "how much CPU time all its processes may use", metavar="TIME"),
        Option("output-limit", "how much of each of stdout and stderr is kept; more ends it (64M)", metavar="SIZE"),
        Option("disk", "how much it may write", metavar="SIZE"),
        Option(
            "env",
            "set a variable, over PATH, HOME, LANG and TERM, which are all it has; NAME alone passes ours on",
            short="e",
            metavar="NAME[=VALUE]",
            repeatable=True,
            convert=_variable,
        ),
        Option(
            "file",
            "copy a file of the host, with its mode, into the work directory, which is the current one",
            short="f",
            metavar="NAME=PATH",
            repeatable=True,
            convert=name_and_path,
        ),
        Option(
            "collect",
            'bring files of the work directory back: "out/*.csv", "**" for any folders',
            short="c",
            metavar="PATTERN",
            repeatable=True,
        ),
        Option("collect-to", "where they are put, made if need be (the current directory)", metavar="DIR"),
        Option("force", "replace files there; without it they are an error"),
        Option(
            "mount",
            "show a file or folder of the host, read-only unless it says rw",
            metavar="SOURCE:TARGET[:rw]",
            repeatable=True,
            convert=_mount,
        ),
        Option("image", '"host", or a folder that is its root file system (host)', metavar="DIR"),
        Option("user", 'a uid, "uid:gid" or a name inside (one without privileges)', short="u", metavar="USER"),
        Option("hostname", "the host name inside", metavar="NAME"),
        Option("network", "which network it has (none)", choices=("none", "host", "nat")),
        Option("no-stdin", "give it an empty stdin, and read nothing of ours"),
        Option("json", "print the whole result as one line of JSON instead of its stdout and stderr"),
        Option("applied", "list on stderr which rules were in force, and by what", short="v"),
    ],
    """
Streams: stdin is read to its end before the command starts; where it is a terminal, the command gets an
empty one. Where something holds stdin open for good (cron, ssh, some CI runners) that would wait for
ever: use --no-stdin. The command's stdout and stderr are written when it has ended, byte for byte.

With --json the collected files are in the JSON, and are written only where --collect-to says so.

Exit status:
  the command's own          it exited
  128+N                      signal N ended it
  124                        a time limit ended it (--timeout, --cpu-time)
  137                        another limit ended it
  125                        ringfence refused or failed; a line on stderr says why
  126                        the command was found and can't be executed
  127                        the command was not found
  130                        interrupted by Ctrl-C; the sandbox is gone
  141                        nobody read our stdout to its end
""",
)


def main(argv: Sequence[str]) -> int:
    """Runs `ringfence run` and returns its exit status. Raises what `api.run` raises, and OSError for files."""
    # This process ends before a collection of its garbage would pay.
    gc.disable()
    given = OPTIONS.parse(argv)
    if not given.operands:
        raise OPTIONS.error("a command is missing; see ringfence run --help")
    # Everything that can be wrong is found before stdin is read, which may take as long as its writer likes.
    spec = _spec(given)
    folder = _folder(given)
    check_spec(spec)
    if not given["no-stdin"]:
        spec = spec.replace(input=_stdin())
    try:
        result = run_spec(spec)
    except StartError as error:
        status = _start_status(error)
        if status == REFUSED:
            raise
        output.complain(f"{given.operands[0]}: {error.strerror}")
        return status
    _print(given, result)
    if folder is not None and result.files:
        # Only now: most runs collect nothing.
        from ringfence.cli import _collected

        _collected.save(result.files, folder, replace=given["force"])
    return result.shell_status


def _spec(given: Parsed) -> Spec:
    return Spec.make(
        [os.fsencode(word) for word in given.operands],
        isolation=given["isolation"] or "container",
        env=dict(given["env"]),
        files=_files(given["file"]),
        collect=given["collect"],
        mounts=given["mount"],
        image=given["image"],
        user=given["user"],
        hostname=given["hostname"],
        network=given["network"],
        limits=Limits(
            memory=given["memory"],
            cpus=given["cpus"],
            pids=given["pids"],
            wall_time=given["timeout"],
            cpu_time=given["cpu-time"],
            output=given["output-limit"],
            disk=given["disk"],
        ),
    )


def _files(named: Sequence[tuple[str, str]]) -> dict[str, File]:
    found: dict[str, File] = {}
    for name, path in named:
        if name in found:
            raise OPTIONS.error(f"--file: {name!r} is given twice")
        found[name] = read_file(OPTIONS, "--file", path)
    return found


def _folder(given: Parsed) -> str | None:
    """Where collected files go, or None where they go nowhere."""
    folder: str | None = given["collect-to"]
    if not given["collect"]:
        if folder is not None or given["force"]:
            raise OPTIONS.error("--collect-to and --force need --collect")
        return None
    if folder is None:
        return None if given["json"] else "."
    if not folder or (os.path.lexists(folder) and not os.path.isdir(folder)):
        raise OPTIONS.error(f"--collect-to: {folder!r} is no directory")
    return folder


def _stdin() -> bytes | None:
    """All of stdin, or None where nobody could have meant it: a terminal."""
    if os.isatty(output.STDIN):
        return None
    chunks: list[bytes] = []
    while True:
        try:
            chunk = os.read(output.STDIN, _READ_BYTES)
        except BlockingIOError:
            # The description is somebody else's too, who made it non-blocking.
            import select

            select.select([output.STDIN], [], [])
            continue
        except OSError as error:
            raise SpecError(f"stdin can't be read: {error.strerror} (--no-stdin leaves it alone)") from None
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def _start_status(error: StartError) -> int:
    """As env(1) has it. An error before execve(2) is ringfence's own."""
    if error.call != "execve":
        return REFUSED
    return _NOT_FOUND if error.errno == errno.ENOENT else _NOT_EXECUTABLE


def _print(given: Parsed, result: Result) -> None:
    if given["json"]:
        output.write_json(result.to_json())
    else:
        output.write(output.STDOUT, result.stdout)
        _pass_on_stderr(result.stderr)
    if result.termination_reason not in (TerminationReason.EXITED, TerminationReason.SIGNALED):
        output.complain(result.describe())
    if given["applied"]:
        output.write_line(output.STDERR, applied_table(result.applied))


def _pass_on_stderr(data: bytes) -> None:
    try:
        output.write(output.STDERR, data)
    except OSError as error:
        if error.errno != errno.EBADF:  # closed by a caller who doesn't want it: no reason to hide the exit status
            raise


def applied_table(applied: Sequence[Applied]) -> str:
    """Rule by rule what was asked for, what was in force, and by what, as lines."""
    rows = [("rule", "asked for", "in force", "by")]
    for one in applied:
        unit = _UNITS.get(one.rule, "")
        rows.append((one.rule, _cell(one.requested, unit), _cell(one.effective, unit), one.mechanism))
    return output.columns(rows)


def _cell(value: object, unit: str = "") -> str:
    if value is None:
        return "-"
    if unit == "bytes" and isinstance(value, int):
        return output.size(value)
    if unit == "ns" and isinstance(value, int):
        return output.duration(value)
    if isinstance(value, dict):
        return " ".join(f"{name}={_cell(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_cell(item) for item in value)
    return value if isinstance(value, str) else str(value)
