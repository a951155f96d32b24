"""What a workload tries and can't do: the exact error, level by level, beside the same attempt unconfined.

One sandbox per level makes all the attempts, in a shell, one after the other. An attempt whose control fails on this
machine (its own kernel or rights refuse) is skipped with that reason: it would prove nothing.
"""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ringfence as rf
from support.sandboxes import LEVELS, PROBE_FILE, need_root, unconfined

ABSTRACT = f"of-the-host-{os.getpid()}"


class Attempt(NamedTuple):
    """arguments: of the probe; the host's part of them in {braces}. Then what it prints at each level."""

    arguments: str
    process: str
    container: str
    vm: str


def alike(arguments: str, expected: str) -> Attempt:
    return Attempt(arguments, expected, expected, expected)


OK = "ok"  # by design: what it reaches there is the sandbox's own

ATTEMPTS = [
    # The host's files.
    Attempt("try-open-read {secret}", "EACCES open", "ENOENT open", "ENOENT open"),
    alike("try-open-write /etc/passwd", "EACCES open"),
    alike("try-open-write /proc/sys/kernel/core_pattern", "EACCES open"),
    Attempt("try-create /usr/ringfence-test", "EACCES open", "EROFS open", "EROFS open"),
    Attempt("try-create /etc/ringfence-test", "EACCES open", "EROFS open", "EROFS open"),
    Attempt("try-create /tmp/ringfence-test", "EACCES open", OK, OK),
    Attempt("try-create /dev/shm/ringfence-test", "EACCES open", OK, OK),
    Attempt("try-mknod node", "EACCES mknod", "EPERM mknod", "EPERM mknod"),
    # A 9p share has no handles at all.
    Attempt(
        "try-open-by-handle /etc/passwd",
        "EPERM open_by_handle_at",
        "EPERM open_by_handle_at",
        "EOPNOTSUPP name_to_handle_at",
    ),
    # The network and sockets.
    Attempt("try-connect4 127.0.0.1 {port}", "EPERM socket", "ECONNREFUSED connect", "ECONNREFUSED connect"),
    Attempt("try-socket inet stream", "EPERM socket", OK, OK),
    Attempt("try-socket inet dgram", "EPERM socket", OK, OK),
    Attempt("try-socket inet6 stream", "EPERM socket", OK, OK),
    Attempt("try-socket netlink raw", "EPERM socket", OK, OK),
    alike("try-socket inet raw", "EPERM socket"),
    alike("try-socket packet raw", "EPERM socket"),
    alike("try-socket vsock stream", "EPERM socket"),
    alike("try-socket alg seqpacket", "EPERM socket"),
    Attempt("try-unix-abstract {abstract}", "EPERM socket", "ECONNREFUSED connect", "ECONNREFUSED connect"),
    # Other processes.
    Attempt("try-kill {victim} 0", "EPERM kill", "ESRCH kill", "ESRCH kill"),
    Attempt("try-kill {victim} 15", "EPERM kill", "ESRCH kill", "ESRCH kill"),
    alike("try-ptrace {victim}", "EPERM ptrace"),
    Attempt("try-procmem {victim}", "EACCES open", "ENOENT open", "ENOENT open"),
    Attempt("try-environ {victim}", "EACCES open", "ENOENT open", "ENOENT open"),
    alike("try-vm-readv {victim}", "EPERM process_vm_readv"),
    # The kernel.
    alike("try-mount", "EPERM mount"),
    alike("try-fsopen", "EPERM fsopen"),
    *(
        alike(f"try-unshare {name}", "EPERM unshare")
        for name in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time")
    ),
    # Unknown, so that libraries fall back to clone(2), whose flags a filter can see.
    alike("try-clone3-user", "ENOSYS clone3"),
    alike("try-setns /proc/self/ns/uts uts", "EPERM setns"),
    alike("try-chroot", "EPERM chroot"),
    alike("try-sethostname", "EPERM sethostname"),
    alike("try-settime", "EPERM settimeofday"),
    alike("try-settime clock_adjtime", "EPERM clock_adjtime"),
    alike("try-setuid 0", "EPERM setresuid"),
    alike("try-keyctl", "EPERM keyctl"),
    alike("try-bpf", "EPERM bpf"),
    alike("try-perf", "EPERM perf_event_open"),
    alike("try-io_uring", "EPERM io_uring_setup"),
    alike("try-userfaultfd", "EPERM userfaultfd"),
    alike("try-module", "EPERM init_module"),
    alike("try-reboot", "EPERM reboot"),
    Attempt("try-tiocsti", "EACCES posix_openpt", "EPERM ioctl", "EPERM ioctl"),
]
NAMES = [attempt.arguments for attempt in ATTEMPTS]


class Targets(NamedTuple):
    victim: int
    port: int
    secret: str

    def fill(self, arguments: str) -> str:
        return arguments.format(victim=self.victim, port=self.port, secret=self.secret, abstract=ABSTRACT)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Targets]:
    """On the host: a process, a listener of each kind, a file that only its owner may read."""
    secret = tmp_path_factory.mktemp("targets") / "secret"
    secret.write_text("the caller's own")
    secret.chmod(0o600)
    # It ignores SIGTERM: the control sends it one, too.
    victim = subprocess.Popen(["/bin/sh", "-c", "trap '' TERM; sleep 1000 & wait"], env={"SECRET": "1"})
    below = Path(f"/proc/{victim.pid}/task/{victim.pid}/children")
    # Until its child has executed: a process that changes its name looks like a new one.
    while not (child := below.read_text().strip()) or Path(f"/proc/{child}/comm").read_text() != "sleep\n":
        time.sleep(0.01)
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as local:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        local.bind(f"\0{ABSTRACT}")
        local.listen(64)
        yield Targets(victim.pid, server.getsockname()[1], str(secret))
    children = below.read_text().split()
    victim.kill()
    victim.wait()
    for child in children:
        os.kill(int(child), 9)


