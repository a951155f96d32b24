"""Every exception that ringfence raises.

    RingfenceError                 all of them
    ├── SpecError                  what was asked for makes no sense; also a ValueError. Nothing was started.
    ├── CannotEnforce              rules that were asked for and can't be enforced here; an ExceptionGroup of
    Unmet ├── Unmet                      one such rule: rule, requested, reason, help
    ├── Unavailable                a level can't run on this host at all: isolation, reason, help
    ├── StartError                 the command was never run: step, call, errno, detail
    ├── KernelError                a system call of ringfence's own failed: call, arguments, errno, help
    ├── ProtocolError              the launcher, init or guest sent what it should not
    └── WorkloadFailed             with check=True: the workload did not exit with status 0; carries the
    result

A time-out or a limit that was reached is no exception: it is a Result with its `termination_reason`.
All of them can be pickled.
"""

from __future__ import annotations

import errno as _errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ringfence.result import Result

__all__ = [
    "CannotEnforce",
    "KernelError",
    "ProtocolError",
    "RingfenceError",
    "SpecError",
    "StartError",
    "Unavailable",
    "Unmet",
    "WorkloadFailed",
    "errno_name",
    "printable",
]


def printable(text: str, mark: str | None = None) -> str:
    """Words that may come from a workload, as one line: in place of what doesn't print, or moves a cursor, its escape,
    or `mark`.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] if mark is None else mark for one in text)


def errno_name(number: int) -> str:
    """The constant's name, as in errno(3): "ENOENT"; "errno 9999" for a number without one."""
    return _errno.errorcode.get(number, f"errno {number}")


class RingfenceError(Exception):
    """The base of every exception that ringfence raises."""


class SpecError(RingfenceError, ValueError):
    """The request makes no sense: one sentence says which part and why. Nothing was started."""


class Unmet(RingfenceError):
    """One rule that was asked for and can't be enforced at this level on this host.

    rule: its name, as in `Limits` or `run` ("memory", "network").
    requested: what was asked for, in the units of the spec's field (bytes, nanoseconds).
    reason: why it can't be enforced. help: what would help, or "".
    """

    def __init__(self, rule: str, requested: object, reason: str, help: str = "") -> None:
        super().__init__(f"{rule}: {reason}{_hint(help)}")
        self.rule = rule
        self.requested = requested
        self.reason = reason
        self.help = help

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rule, self.requested, self.reason, self.help)


class CannotEnforce(RingfenceError, ExceptionGroup[Unmet]):
    """All rules that were asked for and that this level can't enforce here, together. Nothing was started.

    isolation: the level's name. unmet: one `Unmet` a rule (the same as `.exceptions`).
    """

    isolation: str

    # The lines of ExceptionGroup are set in __new__, so that is where its two arguments are made from ours.
    def __new__(cls, isolation: str, unmet: Sequence[Unmet]) -> CannotEnforce:
        rules = "; ".join(f"{one.rule} ({one.reason})" for one in unmet)
        self = super().__new__(cls, f"{isolation} isolation can't enforce here: {rules}", unmet)
        self.isolation = isolation
        return self

    def __init__(self, isolation: str, unmet: Sequence[Unmet]) -> None:
        super().__init__(self.message, unmet)

    @property
    def unmet(self) -> tuple[Unmet, ...]:
        return tuple(one for one in self.exceptions if isinstance(one, Unmet))

    def derive(self, excs: Sequence[Any]) -> Any:
        """A group of some of these rules, as `except*`, `split` and `subgroup` ask for it."""
        return CannotEnforce(self.isolation, excs)

    def __str__(self) -> str:
        # Without ExceptionGroup's "(2 sub-exceptions)": the line names each of them already.
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.isolation, self.unmet)


class Unavailable(RingfenceError):
    """A level can't run on this host. isolation: its name. reason: why. help: what would help, or ""."""

    def __init__(self, isolation: str, reason: str, help: str = "") -> None:
        super().__init__(f"{isolation} isolation is unavailable here: {reason}{_hint(help)}")
        self.isolation = isolation
        self.reason = reason
        self.help = help

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.isolation, self.reason, self.help)


class StartError(RingfenceError):
    """The command was never run: the first error on the way to it.

    step: the step of the launch ("exec", "mount"). call: the system call ("execve"). errno: its number
    (ENOENT: not found, EACCES: not executable). detail: what it was about, such as the path, or "".
    whole: whether it is the sandbox that couldn't be set up, not the one command.
    """

    whole = False

    def __init__(self, step: str, call: str, errno: int, detail: str = "") -> None:
        about = f'("{detail}")' if detail else ""
        super().__init__(f"{step}: {call}{about}: {errno_name(errno)} ({os.strerror(errno)})")
        self.step = step
        self.call = call
        self.errno = errno
        self.detail = detail

    @property
    def errno_name(self) -> str:
        """Such as "ENOENT"."""
        return errno_name(self.errno)

    @property
    def strerror(self) -> str:
        """Such as "No such file or directory"."""
        return os.strerror(self.errno)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.step, self.call, self.errno, self.detail)


class KernelError(RingfenceError):
    """A system call of ringfence's own failed: `mount("overlay", "/x"): EPERM (needs CAP_SYS_ADMIN)`.

    call: the system call's name. arguments: those worth showing, in order. errno: its number.
    help: what is needed, or None; the message then has strerror(3) instead.
    """

    def __init__(self, call: str, arguments: Sequence[object], errno: int, help: str | None = None) -> None:
        shown = ", ".join(_argument(one) for one in arguments)
        super().__init__(f"{call}({shown}): {errno_name(errno)} ({help or os.strerror(errno)})")
        self.call = call
        # Not `args`: that name is BaseException's own.
        self.arguments = tuple(arguments)
        self.errno = errno
        self.help = help

    @property
    def errno_name(self) -> str:
        """Such as "EPERM"."""
        return errno_name(self.errno)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.call, self.arguments, self.errno, self.help)


class ProtocolError(RingfenceError):
    """The launcher, init or guest sent a frame that it should not, or went away in the middle of one."""


class WorkloadFailed(RingfenceError):
    """Raised with check=True when the workload did not exit with status 0. result: what it left."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.describe())
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.result,)


def _hint(help: str) -> str:
    return f" ({help})" if help else ""


def _argument(value: object) -> str:
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    if isinstance(value, str):
        return '"' + value.encode("unicode_escape", "surrogatepass").decode("ascii").replace('"', '\\"') + '"'
    return str(value)
