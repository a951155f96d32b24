"""Probes: one attempt each, made inside a level and without any boundary, and what the two answers say of the boundary.

A probe is one entry of `probes_catalogue.PROBES`: what it tries and why that matters, in a sentence each, and one of
the few ways of this module to judge it. A judge is a pure function of what was seen outside and inside. It claims
nothing where the unconfined run, its control, failed: what nobody can do says nothing of a boundary. The host against
itself is "shared".
"""

from __future__ import annotations

from ringfence._value import Value
from ringfence.comparison.isolation import RESOURCES, Isolation, namespace, other_kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

__all__ = [
    "GROUPS",
    "Judged",
    "Probe",
    "Seen",
    "Way",
    "between",
    "fewer",
    "instance",
    "of_resource",
    "overload",
    "processors",
    "reach",
    "same",
]

GROUPS = (
    "kernel",
    "memory",
    "files",
    "processes",
    "signals and ptrace",
    "users and ids",
    "network",
    "IPC",
    "host name",
    "cgroups and limits",
    "capabilities",
    "system calls",
    "devices",
    "clock",
    "keyrings",
    "kernel logs and tunables",
    "resources under attack",
    "channels between two sandboxes",
)
# How a call says that there is no such thing where it looked.
_ABSENT = frozenset({"ENOENT", "ESRCH", "ECONNREFUSED", "ENOKEY", "ENODATA"})
# How the probe says that it couldn't begin: nothing that it tries is one of these.
_OF_THE_PROBE = (" fork", " pipe", " malloc", " waitpid")
# SIGSYS, the one signal that is a refusal: seccomp sends it (seccomp(2)). By any other the attempt was cut short.
_BY_A_FILTER = "died signal 31"
# How a call says that a name, a key or a port is in use: chance, and no refusal.
_TAKEN = frozenset({"EADDRINUSE", "EEXIST"})
_SHOWN = 70


class Seen(Value):
    """What was seen in one place. facts: of the probe's verb `facts`. said: what each attempt printed, by its line as
    the catalogue has it: "ok", "ERRNO call", or what it shows; without those that weren't made.
    """

    __slots__ = ("facts", "said")
    facts: dict[str, Any]
    said: dict[str, str]

    def __init__(self, facts: Mapping[str, Any], said: Mapping[str, str]) -> None:
        self._set(facts=dict(facts), said=dict(said))


class Judged(Value):
    """isolation: the verdict. evidence: what was seen inside. control: what the unconfined run gave."""

    __slots__ = ("control", "evidence", "isolation")
    isolation: Isolation
    evidence: str
    control: str

    def __init__(self, isolation: Isolation, evidence: str, control: str) -> None:
        self._set(isolation=isolation, evidence=evidence, control=control)

    def to_json(self) -> dict[str, str]:
        """For json.dumps."""
        return {"verdict": str(self.isolation), "evidence": self.evidence, "control": self.control}


class Way(Value):
    """How a probe is made and judged. attempt: the line for the probe's verb `each`, with {names} of what is outside
    (`probes_run.Bait`), or "" where the facts will do. where: "inside"; "alone", as a command of its own, as it may end
    its sandbox's; or "pair", in one of two sandboxes while the other holds the mark.
    """

    __slots__ = ("attempt", "judge", "where")
    attempt: str
    where: str
    judge: Callable[[Seen, Seen], Judged]

    def __init__(self, attempt: str, judge: Callable[[Seen, Seen], Judged], where: str = "inside") -> None:
        self._set(attempt=attempt, judge=judge, where=where)


class Probe(Value):
    """An entry of the catalogue. name: of lower-case words. group: of GROUPS. tries, why: a sentence each."""

    __slots__ = ("group", "name", "tries", "way", "why")
    name: str
    group: str
    tries: str
    why: str
    way: Way

    def __init__(self, name: str, group: str, way: Way, *, tries: str, why: str) -> None:
        self._set(name=name, group=group, way=way, tries=tries, why=why)

    def judge(self, host: Seen, inside: Seen) -> Judged:
        """The verdict of what was seen inside, `host` being without any boundary."""
        return self.way.judge(host, inside)

    def to_json(self) -> dict[str, str]:
        """Its entry in the document, for json.dumps."""
        return {"group": self.group, "tries": self.tries, "why": self.why}


