"""What live processes are said to be: ringfence's own at every level, and those that others made."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ringfence as rf
from ringfence.comparison import peers
from support import leaks
from support.sandboxes import LOCAL_LEVELS, SOURCES, need, need_level, need_root

ALL = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time")


@contextmanager
def running(words: list[str], name: str, **options: object) -> Iterator[rf.Inspection]:
    """The process of that name among what the command starts, inspected."""
    # A pipe: the OCI runtimes give the streams that they get to the ids inside, /dev/null itself too.
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    starter = subprocess.Popen(words, **streams, **options)  # type: ignore[call-overload]
    try:
        yield rf.inspect(found_below(starter.pid, name))
    finally:
        kill_below(starter.pid, name)
        try:
            starter.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            starter.kill()
            starter.communicate()


def kill_below(pid: int, name: str) -> None:
    """All of that name, itself or below it."""
    for one in leaks.descendants(pid):
        if one.name == name:
            os.kill(one.pid, 9)
    if Path(f"/proc/{pid}/comm").read_text().strip() == name:
        os.kill(pid, 9)


def found_below(pid: int, name: str) -> int:
    """The pid of that name, itself or below it, once it executes what it is to."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        everyone = [one.pid for one in leaks.descendants(pid) if one.name == name]
        if Path(f"/proc/{pid}/comm").read_text().strip() == name:
            everyone.append(pid)
        if everyone:
            return everyone[0]
        time.sleep(0.02)
    raise AssertionError(f"no {name} in 60 s")


@contextmanager
def sandboxed(isolation: str, **options: object) -> Iterator[rf.Inspection]:
    """`sleep` in a sandbox of ours that stays."""
    with rf.Sandbox(isolation=isolation, **options) as sandbox:  # type: ignore[arg-type]
        assert sandbox.run(
            ["true"]
        ).ok  # else another guest is started in place of one that is killed before its first word

        def sleep() -> None:
            with contextlib.suppress(rf.ProtocolError):  # a QEMU that was killed takes the run with it
                sandbox.run(["sleep", "60"])

        thread = threading.Thread(target=sleep)
        thread.start()
        name = "qemu-system-x86" if isolation == "vm" else "sleep"
        pid = found_below(os.getpid(), name)
        try:
            yield rf.inspect(pid)
        finally:
            kill_below(os.getpid(), name)  # also a QEMU that waits for the next guest
            thread.join()


def own(found: rf.Inspection) -> list[str]:
    return [one.name for one in found.namespaces if one.shared is False]


def test_this_process_shares_all() -> None:
    found = rf.inspect(os.getpid())
    first = rf.inspect(1)
    assert found.kind == first.kind == "process"
    assert not own(first)
    assert found.uids[1] == os.geteuid()
    assert found.exe == os.readlink("/proc/self/exe")
    assert found.argv and found.parent == os.getppid()
    # Of what this caller may not see nothing is claimed.
    assert ("shares all with the host" in first.verdict) is ("namespaces" not in first.partial)
    with pytest.raises(rf.KernelError, match="ENOENT"):
        rf.inspect(2**22 + 1)


def test_of_what_cannot_be_seen_nothing_is_claimed() -> None:
    need_root()  # to be another user
    child = os.fork()
    if child == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        ended = rf.inspect(child).verdict
    finally:
        os.waitpid(child, 0)
    assert "shares all" not in ended
    assert "not all of its namespaces can be seen" in ended
    script = "import os; os.setgid(65534); os.setuid(65534); import ringfence as rf; print(rf.inspect(1).verdict)"
    environment = {"PYTHONPATH": os.path.dirname(os.path.dirname(rf.__file__)), "HOME": "/tmp"}
    told = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert "shares all" not in told.stdout
    assert "its namespaces may not be seen by this user" in told.stdout


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_ours(isolation: str) -> None:
    need_root()
    limits = rf.Limits(memory="64M", pids=20, cpus=0.5)
    with sandboxed(isolation, limits=limits) as found:
        assert found.kind == isolation
        assert found.capabilities == dict.fromkeys(found.capabilities, ())
        assert found.seccomp == "filter"
        assert found.no_new_privs is True
        assert found.uids[1] != 0
        assert found.bounds.memory_bytes == 64 << 20
        assert found.bounds.pids == 20
        assert found.bounds.cpus == 0.5
        assert found.bounds.pids_used == 1
        assert 0 < (found.bounds.memory_used_bytes or 0) <= 64 << 20
        assert found.maker == "ringfence"
        if isolation == "container":
            assert own(found) == list(ALL)
            assert found.capabilities_on_host is False
            assert (found.root or "").startswith("its own: tmpfs")
            assert found.namespace("pid").others == 1  # its init
            assert found.verdict.startswith("a container, made by ringfence: its own user, mount, PID, network, IPC")
            # A writable work directory of the host's is what a sandbox is given.
            assert [one for one in found.weak if "/work" not in one] == []
        else:
            assert found.root == "the host's"