@functools.cache
def attempts_at(isolation: str, targets: Targets) -> dict[str, str]:
    script = "; ".join("./probe " + targets.fill(attempt.arguments) for attempt in ATTEMPTS)
    result = rf.run(["sh", "-c", script], isolation=isolation, files=PROBE_FILE)
    assert result.stderr == b""
    return dict(zip(NAMES, result.stdout.decode().splitlines(), strict=True))


@functools.cache
def control(arguments: str, folder: str) -> str:
    return unconfined(*arguments.split(), cwd=folder)[1].decode().strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("control"))


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=NAMES)
@pytest.mark.parametrize("isolation", LEVELS)
def test_attempt(isolation: str, attempt: Attempt, targets: Targets, folder: str) -> None:
    need_root()  # the controls are root's
    bare = control(targets.fill(attempt.arguments), folder)
    if bare != OK:
        pytest.skip(f"it fails unconfined too, by this machine's own kernel or rights: {bare}")
    assert attempts_at(isolation, targets)[attempt.arguments] == getattr(attempt, isolation)


def test_what_a_sandbox_made_in_its_own_tmp_is_not_the_hosts() -> None:
    """The "ok" of the table above: a file of the same name that is never the host's."""
    for isolation in ("container", "vm"):
        result = rf.run(["sh", "-c", "echo x > /tmp/ringfence-test; cat /tmp/ringfence-test"], isolation=isolation)
        assert result.stdout == b"x\n"
        assert not os.path.exists("/tmp/ringfence-test")


SECRETS = (
    "/etc/shadow",
    "/etc/gshadow",
    "/root",
    "/proc/1/environ",
    "/proc/kcore",
    "/dev/mem",
    "/dev/kmsg",
    "/dev/kvm",
)


@pytest.mark.parametrize("isolation", LEVELS)
def test_secrets_of_the_host_cannot_be_read(isolation: str) -> None:
    """Nothing comes out of any of them: an error, or a mask that is empty."""
    need_root()
    assert Path("/etc/shadow").read_bytes()  # the control: there is something to be read
    assert os.listdir("/root")
    script = "\n".join(f"head -c 100 {path} 2>/dev/null; ls -A {path}/ 2>/dev/null" for path in SECRETS) + "\ntrue"
    result = rf.run(["sh", "-c", script], isolation=isolation)
    assert result.stdout == b""


SYSTEM_V = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, *arguments):
    made = getattr(libc, name)(*arguments)
    print(name, "ok" if made >= 0 else os.strerror(ctypes.get_errno()))
attempt("shmget", 0, 4096, 0o1600)
attempt("semget", 0, 1, 0o1600)
attempt("msgget", 0, 0o1600)
attempt("mq_open", b"/ringfence-test", os.O_CREAT | os.O_RDWR, 0o600, None)
"""
# They would live on in the host's IPC namespace, without anybody to remove them.
SYSTEM_V_ENDS = {"process": "Operation not permitted", "container": "ok", "vm": "ok"}


@pytest.mark.parametrize("isolation", LEVELS)
def test_shared_memory_semaphores_and_queues_do_not_outlive_the_sandbox(isolation: str) -> None:
    """What is made in an IPC namespace ends with it. The leak fixture looks for those of System V."""
    result = rf.run(["/usr/bin/python3", "-c", SYSTEM_V], isolation=isolation)
    ends = [line.split(" ", 1) for line in result.stdout.decode().splitlines()]
    wanted = SYSTEM_V_ENDS[isolation]
    assert ends == [[name, wanted] for name in ("shmget", "semget", "msgget", "mq_open")]
    assert subprocess.run(["/usr/bin/python3", "-c", OPEN_QUEUE], check=False).returncode == 0


OPEN_QUEUE = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
opened = libc.mq_open(b"/ringfence-test", os.O_RDONLY)
sys.exit(0 if opened < 0 and ctypes.get_errno() == errno.ENOENT else 1)
"""


@pytest.mark.parametrize("isolation", LEVELS)
def test_the_next_sandbox_finds_nothing_of_the_last(isolation: str) -> None:
    """Ids, work directories and cgroups may be used again; what a workload left in them may not show."""
    seconds = f"7654.{os.getpid()}"  # another suite may do the same beside this one, where a process sees it
    leave = f"echo x > left; mkdir folder; chmod 500 .; umask 0; (sleep {seconds} &) ; echo done"
    look = f"""
    ls -A . /tmp /home /dev/shm 2>/dev/null | grep -v ":$\\|^$"
    stat -c %a .
    cat /proc/[0-9]*/cmdline | tr "\\0" " " | grep -c "[s]leep {seconds}"
    """
    for _ in range(3):
        rf.run(["sh", "-c", leave], isolation=isolation)
    result = rf.run(["sh", "-c", look], isolation=isolation)
    lines = result.stdout.decode().splitlines()
    if isolation == "process":
        lines = lines[-2:]  # the host's /tmp is shown
    assert lines == ["700", "0"]