# ---- what the judges share ----


def _not_testable(evidence: str, control: str) -> Judged:
    return Judged(Isolation.NOT_TESTABLE, evidence, control)


def _no_control(said: str) -> Judged:
    """What fails without a boundary too."""
    return _not_testable(f"the control fails: {said}", said)


def shown(said: str) -> str:
    """ "EPERM mount" as "mount: EPERM"; what is shown otherwise, cut."""
    errno, _, call = said.partition(" ")
    if errno.startswith("E") and errno.isupper() and call and " " not in call:
        return f"{call}: {errno}"
    said = " ".join(said.split())
    return said if len(said) <= _SHOWN else said[: _SHOWN - 3] + "..."


def _failed(said: str | None) -> str | None:
    """Why an answer is none; None where it is one."""
    if said is None:
        return "it was not tried"
    if said == "timeout":
        return "it didn't end in time"
    if said.startswith("not tried"):
        return said
    if said in ("", "nothing said") or said.startswith(("ringfence-probe:", "usage:")) or said.endswith(_OF_THE_PROBE):
        return f"the probe failed: {said}"
    if said.startswith("died signal ") and said != _BY_A_FILTER:
        return f"it ended otherwise: {said}"
    return None


def _its_own(kernel: bool, private: str, host: Seen, inside: Seen) -> str | None:
    """Why what is acted on inside is another instance than the host's, whatever came of it."""
    if kernel and other_kernel(host.facts, inside.facts):
        return "of its own kernel"
    if private and not other_kernel(host.facts, inside.facts):
        found = namespace(private, host.facts, inside.facts)
        return found.evidence if found.isolation is Isolation.OWN else None
    return None


# ---- the ways ----


def reach(attempt: str, *, private: str = "", gone: bool = False, kernel: bool = True) -> Way:
    """An attempt on something of the host's: "ok" is shared, a refusal restricted.

    What was found by a mark of the caller's (`find`), whose token is random, is the caller's, whatever else is known.
    private: the namespace that gives a sandbox an instance of its own of what is acted on. gone: that it isn't found
    means that the sandbox has a world of its own, as the host's is known to be there. kernel: whether another kernel
    has its own of it.
    """

    def judge(host: Seen, inside: Seen) -> Judged:
        control = host.said.get(attempt)
        if control != "ok":
            return _no_control(_failed(control) or shown(str(control)))
        said = inside.said.get(attempt)
        failure = _failed(said)
        if said is None or failure is not None:
            return _not_testable(str(failure), "ok")
        evidence = shown(said)
        if said == "ok" and attempt.startswith("find "):
            return Judged(Isolation.SHARED, "what the caller has set is found", "ok")
        own = _its_own(kernel, private, host, inside)
        if own is not None:
            return Judged(Isolation.OWN, f"{evidence}; {own}", "ok")
        if said == "ok":
            return Judged(Isolation.SHARED, evidence, "ok")
        if gone and said.partition(" ")[0] in _ABSENT:
            return Judged(Isolation.OWN, f"{evidence}: not there", "ok")
        return Judged(Isolation.RESTRICTED, evidence, "ok")

    return Way(attempt, judge)


def _not_here(held: str, same: str | None, said: str) -> str | None:
    """Why what one of two sandboxes doesn't see proves nothing; None where it does."""
    if held != "ok" or said.partition(" ")[0] not in _ABSENT or same == "ok":
        return None
    return f"not found in the one that has set it either: {_failed(same) or shown(str(same))}"


