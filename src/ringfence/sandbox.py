"""`Sandbox`: a sandbox that stays, and takes one command after the other."""

from __future__ import annotations

import os
import time
from _thread import allocate_lock

from ringfence._value import Closing
from ringfence.api import check_spec, execute, put, settle
from ringfence.errors import RingfenceError, SpecError, StartError, WorkloadFailed
from ringfence.spec import Limits, Spec, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Unpack

    from ringfence.comparison.choice import Choice
    from ringfence.levels.base import Sandbox as OpenSandbox
    from ringfence.result import Applied, Result, Usage
    from ringfence.spec.options import CommandOptions, Path, SandboxOptions

__all__ = ["Sandbox", "command_spec", "sandbox_spec"]

# What read_file brings at most, bytes.
_FILE_BYTES = 1 << 30
# A spec has a command; that of the sandbox itself is never run.
_NO_COMMAND = ("-",)


def sandbox_spec(options: SandboxOptions) -> Spec:
    """The spec of a sandbox, without a command of its own. Raises SpecError."""
    return Spec.make(_NO_COMMAND, **options)


def command_spec(own: Spec, argv: Sequence[Path], options: CommandOptions) -> tuple[Spec, dict[str, Any]]:
    """The spec of a command in a sandbox of the spec `own`, and the arguments of `execute` that are its own too.

    Raises SpecError, and TypeError for an argument of another name.
    """
    given: dict[str, Any] = dict(options)
    cwd, wall_time, output = (given.pop(name, None) for name in ("cwd", "wall_time", "output"))
    for name in given:
        if name not in ("input", "env", "files", "collect", "check", "text"):
            raise TypeError(f"run() got an unexpected keyword argument {name!r}")
    command = Spec.make(argv, **given)
    limits = own.limits
    if wall_time is not None:
        limits = limits.replace(wall_time=wall_time)
    if output is not None:
        limits = limits.replace(output=output)
    spec = own.replace(
        argv=command.argv,
        input=command.input,
        env=tuple({**dict(own.env), **dict(command.env)}.items()),
        collect=command.collect,
        check=command.check,
        text=command.text,
        limits=limits,
        asked=own.asked | limits.asked,
    )
    return spec, {"cwd": None if cwd is None else parse.path_bytes(cwd, "cwd"), "files": command.files}


