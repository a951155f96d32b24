"""`ringfence bench --ablation`: what each part of a boundary costs, by leaving it out.

A whole start is measured against the same start without one part, round by round in a shuffled order. What the part
costs is the difference of the medians, with the interval that it lies in. Where a part is kept ready by ringfence (a
tree, a network namespace, a cgroup, the whole sandbox), the start without that is the dearer one.

What a namespace alone takes is measured apart, by clones of a process that exits at once: a mount namespace is what no
container can be without, and a process has none.

The workload is trusted: it is the static probe (process) or the host's /usr/bin/true (container), as in `bench`. What
is left out is cut from the requests that the levels make, so that all the rest is what every run has.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time

from ringfence._value import Plain, Value
from ringfence.api import level, run
from ringfence.comparison.machine import machine_facts
from ringfence.comparison.statistics import percentile
from ringfence.comparison.taken import run_in
from ringfence.levels.container import ContainerSandbox
from ringfence.levels.host import host
from ringfence.levels.limits import cgroup_limits
from ringfence.levels.local import LocalSandbox
from ringfence.levels.process import ProcessSandbox
from ringfence.levels.state import state
from ringfence.spec import Limits, Mount, Spec
from ringfence.wire import frames, messages
from ringfence.wire.launcher import probe_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from ringfence.wire.messages import Started

    Attributes = list[tuple[int, bytes]]

__all__ = ["Ablation", "Part", "measure", "workload"]

_TRUE = ["/usr/bin/true"]
_LIMITS = Limits(memory="256M", pids=64)
_WHOLE = "everything"
_ANEW, _AHEAD, _TOLD = "rf.run, made anew", "rf.run, made ahead", "rf.run, made anew, its applied read"
_ALONE = "a namespace alone"
_BARE = "a clone without any"
# As `bench` has it: some time for what the last start left to the kernel.
_PAUSE_S = 0.006
_RESAMPLES = 400
# Attributes of LAUNCH and PLAN (docs/design/protocol.md).
_FLAGS, _UID_MAP, _GID_MAP = 1, 2, 3
_HOSTNAME, _LOOPBACK, _MOUNT, _UID, _GID, _FILTER, _LANDLOCK, _CGROUP, _PLAN_FLAGS = 1, 2, 3, 4, 5, 6, 8, 9, 12
_NEWUSER, _NEWPID, _NEWNET, _NEWIPC, _NEWUTS, _NEWTIME = 1 << 28, 1 << 29, 1 << 30, 1 << 27, 1 << 26, 1 << 7
_CGROUP_NAMESPACE = 1


class Request:
    """LAUNCH and PLAN of a start, as attributes that a part can be cut from."""

    def __init__(self, sandbox: _Cut, launch: bytes, plan: messages.Plan) -> None:
        self.sandbox = sandbox
        self.launch: Attributes = list(frames.attributes(launch[frames.HEADER_BYTES :]))
        self.plan: Attributes = list(frames.attributes(plan.encode()[frames.HEADER_BYTES :]))

    def drop(self, *tags: int) -> None:
        self.plan = [one for one in self.plan if one[0] not in tags]

    def drop_namespace(self, flag: int) -> None:
        wanted = int.from_bytes(self.launch[0][1], "little") & ~flag
        self.launch[0] = (_FLAGS, wanted.to_bytes(8, "little"))

    def drop_mounts(self, *targets: bytes) -> None:
        self.plan = [one for one in self.plan if one[0] != _MOUNT or _target(one[1]) not in targets]

    def drop_cgroup(self, index: int) -> None:
        joins = [one for one in self.plan if one[0] == _CGROUP]
        self.plan.remove(joins[index])

    def encoded(self) -> tuple[bytes, bytes]:
        def payload(attributes: Attributes) -> bytes:
            return b"".join(frames.attribute(tag, data) for tag, data in attributes)

        fds = len(self.sandbox.plan_fds)
        return (
            frames.encode(frames.Type.LAUNCH, payload(self.launch), nfds=1),
            frames.encode(frames.Type.PLAN, payload(self.plan), nfds=fds),
        )


def _target(step: bytes) -> bytes:
    """The third of a step's strings, after its twelve bytes of numbers."""
    return step[12:].split(b"\0")[2]


