"""Choosing a level: the cheapest one that isolates what is required, by what was measured on this host.

The verdicts are those of `compare`, of the very rules of a spec: the probe looks around in a sandbox that is made by
them, and what a spec itself opens is taken off (see `judged`). What isn't known meets no requirement.
"""

from __future__ import annotations

from ringfence.api import level
from ringfence.comparison.choice import measure
from ringfence.comparison.choice.judged import named, verdicts
from ringfence.comparison.choice.values import UNAVAILABLE, Choice, Judged, Weighed
from ringfence.errors import CannotEnforce, RingfenceError, Unavailable, Unmet
from ringfence.levels.host import host
from ringfence.spec import AUTO, ISOLATIONS, Seccomp, Spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Unpack

    from ringfence.levels.host import Host
    from ringfence.spec.options import Options

__all__ = ["Choice", "Judged", "Weighed", "choose", "settled", "weigh"]

# Any argv: what is chosen is the boundary.
_NO_COMMAND = ("-",)


def choose(**options: Unpack[Options]) -> Choice:
    """Which level `rf.run` would take for these options, and what speaks against the others. Every level is looked at.

    options: those of `rf.run`; isolation is "auto" unless a level is named. Where no level will do, `Choice.isolation`
    is None. What isn't known of this host yet is measured: some seconds at the vm level, else a fraction of one.
    Raises SpecError.
    """
    options.setdefault("isolation", AUTO)
    return weigh(_with_profile(Spec.make(_NO_COMMAND, **options)), host(), all_levels=True)


def settled(spec: Spec, machine: Host) -> Spec:
    """The spec at the level that was chosen for it, or at its own, which was found to isolate what is required.

    Raises SpecError for a resource that there isn't; CannotEnforce, or Unavailable, with what each level lacks.
    """
    spec = _with_profile(spec)
    choice = weigh(spec, machine)
    if choice.isolation is None:
        raise choice.refusal()
    return spec.replace(isolation=choice.isolation, choice=choice)


def _with_profile(spec: Spec) -> Spec:
    """The spec with the text of its seccomp profile in place of a path, so that what is run is what was measured."""
    profile = spec.seccomp.profile
    if not isinstance(profile, bytes):
        return spec
    from ringfence.linux import seccomp_profile

    try:
        text = seccomp_profile.load(profile).decode().strip()
    except (RingfenceError, UnicodeDecodeError):
        return spec  # no level takes it, and each says why
    # Seccomp tells a text from a path by its brace; what has none is no profile.
    return spec.replace(seccomp=Seccomp(text, mode=spec.seccomp.mode)) if text.startswith("{") else spec


def weigh(spec: Spec, machine: Host, *, all_levels: bool = False) -> Choice:
    """The choice for a spec. all_levels: also those that cost more than the one that is taken are looked at."""
    required = named(spec.require)
    refusals = {name: _unmet(spec.replace(isolation=name), machine) for name in _candidates(spec)}
    costs: dict[str, int | None] = dict.fromkeys(refusals)
    here = measure.Here(machine)
    # Of one level alone nobody asks what it costs.
    possible = [name for name, unmet in refusals.items() if not unmet]
    if len(possible) > 1 or all_levels:
        costs.update({name: here.start_ns(name) for name in possible})
    found: list[Weighed] = []
    for name in sorted(refusals, key=lambda name: (costs[name] is None, costs[name] or 0)):
        unmet = refusals[name]
        looked_at = all_levels or not any(one.meets for one in found)
        judged = _judged(spec.replace(isolation=name), required, here) if looked_at and not unmet else ()
        found.append(Weighed(isolation=name, looked_at=looked_at, start_ns=costs[name], unmet=unmet, judged=judged))
    return Choice(asked=spec.isolation, required=required, levels=found)


def _candidates(spec: Spec) -> tuple[str, ...]:
    return ISOLATIONS if spec.isolation == AUTO else (spec.isolation,)


def _unmet(spec: Spec, machine: Host) -> tuple[Unmet, ...]:
    """Why that level can't do what the spec says, whatever it isolates."""
    boundary = level(spec.isolation)
    try:
        missing = boundary.unavailable(machine, spec)
        if missing is not None:
            return (Unmet(UNAVAILABLE, spec.isolation, f"it is unavailable here: {missing[0]}", missing[1]),)
        boundary.check(spec, machine)
    except CannotEnforce as error:
        return error.unmet
    except Unavailable as error:
        return (Unmet(UNAVAILABLE, spec.isolation, f"it is unavailable here: {error.reason}", error.help),)
    except RingfenceError as error:
        return (Unmet(UNAVAILABLE, spec.isolation, str(error)),)
    return ()


def _judged(spec: Spec, required: tuple[tuple[str, str], ...], here: measure.Here) -> tuple[Judged, ...]:
    if not required:
        return ()
    found = verdicts(spec, here)
    return tuple(
        Judged(resource=name, required=word, verdict=str(found[name].isolation), evidence=found[name].evidence)
        for name, word in required
    )
