"""`namespaces=`: what of a container is its own, the host's or joined; and clocks set ahead."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.spec import Spec
from support import leaks
from support.sandboxes import applied, ended, host_facts, need_root, output, python, run_probe

NAMES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time")
SHAREABLE = tuple(name for name in NAMES if name != "mnt")
RANGE = range(0x71000000, 0x7FFE0000)


def facts(**options: Any) -> tuple[dict[str, Any], rf.Result]:
    result = run_probe("container", "facts", **options)
    found: dict[str, Any] = json.loads(output(result))
    return found, result


def inode(name: str, pid: int | str = "self") -> int:
    return os.stat(f"/proc/{pid}/ns/{name}").st_ino


@contextmanager
def other(*options: str) -> Iterator[int]:
    """A process in namespaces of its own that unshare(1) makes; its pid."""
    done, ready = os.pipe()
    with subprocess.Popen(
        [
            "unshare",
            *options,
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import os, time; os.write({ready}, b'1'); time.sleep(60)",
        ],
        pass_fds=(ready,),
    ) as process:
        os.close(ready)
        try:
            assert os.read(done, 1) == b"1"
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield int(children[0]) if children else process.pid
        finally:
            os.close(done)
            process.kill()


def test_every_one_is_its_own_by_default() -> None:
    found, result = facts(namespaces=dict.fromkeys(NAMES, "own"))
    rules = applied(result)
    for name in NAMES:
        one = rules[f"namespace {name}"]
        assert (one.requested, one.effective) == ("own", found["namespaces"][name])
        assert one.effective != inode(name)


@pytest.mark.parametrize("name", SHAREABLE)
def test_each_is_shared_with_the_host(name: str) -> None:
    need_root()
    found, result = facts(namespaces={name: "host"})
    one = applied(result)[f"namespace {name}"]
    assert (one.requested, one.effective, one.mechanism) == ("host", inode(name), "the host's")
    same = {other for other in NAMES if found["namespaces"][other] == inode(other)}
    assert same == {name}


def test_with_the_hosts_user_namespace_the_workload_is_nobodys_id() -> None:
    need_root()
    found, result = facts(namespaces={"user": "host"}, files={"f": b"x"}, collect=["f"])
    assert {uid in RANGE for uid in found["uids"].values()} == {True}
    assert {int(one, 16) if isinstance(one, str) else one for one in found["capabilities"].values()} == {0}
    assert found["no_new_privs"]
    assert result.files == {"f": b"x"}
    # Init is root there, and the workload can do nothing to it.
    kill = "import os\ntry: os.kill(1, 9)\nexcept OSError as error: print(error.errno)"
    assert output(rf.run(["python3", "-c", kill], namespaces={"user": "host"})) == b"1\n"  # EPERM


def test_init_of_the_hosts_user_namespace_keeps_few_capabilities() -> None:
    need_root()
    code = "import os; print(open('/proc/1/status').read())"
    result = rf.run(["python3", "-c", code], namespaces={"user": "host"})
    status = dict(line.split(":", 1) for line in output(result).decode().splitlines() if line)
    assert status["CapEff"] == status["CapPrm"]
    kept = int(status["CapPrm"], 16)
    for lacking in (12, 16, 17, 19, 22, 25, 27, 39):  # net_admin, module, rawio, ptrace, boot, time, mknod, bpf
        assert not kept >> lacking & 1, hex(kept)
    assert int(status["CapBnd"], 16) == 0


def test_processes_of_a_shared_pid_namespace_end() -> None:
    """No PID namespace ends them: ringfence does, by their id, even those that daemonize."""
    need_root()
    for namespaces in ({"pid": "host"}, {"pid": "host", "user": "host"}):
        code = """
import os, sys
for _ in range(8):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", "61"])
        os._exit(0)
print(os.getpid(), os.getuid(), len([n for n in os.listdir('/proc') if n.isdigit()]))
"""
        result = rf.run(["python3", "-c", code], namespaces=namespaces, text=True)
        assert ended(result) == ("exited", 0, None), result
        pid, _, count = map(int, str(result.stdout).split())
        assert pid > 2
        assert count > 2
        assert not [name for name in os.listdir("/proc") if name.isdigit() and _command(name) == b"sleep\x0061\0"]


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_a_killed_caller_leaves_nothing_in_the_hosts_pid_namespace() -> None:
    """No PID namespace ends it: the launcher does, by the id."""
    need_root()
    code = """