def _without_user(request: Request) -> None:
    """The ids outside are then those inside: the command gets the ones that its own were mapped to."""
    request.drop_namespace(_NEWUSER)
    base = int(request.launch[1][1].split()[1])
    request.launch = [one for one in request.launch if one[0] not in (_UID_MAP, _GID_MAP)]
    request.plan = [
        (tag, (int.from_bytes(data, "little") + base).to_bytes(4, "little")) if tag in (_UID, _GID) else (tag, data)
        for tag, data in request.plan
    ]


def _without_pid(request: Request) -> None:
    """/proc shows a PID namespace, and another one's can't be mounted: both go."""
    request.drop_namespace(_NEWPID)
    request.plan = [one for one in request.plan if one[0] != _MOUNT or not _target(one[1]).startswith(b"/proc")]


def _without_network(request: Request) -> None:
    request.drop_namespace(_NEWNET)
    request.drop(_LOOPBACK)


def _without_uts(request: Request) -> None:
    request.drop_namespace(_NEWUTS)
    request.drop(_HOSTNAME)


def _without_cgroup_namespace(request: Request) -> None:
    request.plan = [
        (tag, (int.from_bytes(data, "little") & ~_CGROUP_NAMESPACE).to_bytes(4, "little"))
        if tag == _PLAN_FLAGS
        else (tag, data)
        for tag, data in request.plan
    ]


def _without_masks(request: Request) -> None:
    request.plan = [one for one in request.plan if one[0] != _MOUNT or one[1][0] not in (6, 7)]


def _cuts(isolation: str) -> dict[str, Callable[[Request], None]]:
    """By the name of what is left out."""
    found: dict[str, Callable[[Request], None]] = {"seccomp filter": lambda one: one.drop(_FILTER)}
    if isolation == "process":
        found["Landlock"] = lambda one: one.drop(_LANDLOCK)
    for index, names in enumerate(_joined()):
        found[f"cgroup: {names}"] = lambda one, index=index: one.drop_cgroup(index)  # type: ignore[misc]
    found["cgroups, all of them"] = lambda one: one.drop(_CGROUP)
    if isolation == "container":
        found |= {
            "user namespace": _without_user,
            "PID namespace, its /proc and what is read back from there": _without_pid,
            "network namespace": _without_network,
            "IPC namespace": lambda one: one.drop_namespace(_NEWIPC),
            "UTS namespace, host name": _without_uts,
            "time namespace": lambda one: one.drop_namespace(_NEWTIME),
            "cgroup namespace": _without_cgroup_namespace,
            "masked and read-only paths of /proc": _without_masks,
            "/tmp, /dev/shm and /dev/pts": lambda one: one.drop_mounts(b"/tmp", b"/dev/shm", b"/dev/pts"),
        }
    return found


def _joined() -> list[str]:
    """The controllers of each cgroup that a sandbox joins, in that order."""
    cgroup = state().cgroup(cgroup_limits(_LIMITS, host()))
    if cgroup is None:
        return []
    try:
        where: dict[int, list[str]] = {}
        for name, parent in getattr(cgroup, "_parents", {"all controllers of version 2": 0}).items():
            where.setdefault(parent, []).append(name)
        return [" and ".join(names) for names in where.values()]
    finally:
        state().leave_cgroup(cgroup)


# ---- sandboxes with a part left out ----


class _Cut(LocalSandbox):
    """Mixed into a level's sandbox: cuts from its requests on their way to the launcher and to init."""

    cut: Callable[[Request], None] | None = None
    plan_fds: Sequence[int] = ()

    def start(self, request: bytes, plan: messages.Plan, joins: Sequence[int] = ()) -> None:
        self.plan_fds = plan.fds
        whole = Request(self, request, plan)
        if self.cut is not None:
            self.cut(whole)
        launch, encoded = whole.encoded()
        self.channel = self.state.launcher.launch(launch, joins)
        self.channel.send(encoded, plan.fds)


class _Process(_Cut, ProcessSandbox):
    pass


class _Container(_Cut, ContainerSandbox):
    pass


def _start(
    isolation: str,
    argv: Sequence[str],
    cut: Callable[[Request], None] | None,
    rules: Mapping[str, Any] | None = None,
    **options: Any,
) -> Started:
    """rules: more of the spec. options: of the sandbox itself."""
    spec = Spec.make(argv, isolation=isolation, **({"limits": _LIMITS} | dict(rules or {})))
    base: type[_Cut] = _Process if isolation == "process" else _Container
    kind: type[_Cut] = type(base.__name__, (base,), {"cut": staticmethod(cut) if cut is not None else None})
    with kind(spec, host(), state(), **options) as sandbox:
        outcome = run_in(sandbox, spec)
        if outcome.exited is None or outcome.exited.exit_code != 0:
            raise OSError(f"{argv[0]} did not end well: {outcome.exited}")
        assert outcome.started is not None
        return outcome.started


