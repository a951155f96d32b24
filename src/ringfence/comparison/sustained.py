"""`ringfence bench --sustained`: many starts in a row and at once, many sandboxes that idle, and what of it adds up.

`rates`: launches per second, back to back and two at a time, against bubblewrap and crun. `idle`: what sandboxes cost
that only wait, and how long it takes to start and to end all of them, in order or by a SIGKILL of their caller.
`endurance`: whether a start costs as much after thousands of them, and what of a process, of the launcher or of the
kernel grows.

What is to be timed runs in processes of their own (`python -m` this module), so that each tool has the same caller.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from ringfence.api import level, run
from ringfence.comparison import child
from ringfence.comparison.machine import machine_facts
from ringfence.comparison.peers import bubblewrap
from ringfence.comparison.statistics import percentile
from ringfence.levels.host import host
from ringfence.spec import Limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

__all__ = ["endurance", "growth", "idle", "lines", "measure", "rates"]

_TRUE = ["/usr/bin/true"]
_LIMITS = Limits(memory="256M", pids=64)
_TOOLS = ("subprocess", "process", "container", "bwrap", "crun")
_BLOCK = 100
_SETTLE_S = 1.0
# What the kernel keeps of a namespace, of a cgroup, of a mount: by the names of its slabs.
_SLABS = ("net_namespace", "pid_namespace", "user_namespace", "mem_cgroup", "mnt_cache", "nsproxy")

# ---- launches per second ----


def rates(
    count: int = 2000, tools: tuple[str, ...] = _TOOLS, tell: Callable[[str], None] | None = None
) -> dict[str, dict[str, Any]]:
    """By tool and by how many at a time ("container, 2 at a time"): launches per second of each block, nanoseconds of
    each launch. The tools take turns, a block of 100 each. "skipped": why one is missing.
    """
    found: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringfence-bench-"))
        os.chmod(folder, 0o711)
        children: dict[str, Callable[..., Any]] = {}
        for tool in tools:
            try:
                children[tool] = stack.enter_context(_child("rate", tool, folder))
            except OSError as error:
                found[tool] = {"skipped": str(error)}
        for turn in range(max(1, count // _BLOCK)):
            if tell is not None:
                tell(f"sustained: {turn * _BLOCK} of {count} launches")
            for ways in (1, 2):
                for tool, ask in children.items():
                    seconds, samples = ask(min(_BLOCK, count), ways)
                    row = found.setdefault(f"{tool}, {ways} at a time", {"per_second": [], "samples_ns": []})
                    row["per_second"].append(round(len(samples) / seconds, 1))
                    row["samples_ns"] += samples
    return found


def _rate_child(tool: str, folder: str) -> None:
    start = _start_of(tool, folder)
    start()
    print("ready", flush=True)
    for line in sys.stdin:
        count, ways = json.loads(line)
        samples: list[int] = []

        def loop(times: int, into: list[int] = samples) -> None:
            for _ in range(times):
                began = time.perf_counter_ns()
                start()
                into.append(time.perf_counter_ns() - began)

        threads = [threading.Thread(target=loop, args=(count // ways,)) for _ in range(ways)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(json.dumps([time.perf_counter() - began, samples]), flush=True)


def _start_of(tool: str, folder: str) -> Callable[[], object]:
    if tool in ("process", "container"):
        return lambda: run(_TRUE, isolation=tool, limits=_LIMITS, check=True)
    if tool == "bwrap":
        # One filter's descriptor for each thread: its position is shared.
        own = threading.local()

        def start() -> None:
            if not hasattr(own, "peer"):
                own.peer = bubblewrap(_TRUE, tempfile.mkdtemp(dir=folder))
            if own.peer.start is None:
                raise OSError(own.peer.reason)
            own.peer.start()

        return start
    if tool == "crun":
        from ringfence.comparison import _starter

        return _starter._crun(0, folder)
    return lambda: subprocess.run(_TRUE, stdin=subprocess.DEVNULL, capture_output=True, check=True)


# ---- sandboxes that idle ----


def idle(count: int = 1000, isolation: str = "container", tell: Callable[[str], None] | None = None) -> dict[str, Any]:
    """What that many sandboxes cost which run `sleep`: bytes each of the whole machine and of our own processes; the
    seconds to start all, to end all, and until nothing is left once their caller was killed by SIGKILL.
    """
    told: dict[str, Any] = {"count": count, "isolation": isolation}
    if tell is not None:
        tell(f"idle: {count} sandboxes ({isolation})")
    with _child("idle", isolation, "") as ask:
        told |= ask("start", count)
        told |= ask("end", 0)
    with _child("idle", isolation, "") as ask:
        ask("start", count)
        pid = int(ask("pid", 0)["pid"])
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        while _left_of(pid):
            time.sleep(0.01)
            if time.monotonic() - began > 120:
                raise OSError(f"{_left_of(pid)} are left of a killed caller")
        told["killed_s"] = round(time.monotonic() - began, 3)
    return told


def _left_of(pid: int) -> list[str]:
    """What a caller that is gone has left: its run folder, and its cgroups."""
    from ringfence.levels.state import state

    prefix = b"ringfence-%d-" % pid
    owned = {parent for _, parent, _ in state()._owned}
    return [os.fsdecode(one) for fd in owned for one in map(os.fsencode, os.listdir(fd)) if one.startswith(prefix)]


def _idle_child(isolation: str) -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    run(_TRUE, isolation=isolation, limits=_LIMITS, check=True)
    open_now: list[Any] = []
    print("ready", flush=True)
    for line in sys.stdin:
        what, count = json.loads(line)
        if what == "pid":
            print(json.dumps({"pid": os.getpid()}), flush=True)
        elif what == "start":
            print(json.dumps(_start_idle(open_now, isolation, count)), flush=True)
        else:
            began = time.monotonic()
            while open_now:
                open_now.pop().close()
            print(json.dumps({"end_s": round(time.monotonic() - began, 3)}), flush=True)


def _start_idle(open_now: list[Any], isolation: str, count: int) -> dict[str, Any]:
    before, rss = _memory(), _rss(os.getpid())
    began = time.monotonic()
    for _ in range(count):
        open_now.append(_sleeping(isolation))
    seconds = time.monotonic() - began
    time.sleep(_SETTLE_S)
    after = _memory()
    below = _descendants(os.getpid())
    launcher = [pid for pid in below if _parent(pid) == os.getpid()]
    inits = [pid for pid in below if _parent(pid) in launcher]
    sleeps = [pid for pid in below if pid not in launcher and pid not in inits]
    return {
        "start_s": round(seconds, 3),
        "each_bytes": {name: round((after[name] - before[name]) / count) for name in before},
        "init_pss_bytes": round(sum(map(_pss, inits)) / count),
        "command_pss_bytes": round(sum(map(_pss, sleeps)) / count),
        "launcher_pss_bytes": sum(map(_pss, launcher)),
        "caller_bytes_each": round((_rss(os.getpid()) - rss) / count),
        "descriptors_each": round(len(os.listdir("/proc/self/fd")) / count, 1),
        "processes": len(below),
    }


def _sleeping(isolation: str) -> Any:
    """A sandbox whose command sleeps, once it does."""
    import select

    from ringfence.levels.drive import Pipes
    from ringfence.spec import Spec
    from ringfence.wire import messages
    from ringfence.wire.frames import Type

    spec = Spec.make(["/usr/bin/sleep", "3600"], isolation=isolation, limits=_LIMITS)
    sandbox: Any = level(isolation).open(spec, host())
    pipes = Pipes(None, sandbox.state.null)
    try:
        home = sandbox.home
        request = messages.execute(
            spec.argv, spec.environment(home), home, id=1, once=True, streams=False, nfds=len(pipes.child)
        )
        sandbox.channel.send(request, pipes.child)
        poll = select.poll()
        poll.register(sandbox.channel.fileno(), select.POLLIN)
        while poll.poll(30_000):
            for frame in sandbox.channel.receive():
                if frame.type == Type.STARTED:
                    return sandbox
                if frame.type == Type.ERROR:
                    raise messages.parse_error(frame.payload)
                sandbox.take(frame)
        raise OSError("a sandbox did not start in 30 s")
    finally:
        pipes.close()


def _memory() -> dict[str, int]:
    """Bytes: what can't be had any more, and the part of it that is the kernel's own."""
    found: dict[str, int] = {}
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            name, value = line.split(":")
            found[name] = int(value.split()[0]) * 1024
    kernel = sum(found[name] for name in ("SUnreclaim", "KernelStack", "PageTables", "Percpu"))
    return {"machine": found["MemTotal"] - found["MemAvailable"], "kernel": kernel}


def _rss(pid: int) -> int:
    with open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _pss(pid: int) -> int:
    """0 where it may not be read, or is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:")), 0)
    except OSError:
        return 0


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def _descendants(pid: int) -> list[int]:
    parents = {int(name): _parent(int(name)) for name in os.listdir("/proc") if name.isdecimal()}
    found = [pid]
    for above in found:
        found += [one for one, parent in parents.items() if parent == above]
    return found[1:]


