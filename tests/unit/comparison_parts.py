"""A comparison's document made by hand: small, and with everything in it that a document can have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ringfence.comparison import SCHEMA
from ringfence.comparison.statistics import summarize

MEASURES = ("startup_ns", "wall_ns", "teardown_ns", "total_ns", "cpu_ns", "memory_peak_bytes")
MACHINE: dict[str, Any] = {
    "date": "2026-05-01T10:00:00Z",
    "kernel": "6.1.0-1-amd64",
    "machine": "x86_64",
    "cpu_model": "A CPU of the Test",
    "cpus": 2,
    "nested": False,
    "memory_bytes": 8 << 30,
    "cgroups": "v2",
    "landlock_abi": 4,
    "privileged": True,
    "load": 0.1,
    "python": "3.11.2",
}


def a_run(start_ns: float = 1e6, **changes: Any) -> dict[str, Any]:
    return {
        "ending": "exit 0",
        "stdout_bytes": 3,
        "stderr_bytes": 0,
        "files": {},
        "startup_ns": start_ns,
        "wall_ns": 1e6,
        "teardown_ns": 2e5,
        "total_ns": start_ns + 12e5,
        "cpu_ns": 1e6,
        "memory_peak_bytes": 1 << 20,
        "source": "cgroup v2",
        **changes,
    }


def starts(median_ns: float, count: int = 20, seed: int = 1) -> list[float]:
    """So many samples around a median, of 5 % to each side."""
    chance = random.Random(seed)
    return [median_ns * chance.uniform(0.95, 1.05) for _ in range(count)]


def a_level(name: str, start_ns: Sequence[float] = (), **changes: Any) -> dict[str, Any]:
    runs = [a_run(one) for one in (start_ns or starts(1e6))]
    found: dict[str, Any] = {
        "name": name,
        "unavailable": None,
        "help": None,
        "accelerator": "tcg" if name == "vm" else None,
        "differences": [],
        "varies": False,
        "isolation": {},
        "probes": {},
        "surface": None,
        "measures": {},
        "memory_source": "cgroup v2",
        "runs": runs,
        "facts": {},
        **changes,
    }
    found["costs"] = {}
    for measure in MEASURES:
        summary = summarize([one[measure] for one in found["runs"]])
        found["costs"][measure] = summary.to_json() if summary else None
    return found


def gone(name: str, why: str = "no such thing here") -> dict[str, Any]:
    """A level that didn't run."""
    return {**a_level(name), "unavailable": why, "help": "get it", "runs": [], "costs": dict.fromkeys(MEASURES)}


def verdict(word: str, evidence: str = "as it was seen") -> dict[str, Any]:
    return {"verdict": word, "evidence": evidence}


def tried(word: str, evidence: str = "kill EPERM") -> dict[str, Any]:
    return {**verdict(word, evidence), "control": "kill ok"}


def surface(**calls: str) -> dict[str, Any]:
    counts = {kind: sum(one.split()[0] == kind for one in calls.values()) for kind in ("reachable", "denied", "absent")}
    return {**counts, "calls": calls}


def measured(samples: Sequence[float], ratio: float | None = None, **changes: Any) -> dict[str, Any]:
    summary = summarize(samples)
    return {
        "summary": summary.to_json() if summary else None,
        "samples": list(samples),
        "ratio": ratio,
        "low": None if ratio is None else ratio * 0.9,
        "high": None if ratio is None else ratio * 1.1,
        "source": "built in",
        "unavailable": None,
        **changes,
    }


def a_document(*levels: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """With the levels given behind the bare one, or with one of each kind."""
    return {
        "schema": SCHEMA,
        "ringfence": "0.1.0",
        "argv": ["true"],
        "machine": dict(MACHINE),
        "identical": True,
        "complete": True,
        "probes": {
            "kill-host": {"group": "signals", "tries": "Signals the caller.", "why": "It could end it."},
            "ptrace-host": {"group": "signals", "tries": "Traces the caller.", "why": "It could steer it."},
            "read-shadow": {"group": "files", "tries": "Reads /etc/shadow.", "why": "Hashes are in it."},
        },
        "measures": {
            "getpid": {"group": "kernel", "what": "A system call.", "unit": "ns", "better": "lower"},
            "memcpy": {"group": "memory", "what": "A copy.", "unit": "bytes_per_second", "better": "higher"},
        },
        "levels": [a_level("bare"), *(levels or usual_levels())],
        **changes,
    }


def usual_levels() -> list[dict[str, Any]]:
    words = {"process": "restricted", "container": "own", "vm": "own"}
    times = {"process": 2e6, "container": 3e6, "vm": 9e7}
    return [
        a_level(
            name,
            starts(times[name]),
            isolation={"kernel": verdict("own" if name == "vm" else "shared"), "signals": verdict(word)},
            probes={"kill-host": tried(word), "ptrace-host": tried(word), "read-shadow": tried("not testable")},
            surface=surface(getpid="reachable", bpf="denied EPERM", io_uring_setup="absent"),
            measures={"getpid": measured(starts(100.0), 1.5), "memcpy": measured(starts(1e9), 0.9)},
        )
        for name, word in words.items()
    ]
