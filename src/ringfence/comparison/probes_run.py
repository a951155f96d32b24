"""Making the probes: without any boundary, then inside each level, then in two sandboxes of each level at once."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import tempfile

from ringfence.api import level
from ringfence.comparison.facts import ATTEMPTS
from ringfence.comparison.isolation import Isolation
from ringfence.comparison.probes import Judged, Seen
from ringfence.comparison.probes_catalogue import MEMORY_LIMIT, PIDS_LIMIT, PROBES
from ringfence.errors import ProtocolError, RingfenceError
from ringfence.levels.host import host
from ringfence.sandbox import Sandbox
from ringfence.spec import DEFAULT_ENV, File, Limits, Spec
from ringfence.wire.launcher import probe_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

    # Runs the probe with these words and this stdin; what it printed, and how it ended where not by itself, or "".
    Ask = Callable[[Sequence[str], bytes], tuple[bytes, str]]

__all__ = ["BARE", "Bait", "catalogue", "judge_all_probes", "look", "probe_file", "probe_limits", "told"]

BARE = "bare"
_PROBE = "ringfence-probe"
_DISK_LIMIT = 32 << 20
# Longer than all probes of all levels take.
_HELD_SECONDS = 120
# An attempt's own limit; a guest under emulation is slow.
_EACH_SECONDS = 20
_INSIDE = tuple(dict.fromkeys(one.way.attempt for one in PROBES if one.way.attempt and one.way.where == "inside"))
_ALONE = tuple(one.way.attempt for one in PROBES if one.way.where == "alone")
_PAIR = tuple(one.way.attempt for one in PROBES if one.way.where == "pair")


class Bait:
    """What is outside for the probes to find: a process of ours that holds marks, until it is closed."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.process = subprocess.Popen(
            [probe_path(), "hold", token, str(_HELD_SECONDS)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**dict(DEFAULT_ENV)},
        )
        self.marks: dict[str, str] = {}
        assert self.process.stdout is not None
        for line in self.process.stdout:
            name, _, said = line.decode().strip().partition(" ")
            if name == "pid":
                break
            self.marks[name] = said

    def names(self) -> dict[str, str]:
        """What stands in the attempts' lines."""
        return {"victim": str(self.process.pid), "host": self.token, "disk": _root_device(), "cgroup": _cgroup_top()}

    def close(self) -> None:
        """Ends it; it removes what it has set."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


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


def probe_file() -> File:
    """The probe, as a file of a work directory."""
    with open(probe_path(), "rb") as file:
        return File(file.read(), 0o755)


def probe_limits(name: str) -> Limits:
    """Of the sandbox that probes run in, as far as this level can enforce them on this host."""
    boundary, machine = level(name), host()
    kept: dict[str, Any] = {}
    for rule, limit in (("memory", MEMORY_LIMIT), ("pids", PIDS_LIMIT), ("disk", _DISK_LIMIT)):
        try:
            boundary.check(Spec.make(["-"], isolation=name, limits=Limits(**kept, **{rule: limit})), machine)
        except RingfenceError:
            continue
        kept[rule] = limit
    return Limits(**kept)


def look(names: Iterable[str], tell: Callable[[str], None]) -> tuple[dict[str, Seen], dict[str, str]]:
    """(what was seen, by column; why a level gave nothing). The bare column is always there."""
    refused: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        places: dict[str, _Place] = {BARE: stack.enter_context(_bare())}
        for name in names:
            try:
                places[name] = stack.enter_context(_sandbox(name))
            except RingfenceError as error:
                refused[name] = str(error)
        said: dict[str, dict[str, str]] = {name: {} for name in places}
        facts: dict[str, dict[str, Any]] = {}
        bait = Bait(secrets.token_hex(3))
        try:
            for name, place in list(places.items()):
                tell(f"probes, {name}")
                with _given_up(name, places, refused):
                    facts[name], found = place.ask_all(bait.names())
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
def _given_up(name: str, places: dict[str, _Place], refused: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except RingfenceError as error:
        if name == BARE:
            raise
        del places[name]
        refused[name] = str(error)


def told(output: bytes, lines: Sequence[str]) -> list[str]:
    """What each line's attempt printed. Raises ProtocolError where there isn't one for each."""
    found = output.decode("utf-8", "replace").splitlines()
    if len(found) != len(lines):
        raise ProtocolError(f"the probe printed {len(found)} lines for {len(lines)} attempts: {found[-1:]}")
    return [one.strip() for one in found]


class _Place:
    """Where attempts are made. second: in another sandbox of the same kind."""

    def __init__(self, ask: Ask, second: Ask) -> None:
        self._ask, self._second = ask, second

    def _each(self, ask: Ask, lines: Sequence[str]) -> list[str]:
        printed, ended = ask(["each", str(_EACH_SECONDS)], "".join(f"{line}\n" for line in lines).encode())
        if ended:
            raise ProtocolError(f"the probe ended by {ended}")
        return told(printed, lines)

    def ask_all(self, names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        lines = ["facts", *(attempt.format(**names) for attempt in _INSIDE)]
        first, *rest = self._each(self._ask, lines)
        try:
            facts = json.loads(first)
        except ValueError:
            raise ProtocolError(f"the probe printed no facts but {first[:80]!r}") from None
        said = dict(zip(_INSIDE, rest, strict=True))
        facts["attempts"] = {name: said[line] for name, line in ATTEMPTS if line in said}  # as the summary has them
        return facts, said

    def ask_a_pair(self) -> dict[str, str]:
        token = secrets.token_hex(3)
        printed, ended = self._ask(["hold", token, str(_HELD_SECONDS), "background"], b"")
        if ended:
            raise ProtocolError(f"the probe that holds marks ended by {ended}")
        lines = [line.partition(" ") for line in printed.decode("utf-8", "replace").splitlines()]
        held = {f"hold {name}": said for name, _, said in lines if name != "pid"}
        found = self._each(self._second, [attempt.format(pair=token) for attempt in _PAIR])
        return held | dict(zip(_PAIR, found, strict=True))

    def attack(self) -> dict[str, str]:
        said = {}
        for attempt in _ALONE:
            printed, ended = self._ask(attempt.split(), b"")
            said[attempt] = f"ended by {ended}" if ended else printed.decode("utf-8", "replace").strip()
        return said


@contextlib.contextmanager
def _bare() -> Iterator[_Place]:
    """Without any boundary: as children of this process, each in a directory of its own."""
    holders: list[int] = []
    with tempfile.TemporaryDirectory(prefix="ringfence-bare-") as folder:

        def ask(words: Sequence[str], given: bytes) -> tuple[bytes, str]:
            done = subprocess.run(
                [probe_path(), *words],
                cwd=folder,
                env={**dict(DEFAULT_ENV), b"HOME": os.fsencode(folder)},
                input=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=False,
            )
            for line in done.stdout.splitlines() if words[0] == "hold" else ():
                if line.startswith(b"pid "):
                    holders.append(os.pidfd_open(int(line[4:])))
            return done.stdout, f"signal {-done.returncode}" if done.returncode < 0 else ""

        try:
            yield _Place(ask, ask)
        finally:
            for holder in holders:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(holder, signal.SIGTERM)
                os.close(holder)


@contextlib.contextmanager
def _sandbox(name: str) -> Iterator[_Place]:
    """Two sandboxes of that level, the second opened when it is needed. Raises what `Sandbox` raises."""
    file = probe_file()
    with contextlib.ExitStack() as stack:

        def opened() -> Sandbox:
            sandbox = stack.enter_context(Sandbox(isolation=name, limits=probe_limits(name)))
            sandbox.write_file(_PROBE, file.data, 0o755)
            return sandbox

        def ask_in(sandbox: Sandbox, words: Sequence[str], given: bytes) -> tuple[bytes, str]:
            done = sandbox.run([f"./{_PROBE}", *words], input=given)
            return done.stdout, "" if done.exit_code is not None else done.describe()

        first = opened()
        others: list[Sandbox] = []

        def second(words: Sequence[str], given: bytes) -> tuple[bytes, str]:
            if not others:
                others.append(opened())
            return ask_in(others[0], words, given)

        yield _Place(lambda words, given: ask_in(first, words, given), second)


def catalogue() -> dict[str, dict[str, str]]:
    """What the probes are, by name, for json.dumps."""
    return {one.name: one.to_json() for one in PROBES}


def judge_all_probes(host_seen: Seen, inside: Seen | None, reason: str = "") -> dict[str, dict[str, str]]:
    """The verdicts by name, for json.dumps. reason: why nothing was seen inside, where inside is None."""
    if inside is None:
        none = Judged(Isolation.NOT_TESTABLE, f"no probe ran: {reason}", "")
        return {one.name: none.to_json() for one in PROBES}
    return {one.name: one.judge(host_seen, inside).to_json() for one in PROBES}
