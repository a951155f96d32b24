"""Random kills: callers of ringfence that run sandboxes of all kinds, and somebody who kills what they consist of.

A caller (`caller`, in a process of its own) runs sandboxes in several threads until its stdin ends, and tells what it
did not expect. A storm kills callers, launchers, inits and workloads with SIGKILL, at moments that a seed decides, and
looks for anything that is left once a caller has ended. As it is the subreaper of its callers, no process of theirs can
get out of its sight.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ringfence as rf
from ringfence.api import check_spec
from ringfence.spec import Spec
from support import leaks
from support.sandboxes import PROBE_FILE, SOURCES

# What is killed, and how often of a hundred times.
KINDS = {
    "caller": 10,
    "launcher": 16,
    "init": 32,
    "workload": 32,
    "launcher and init": 5,
    "launcher and caller": 5,
}
_CALLERS, _THREADS = 2, 4
# From an end to nothing being left; a machine that does other things at the same time gets more than the promised 2 s.
_GRACE_S = 6.0
_LONGEST_RUN_S = 20.0
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37

# ---- the caller ----


class Workload(NamedTuple):
    """A run of the probe, and what it prints where nobody kills it; None: it is ended by a limit."""

    argv: tuple[str, ...]
    printed: bytes | None
    options: dict[str, Any]


def _shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script)


def _workloads(host: rf.Host) -> list[Workload]:
    limits: dict[str, Any] = {}
    if all(host.cgroups.controller(name).usable for name in ("memory", "pids")):
        limits = {"memory": "64M", "pids": 24}
    # The workload of an unprivileged caller on an old kernel could stop the clock's keeper, so that limit is refused.
    timed = host.privileged or host.landlock_abi >= 6
    ended: dict[str, Any] = {"wall_time": 0.15} if timed else {}
    lasting = "60" if timed else "0.15"
    found = [
        Workload(("./probe", "exit", "0"), b"", {}),
        Workload(("./probe", "emit", "300000", "x"), b"x" * 300_000, {"limits": rf.Limits(**limits)}),
        Workload(("./probe", "cat"), b"y" * 400_000, {"input": b"y" * 400_000}),
        Workload(_shell("./probe orphan-exit 60 detached >/dev/null; echo gone"), b"gone\n", {}),
        Workload(("./probe", "stubborn", lasting), None if timed else b"ready\n", {"limits": rf.Limits(**ended)}),
        Workload(_shell("mkdir -p a/b/c && echo 1 >a/b/c/f && cat a/b/c/f"), b"1\n", {"collect": ["a/**"]}),
        Workload(
            _shell(f"./probe orphan {lasting} >/dev/null"), None if timed else b"", {"limits": rf.Limits(**ended)}
        ),
    ]
    if limits:
        found.append(Workload(("./probe", "forkbomb", "40"), None, {"limits": rf.Limits(**limits)}))
        cpu: dict[str, Any] = {"cpu_time": 0.1, **ended} if timed else {}
        found.append(Workload(("./probe", "spin", "0.2"), None, {"limits": rf.Limits(**limits, **cpu)}))
    return found


# What else a sandbox may have that could be left behind, where this host can give it.
_EXTRAS: tuple[dict[str, Any], ...] = (
    {"mounts": [rf.Mount("/usr/share", "/mnt/share")]},
    {"overlay": True},
    {"network": "nat"},
    {"mounts": [rf.Tmpfs("/scratch", "1M")]},
)


def _extras() -> list[dict[str, Any]]:
    found = []
    for options in _EXTRAS:
        try:
            check_spec(Spec.make(["true"], isolation="container", **options))
        except (rf.RingfenceError, TypeError):
            continue
        found.append(options)
    return found


class _Runner:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.ends: Counter[str] = Counter()
        self.unexpected: list[str] = []

    def thread(self, number: int) -> None:
        chance = random.Random(self.seed * _THREADS + number)
        workloads, extras = _workloads(rf.host()), _extras()
        while not self.stop.is_set():
            work, isolation = chance.choice(workloads), chance.choice(("process", "container"))
            options = dict(work.options)
            if isolation == "container" and chance.random() < 0.4:
                options |= chance.choice(extras)
            began = time.monotonic()
            how = self.one(work, isolation, options)
            took = time.monotonic() - began
            with self.lock:
                self.ends[how if len(how) < 40 else "unexpected"] += 1
                if len(how) >= 40 or took > _LONGEST_RUN_S:
                    self.unexpected.append(f"{isolation} {work.argv} after {took:.1f} s: {how}")

    def one(self, work: Workload, isolation: str, options: dict[str, Any]) -> str:
        """How a run ended, in a word or two; a longer text where that may not be, even if somebody kills."""
        try:
            result = rf.run(list(work.argv), isolation=isolation, files=PROBE_FILE, **options)
        except rf.ProtocolError:
            return "ProtocolError"
        except rf.StartError as error:
            return "StartError" if error.errno == 125 else f"it was not started, and that was not by a kill: {error}"
        except Exception as error:
            import traceback

            return f"{type(error).__name__}: {error}; {traceback.format_exc()}".replace("\n", " | ")
        reason = str(result.termination_reason)
        if result.ok and work.printed is not None and result.stdout != work.printed:
            shown = f"{len(result.stdout)} bytes, not {len(work.printed)}: {result.stdout[:60]!r}"
            return f"it ended well, and it printed something else, {shown}"
        return f"{reason} {result.exit_code}" if reason == "exited" else reason


def caller(seed: str, uid: str = "") -> None:
    """The main function of a caller. uid: which user it becomes first."""
    if uid:
        importlib.import_module("pyseccomp")  # from where that user may not be able to read
        os.setgroups([])
        os.setresgid(int(uid), int(uid), int(uid))
        os.setresuid(int(uid), int(uid), int(uid))
    runner = _Runner(int(seed))
    threads = [threading.Thread(target=runner.thread, args=(number,), daemon=True) for number in range(_THREADS)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    runner.stop.set()
    for thread in threads:
        thread.join(_LONGEST_RUN_S + 5)
    hung = sum(thread.is_alive() for thread in threads)
    # What stays open may not grow with the number of launchers that died.
    told = {"ends": runner.ends, "unexpected": runner.unexpected, "hung": hung, "fds": len(os.listdir("/proc/self/fd"))}
    print(json.dumps(told), flush=True)


# ---- the storm ----


def for_anybody(folder: Path, uid: int) -> None:
    """Puts ringfence and these tests where any user can read them, and makes a home for one."""
    for source in (SOURCES / "ringfence", Path(__file__).resolve().parent):
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | (0o555 if path.is_dir() or os.access(path, os.X_OK) else 0o444))
    (folder / "home").mkdir()
    os.chown(folder / "home", uid, uid)


@contextmanager
def subreaper() -> Iterator[None]:
    """Whoever loses its parent below this process becomes its child."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    assert libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0) == 0
    assert libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


