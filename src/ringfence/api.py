"""`run`: one call, any boundary."""

from __future__ import annotations

import time

from ringfence.errors import KernelError, RingfenceError, SpecError, Unavailable
from ringfence.levels.base import Command
from ringfence.levels.host import Host, host
from ringfence.result import Result, TerminationReason
from ringfence.spec import ISOLATIONS, Spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Unpack

    from ringfence.levels.base import Level, Outcome, Sandbox
    from ringfence.spec import FileIn
    from ringfence.spec.options import Options, Path

__all__ = ["check_spec", "execute", "level", "put", "run", "run_spec", "settle"]

# All that `collect` may bring back of one run, bytes.
_COLLECT_BYTES = 1 << 30
_REASON_CPU, _REASON_KILLED = 1, 2

_levels: dict[str, Level] = {}

# What chooses a level where a spec leaves it open. Choosing measures, by means of this floor and those above it, so the
# package itself, which knows all floors, puts it here.
chooser: Callable[[Spec, Host], Spec] | None = None


def level(isolation: str) -> Level:
    """The level of that name. Each is imported on first use."""
    if isolation not in ISOLATIONS:
        raise SpecError(f"there is no level {isolation!r}")
    found = _levels.get(isolation)
    if found is None:
        found = _levels[isolation] = _new_level(isolation)
    return found


def _new_level(isolation: str) -> Level:
    if isolation == "process":
        from ringfence.levels.process import ProcessLevel

        return ProcessLevel()
    if isolation == "container":
        from ringfence.levels.container import ContainerLevel

        return ContainerLevel()
    from ringfence.levels.vm import VmLevel

    return VmLevel()


def run(argv: Sequence[Path], **options: Unpack[Options]) -> Result:
    """Runs a command behind a boundary, and waits for its end.

    argv: a list of str or bytes; no shell is involved. isolation: "process", "container" (the default), "vm", or
    "auto": the cheapest of them that can do all that is asked for, as `Result.choice` explains.
    require: {resource: "own" or "restricted"}, what the level has to isolate here, as measured on this host: "kernel",
    "network", "files" and the other rows of `compare`.
    input: all of stdin; without it stdin is empty, never the caller's. env: over a clean one (PATH, HOME, LANG, TERM).
    files: {name: content} put into the work directory, which is the cwd. collect: patterns (`*` within a name, `**`
    across folders) of files brought back from there in `Result.files`. mounts: `Mount` and `Tmpfs` to show.
    image: "host" (the default: the host's /usr, /etc and so on, read-only), a rootfs folder, or at the vm level a raw
    or qcow2 disk, told by its content, with a root file system on it or on a partition. overlay: whether the
    root can be written to, in a layer of its own; what changed is in `Result.changes`.
    user: a uid, "uid:gid" or a name inside; the default is one without privileges. hostname: inside.
    network: "none" (the default), "host" or `Network`. limits: see `Limits`. namespaces: see `Namespaces`.
    capabilities: names of those that it keeps; none by default. seccomp: see `Seccomp`. devices: paths or `Device`.
    kernel: of a virtual machine, a `Kernel` or the path of one, in place of the prepared one; our init runs in it.
    readable, writable: the paths, besides the work directory, to which Landlock narrows reading, and opens writing.
    check: raise WorkloadFailed unless it exits with 0. text: stdout and stderr as str (UTF-8, undecodable bytes kept by
    surrogateescape).

    A limit that was reached is a Result with its termination_reason. Raises SpecError (the request makes no sense),
    CannotEnforce (a rule that was asked for can't be enforced here), Unavailable (the level can't run here), all before
    anything starts; StartError where the command was never run. An argument of another name is a TypeError.
    """
    return run_spec(settle(Spec.make(argv, **options)))


def settle(spec: Spec, on: Host | None = None) -> Spec:
    """The spec at a level: at its own, unless it leaves that to be chosen, or requires something of it.

    `on`: as for `check_spec`. Raises SpecError, Unavailable, CannotEnforce.
    """
    if spec.settled:
        return spec
    if chooser is None:
        raise RingfenceError("no level can be chosen: ringfence was not imported as a package")
    return chooser(spec, on if on is not None else host())


def check_spec(spec: Spec, on: Host | None = None) -> tuple[Level, Host]:
    """The level and the host on which a spec can be run as it asks. Starts nothing.

    `on`: another view of this host than the probed one, for tests. Raises Unavailable, CannotEnforce.
    """
    if not spec.settled:
        raise RingfenceError("a level has to be chosen before a spec is checked")
    machine = on if on is not None else host()
    boundary = level(spec.isolation)
    missing = boundary.unavailable(machine, spec)
    if missing is not None:
        raise Unavailable(spec.isolation, *missing)
    boundary.check(spec, machine)
    return boundary, machine


