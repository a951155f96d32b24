"""`ringfence run`: one command behind a boundary, with the streams and the exit status that it would have without."""

from __future__ import annotations

import errno
import gc
import os

from ringfence.api import check_spec, level, run_spec, settle
from ringfence.cli import output
from ringfence.cli._options import Option, Options, name_and_path
from ringfence.cli.main import REFUSED
from ringfence.errors import SpecError, StartError
from ringfence.result import TerminationReason
from ringfence.spec import (
    AUTO,
    ISOLATIONS,
    NAMESPACES,
    Device,
    File,
    Kernel,
    Limits,
    Mount,
    Network,
    Seccomp,
    Spec,
    Tmpfs,
)
from ringfence.wire.launcher import launcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.cli._options import Parsed
    from ringfence.result import Applied, Denial, Result

__all__ = ["OPTIONS", "main", "spec_of", "tell_progress"]

_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
_READ_BYTES = 1 << 20
# What the numbers of `Applied` are in, where that isn't plain from the rule.
_UNITS = dict.fromkeys(("memory", "swap", "output", "disk", "io_read", "io_write"), "bytes")
_UNITS |= {"wall_time": "ns", "cpu_time": "ns"}


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
    target, colon, modes = rest.partition(":")
    given = modes.split(",") if colon else []
    if not target or not {"ro", "rw", "secret"}.issuperset(given) or {"ro", "rw"} <= set(given):
        raise ValueError(f"must be SOURCE:TARGET, SOURCE:TARGET:ro or SOURCE:TARGET:rw, not {word!r}")
    return Mount(source, target, writable="rw" in given, secret="secret" in given)


def _tmpfs(word: str) -> Tmpfs:
    target, colon, size = word.partition(":")
    return Tmpfs(target, size) if colon else Tmpfs(target)


def _device(word: str) -> Device:
    source, colon, rest = word.partition(":")
    target, _, access = rest.partition(":")
    return Device(source, target if colon and target else None, access or "rw")


def _namespace(word: str) -> tuple[str, str | int]:
    name, equals, value = word.partition("=")
    if not equals or name not in (*NAMESPACES, "monotonic_offset", "boottime_offset"):
        raise ValueError(f"must be NAME=own, NAME=host, NAME=PATH or NAME=PID, not {word!r}")
    return name, int(value) if value.isdecimal() and name in NAMESPACES else value


def _required(word: str) -> tuple[str, str]:
    name, equals, verdict = word.partition("=")
    if not equals or verdict not in ("own", "restricted"):
        raise ValueError(f"must be RESOURCE=own or RESOURCE=restricted, not {word!r}")
    return name, verdict


def _published(word: str) -> tuple[str, str]:
    outer, colon, inner = word.partition(":")
    if not colon:
        raise ValueError(f"must be PORT:PORT, the host's first, not {word!r}")
    return outer, inner


