"""A hostile job: it tries what untrusted code may try, says what worked, and undoes it.

Input: one JSON object on stdin, see `Target`. Output: one JSON line per attempt on stdout,
{"attempt", "succeeded", "evidence", "seconds"}. Exit status 0 whatever was refused. Standard library only.

It is bounded and harmless where everything succeeds, even for root with no boundary at all: at most 200
children, 1 GiB for at most 3 seconds, the host name set to what it is, the clock moved by nothing, files
removed, the daemon gone after 30 seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import mmap
import os
import re
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

MAX_CHILDREN = 200
MAX_MEMORY_BYTES = 1 << 30
HOLD_SECONDS = 0.5
DAEMON_SECONDS = 30
SCAN_BYTES = 64 << 20  # of each process
MARK = re.compile(rb"ringfence-[a-z]+-[0-9a-f]{32}")


class Target(TypedDict):
    """What the runner planted. The job knows marks by digest alone, so that a match proves a real read."""

    caller_pid: int
    caller_start_ticks: int  # field 22 of /proc/PID/stat: with the pid, this names one process
    caller_boot_id: str
    caller_uts: str  # readlink of /proc/self/ns/uts
    victim_pid: int
    memory_mark_sha256: str
    environment_mark_sha256: str
    secret_path: str
    secret_sha256: str
    outside_dir: str
    port: int
    listener_sha256: str
    daemon_mark: str
    children: int
    memory_bytes: int
    timeout_seconds: float  # for each attempt


Outcome = tuple[bool, str]


def is_marked(data: bytes, digest: str) -> bool:
    return any(hashlib.sha256(mark).hexdigest() == digest for mark in MARK.findall(data))


def describe(err: OSError) -> str:
    return f"{errno.errorcode.get(err.errno or 0, 'error')} ({err.strerror or err})"


def same_kernel(target: Target) -> bool:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip() == target["caller_boot_id"]


# --- other processes


def other_pids(target: Target) -> Iterator[int]:
    """The victim first, then all that can be seen, less this job's own processes."""
    yield target["victim_pid"]
    own = {os.getpid(), os.getppid(), target["victim_pid"]}
    yield from (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in own)


def search_others(target: Target, read: Callable[[int], Iterator[bytes]], digest: str) -> Outcome:
    refused: str | None = None
    looked = 0
    for pid in other_pids(target):
        try:
            for data in read(pid):
                if is_marked(data, digest):
                    return True, f"pid {pid}: found the mark that was planted there"
            looked += 1
        except OSError as err:
            refused = refused or f"pid {pid}: {describe(err)}"
    return False, f"{refused or 'no mark found'}; {looked} other processes could be read"


def memory_of(pid: int) -> Iterator[bytes]:
    left = SCAN_BYTES
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory, open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            span, access = line.split()[:2]
            start, end = (int(bound, 16) for bound in span.split("-"))
            if not access.startswith("rw") or start >= 1 << 63 or left <= 0:
                continue
            memory.seek(start)
            with contextlib.suppress(OSError):  # a device's pages
                data = memory.read(min(end - start, left))
                left -= len(data)
                yield data


def environment_of(pid: int) -> Iterator[bytes]:
    with open(f"/proc/{pid}/environ", "rb") as file:
        yield file.read()


def read_memory(target: Target) -> Outcome:
    return search_others(target, memory_of, target["memory_mark_sha256"])


def read_environment(target: Target) -> Outcome:
    return search_others(target, environment_of, target["environment_mark_sha256"])


def signal_caller(target: Target) -> Outcome:
    pid = target["caller_pid"]
    os.kill(pid, signal.SIGCONT)  # does nothing to a process that runs, whoever it is
    with open(f"/proc/{pid}/stat") as file:
        start_ticks = int(file.read().rpartition(")")[2].split()[19])
    if start_ticks != target["caller_start_ticks"]:
        return False, f"pid {pid} here is another process"
    return True, f"SIGCONT sent to pid {pid}"


# --- files, network


def read_secret(target: Target) -> Outcome:
    with open(target["secret_path"], "rb") as file:
        data = file.read()
    found = is_marked(data, target["secret_sha256"])
    return found, "read the secret file" if found else "the file is another one"


