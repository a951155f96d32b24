"""Cgroups: where they can be made, and what their limits do.

Version 1, and what version 2 does without controllers, are tested for real where this machine mounts them.
The control files of version 2's controllers are a directory tree that stands in for the kernel's.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cgroup_parts import FakeKernel, directories_of, member, run_member, v2_layout

from ringfence.errors import KernelError
from ringfence.linux import cgroups
from ringfence.linux.cgroups import Limits, base, files, home, v1, v2, values

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / {root}/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / {root}/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / {root}/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / {root}/unified rw,relatime - cgroup2 cgroup2 rw
"""
HYBRID_OWN = "9:name=systemd:/\n4:memory:/jobs/7\n1:cpu,cpuacct:/\n0::/user\n"


def folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)


class TestLayout:
    def test_a_hybrid_one_with_controllers_that_share_a_hierarchy(self, tmp_path: Path) -> None:
        folders(tmp_path, "cpu", "memory/jobs/7", "unified/user")
        found = base.read_layout(HYBRID.format(root=tmp_path), HYBRID_OWN)
        assert found.kind == "hybrid"
        assert found.unified == os.fsencode(tmp_path) + b"/unified/user"
        assert found.controller("memory").path == os.fsencode(tmp_path) + b"/memory/jobs/7"
        assert found.controller("cpu").path == found.controller("cpuacct").path == os.fsencode(tmp_path) + b"/cpu"
        assert found.controller("memory").usable
        pids = found.controller("pids")
        assert (pids.usable, pids.version) == (False, 0)
        assert "mixed layout" in pids.reason

    def test_a_mount_that_shows_only_a_part(self, tmp_path: Path) -> None:
        folders(tmp_path, "memory/inner")
        line = f"1 1 0:1 /docker/abc {tmp_path}/memory rw - cgroup cgroup rw,memory\n"
        found = base.read_layout(line, "4:memory:/docker/abc/inner\n")
        assert found.kind == "v1"
        assert found.controller("memory").path == os.fsencode(tmp_path) + b"/memory/inner"
        outside = base.read_layout(line, "4:memory:/docker/abcdef\n").controller("memory")
        assert not outside.usable
        assert "doesn't show this process's own cgroup" in outside.reason

    def test_another_cgroup_namespace(self, tmp_path: Path) -> None:
        line = f"1 1 0:1 /.. {tmp_path} rw - cgroup cgroup rw,memory\n"
        assert not base.read_layout(line, "4:memory:/\n").controller("memory").usable
        line = f"1 1 0:1 / {tmp_path} rw - cgroup cgroup rw,memory\n"
        assert not base.read_layout(line, "4:memory:/../other\n").controller("memory").usable

    def test_names_with_spaces(self, tmp_path: Path) -> None:
        folders(tmp_path, "a b/c d")
        line = f"1 1 0:1 / {tmp_path}/a\\040b rw - cgroup cgroup rw,memory\n"
        found = base.read_layout(line, "4:memory:/c d\n").controller("memory")
        assert found.usable
        assert found.path == os.fsencode(tmp_path) + b"/a b/c d"

    def test_nothing_mounted(self) -> None:
        found = base.read_layout("1 1 0:1 / / rw - ext4 /dev/vda rw\n", "0::/\n")
        assert found.kind == "none"
        assert [one.reason for one in found.controllers] == [
            f"no {name} controller is mounted here" for name in values.CONTROLLERS
        ]

    def test_a_directory_that_is_not_there_is_a_reason(self, tmp_path: Path) -> None:
        line = f"1 1 0:1 / {tmp_path} rw - cgroup cgroup rw,memory\n"
        found = base.read_layout(line, "4:memory:/gone\n").controller("memory")
        assert not found.usable
        assert found.reason == f"{tmp_path}/gone isn't there"
        assert found.help

    def test_a_limit_without_its_controller_is_refused(self, tmp_path: Path) -> None:
        folders(tmp_path, "cpu", "memory/jobs/7", "unified/user")
        manager = cgroups.open_manager(base.read_layout(HYBRID.format(root=tmp_path), HYBRID_OWN))
        with pytest.raises(KernelError, match="pids controller isn't in version 1"):
            manager.create(Limits(pids=5))
        assert os.listdir(tmp_path / "cpu") == []