def _anew(isolation: str, argv: Sequence[str], *, cgroup: bool = False, folder: bool = False) -> None:
    """Without what earlier sandboxes left for this one; what that takes to remove counts too."""
    held = state()
    with held.lock:
        cgroups, held._cgroups = (held._cgroups, {}) if cgroup else ({}, held._cgroups)
        berths, held._berths = (held._berths, {}) if folder else ({}, held._berths)
    try:
        _start(isolation, argv, None)
        if cgroup:
            for one in [one for kept in held._cgroups.values() for one in kept]:
                one.remove()
        if folder:
            for berth in [one for kept in held._berths.values() for one in kept]:
                held.drop(berth)
    finally:
        with held.lock:
            held._cgroups = cgroups if cgroup else held._cgroups
            held._berths = berths if folder else held._berths


def _timed(start: Callable[[], object]) -> int:
    began = time.perf_counter_ns()
    start()
    return time.perf_counter_ns() - began


def _takes(isolation: str, argv: Sequence[str]) -> dict[str, Callable[[], int]]:
    """What is measured, by name; each returns nanoseconds."""

    def whole() -> int:
        return _timed(lambda: _start(isolation, argv, None))

    def without(cut: Callable[[Request], None]) -> Callable[[], int]:
        return lambda: _timed(lambda: _start(isolation, argv, cut))

    def unstocked() -> int:
        whole()  # which has the one in stock
        return whole()

    def more(**rules: Any) -> Callable[[], int]:
        return lambda: _timed(lambda: _start(isolation, argv, None, rules))

    def through_run() -> int:
        return _timed(lambda: run(argv, isolation=isolation, limits=_LIMITS, check=True))

    def anew() -> int:
        state().ready.clear()
        return through_run()

    def told() -> int:
        state().ready.clear()
        return _timed(lambda: run(argv, isolation=isolation, limits=_LIMITS, check=True).applied)

    def ahead() -> int:
        anew()
        through_run()
        time.sleep(_PAUSE_S)
        return through_run()

    found = {_WHOLE: whole}
    found |= {f"without {name}": without(cut) for name, cut in _cuts(isolation).items()}
    found["with a new cgroup"] = lambda: _timed(lambda: _anew(isolation, argv, cgroup=True))
    found["with a new work directory and ids"] = lambda: _timed(lambda: _anew(isolation, argv, folder=True))
    if isolation == "container":
        found["with a tree of single mounts"] = lambda: _timed(
            lambda: _start(isolation, argv, None, extra=lambda _: [])
        )
        found["with its network namespace made then"] = unstocked
        found["with an overlay over the whole root"] = more(overlay=True)
        found["with limits.disk"] = more(limits=_LIMITS.replace(disk="64M"))
        found["with a mount of the spec's own"] = more(mounts=[Mount("/usr/share", "/data")])
    found[_ANEW] = anew
    found[_AHEAD] = ahead
    found[_TOLD] = told
    return found


# ---- results ----


class Part(Plain):
    """A start without a part, or with one made anew. p50, p99: nanoseconds; p99 None below 100 samples.

    cost_ns: by how much the whole start is dearer than this one (less than 0: cheaper), with its 95 % interval; of a
    namespace alone, by how much the clone with it is dearer than one without any.
    """

    __slots__ = ("cost_ns", "high_ns", "low_ns", "name", "p50", "p99")
    name: str
    p50: float
    p99: float | None
    cost_ns: float
    low_ns: float
    high_ns: float

    def __init__(
        self, *, name: str, p50: float, p99: float | None, cost_ns: float, low_ns: float, high_ns: float
    ) -> None:
        self._set(name=name, p50=p50, p99=p99, cost_ns=cost_ns, low_ns=low_ns, high_ns=high_ns)


