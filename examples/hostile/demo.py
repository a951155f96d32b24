"""Runs the hostile job bare and at every isolation level, and prints which attempt succeeded where.

    python examples/hostile/demo.py [LEVEL…]

The runner plants what the job is after: a victim process with a mark in its memory and one in its
environment, a secret file, a listener on 127.0.0.1. Where the truth can be seen from outside (the signal
arrived, the folder changed, the listener was called, the daemon is alive), that decides, not the job's word.

Exit status 0: each attempt works bare, and none in a sandbox. 1: otherwise, or a level could not run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

JOB = Path(__file__).with_name("job.py")
PYTHON = "/usr/bin/python3"
LEVELS = ("process", "container", "vm")
COLUMNS = ("bare", *LEVELS)
WALL_SECONDS = 60
# What an unprivileged caller can't do even bare, and what a process of the same user may read.
NEEDS_ROOT = {"change the host name", "change the clock"}
SAME_USER_MAY = {("process", "read a secret file of the caller")}

VICTIM = """
import sys, time
mark = bytearray(sys.stdin.buffer.readline().strip())
print("ready", flush=True)
time.sleep(600)
"""


class Verdict(NamedTuple):
    succeeded: bool
    evidence: str


class Run(NamedTuple):
    """One column of the table: the verdicts, or why there are none."""

    verdicts: dict[str, Verdict]
    reason: str | None


def new_mark(kind: str) -> str:
    return f"ringfence-{kind}-{secrets.token_hex(16)}"


def digest(mark: str) -> str:
    return hashlib.sha256(mark.encode()).hexdigest()


def pids_marked(mark: str) -> list[int]:
    """Processes with the mark in their arguments, as seen from outside."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0"):
                    found.append(int(name))
    return found


def end_marked(mark: str) -> list[int]:
    """Kills the daemon, held by pidfd so that a reused pid can't be hit, and says which pids it had."""
    ended = []
    for pid in pids_marked(mark):
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(pid)
            try:
                if pid in pids_marked(mark):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    ended.append(pid)
            finally:
                os.close(fd)
    return ended


class Scene:
    """All that the job is after, planted, watched, and removed."""

    def __init__(self) -> None:
        self.marks = {kind: new_mark(kind) for kind in ("memory", "environment", "secret", "listener")}
        self.signals = 0
        self.calls = 0
        self.dir = tempfile.mkdtemp(prefix="ringfence-hostile-")
        self.secret = Path(self.dir, "secret")
        self.secret.touch(mode=0o600)
        self.secret.write_text(self.marks["secret"])
        self.outside = Path(self.dir, "outside")
        self.outside.mkdir()
        self.victim = subprocess.Popen(
            [PYTHON, "-ISc", VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={"RINGFENCE_SECRET": self.marks["environment"]},
        )  # fmt: skip
        self.server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._listen, daemon=True).start()
        signal.signal(signal.SIGCONT, self._signaled)
        assert self.victim.stdin and self.victim.stdout
        self.victim.stdin.write(self.marks["memory"].encode() + b"\n")
        self.victim.stdin.flush()
        self.victim.stdout.readline()

    def _signaled(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self.server.accept()
                self.calls += 1
                with connection:
                    connection.sendall(self.marks["listener"].encode())

    def close(self) -> None:
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        self.server.close()
        self.victim.kill()
        self.victim.communicate()
        shutil.rmtree(self.dir)

    def target(self, daemon_mark: str) -> dict[str, Any]:
        return {
            "caller_pid": os.getpid(),
            "caller_start_ticks": int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]),
            "caller_boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "caller_uts": os.readlink("/proc/self/ns/uts"),
            "victim_pid": self.victim.pid,
            "memory_mark_sha256": digest(self.marks["memory"]),
            "environment_mark_sha256": digest(self.marks["environment"]),
            "secret_path": str(self.secret),
            "secret_sha256": digest(self.marks["secret"]),
            "outside_dir": str(self.outside),
            "port": self.server.getsockname()[1],
            "listener_sha256": digest(self.marks["listener"]),
            "daemon_mark": daemon_mark,
            "children": 200,
            "memory_bytes": 512 << 20,  # twice the limit below, soon touched even where page faults are slow
            "timeout_seconds": 10,
        }

    def state(self) -> dict[str, int]:
        """What an attempt that reaches out of its sandbox changes here."""
        return {
            "signal the caller": self.signals,
            "write outside its directory": self.outside.stat().st_mtime_ns,
            "open the network": self.calls,
        }


def run_bare(job_input: bytes) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory(prefix="ringfence-hostile-") as work:
        shutil.copy(JOB, work)
        done = subprocess.run(
            [PYTHON, "job.py"],
            input=job_input,
            stdout=subprocess.PIPE,
            cwd=work,
            timeout=WALL_SECONDS,
            check=False,
        )
    return done.stdout, "exited" if done.returncode == 0 else f"exit status {done.returncode}"


