"""The seam: what every level is to those above it.

A level says what it can enforce on a host (`abilities`), checks a spec against that (`check`), and opens sandboxes.
A sandbox takes commands, one after the other, until it is closed; a one-shot run is a sandbox that takes one.
"""

from __future__ import annotations

import abc
import os
import time

from ringfence._value import Closing, Value
from ringfence.errors import CannotEnforce, Unmet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ringfence.levels.host import Host
    from ringfence.levels.usage import Measured
    from ringfence.result import Applied, Change, Denial, Usage
    from ringfence.spec import FileIn, Limits, Spec
    from ringfence.wire.messages import Exited, Started

__all__ = ["PLAIN_RULES", "Ability", "Command", "Level", "Outcome", "Sandbox", "requested"]


# The rules that say all there is to say of them: no path, port or device, which may be another one at the next call.
PLAIN_RULES = frozenset({"memory", "cpus", "pids", "cpu_time", "wall_time", "output", "user", "hostname", "network"})


class Ability(Value):
    """Whether a level can enforce one rule on a host. mechanism: by what; reason: why not; help: what would help."""

    __slots__ = ("available", "help", "mechanism", "reason", "rule")
    rule: str
    available: bool
    mechanism: str
    reason: str
    help: str

    def __init__(self, *, rule: str, mechanism: str = "", reason: str = "", help: str = "") -> None:
        self._set(rule=rule, available=not reason, mechanism=mechanism, reason=reason, help=help)


# Not a Value: it is made once a run.
class Command:
    """What a sandbox is to run, and the bounds of it that are not the sandbox's own.

    argv, env, cwd: bytes, as the workload sees them. input: all of stdin. wall_time_ns: or None.
    output_bytes: how much of stdout and of stderr is kept, each; more ends the command. once: the sandbox takes no
    other command, and ends with it.
    """

    __slots__ = ("argv", "cwd", "env", "input", "once", "output_bytes", "wall_time_ns")

    def __init__(
        self,
        *,
        argv: tuple[bytes, ...],
        env: tuple[tuple[bytes, bytes], ...],
        cwd: bytes,
        input: bytes | None,
        wall_time_ns: int | None,
        output_bytes: int,
        once: bool,
    ) -> None:
        self.argv = argv
        self.env = env
        self.cwd = cwd
        self.input = input
        self.wall_time_ns = wall_time_ns
        self.output_bytes = output_bytes
        self.once = once


# Not a Value: it holds the output, and is made once a run.
class Outcome:
    """How a command ended.

    started: what it read back of itself. exited: what init reported, or None where the sandbox ended without a word.
    stopped: "wall_time", "output" or "killed" where we ended it, else None. started_ns, ended_ns: CLOCK_MONOTONIC.
    first_output_ns: the same, when the first that it printed had come; 0 where nothing did. denials: what the filter
    denied meanwhile, or None where nobody looked.
    """

    __slots__ = (
        *("denials", "ended_ns", "exited", "first_output_ns", "started", "started_ns", "stderr", "stdout", "stopped"),
        "truncated",
    )

    def __init__(self) -> None:
        self.started: Started | None = None
        self.exited: Exited | None = None
        self.stdout = b""
        self.stderr = b""
        self.truncated = False
        self.stopped: str | None = None
        self.denials: tuple[Denial, ...] | None = None
        self.started_ns = 0
        self.ended_ns = 0
        self.first_output_ns = 0

    def settle(self) -> None:
        """The times, once all is known. For the command's own span init's clock is the better one: both reports may
        have come at once. It is believed as far as it fits into what we saw.
        """
        if self.ended_ns == 0:
            self.ended_ns = time.monotonic_ns()
        if self.started is not None and self.exited is not None:
            span = self.exited.clock_ns - self.started.clock_ns
            if 0 < span < 2**62:
                self.started_ns = min(self.started_ns, self.ended_ns - span)