def between(mark: str, *, kernel: bool = True, timed: bool = False) -> Way:
    """A channel: one of two sandboxes of a level sets the mark, the other looks for it. That it isn't found there
    counts where the first one finds it itself. timed: what isn't seen in some time is no proof of another instance.
    """
    attempt = f"find {mark} {{pair}}"

    def judge(host: Seen, inside: Seen) -> Judged:
        control = host.said.get(attempt)
        if control != "ok":
            return _no_control(_failed(control) or shown(str(control)))
        held, said = inside.said.get(f"hold {mark}"), inside.said.get(attempt)
        failure = _failed(held) or _failed(said)
        if failure is None and held is not None and said is not None:
            failure = _not_here(held, inside.said.get(f"same {mark}"), said)
        if held is None or said is None or failure is not None:
            return _not_testable(str(failure), "ok")
        if held.partition(" ")[0] in _TAKEN:
            return _not_testable(f"another has it already: {shown(held)}", "ok")
        if held == "ok" and said == "ok":
            return Judged(Isolation.SHARED, "the one sees what the other has set", "ok")
        if held != "ok":
            evidence = f"setting it is refused: {shown(held)}"
        else:
            evidence = f"set in the one, in the other {shown(said)}"
        if kernel and other_kernel(host.facts, inside.facts):
            return Judged(Isolation.OWN, f"{evidence}; of a kernel of each", "ok")
        if held == "ok" and said.partition(" ")[0] in _ABSENT and not timed:
            return Judged(Isolation.OWN, evidence, "ok")
        return Judged(Isolation.RESTRICTED, evidence, "ok")

    return Way(attempt, judge, "pair")


def _unseen(seen: Seen, fact: str, attempt: str) -> str | None:
    """Why neither a value nor a refusal was seen; None where one was."""
    if attempt:
        return _failed(seen.said.get(attempt))
    if seen.facts.get(fact) is None and not seen.facts.get(f"{fact}_errno"):
        return f"{fact} was not reported"
    return None


def _value(seen: Seen, fact: str, attempt: str) -> tuple[str | None, str]:
    """(the value as text, or None; why there is none)."""
    if attempt:
        said = seen.said.get(attempt)
        failure = _failed(said)
        if said is None or failure is not None:
            return None, str(failure)
        errno = said.partition(" ")[0]
        is_error = errno.startswith("E") and errno.isupper() and len(said.split()) == 2
        return (None, shown(said)) if is_error else (said, "")
    found = seen.facts.get(fact)
    if found is None or found == "":
        return None, f"{fact}: {seen.facts.get(f'{fact}_errno') or 'nothing'}"
    return (", ".join(map(str, found)) or "none" if isinstance(found, (list, dict)) else str(found)), ""


def same(
    fact: str = "", *, attempt: str = "", kernel: bool = True, private: str = "", differs: Isolation = Isolation.OWN
) -> Way:
    """What can be read is the host's own value: shared. kernel, private: as for `reach`. differs: the verdict where it
    is another.
    """

    def judge(host: Seen, inside: Seen) -> Judged:
        theirs, missing = _value(host, fact, attempt)
        if theirs is None:
            return _no_control(missing)
        control = shown(theirs)
        unseen = _unseen(inside, fact, attempt)
        if unseen is not None:
            return _not_testable(unseen, control)
        ours, missing = _value(inside, fact, attempt)
        own = _its_own(kernel, private, host, inside)
        if own is not None:
            return Judged(Isolation.OWN, f"{shown(ours) if ours is not None else missing}; {own}", control)
        if ours is None:
            return Judged(Isolation.RESTRICTED, missing, control)
        if ours == theirs:
            return Judged(Isolation.SHARED, f"{shown(ours)}, as outside", control)
        return Judged(differs, shown(ours), control)

    return Way(attempt, judge)


def fewer(fact: str, what: str) -> Way:
    """How many there are in sight, as a number or a list of facts: as many as outside is shared."""

    def count(seen: Seen) -> int | None:
        found = seen.facts.get(fact)
        return len(found) if isinstance(found, (list, dict)) else found if isinstance(found, int) else None

    def judge(host: Seen, inside: Seen) -> Judged:
        theirs, ours = count(host), count(inside)
        if not theirs:
            return _no_control(f"{fact} can't be read" if theirs is None else f"0 {what}")
        if ours is None:
            return _not_testable(f"{fact} can't be read: {inside.facts.get(f'{fact}_errno') or 'not reported'}", what)
        evidence, control = f"{ours} {what}", f"{theirs} {what}"
        if other_kernel(host.facts, inside.facts):
            return Judged(Isolation.OWN, f"{evidence}; of its own kernel", control)
        return Judged(Isolation.RESTRICTED if ours < theirs else Isolation.SHARED, evidence, control)

    return Way("", judge)


