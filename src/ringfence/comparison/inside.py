"""Measures that time themselves inside: verbs of the static probe, and a loop in Python.

Each call prints its samples and what its clock was at its beginning and at its end. A guest's clock is an emulated one,
so it is held against the host's: where it runs off, what it measured is not told.
"""

from __future__ import annotations

import functools
import math

from ringfence.comparison.places import PROBE
from ringfence.comparison.taken import in_rounds, start
from ringfence.errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ringfence.comparison.measures import Measure
    from ringfence.comparison.places import Answer, Place
    from ringfence.comparison.taken import Effort, Taken

__all__ = ["Clock", "Printed", "parse", "take"]

# By how much a clock may run fast or slow, of 1.
_DRIFT = 0.05
# Of a single call's span, ns: its ends are read on both sides of a system call.
_SLACK_NS = 1_000_000
_MOST_SAMPLES = 1000
# statfs(2), linux/magic.h.
_FILE_SYSTEMS = {
    0xEF53: "ext4",
    0x01021994: "tmpfs",
    0x9123683E: "btrfs",
    0x58465342: "xfs",
    0x794C7630: "overlay",
    0x01021997: "9p",
    0x65735546: "fuse",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0x6969: "nfs",
}
# What needs sockets of its own.
_NETWORK_VERBS = ("loopback",)
# The same clock and the same lines as the probe's.
_PYTHON = """\
import sys, time
samples, ns = int(sys.argv[1]), int(sys.argv[2]) * 1000
now = lambda: time.clock_gettime_ns(time.CLOCK_MONOTONIC)
def batch():
    words, total = {}, 0
    for i in range(10000):
        words[i & 255] = total
        total += i ^ len(words)
    return total
def sample():
    spent = count = 0
    while spent < ns:
        a = now()
        batch()
        spent += now() - a
        count += 1
    return spent / count
began = now()
sample()
print("cpu_python", *(round(sample(), 2) for _ in range(samples)))
print("clock", began, now())
"""


class Printed:
    """What a call printed. figures: its samples by name. clock: ns at its beginning and end. filesystem: or ""."""

    __slots__ = ("clock", "figures", "filesystem")

    def __init__(self, figures: dict[str, list[float]], clock: tuple[int, int], filesystem: str) -> None:
        self.figures = figures
        self.clock = clock
        self.filesystem = filesystem


def parse(stdout: bytes) -> Printed:
    """Raises ProtocolError where it isn't what the probe prints: finite numbers above 0."""
    figures: dict[str, list[float]] = {}
    clock: tuple[int, int] | None = None
    filesystem = ""
    try:
        for line in stdout.decode("ascii").splitlines():
            name, *words = line.split(" ")
            if name == "clock":
                began, ended = (int(word) for word in words)
                clock = began, ended
            elif name == "filesystem":
                kind = int(words[0], 16)
                filesystem = _FILE_SYSTEMS.get(kind, f"a file system {kind:#x}")
            else:
                figures[name] = [float(word) for word in words]
    except (ValueError, IndexError):
        raise ProtocolError(f"the probe printed no figures but {stdout[:80]!r}") from None
    for name, samples in figures.items():
        if not 0 < len(samples) <= _MOST_SAMPLES or not all(0 < one < math.inf for one in samples):
            raise ProtocolError(f"the probe printed no samples of {name} but {stdout[:80]!r}")
    if clock is None or not figures:
        raise ProtocolError(f"the probe printed no clock or no figures: {stdout[:80]!r}")
    return Printed(figures, clock, filesystem)