class Sandbox(Closing, abc.ABC):
    """An open sandbox. Its `close` leaves nothing of it, and may be called twice."""

    home: bytes
    accelerator: str | None = None

    @abc.abstractmethod
    def run(self, command: Command) -> Outcome:
        """Runs a command to its end. Raises StartError where it was never run; the sandbox is over then where that is
        `whole`, or the command was to be the only one.
        """

    def prepare(self, warm: tuple[bytes, ...] = ()) -> None:
        """Does all that can be done before a command is known, for one that is to wait. warm: a command of the caller's
        that is run before it waits, where the level is one whose first command takes longer (`Level.warms_up`).

        Raises RingfenceError.
        """
        return

    @abc.abstractmethod
    def put(self, files: tuple[FileIn, ...]) -> None:
        """Writes files of the work directory, in place of what has their names. Raises RingfenceError."""

    @abc.abstractmethod
    def read(self, path: bytes, limit_bytes: int) -> bytes | None:
        """A regular file of the work directory; None where it isn't one. No symlink is followed.

        Raises SpecError where it has more than `limit_bytes`.
        """

    @abc.abstractmethod
    def files(self) -> list[tuple[bytes, int]]:
        """(path, size in bytes) of the regular files of the work directory, sorted."""

    @abc.abstractmethod
    def mark(self) -> None:
        """What `usage` tells of a command begins here. For sandboxes that take more than one."""

    @abc.abstractmethod
    def stats(self) -> Usage:
        """What it has used since it was opened."""

    @abc.abstractmethod
    def set_limits(self, limits: Limits, changed: frozenset[str]) -> list[Applied]:
        """Changes the limits of what runs: `limits` is all of them, `changed` the names of those that are new.

        What is in force after. Raises CannotEnforce, KernelError.
        """

    @abc.abstractmethod
    def freeze(self) -> None:
        """Stops all that runs in it; once it returns, nothing runs. Raises CannotEnforce, KernelError."""

    @abc.abstractmethod
    def thaw(self) -> None:
        """Lets it go on. Raises KernelError."""

    @abc.abstractmethod
    def collect(self, patterns: tuple[bytes, ...], limit_bytes: int) -> dict[str, bytes]:
        """The regular files of the work directory that match. No symlink is followed.

        Raises SpecError where they are more than `limit_bytes` together.
        """

    @abc.abstractmethod
    def usage(self, outcome: Outcome) -> Measured:
        """What the command used."""

    def disk_full(self) -> bool:
        """Whether limits.disk, where there is one, was used up at the command's end. After `run`."""
        return False

    def changes(self) -> tuple[Change, ...] | None:
        """What the command did to its writable layer; None where it has none. After `run`."""
        return None

    def tell(self, outcome: Outcome) -> Sequence[Applied] | Callable[[], Sequence[Applied]]:
        """`applied`, or what gives it once it is asked for, also after `close`."""
        return self.applied(outcome)

    @abc.abstractmethod
    def applied(self, outcome: Outcome) -> list[Applied]:
        """Rule by rule, what is in force."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends what runs and removes everything."""