import ringfence as rf
script = "(setsid sleep 63 &); echo x > f; sleep 64"
rf.run(["sh", "-c", script], namespaces={"pid": "host"})
"""
    with python(code) as caller:

        def sleeping() -> list[str]:
            return [name for name in os.listdir("/proc") if name.isdigit() and _command(name).startswith(b"sleep\x006")]

        try:
            deadline = time.monotonic() + 30
            while len(sleeping()) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            os.kill(caller.pid, signal.SIGKILL)
        assert leaks.settled(sleeping, 5) == []
        assert leaks.settled(lambda: leaks.run_folders_of(caller.pid), 5) == set()


def test_time_limit_in_a_shared_pid_namespace() -> None:
    need_root()
    result = rf.run(["sleep", "60"], namespaces={"pid": "host"}, limits=rf.Limits(wall_time="300ms"))
    assert result.termination_reason == "wall_time"


def test_system_v_ipc_of_the_host_is_out_of_reach() -> None:
    need_root()
    code = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
print(libc.shmget(0x5246, 4096, 0o1666), errno.errorcode.get(ctypes.get_errno()))
"""
    result = rf.run(["python3", "-c", code], namespaces={"ipc": "host"}, text=True)
    assert str(result.stdout).split() == ["-1", "EPERM"]
    # The control: in an IPC namespace of its own it may.
    assert str(rf.run(["python3", "-c", code], text=True).stdout).split()[0] != "-1"


def test_joining_by_pid_and_by_path() -> None:
    need_root()
    with other("--net", "--ipc", "--uts", "--time", "--cgroup") as pid:
        for name in ("net", "ipc", "uts", "time", "cgroup"):
            for value, label in ((pid, f"pid {pid}"), (f"/proc/{pid}/ns/{name}", f"/proc/{pid}/ns/{name}")):
                found, result = facts(namespaces={name: value})
                assert found["namespaces"][name] == inode(name, pid) != inode(name)
                one = applied(result)[f"namespace {name}"]
                assert (one.requested, one.effective) == (label, inode(name, pid))
                assert one.mechanism == f"joined: {label}, by setns"
                others = [n for n in NAMES if n != name and found["namespaces"][n] in (inode(n), inode(n, pid))]
                assert others == []


def test_a_joined_network_is_reached_and_not_changed() -> None:
    """A server in a network namespace of its own: a container that joins it talks to it, and has no power over it."""
    need_root()
    with other("--net") as pid:
        serve = """
import socket, subprocess
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
s = socket.create_server(("127.0.0.1", 7000))
print("ready", flush=True)
while True:
    c, _ = s.accept()
    c.sendall(b"joined"); c.close()
"""
        command = ["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-c", serve]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            try:
                ask = "import socket; print(socket.create_connection(('127.0.0.1', 7000), 5).recv(99).decode())"
                result = rf.run(["python3", "-c", ask], namespaces={"net": pid}, text=True)
                assert (result.stdout, result.stderr) == ("joined\n", "")
                down = rf.run(["ip", "link", "set", "lo", "down"], namespaces={"net": pid}, text=True, user="root")
                assert "Operation not permitted" in str(down.stderr)
                assert rf.run(["python3", "-c", ask], namespaces={"net": pid}, text=True).stdout == "joined\n"
                assert applied(result)["network"].effective == "joined"
            finally:
                server.kill()
        with pytest.raises(OSError):  # the control: it isn't the host's
            socket.create_connection(("127.0.0.1", 7000), 1).close()


def test_a_joined_user_namespace_gives_its_ids() -> None:
    need_root()
    with other("--user", "--net") as pid:
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text("0 1800000000 65536")
        found, result = facts(namespaces={"user": pid, "net": pid}, files={"f": b"x"}, collect=["f"])
        assert found["namespaces"]["user"] == inode("user", pid)
        assert found["uids"]["real"] == 1000
        assert applied(result)["user"].mechanism == "a joined user namespace: 1800001000:1800001000 outside"
        assert result.files == {"f": b"x"}
        assert facts(namespaces={"user": pid}, user=7)[0]["uids"]["real"] == 7
        with pytest.raises(rf.CannotEnforce, match="has no such id"):
            rf.run(["true"], namespaces={"user": pid}, user=70000)


def test_a_joined_user_namespace_whose_root_is_the_hosts_is_refused() -> None:
    need_root()
    with other("--user") as pid:
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text("0 0 1\n7 1800000000 1")
        assert refused(namespaces={"user": pid}) == [
            ("user", "0:0 of the joined user namespace is root on the host, in part at least")
        ]
        assert facts(namespaces={"user": pid}, user=7)[0]["uids"]["real"] == 7


def test_a_joined_pid_namespace() -> None:
    need_root()
    with other("--pid", "--fork", "--mount-proc") as pid:
        before = _processes_in(pid)
        code = "import os; print(os.getpid(), sorted(int(n) for n in os.listdir('/proc') if n.isdigit())[0])"
        result = rf.run(["python3", "-c", code], namespaces={"pid": pid, "user": "host"}, text=True)
        assert ended(result) == ("exited", 0, None), result
        mine, first = map(int, str(result.stdout).split())
        assert first == 1
        assert mine > 1
        # Nothing of it stays, once the launcher has reaped init; and those that were there before are still there.
        assert leaks.settled(lambda: [one for one in _processes_in(pid) if one not in before], leaks.GRACE_S) == []
        assert _processes_in(pid) == before