class Sandbox(Closing):
    """A sandbox that stays: its file system, its background processes and its limits live on from one command to the
    next. A context manager; `close` leaves nothing of it.

        with rf.Sandbox(isolation="container", limits=rf.Limits(memory="256M")) as sandbox:
            sandbox.write_file("job.py", "print(6*7)")
            result = sandbox.run(["python3", "job.py"])

    It takes the arguments of `rf.run` that aren't one command's own (see there). limits.memory, cpus, pids and their
    like hold for all that runs in it together; limits.cpu_time is what all its commands may use in all;
    limits.wall_time and output hold for each command. A command that reaches a limit ends all that runs in the sandbox,
    which itself stays.

    One command at a time: another thread's call waits. Raises what `rf.run` raises; once it is closed, or has ended
    (its init was killed, its machine halted), every call is a RingfenceError.
    """

    def __init__(self, **options: Unpack[SandboxOptions]) -> None:
        self._spec = settle(sandbox_spec(options))
        self._lock = allocate_lock()
        self._pid = os.getpid()
        boundary, machine = check_spec(self._spec)
        self._open: OpenSandbox | None = boundary.open(self._spec, machine, stays=True)

    @property
    def isolation(self) -> str:
        """The level that it runs at."""
        return self._spec.isolation

    @property
    def choice(self) -> Choice | None:
        """How its level was chosen; None where it was named, and nothing required of it."""
        return self._spec.choice

    @property
    def closed(self) -> bool:
        """Whether it is over."""
        return self._open is None

    # ---- commands ----

    def run(self, argv: Sequence[Path], **options: Unpack[CommandOptions]) -> Result:
        """Runs a command in it, and waits for its end. What it leaves running stays, unless a limit ended it.

        argv, input, collect, check, text: as for `rf.run`. env: over the sandbox's own. files: written as by
        `write_file` before. cwd: absolute, or below the work directory, which is the default. wall_time, output: of
        this command, instead of the sandbox's.
        `Result.usage` is this command's, but for memory_peak_bytes, which is the most since the sandbox was opened.
        A StartError of this command alone leaves the sandbox as it is.
        """
        spec, command = command_spec(self._spec, argv, options)
        with self._lock:
            sandbox = self._opened()
            try:
                return execute(sandbox, spec, time.monotonic_ns(), once=False, **command)
            except (SpecError, WorkloadFailed):
                raise  # the command itself is over: too much to collect, or check=True
            except StartError as error:
                if error.whole:
                    self._close()
                raise
            except BaseException:
                # The sandbox has ended, or its channel is in the middle of a frame.
                self._close()
                raise

    # ---- files ----

    def write_file(self, path: Path, data: bytes | bytearray | memoryview | str, mode: int = 0o644) -> None:
        """Writes a file of the work directory, in place of what has that name. Folders on the way are made.

        path: relative to the work directory. No symlink on the way is followed: a RingfenceError then.
        """
        files = Spec.make(_NO_COMMAND, files={path: (data, mode)}).files
        with self._lock:
            put(self._opened(), files)

    def read_file(self, path: Path) -> bytes:
        """A regular file of the work directory; no symlink is followed. Raises FileNotFoundError where it isn't one.

        path: relative to the work directory. Raises SpecError where it is larger than 1 GiB.
        """
        name = parse.relative_path(path, "read_file")
        with self._lock:
            found = self._opened().read(name, _FILE_BYTES)
        if found is None:
            raise FileNotFoundError(2, "no such regular file in the work directory", os.fsdecode(name))
        return found

    def list_dir(self) -> dict[str, int]:
        """The regular files below the work directory, however deep up to 64: path to size in bytes."""
        with self._lock:
            return {os.fsdecode(path): size for path, size in self._opened().files()}

    # ---- its limits and its life ----

    def set_limits(self, limits: Limits) -> tuple[Applied, ...]:
        """Changes the limits of the living sandbox: what `limits` gives is set, all else stays. What is in force after.

        memory, swap, cpus, cpu_weight, cpuset, pids and io_*: at once, for what runs too. wall_time and output: from
        the next command on. Raises CannotEnforce where one can't be changed here, KernelError where the kernel refuses
        (memory below what is in use now); then nothing was changed that can't be told from `applied`.
        """
        if not isinstance(limits, Limits):
            raise SpecError(f"limits must be Limits(...), not {type(limits).__name__}")
        with self._lock:
            sandbox = self._opened()
            merged = self._spec.limits.replace(**limits.given())
            asked = self._spec.replace(limits=merged, asked=self._spec.asked | limits.asked)
            check_spec(asked)
            found = sandbox.set_limits(merged, limits.asked)
            self._spec = asked
            return tuple(found)

    def pause(self) -> None:
        """Stops all that runs in it, until `resume`; when it returns, nothing of it runs. Time limits go on."""
        with self._lock:
            self._opened().freeze()

    def resume(self) -> None:
        """Lets all go on that `pause` stopped."""
        with self._lock:
            self._opened().thaw()

    def stats(self) -> Usage:
        """What it has used since it was opened."""
        with self._lock:
            return self._opened().stats()

    def close(self) -> None:
        """Ends what runs in it, and removes everything. May be called twice."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        sandbox, self._open = self._open, None
        # After a fork it is the parent's: to end it would end the parent's.
        if sandbox is not None and self._pid == os.getpid():
            sandbox.close()

    def _opened(self) -> OpenSandbox:
        if self._open is None:
            raise RingfenceError("the sandbox is closed")
        if self._pid != os.getpid():
            raise RingfenceError("the sandbox belongs to the process that opened it, not to one forked off it")
        return self._open

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<ringfence.Sandbox {self.isolation}, {state}>"
