"""Where probes are made: without any boundary, or inside a level; the same lines of attempts everywhere."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import tempfile

from ringfence.api import level
from ringfence.comparison.facts import ATTEMPTS, check_namespaces
from ringfence.comparison.probes_catalogue import MEMORY_LIMIT, PIDS_LIMIT, PROBES
from ringfence.errors import ProtocolError, RingfenceError
from ringfence.levels.host import host
from ringfence.sandbox import Sandbox
from ringfence.spec import DEFAULT_ENV, File, Limits, Spec
from ringfence.wire.launcher import probe_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from typing import Any

    # Runs the probe with these words and this stdin; what it printed, and how it ended where not by itself, or "".
    Ask = Callable[[Sequence[str], bytes], tuple[bytes, str]]

__all__ = ["Holder", "Place", "bare_place", "probe_file", "probe_limits", "sandbox_place", "told"]

_PROBE = "ringfence-probe"
_DISK_LIMIT = 16 << 20
# Far longer than all probes of all levels take; what holds marks outside ends with us anyway.
_HELD_SECONDS = 900
# So much is taken without a limit only where far more is free.
_MEMORY_TO_SPARE = 1 << 30
# An attempt's own limit; a guest under emulation is slow.
_EACH_SECONDS = 20
_INSIDE = tuple(dict.fromkeys(one.way.attempt for one in PROBES if one.way.attempt and one.way.where == "inside"))
_ALONE = tuple(one.way.attempt for one in PROBES if one.way.where == "alone")
_PAIR = tuple(one.way.attempt for one in PROBES if one.way.where == "pair")


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


def told(output: bytes, lines: Sequence[str]) -> list[str]:
    """What each line's attempt printed. Raises ProtocolError where there isn't one for each."""
    found = output.decode("utf-8", "replace").splitlines()
    if len(found) != len(lines):
        raise ProtocolError(f"the probe printed {len(found)} lines for {len(lines)} attempts: {found[-1:]}")
    return [one.strip() for one in found]


def _free_memory() -> int:
    """What the host could give now; 0 where that can't be told."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0


class Holder:
    """A process of ours, without any boundary, that holds marks until it is closed. It ends with us, too."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.process = subprocess.Popen(
            [probe_path(), "hold", token, str(_HELD_SECONDS)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=dict(DEFAULT_ENV),
            start_new_session=True,  # what ends us by the terminal leaves it the time to remove what it has set
        )
        # What it has set, a line each, and its pid.
        self.said = b""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if line.startswith(b"pid "):
                break

    def check(self) -> None:
        """Raises ProtocolError where it has ended: then what wasn't found shows nothing."""
        if self.process.poll() is not None:
            raise ProtocolError("what holds marks outside had ended before the probes")

    def close(self) -> None:
        """Ends it; it removes what it has set."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Place:
    """Where attempts are made. second: in another sandbox of the same kind. level: "bare" or a level of ours, "" for
    another tool's sandbox. limited: whether it was given limits, as far as it takes any; kept: the rules of those that
    are in force, which may grow as it is asked. same: asks where the holder of a pair's marks is, if `ask` doesn't.
    """

    def __init__(
        self,
        ask: Ask,
        second: Ask,
        *,
        level: str = "",
        limited: bool = True,
        kept: Collection[str] = (),
        same: Ask | None = None,
    ) -> None:
        self._ask, self._second, self._same = ask, second, same or ask
        self.level, self._limited, self._kept = level, limited, kept

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
        facts["limited"] = self._limited
        facts["level"] = self.level
        facts["kept"] = sorted(self._kept)
        facts["attempts"] = {name: said[line] for name, line in ATTEMPTS if line in said}  # as the summary has them
        return facts, said

    def ask_a_pair(self) -> dict[str, str]:
        """By "hold MARK", "same MARK" (the find in the sandbox that holds it) and the attempt's line."""
        token = secrets.token_hex(3)
        printed, ended = self._ask(["hold", token, str(_HELD_SECONDS), "background"], b"")
        if ended:
            raise ProtocolError(f"the probe that holds marks ended by {ended}")
        lines = [line.partition(" ") for line in printed.decode("utf-8", "replace").splitlines()]
        held = {f"hold {name}": said for name, _, said in lines if name != "pid"}
        attempts = [attempt.format(pair=token) for attempt in _PAIR]
        found = self._each(self._second, attempts)
        # After the other: what is found here now was there all the time.
        same = self._each(self._same, attempts)
        held |= {f"same {attempt.split()[1]}": said for attempt, said in zip(_PAIR, same, strict=True)}
        return held | dict(zip(_PAIR, found, strict=True))

    def attack(self) -> dict[str, str]:
        said = {}
        for attempt in _ALONE:
            if attempt.startswith("try-memory") and "memory" not in self._kept and _free_memory() < _MEMORY_TO_SPARE:
                said[attempt] = "not tried: no limit holds it, and less than 1 GiB of memory is free"
                continue
            printed, ended = self._ask(attempt.split(), b"")
            said[attempt] = f"ended by {ended}" if ended else printed.decode("utf-8", "replace").strip()
        return said


@contextlib.contextmanager
def bare_place() -> Iterator[Place]:
    """Without any boundary: as children of this process, each in a directory of its own."""
    holders: list[Holder] = []
    with tempfile.TemporaryDirectory(prefix="ringfence-bare-") as folder:

        def ask(words: Sequence[str], given: bytes) -> tuple[bytes, str]:
            if words[0] == "hold":
                holders.append(Holder(words[1]))
                return holders[-1].said, ""
            done = subprocess.run(
                [probe_path(), *words],
                cwd=folder,
                env={**dict(DEFAULT_ENV), b"HOME": os.fsencode(folder)},
                input=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=False,
            )
            return done.stdout, f"signal {-done.returncode}" if done.returncode < 0 else ""

        try:
            yield Place(ask, ask, level="bare")
        finally:
            for holder in holders:
                holder.close()


@contextlib.contextmanager
def sandbox_place(name: str) -> Iterator[Place]:
    """Two sandboxes of that level, the second opened when it is needed. Raises what `Sandbox` raises, and
    RingfenceError where the caller isn't where they are made (`facts.check_namespaces`).
    """
    check_namespaces()
    file = probe_file()
    kept: set[str] = set()
    with contextlib.ExitStack() as stack:

        def opened() -> Sandbox:
            sandbox = stack.enter_context(Sandbox(isolation=name, limits=probe_limits(name)))
            sandbox.write_file(_PROBE, file.data, 0o755)
            return sandbox

        def ask_in(sandbox: Sandbox, words: Sequence[str], given: bytes) -> tuple[bytes, str]:
            done = sandbox.run([f"./{_PROBE}", *words], input=given)
            kept.update(one.rule for one in done.applied if one.effective is not None)
            return done.stdout, "" if done.exit_code is not None else done.describe()

        first = opened()
        others: list[Sandbox] = []

        def second(words: Sequence[str], given: bytes) -> tuple[bytes, str]:
            if not others:
                others.append(opened())
            return ask_in(others[0], words, given)

        yield Place(lambda words, given: ask_in(first, words, given), second, level=name, kept=kept)
