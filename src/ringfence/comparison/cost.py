"""What runs cost, and whether they did the same: the command bare, and the command at each level."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import tempfile
import time

from ringfence._value import Value
from ringfence.api import run_spec
from ringfence.comparison.statistics import summarize
from ringfence.errors import StartError
from ringfence.levels.state import state
from ringfence.levels.workdir import WorkDirectory
from ringfence.linux.cgroups import NO_LIMITS
from ringfence.result import TerminationReason
from ringfence.spec import DEFAULT_ENV

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from ringfence.comparison.statistics import Summary
    from ringfence.spec import Spec

__all__ = ["MEASURES", "Run", "bare_memory", "bare_run", "differences", "differing", "level_run", "summaries"]

# In the order of the table. Times in nanoseconds, memory in bytes.
MEASURES = ("startup_ns", "wall_ns", "teardown_ns", "total_ns", "cpu_ns", "memory_peak_bytes")
_COLLECT_BYTES = 1 << 30
_SHOWN_LINE = 60


class Run(Value):
    """One run: how it ended, what it left, what it cost; as in `Result` and `Usage`. total_ns: the whole call."""

    __slots__ = (
        "cpu_ns",
        "exit_code",
        "files",
        "memory_peak_bytes",
        "signal",
        "source",
        "startup_ns",
        "stderr",
        "stdout",
        "teardown_ns",
        "termination_reason",
        "total_ns",
        "wall_ns",
    )
    exit_code: int | None
    signal: int | None
    termination_reason: str
    stdout: bytes
    stderr: bytes
    files: dict[str, bytes]
    startup_ns: int | None
    wall_ns: int | None
    teardown_ns: int | None
    total_ns: int
    cpu_ns: int | None
    memory_peak_bytes: int | None
    source: str

    def __init__(
        self,
        *,
        exit_code: int | None,
        signal: int | None,
        termination_reason: str,
        stdout: bytes,
        stderr: bytes,
        files: Mapping[str, bytes],
        startup_ns: int | None,
        wall_ns: int | None,
        teardown_ns: int | None,
        total_ns: int,
        cpu_ns: int | None,
        memory_peak_bytes: int | None,
        source: str,
    ) -> None:
        self._set(
            exit_code=exit_code,
            signal=signal,
            termination_reason=termination_reason,
            stdout=stdout,
            stderr=stderr,
            files=dict(files),
            startup_ns=startup_ns,
            wall_ns=wall_ns,
            teardown_ns=teardown_ns,
            total_ns=total_ns,
            cpu_ns=cpu_ns,
            memory_peak_bytes=memory_peak_bytes,
            source=source,
        )

    @property
    def ending(self) -> str:
        """ "exit 0", "signal 11", "wall_time"."""
        if self.termination_reason == TerminationReason.EXITED:
            return f"exit {self.exit_code}"
        if self.termination_reason == TerminationReason.SIGNALED:
            return f"signal {self.signal}"
        return self.termination_reason


# ---- running ----


def level_run(spec: Spec) -> Run:
    """At the spec's level. Raises what `run` raises."""
    called_ns = time.monotonic_ns()
    done = run_spec(spec)
    total_ns = time.monotonic_ns() - called_ns
    used = done.usage
    return Run(
        exit_code=done.exit_code,
        signal=done.signal,
        termination_reason=str(done.termination_reason),
        stdout=done.stdout,
        stderr=done.stderr,
        files=done.files,
        startup_ns=used.startup_ns,
        wall_ns=used.wall_ns,
        teardown_ns=used.teardown_ns,
        total_ns=total_ns,
        cpu_ns=used.cpu_ns,
        memory_peak_bytes=used.memory_peak_bytes,
        source=used.source,
    )


def bare_run(spec: Spec) -> Run:
    """As `subprocess.run` would, without any boundary or limit but the wall time, in a directory of its own with the
    spec's files, and with the environment that a workload gets.

    Started is when subprocess has seen execve(2) succeed. Raises StartError where it doesn't.
    """
    with _work_directory(spec) as (work, home):
        called_ns = time.monotonic_ns()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = _popen(spec, spec.argv, home)
        started_ns = time.monotonic_ns()
        stdout, stderr, in_time = _communicate(process, spec)
        ended_ns = time.monotonic_ns()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        files = work.collect(spec.collect, _COLLECT_BYTES) if spec.collect else {}
    code = process.returncode
    reason = TerminationReason.EXITED if code >= 0 else TerminationReason.SIGNALED
    return Run(
        exit_code=code if code >= 0 and in_time else None,
        signal=-code if code < 0 else None,
        termination_reason=str(reason if in_time else TerminationReason.WALL_TIME),
        stdout=stdout,
        stderr=stderr,
        files=files,
        startup_ns=started_ns - called_ns,
        wall_ns=ended_ns - started_ns,
        teardown_ns=None,
        total_ns=ended_ns - called_ns,
        cpu_ns=round(1e9 * (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)),
        # Not ru_maxrss: it counts what this process held when it forked (the kernel's exec_mmap). See bare_memory.
        memory_peak_bytes=None,
        source="getrusage",
    )


