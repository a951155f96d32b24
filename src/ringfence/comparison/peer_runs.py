"""`--peers`: the compared command in the sandboxes of other tools, and which of them there are here."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time

from ringfence.comparison.cost import Run
from ringfence.comparison.peers import PEERS, Tool
from ringfence.errors import Unavailable
from ringfence.levels.workdir import WorkDirectory
from ringfence.result import TerminationReason

TYPE_CHECKING = False
if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterable

    from ringfence.spec import Spec

__all__ = ["open_peers", "peer_run"]

_COLLECT_BYTES = 1 << 30


def open_peers(
    stack: contextlib.ExitStack, tell: Callable[[str], None], names: Iterable[str] = tuple(PEERS)
) -> tuple[dict[str, Tool], dict[str, tuple[str, str]]]:
    """Each that works here; of the others why not, and what would help. They are closed with the stack."""
    found: dict[str, Tool] = {}
    refused: dict[str, tuple[str, str]] = {}
    for name in names:
        tell(f"trying {name}")
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringfence-peer-", ignore_cleanup_errors=True))
        os.chmod(folder, 0o711)  # ids that are mapped elsewhere pass through
        try:
            found[name] = stack.enter_context(Tool(name, folder))
        except Unavailable as error:
            refused[name] = error.reason, error.help
    return found, refused


def peer_run(spec: Spec, tool: Tool) -> Run:
    """A run of a spec's command by another tool, start to end: what is in between it doesn't tell. No limit holds but
    the wall time. A command that the tool could not start is an ending like any other: its exit status may be the
    command's own, and nothing tells the two apart.
    """
    tool.renew()
    os.rmdir(tool.work)
    parent_fd = os.open(tool.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        work = WorkDirectory(parent_fd, os.fsencode(os.path.basename(tool.work)), tool.owner)
        try:
            work.put(spec.files)
            with tool.prepared(spec.argv, dict(spec.env)) as (words, fds):
                called_ns = time.monotonic_ns()
                code, stdout, stderr = _run(spec, tool, words, fds)
                total_ns = time.monotonic_ns() - called_ns
            files = work.collect(spec.collect, _COLLECT_BYTES) if spec.collect else {}
        finally:
            work.remove()
            os.mkdir(tool.work)
            tool.renew()
    finally:
        os.close(parent_fd)
    return _as_run(code, stdout, stderr, files, total_ns, tool.version)


def _run(spec: Spec, tool: Tool, words: list[str | bytes], fds: tuple[int, ...]) -> tuple[int | None, bytes, bytes]:
    """(exit status, or None where its time ran out; stdout; stderr)."""
    limit = spec.limits.wall_time_ns
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=fds
    ) as process:
        try:
            stdout, stderr = process.communicate(spec.input or b"", timeout=None if limit is None else limit / 1e9)
            return process.returncode, stdout, stderr
        except subprocess.TimeoutExpired:
            tool.end(words)
            process.kill()
            stdout, stderr = process.communicate()
            return None, stdout, stderr
        except BaseException:
            tool.end(words)
            process.kill()
            raise


def _as_run(code: int | None, stdout: bytes, stderr: bytes, files: dict[str, bytes], total_ns: int, source: str) -> Run:
    # Each of them tells of a signal N as a shell does, by 128+N.
    signal = code - 128 if code is not None and 128 < code <= 128 + 64 else None
    reason = TerminationReason.WALL_TIME if code is None else TerminationReason.EXITED
    return Run(
        exit_code=code if signal is None else None,
        signal=signal,
        termination_reason=str(reason if signal is None else TerminationReason.SIGNALED),
        stdout=stdout,
        stderr=stderr,
        files=files,
        startup_ns=None,
        wall_ns=None,
        teardown_ns=None,
        total_ns=total_ns,
        cpu_ns=None,
        memory_peak_bytes=None,
        source=source,
    )
