"""Many sandboxes: what each of them holds in memory while it idles, and how many can be started a second.

What idles is `sleep`, left running by a command that has ended, in sandboxes that stay; bare, it is `sleep` alone. They
are started by a Python process of their own (`python -m` this module), so that no other sandbox is among them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import threading
import time

from ringfence.comparison import child
from ringfence.comparison.document import BARE
from ringfence.comparison.starts import program
from ringfence.comparison.taken import in_rounds, reason, start
from ringfence.errors import RingfenceError
from ringfence.spec import ISOLATIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from ringfence.comparison.measures import Measure
    from ringfence.comparison.places import Place
    from ringfence.comparison.taken import Effort, Taken

    Found = dict[str, dict[str, Taken]]

__all__ = ["launches", "memory"]

_SETTLE_S = 0.2
_ROUNDS = 3
# What opening may take, and what of the machine's memory must stay available: of 1, and bytes.
_OPEN_S = 15.0
_AVAILABLE, _AVAILABLE_BYTES = 0.1, 1 << 30
# One block of launches.
_BLOCK_S = 0.2

# ---- launches a second ----


def launches(
    measures: Iterable[Measure], places: Sequence[Place], effort: Effort, tell: Callable[[str], None]
) -> Mapping[str, Mapping[str, Taken]]:
    """By place and measure; a measure's part is how many threads start at once."""
    wanted = list(measures)
    found = start([one.name for one in wanted], [one.name for one in places])
    for one in wanted:
        _launches(one.name, int(one.part), found, places, effort, tell)
    return found


def _launches(
    name: str, ways: int, found: Found, places: Sequence[Place], effort: Effort, tell: Callable[[str], None]
) -> None:
    argv = [program("true")]
    kept: dict[str, list[float]] = {one.name: [] for one in places}

    def block(place: Place) -> None:
        kept[place.name].append(_rate(functools.partial(place.once, argv), ways))

    def give_up(place: str, why: str) -> None:
        kept[place] = []
        found[place][name].give_up(why)

    calls = {one.name: functools.partial(block, one) for one in places}
    told = f"of {effort.rounds}"
    seconds = effort.budget_s / 2  # there are three of these
    in_rounds(calls, effort.rounds, seconds, give_up, lambda turn: tell(f"{name}: round {turn} {told}"), 2)
    for place, rates in kept.items():
        found[place][name].blocks = [[one] for one in rates[1:]]