def test_unshare_as_root_is_a_weak_container() -> None:
    need_root()
    words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sleep", "60"]
    with running(words, "sleep") as found:
        assert found.kind == "container"
        assert own(found) == ["mnt", "pid"]
        assert found.capabilities_on_host is True
        held = rf.inspect(os.getpid()).capabilities["effective"]
        assert found.capabilities["effective"] == held
        if "CAP_SYS_MODULE" in held:
            assert found.weak[0] == "can load kernel modules (CAP_SYS_MODULE)"
            assert "can load kernel modules (CAP_SYS_MODULE)" in found.verdict
        said = " | ".join(found.weak)
        assert "is root on the host too: no user namespace" in said
        assert "shares the host's network" in said
        assert "no seccomp filter" in said
        assert "nothing limits its" in said


def test_the_sockets_of_the_hosts_network_that_it_was_left() -> None:
    need_root()
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = ["unshare", "--net", "sleep", "60"]
        with running(words, "sleep", pass_fds=[server.fileno()]) as found:
            assert own(found) == ["net"]
            assert found.sockets == (1 if rf.inspect(1).namespace("net").inode == own_net() else 0)
    with running(["unshare", "--net", "sleep", "60"], "sleep") as found:
        assert found.sockets == 0


def own_net() -> int:
    return os.stat("/proc/self/ns/net").st_ino


def test_a_socket_of_an_engine_and_a_folder_of_the_hosts(tmp_path: Path) -> None:
    """The worst that a container is given, by bind mounts, as `docker run -v` makes them."""
    need_root()
    with socket.socket(socket.AF_UNIX) as engine:
        (tmp_path / "shared").mkdir()
        path = tmp_path / "docker.sock"
        engine.bind(str(path))
        script = f"mount --bind {path} {path} && mount --bind {tmp_path}/shared /mnt && exec sleep 60"
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
        with running(words, "sleep") as found:
            assert found.weak[0] == f"the socket of an engine, which starts what it is told to, is there: {path}"
            assert f"may write to the host's {tmp_path}/shared at /mnt" in found.mounts


@pytest.mark.parametrize("tool", ["bwrap", "runc", "crun"])
def test_what_others_made(tool: str) -> None:
    need_root()
    need(f"Debian's {peers.PEERS[tool]}", shutil.which(tool) is not None)
    with tempfile.TemporaryDirectory(prefix="ringfence-inspect-") as folder:
        os.chmod(folder, 0o711)
        command = ["/usr/bin/sleep", "60"]
        words = by_bwrap(folder, command) if tool == "bwrap" else by_runtime(tool, folder, command)
        prefix = ["unshare", "--mount", "sh", "-c", 'umount /sys/fs/cgroup/unified; exec "$@"', "sh"]
        with running([*prefix, *words] if tool == "crun" else words, "sleep") as found:
            assert found.kind == "container"
            assert found.maker == ("bubblewrap" if tool == "bwrap" else tool)
            assert found.capabilities_on_host is False
            assert found.no_new_privs is True
            assert not found.capabilities["effective"]
            assert set(own(found)) >= {"user", "mnt", "pid", "net", "ipc", "uts"}
            assert found.seccomp == "none"
            assert "no seccomp filter: every system call of the host's kernel is open" in found.weak
            if tool == "bwrap":
                assert found.bounds.pids is None
                assert any("nothing limits its" in one for one in found.weak)
            else:
                assert found.container is not None
                assert found.container.id == f"inspect-{os.getpid()}"
                assert found.bounds.memory_bytes == 256 << 20
                assert found.bounds.pids == 64
                assert "read-only" in (found.root or "")


