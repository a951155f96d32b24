"""What a run left: how it ended, what it printed and wrote, what it used, and what was in force."""

from __future__ import annotations

from _operator import attrgetter

from ringfence._value import Value
from ringfence.errors import WorkloadFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any, ClassVar, Self

    from ringfence.comparison.choice import Choice

__all__ = ["Applied", "Change", "Denial", "Result", "TerminationReason", "Usage"]


_SIGKILL = 9


class _Members(type):
    """What enum.StrEnum would do for its members. Importing enum takes 2 ms, a fifth of what all of ringfence does."""

    _known: dict[str, TerminationReason]

    def __call__(cls, value: str) -> TerminationReason:
        try:
            return cls._known[value]
        except KeyError:
            raise ValueError(f"{value!r} is no termination reason") from None

    def __iter__(cls) -> Iterator[TerminationReason]:
        return iter(cls._known.values())

    def __len__(cls) -> int:
        return len(cls._known)


class TerminationReason(str, metaclass=_Members):
    """Why a workload ended. Each is also a plain str: `result.termination_reason == "memory"`.

    `TerminationReason("memory")` is the one of that name (ValueError for none), and the class can be iterated over.
    """

    __slots__ = ()

    EXITED: ClassVar[TerminationReason]
    """It exited by itself; `exit_code` has its status."""
    SIGNALED: ClassVar[TerminationReason]
    """A signal that ringfence didn't send ended it; `signal` has its number."""
    WALL_TIME: ClassVar[TerminationReason]
    """limits.wall_time had passed."""
    CPU_TIME: ClassVar[TerminationReason]
    """limits.cpu_time was used up."""
    MEMORY: ClassVar[TerminationReason]
    """limits.memory was reached and the kernel killed for it."""
    OUTPUT: ClassVar[TerminationReason]
    """It printed more than limits.output."""
    DISK: ClassVar[TerminationReason]
    """limits.disk was reached."""
    KILLED: ClassVar[TerminationReason]
    """The caller ended it, by kill() or by closing the sandbox."""

    def __repr__(self) -> str:
        return f"<TerminationReason.{self.upper()}>"

    def __reduce__(self) -> tuple[type[TerminationReason], tuple[str]]:
        return TerminationReason, (str(self),)

    def __str__(self) -> str:
        return str.__str__(self)


_Members._known = {}
for _name in TerminationReason.__annotations__:
    _Members._known[_name.lower()] = str.__new__(TerminationReason, _name.lower())
    setattr(TerminationReason, _name, _Members._known[_name.lower()])


class Applied(Value):
    """One rule: what was asked for and what is in force.

    rule: its name, as in `Limits` and `run`. requested: in the units of the spec's field (bytes, nanoseconds,
    a count); None where nobody asked and it is a default. effective: as read back from the kernel; None where
    it isn't in force. mechanism: by what, such as "cgroup v1 memory.limit_in_bytes".
    """

    __slots__ = ("effective", "mechanism", "requested", "rule")
    rule: str
    requested: object
    effective: object
    mechanism: str

    def __init__(self, *, rule: str, requested: object, effective: object, mechanism: str) -> None:
        self._set(rule=rule, requested=requested, effective=effective, mechanism=mechanism)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            "rule": self.rule,
            "requested": _plain(self.requested),
            "effective": _plain(self.effective),
            "mechanism": self.mechanism,
        }


class Denial(Value):
    """A system call that the filter denied, or would have (`Seccomp.mode` "audit").

    call: its name, or "syscall_N" where nobody knows the number. count: how often. errno: what the workload got, by
    name, or None where it was let through. arguments: of the first, as the kernel saw them.
    """

    __slots__ = ("arguments", "call", "count", "errno")
    call: str
    count: int
    errno: str | None
    arguments: tuple[int, ...]

    def __init__(self, *, call: str, count: int, errno: str | None, arguments: Sequence[int] = ()) -> None:
        self._set(call=call, count=count, errno=errno, arguments=tuple(arguments))

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {"call": self.call, "count": self.count, "errno": self.errno, "arguments": list(self.arguments)}


