"""The probe, unconfined: every verb does what its table says.

These runs are the positive controls of the denial tests. An attempt that this machine's own kernel or rights
refuse is a SKIP with the reason, so that no denial test can count it as a boundary.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = ROOT / "src" / "ringfence" / "_core" / "ringfence-probe"
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
PATTERN = bytes(range(251))


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> str:
    if INSTALLED.exists():
        return str(INSTALLED)
    built = tmp_path_factory.mktemp("probe") / "ringfence-probe"
    sources = sorted(str(path) for path in (ROOT / "core").glob("probe*.c"))
    subprocess.run(["gcc", "-O2", "-static", *WARNINGS, "-o", str(built), *sources], check=True)
    return str(built)


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["/bin/sleep", "60"], env={"MARKER": "victim"})
    yield process
    process.kill()
    process.wait()


def run(probe: str, *args: str | bytes, stdin: bytes = b"", **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([probe, *args], input=stdin, capture_output=True, timeout=60, check=False, **kwargs)


def output(probe: str, *args: str | bytes, **kwargs: Any) -> bytes:
    done = run(probe, *args, **kwargs)
    assert (done.returncode, done.stderr) == (0, b""), done
    return bytes(done.stdout)


def fnv1a(data: bytes) -> str:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- exit status, streams, arguments


def test_help_lists_every_verb(probe: str) -> None:
    lines = output(probe, "help").decode().splitlines()
    names = [line.split()[0] for line in lines]
    assert len(names) == len(set(names)) >= 57
    for name in ("help", "exit", "facts", "try-mount", "orphan-exit"):
        assert name in names


WRONG = [
    "", "no-such-verb", "exit", "exit 1 2", "exit 256", "exit x", "emit 12Q", "emit -1", "try-kill 0 9",
    "try-kill -1 9", "try-unshare nothing", "try-connect4 localhost 80", "mkfile x 1 9",
]  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_wrong_usage_is_2(probe: str, line: str) -> None:
    done = run(probe, *line.split())
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("status", [0, 1, 2, 42, 125, 126, 127, 128, 255])
def test_exit(probe: str, status: int) -> None:
    assert run(probe, "exit", str(status)).returncode == status


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGSEGV", "SIGABRT", "SIGPIPE", "SIGXFSZ", "SIGHUP"])
def test_signal(probe: str, name: str, tmp_path: Path) -> None:
    number = signal.Signals[name]
    assert run(probe, "signal", str(int(number)), cwd=tmp_path).returncode == -number
    assert list(tmp_path.iterdir()) == []


def test_signal_that_is_ignored_by_default_says_so(probe: str) -> None:
    done = run(probe, "signal", str(int(signal.SIGCHLD)))
    assert done.returncode == 1
    assert b"didn't end" in done.stderr


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)), bytes(range(256)) * 4096], ids=len)
def test_cat_and_count(probe: str, data: bytes) -> None:
    assert output(probe, "cat", stdin=data) == data
    assert output(probe, "count", stdin=data).decode() == f"{len(data)} {fnv1a(data)}\n"


@pytest.mark.parametrize("size", [0, 1, 251 * 256 - 1, 251 * 256 + 1, 1_000_000])
def test_emit(probe: str, size: int) -> None:
    assert output(probe, "emit", str(size)) == b"x" * size
    assert output(probe, "emit", str(size), "10") == b"\n" * size
    assert output(probe, "emit", str(size), "pattern") == (PATTERN * (size // 251 + 1))[:size]
    assert output(probe, "emit", str(size), "all") == (bytes(range(256)) * (size // 256 + 1))[:size]


def test_emit_50_megabytes(probe: str) -> None:
    data = output(probe, "emit", "50M", "pattern")
    wanted = (PATTERN * (len(data) // 251 + 1))[: 50 << 20]
    assert len(data) == 50 << 20
    assert hashlib.sha256(data).digest() == hashlib.sha256(wanted).digest()


def test_emit_into_a_closed_pipe_dies_by_sigpipe(probe: str) -> None:
    process = subprocess.Popen([probe, "emit", "1G"], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.close()
    assert process.wait(10) == -signal.SIGPIPE


def test_full_disk_is_not_success(probe: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([probe, "cwd"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (1, b"ENOSPC write\n")


def test_both(probe: str) -> None:
    done = run(probe, "both", "50")
    assert done.stdout == b"".join(b"out %d\n" % i for i in range(50))
    assert done.stderr == b"".join(b"err %d\n" % i for i in range(50))
    merged = subprocess.run([probe, "both", "3"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True).stdout
    assert merged == b"out 0\nerr 0\nout 1\nerr 1\nout 2\nerr 2\n"


def test_argv(probe: str) -> None:
    args = [b"a b", b"", b"line\nline", b"'\"", b"\xff\xfe", b"x" * 100 * 1024]
    assert output(probe, "argv", *args) == b"".join(arg + b"\0" for arg in args)
    assert output(probe, "argv") == b""


def test_env(probe: str) -> None:
    env = {b"A": b"1", b"EMPTY": b"", b"RAW": b"\xff\n"}
    assert output(probe, "env", env=env) == b"A=1\0EMPTY=\0RAW=\xff\n\0"


def test_cwd(probe: str, tmp_path: Path) -> None:
    assert output(probe, "cwd", cwd=tmp_path) == bytes(tmp_path) + b"\n"


def test_closeout(probe: str) -> None:
    process = subprocess.Popen([probe, "closeout", "0.5"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    with process.stdout, process.stderr:
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"")
        assert process.poll() is None  # both ended while it still runs
        assert process.wait(10) == 7


def test_nostdin(probe: str) -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"unread")
        assert subprocess.run([probe, "nostdin"], stdin=reader, check=False, timeout=10).returncode == 0
        assert os.read(reader, 16) == b"unread"
    finally:
        os.close(reader)
        os.close(writer)


# --- processes, CPU, memory


def test_stubborn_ignores_polite_signals(probe: str) -> None:
    with subprocess.Popen([probe, "stubborn", "30"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == b"ready\n"
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                process.send_signal(number)
            time.sleep(0.2)
            assert process.poll() is None
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("detached", [False, True])
def test_orphan_exit_leaves_a_daemon(probe: str, detached: bool) -> None:
    args = [probe, "orphan-exit", "30", *(["detached"] if detached else [])]
    with subprocess.Popen(args, stdout=subprocess.PIPE) as process:
        assert process.stdout
        word, pid = process.stdout.readline().split()
        daemon = int(pid)
        try:
            assert word == b"ready"
            assert process.wait(10) == 0
            assert alive(daemon)
            assert os.getsid(daemon) not in (os.getsid(0), process.pid)
            os.kill(daemon, signal.SIGTERM)
            time.sleep(0.1)
            assert alive(daemon)
            assert (os.readlink(f"/proc/{daemon}/fd/1") == "/dev/null") is detached
        finally:
            os.kill(daemon, signal.SIGKILL)


def test_orphan_stays_with_its_daemon(probe: str) -> None:
    with subprocess.Popen([probe, "orphan", "30"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        daemon = int(process.stdout.readline().split()[1])
        try:
            assert process.poll() is None
            assert alive(daemon)
        finally:
            process.kill()
            os.kill(daemon, signal.SIGKILL)


def cpu_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


def test_spin_burns_cpu(probe: str) -> None:
    before = cpu_seconds()
    output(probe, "spin", "0.5")
    assert cpu_seconds() - before > 0.2


def test_spin_children(probe: str) -> None:
    used = 0.0
    for seconds in (0.5, 2, 8):  # on a busy machine they get less of it
        before = cpu_seconds()
        assert output(probe, "spin-children", "3", str(seconds)) == b"ready 3\n"
        used = cpu_seconds() - before
        if used > 0.4:
            return
    raise AssertionError(used)


def test_hog(probe: str) -> None:
    assert output(probe, "hog", "33M") == b"touched 16777216\ntouched 33554432\ntouched 34603008\nhogged\n"


def test_hog_without_memory_says_so(probe: str) -> None:
    done = run("/bin/sh", "-c", 'ulimit -v 65536; exec "$0" hog 200M', probe)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == b"ENOMEM mmap"


def test_forkbomb(probe: str) -> None:
    assert output(probe, "forkbomb", "50") == b"forked 50 ok\n"
    assert run(probe, "forkbomb", "1000000").returncode == 2


# --- files


def test_mkfile_read_write_stat(probe: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert output(probe, "mkfile", str(path), "70000", "0751") == b"ok\n"
    assert path.read_bytes() == (PATTERN * 300)[:70000]
    assert stat.S_IMODE(path.stat().st_mode) == 0o751
    assert output(probe, "stat", str(path)).decode() == f"file 0751 70000 {os.getuid()} {os.getgid()} 1\n"
    assert output(probe, "write", str(path), "text") == b"ok\n"
    assert output(probe, "read", str(path)) == b"text"


def test_file_verbs_name_the_error(probe: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "no" / "file")
    for verb in ("mkfile", "write", "touch-out", "try-create", "try-open-read", "try-open-write"):
        done = run(probe, verb, missing, *(["1"] if verb in ("mkfile", "write") else []))
        assert (done.returncode, done.stdout, done.stderr) == (1, b"ENOENT open\n", b""), verb
    assert run(probe, "symlink", "x", missing).stdout == b"ENOENT symlink\n"
    for args in (("read", missing), ("stat", missing), ("tree", missing)):
        done = run(probe, *args)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(b"ENOENT ")


def test_touch_out_leaves_its_file(probe: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert output(probe, "touch-out", str(path)) == b"ok\n"
    assert path.exists()
    assert run(probe, "touch-out", str(path)).stdout == b"EEXIST open\n"


def test_tree_and_symlink(probe: str, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir(mode=0o755)
    (tmp_path / "b" / "line\nbreak").write_bytes(b"12")
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "a").chmod(0o600)
    (tmp_path / "b" / "line\nbreak").chmod(0o644)
    assert output(probe, "symlink", "/etc/hostname", str(tmp_path / "c")) == b"ok\n"
    assert output(probe, "stat", str(tmp_path / "c")).endswith(b" -> /etc/hostname\n")
    lines = output(probe, "tree", str(tmp_path)).decode().splitlines()
    assert lines[0] == "file 0600 1 a"
    assert lines[1].startswith("dir 0755 ") and lines[1].endswith(" b")
    assert lines[2:] == ["file 0644 2 b/line\\x0abreak", "link 0777 13 c -> /etc/hostname"]


def test_ls_fds(probe: str) -> None:
    with open("/dev/zero", "rb") as extra:
        lines = output(probe, "ls-fds", pass_fds=[extra.fileno()]).decode().splitlines()
        fds = dict(line.split(" ", 1) for line in lines)
        assert fds[str(extra.fileno())] == "/dev/zero"
        assert set(fds) == {"0", "1", "2", str(extra.fileno())}


# --- attempts


def attempt(probe: str, *args: str) -> None:
    """The control: it works here, or this machine can't do it at all and the test says so."""
    done = run(probe, *args)
    line = done.stdout.decode()
    assert done.stderr == b""
    if done.returncode == 0:
        assert line == "ok\n"
        return
    err, _, call = line.rstrip("\n").partition(" ")
    assert done.returncode == 1 and err.startswith("E") and err != "E?" and call
    if err == "ENOSYS" or (err in ("EPERM", "EACCES") and os.getuid() != 0):
        pytest.skip(f"no control for {' '.join(args)} on this machine: {line.strip()}")
    pytest.fail(f"{args}: {line}")