OPTIONS = Options(
    "ringfence run",
    "[--] COMMAND [ARGUMENT]...",
    "Runs a command behind a boundary and ends as it does. What is asked for and can't be enforced here is an error,"
    " and then nothing is started.",
    [
        Option(
            "isolation",
            "the boundary (container); auto: the cheapest that can do all that is asked for",
            short="i",
            choices=(*ISOLATIONS, AUTO),
        ),
        Option(
            "require",
            "what it has to isolate here, own or restricted: kernel=own; see ringfence choose --help",
            metavar="RESOURCE=own|restricted",
            repeatable=True,
            convert=_required,
        ),
        Option("memory", 'how much memory it may use, swap included: "256M"', metavar="SIZE"),
        Option("swap", "how much more it may hold in swap, on top of --memory (0)", metavar="SIZE"),
        Option("cpus", "how many CPUs it may use: 0.5", metavar="NUMBER"),
        Option("cpu-weight", "its share of busy CPUs, 1 to 10000, where others have 100", metavar="NUMBER"),
        Option("cpuset", 'the CPUs that it may run on: "0-1,3"', metavar="CPUS"),
        Option("pids", "how many processes and threads it may have at once", metavar="NUMBER"),
        Option("timeout", 'the wall_time limit, from its start: "10s", "1.5m"', metavar="TIME"),
        Option("cpu-time", "how much CPU time all its processes may use", metavar="TIME"),
        Option("output-limit", "how much of each of stdout and stderr is kept; more ends it (64M)", metavar="SIZE"),
        Option("disk", "how much it may write", metavar="SIZE"),
        Option("io-read", "bytes a second from the work directory's disk", metavar="SIZE"),
        Option("io-write", "bytes a second to it", metavar="SIZE"),
        Option("io-read-ops", "operations a second, likewise", metavar="NUMBER"),
        Option("io-write-ops", "operations a second, likewise", metavar="NUMBER"),
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
            "show a file or folder of the host, read-only unless it says rw; a place of secrets only with secret",
            metavar="SOURCE:TARGET[:rw][,secret]",
            repeatable=True,
            convert=_mount,
        ),
        Option("tmpfs", "an empty file system in memory (64M)", metavar="DIR[:SIZE]", repeatable=True, convert=_tmpfs),
        Option(
            "device",
            "show a device node of the host",
            metavar="PATH[:PATH][:r|w|rw]",
            repeatable=True,
            convert=_device,
        ),
        Option("image", '"host", or a root file system: a folder, of a vm also a disk (host)', metavar="PATH"),
        Option("kernel", "the kernel of a vm, in place of the prepared one: an image or a .deb", metavar="FILE"),
        Option("kernel-modules", "its /lib/modules/RELEASE (looked for beside it, and here)", metavar="DIR"),
        Option("append", "more of that kernel's command line", metavar="WORDS"),
        Option("overlay", "let the root be written to, in a layer that is gone with the sandbox"),
        Option("readable", "of the files, only this path, and below (process)", metavar="PATH", repeatable=True),
        Option("writable", "also this path, and below (process)", metavar="PATH", repeatable=True),
        Option("user", 'a uid, "uid:gid" or a name inside (one without privileges)', short="u", metavar="USER"),
        Option("hostname", "the host name inside", metavar="NAME"),
        Option("network", "which network it has (none)", choices=("none", "host", "nat")),
        Option(
            "allow",
            "of the network, only this destination: a name, *.name, address or network, or *; and a port or *",
            metavar="HOST:PORT",
            repeatable=True,
        ),
        Option(
            "publish",
            "a port of the host's loopback that leads to one inside",
            metavar="PORT:PORT",
            repeatable=True,
            convert=_published,
        ),
        Option("bandwidth", "bytes a second each way", metavar="SIZE"),
        Option(
            "namespace",
            "share or join a namespace: net=host, ipc=1234, uts=/proc/1234/ns/uts; or monotonic_offset=1h",
            metavar="NAME=WHICH",
            repeatable=True,
            convert=_namespace,
        ),
        Option("capability", "keep this one, such as net_raw (none)", metavar="NAME", repeatable=True),
        Option("seccomp", '"default", "unconfined" or an OCI profile in JSON (default)', metavar="PROFILE"),
        Option("seccomp-mode", "what becomes of other calls (enforce)", choices=("enforce", "report", "audit")),
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
    spec = spec_of(given)
    folder = _folder(given)
    launcher()  # it gets itself ready beside the look at this host, and the imports, that the check takes
    if not spec.settled:
        tell_progress()
        spec = settle(spec)
    level(spec.isolation).begin(spec)
    if spec.isolation == "vm" and spec.choice is None:
        from ringfence.levels.vm import start

        start.progress = output.progress()
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


def tell_progress() -> None:
    """Has a terminal told what choosing measures, and what it makes on the way."""
    from ringfence.comparison.choice import measure
    from ringfence.levels.vm import start

    measure.progress = start.progress = output.progress()


def spec_of(given: Parsed, *, isolation: str = "container") -> Spec:
    """The spec that a command line says. isolation: the level where it says none. Raises SpecError."""
    required: dict[str, str] = {}
    for name, word in given["require"]:
        if required.setdefault(name, word) != word:
            raise OPTIONS.error(f"--require: {name!r} is given twice")
    return Spec.make(
        [os.fsencode(word) for word in given.operands] or ["-"],
        isolation=given["isolation"] or isolation,
        require=required,
        env=dict(given["env"]),
        files=_files(given["file"]),
        collect=given["collect"],
        mounts=[*given["mount"], *given["tmpfs"]],
        image=given["image"],
        overlay=given["overlay"],
        user=given["user"],
        hostname=given["hostname"],
        network=_network(given),
        namespaces=dict(given["namespace"]) or None,
        capabilities=given["capability"],
        seccomp=_seccomp(given),
        devices=given["device"],
        kernel=_kernel(given),
        readable=given["readable"] or None,
        writable=given["writable"],
        limits=Limits(
            memory=given["memory"],
            swap=given["swap"],
            cpus=given["cpus"],
            cpu_weight=given["cpu-weight"],
            cpuset=given["cpuset"],
            pids=given["pids"],
            wall_time=given["timeout"],
            cpu_time=given["cpu-time"],
            output=given["output-limit"],
            disk=given["disk"],
            io_read=given["io-read"],
            io_write=given["io-write"],
            io_read_ops=given["io-read-ops"],
            io_write_ops=given["io-write-ops"],
        ),
    )


def _network(given: Parsed) -> Network | str | None:
    mode: str | None = given["network"]
    if not (given["allow"] or given["publish"] or given["bandwidth"]):
        return mode
    return Network(
        mode or "nat", allow=given["allow"] or None, publish=dict(given["publish"]), bandwidth=given["bandwidth"]
    )


def _kernel(given: Parsed) -> Kernel | None:
    if given["kernel"] is None:
        if given["kernel-modules"] is not None or given["append"] is not None:
            raise OPTIONS.error("--kernel-modules and --append need --kernel")
        return None
    return Kernel(given["kernel"], given["kernel-modules"], given["append"] or "")


def _seccomp(given: Parsed) -> Seccomp | None:
    profile, mode = given["seccomp"], given["seccomp-mode"]
    return None if profile is None and mode is None else Seccomp(profile or "default", mode=mode or "enforce")


def _files(named: Sequence[tuple[str, str]]) -> dict[str, File]:
    if not named:
        return {}
    from ringfence.cli._inputs import read_file

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
        if result.choice is not None:
            output.write_line(output.STDERR, f"chosen: {result.choice.why}")
        output.write_line(output.STDERR, applied_table(result.applied))
    if result.denials is not None and not given["json"]:
        output.write_line(output.STDERR, denials_table(result.denials))


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


# Of a workload that tries everything.
_MOST_DENIALS = 30


def denials_table(denials: Sequence[Denial]) -> str:
    """The most frequent system calls that the filter denied, or let through to audit them, as lines."""
    if not denials:
        return "ringfence: the filter denied nothing"
    rows = [("denied", "times", "answer", "first arguments")]
    for one in denials[:_MOST_DENIALS]:
        arguments = " ".join(f"{argument:#x}" for argument in one.arguments)
        rows.append((one.call, str(one.count), one.errno or "let through", arguments))
    if len(denials) > _MOST_DENIALS:
        rows.append((f"and {len(denials) - _MOST_DENIALS} more", "", "", ""))
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