class Change(Value):
    """What a workload did to a path of its writable layer.

    path: inside. kind: "created", "changed" or "deleted". what: "file", "directory", "symlink" or "other", of the new
    state, or None where it was deleted. size_bytes: of a file, else None.
    """

    __slots__ = ("kind", "path", "size_bytes", "what")
    path: str
    kind: str
    what: str | None
    size_bytes: int | None

    def __init__(self, *, path: str, kind: str, what: str | None, size_bytes: int | None = None) -> None:
        self._set(path=path, kind=kind, what=what, size_bytes=size_bytes)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {"path": _plain(self.path), "kind": self.kind, "what": self.what, "size_bytes": self.size_bytes}


class Usage(Value):
    """What a run cost. None is unknown, never 0.

    wall_ns: from the workload's start to its end, nanoseconds.
    cpu_ns: user and system time of the workload and all its descendants, nanoseconds; cpu_user_ns, cpu_system_ns: its
    parts (with cgroup v1 the sum is the cgroup's, split as wait4's is).
    memory_peak_bytes: the most memory that the sandbox held at once.
    io_read_bytes, io_write_bytes: from and to block devices, page cache not counted; of the cgroup where it has the io
    controller (an I/O limit was asked for), else of every process that was waited for, as wait4 tells.
    pids_peak: the most processes and threads at once, where the cgroup has the pids controller.
    throttled_ns: the time, summed over CPUs, that it could have run and was held back by limits.cpus.
    oom_kills: kills at the memory limit, as the kernel counts them: where it kills all of a sandbox, as with cgroup v2,
    the first one counts twice.
    memory_pressure_ns, cpu_pressure_ns, io_pressure_ns: the time in which at least one of its tasks waited for memory,
    for a CPU, for a device ("some" of the kernel's PSI; cgroup v2 only).
    vmm_cpu_ns, vmm_memory_peak_bytes: at the vm level what the host paid, by the cgroup of the VMM that runs the guest:
    its start and the guest's are in it, but for a guest that was restored or waited not what was done before the call.
    The figures above are the guest's own.
    startup_ns: from the call to the workload's start. teardown_ns: from its end to the sandbox being gone.
    source: who measured CPU and memory ("cgroup v1", "cgroup v2", "the guest's cgroup v2", "wait4"), or "".
    """

    __slots__ = (
        "cpu_ns",
        "cpu_pressure_ns",
        "cpu_system_ns",
        "cpu_user_ns",
        "io_pressure_ns",
        "io_read_bytes",
        "io_write_bytes",
        "memory_peak_bytes",
        "memory_pressure_ns",
        "oom_kills",
        "pids_peak",
        "source",
        "startup_ns",
        "teardown_ns",
        "throttled_ns",
        "vmm_cpu_ns",
        "vmm_memory_peak_bytes",
        "wall_ns",
    )
    wall_ns: int | None
    cpu_ns: int | None
    cpu_user_ns: int | None
    cpu_system_ns: int | None
    memory_peak_bytes: int | None
    io_read_bytes: int | None
    io_write_bytes: int | None
    pids_peak: int | None
    throttled_ns: int | None
    oom_kills: int | None
    memory_pressure_ns: int | None
    cpu_pressure_ns: int | None
    io_pressure_ns: int | None
    vmm_cpu_ns: int | None
    vmm_memory_peak_bytes: int | None
    startup_ns: int | None
    teardown_ns: int | None
    source: str

    def __init__(
        self,
        *,
        wall_ns: int | None = None,
        cpu_ns: int | None = None,
        cpu_user_ns: int | None = None,
        cpu_system_ns: int | None = None,
        memory_peak_bytes: int | None = None,
        io_read_bytes: int | None = None,
        io_write_bytes: int | None = None,
        pids_peak: int | None = None,
        throttled_ns: int | None = None,
        oom_kills: int | None = None,
        memory_pressure_ns: int | None = None,
        cpu_pressure_ns: int | None = None,
        io_pressure_ns: int | None = None,
        vmm_cpu_ns: int | None = None,
        vmm_memory_peak_bytes: int | None = None,
        startup_ns: int | None = None,
        teardown_ns: int | None = None,
        source: str = "",
    ) -> None:
        self._set(
            wall_ns=wall_ns,
            cpu_ns=cpu_ns,
            cpu_user_ns=cpu_user_ns,
            cpu_system_ns=cpu_system_ns,
            memory_peak_bytes=memory_peak_bytes,
            io_read_bytes=io_read_bytes,
            io_write_bytes=io_write_bytes,
            pids_peak=pids_peak,
            throttled_ns=throttled_ns,
            oom_kills=oom_kills,
            memory_pressure_ns=memory_pressure_ns,
            cpu_pressure_ns=cpu_pressure_ns,
            io_pressure_ns=io_pressure_ns,
            vmm_cpu_ns=vmm_cpu_ns,
            vmm_memory_peak_bytes=vmm_memory_peak_bytes,
            startup_ns=startup_ns,
            teardown_ns=teardown_ns,
            source=source,
        )

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return self._init_arguments()