# ---- what adds up ----


def growth() -> dict[str, int]:
    """What may grow with the number of starts, by name: bytes of this process and of the launcher, descriptors of both,
    cgroups that the kernel still has, dying ones of version 2, objects of the kernel's slabs (root may read those).
    """
    from ringfence.wire.launcher import launcher

    helper = launcher().pid
    found = {"rss": _rss(os.getpid()), "launcher rss": _rss(helper), "descriptors": len(os.listdir("/proc/self/fd"))}
    with contextlib.suppress(OSError):
        found["launcher descriptors"] = len(os.listdir(f"/proc/{helper}/fd"))
    with contextlib.suppress(OSError), open("/proc/cgroups", encoding="ascii") as file:
        for line in file:
            name, _, number, _ = line.split()
            if name in ("memory", "pids", "cpu", "cpuacct"):
                found[f"cgroups {name}"] = int(number)
    with contextlib.suppress(OSError, AttributeError), open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        unified = next((line.split()[4] for line in mounts if " - cgroup2 " in line), "")
        with open(f"{unified}/cgroup.stat", encoding="ascii") as file:
            dying = re.search(r"nr_dying_descendants (\d+)", file.read())
            found["dying cgroups"] = int(dying[1]) if dying else 0
    with contextlib.suppress(OSError), open("/proc/slabinfo", encoding="ascii") as file:
        for line in file:
            words = line.split()
            if words[0] in _SLABS:
                found[f"slab {words[0]}"] = int(words[1])
    return found