class TestVersion1:
    def test_limits_are_read_back(self, real: base.Manager) -> None:
        cgroup = real.create(Limits(memory_bytes=64 * 2**20 + 1, cpus=0.5, pids=7))
        assert [(one.rule, one.requested, one.effective) for one in cgroup.in_force] == [
            ("memory", 64 * 2**20 + 1, 64 * 2**20),  # whole pages
            ("cpus", 0.5, 0.5),
            ("pids", 7, 7),
        ]
        assert all(one.mechanism.startswith("cgroup v1 ") for one in cgroup.in_force)
        found = {}
        for path in directories_of(real):
            for name in (
                "memory.limit_in_bytes",
                "memory.memsw.limit_in_bytes",
                "cpu.cfs_quota_us",
                "pids.max",
            ):
                if (path / cgroup.name / name).exists():
                    found[name] = int((path / cgroup.name / name).read_text())
        assert found.pop("memory.memsw.limit_in_bytes", 64 * 2**20) == 64 * 2**20
        assert found == {"memory.limit_in_bytes": 64 * 2**20, "cpu.cfs_quota_us": 50_000, "pids.max": 7}
        assert cgroup.remove()

    def test_no_limit_measures_only(self, real: base.Manager) -> None:
        cgroup = real.create()
        assert cgroup.in_force == ()
        assert run_member(cgroup, "hog", 50) == (0, b"hogged\n")
        usage = cgroup.usage()
        assert usage.memory_peak_bytes is not None
        assert 50 * 2**20 < usage.memory_peak_bytes < 500 * 2**20
        assert usage.cpu_ns is not None
        assert usage.cpu_ns > 10**6
        fd = cgroup.cpu_fd()
        assert fd is not None
        assert int(os.pread(fd, 64, 0)) == usage.cpu_ns
        assert (usage.oom_kills, usage.pids_peak, usage.throttled_ns) == (0, None, None)
        assert usage.source == "cgroup v1"
        assert cgroup.remove()

    def test_without_measure_only_what_is_limited_is_made(self, real: base.Manager) -> None:
        cgroup = real.create(Limits(pids=5), measure=False)
        assert len([path for path in directories_of(real) if (path / cgroup.name).exists()]) == 1
        assert cgroup.cpu_ns() is None
        assert cgroup.cpu_fd() is None
        assert cgroup.usage().memory_peak_bytes is None
        assert cgroup.remove()

    def test_memory(self, real: base.Manager) -> None:
        cgroup = real.create(Limits(memory_bytes=32 * 2**20))
        assert run_member(cgroup, "hog", 200) == (-signal.SIGKILL, b"")
        usage = cgroup.usage()
        assert usage.oom_kills == 1
        assert usage.memory_peak_bytes == 32 * 2**20
        assert cgroup.remove()
        control = real.create(Limits(memory_bytes=400 * 2**20))
        assert run_member(control, "hog", 200) == (0, b"hogged\n")
        assert control.usage().oom_kills == 0
        assert control.remove()

    def test_pids(self, real: base.Manager) -> None:
        cgroup = real.create(Limits(pids=10))
        assert run_member(cgroup, "fork", 50) == (0, b"9 EAGAIN\n")
        assert cgroup.usage().pids_peak in (None, 10)
        assert cgroup.remove()
        control = real.create(Limits(pids=60))
        assert run_member(control, "fork", 50) == (0, b"50 none\n")
        assert control.remove()

    def test_cpus(self, real: base.Manager) -> None:
        cgroup = real.create(Limits(cpus=0.2))
        assert run_member(cgroup, "burn", 1500)[0] == 0
        usage = cgroup.usage()
        assert usage.cpu_ns is not None
        assert usage.throttled_ns is not None
        # A fifth of 1.5 s, and the periods at both ends.
        assert usage.cpu_ns < 600 * 10**6
        assert usage.throttled_ns > 0
        assert cgroup.remove()

    def test_kill_ends_all_descendants(self, real: base.Manager) -> None:
        cgroup = real.create(Limits(pids=100))
        with member(cgroup, "linger", 10) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 10
            while len(cgroup.processes()) < 21 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(cgroup.processes()) == 21
            assert not cgroup.remove(timeout_s=0.01)
            cgroup.kill()
            assert cgroup.processes() == set()
            assert child.wait() == -signal.SIGKILL
        assert cgroup.remove()
        assert cgroup.remove()

    def test_names_are_never_reused(self, real: base.Manager) -> None:
        first, second = real.create(Limits(pids=5)), real.create(Limits(pids=5))
        assert first.remove()
        third = real.create(Limits(pids=5))
        assert len({first.name, second.name, third.name}) == 3
        assert second.remove()
        assert third.remove()

    def test_close_takes_empty_sandboxes_with_it(self, real: base.Manager) -> None:
        real.create(Limits(memory_bytes=2**25, pids=5, cpus=1))

    def test_it_is_quick(self, real: base.Manager) -> None:
        times = []
        for _ in range(200):
            started = time.perf_counter_ns()
            cgroup = real.create(Limits(memory_bytes=2**28, pids=64), measure=False)
            times.append(time.perf_counter_ns() - started)
            cgroup.remove()
        # The median on the machine that this was written on is about 100 µs; the bound is for a busy one.
        assert sorted(times)[100] < 1_000_000