class Ablation(Value):
    """machine: where and when. parts: by level, the whole start first. samples: nanoseconds by level and name."""

    __slots__ = ("machine", "parts", "samples", "skipped")
    machine: dict[str, Any]
    parts: dict[str, tuple[Part, ...]]
    samples: dict[str, dict[str, list[int]]]
    skipped: dict[str, str]

    def __init__(
        self, *, machine: dict[str, Any], samples: dict[str, dict[str, list[int]]], skipped: dict[str, str]
    ) -> None:
        parts = {level: tuple(judge(taken)) for level, taken in samples.items()}
        self._set(machine=machine, parts=parts, samples=samples, skipped=skipped)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            "machine": self.machine,
            "unit": "ns",
            "parts": {level: [one.to_json() for one in parts] for level, parts in self.parts.items()},
            "skipped": self.skipped,
            "samples": self.samples,
        }


def judge(samples: dict[str, list[int]]) -> Iterator[Part]:
    """Each start against the whole one; those of rf.run against the one that is made anew; clones against a bare."""
    clones = _BARE in samples
    for name, taken in samples.items():
        against = samples[_BARE if clones else _ANEW if name in (_AHEAD, _TOLD) else _WHOLE]
        dear, cheap = (taken, against) if clones else (against, taken)
        low, high = _interval(dear, cheap)
        yield Part(
            name=name,
            p50=statistics.median(taken),
            p99=percentile(taken, 99) if len(taken) >= 100 else None,
            cost_ns=statistics.median(dear) - statistics.median(cheap),
            low_ns=low,
            high_ns=high,
        )


def _interval(whole: Sequence[int], without: Sequence[int]) -> tuple[float, float]:
    """Of the difference of the medians, at 95 %, by the bootstrap's percentiles."""
    chance = random.Random(len(whole))
    found = sorted(
        statistics.median(chance.choices(whole, k=len(whole)))
        - statistics.median(chance.choices(without, k=len(without)))
        for _ in range(_RESAMPLES)
    )
    aside = int(_RESAMPLES * 0.025)
    return found[aside], found[-1 - aside]


def measure(rounds: int = 200, tell: Callable[[str], None] | None = None) -> Ablation:
    """Measures both levels that start on the host's kernel. Raises what `run` raises."""
    machine = machine_facts()
    samples: dict[str, dict[str, list[int]]] = {}
    skipped: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for isolation in ("process", "container"):
            missing = level(isolation).unavailable(host())
            if missing is None and not host().privileged:
                missing = ("only root's sandboxes are made of all these parts", "")
            if missing is not None:
                skipped[isolation] = missing[0]
                continue
            samples[isolation] = _rounds(isolation, workload(isolation, stack), rounds, tell)
    if not skipped:
        samples[_ALONE] = _clones(rounds)
    return Ablation(machine=machine, samples=samples, skipped=skipped)


def _clones(rounds: int) -> dict[str, list[int]]:
    """Of a bare clone, of one with each namespace, and of one with all. Raises OSError."""
    pause_us = str(int(_PAUSE_S * 1e6))
    done = subprocess.run([probe_path(), "clone", str(rounds), pause_us], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(done.stderr.strip() or f"the probe ended with {done.returncode}")
    found: dict[str, list[int]] = {}
    for line in done.stdout.splitlines():
        name, took = line.split()
        found.setdefault(name, []).append(int(took))
    names = {"none": _BARE} | {name: f"with {name}" for name in sorted(found) if name not in ("none", "all")}
    names["all"] = "with all of them"
    return {shown: found[name] for name, shown in names.items()}


def workload(isolation: str, stack: contextlib.ExitStack) -> list[str]:
    """What is started: the static probe (process), true (container)."""
    if isolation == "container":
        return _TRUE
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringfence-bench-"))
    os.chmod(folder, 0o711)
    program = os.path.join(folder, "ringfence-probe")
    shutil.copyfile(probe_path(), program)
    os.chmod(program, 0o755)
    return [program, "exit", "0"]


def _rounds(
    isolation: str, argv: Sequence[str], rounds: int, tell: Callable[[str], None] | None
) -> dict[str, list[int]]:
    takes = _takes(isolation, argv)
    samples: dict[str, list[int]] = {name: [] for name in takes}
    for take in takes.values():
        take()
    order = list(takes)
    shuffled = random.Random(rounds)
    for turn in range(rounds):
        if tell is not None and turn % 10 == 0:
            tell(f"{isolation}: round {turn + 1} of {rounds}")
        shuffled.shuffle(order)
        for name in order:
            state().ready.clear()
            time.sleep(_PAUSE_S)
            samples[name].append(takes[name]())
    return samples
