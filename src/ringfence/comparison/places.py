"""Where the cost suite measures: bare, at a level, or in another tool's sandbox.

Each can start a command once, from the call to its end, as a user would; and each takes calls of the probe, which times
itself, so that there the start doesn't matter: at a level in a sandbox that stays, elsewhere in a new one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time

from ringfence._value import Closing
from ringfence.api import check_spec, level, run
from ringfence.comparison.document import BARE
from ringfence.comparison.taken import run_in
from ringfence.errors import Unavailable
from ringfence.levels.host import host
from ringfence.sandbox import Sandbox
from ringfence.spec import DEFAULT_ENV, Spec
from ringfence.wire.launcher import probe_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ringfence.comparison.peers import Tool
    from ringfence.spec import Limits

__all__ = ["PROBE", "Answer", "Bare", "Level", "Other", "Place"]

PROBE = "./ringfence-probe"
_CALL_S = 120
_SHOWN = 100


class Answer:
    """What a call printed, and CLOCK_MONOTONIC before and after it, ns."""

    __slots__ = ("after_ns", "before_ns", "stdout")

    def __init__(self, stdout: bytes, before_ns: int, after_ns: int) -> None:
        self.stdout = stdout
        self.before_ns = before_ns
        self.after_ns = after_ns


class Place(Closing):
    """name: as a column has it. Every method raises OSError or RingfenceError where that can't be done here."""

    name: str
    # What `call` measures in, where that isn't what a sandbox has by default.
    network_source = ""
    # Whether all its calls see one clock. A kernel that each call starts anew has a clock that does.
    one_clock = True

    def once(self, argv: Sequence[str]) -> None:
        """A start, from the call to the end of everything. The command must exit with 0."""
        raise NotImplementedError

    def first_output(self, argv: Sequence[str]) -> tuple[int, int | None]:
        """ns from the call until the first byte is here; from the command's end until all is gone, or None."""
        raise NotImplementedError

    def call(self, argv: Sequence[str], *, network: bool = False) -> Answer:
        """A command with the probe and a directory of its own that stays. network: it needs sockets."""
        raise NotImplementedError

    def close(self) -> None:
        return


def _said(argv: Sequence[str | bytes], how: str, stderr: bytes) -> str:
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    return f"{os.path.basename(os.fsdecode(argv[0]))} ended with {how}" + (f": {lines[-1][:_SHOWN]}" if lines else "")


class Bare(Place):
    """No boundary: a child of this process."""

    name = BARE

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ringfence-bare-")
        self.home = self._folder.name
        shutil.copyfile(probe_path(), os.path.join(self.home, PROBE))
        os.chmod(os.path.join(self.home, PROBE), 0o755)
        self._env = {**dict(DEFAULT_ENV), b"HOME": os.fsencode(self.home)}

    def once(self, argv: Sequence[str]) -> None:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=self._env)
        if done.returncode:
            raise OSError(_said(argv, str(done.returncode), done.stderr))

    def first_output(self, argv: Sequence[str]) -> tuple[int, int | None]:
        called_ns = time.monotonic_ns()
        return _until_output(argv, called_ns, env=self._env)

    def call(self, argv: Sequence[str], *, network: bool = False) -> Answer:
        before_ns = time.monotonic_ns()
        done = _finished(argv, cwd=self.home, env=self._env)
        return Answer(done, before_ns, time.monotonic_ns())

    def close(self) -> None:
        self._folder.cleanup()


def _finished(words: Sequence[str | bytes], name: str = "", **options: Any) -> bytes:
    try:
        done = subprocess.run(words, input=b"", capture_output=True, timeout=_CALL_S, check=False, **options)
    except subprocess.TimeoutExpired:
        raise OSError(f"{os.path.basename(os.fsdecode(words[0]))} did not end in {_CALL_S} s") from None
    if done.returncode:
        raise OSError(_said([name or words[0]], str(done.returncode), done.stderr))
    return bytes(done.stdout)