class Caller:
    """A caller that runs. kills: how many of its parts were killed."""

    def __init__(self, seed: int, environment: dict[str, str], uid: int | None) -> None:
        self.seed = seed
        self.kills = self.launchers_killed = 0
        code = "import sys; from support import storm; storm.caller(*sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(seed), *([str(uid)] if uid else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.pid = self.process.pid
        leaks.callers.add(self.pid)


class Storm:
    """kills: what was killed, by kind. ends: how runs ended, by callers that could tell. left: what was found."""

    def __init__(self, seed: int, *, uid: int | None = None, folder: Path | None = None) -> None:
        """uid: of the callers, who then find ringfence and a home in `folder` (`for_anybody`)."""
        self.chance = random.Random(seed)
        self.uid = uid
        paths = [SOURCES, Path(__file__).resolve().parents[1]] if folder is None else [folder]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, *sys.path]))}
        if folder is not None:
            self.environment["HOME"] = str(folder / "home")
        self.callers: list[Caller] = []
        # Without ids of their own and without cgroups nothing is left that would tell what daemons belong to a
        # sandbox whose init and launcher were killed both (SECURITY.md).
        tied = uid is None
        self.kinds = {kind: weight for kind, weight in KINDS.items() if tied or kind != "launcher and init"}
        self.kills: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.left: list[str] = []
        self.unexpected: list[str] = []
        self.slowest_s = 0.0
        # How often something was only removed by the next process, as a launcher and its caller were both killed.
        self.swept = 0

    def run(self, kills: int, until: float = float("inf")) -> None:
        """That many kills, or as many as go until that moment (time.monotonic)."""
        self.before = {one.key for one in leaks.descendants(os.getpid())}
        with subreaper():
            try:
                while sum(self.kills.values()) < kills and time.monotonic() < until and not self.left:
                    while len(self.callers) < _CALLERS:
                        self.callers.append(Caller(self.chance.getrandbits(30), self.environment, self.uid))
                    self._strike(self.chance.choice(self.callers))
                while self.callers:
                    self._finish(self.callers[0])
            finally:
                for one in self.callers:
                    one.process.kill()
                    one.process.communicate()
                self._reap()

    def _strike(self, one: Caller) -> None:
        time.sleep(self.chance.choice((0.0, self.chance.random() * 0.02, self.chance.random() * 0.3)))
        kind = self.chance.choices(tuple(self.kinds), tuple(self.kinds.values()))[0]
        if kind == "caller":
            self._end(one, kind)
        elif kind == "launcher and caller":
            if found := self._victims(one, "launcher"):
                os.kill(found[0], signal.SIGKILL)
                one.launchers_killed += 1
                self._end(one, kind)
        elif found := self._victims(one, kind):
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    return
            self.kills[kind] += 1
            one.kills += 1
            one.launchers_killed += kind.startswith("launcher")
            if kind != "workload" and "launcher and init" not in self.kinds:
                time.sleep(0.2)  # the one ends what the other left, and is not to be killed meanwhile
            if one.kills >= 12:  # long enough for what adds up, and it can tell what it saw
                self._finish(one)

    def _end(self, one: Caller, kind: str) -> None:
        one.process.kill()
        one.process.communicate()
        self.kills[kind] += 1
        self._look_after(one, f"SIGKILL of the {kind}")

    def _victims(self, one: Caller, kind: str) -> list[int]:
        everyone = leaks.processes()
        launchers = [each for each in everyone.values() if each.parent == one.pid and each.name == "ringfence-core"]
        helpers = {each.pid for each in launchers}
        inits = [each for each in everyone.values() if each.parent in helpers and each.name == "ringfence-core"]
        above = {each.pid for each in inits}
        workloads = [each for each in everyone.values() if each.parent in above]
        if kind == "launcher and init":
            victims = [[a.pid, b.pid] for a in inits for b in launchers if a.parent == b.pid]
        else:
            victims = [[each.pid] for each in {"launcher": launchers, "init": inits, "workload": workloads}[kind]]
        return self.chance.choice(victims) if victims else []

    def _finish(self, one: Caller) -> None:
        """Has a caller end by itself, and hears what it has seen."""
        try:
            printed, _ = one.process.communicate(b"", timeout=60)
        except subprocess.TimeoutExpired:
            one.process.kill()
            printed, _ = one.process.communicate()
            self.unexpected.append(f"the caller with seed {one.seed} did not end")
        if one.process.returncode == 0:
            told = json.loads(printed)
            self.ends.update(told["ends"])
            self.unexpected += told["unexpected"]
            if told["hung"]:
                self.unexpected.append(f"{told['hung']} runs of the caller with seed {one.seed} hang")
            self.ends["fds at the end, most"] = max(self.ends["fds at the end, most"], told["fds"])
        else:
            self.unexpected.append(f"the caller with seed {one.seed} ended with {one.process.returncode}")
        self._look_after(one, f"its own end, {one.kills} kills")

    def _look_after(self, one: Caller, end: str) -> None:
        self.callers.remove(one)
        began = time.monotonic()
        left = leaks.settled(lambda: self._what_is_left(one), _GRACE_S if not one.launchers_killed else 1.0)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        if left and one.launchers_killed:
            # Nobody was there to remove it: the next Python process that uses ringfence has it removed.
            code = "import ringfence as rf; rf.run(['true'], isolation='process')"
            subprocess.run([sys.executable, "-c", code], env=self.environment, user=self.uid, check=True)
            left = self._what_is_left(one)
            self.swept += 1
        if left:
            self.left.append(f"after {end} (caller's seed {one.seed}, pid {one.pid}): {left}")

    def _what_is_left(self, one: Caller) -> list[str]:
        self._reap()
        living = {each.pid for each in self.callers}
        everyone = leaks.processes()
        me = os.getpid()
        found = []
        for each in everyone.values():
            above = leaks._ancestors(each, everyone)
            ours = any(parent.pid == me for parent in above) and each.key not in self.before
            if ours and each.pid not in living and not any(parent.pid in living for parent in above):
                found.append(str(each))
        return found + sorted(leaks.cgroups_of(one.pid) | leaks.run_folders_of(one.pid))

    def _reap(self) -> None:
        """Those that became our children by losing their parent, and have ended."""
        living = {each.pid for each in self.callers}
        for each in leaks.processes().values():
            if each.parent == os.getpid() and each.pid not in living:
                try:
                    os.waitpid(each.pid, os.WNOHANG)
                except ChildProcessError:
                    continue

    def report(self) -> str:
        ends = ", ".join(f"{count} {how}" for how, count in self.ends.most_common())
        kills = ", ".join(f"{count} {kind}" for kind, count in self.kills.most_common())
        gone = f"gone after {self.slowest_s:.2f} s at most, {self.swept} times by the next process"
        return f"{sum(self.kills.values())} kills: {kills}; {gone}; runs: {ends}"