def _processes_in(pid: int) -> list[str]:
    wanted = inode("pid", pid)
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and inode("pid", name) == wanted:
                found.append(name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it ended, or is not ours to look at
            continue
    return sorted(found)


CLOCKS = "import time; print(time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME))"
S = 10**9


@pytest.mark.parametrize("offsets", [("1h", "2h"), (-1.5, 0), (0, "-2s"), (0.25, -0.25), ("20000d", "20000d")])
def test_clocks_are_ahead_by_what_was_asked(offsets: tuple[Any, Any]) -> None:
    names = dict(zip(("monotonic_offset", "boottime_offset"), offsets, strict=True))
    wanted = rf.Namespaces(**names)
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    result = rf.run(["python3", "-c", CLOCKS], namespaces=names)
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    inside = tuple(map(int, output(result).split()))
    asked = (wanted.monotonic_offset_ns, wanted.boottime_offset_ns)
    for first, found, last, offset in zip(before, inside, after, asked, strict=True):
        assert first <= found - offset <= last
    rules = applied(result)
    for name, offset in zip(names, asked, strict=True):
        if offset:
            assert (rules[name].requested, rules[name].effective) == (offset, offset)


def test_limits_and_usage_go_by_our_own_clock() -> None:
    ahead = {"monotonic_offset": "1h", "boottime_offset": "1h"}
    begun = time.monotonic()
    result = rf.run(["sleep", "60"], namespaces=ahead, limits=rf.Limits(wall_time="300ms"))
    assert result.termination_reason == "wall_time"
    assert time.monotonic() - begun < 20
    result = rf.run(["sleep", "0.2"], namespaces=ahead)
    assert result.usage.wall_ns is not None
    assert result.usage.startup_ns is not None
    assert 0.2 * S <= result.usage.wall_ns < 20 * S
    assert 0 < result.usage.startup_ns < 20 * S


# ---- refusals ----


def refused(isolation: str = "container", **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(rf.CannotEnforce) as caught:
        rf.run(["true"], isolation=isolation, **options)
    return [(one.rule, one.reason) for one in caught.value.unmet]


def test_a_file_tree_is_always_its_own() -> None:
    for value in ("host", os.getpid(), "/proc/self/ns/mnt"):
        assert refused(namespaces={"mnt": value}) == [
            ("namespaces", "a file tree of its own is what makes it a container")
        ]


@pytest.mark.parametrize("isolation", ["process", "vm"])
def test_other_levels_have_none_to_choose(isolation: str) -> None:
    assert [rule for rule, _ in refused(isolation, namespaces={"ipc": "host"})] == ["namespaces"]


def test_what_contradicts_itself() -> None:
    need_root()
    assert [r for r, _ in refused(namespaces={"uts": "host"}, hostname="x")] == ["hostname"]
    assert [r for r, _ in refused(namespaces={"user": "host"}, user=0)] == ["user"]
    assert [r for r, _ in refused(namespaces={"pid": os.getppid() or 1})] != []
    contradictions: tuple[dict[str, Any], ...] = (
        {"network": "none", "namespaces": {"net": "host"}},
        {"network": "host", "namespaces": {"net": "own"}},
        {"network": "none", "namespaces": {"net": 1}},
    )
    for options in contradictions:
        with pytest.raises(rf.SpecError, match="network"):
            rf.run(["true"], **options)
    with pytest.raises(rf.SpecError, match="ahead in a time namespace of its own"):
        rf.Namespaces(time="host", monotonic_offset=1)


def test_a_shared_network_is_one_and_the_same() -> None:
    assert Spec.make(["true"], namespaces={"net": "host"}).network == rf.Network("host")
    assert "network" in Spec.make(["true"], namespaces={"net": "host"}).asked
    assert Spec.make(["true"], namespaces={"net": "host"}, network="host").network == rf.Network("host")


def test_what_is_no_namespace(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for value, said in (
        (tmp_path / "none", "No such file"),
        (tmp_path / "fifo", "is no namespace"),
        ("/proc/self/ns/uts", "is a uts namespace"),
        (2**22, "No such process"),
    ):
        with pytest.raises(rf.SpecError, match=said):
            rf.run(["true"], namespaces={"net": value})


def test_the_hosts_by_another_name_is_the_hosts() -> None:
    need_root()
    found, result = facts(namespaces={"net": os.getpid()})
    assert found["namespaces"]["net"] == inode("net")
    assert applied(result)["network"].effective == "host"
    assert applied(result)["namespace net"].mechanism == "the host's"
    assert [rule for rule, _ in refused(namespaces={"user": "/proc/self/ns/user"}, user=5)] == ["user"]


def test_a_clock_before_the_boot_is_refused() -> None:
    with pytest.raises(rf.StartError) as caught:
        rf.run(["true"], namespaces={"monotonic_offset": "-4000d"})
    assert (caught.value.step, caught.value.errno) == ("clocks", 34)  # ERANGE
    assert host_facts()["namespaces"]["time"] == inode("time")


@pytest.mark.parametrize("namespaces", [{"user": "host"}, {"pid": "host"}, {"ipc": "host"}])
def test_capabilities_count_in_namespaces_of_its_own_only(namespaces: dict[str, Any]) -> None:
    need_root()
    assert [rule for rule, _ in refused(namespaces=namespaces, capabilities=["chown"])] == ["capabilities"]
    # The control: each by itself is fine.
    assert rf.run(["true"], namespaces=namespaces).ok
    assert rf.run(["true"], capabilities=["chown"]).ok