def _until_output(words: Sequence[str | bytes], called_ns: int, name: str = "", **options: Any) -> tuple[int, None]:
    # Pipes for all three: the OCI runtimes give the caller's streams to the ids inside, /dev/null itself too.
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    ) as child:
        assert child.stdout is not None
        came = os.read(child.stdout.fileno(), 1 << 16)
        took = time.monotonic_ns() - called_ns
        _, stderr = child.communicate(timeout=_CALL_S)
    if not came or child.returncode:
        raise OSError(_said([name or words[0]], str(child.returncode), stderr))
    return took, None


class Level(Place):
    """A level of ours. limits: those of the sandbox that takes calls."""

    def __init__(self, isolation: str, limits: Limits | None = None) -> None:
        self.name = isolation
        self._limits = limits
        self._open: dict[bool, Sandbox] = {}
        missing = level(isolation).unavailable(host())
        if missing is not None:
            raise Unavailable(isolation, *missing)
        if isolation == "process":
            self.network_source = "network=host"  # without it a process may make no sockets

    def once(self, argv: Sequence[str]) -> None:
        run(argv, isolation=self.name, check=True)

    def first_output(self, argv: Sequence[str]) -> tuple[int, int | None]:
        called_ns = time.monotonic_ns()
        spec = Spec.make(argv, isolation=self.name)
        boundary, machine = check_spec(spec)
        with boundary.open(spec, machine) as sandbox:
            outcome = run_in(sandbox, spec)
        gone_ns = time.monotonic_ns()
        if outcome.exited is None or outcome.exited.exit_code != 0 or not outcome.first_output_ns:
            raise OSError(_said(argv, f"{outcome.exited}", outcome.stderr))
        return outcome.first_output_ns - called_ns, gone_ns - outcome.ended_ns

    def call(self, argv: Sequence[str], *, network: bool = False) -> Answer:
        sandbox = self._sandbox(network and self.name == "process")
        before_ns = time.monotonic_ns()
        done = sandbox.run(argv, wall_time=_CALL_S)
        after_ns = time.monotonic_ns()
        if not done.ok:
            raise OSError(
                _said(argv, str(done.exit_code if done.exit_code is not None else done.termination_reason), done.stderr)
            )
        return Answer(done.stdout, before_ns, after_ns)

    def _sandbox(self, on_the_host: bool) -> Sandbox:
        found = self._open.get(on_the_host)
        if found is not None and not found.closed:
            return found
        more: dict[str, Any] = {"network": "host"} if on_the_host else {}
        found = self._open[on_the_host] = Sandbox(isolation=self.name, limits=self._limits, **more)
        with open(probe_path(), "rb") as file:
            found.write_file(PROBE, file.read(), 0o755)
        return found

    def close(self) -> None:
        for one in self._open.values():
            one.close()
        self._open = {}


class Other(Place):
    """Another tool's sandbox, a new one for each call."""

    def __init__(self, tool: Tool) -> None:
        self.name = tool.name
        self._tool = tool
        self.one_clock = tool.name != "runsc"
        program = os.path.join(tool.work, PROBE)
        shutil.copyfile(probe_path(), program)
        os.chmod(program, 0o755)
        if tool.owner is not None:
            os.chown(program, *tool.owner)

    def once(self, argv: Sequence[str]) -> None:
        self._tool.run(argv)

    def first_output(self, argv: Sequence[str]) -> tuple[int, int | None]:
        with self._tool.prepared(argv) as (words, fds):
            return _until_output(words, time.monotonic_ns(), self.name, pass_fds=fds)

    def call(self, argv: Sequence[str], *, network: bool = False) -> Answer:
        with self._tool.prepared(argv) as (words, fds):
            before_ns = time.monotonic_ns()
            done = _finished(words, self.name, pass_fds=fds)
            return Answer(done, before_ns, time.monotonic_ns())