def write_outside(target: Target) -> Outcome:
    path = os.path.join(target["outside_dir"], f"hostile-{os.getpid()}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(fd, b"was here")
        written = os.pread(fd, 64, 0) == b"was here"
    finally:
        os.close(fd)
        os.unlink(path)
    return written, "made a file in the caller's folder, and removed it"


def open_network(target: Target) -> Outcome:
    with socket.create_connection(("127.0.0.1", target["port"]), timeout=3) as connection:
        greeting = connection.recv(256)
    found = is_marked(greeting, target["listener_sha256"])
    return found, "talked to the caller's listener" if found else "something else answered"


# --- the system


def set_host_name(target: Target) -> Outcome:
    socket.sethostname(socket.gethostname())
    if not same_kernel(target) or os.readlink("/proc/self/ns/uts") != target["caller_uts"]:
        return False, "only the sandbox's own host name"
    return True, "sethostname was accepted (with the name it has)"


def set_clock(target: Target) -> Outcome:
    """adjtimex(2) with ADJ_STATUS and the status just read: needs the privilege, changes nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    timex = ctypes.create_string_buffer(512)  # struct timex is 208 bytes; its first field is `modes`
    for modes in (0, 0x0010):
        struct.pack_into("I", timex, 0, modes)
        if libc.adjtimex(timex) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    if not same_kernel(target):
        return False, "only the guest's own clock"
    return True, "adjtimex was accepted (with the status it has)"


# --- resources


def fork_bomb(target: Target) -> Outcome:
    wanted = min(target["children"], MAX_CHILDREN)
    reader, writer = os.pipe()
    forked, refused = 0, ""
    try:
        while forked < wanted:
            if os.fork() == 0:
                os.close(writer)
                os.read(reader, 1)  # returns when the parent closes the pipe, or dies
                os._exit(0)
            forked += 1
    except OSError as err:
        refused = f", then {describe(err)}"
    os.close(writer)
    for _ in range(forked):
        os.wait()
    return forked == wanted, f"{forked} of {wanted} children{refused}"


def eat_memory(target: Target, report: Callable[[str], None]) -> Outcome:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # the one to be killed, not the job
    wanted = min(target["memory_bytes"], MAX_MEMORY_BYTES)
    step = b"\xa5" * (1 << 20)
    end = time.monotonic() + 3
    with mmap.mmap(-1, wanted, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for touched in range(0, wanted, len(step)):
            memory.write(step[: wanted - touched])
            report(f"{memory.tell() >> 20} of {wanted >> 20} MiB")
            if time.monotonic() > end:
                return False, f"{memory.tell() >> 20} of {wanted >> 20} MiB in 3 seconds"
        time.sleep(HOLD_SECONDS)
    return True, f"{wanted >> 20} MiB touched and held"


def leave_daemon(target: Target) -> Outcome:
    """Whether it outlives the run, only the runner can tell, from outside."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.close(reader)
            null = os.open("/dev/null", os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            os.write(writer, str(os.getpid()).encode())
            code = f"import time; time.sleep({DAEMON_SECONDS})"
            os.execv(sys.executable, [sys.executable, "-ISc", code, target["daemon_mark"]])
        os._exit(0)
    os.close(writer)
    pid = os.read(reader, 32).decode()
    return bool(pid), f"daemon started as pid {pid}" if pid else "the daemon could not be forked"


# --- running them

# Memory comes last: a boundary may end the whole sandbox for it, and by then all the rest is printed.
ATTEMPTS: dict[str, Callable[..., Outcome]] = {
    "read another process's memory": read_memory,
    "read another process's environment": read_environment,
    "read a secret file of the caller": read_secret,
    "signal the caller": signal_caller,
    "write outside its directory": write_outside,
    "open the network": open_network,
    "change the host name": set_host_name,
    "change the clock": set_clock,
    "fork-bomb": fork_bomb,
    "keep a daemon behind": leave_daemon,
    "eat memory": eat_memory,
}


def try_in_child(attempt: Callable[..., Outcome], target: Target, writer: int) -> None:
    """In a child: what an attempt breaks stays here. The last line written is the outcome."""

    def report(progress: str, succeeded: bool = False, done: bool = False) -> None:
        os.write(writer, json.dumps([succeeded, progress, done]).encode() + b"\n")

    try:
        outcome = attempt(target, report) if attempt is eat_memory else attempt(target)
    except OSError as err:
        outcome = False, describe(err)
    except BaseException as err:  # whatever it is, it's this attempt's failure alone
        outcome = False, f"{type(err).__name__}: {err}"
    report(outcome[1], outcome[0], done=True)


def read_until(reader: int, seconds: float) -> tuple[bytes, bool]:
    """All until the end of the pipe, and whether the end came in time."""
    data, end = b"", time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and select.select([reader], [], [], left)[0]:
        chunk = os.read(reader, 65536)
        if not chunk:
            return data, True
        data += chunk
    return data, False


def run_attempt(attempt: Callable[..., Outcome], target: Target) -> Outcome:
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError as err:
        os.close(reader)
        os.close(writer)
        return False, f"not even a child to try it in: {describe(err)}"
    if child == 0:
        os.setpgid(0, 0)
        os.close(reader)
        try_in_child(attempt, target, writer)
        os._exit(0)
    os.close(writer)
    with contextlib.suppress(OSError):  # the child did it first
        os.setpgid(child, child)
    data, in_time = read_until(reader, target["timeout_seconds"])
    os.close(reader)
    if not in_time:
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    lines = data.splitlines()
    succeeded, evidence, done = json.loads(lines[-1]) if lines else (False, "nothing", False)
    if done:
        return succeeded, evidence
    if not in_time:
        return False, f"not done after {target['timeout_seconds']:g} s ({evidence})"
    return (
        False,
        f"killed by {signal.Signals(-status).name} after {evidence}" if status < 0 else f"exit {status}",
    )


def main() -> int:
    target: Target = json.load(sys.stdin)
    for name, attempt in ATTEMPTS.items():
        started = time.monotonic()
        succeeded, evidence = run_attempt(attempt, target)
        seconds = round(time.monotonic() - started, 3)
        line: dict[str, Any] = {
            "attempt": name,
            "succeeded": succeeded,
            "evidence": evidence,
            "seconds": seconds,
        }
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