def test_a_forked_child_gets_a_manager_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = cgroups.manager()
    assert cgroups.manager() is own
    monkeypatch.setattr(os, "getpid", lambda: own.pid + 1)
    assert cgroups.manager() is not own


class TestVersion2ForReal:
    def test_join_and_cpu_time(self, unified: base.Manager) -> None:
        cgroup = unified.create()
        assert run_member(cgroup, "burn", 300)[0] == 0
        used = cgroup.cpu_ns()
        assert used is not None
        assert 10**6 < used < 3 * 10**9
        assert cgroup.usage().cpu_ns == used
        assert cgroup.usage().memory_peak_bytes is None
        assert cgroup.usage().source == "cgroup v2"
        assert cgroup.remove()

    @pytest.mark.parametrize("has_cgroup_kill", [True, False])
    def test_kill(self, unified: base.Manager, has_cgroup_kill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        cgroup = unified.create()
        if not has_cgroup_kill:
            real_open = files.open_to_write

            def older(path: str, fd: int) -> int:
                if path.endswith("cgroup.kill"):
                    raise FileNotFoundError(errno.ENOENT, path)
                return real_open(path, fd)

            monkeypatch.setattr(files, "open_to_write", older)
        with member(cgroup, "linger", 10) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            assert not cgroup.remove(timeout_s=0.01)
            cgroup.kill()
            assert cgroup.processes() == set()
            assert child.wait() == -signal.SIGKILL
        assert cgroup.remove()

    def test_moving_to_a_leaf_and_back(self, unified: base.Manager) -> None:
        script = r"""
import os, subprocess, sys
from ringfence.linux.cgroups import files, home, v2, values
os.write(int(sys.argv[1]), b"0")
own = os.fsencode(sys.argv[2])
child = subprocess.Popen(["/bin/sleep", "60"])
def where(pid):
    return [line for line in open(f"/proc/{pid}/cgroup") if line.startswith("0::")][0].strip()
place = home.find_home(own)
print(place.move, place.path == own, place.reason)
before = where("self"), where(child.pid)
manager = v2.V2Manager(values.Layout(kind="v2", controllers=(), unified=own), place)
fd = files.open_directory(own)
manager._move_to_leaf(fd)
print(where("self") == before[0] + "/ringfence-self", where(child.pid) == before[1] + "/ringfence-self")
print(files.read_pids(fd) == set())
manager._move_back(fd)
print((where("self"), where(child.pid)) == before, "ringfence-self" in os.listdir(own))
child.kill()
child.wait()
"""
        cgroup = unified.create()
        own = directories_of(unified)[0] / cgroup.name
        fds = cgroup.join_fds()
        found = subprocess.run(
            [sys.executable, "-c", script, str(fds[0]), own],
            pass_fds=fds,
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        )
        assert found.stdout.splitlines() == ["True True ", "True True", "True", "True False"]
        assert cgroup.remove()

    def test_a_cgroup_with_other_processes_is_left_alone(self, unified: base.Manager) -> None:
        cgroup = unified.create()
        with member(cgroup, "linger", 0) as other:
            assert other.stdout is not None
            other.stdout.readline()
            own = directories_of(unified)[0] / cgroup.name
            # Its parent is the base, which hands out no controllers.
            script = (
                "import sys\nfrom ringfence.linux.cgroups.home import find_home\n"
                "print(find_home(sys.argv[1].encode()).reason)"
            )
            fds = cgroup.join_fds()
            found = subprocess.run(
                [sys.executable, "-c", script, own], capture_output=True, check=True, text=True, timeout=60
            )
            assert found.stdout == "this process's own cgroup holds 1 other processes\n"
            assert len(fds) == 1
            cgroup.kill()
        assert cgroup.remove()


class TestVersion2Files:
    def test_in_the_root_cgroup(self, fake: FakeKernel, tmp_path: Path) -> None:
        fake.populate(tmp_path, "cpu cpuset memory pids io", pids="1\n", kind="")
        found = v2_layout(tmp_path, "/")
        assert found.kind == "v2"
        assert all(one.usable and one.version == 2 for one in found.controllers)
        with cgroups.open_manager(found) as manager:
            assert isinstance(manager, v2.V2Manager)
            cgroup = manager.create(Limits(memory_bytes=2**28, cpus=1.5, pids=64))
            folder = directories_of(manager)[0] / cgroup.name
            assert folder.parent.parent == tmp_path
            assert {name: (folder / name).read_text() for name in ("memory.max", "cpu.max", "pids.max")} == {
                "memory.max": "268435456\n",
                "cpu.max": "150000 100000\n",
                "pids.max": "64\n",
            }
            assert (folder / "memory.swap.max").read_text() == "0\n"
            assert (folder / "memory.oom.group").read_text() == "1\n"
            assert [(one.rule, one.effective, one.mechanism) for one in cgroup.in_force] == [
                ("memory", 2**28, "cgroup v2 memory.max and memory.swap.max"),
                ("cpus", 1.5, "cgroup v2 cpu.max"),
                ("pids", 64, "cgroup v2 pids.max"),
            ]
            assert os.readlink(f"/proc/self/fd/{cgroup.join_fds()[0]}") == str(folder / "cgroup.procs")
            (folder / "memory.peak").write_text("4096\n")
            (folder / "memory.events").write_text("low 0\noom 2\noom_kill 3\n")
            assert cgroup.usage() == values.Usage(
                memory_peak_bytes=4096,
                cpu_ns=1_500_000,
                cpu_user_ns=1_000_000,
                cpu_system_ns=500_000,
                oom_kills=3,
                throttled_ns=70_000,
                source="cgroup v2",
            )
            assert cgroup.remove()
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []

    def test_an_older_kernel_without_peak_and_swap(
        self, fake: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake.absent = {"memory.swap.max", "memory.oom.group"}
        fake.populate(tmp_path, "memory", kind="")
        with cgroups.open_manager(v2_layout(tmp_path, "/")) as manager:
            monkeypatch.setattr(v2, "_has_swap", lambda: False)
            cgroup = manager.create(Limits(memory_bytes=2**28))
            assert cgroup.in_force[0].mechanism == "cgroup v2 memory.max"
            assert cgroup.usage().memory_peak_bytes is None
            cgroup._close()
            # With swap that isn't counted the limit would leak, so it isn't called one.
            monkeypatch.setattr(v2, "_has_swap", lambda: True)
            with pytest.raises(KernelError, match=r"memory\.swap\.max"):
                manager.create(Limits(memory_bytes=2**28))
            assert [path.name for path in directories_of(manager)[0].iterdir() if path.is_dir()] == ["s1"]

    def test_below_its_own_cgroup_once_it_has_moved(
        self, fake: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = tmp_path / "scope"
        fake.populate(tmp_path, "memory pids", "memory pids", kind="")
        fake.populate(own, "memory pids", pids=f"{os.getpid()}\n")
        moves = []

        def move(from_fd: int, to_fd: int) -> None:
            source, target = (Path(os.readlink(f"/proc/self/fd/{fd}")) for fd in (from_fd, to_fd))
            moves.append((source.name, target.name))
            (target / "cgroup.procs").write_text((source / "cgroup.procs").read_text())
            (source / "cgroup.procs").write_text("")

        monkeypatch.setattr(v2, "_move", move)
        found = v2_layout(tmp_path, "/scope")
        assert found.controller("memory").usable
        cpu = found.controller("cpu")
        assert (cpu.usable, cpu.reason) == (False, f"the cpu controller isn't delegated to {own}")
        assert "Delegate=yes" in cpu.help
        with cgroups.open_manager(found) as manager:
            with pytest.raises(KernelError, match="cpu controller isn't delegated"):
                manager.create(Limits(cpus=1))
            manager.create(Limits(pids=4))
            assert directories_of(manager)[0].parent == own
            assert moves == [("scope", "ringfence-self")]
        assert moves == [("scope", "ringfence-self"), ("ringfence-self", "scope")]
        assert (own / "cgroup.subtree_control").read_text().strip() == ""
        assert [path.name for path in own.iterdir() if path.is_dir()] == []

    def test_beside_its_own_cgroup_in_a_delegated_parent(self, fake: FakeKernel, tmp_path: Path) -> None:
        fake.populate(tmp_path / "slice", "memory pids", "memory pids")
        fake.populate(tmp_path / "slice/scope", "memory pids", pids=f"{os.getpid()}\n1\n")
        found = v2_layout(tmp_path, "/slice/scope")
        assert found.controller("pids").usable
        with cgroups.open_manager(found) as manager:
            manager.create(Limits(pids=4))
            assert directories_of(manager)[0].parent == tmp_path / "slice"
        assert [path.name for path in (tmp_path / "slice").iterdir() if path.is_dir()] == ["scope"]

    def test_reasons_where_it_cannot_be_made(
        self, fake: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake.populate(tmp_path / "a", "memory", pids="1\n")
        fake.populate(tmp_path / "b", "memory", kind="threaded")
        assert home.find_home(os.fsencode(tmp_path / "a")).reason == (
            "this process's own cgroup holds 1 other processes"
        )
        assert home.find_home(os.fsencode(tmp_path / "b")).reason == ("this process's own cgroup is of type threaded")
        monkeypatch.setattr(os, "access", lambda *_args, **_more: False)
        layout = v2_layout(tmp_path, "/a")
        assert not any(one.usable for one in layout.controllers)
        assert layout.controller("memory").reason == (f"{tmp_path}/a isn't writable for this user (not delegated)")
        manager = cgroups.open_manager(layout)
        assert manager.bases() == ()
        with pytest.raises(KernelError, match="not delegated"):
            manager.create()


def test_v1_judges_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert v1.judge("memory", os.fsencode(tmp_path)).usable
    monkeypatch.setattr(os, "access", lambda *_args, **_more: False)
    found = v1.judge("memory", os.fsencode(tmp_path))
    assert (found.usable, found.reason) == (False, f"{tmp_path} isn't writable for this user (not delegated)")