class Result(Value):
    """How a workload ended and what it left.

    isolation: the level that ran. accelerator: "kvm" or "tcg" at the vm level, else None.
    exit_code: 0 to 255, or None where it didn't exit by itself. signal: the number of the signal that ended
    it, or None. termination_reason: a `TerminationReason`.
    stdout, stderr: bytes, or str where text was asked for; what was printed, up to the output limit.
    truncated: True where more was printed than was kept.
    files: what `collect` matched, by path relative to the work directory (undecodable bytes in a name are
    kept by surrogateescape, as in os.fsdecode).
    usage: what it cost. applied: rule by rule, what is in force (both put into words when they are first asked for).
    denials: system calls that the filter denied; None where nobody looked (see `Seccomp.mode`).
    changes: what it did to its writable layer, sorted by path; None where it had none (see `overlay`).
    choice: how the level was chosen; None where it was named, and nothing required of it.
    """

    __slots__ = (
        "_applied",
        "_usage",
        "accelerator",
        "changes",
        "choice",
        "denials",
        "exit_code",
        "files",
        "isolation",
        "signal",
        "stderr",
        "stdout",
        "termination_reason",
        "truncated",
    )
    isolation: str
    accelerator: str | None
    exit_code: int | None
    signal: int | None
    termination_reason: TerminationReason
    # bytes or str by the caller's own text=..., so Any, as typeshed has it for subprocess.CompletedProcess.
    stdout: Any
    stderr: Any
    truncated: bool
    files: dict[str, bytes]
    _usage: Usage | Callable[[], Usage]
    _applied: tuple[Applied, ...] | Callable[[], Sequence[Applied]]
    denials: tuple[Denial, ...] | None
    changes: tuple[Change, ...] | None
    choice: Choice | None

    def __init__(
        self,
        *,
        isolation: str,
        termination_reason: str,
        exit_code: int | None = None,
        signal: int | None = None,
        stdout: bytes | str = b"",
        stderr: bytes | str = b"",
        truncated: bool = False,
        files: Mapping[str, bytes] | None = None,
        usage: Usage | Callable[[], Usage] | None = None,
        applied: Sequence[Applied] | Callable[[], Sequence[Applied]] = (),
        accelerator: str | None = None,
        denials: Sequence[Denial] | None = None,
        changes: Sequence[Change] | None = None,
        choice: Choice | None = None,
    ) -> None:
        self._set(
            isolation=isolation,
            accelerator=accelerator,
            exit_code=exit_code,
            signal=signal,
            termination_reason=TerminationReason(termination_reason),
            stdout=stdout,
            stderr=stderr,
            truncated=truncated,
            files=dict(files) if files else {},
            usage=usage if usage is not None else Usage(),
            applied=applied,
            denials=None if denials is None else tuple(denials),
            changes=None if changes is None else tuple(changes),
            choice=choice,
        )

    @property
    def usage(self) -> Usage:
        found = self._usage
        if not isinstance(found, Usage):
            found = found()
            self._set(_usage=found)
        return found

    @usage.setter
    def usage(self, value: Usage | Callable[[], Usage]) -> None:
        self._set(_usage=value)  # as for `applied`

    @property
    def applied(self) -> tuple[Applied, ...]:
        found = self._applied
        if not isinstance(found, tuple):
            found = tuple(found())
            self._set(_applied=found)
        return found

    @applied.setter
    def applied(self, value: Sequence[Applied] | Callable[[], Sequence[Applied]]) -> None:
        # Only for `_set`: everybody else is stopped by __setattr__.
        self._set(_applied=value if callable(value) else tuple(value))

    @property
    def ok(self) -> bool:
        """Whether the workload exited by itself with status 0."""
        return self.termination_reason is TerminationReason.EXITED and self.exit_code == 0

    @property
    def shell_status(self) -> int:
        """The exit status that a shell would show for this end, 0 to 255.

        The workload's own where it exited; 128+N where signal N ended it; 124 where time ran out (wall_time,
        cpu_time), as timeout(1) has it; 137, which is 128+SIGKILL, where it was ended for its memory, output
        or disk, or killed by the caller, since SIGKILL is what ended it.
        """
        reason = self.termination_reason
        if reason is TerminationReason.EXITED and self.exit_code is not None:
            return self.exit_code
        if reason is TerminationReason.SIGNALED and self.signal is not None:
            return 128 + self.signal
        if reason in (TerminationReason.WALL_TIME, TerminationReason.CPU_TIME):
            return 124
        return 128 + _SIGKILL

    def describe(self) -> str:
        """One sentence on how it ended: "the workload was killed by SIGSEGV (signal 11)"."""
        reason = self.termination_reason
        if reason is TerminationReason.EXITED:
            return f"the workload exited with status {self.exit_code}"
        if reason is TerminationReason.SIGNALED:
            return f"the workload was killed by {_signal_name(self.signal)}"
        if reason is TerminationReason.KILLED:
            return "the workload was killed by the caller"
        return f"the workload was stopped: it reached its {reason} limit"

    def check(self) -> Self:
        """Itself, where the workload exited with status 0; raises `WorkloadFailed` otherwise."""
        if not self.ok:
            raise WorkloadFailed(self)
        return self

    def to_json(self) -> dict[str, Any]:
        """For json.dumps: every field under its own name.

        Bytes that are valid UTF-8 become a string, all others {"base64": "..."}.
        """
        return {
            "isolation": self.isolation,
            "accelerator": self.accelerator,
            "exit_code": self.exit_code,
            "signal": self.signal,
            "termination_reason": str(self.termination_reason),
            "stdout": _plain(self.stdout),
            "stderr": _plain(self.stderr),
            "truncated": self.truncated,
            "files": {name: _plain(data) for name, data in self.files.items()},
            "usage": self.usage.to_json(),
            "applied": [one.to_json() for one in self.applied],
            "denials": None if self.denials is None else [one.to_json() for one in self.denials],
            "changes": None if self.changes is None else [one.to_json() for one in self.changes],
            "choice": None if self.choice is None else self.choice.to_json(),
        }


# What is put into words later counts, not what does so.
Result._fields = tuple(name.removeprefix("_") for name in Result._fields)
Result._values = attrgetter(*Result._fields)


def _signal_name(number: int | None) -> str:
    import signal

    try:
        return f"{signal.Signals(number or 0).name} (signal {number})"
    except ValueError:  # the real-time signals between SIGRTMIN and SIGRTMAX have no names
        return f"signal {number}"


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _plain(value: object) -> Any:
    """What json.dumps takes."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            import binascii

            return {"base64": binascii.b2a_base64(data, newline=False).decode("ascii")}
    if isinstance(value, str):
        # text=True keeps undecodable bytes by surrogateescape, which no JSON reader but Python's would take.
        return value if value.isascii() or not _has_surrogates(value) else _plain(_bytes(value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    return str(value)
