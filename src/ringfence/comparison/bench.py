"""`ringfence bench`: how long starts take, interleaved with what they are compared with.

One round starts everything once, so that whatever disturbs the machine disturbs all alike. What is told are medians and
their ratios; the raw samples and the machine's facts are kept. Workloads are the static probe (process level) and the
host's /usr/bin/true (container level: every tool shows it the host's /usr).
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time

from ringfence._value import Value
from ringfence.api import level, run
from ringfence.comparison import child
from ringfence.comparison.machine import machine_facts
from ringfence.comparison.peers import bubblewrap, oci_runtime
from ringfence.comparison.statistics import ratio, summarize
from ringfence.levels.host import host
from ringfence.pool import Pool
from ringfence.spec import Limits
from ringfence.wire.launcher import probe_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from ringfence.comparison.statistics import Summary

__all__ = ["GROUPS", "TARGETS", "Measurement", "Target", "measure"]

_TRUE = ["/usr/bin/true"]
_LIMITS = Limits(memory="256M", pids=64)
_VM_ROUNDS = 3
_READY_S = 120.0
_PAUSE_S = 0.006


class Target(Value):
    """A target of SPECIFICATION.md: the median of `what` is at most `most` times that of `against`, or, without
    `against`, at most `most` nanoseconds. ceiling: what is promised of it today, where the target isn't met yet.
    """

    __slots__ = ("against", "ceiling", "most", "what")
    what: str
    against: str
    most: float
    ceiling: float

    def __init__(self, what: str, against: str, most: float, ceiling: float | None = None) -> None:
        self._set(what=what, against=against, most=most, ceiling=most if ceiling is None else ceiling)

    def found(self, summaries: Mapping[str, Summary | None]) -> float | None:
        """The ratio, or the nanoseconds; None where it wasn't measured."""
        what = summaries.get(self.what)
        if self.against:
            return ratio(what, summaries.get(self.against))
        return None if what is None else what.p50


TARGETS = (
    Target("rf.run process, probe", "subprocess.run, probe", 2, ceiling=2.6),
    Target("rf.run container, true", "bwrap, true", 0.4, ceiling=0.5),
    Target("rf.run container, true", "crun, true", 0.2),
    Target("rf.run container, true", "runc, true", 0.08, ceiling=0.12),
    Target("pooled container, true", "subprocess.run, true, beside a pool", 3),
    Target("container, caller with 8 GiB", "container, caller with 0 GiB", 1.2),
    Target("container, 1000 more mounts", "container, 0 more mounts", 1.2),
    Target("import ringfence", "", 40e6),
    Target("ringfence run -i container, true", "runc, true", 1, ceiling=1.9),
)


class Measurement(Value):
    """machine: where and when. samples: nanoseconds by name, in order. skipped: why one is missing."""

    __slots__ = ("machine", "samples", "skipped")
    machine: dict[str, Any]
    samples: dict[str, list[int]]
    skipped: dict[str, str]

    def __init__(
        self, *, machine: Mapping[str, Any], samples: Mapping[str, Sequence[int]], skipped: Mapping[str, str]
    ) -> None:
        self._set(
            machine=dict(machine),
            samples={name: list(taken) for name, taken in samples.items()},
            skipped=dict(skipped),
        )

    def summaries(self) -> dict[str, Summary | None]:
        """By name."""
        return {name: summarize(taken) for name, taken in self.samples.items()}

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        found = self.summaries()
        return {
            "machine": self.machine,
            "unit": "ns",
            "summaries": {name: one.to_json() if one else None for name, one in found.items()},
            "targets": [
                {"what": one.what, "against": one.against or None, "most": one.most, "found": one.found(found)}
                for one in TARGETS
            ],
            "skipped": self.skipped,
            "samples": self.samples,
        }


