"""`ringfence bench --profile`: where the time of one `rf.run` goes, by the kernel's own trace.

System calls and switches of this process, the launcher, init and the command are recorded (ftrace, in an instance of
its own) over some runs; what is shown is the run whose time is the median. Tracing takes time too: the same runs are
also timed without it. Needs root and tracefs (Documentation/trace/ftrace.rst).
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import time

from ringfence._value import Plain, Value
from ringfence.api import run
from ringfence.comparison.ablation import workload
from ringfence.comparison.machine import machine_facts
from ringfence.errors import Unavailable
from ringfence.spec import Limits
from ringfence.wire.launcher import launcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from ringfence.result import Result

__all__ = ["Profile", "Step", "measure", "parse"]

_TRACING = "/sys/kernel/tracing"
_EVENTS = (
    "raw_syscalls/sys_enter",
    "raw_syscalls/sys_exit",
    "sched/sched_switch",
    "sched/sched_process_exec",
    "sched/sched_process_exit",
    "sched/sched_process_fork",
)
_BUFFER_KB = 4096
_LIMITS = Limits(memory="256M", pids=64)
_PAUSE_S = 0.01
_BEGIN, _END = "ringfence: begin", "ringfence: end"
# What one line of a trace looks like: "python-123  [001] d..1.  456.789012: sched_switch: prev_comm=…".
_LINE = re.compile(r"\s*(?P<comm>.+?)-(?P<pid>\d+)\s+\[(?P<cpu>\d+)\]\s+\S+\s+(?P<s>\d+)\.(?P<us>\d{6}): (?P<what>.*)")
_SWITCH = re.compile(r"prev_pid=(\d+) .*next_pid=(\d+)")
_BIN_US = 50


class Step(Plain):
    """Something that a process did. who: "Python", "launcher", "init", "command" or "next" (the sandbox that is made
    ahead for a later run). start_us: from the call. us: how long, or 0 where it is a moment.
    """

    __slots__ = ("start_us", "us", "what", "who")
    who: str
    what: str
    start_us: int
    us: int

    def __init__(self, *, who: str, what: str, start_us: int, us: int) -> None:
        self._set(who=who, what=what, start_us=start_us, us=us)


class Traced(Value):
    """One run. total_us: from the call to the return. running_us: who ran, and whether alone: {"Python": …}."""

    __slots__ = ("running_us", "steps", "total_us")
    total_us: int
    running_us: dict[str, int]
    steps: tuple[Step, ...]

    def __init__(self, *, total_us: int, running_us: dict[str, int], steps: Sequence[Step]) -> None:
        self._set(total_us=total_us, running_us=running_us, steps=tuple(steps))


class Profile(Value):
    """machine: where and when. untraced_us, traced_us: medians of a run's time.

    phases_us: of the untraced runs, medians: "start" until init hands the command over, "command" until Python has the
    report of its end, "end" until all is gone; the rest is what the spec and the result take.
    shares: how much of the time Python ran alone, something of the sandbox ran alone, both did, or none (a CPU woke up,
    or others had it), medians. run: the median one.
    """

    __slots__ = ("isolation", "machine", "phases_us", "run", "shares", "traced_us", "untraced_us")
    isolation: str
    machine: dict[str, Any]
    untraced_us: float
    traced_us: float
    phases_us: dict[str, float]
    shares: dict[str, float]
    run: Traced

    def __init__(
        self,
        *,
        isolation: str,
        machine: dict[str, Any],
        untraced_us: float,
        phases_us: dict[str, float],
        traced: Sequence[Traced],
    ) -> None:
        in_order = sorted(traced, key=lambda one: one.total_us)
        names = ("Python", "sandbox", "both", "none")
        self._set(
            isolation=isolation,
            machine=machine,
            untraced_us=untraced_us,
            phases_us=phases_us,
            traced_us=statistics.median(one.total_us for one in traced),
            shares={name: statistics.median(one.running_us[name] / one.total_us for one in traced) for name in names},
            run=in_order[len(in_order) // 2],
        )

    def bins(self) -> Iterator[tuple[int, dict[str, str]]]:
        """(microseconds from the call, {who: what it did}) for each 50."""
        for start in range(0, self.run.total_us, _BIN_US):
            found: dict[str, list[str]] = {}
            for step in self.run.steps:
                if start <= step.start_us < start + _BIN_US:
                    found.setdefault(step.who, []).append(step.what + (f" {step.us}" if step.us >= 3 else ""))
            yield start, {who: ", ".join(_repeated(what)) for who, what in found.items()}

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            "isolation": self.isolation,
            "machine": self.machine,
            "untraced_us": self.untraced_us,
            "traced_us": self.traced_us,
            "phases_us": self.phases_us,
            "shares": self.shares,
            "total_us": self.run.total_us,
            "steps": [one.to_json() for one in self.run.steps],
        }


def _repeated(what: Sequence[str]) -> Iterator[str]:
    at = 0
    while at < len(what):
        end = at
        while end < len(what) and what[end] == what[at]:
            end += 1
        yield what[at] if end - at == 1 else f"{end - at} x {what[at]}"
        at = end


def measure(isolation: str, rounds: int = 100) -> Profile:
    """Profiles runs of the probe (process) or of true (container), made ahead as from the third run on.

    Raises Unavailable where nothing can be traced, and what `run` raises.
    """
    with contextlib.ExitStack() as stack:
        return _measure(isolation, workload(isolation, stack), rounds)


def _measure(isolation: str, argv: Sequence[str], rounds: int) -> Profile:
    machine = machine_facts()

    def once() -> Result:
        return run(argv, isolation=isolation, limits=_LIMITS, check=True)

    for _ in range(3):
        once()
    untraced = []
    usages = []
    for _ in range(rounds):
        time.sleep(_PAUSE_S)
        began = time.perf_counter_ns()
        usage = once().usage
        untraced.append(time.perf_counter_ns() - began)
        usages.append((usage.startup_ns or 0, usage.wall_ns or 0, usage.teardown_ns or 0))
    with _instance() as folder:
        _write(f"{folder}/buffer_size_kb", str(_BUFFER_KB))
        _write(f"{folder}/trace_clock", "mono")
        _write(f"{folder}/options/event-fork", "1")
        _write(f"{folder}/set_event_pid", f"{os.getpid()} {launcher().pid}")
        # The init that waits already was made before anybody looked: this one is the first that is seen.
        for event in _EVENTS:
            _write(f"{folder}/events/{event}/enable", "1")
        once()
        _write(f"{folder}/tracing_on", "0")
        _write(f"{folder}/trace", "")
        texts = []
        for _ in range(rounds):
            time.sleep(_PAUSE_S)
            _write(f"{folder}/tracing_on", "1")
            _write(f"{folder}/trace_marker", _BEGIN)
            once()
            _write(f"{folder}/trace_marker", _END)
            # To read it is traced too, and would never come to an end.
            _write(f"{folder}/tracing_on", "0")
            with open(f"{folder}/trace", encoding="utf-8", errors="replace") as file:
                texts.append(file.read())
            _write(f"{folder}/trace", "")
    found = [parse(text, os.getpid(), launcher().pid) for text in texts]
    traced = [one for one in found if one is not None]
    if not traced:
        raise Unavailable("profile", "the kernel traced nothing", "look at /sys/kernel/tracing")
    parts = [statistics.median(one) / 1000 for one in zip(*usages, strict=True)]
    return Profile(
        isolation=isolation,
        machine=machine,
        untraced_us=statistics.median(untraced) / 1000,
        phases_us=dict(zip(("start", "command", "end"), parts, strict=True)),
        traced=traced,
    )


@contextlib.contextmanager
def _instance() -> Iterator[str]:
    folder = f"{_TRACING}/instances/ringfence-{os.getpid()}"
    try:
        os.mkdir(folder)
    except OSError as error:
        help = f"as root, mount -t tracefs tracefs {_TRACING}"
        raise Unavailable("profile", f"{folder}: {error.strerror}", help) from error
    try:
        yield folder
    finally:
        _write(f"{folder}/tracing_on", "0")
        os.rmdir(folder)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


# ---- reading a trace ----


class _Reader:
    """Takes the lines between the two marks."""

    def __init__(self, python: int, launcher_pid: int) -> None:
        self.who = {python: "Python", launcher_pid: "launcher"}
        self.commands: set[int] = set()
        self.begun: int | None = None
        self.ended: int | None = None
        self.calls: dict[int, tuple[int, str]] = {}
        self.steps: list[tuple[int, str, int, int]] = []
        self.on_cpu: dict[int, int] = {python: 0}
        self.intervals: dict[int, list[tuple[int, int]]] = {}

    def take(self, line: str) -> None:
        match = _LINE.match(line)
        if match is None:
            return
        now = int(match["s"]) * 1_000_000 + int(match["us"])
        pid, (kind, _, text) = int(match["pid"]), match["what"].partition(": ")
        if _BEGIN in text:
            self.begun = now
            return
        if self.begun is None or self.ended is not None:
            return
        at = now - self.begun
        if _END in text:
            self.ended = at
        elif kind == "sys_enter" or match["what"].startswith("sys_enter"):
            self.calls[pid] = (at, _call(match["what"]))
        elif kind == "sys_exit" or match["what"].startswith("sys_exit"):
            began, name = self.calls.pop(pid, (at, ""))
            if name:
                self.steps.append((pid, name, began, at - began))
        elif kind == "sched_switch":
            self._switch(text, at)
        elif kind == "sched_process_exec":
            self.commands.add(pid)
            self.steps.append((pid, "is executed", at, 0))
        elif kind == "sched_process_exit":
            self.steps.append((pid, "exits", at, 0))
        elif kind == "sched_process_fork":
            child = re.search(r"child_pid=(\d+)", text)
            if child is not None and self.who.get(pid) in ("launcher", "next"):
                self.who[int(child[1])] = "next"

    def _switch(self, text: str, at: int) -> None:
        match = _SWITCH.search(text)
        if match is None:
            return
        previous, following = int(match[1]), int(match[2])
        began = self.on_cpu.pop(previous, None)
        if began is not None:
            self.intervals.setdefault(previous, []).append((began, at))
        self.on_cpu[following] = at

    def role(self, pid: int) -> str:
        return self.who.get(pid) or ("command" if pid in self.commands else "init")

    def result(self) -> Traced | None:
        if self.ended is None:
            return None
        for pid, began in self.on_cpu.items():
            if pid in self.who or pid in self.intervals or pid in self.commands:
                self.intervals.setdefault(pid, []).append((began, self.ended))
        seen = {pid for pid, *_ in self.steps}
        steps = [
            Step(who=self.role(pid), what=what, start_us=at, us=us)
            for pid, what, at, us in sorted(self.steps, key=lambda one: one[2])
        ]
        return Traced(total_us=self.ended, running_us=self._running(seen), steps=steps)

    def _running(self, ours: set[int]) -> dict[str, int]:
        """Microseconds in which Python ran alone, something of the sandbox did, both, none."""
        assert self.ended is not None
        edges: list[tuple[int, str, int]] = []
        for pid, spans in self.intervals.items():
            if pid not in ours:
                continue
            side = "Python" if self.role(pid) == "Python" else "sandbox"
            for began, end in spans:
                edges += [(min(began, self.ended), side, 1), (min(end, self.ended), side, -1)]
        found = dict.fromkeys(("Python", "sandbox", "both", "none"), 0)
        running = {"Python": 0, "sandbox": 0}
        last = 0
        for at, side, change in [*sorted(edges), (self.ended, "Python", 0)]:
            python, sandbox = running["Python"] > 0, running["sandbox"] > 0
            found["both" if python and sandbox else "Python" if python else "sandbox" if sandbox else "none"] += (
                at - last
            )
            running[side] += change
            last = at
        return found


def _call(what: str) -> str:
    number = re.search(r"NR (-?\d+)", what)
    return _names().get(int(number[1]), number[1]) if number is not None else ""


_known: dict[int, str] = {}


def _names() -> dict[int, str]:
    """System calls by number, as this machine's headers have them."""
    if not _known:
        folder = f"/usr/include/{os.uname().machine}-linux-gnu/asm"
        for name in ("unistd_64.h", "unistd.h"):
            with contextlib.suppress(OSError), open(f"{folder}/{name}", encoding="ascii", errors="replace") as file:
                for call, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", file.read()):
                    _known.setdefault(int(number), call)
        _known.setdefault(-1, "")
    return _known


def parse(text: str, python: int, launcher_pid: int) -> Traced | None:
    """One run from a trace's text; None where its end is missing."""
    reader = _Reader(python, launcher_pid)
    for line in text.splitlines():
        reader.take(line)
    return reader.result()
