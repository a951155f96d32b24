"""Making the probes: without any boundary, then inside each level, then in two sandboxes of each level at once."""

from __future__ import annotations

import contextlib
import os
import secrets

from ringfence.comparison.isolation import Isolation
from ringfence.comparison.probes import Judged, Seen
from ringfence.comparison.probes_catalogue import PROBES
from ringfence.comparison.probes_place import Holder, Place, bare_place, sandbox_place
from ringfence.comparison.probes_runsc import RUNSC, runsc
from ringfence.errors import RingfenceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

__all__ = ["BARE", "RUNSC", "catalogue", "judge_all_probes", "look"]

BARE = "bare"


def _names(bait: Holder) -> dict[str, str]:
    """What stands in the attempts' lines."""
    return {"victim": str(bait.process.pid), "host": bait.token, "disk": _root_device(), "cgroup": _cgroup_top()}


def _root_device() -> str:
    """The node of the block device that the host's root is on; one that doesn't exist where it is on none."""
    number = os.stat("/").st_dev
    try:
        with open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/uevent", encoding="ascii") as file:
            for line in file:
                if line.startswith("DEVNAME="):
                    return f"/dev/{line.strip().removeprefix('DEVNAME=')}"
    except OSError:
        pass
    return "/dev/ringfence-no-such-disk"


def _cgroup_top() -> str:
    """A mount point of cgroups."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if " - cgroup" in line and " /sys/fs/cgroup" in line:
                return line.split()[4]
    return "/sys/fs/cgroup"


def look(names: Iterable[str], tell: Callable[[str], None]) -> tuple[dict[str, Seen], dict[str, str]]:
    """(what was seen, by column; why one gave nothing). names: levels, or RUNSC. The bare column is always there."""
    refused: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        places: dict[str, Place] = {BARE: stack.enter_context(bare_place())}
        for name in names:
            try:
                places[name] = stack.enter_context(runsc() if name == RUNSC else sandbox_place(name))
            except RingfenceError as error:
                refused[name] = str(error)
        said: dict[str, dict[str, str]] = {name: {} for name in places}
        facts: dict[str, dict[str, Any]] = {}
        bait = Holder(secrets.token_hex(3))
        try:
            for name, place in list(places.items()):
                tell(f"probes, {name}")
                with _given_up(name, places, refused):
                    facts[name], found = place.ask_all(_names(bait))
                    bait.check()
                    said[name].update(found)
        finally:
            bait.close()
        # When no mark of the caller's is left that could be taken for one of a sandbox's.
        for name, place in list(places.items()):
            tell(f"two at once, {name}")
            with _given_up(name, places, refused):
                said[name].update(place.ask_a_pair())
        for name, place in list(places.items()):
            tell(f"attacks, {name}")
            with _given_up(name, places, refused):
                said[name].update(place.attack())
        return {name: Seen(facts[name], said[name]) for name in places}, refused


@contextlib.contextmanager
def _given_up(name: str, places: dict[str, Place], refused: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except RingfenceError as error:
        if name == BARE:
            raise
        del places[name]
        refused[name] = str(error)


def catalogue() -> dict[str, dict[str, str]]:
    """What the probes are, by name, for json.dumps."""
    return {one.name: one.to_json() for one in PROBES}


def judge_all_probes(host_seen: Seen, inside: Seen | None, reason: str = "") -> dict[str, dict[str, str]]:
    """The verdicts by name, for json.dumps. reason: why nothing was seen inside, where inside is None."""
    if inside is None:
        none = Judged(Isolation.NOT_TESTABLE, f"no probe ran: {reason}", "")
        return {one.name: none.to_json() for one in PROBES}
    return {one.name: one.judge(host_seen, inside).to_json() for one in PROBES}