def instance(kind: str) -> Way:
    """A namespace, by its inode number."""

    def judge(host: Seen, inside: Seen) -> Judged:
        theirs = (host.facts.get("namespaces") or {}).get(kind)
        if theirs is None:
            return _no_control(f"this kernel has no {kind} namespaces")
        found = namespace(kind, host.facts, inside.facts)
        control = f"{kind}:[{theirs}]"
        if found.isolation is Isolation.UNKNOWN:
            return _not_testable(found.evidence, control)
        return Judged(found.isolation, found.evidence, control)

    return Way("", judge)


def of_resource(name: str) -> Way:
    """A row of the summary that is seen by facts alone."""
    (resource,) = (one for one in RESOURCES if one.name == name)

    def judge(host: Seen, inside: Seen) -> Judged:
        found, control = resource.judge(host.facts, inside.facts), resource.judge(host.facts, host.facts)
        if Isolation.UNKNOWN in (found.isolation, control.isolation):
            return _not_testable(found.evidence, control.evidence)
        if other_kernel(host.facts, inside.facts) and found.isolation is Isolation.SHARED:
            return Judged(Isolation.OWN, f"{found.evidence}; of its own kernel", control.evidence)
        return Judged(found.isolation, found.evidence, control.evidence)

    return Way("", judge)


def processors() -> Way:
    """A fact and no attempt: no level here takes the host's processors, and with them their caches, for one alone."""

    def judge(host: Seen, inside: Seen) -> Judged:
        theirs, ours = host.facts.get("affinity"), inside.facts.get("affinity")
        if not theirs or not ours:
            return _not_testable("the processors can't be told", str(theirs))
        guest = other_kernel(host.facts, inside.facts)
        kind = "virtual ones, which run on any of the host's" if guest else "the host's"
        evidence = f"its {len(ours)} are {kind}: what shares a cache can time it (not tried)"
        return Judged(Isolation.SHARED, evidence, f"{len(theirs)} processors")

    return Way("", judge)


def overload(attempt: str, limit: str, rule: str, ends: tuple[str, ...], *, alone: bool = False) -> Way:
    """More is taken than `limit` (of the sandbox that probes run in) leaves, though not without bound: getting it all
    is shared. attempt: it prints "DID NUMBER ok|ERRNO", or just "ok".

    rule: of the sandbox's limits, the one that `limit` is; "" where it isn't of these. ends: how what it prints ends
    where it holds. An end that is none of these, or without the rule in force (the fact "kept"), proves nothing.
    """

    def judge(host: Seen, inside: Seen) -> Judged:
        control = host.said.get(attempt)
        if control is None or control.split()[-1] != "ok":
            return _no_control(_failed(control) or shown(str(control)))
        said = inside.said.get(attempt)
        failure = _failed(said)
        if said is None or failure is not None:
            return _not_testable(str(failure), control)
        got_all = said.split()[-1] == "ok"
        evidence = f"{shown(said)}, {'no limit held' if got_all else f'held by {limit}'}"
        if got_all and inside.facts.get("limited") is False:
            return _not_testable(f"{evidence}: it was given none", control)
        if got_all:
            return Judged(Isolation.SHARED, evidence, control)  # whatever kernel gave it, it came from the host
        if not said.endswith(ends):
            return _not_testable(f"it ended otherwise: {shown(said)}", control)
        if rule and rule not in inside.facts.get("kept", ()):
            return _not_testable(f"{shown(said)}, and no {rule} limit was in force", control)
        if other_kernel(host.facts, inside.facts):
            return Judged(Isolation.OWN, f"{evidence}; of its own kernel", control)
        return Judged(Isolation.RESTRICTED, evidence, control)

    return Way(attempt, judge, "alone" if alone else "inside")