class Level(abc.ABC):
    """A kind of boundary.

    lasting: the rules whose abilities follow from the `Host` alone, and so are worked out once for it.
    warms_up: whether the first command of a sandbox takes longer than those after it.
    """

    name: str
    warms_up = False
    lasting: frozenset[str] = frozenset()

    @abc.abstractmethod
    def unavailable(self, host: Host, spec: Spec | None = None) -> tuple[str, str] | None:
        """Why the level can't run on that host at all, and what would help; None where it can. spec: what is to run."""

    @abc.abstractmethod
    def abilities(self, host: Host) -> Mapping[str, Ability]:
        """Rule by rule, whether it can be enforced on that host. Network modes are rules "network=none" and so on."""

    @abc.abstractmethod
    def unmet(self, spec: Spec, host: Host) -> list[Unmet]:
        """What of this very spec can't be enforced, beyond what `abilities` tells of its rules."""

    @abc.abstractmethod
    def open(self, spec: Spec, host: Host, *, stays: bool = False) -> Sandbox:
        """Starts a sandbox for a spec that was checked. stays: it is to take more than one command, so the limits of
        its cgroup can be changed, and it can be frozen.
        """

    def begin(self, spec: Spec) -> None:
        """Has the launcher begin with what a run of that spec needs of it, while others look at the host. Runs nothing,
        and tells of no error: who needs it hears of that.
        """
        return

    def abilities_for(self, spec: Spec, host: Host) -> Mapping[str, Ability]:
        """The same for one spec, where what it brings along makes a difference."""
        return self.abilities(host)

    def _abilities(self, host: Host) -> Mapping[str, Ability]:
        known = _known.get(self.name)
        if known is None or known[0] is not host:
            known = _known[self.name] = (host, self.abilities(host))
        return known[1]

    def check(self, spec: Spec, host: Host) -> None:
        """Raises CannotEnforce with every rule that was asked for and can't be enforced. Starts nothing."""
        unmet = []
        abilities: Mapping[str, Ability] = {}  # nobody asked: the command line's first run saves their modules
        if spec.asked:
            abilities = self._abilities(host) if spec.asked <= self.lasting else self.abilities_for(spec, host)
        for rule in sorted(spec.asked):
            ability = abilities.get(f"network={spec.network.mode}" if rule == "network" else rule)
            if ability is None:
                # A rule that a level has never heard of is one that it would leave out.
                ability = Ability(rule=rule, reason=f"the {self.name} level has no such rule yet", help="leave it out")
            if not ability.available:
                unmet.append(Unmet(rule, requested(spec, rule), ability.reason, ability.help))
        unmet += self.unmet(spec, host)
        if spec.mounts:
            unmet += _secret_mounts(spec)
        if unmet:
            raise CannotEnforce(self.name, unmet)


# Level to the host that was asked last, and its answer.
_known: dict[str, tuple[Host, Mapping[str, Ability]]] = {}


def _secret_mounts(spec: Spec) -> list[Unmet]:
    from ringfence.images.secrets import why_secret

    found = []
    for mount in spec.mounts:
        why = "" if mount.secret else why_secret(mount.source)
        if why:
            help = "say Mount(..., secret=True), or SOURCE:TARGET:secret on the command line, where that is meant"
            found.append(
                Unmet("mounts", (mount.source, mount.target, mount.writable), f"it would show a secret: {why}", help)
            )
    return found


def requested(spec: Spec, rule: str) -> object:
    """What a spec asks for under a rule, in the units of its field."""
    limits = spec.limits
    values: dict[str, object] = {
        "memory": limits.memory_bytes,
        "swap": limits.swap_bytes,
        "cpus": limits.cpus,
        "cpu_weight": limits.cpu_weight,
        "cpuset": limits.cpuset,
        "pids": limits.pids,
        "io_read": limits.io_read_bytes_per_second,
        "io_write": limits.io_write_bytes_per_second,
        "io_read_ops": limits.io_read_ops,
        "io_write_ops": limits.io_write_ops,
        "wall_time": limits.wall_time_ns,
        "cpu_time": limits.cpu_time_ns,
        "output": limits.output_bytes,
        "disk": limits.disk_bytes,
        "hostname": spec.hostname,
        "user": spec.user,
        "network": spec.network.mode,
        "allow": None if spec.network.allow is None else tuple(map(str, spec.network.allow)),
        "publish": spec.network.publish,
        "bandwidth": spec.network.bandwidth_bytes_per_second,
        "image": spec.image,
        "overlay": spec.overlay,
        "namespaces": {name: getattr(spec.namespaces, name, None) for name in sorted(spec.namespaces.asked)},
        "capabilities": spec.capabilities,
        "seccomp": f"{_shown(spec.seccomp.profile)}, {spec.seccomp.mode}",
        "devices": tuple((one.source, one.target, one.access) for one in spec.devices),
        "kernel": None if spec.kernel is None else os.fsdecode(spec.kernel.path),
        "readable": spec.readable,
        "writable": spec.writable,
        "tmpfs": tuple((one.target, one.size_bytes) for one in spec.tmpfs),
        "mounts": tuple((mount.source, mount.target, mount.writable) for mount in spec.mounts),
    }
    return values[rule]


def _shown(profile: str | bytes) -> str:
    if isinstance(profile, bytes):
        return profile.decode(errors="replace")
    return "a profile in JSON" if profile.startswith("{") else profile
