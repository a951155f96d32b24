"""Measures of starts and of their ends. The command is the host's `true`, which every tool shows to its workload."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import time

from ringfence.comparison import child
from ringfence.comparison.document import BARE
from ringfence.comparison.taken import in_rounds, run_in, start
from ringfence.errors import StartError
from ringfence.levels.host import host
from ringfence.pool import Pool
from ringfence.spec import ISOLATIONS, Spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ringfence.comparison.measures import Measure
    from ringfence.comparison.places import Place
    from ringfence.comparison.taken import Effort, Taken

    Found = dict[str, dict[str, Taken]]

__all__ = ["take"]

# Some time for what the last start left to be done, by the kernel or by ringfence: in nobody's way.
_PAUSE_S = 0.006
# Of starts there are more rounds than of what times itself: each is but one sample.
_ROUNDS = 3
_CHILD_S = 120


def program(name: str) -> str:
    """Where the host has it. Raises StartError where it doesn't."""
    found = shutil.which(name, path="/usr/bin:/bin")
    if found is None:
        raise StartError("exec", "execve", 2, name)
    return found


def take(
    measures: Iterable[Measure], places: Sequence[Place], effort: Effort, tell: Callable[[str], None]
) -> Mapping[str, Mapping[str, Taken]]:
    """By place and measure."""
    names = [one.name for one in measures]
    found = start(names, [one.name for one in places])
    if "start_warm" in names:
        _warm(found, places, effort, tell)
    if "first_output" in names or "teardown" in names:
        _first_output(found, places, effort, tell)
    if "start_pooled" in names:
        _pooled(found, places, effort, tell)
    if "start_cold" in names:
        _cold(found, places, effort, tell)
    if "start_boot" in names:
        _boot(found, places, effort, tell)
    return found


def _timed(call: Callable[[], object]) -> int:
    began = time.monotonic_ns()
    call()
    return time.monotonic_ns() - began


def _rounds(
    name: str,
    takes: Mapping[str, Callable[[], float]],
    found: Found,
    effort: Effort,
    tell: Callable[[str], None],
    rounds: int,
) -> None:
    """A sample of each in each round, but the first."""
    kept: dict[str, list[float]] = {place: [] for place in takes}

    def once(place: str, take_it: Callable[[], float]) -> None:
        time.sleep(_PAUSE_S)
        kept[place].append(take_it())

    def give_up(place: str, why: str) -> None:
        kept[place] = []
        found[place][name].give_up(why)

    calls = {place: functools.partial(once, place, one) for place, one in takes.items()}
    in_rounds(calls, rounds, effort.budget_s, give_up, lambda turn: tell(f"{name}: round {turn} of {rounds}"))
    for place, samples in kept.items():
        found[place][name].blocks = [[one] for one in samples[1:]]


def _warm(found: Found, places: Sequence[Place], effort: Effort, tell: Callable[[str], None]) -> None:
    argv = [program("true")]

    def second(place: Place) -> float:
        place.once(argv)
        time.sleep(_PAUSE_S)
        return _timed(lambda: place.once(argv))

    takes = {one.name: functools.partial(second, one) for one in places}
    _rounds("start_warm", takes, found, effort, tell, effort.rounds * _ROUNDS)


def _first_output(found: Found, places: Sequence[Place], effort: Effort, tell: Callable[[str], None]) -> None:
    argv = [program("echo"), "x"]
    ends: dict[str, list[float]] = {one.name: [] for one in places}

    def output(place: Place) -> float:
        took, teardown = place.first_output(argv)
        if teardown is not None:
            ends[place.name].append(teardown)
        return took

    takes = {one.name: functools.partial(output, one) for one in places}
    _rounds("first_output", takes, found, effort, tell, effort.rounds * _ROUNDS)
    for one in places:
        taken = found[one.name].get("teardown")
        if taken is None:
            continue
        if found[one.name]["first_output"].unavailable:
            taken.give_up(found[one.name]["first_output"].unavailable)
        elif not ends[one.name]:
            nothing = "a process leaves nothing to tear down"
            taken.give_up(nothing if one.name == BARE else "it doesn't tell when the command has ended")
        else:
            taken.blocks = [[sample] for sample in ends[one.name][1:]]


def _pooled(found: Found, places: Sequence[Place], effort: Effort, tell: Callable[[str], None]) -> None:
    """Pools are open only for this: each makes its next sandbox beside whatever else is measured."""
    argv = [program("true")]
    pools: dict[str, Pool] = {}

    def pooled(place: Place) -> float:
        pool = pools.get(place.name)
        if pool is None:
            pool = pools[place.name] = Pool(1, isolation=place.name)
        if not pool.wait_until_full():
            raise OSError("the pool was not full after a minute")
        time.sleep(_PAUSE_S)
        return _timed(lambda: pool.run(argv, check=True))

    takes: dict[str, Callable[[], float]] = {}
    for one in places:
        if one.name in ISOLATIONS:
            takes[one.name] = functools.partial(pooled, one)
        elif one.name == BARE:
            takes[one.name] = lambda place=one: _timed(lambda: place.once(argv))  # type: ignore[misc]
        else:
            found[one.name]["start_pooled"].give_up("it keeps no sandboxes waiting")
    try:
        _rounds("start_pooled", takes, found, effort, tell, effort.rounds * _ROUNDS)
    finally:
        for pool in pools.values():
            pool.close()


def _cold(found: Found, places: Sequence[Place], effort: Effort, tell: Callable[[str], None]) -> None:
    """A Python process of its own for each, which has imported all that is imported and started nothing."""
    takes: dict[str, Callable[[], float]] = {}
    for one in places:
        if one.name in ISOLATIONS or one.name == BARE:
            takes[one.name] = functools.partial(_first_of_a_process, one.name)
        else:
            found[one.name]["start_cold"].give_up("it has no process that stays: each of its starts is cold")
    _rounds("start_cold", takes, found, effort, tell, effort.rounds)


def _first_of_a_process(name: str) -> int:
    done = subprocess.run(
        child.module("starts", name, program("true")),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_CHILD_S,
        env=child.environment(),
    )
    if done.returncode:
        raise OSError(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "ringfence.comparison.starts failed"
        )
    return int(done.stdout)


def _boot(found: Found, places: Sequence[Place], effort: Effort, tell: Callable[[str], None]) -> None:
    takes: dict[str, Callable[[], float]] = {}
    for one in places:
        if one.name == "vm":
            takes[one.name] = lambda: _timed(_boot_once)
        else:
            found[one.name]["start_boot"].give_up("there is no kernel of its own to boot")
    if takes:
        _rounds("start_boot", takes, found, effort, tell, min(3, effort.rounds))


def _boot_once() -> None:
    from ringfence.levels.vm.sandbox import VmSandbox

    spec = Spec.make([program("true")], isolation="vm")
    with VmSandbox(spec, host(), use_template=False) as sandbox:
        outcome = run_in(sandbox, spec)
    if outcome.exited is None or outcome.exited.exit_code != 0:
        raise OSError("true did not end well in a guest that was booted")


def main() -> int:
    """The process of a cold start: prints how many ns the first run of it took."""
    from ringfence.api import run

    name, command = sys.argv[1:]
    if name == BARE:
        print(_timed(lambda: subprocess.run([command], stdin=subprocess.DEVNULL, capture_output=True, check=True)))
    else:
        print(_timed(lambda: run([command], isolation=name, check=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