def _rate(once: Callable[[], None], ways: int) -> float:
    """Starts a second, of that many threads that start one after the other, each at least once."""
    until = time.monotonic() + _BLOCK_S
    counts: list[int] = []
    errors: list[BaseException] = []

    def loop() -> None:
        count = 0
        try:
            while count == 0 or (time.monotonic() < until and not errors):
                once()
                count += 1
        except BaseException as error:
            errors.append(error)
        counts.append(count)

    threads = [threading.Thread(target=loop) for _ in range(ways)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(counts) / (time.monotonic() - began)


# ---- memory ----


def memory(
    measures: Iterable[Measure], places: Sequence[Place], effort: Effort, tell: Callable[[str], None]
) -> Mapping[str, Mapping[str, Taken]]:
    """By place and measure; a measure's part is how many idle. Of a guest as many as time and memory allow."""
    wanted = list(measures)
    found = start([one.name for one in wanted], [one.name for one in places])
    counts = sorted({int(one.part) for one in wanted})
    with contextlib.ExitStack() as stack:
        children: dict[str, Callable[..., Any]] = {}
        for one in places:
            if one.name not in ISOLATIONS and one.name != BARE:
                _give_up(found, one.name, counts, "its sandboxes end with their command, so none of them idles")
                continue
            try:
                children[one.name] = stack.enter_context(_child(one.name))
            except OSError as error:
                _give_up(found, one.name, counts, reason(error))
        for count in counts:
            if count > effort.most:
                for one in places:
                    _give_up(found, one.name, [count], f"only {effort.most} were asked for")
                continue
            for turn in range(min(_ROUNDS, effort.rounds)):
                for name, ask in list(children.items()):
                    if name == "vm" and turn > 0 and count > 1:
                        continue  # it takes long, and has little noise for its size
                    tell(f"memory of {count} that idle: {name}")
                    try:
                        _add(found[name], count, ask(count))
                    except (OSError, ValueError) as error:
                        del children[name]
                        _give_up(found, name, [one for one in counts if one >= count], reason(error))
    for one in places:
        _doubt(found[one.name])
    return found


def _doubt(found: Mapping[str, Taken]) -> None:
    """Where other processes do more to the machine's memory than the sandboxes do, it tells nothing of these."""
    for name, taken in found.items():
        samples = taken.samples
        if not name.startswith("memory_machine_") or not samples:
            continue
        middle = statistics.median(samples)
        if middle <= 0:
            taken.give_up("other processes gave back more memory meanwhile than these took")
        elif max(samples) - min(samples) > 2 * middle:
            taken.give_up("it differs from round to round by more than it is: other processes use memory, too")


def _give_up(found: Found, place: str, counts: Iterable[int], why: str) -> None:
    for count in counts:
        for kind in ("pss", "machine"):
            taken = found[place].get(f"memory_{kind}_{count}")
            if taken is not None:
                taken.give_up(why)


def _add(found: dict[str, Taken], count: int, told: dict[str, Any]) -> None:
    """Of a round."""
    note = f"built in, of {told['count']} instead of {count}: {told['why']}" if told["count"] < count else "built in"
    taken = found.get(f"memory_pss_{count}")
    if taken is not None:
        if told["pss"]:
            taken.blocks.append(told["pss"])
            taken.source = note
        else:
            taken.give_up("only root may read how much memory a process holds that has another user")
    taken = found.get(f"memory_machine_{count}")
    if taken is not None:
        taken.blocks.append([told["machine"] / told["count"]])
        taken.source = note


@contextlib.contextmanager
def _child(name: str) -> Iterator[Callable[[int], Any]]:
    """A process of this module, which opens so many sandboxes and closes them. Raises OSError with its reason."""
    with child.answering(child.module("density", name)) as ask:

        def measured(count: int) -> Any:
            told = json.loads(ask(str(count)))
            if "error" in told:
                raise OSError(told["error"])
            return told

        yield measured


def main() -> int:
    """Says "ready", then for each number that it reads opens as many, and tells their memory as a line of JSON."""
    (name,) = sys.argv[1:]
    try:
        with contextlib.ExitStack() as stack:
            _open(name, stack)  # starts the launcher, loads the template
        print("ready", flush=True)
    except (RingfenceError, OSError) as error:
        print(reason(error), flush=True)
        return 1
    for line in sys.stdin:
        try:
            print(json.dumps(_measure(name, int(line))), flush=True)
        except (RingfenceError, OSError) as error:
            print(json.dumps({"error": reason(error)}), flush=True)
    return 0


def _measure(name: str, count: int) -> dict[str, Any]:
    """count: how many were opened; why not more. pss: bytes of each, with its share of the launcher's; empty where they
    can't be read. machine: bytes that are available no more.
    """
    _settle(name)
    before = meminfo()["MemAvailable"]
    began, opened, why = time.monotonic(), 0, ""
    with contextlib.ExitStack() as stack:
        while opened < count and not why:
            _open(name, stack)
            opened += 1
            found = meminfo()
            if found["MemAvailable"] < max(found["MemTotal"] * _AVAILABLE, _AVAILABLE_BYTES):
                why = "as many as this machine's memory allows"
            elif time.monotonic() - began > _OPEN_S:
                why = f"as many as {_OPEN_S:.0f} s allow"
        _settle(name)
        pss = _pss_of_each(name)
        if pss and len(pss) != opened:
            raise OSError(f"{len(pss)} sandboxes were found instead of {opened}")
        after = meminfo()["MemAvailable"]
    return {"count": opened, "why": why, "pss": pss, "machine": before - after}


def _settle(name: str) -> None:
    if name != BARE:
        from ringfence.levels.state import state

        state().ready.clear()  # what is kept for the next one
    time.sleep(_SETTLE_S)


def _open(name: str, stack: contextlib.ExitStack) -> None:
    sleep = [program("sleep"), "3600"]
    if name == BARE:
        process = subprocess.Popen(sleep, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)
        return
    from ringfence.sandbox import Sandbox

    sandbox = stack.enter_context(Sandbox(isolation=name))
    sandbox.run(["/bin/sh", "-c", f"{' '.join(sleep)} >/dev/null 2>&1 &"], check=True)


# ---- /proc ----


def _pss_of_each(name: str) -> list[int]:
    """Of each child that is a sandbox, with all below it, and the launcher's divided among them."""
    own = os.getpid()
    parents = {int(one): _parent(int(one)) for one in os.listdir("/proc") if one.isdecimal()}
    try:
        if name == BARE:
            return [_pss(pid) for pid, parent in parents.items() if parent == own]
        from ringfence.wire.launcher import launcher

        helper = launcher().pid
        shared = _pss(helper)
        roots = [pid for pid, parent in parents.items() if parent == helper]
        return [sum(map(_pss, _below(pid, parents))) + shared // len(roots) for pid in roots]
    except PermissionError:
        return []


def _below(root: int, parents: Mapping[int, int]) -> list[int]:
    found = [root]
    for above in found:
        found += [pid for pid, parent in parents.items() if parent == above]
    return found


def _pss(pid: int) -> int:
    """0 where it is gone. Raises PermissionError where it may not be read."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:")), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def meminfo() -> dict[str, int]:
    """/proc/meminfo, in bytes."""
    found: dict[str, int] = {}
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            found[name] = int(value.split()[0]) * 1024
    return found


if __name__ == "__main__":
    sys.exit(main())