@pytest.mark.parametrize(
    "args",
    [("try-mount",), ("try-fsopen",), ("try-chroot",), ("try-sethostname",), ("try-settime",),
     ("try-settime", "clock_adjtime"), ("try-setuid", "1000"), ("try-keyctl",), ("try-bpf",), ("try-perf",),
     ("try-shm",),
     ("try-io_uring",), ("try-userfaultfd",), ("try-module",), ("try-reboot",), ("try-tiocsti",),
     ("try-clone3-user",), ("try-setns", "/proc/self/ns/net", "net"), ("try-setns", "/proc/self/ns/uts", "0"),
     ("try-socket", "unix", "stream"), ("try-socket", "inet", "stream"), ("try-socket", "inet", "raw"),
     ("try-socket", "netlink", "raw"), ("try-socket", "16", "3"), ("try-socket", "packet", "dgram")],
    ids=" ".join,
)  # fmt: skip
def test_privileged_attempts_work_unconfined(probe: str, args: tuple[str, ...]) -> None:
    attempt(probe, *args)


@pytest.mark.parametrize("name", ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time", "user,mnt,pid",
                                  "0x10000000"])  # fmt: skip
def test_unshare(probe: str, name: str) -> None:
    attempt(probe, "try-unshare", name)


def test_attempts_change_nothing(probe: str) -> None:
    def state() -> tuple[str, str, str]:
        mounts = Path("/proc/self/mountinfo").read_text()
        return socket.gethostname(), mounts, os.readlink("/proc/self/ns/net")

    before = state()
    for verb in ("try-mount", "try-fsopen", "try-sethostname", "try-settime", "try-reboot", "try-module"):
        run(probe, verb)
    assert state() == before