def by_bwrap(folder: str, command: list[str]) -> list[str]:
    del folder
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib64"):
        words += ["--symlink", f"usr/{name}", f"/{name}"]
    return [*words, "--proc", "/proc", "--dev", "/dev", "--", *command]


def by_runtime(tool: str, folder: str, command: list[str]) -> list[str]:
    bundle = os.path.join(folder, "bundle")
    peers._bundle(bundle, command)
    return [tool, "--root", os.path.join(folder, "state"), "run", "--bundle", bundle, f"inspect-{os.getpid()}"]


def test_a_qemu_that_nobody_jailed() -> None:
    program = shutil.which("qemu-system-x86_64")
    need("vm level", program is not None)
    assert program is not None
    words = [program, "-S", "-machine", "microvm", "-accel", "tcg", "-m", "64", "-smp", "2", "-nodefaults"]
    words += ["-display", "none", "-device", "virtio-rng-device"]
    with running(words, "qemu-system-x86") as found:
        assert found.kind == "vm"
        assert found.monitor is not None
        assert found.monitor.program == "QEMU"
        assert found.monitor.accelerator == "tcg"
        assert (found.monitor.memory_bytes, found.monitor.cpus) == (64 << 20, 2)
        assert found.monitor.machine == "microvm"
        assert found.monitor.devices == ("virtio-rng-device",)
        if rf.inspect(1).namespace("net").inode == own_net():
            assert "its monitor not jailed" in found.verdict


def test_our_own_vm_is_jailed() -> None:
    need_level("vm")
    with sandboxed("vm") as found:
        assert found.kind == "vm"
        assert own(found) == list(ALL)
        assert found.seccomp == "filter"
        assert not found.capabilities["bounding"] or os.geteuid() != 0
        assert "its monitor jailed in a container, made by ringfence" in found.verdict


def test_an_unprivileged_user_is_told_what_it_may_not_see(tmp_path: Path) -> None:
    need_root()
    code = (
        "import json, os, ringfence as rf\n"
        "print(json.dumps([rf.inspect(pid).to_json() for pid in (os.getppid(), os.getpid())]))"
    )
    shutil.copytree(SOURCES / "ringfence", tmp_path / "ringfence")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run(
        ["setpriv", "--reuid", "65432", "--regid", "65432", "--clear-groups", sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        check=True,
        timeout=60,
    )
    root, itself = json.loads(done.stdout)
    assert set(root["partial"]) >= {"namespaces", "descriptors"}
    assert all(one["inode"] is None for one in root["namespaces"])
    # By their mounts and their numbers these are known all the same.
    assert {one["name"]: one["shared"] for one in root["namespaces"]} == dict.fromkeys(ALL) | {"mnt": True, "pid": True}
    assert "its namespaces may not be seen by this user" in root["verdict"]
    assert "shares all" not in root["verdict"]
    assert itself["partial"] == []
    assert itself["uids"][1] == 65432


def test_the_survey_groups_what_belongs_together() -> None:
    need_root()
    with sandboxed("container") as inside:
        groups = rf.survey()
        mine = next(one for one in groups if inside.pid in one.pids)
        assert mine.kind == "container"
        assert len(mine.pids) == 2  # init and the command
        assert mine.resident_bytes > 0
        plain = next(one for one in groups if one.pids == (os.getpid(),))
        assert plain.kind == "process"
        kinds = [one.kind for one in groups]
        assert kinds == sorted(kinds, key=["vm", "container", "process"].index)


@pytest.mark.parametrize("words", [["inspect", str(os.getpid())], ["ps", "--all"]], ids=["inspect", "ps"])
def test_the_command_line(words: list[str], capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    from ringfence.cli import main

    assert main(words) == 0
    text = capfdbinary.readouterr().out.decode()
    assert str(os.getpid()) in text
    assert main([*words, "--json"]) == 0
    told = json.loads(capfdbinary.readouterr().out)
    found = told if words[0] == "inspect" else next(one["first"] for one in told if os.getpid() in one["pids"])
    assert found["pid"] == os.getpid()
    assert found["capabilities"].keys() == {"effective", "permitted", "inheritable", "bounding", "ambient"}