def endurance(
    count: int = 10_000,
    isolation: str = "container",
    *,
    steps: int = 10,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """That many starts in a row, in `steps` parts: of each part p50 and p99 in ns, and `growth` before and after it."""
    rows: list[dict[str, Any]] = []
    for _ in range(min(100, count // steps)):
        run(_TRUE, isolation=isolation, limits=_LIMITS, check=True)
    before = _settled()
    for part in range(steps):
        if tell is not None:
            tell(f"endurance, {isolation}: {part * count // steps} of {count} launches")
        samples = []
        for _ in range(count // steps):
            began = time.perf_counter_ns()
            run(_TRUE, isolation=isolation, limits=_LIMITS, check=True)
            samples.append(time.perf_counter_ns() - began)
        rows.append({"p50_ns": percentile(samples, 50), "p99_ns": percentile(samples, 99), "growth": _settled()})
    return {"count": count, "isolation": isolation, "before": before, "parts": rows}


def _settled() -> dict[str, int]:
    time.sleep(_SETTLE_S)  # namespaces and cgroups are freed late, by workers of the kernel
    return growth()


# ---- telling ----


def lines(found: dict[str, Any]) -> list[str]:
    """What `measure` found, for people."""
    told = []
    for name, row in found["rates"].items():
        if "skipped" in row:
            told.append(f"{name}: {row['skipped']}")
            continue
        rate, samples = statistics.median(row["per_second"]), row["samples_ns"]
        p50, p99 = percentile(samples, 50) / 1e6, percentile(samples, 99) / 1e6
        told.append(f"{name}: {rate:.0f} launches a second (p50 {p50:.2f} ms, p99 {p99:.2f} ms, n {len(samples)})")
    for one in found["idle"]:
        parts = {
            "the kernel's": one["each_bytes"]["kernel"],
            "init's": one["init_pss_bytes"],
            "the command's": one["command_pss_bytes"],
            "the caller's": one["caller_bytes_each"],
        }
        shown = ", ".join(f"{whose} {count / 1024:.0f}" for whose, count in parts.items())
        told.append(
            f"{one['count']} idle sandboxes, {one['isolation']}: {one['each_bytes']['machine'] / 1024:.0f} KiB each "
            f"({shown}); started in {one['start_s']:.2f} s, ended in {one['end_s']:.2f} s, "
            f"gone {one['killed_s']:.2f} s after a SIGKILL of the caller"
        )
    for one in found["endurance"]:
        first, last = one["parts"][0], one["parts"][-1]
        spans = [f"{part[key] / 1e6:.2f} ms" for key in ("p50_ns", "p99_ns") for part in (first, last)]
        told.append(
            f"{one['count']} starts in a row, {one['isolation']}: p50 {spans[0]} at first, {spans[1]} in the end; "
            f"p99 {spans[2]}, {spans[3]}"
        )
        grown = {name: last["growth"][name] - value for name, value in one["before"].items()}
        told.append("  more than before: " + ", ".join(f"{name} {value:+}" for name, value in grown.items()))
    return told


# ---- all of it ----


def measure(count: int = 2000, tell: Callable[[str], None] | None = None) -> dict[str, Any]:
    """All three, for json.dumps: `count` launches by each tool, half as many idle sandboxes, five times as many in a
    row.

    Raises what `run` raises, and OSError.
    """
    return {
        "machine": machine_facts(),
        "rates": rates(count, tell=tell),
        "idle": [idle(max(1, count // 2), isolation, tell) for isolation in ("process", "container")],
        "endurance": [endurance(5 * count, isolation, tell=tell) for isolation in ("process", "container")],
    }


@contextlib.contextmanager
def _child(kind: str, what: str, folder: str) -> Iterator[Callable[..., Any]]:
    """A process of this module, which answers a line of JSON by one. Raises OSError with its reason where it can't."""
    with child.answering(child.module("sustained", kind, what, folder)) as ask:
        yield lambda *words: json.loads(ask(json.dumps(words)))


def main() -> int:
    kind, what, folder = sys.argv[1:]
    try:
        if kind == "rate":
            _rate_child(what, folder)
        else:
            _idle_child(what)
    except Exception as error:
        # One line, whatever it was: the parent tells it as the reason.
        print(f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
