"""What the tests of cgroups share: managers on this machine's own hierarchies, a process that joins a cgroup, and a
folder that stands in for version 2.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringfence.errors import KernelError
from ringfence.linux import cgroups
from ringfence.linux.cgroups import base, files, home, v2, values

# A child joins by the descriptors of argv[1], then does what argv[2] says.
MEMBER = r"""
import os, sys, time
for fd in map(int, sys.argv[1].split(",")):
    os.write(fd, b"0")
verb, argument = sys.argv[2], int(sys.argv[3])
if verb == "hog":
    kept = []
    for _ in range(argument):
        kept.append(bytearray(b"x") * 2**20)
    print("hogged")
elif verb == "hold":
    kept = bytearray(b"x") * (argument << 20)
    print("held", flush=True)
    time.sleep(60)
elif verb == "fork":
    import errno, signal
    made, failure = [], "none"
    for _ in range(argument):
        try:
            pid = os.fork()
        except OSError as error:
            failure = errno.errorcode[error.errno]
            break
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        made.append(pid)
    print(len(made), failure)
    for pid in made:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
elif verb == "burn":
    end = time.monotonic() + argument / 1000
    while time.monotonic() < end:
        pass
elif verb == "linger":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(argument):
        if os.fork() == 0:
            os.setsid()
            os.fork()
            break
    print("ready", flush=True)
    time.sleep(60)
"""


def member(cgroup: base.Cgroup, verb: str, argument: int) -> subprocess.Popen[bytes]:
    fds = cgroup.join_fds()
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", MEMBER, ",".join(map(str, fds)), verb, str(argument)],
        pass_fds=fds,
        stdout=subprocess.PIPE,
    )


def run_member(cgroup: base.Cgroup, verb: str, argument: int) -> tuple[int, bytes]:
    with member(cgroup, verb, argument) as child:
        output, _ = child.communicate(timeout=60)
        return child.returncode, output


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def directories_of(manager: base.Manager) -> list[Path]:
    return [Path(os.readlink(f"/proc/self/fd/{one.fd}")) for one in manager.bases()]


@pytest.fixture
def real() -> Iterator[base.Manager]:
    """A manager of version 1 on this machine; after the test nothing of it may be left."""
    found = cgroups.layout()
    lacking = [one for one in found.controllers if one.version != 1 or not one.usable]
    if lacking:
        pytest.skip(f"this machine lacks cgroup v1 {lacking[0].name}: {lacking[0].reason or 'it is v2'}")
    before = open_fds()
    manager = cgroups.open_manager(found)
    made = directories_of(manager)
    yield manager
    manager.close()
    assert [path for path in made if path.exists()] == []
    assert open_fds() == before


@pytest.fixture
def unified() -> Iterator[base.Manager]:
    """A manager on this machine's real hierarchy of version 2, without any controller."""
    found = cgroups.layout()
    if not found.unified or files.may_make_directories(found.unified):
        pytest.skip("this machine has no writable cgroup v2 hierarchy")
    before = open_fds()
    manager = v2.V2Manager(found, home.Home(path=found.unified))
    made = directories_of(manager)
    yield manager
    manager.close()
    assert [path for path in made if path.exists()] == []
    assert open_fds() == before


class FakeKernel:
    """Control files of version 2 in a plain folder, with the rules that ringfence has to reckon with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files = {
            "memory": ("memory.max", "memory.swap.max", "memory.current", "memory.oom.group"),
            "pids": ("pids.max",),
            "cpu": ("cpu.max", "cpu.weight"),
            "cpuset": ("cpuset.cpus", "cpuset.cpus.effective"),
            "io": ("io.max",),
        }
        self.effective_cpus = ""  # where it isn't what is asked for
        self.absent: set[str] = set()
        self.mkdir, self.rmdir = os.mkdir, os.rmdir
        monkeypatch.setattr(os, "mkdir", self.make)
        monkeypatch.setattr(os, "rmdir", self.remove)
        monkeypatch.setattr(files, "set_and_read", self.set_and_read)

    def populate(self, folder: Path, controllers: str, subtree: str = "", pids: str = "", kind: str = "domain") -> None:
        folder.mkdir(exist_ok=True, parents=True)
        files = {"cgroup.controllers": controllers, "cgroup.subtree_control": subtree, "cgroup.procs": pids}
        if kind:
            files["cgroup.type"] = kind + "\n"
            files["cpu.stat"] = "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nthrottled_usec 70\n"
            for controller in controllers.split():
                files.update(dict.fromkeys(self.files.get(controller, ()), "max\n"))
        for name, text in files.items():
            if name not in self.absent:
                (folder / name).write_text(text)

    def hand_out(self, folder: Path, controllers: str) -> None:
        """The children that are there already get a new controller's files too."""
        for child in folder.iterdir():
            for controller in controllers.split() if child.is_dir() and (child / "cgroup.type").exists() else ():
                for name in self.files.get(controller, ()):
                    if name not in self.absent and not (child / name).exists():
                        (child / name).write_text("max\n")
            if child.is_dir() and (child / "cgroup.type").exists():
                (child / "cgroup.controllers").write_text(controllers)

    def make(self, name: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self.mkdir(name, mode, dir_fd=dir_fd)
        if dir_fd is not None:
            parent = Path(os.readlink(f"/proc/self/fd/{dir_fd}"))
            self.populate(parent / os.fsdecode(name), (parent / "cgroup.subtree_control").read_text())

    def remove(self, name: Any, *, dir_fd: int | None = None) -> None:
        if dir_fd is not None:
            folder = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / os.fsdecode(name)
            if (folder / "cgroup.procs").read_text().strip():
                raise OSError(errno.EBUSY, "busy")
            for file in folder.iterdir():
                file.unlink()
        self.rmdir(name, dir_fd=dir_fd)

    def set_and_read(self, directory_fd: int, name: str, value: str) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{directory_fd}")) / name
        if not path.exists():
            raise KernelError("write", (name, value), errno.ENOENT)
        if path.name == "cgroup.subtree_control":
            has_processes = (path.parent / "cgroup.procs").read_text().strip()
            if has_processes and (path.parent / "cgroup.type").exists():
                raise KernelError("write", (name, value), errno.EBUSY)
            words = set(path.read_text().split())
            for word in value.split():
                words = words | {word[1:]} if word[0] == "+" else words - {word[1:]}
            value = " ".join(sorted(words))
            self.hand_out(path.parent, value)
        if path.name == "cpuset.cpus":
            (path.parent / "cpuset.cpus.effective").write_text(self.effective_cpus or value)
        path.write_text(value + "\n")
        return value


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    return FakeKernel(monkeypatch)


def v2_layout(root: Path, own: str) -> values.Layout:
    return base.read_layout(f"1 1 0:1 / {root} rw - cgroup2 cgroup2 rw\n", f"0::{own}\n")