class Bench:
    """What is measured together: takes by name, each of which starts something once and returns how long that took."""

    def __init__(self, open_stack: contextlib.ExitStack) -> None:
        self.stack = open_stack
        self.takes: dict[str, Callable[[], int]] = {}
        self.most_rounds: dict[str, int] = {}
        self.skipped: dict[str, str] = {}

    def add(self, name: str, start: Callable[[], object], most_rounds: int | None = None) -> None:
        self.takes[name] = functools.partial(_timed, start)
        if most_rounds is not None:
            self.most_rounds[name] = most_rounds

    def add_starter(self, name: str, kind: str, number: int) -> None:
        """A process of its own, prepared in that way, which does the timing."""
        try:
            self.takes[name] = self.stack.enter_context(_starter(kind, number, self.folder()))
        except OSError as error:
            self.skipped[name] = str(error)

    def folder(self) -> str:
        """An empty folder that an id mapped elsewhere may pass through."""
        found = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="ringfence-bench-"))
        os.chmod(found, 0o711)
        return found


def _timed(start: Callable[[], object]) -> int:
    began = time.perf_counter_ns()
    start()
    return time.perf_counter_ns() - began


@contextlib.contextmanager
def _starter(kind: str, number: int, folder: str) -> Iterator[Callable[[], int]]:
    """A `_starter` process. Raises OSError with its reason where it can't do that here."""
    with child.answering(child.module("_starter", kind, str(number), folder), ready_s=_READY_S) as ask:
        yield lambda: int(ask(""))


# ---- the groups ----


def _start_latency(bench: Bench) -> None:
    """A start, from the call in Python to its end, by each tool."""
    # Where any id may get at it: the library may be below a home that lets nobody in.
    program = os.path.join(bench.folder(), "ringfence-probe")
    shutil.copyfile(probe_path(), program)
    os.chmod(program, 0o755)
    probe = [program, "exit", "0"]
    bench.add("os.posix_spawn, probe", functools.partial(_spawn, probe))
    bench.add("subprocess.run, probe", functools.partial(_subprocess, probe))
    bench.add("rf.run process, probe", functools.partial(_ringfence, probe, "process"))
    bench.add("subprocess.run, true", functools.partial(_subprocess, _TRUE))
    bench.add("rf.run process, true", functools.partial(_ringfence, _TRUE, "process"))
    missing = level("container").unavailable(host())
    if missing is None:
        bench.add("rf.run container, true", functools.partial(_ringfence, _TRUE, "container"))
        bench.add("ringfence run -i container, true", functools.partial(_command_line, "container"))
    else:
        bench.skipped["rf.run container, true"] = missing[0]
    for name, peer in (
        ("bwrap, true", bubblewrap(_TRUE, bench.folder())),
        ("runc, true", oci_runtime("runc", _TRUE, bench.folder())),
    ):
        if peer.start is None:
            bench.skipped[name] = peer.reason
        else:
            bench.add(name, peer.start)
    bench.add_starter("crun, true", "crun", 0)


def _pool(bench: Bench) -> None:
    """A container of a pool. By itself: a pool makes its sandboxes beside whatever else is measured."""
    missing = level("container").unavailable(host())
    if missing is not None:
        bench.skipped["pooled container, true"] = missing[0]
        return
    pool = bench.stack.enter_context(Pool(2, isolation="container", limits=_LIMITS))
    bench.add("subprocess.run, true, beside a pool", functools.partial(_subprocess, _TRUE))
    bench.add("pooled container, true", lambda: pool.run(_TRUE, check=True))


def _caller(bench: Bench) -> None:
    """Whether a start depends on how much memory the caller has, or on how much the host has mounted."""
    for gib in (0, 1, 8):
        # Half of what is there, lest the machine swap or kill.
        if gib << 30 > machine_memory() // 2:
            bench.skipped[f"container, caller with {gib} GiB"] = "this machine has too little memory"
            continue
        bench.add_starter(f"container, caller with {gib} GiB", "resident", gib)
    for count in (0, 1000):
        bench.add_starter(f"container, {count} more mounts", "mounts", count)