def test_attempts_on_another_process(probe: str, victim: subprocess.Popen[bytes]) -> None:
    pid = str(victim.pid)
    for args in (("try-kill", pid, "0"), ("try-ptrace", pid), ("try-procmem", pid), ("try-environ", pid),
                 ("try-vm-readv", pid)):  # fmt: skip
        attempt(probe, *args)
    assert victim.poll() is None
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"  # not left stopped


@pytest.mark.parametrize("verb", ["try-ptrace", "try-procmem", "try-environ", "try-vm-readv"])
def test_attempts_without_privilege_are_refused(probe: str, verb: str, victim: subprocess.Popen[bytes]) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to become another user")
    # By descriptor: another user can't walk to the built binary, below a directory of root's alone.
    done = run(sys.executable, "-Ic", UNPRIVILEGED, probe, verb, str(victim.pid))
    assert done.returncode == 1, done
    assert done.stdout.split()[0] in (b"EPERM", b"EACCES")


UNPRIVILEGED = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
os.execve(fd, sys.argv[1:], {})
"""


def test_unprivileged_mount_reboot_and_clock_are_refused(probe: str) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to become another user")
    calls = {"try-mount": "mount", "try-fsopen": "fsopen", "try-reboot": "reboot", "try-chroot": "chroot",
             "try-settime": "settimeofday", "try-sethostname": "sethostname"}  # fmt: skip
    for verb, call in calls.items():
        done = run(sys.executable, "-Ic", UNPRIVILEGED, probe, verb)
        assert (done.returncode, done.stdout.decode()) == (1, f"EPERM {call}\n"), verb


def test_kill_really_kills(probe: str, victim: subprocess.Popen[bytes]) -> None:
    assert output(probe, "try-kill", str(victim.pid), "15") == b"ok\n"
    assert victim.wait(10) == -signal.SIGTERM
    assert run(probe, "try-kill", str(victim.pid), "0").stdout == b"ESRCH kill\n"


def test_connect(probe: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        attempt(probe, "try-connect4", "127.0.0.1", port)
    done = run(probe, "try-connect4", "127.0.0.1", port)
    assert (done.returncode, done.stdout) == (1, b"ECONNREFUSED connect\n")


def test_abstract_socket(probe: str) -> None:
    name = f"ringfence-test-{os.getpid()}"
    assert run(probe, "try-unix-abstract", name).stdout == b"ECONNREFUSED connect\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind("\0" + name)
        server.listen()
        attempt(probe, "try-unix-abstract", name)


def test_attempts_on_files_leave_nothing(probe: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    for verb in ("try-open-read", "try-open-write", "try-open-by-handle"):
        attempt(probe, verb, str(path))
    attempt(probe, "try-create", str(tmp_path / "new"))
    attempt(probe, "try-mknod", str(tmp_path / "null"))
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("file", b"content")]


# --- facts


def facts(probe: str, **kwargs: Any) -> dict[str, Any]:
    found = json.loads(output(probe, "facts", **kwargs))
    assert isinstance(found, dict)
    return found


def test_facts_agree_with_python(probe: str, tmp_path: Path) -> None:
    found = facts(probe, cwd=tmp_path, env={"A": "1", "B": ""})
    name = os.uname()
    assert (found["kernel_release"], found["kernel_version"]) == (name.release, name.version)
    assert (found["architecture"], found["hostname"]) == (name.machine, name.nodename)
    assert found["ppid"] == os.getpid()
    assert found["uids"] == dict.fromkeys(("real", "effective", "saved", "filesystem"), os.getuid())
    assert found["groups"] == os.getgroups()
    assert found["cwd"] == str(tmp_path)
    assert found["environment_names"] == ["A", "B"]
    for namespace, inode in found["namespaces"].items():
        if not namespace.endswith("_for_children"):
            assert os.readlink(f"/proc/self/ns/{namespace}") == f"{namespace}:[{inode}]"
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert found["capabilities"]["effective"] == status["CapEff"]
    assert found["capabilities"]["bounding"] == status["CapBnd"]
    assert (found["no_new_privs"], found["seccomp_mode"]) == (
        int(status["NoNewPrivs"]),
        int(status["Seccomp"]),
    )
    assert found["affinity"] == sorted(os.sched_getaffinity(0))
    assert {1, os.getpid(), found["pid"]} <= set(found["pids"]) and len(found["pids"]) == found["pid_count"]
    assert found["pid1_comm"] == Path("/proc/1/comm").read_text().strip()
    assert set(found["interfaces"]) == {name for _, name in socket.if_nameindex()}
    assert found["interfaces"]["lo"] == {"up": True}
    mountinfo = Path("/proc/self/mountinfo").read_text().splitlines()
    assert found["mount_count"] == len(mountinfo) == len(found["mounts"])
    assert found["mounts"][-1][0] == mountinfo[-1].split()[4]
    assert found["rlimits"]["core"][0] in ("unlimited", *range(2**16))
    assert abs(found["monotonic_ns"] - time.monotonic_ns()) < 30e9
    assert set(found["open_fds"]) == {"0", "1", "2"}
    assert "null" in found["dev_entries"] and "proc" in found["root_entries"]


def test_facts_that_cannot_be_read_carry_their_errno(probe: str) -> None:
    def check(value: dict[str, Any]) -> None:
        for key, item in value.items():
            if isinstance(item, dict):
                check(item)
            elif item is None and key != "hypervisor_vendor":
                assert value[f"{key}_errno"].startswith("E"), key

    check(facts(probe))


def test_facts_escape_what_is_not_utf8(probe: str, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b'a"b\\c\n\xff\xc3\xa9\xed\xa0\x80')
    odd.mkdir()
    assert os.fsencode(facts(probe, cwd=odd)["cwd"]) == os.fsencode(odd)


def test_facts_show_a_confined_process(probe: str) -> None:
    """Not only what the host has: the same facts change when the kernel's state does."""
    if os.getuid() != 0:
        pytest.skip("needs root, for unshare and setpriv")
    confined = [
        "unshare", "--net", "--uts", "--ipc", "setpriv", "--no-new-privs", "--bounding-set", "-all",
        "--inh-caps", "-all", "--reuid", "65534", "--clear-groups", "--regid", "65534",
    ]  # fmt: skip
    host = facts(probe)
    # setpriv changes the user before exec, which must still reach the binary: hand it over as a descriptor.
    fd = os.open(probe, os.O_RDONLY)
    try:
        inside = json.loads(run(confined[0], *confined[1:], f"/proc/self/fd/{fd}", "facts", pass_fds=[fd]).stdout)
    finally:
        os.close(fd)
    assert inside["no_new_privs"] == 1
    assert set(inside["capabilities"].values()) == {"0" * 16}
    assert inside["uids"]["effective"] == 65534
    for namespace in ("net", "uts", "ipc"):
        assert inside["namespaces"][namespace] != host["namespaces"][namespace]
    assert inside["namespaces"]["pid"] == host["namespaces"]["pid"]
    assert inside["interfaces"]["lo"] == {"up": False}
    assert inside["sensitive_files"]["/etc/shadow"]["read"] == "EACCES"


def test_what_takes_memory_is_the_first_that_the_kernel_would_end(probe: str) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    # What it prints at its end finds a full pipe.
    with subprocess.Popen([probe, "try-memory", "1M"], stdout=writing) as taking:
        try:
            order, deadline = Path(f"/proc/{taking.pid}/oom_score_adj"), time.monotonic() + 10
            while order.read_text() != "1000\n" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert order.read_text() == "1000\n"
        finally:
            taking.kill()
            os.close(reading)
            os.close(writing)