def run_spec(spec: Spec, on: Host | None = None) -> Result:
    """Runs a spec that was made before. `on`: as for `check_spec`."""
    called_ns = time.monotonic_ns()
    boundary, machine = check_spec(spec, on)
    with boundary.open(spec, machine) as sandbox:
        ran = _Ran(sandbox, spec, called_ns, once=True, cwd=None)
    return ran.result(teardown_ns=time.monotonic_ns() - ran.outcome.ended_ns)


def execute(
    sandbox: Sandbox,
    spec: Spec,
    called_ns: int,
    *,
    once: bool,
    cwd: bytes | None = None,
    files: tuple[FileIn, ...] = (),
) -> Result:
    """Runs a spec's command in a sandbox that is open, and leaves it so.

    called_ns: CLOCK_MONOTONIC of the call. once: the sandbox takes no other. cwd: or None for the work directory.
    files: written there before.
    """
    if not once:
        sandbox.mark()
    if files:
        put(sandbox, files)
    return _Ran(sandbox, spec, called_ns, once=once, cwd=cwd).result(teardown_ns=None)


def put(sandbox: Sandbox, files: tuple[FileIn, ...]) -> None:
    """Writes files of an open sandbox's work directory. Raises RingfenceError."""
    try:
        sandbox.put(files)
    except OSError as error:
        raise KernelError("open", [files[0].path], error.errno or 0) from error


class _Ran:
    """A command that was run, and all that has to be asked before its sandbox is gone."""

    def __init__(self, sandbox: Sandbox, spec: Spec, called_ns: int, *, once: bool, cwd: bytes | None) -> None:
        self.spec = spec
        self.called_ns = called_ns
        self.accelerator = sandbox.accelerator
        command = Command(
            argv=spec.argv,
            env=spec.environment(sandbox.home),
            cwd=sandbox.home if cwd is None else cwd if cwd.startswith(b"/") else sandbox.home + b"/" + cwd,
            input=spec.input,
            wall_time_ns=spec.limits.wall_time_ns,
            output_bytes=spec.limits.output_bytes,
            once=once,
        )
        self.outcome = sandbox.run(command)
        self.files = sandbox.collect(spec.collect, _COLLECT_BYTES) if spec.collect else None
        self.measured = sandbox.usage(self.outcome)
        self.applied = sandbox.tell(self.outcome)
        self.changes = sandbox.changes()
        self.disk_full = sandbox.disk_full()

    def result(self, *, teardown_ns: int | None) -> Result:
        """Raises WorkloadFailed where the spec says check."""
        spec, outcome, measured = self.spec, self.outcome, self.measured
        exited = outcome.exited
        wall_ns, startup_ns = outcome.ended_ns - outcome.started_ns, outcome.started_ns - self.called_ns
        stdout: bytes | str = outcome.stdout
        stderr: bytes | str = outcome.stderr
        if spec.text:
            stdout = outcome.stdout.decode("utf-8", "surrogateescape")
            stderr = outcome.stderr.decode("utf-8", "surrogateescape")
        found = Result(
            isolation=spec.isolation,
            accelerator=self.accelerator,
            termination_reason=_reason(outcome, measured.out_of_memory, self.disk_full),
            exit_code=exited.exit_code if exited is not None and outcome.stopped is None else None,
            signal=exited.signal if exited is not None else None,
            stdout=stdout,
            stderr=stderr,
            truncated=outcome.truncated,
            files=self.files,
            applied=self.applied,
            denials=outcome.denials,
            changes=self.changes,
            choice=spec.choice,
            usage=lambda: measured.usage(wall_ns=wall_ns, startup_ns=startup_ns, teardown_ns=teardown_ns),
        )
        return found.check() if spec.check else found


def _reason(outcome: Outcome, out_of_memory: bool, disk_full: bool) -> TerminationReason:
    exited = outcome.exited
    if outcome.stopped is not None:
        return TerminationReason(outcome.stopped)
    if exited is None:
        # Init itself went: with the sandbox at its memory limit the kernel may have taken it.
        return TerminationReason.MEMORY if out_of_memory else TerminationReason.KILLED
    if exited.reason == _REASON_CPU:
        return TerminationReason.CPU_TIME
    if exited.reason == _REASON_KILLED:
        return TerminationReason.KILLED
    # The kernel kills single processes at the memory limit. Where the command went on and succeeded all the same, the
    # limit did not end it.
    if out_of_memory and exited.exit_code != 0:
        return TerminationReason.MEMORY
    # Nobody tells which write failed. That it failed, and that nothing more can be written, is what is known.
    if disk_full and exited.exit_code != 0:
        return TerminationReason.DISK
    return TerminationReason.SIGNALED if exited.signal is not None else TerminationReason.EXITED