def bare_memory(spec: Spec) -> tuple[int | None, str]:
    """(peak memory in bytes, who measured it) of one more bare run, by the instrument that measures the levels: a
    cgroup without limits, which a shell joins before it becomes the command. None where no cgroup counts memory here.
    """
    cgroup = state().cgroup(NO_LIMITS)
    if cgroup is None:
        return None, ""
    try:
        fds = cgroup.join_fds()
        joins = "".join(f"echo 0 >/proc/self/fd/{fd} && " for fd in fds)
        script = (b"/bin/sh", b"-c", os.fsencode(joins + 'exec "$@"'), b"sh", *spec.argv)
        with _work_directory(spec) as (_, home):
            _communicate(_popen(spec, script, home, fds), spec)
        used = cgroup.usage()
        return used.memory_peak_bytes, used.source
    finally:
        if not cgroup.remove():
            cgroup.kill()
            cgroup.remove()


@contextlib.contextmanager
def _work_directory(spec: Spec) -> Iterator[tuple[WorkDirectory, bytes]]:
    """A directory with the spec's files, and its path; removed with all that is in it."""
    with tempfile.TemporaryDirectory(prefix="ringfence-bare-") as parent:
        parent_fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            work = WorkDirectory(parent_fd, b"work", None)
            try:
                work.put(spec.files)
                yield work, os.path.join(os.fsencode(parent), b"work")
            finally:
                work.remove()
        finally:
            os.close(parent_fd)


def _communicate(process: subprocess.Popen[bytes], spec: Spec) -> tuple[bytes, bytes, bool]:
    """stdout, stderr, and whether it ended within the spec's wall time; else it and its session are killed."""
    limit = spec.limits.wall_time_ns
    try:
        return *process.communicate(spec.input, timeout=None if limit is None else limit / 1e9), True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return *process.communicate(), False
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _popen(spec: Spec, argv: Sequence[bytes], home: bytes, fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            argv,
            cwd=home,
            env={**dict(DEFAULT_ENV), b"HOME": home, **dict(spec.env)},
            stdin=subprocess.DEVNULL if spec.input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=fds,
            start_new_session=True,
        )
    except OSError as error:
        raise StartError("exec", "execve", error.errno or 0, os.fsdecode(argv[0])) from error


# ---- judging ----


def summaries(runs: Sequence[Run]) -> dict[str, Summary | None]:
    """By measure; None where no run knows it."""
    return {measure: summarize([getattr(one, measure) for one in runs]) for measure in MEASURES}


def differences(one: Run, other: Run) -> tuple[str, ...]:
    """How what `other` left differs from `one`: a sentence each, none where it is the same."""
    found = []
    if one.ending != other.ending:
        found.append(f"it ended by {other.ending}, not {one.ending}")
    for name in ("stdout", "stderr"):
        found += _stream_difference(name, getattr(one, name), getattr(other, name))
    for name in sorted(one.files.keys() | other.files.keys()):
        if name not in other.files:
            found.append(f"the file {name} is missing")
        elif name not in one.files:
            found.append(f"there is a file {name} more")
        else:
            found += _stream_difference(f"the file {name}", one.files[name], other.files[name])
    return tuple(found)


_BEGINNINGS = (
    ("ending", ("it ended by ",)),
    ("stdout", ("stdout differs ",)),
    ("stderr", ("stderr differs ",)),
    ("files", ("the file ", "there is a file ")),
)


def differing(sentences: Sequence[str]) -> dict[str, bool]:
    """Which of ending, stdout, stderr and files those sentences of `differences` tell of."""
    return {name: any(one.startswith(begin) for one in sentences) for name, begin in _BEGINNINGS}


def _stream_difference(name: str, one: bytes, other: bytes) -> list[str]:
    if one == other:
        return []
    ours, theirs = one.split(b"\n"), other.split(b"\n")
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    shown = [_line(lines, at) for lines in (theirs, ours)]
    return [f"{name} differs in line {at + 1}: {shown[0]}, not {shown[1]} ({len(other)} bytes, not {len(one)})"]


def _line(lines: Sequence[bytes], at: int) -> str:
    if at >= len(lines):
        return "nothing"
    text = repr(lines[at].decode("utf-8", "backslashreplace"))
    return text if len(text) <= _SHOWN_LINE else text[: _SHOWN_LINE - 3] + "..."


def run_json(run: Run) -> dict[str, Any]:
    """For json.dumps: its ending and its figures; of its output only the sizes."""
    return {
        "ending": run.ending,
        "stdout_bytes": len(run.stdout),
        "stderr_bytes": len(run.stderr),
        "files": {name: len(data) for name, data in run.files.items()},
        **{measure: getattr(run, measure) for measure in MEASURES},
        "source": run.source,
    }
