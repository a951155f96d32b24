"""What the parts of the cost suite have in common: how much is taken, what was taken, and why something wasn't."""

from __future__ import annotations

import random
import subprocess
import time

from ringfence._value import Value
from ringfence.comparison.statistics import block_interval, interval, ratio, summarize
from ringfence.errors import RingfenceError
from ringfence.levels.base import Command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from ringfence.levels.base import Outcome, Sandbox
    from ringfence.spec import Spec

__all__ = ["FULL", "QUICK", "Effort", "Taken", "in_rounds", "judged", "reason", "run_in", "start"]

BUILT_IN = "built in"
_LEAST_BLOCKS = 3
_LEAST_SAMPLES = 10


class Effort(Value):
    """How much is taken. rounds: of each measure, at most. samples: in each round, of what times itself. sample_us: how
    long each of those takes at least. budget_s: what one measure may take at one level; where it takes long there are
    fewer rounds. most: of the sandboxes that idle at once.
    """

    __slots__ = ("budget_s", "most", "rounds", "sample_us", "samples")
    rounds: int
    samples: int
    sample_us: int
    budget_s: float
    most: int

    def __init__(self, *, rounds: int, samples: int, sample_us: int, budget_s: float, most: int) -> None:
        self._set(rounds=rounds, samples=samples, sample_us=sample_us, budget_s=budget_s, most=most)


FULL = Effort(rounds=10, samples=10, sample_us=1000, budget_s=2.5, most=50)
# For a look, and for tests: each once.
QUICK = Effort(rounds=1, samples=3, sample_us=500, budget_s=0.5, most=1)


class Taken:
    """Of one measure at one place. blocks: the samples of each round. source: who measured. unavailable: why there are
    none, or "".
    """

    __slots__ = ("blocks", "source", "unavailable")

    def __init__(self, *, unavailable: str = "") -> None:
        self.blocks: list[list[float]] = []
        self.source = BUILT_IN
        self.unavailable = unavailable

    @property
    def samples(self) -> list[float]:
        return [one for block in self.blocks for one in block]

    def give_up(self, why: str) -> None:
        """What was taken until then isn't told: it is of something that didn't end well."""
        self.blocks = []
        self.unavailable = why


def judged(taken: Taken, bare: Taken | None) -> dict[str, Any]:
    """For json.dumps, as docs/design/comparison.md has it. bare: what it is compared with, or None at bare itself."""
    samples = taken.samples
    summary = summarize(samples)
    low = high = times = None
    if bare is not None and samples and bare.samples:
        times = ratio(summary, summarize(bare.samples))
        if all(one > 0 for one in bare.samples):
            low, high = _interval(taken, bare)
    why = taken.unavailable or ("" if samples else "nothing was measured")
    return {
        "summary": summary.to_json() if summary else None,
        "samples": samples,
        "ratio": times,
        "low": low,
        "high": high,
        "source": taken.source if samples else None,
        "unavailable": why or None,
    }


def _interval(taken: Taken, bare: Taken) -> tuple[float, float] | tuple[None, None]:
    """Of so few that resampling says nothing there is none."""
    if len(taken.blocks) >= _LEAST_BLOCKS and len(bare.blocks) >= _LEAST_BLOCKS:
        return block_interval(taken.blocks, bare.blocks)
    if len(taken.samples) >= _LEAST_SAMPLES and len(bare.samples) >= _LEAST_SAMPLES:
        return interval(taken.samples, bare.samples)
    return None, None


def reason(error: BaseException) -> str:
    """One line."""
    said = str(error).splitlines()
    return said[0] if said and said[0] else type(error).__name__


def in_rounds(
    takes: Mapping[str, Callable[[], None]],
    rounds: int,
    budget_s: float,
    give_up: Callable[[str, str], None],
    tell: Callable[[int], None],
    least: int = 3,
) -> None:
    """Calls each take once a round, in an order that changes, so that what disturbs the machine disturbs all alike.

    The first round is a warm-up, which the caller forgets, and tells how many rounds fit into the budget; `least` are
    taken all the same. One that fails is given up, with the reason, and the others go on.
    """
    left: dict[str, int] = {}
    chance = random.Random(len(takes) * 1000 + rounds)
    for turn in range(rounds + 1):
        tell(turn)
        order = [name for name in takes if turn == 0 or turn <= left.get(name, -1)]
        chance.shuffle(order)
        for name in order:
            began = time.monotonic()
            try:
                takes[name]()
            except (RingfenceError, OSError, ValueError, subprocess.SubprocessError) as error:
                left[name] = -1
                give_up(name, reason(error))
                continue
            if turn == 0:
                took = max(1e-6, time.monotonic() - began)
                left[name] = max(min(least, rounds), min(rounds, int(budget_s / took)))


def start(names: Iterable[str], places: Sequence[str]) -> dict[str, dict[str, Taken]]:
    """Nothing taken yet: by place and measure."""
    wanted = list(names)
    return {place: {name: Taken() for name in wanted} for place in places}


def run_in(sandbox: Sandbox, spec: Spec, *, once: bool = True) -> Outcome:
    """A spec's command in a sandbox of the seam, without what `run` does around it. once: it takes no other."""
    return sandbox.run(
        Command(
            argv=spec.argv,
            env=spec.environment(sandbox.home),
            cwd=sandbox.home,
            input=None,
            wall_time_ns=None,
            output_bytes=spec.limits.output_bytes,
            once=once,
        )
    )
