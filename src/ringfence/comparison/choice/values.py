"""How a level was chosen: what was required, what each level gives of it, what each costs."""

from __future__ import annotations

from ringfence._value import Value
from ringfence.errors import CannotEnforce, RingfenceError, Unavailable, Unmet
from ringfence.spec import AUTO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["Choice", "Judged", "Weighed"]

UNAVAILABLE = "isolation"


class Judged(Value):
    """One requirement at one level. resource: as `compare` names it. required: "own" or "restricted".

    verdict: "own", "restricted", "shared" or "unknown". evidence: what was seen.
    """

    __slots__ = ("evidence", "required", "resource", "verdict")
    resource: str
    required: str
    verdict: str
    evidence: str

    def __init__(self, *, resource: str, required: str, verdict: str, evidence: str) -> None:
        self._set(resource=resource, required=required, verdict=verdict, evidence=evidence)

    @property
    def met(self) -> bool:
        """Whether the level gives what is required. One of its own is more than a restricted one."""
        return self.verdict == "own" or (self.required == "restricted" and self.verdict == "restricted")

    def told(self) -> str:
        """Half a sentence: "kernel is shared (6.1.0, the same boot id)"."""
        return f"{self.resource} is {self.verdict} ({self.evidence})"

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {**{name: getattr(self, name) for name in self._fields}, "met": self.met}


class Weighed(Value):
    """One level. looked_at: False where a cheaper one was taken before it was its turn.

    start_ns: what a start and its end take here, the median; None where that wasn't needed or couldn't be measured.
    unmet: why it can't do what the spec asks for at all, as `rf.run` would say; an `Unmet` of the rule "isolation"
    where the level can't run here. judged: the requirements; empty where the spec is unmet.
    """

    __slots__ = ("isolation", "judged", "looked_at", "start_ns", "unmet")
    isolation: str
    looked_at: bool
    start_ns: int | None
    unmet: tuple[Unmet, ...]
    judged: tuple[Judged, ...]

    def __init__(
        self,
        *,
        isolation: str,
        looked_at: bool,
        start_ns: int | None = None,
        unmet: Sequence[Unmet] = (),
        judged: Sequence[Judged] = (),
    ) -> None:
        self._set(isolation=isolation, looked_at=looked_at, start_ns=start_ns, unmet=tuple(unmet), judged=tuple(judged))

    @property
    def meets(self) -> bool:
        """Whether it was looked at and is all that is asked for."""
        return self.looked_at and not self.unmet and all(one.met for one in self.judged)

    def why_not(self) -> str:
        """What is wrong with it; "" where nothing is known to be."""
        wrong = [one.reason if one.rule == UNAVAILABLE else f"{one.rule}: {one.reason}" for one in self.unmet]
        return "; ".join([*wrong, *(one.told() for one in self.judged if not one.met)])

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            "isolation": self.isolation,
            "meets": self.meets if self.looked_at else None,
            "start_ns": self.start_ns,
            "unmet": [{"rule": one.rule, "reason": one.reason, "help": one.help} for one in self.unmet],
            "judged": [one.to_json() for one in self.judged],
        }


class Choice(Value):
    """isolation: the level that was chosen; None where none will do. asked: "auto", or the level that was named.

    require: {resource: "own" or "restricted"}. levels: the ones there were to choose from, the cheapest first.
    why: all of it in one sentence.
    """

    __slots__ = ("asked", "isolation", "levels", "required")
    isolation: str | None
    asked: str
    required: tuple[tuple[str, str], ...]
    levels: tuple[Weighed, ...]

    def __init__(self, *, asked: str, required: Sequence[tuple[str, str]], levels: Sequence[Weighed]) -> None:
        chosen = next((one.isolation for one in levels if one.meets), None)
        self._set(isolation=chosen, asked=asked, required=tuple(required), levels=tuple(levels))

    def _init_arguments(self) -> dict[str, Any]:
        return {"asked": self.asked, "required": self.required, "levels": self.levels}

    @property
    def require(self) -> dict[str, str]:
        return dict(self.required)

    @property
    def why(self) -> str:
        wanted = ", ".join(f"{name}={word}" for name, word in self.required) or "what is asked for"
        others = [f"{one.isolation} {said}" for one in self.levels if (said := self._against(one))]
        if self.isolation is None:
            return "; ".join([f"no level gives {wanted} here", *others])
        if self.asked != AUTO:
            return f"{self.isolation} gives {wanted}"
        return "; ".join([f"{self.isolation} is the cheapest that gives {wanted}", *others])

    def _against(self, one: Weighed) -> str:
        """What speaks against a level that wasn't taken."""
        if one.isolation == self.isolation:
            return ""
        reason = one.why_not()
        if reason:
            return f"does not: {reason}"
        if one.start_ns is None:
            return "is left for last: what it costs is not known"
        chosen = next(weighed.start_ns for weighed in self.levels if weighed.isolation == self.isolation)
        return f"costs more: {_spelled(one.start_ns)} a start" + (f" against {_spelled(chosen)}" if chosen else "")

    def refusal(self) -> RingfenceError:
        """The error where no level will do: each reason of each level."""
        if all(one.rule == UNAVAILABLE for level in self.levels for one in level.unmet or (Unmet("", None, ""),)):
            first = self.levels[0].unmet[0]
            reason = first.reason if len(self.levels) == 1 else self.why
            return Unavailable(self.asked, reason, first.help)
        found = []
        for level in self.levels:
            who = f"{level.isolation}: " if self.asked == AUTO else ""
            found += [Unmet(one.rule, one.requested, f"{who}{one.reason}", one.help) for one in level.unmet]
            found += [
                Unmet("require", {one.resource: one.required}, f"{who}{one.told()}", "see 'ringfence choose'")
                for one in level.judged
                if not one.met
            ]
        return CannotEnforce(self.asked, found)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            "isolation": self.isolation,
            "asked": self.asked,
            "require": self.require,
            "why": self.why,
            "levels": [one.to_json() for one in self.levels],
        }


def _spelled(ns: int) -> str:
    return f"{ns / 1e9:.3g} s" if ns >= 10**9 else f"{ns / 1e6:.3g} ms"