def _imports(bench: Bench) -> None:
    """What a Python process pays for the library before its first run."""
    base = [sys.executable, "-I", "-S", "-c"]
    bench.add("python -I -S -c pass", functools.partial(_child, [*base, "pass"]))
    code = f"import sys, time; sys.path.insert(0, {child.SOURCE!r}); a = time.perf_counter_ns(); import ringfence; "
    bench.takes["import ringfence"] = functools.partial(_told, [*base, code + "print(time.perf_counter_ns() - a)"])


def _vm(bench: Bench) -> None:
    """A start in a virtual machine."""
    missing = level("vm").unavailable(host())
    if missing is not None:
        bench.skipped["rf.run vm, true"] = missing[0]
    else:
        bench.add("rf.run vm, true", functools.partial(_ringfence, _TRUE, "vm"), most_rounds=_VM_ROUNDS)


GROUPS: dict[str, Callable[[Bench], None]] = {
    "start": _start_latency,
    "pool": _pool,
    "caller": _caller,
    "import": _imports,
    "vm": _vm,
}


def measure(
    rounds: int = 200, groups: Sequence[str] = tuple(GROUPS), tell: Callable[[str], None] | None = None
) -> Measurement:
    """Measures those groups, each with that many interleaved rounds (a VM at most 3). tell: is called with what is
    being done.

    Raises what `run` raises.
    """
    samples: dict[str, list[int]] = {}
    skipped: dict[str, str] = {}
    facts = machine_facts()
    for group in groups:
        with contextlib.ExitStack() as stack:
            bench = Bench(stack)
            if tell is not None:
                tell(f"preparing {group}")
            GROUPS[group](bench)
            skipped.update(bench.skipped)
            samples.update(_rounds(bench, rounds, group, tell))
    return Measurement(machine=facts, samples=samples, skipped=skipped)


def _rounds(bench: Bench, rounds: int, group: str, tell: Callable[[str], None] | None) -> dict[str, list[int]]:
    samples: dict[str, list[int]] = {name: [] for name in bench.takes}
    for take in bench.takes.values():
        take()  # not counted: launchers start, caches fill
    order = list(bench.takes)
    # Always the same neighbour before it would be part of what is measured.
    shuffled = random.Random(rounds)
    for turn in range(rounds):
        if tell is not None and turn % 10 == 0:
            tell(f"{group}: round {turn + 1} of {rounds}")
        shuffled.shuffle(order)
        for name in order:
            if turn < bench.most_rounds.get(name, rounds):
                # What the last start left to be done, by the kernel or by ringfence, is in nobody's way.
                time.sleep(_PAUSE_S)
                samples[name].append(bench.takes[name]())
    return samples


def machine_memory() -> int:
    """Bytes that can be had now."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


# ---- one start ----


def _spawn(argv: list[str]) -> None:
    _, status = os.waitpid(os.posix_spawn(argv[0], argv, {}), 0)
    if status:
        raise OSError(f"{argv[0]} ended with {status}")


def _subprocess(argv: Sequence[str]) -> None:
    """With what `run` gives as well: an empty stdin, and both streams caught."""
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True)


def _ringfence(argv: Sequence[str], isolation: str) -> None:
    run(argv, isolation=isolation, limits=_LIMITS, check=True)


def _command_line(isolation: str) -> None:
    words = ["run", "-i", isolation, "--memory", "256M", "--pids", "64", "--", *_TRUE]
    # The installed command, as a user has it: -m takes 3 ms more, for runpy.
    script = os.path.join(os.path.dirname(sys.executable), "ringfence")
    _child([*([script] if os.access(script, os.X_OK) else [sys.executable, "-P", "-m", "ringfence"]), *words])


def _child(argv: Sequence[str]) -> None:
    subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=child.environment(), check=True)


def _told(argv: Sequence[str]) -> int:
    """What a child measured itself."""
    return int(subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True).stdout)