def run_isolated(isolation: str, job_input: bytes) -> tuple[bytes, str]:
    import ringfence as rf

    result = rf.run(
        [PYTHON, "job.py"],
        isolation=isolation,
        input=job_input,
        files={"job.py": JOB.read_bytes()},
        limits=rf.Limits(memory="256M", pids=64, wall_time=WALL_SECONDS),
    )
    if result.stderr:
        sys.stderr.buffer.write(result.stderr)
    return result.stdout, result.termination_reason


def judge(output: bytes, ended: str, before: dict[str, int], after: dict[str, int], alive: list[int],
          attempts: list[str]) -> dict[str, Verdict]:  # fmt: skip
    """The job's own lines, overruled by what was seen from outside."""
    said = {line["attempt"]: line for line in map(json.loads, output.splitlines())}
    verdicts = {}
    for name in attempts:
        line = said.get(name)
        verdict = Verdict(line["succeeded"], line["evidence"]) if line else Verdict(False, f"run ended: {ended}")
        if name in before and (after[name] != before[name]) != verdict.succeeded:
            reached = after[name] != before[name]
            verdict = Verdict(reached, "seen from outside" if reached else "nothing arrived outside")
        if name == "keep a daemon behind":
            verdict = Verdict(bool(alive), f"pid {alive[0]} outlived the run" if alive else "dead when the run ended")
            if not line or not line["succeeded"]:
                verdict = Verdict(bool(alive), line["evidence"] if line else f"run ended: {ended}")
        verdicts[name] = verdict
    return verdicts


def run_column(column: str, scene: Scene, attempts: list[str]) -> Run:
    daemon_mark = new_mark("daemon")
    job_input = json.dumps(scene.target(daemon_mark)).encode()
    before = scene.state()
    run: Callable[[bytes], tuple[bytes, str]] = (
        run_bare if column == "bare" else lambda data: run_isolated(column, data)
    )
    try:
        output, ended = run(job_input)
    except Exception as err:  # one level's refusal must not hide the other columns; the reason is printed
        if column == "bare":
            raise
        return Run({}, f"{type(err).__name__}: {err}")
    finally:
        alive = end_marked(daemon_mark)
    time.sleep(0.05)  # the listener's thread may still be counting
    return Run(judge(output, ended, before, scene.state(), alive, attempts), None)


def attempt_names() -> list[str]:
    """The attempts, in the job's own order: from its table, without running it."""
    import runpy

    return list(runpy.run_path(str(JOB))["ATTEMPTS"])


def cells(name: str, runs: dict[str, Run]) -> Iterator[tuple[str, str]]:
    for run in runs.values():
        verdict = run.verdicts.get(name)
        if verdict is None:
            yield "not run", ""
        else:
            yield "succeeded" if verdict.succeeded else "stopped", verdict.evidence


def print_plain(attempts: list[str], runs: dict[str, Run]) -> None:
    width = max(map(len, attempts)) + 2
    print("attempt".ljust(width) + "".join(column.ljust(11) for column in runs))
    for name in attempts:
        found = list(cells(name, runs))
        print(name.ljust(width) + "".join(word.ljust(11) for word, _ in found))
        for column, (_, evidence) in zip(runs, found, strict=True):
            print(f"    {column}: {evidence}")


def print_rich(attempts: list[str], runs: dict[str, Run]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="A hostile job: what succeeded where", show_lines=True)
    table.add_column("attempt", style="bold")
    for column in runs:
        table.add_column(column)
    for name in attempts:
        row = []
        for word, evidence in cells(name, runs):
            style = {"succeeded": "bold red", "stopped": "green"}.get(word, "dim")
            row.append(Text.assemble((word, style), "\n", (evidence, "dim")))
        table.add_row(name, *row)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def problems(runs: dict[str, Run]) -> Iterator[str]:
    root = os.geteuid() == 0
    for column, run in runs.items():
        if run.reason:
            yield f"{column}: could not run: {run.reason}"
        for name, verdict in run.verdicts.items():
            if column == "bare" and not verdict.succeeded and (root or name not in NEEDS_ROOT):
                yield f"bare: '{name}' did not work, so its row proves nothing: {verdict.evidence}"
            if column != "bare" and verdict.succeeded and (root or (column, name) not in SAME_USER_MAY):
                yield f"{column}: '{name}' succeeded: {verdict.evidence}"


def main(levels: list[str]) -> int:
    unknown = set(levels) - set(COLUMNS)
    if unknown:
        print(
            f"demo: no such level: {', '.join(sorted(unknown))} (there are {', '.join(COLUMNS)})",
            file=sys.stderr,
        )
        return 2
    attempts = attempt_names()
    runs = {}
    scene = Scene()
    try:
        for column in levels or COLUMNS:
            runs[column] = run_column(column, scene, attempts)
    finally:
        scene.close()
    try:
        print_rich(attempts, runs)
    except ImportError:
        print_plain(attempts, runs)
    if "vm" in runs:
        print("In the vm, the host's pids and addresses mean nothing: such a number is the guest's own.")
    found = list(problems(runs))
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