class Clock:
    """Whether a clock inside runs as ours, by calls that bracket its readings.

    A reading lies between the moment before a call and the one after it, so between two readings far apart as much of
    our time went by as their brackets allow: at least and at most. A clock that shows more or less than that, by more
    than 5 %, is off. One call alone can only show that it is too fast, as nobody knows what its start took.
    """

    def __init__(self) -> None:
        self._first: tuple[int, int, int] | None = None  # the reading, and our time before and after
        self._last: tuple[int, int, int] | None = None

    def add(self, answer: Answer, clock: tuple[int, int]) -> None:
        """Takes a call's two readings. Raises ProtocolError where they can't be true."""
        began, ended = clock
        before, after = answer.before_ns, answer.after_ns
        if ended <= began:
            raise ProtocolError("the clock inside stood still, or went back, during a call")
        if ended - began > (after - before) * (1 + _DRIFT) + _SLACK_NS:
            raise ProtocolError(
                f"the clock inside ran off: it saw {(ended - began) / 1e6:.1f} ms of a call that took"
                f" {(after - before) / 1e6:.1f} ms"
            )
        if self._last is not None and began < self._last[0]:
            raise ProtocolError("the clock inside went back between two calls")
        if self._first is None:
            self._first = began, before, after
        self._last = ended, before, after

    def rate(self) -> tuple[float, float] | None:
        """How fast it runs, ours being 1: at least, at most. None where nothing is known yet."""
        if self._first is None or self._last is None:
            return None
        (began, before_first, after_first), (ended, before_last, after_last) = self._first, self._last
        least_ns, most_ns = before_last - after_first, after_last - before_first
        span = ended - began
        return span / most_ns, span / least_ns if least_ns > 0 else math.inf

    @property
    def fault(self) -> str:
        """Why what it measured isn't told, or ""."""
        found = self.rate()
        if found is None or (found[0] <= 1 + _DRIFT and found[1] >= 1 - _DRIFT):
            return ""
        fast = found[0] > 1 + _DRIFT
        by = (found[0] - 1 if fast else 1 - found[1]) * 100
        return f"the clock inside runs {by:.0f} % {'fast' if fast else 'slow'} against the host's"


def _argv(by: str, part: str, effort: Effort) -> list[str]:
    numbers = [str(effort.samples), str(effort.sample_us)]
    if by == "python":
        return ["python3", "-I", "-S", "-c", _PYTHON, *numbers]
    return [PROBE, "bench", part, *numbers]


def take(
    measures: Iterable[Measure], places: Sequence[Place], effort: Effort, tell: Callable[[str], None]
) -> Mapping[str, Mapping[str, Taken]]:
    """By place and measure. One call gives all measures of its verb."""
    found = start([one.name for one in measures], [one.name for one in places])
    verbs: dict[tuple[str, str], list[str]] = {}
    for one in measures:
        verbs.setdefault((one.by, one.part), []).append(one.name)
    for (by, part), names in verbs.items():
        _take_verb(by, part, names, found, places, effort, tell)
    return found


def _take_verb(
    by: str,
    part: str,
    names: Sequence[str],
    found: dict[str, dict[str, Taken]],
    places: Sequence[Place],
    effort: Effort,
    tell: Callable[[str], None],
) -> None:
    argv = _argv(by, part, effort)
    network = part in _NETWORK_VERBS
    clocks = {one.name: Clock() for one in places}
    printed: dict[str, list[Printed]] = {one.name: [] for one in places}

    def call(place: Place) -> None:
        answer = place.call(argv, network=network)
        told = parse(answer.stdout)
        missing = [name for name in names if name not in told.figures]
        if missing:
            raise ProtocolError(f"the probe printed nothing of {', '.join(missing)}")
        if not place.one_clock:
            clocks[place.name] = Clock()
        clocks[place.name].add(answer, told.clock)
        printed[place.name].append(told)

    def give_up(name: str, why: str) -> None:
        printed[name] = []
        for one in names:
            found[name][one].give_up(why)

    in_rounds(
        {one.name: functools.partial(call, one) for one in places},
        effort.rounds,
        effort.budget_s,
        give_up,
        lambda turn: tell(f"{', '.join(names)}: round {turn} of {effort.rounds}" if turn else f"{', '.join(names)}"),
    )
    for place in places:
        fault = clocks[place.name].fault if place.one_clock else ""
        if fault:
            give_up(place.name, fault)
        for told in printed[place.name][1:]:  # the first warmed up
            for one in names:
                found[place.name][one].blocks.append(told.figures[one])
                notes = [note for note in (told.filesystem, place.network_source if network else "") if note]
                if notes:
                    found[place.name][one].source = f"built in, {', '.join(notes)}"
