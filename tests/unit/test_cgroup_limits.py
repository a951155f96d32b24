"""Every limit of a cgroup, changing it while something runs, freezing, and what was used.

Version 1 for real where this machine mounts it; the control files of version 2's controllers are a folder that stands
in for the kernel's, and are tested for real in a guest (tests/levels/test_cgroup_v2.py).
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from cgroup_parts import FakeKernel, directories_of, member, v2_layout

from ringfence.errors import KernelError
from ringfence.linux import cgroups, disks
from ringfence.linux.cgroups import NO_LIMITS, InForce, IoLimits, Limits, Usage, base, files, v1

CPUS = tuple(sorted(os.sched_getaffinity(0)))
DISK = disks.disk_of(b"/tmp").device or (0, 0)


def in_force(cgroup: base.Cgroup) -> dict[str, object]:
    return {one.rule: one.effective for one in cgroup.in_force}


class TestLimits:
    def test_equal_ones_are_one_key(self) -> None:
        io = IoLimits(device=(8, 0), read_bytes=5)
        assert Limits(pids=5, io=io) == Limits(io=IoLimits(device=(8, 0), read_bytes=5), pids=5)
        assert len({Limits(pids=5), Limits(pids=5), Limits(pids=6), NO_LIMITS, Limits()}) == 3

    def test_changes_leave_what_they_do_not_name(self) -> None:
        before = Limits(memory_bytes=100, pids=5, io=IoLimits(device=(8, 0), read_bytes=5, read_ops=7))
        after = before.changed_by(Limits(pids=6, cpus=0.5, io=IoLimits(device=(8, 0), read_bytes=9)))
        assert after == Limits(memory_bytes=100, pids=6, cpus=0.5, io=IoLimits(device=(8, 0), read_bytes=9, read_ops=7))

    def test_usage_since(self) -> None:
        before = Usage(cpu_ns=5, memory_peak_bytes=100, oom_kills=1, source="cgroup v1")
        after = Usage(cpu_ns=8, memory_peak_bytes=120, oom_kills=1, throttled_ns=4, source="cgroup v1")
        assert after.since(before) == Usage(
            cpu_ns=3, memory_peak_bytes=120, oom_kills=0, throttled_ns=4, source="cgroup v1"
        )

    @pytest.mark.parametrize(
        ("text", "cpus"),
        [("", ()), ("0", (0,)), ("0-2,5\n", (0, 1, 2, 5)), ("3,1", (1, 3)), ("7-7", (7,))],
    )
    def test_lists_of_cpus(self, text: str, cpus: tuple[int, ...]) -> None:
        assert files.cpus_in(text) == cpus
        assert files.cpus_in(files.cpu_list(cpus)) == cpus


class TestVersion1:
    def test_every_limit_is_read_back(self, real: base.Manager) -> None:
        io = IoLimits(device=DISK, read_bytes=1 << 20, read_ops=50)
        limits = Limits(
            memory_bytes=64 << 20, swap_bytes=16 << 20, cpus=0.5, cpu_weight=250, cpuset=CPUS[-1:], pids=7, io=io
        )
        cgroup = real.create(limits)
        assert in_force(cgroup) == {
            "memory": 64 << 20,
            "swap": 16 << 20,
            "cpus": 0.5,
            "cpu_weight": 250,
            "cpuset": CPUS[-1:],
            "pids": 7,
            "io_read": 1 << 20,
            "io_read_ops": 50,
        }
        cpu = next(path for path in directories_of(real) if (path / cgroup.name / "cpu.shares").exists())
        assert (cpu / cgroup.name / "cpu.shares").read_text() == "2560\n"
        assert cgroup.remove()

    def test_only_what_is_asked_for_is_made(self, real: base.Manager) -> None:
        cgroup = real.create()
        made = [path / cgroup.name for path in directories_of(real) if (path / cgroup.name).exists()]
        assert any((path / "memory.max_usage_in_bytes").exists() for path in made)
        assert any((path / "cpuacct.usage").exists() for path in made)
        assert len(made) <= 2
        assert cgroup.remove()

    def test_writes_are_refused(self, real: base.Manager) -> None:
        with pytest.raises(KernelError, match="on nobody's account"):
            real.create(Limits(io=IoLimits(device=DISK, write_bytes=1 << 20)))
        assert [path for path in directories_of(real) if any(one.is_dir() for one in path.iterdir())] == []

    def test_changes_while_it_runs(self, real: base.Manager) -> None:
        cgroup = real.create(Limits(memory_bytes=64 << 20), live=True)
        with member(cgroup, "linger", 0) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            for memory, swap in ((256 << 20, 0), (512 << 20, 64 << 20), (32 << 20, 8 << 20), (48 << 20, 0)):
                found = cgroup.update(Limits(memory_bytes=memory, swap_bytes=swap))
                assert {one.rule: one.effective for one in found} == {"memory": memory, "swap": swap}
            io = IoLimits(device=DISK, read_bytes=1 << 20)
            cgroup.update(Limits(cpus=0.5, cpu_weight=50, cpuset=CPUS[:1], pids=9, io=io))
            assert in_force(cgroup) == {
                "memory": 48 << 20,
                "swap": 0,
                "cpus": 0.5,
                "cpu_weight": 50,
                "cpuset": CPUS[:1],
                "pids": 9,
                "io_read": 1 << 20,
            }
            assert os.sched_getaffinity(child.pid) == set(CPUS[:1])
            cgroup.kill()
            child.wait()
        assert not cgroup.is_clean()
        assert cgroup.remove()

    def test_less_memory_than_is_in_use(self, real: base.Manager) -> None:
        cgroup = real.create(Limits(memory_bytes=256 << 20, pids=50), live=True)
        with member(cgroup, "hold", 100) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"held\n"
            before = cgroup.in_force
            with pytest.raises(KernelError, match="bytes are in use") as caught:
                cgroup.update(Limits(pids=20, cpus=0.5, memory_bytes=32 << 20))
            assert caught.value.errno == errno.EBUSY
            assert cgroup.in_force == before  # of none of the three
            assert child.poll() is None
            cgroup.update(Limits(memory_bytes=200 << 20))
            assert in_force(cgroup) == {"memory": 200 << 20, "pids": 50}
            cgroup.kill()
            child.wait()
        assert cgroup.usage().oom_kills == 0
        assert cgroup.remove()

    def test_a_change_that_fails_half_way_is_undone(self, real: base.Manager, monkeypatch: pytest.MonkeyPatch) -> None:
        cgroup = real.create(live=True)
        assert isinstance(cgroup, v1.V1Cgroup)
        unlimited = cgroup._number("memory", v1._MEMORY)
        real_set = cgroup._set_memory

        def set_memory(name: str, value: int) -> int | None:
            if name == v1._MEMORY_AND_SWAP and value >= 0:
                raise KernelError("write", (name,), errno.EIO)
            return real_set(name, value)

        monkeypatch.setattr(cgroup, "_set_memory", set_memory)
        with pytest.raises(KernelError, match="EIO"):
            cgroup.update(Limits(memory_bytes=64 << 20, pids=9))
        assert in_force(cgroup) == {}
        assert cgroup._number("memory", v1._MEMORY) == unlimited
        assert cgroup.remove()

    def test_a_limit_that_cannot_be_set_again_is_not_told_as_in_force(
        self, real: base.Manager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cgroup = real.create(Limits(pids=50, memory_bytes=64 << 20), live=True)

        def fails(value: int | None) -> None:
            raise KernelError("write", ("pids.max",), errno.EIO)

        monkeypatch.setattr(cgroup, "_limit_pids", fails)
        with pytest.raises(KernelError, match="EIO") as caught:
            cgroup.update(Limits(pids=20))
        assert caught.value.__notes__ == ["what was before can't be set again either: pids"]
        assert in_force(cgroup) == {"pids": None, "memory": 64 << 20}
        assert cgroup.remove()

    def test_what_it_was_made_without_cannot_be_changed(self, real: base.Manager) -> None:
        cgroup = real.create(Limits(pids=5))
        for limits in (Limits(cpus=1), Limits(cpuset=CPUS[:1]), Limits(io=IoLimits(device=DISK, read_bytes=5))):
            with pytest.raises(KernelError, match="it was made without the") as caught:
                cgroup.update(limits)
            assert caught.value.errno == errno.ENOTSUP
        with pytest.raises(KernelError, match="made without the freezer"):
            cgroup.freeze()
        assert not cgroup.frozen
        assert in_force(cgroup) == {"pids": 5}
        assert cgroup.remove()

    def test_swap_needs_memory(self, real: base.Manager) -> None:
        cgroup = real.create(live=True)
        with pytest.raises(KernelError, match="limit memory too"):
            cgroup.update(Limits(swap_bytes=1 << 20))
        cgroup.update(Limits(memory_bytes=1 << 25, swap_bytes=1 << 20))
        assert in_force(cgroup) == {"memory": 1 << 25, "swap": 1 << 20}
        assert cgroup.remove()

    def test_frozen_it_stands_still(self, real: base.Manager) -> None:
        freezes(real)

    def test_frozen_it_can_be_killed(self, real: base.Manager) -> None:
        dies_frozen(real)

    def test_used_again_only_as_it_was_made(self, real: base.Manager) -> None:
        plain = real.create(Limits(memory_bytes=64 << 20, pids=9, cpu_weight=20, cpuset=CPUS[:1]))
        assert plain.is_clean()
        assert in_force(plain)["cpu_weight"] == 20
        # Counters that nothing resets, or what another sandbox doesn't ask for.
        changed = real.create(Limits(pids=9))
        changed.update(Limits(pids=10))
        others = [changed, real.create(Limits(cpus=1)), real.create(live=True)]
        others.append(real.create(Limits(io=IoLimits(device=DISK, read_bytes=1 << 20))))
        assert [one.is_clean() for one in others] == [False] * len(others)
        for one in (plain, *others):
            assert one.remove()


def cpu_ns(pid: int) -> int:
    return time.clock_gettime_ns(time.pthread_getcpuclockid(0)) if pid == 0 else time.clock_gettime_ns(~pid << 3 | 2)


def freezes(manager: base.Manager) -> None:
    cgroup = manager.create(live=True)
    with member(cgroup, "burn", 60_000) as child:
        deadline = time.monotonic() + 10
        while cpu_ns(child.pid) < 200_000_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        cgroup.freeze()
        states = [cgroup.frozen]
        cgroup.freeze()  # once more does no harm
        before = cpu_ns(child.pid)
        time.sleep(0.2)
        assert cpu_ns(child.pid) == before > 0
        cgroup.thaw()
        assert [*states, cgroup.frozen] == [True, False]
        deadline = time.monotonic() + 10
        while cpu_ns(child.pid) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert cpu_ns(child.pid) > before
        cgroup.kill()
        child.wait()
    assert not cgroup.is_clean()
    assert cgroup.remove()


def dies_frozen(manager: base.Manager) -> None:
    cgroup = manager.create(live=True)
    with member(cgroup, "linger", 3) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        cgroup.freeze()
        cgroup.kill()
        assert cgroup.processes() == set()
        child.wait()
    assert cgroup.remove()


class TestVersion2ForReal:
    """The freezer takes no controller."""

    def test_frozen_it_stands_still(self, unified: base.Manager) -> None:
        freezes(unified)

    def test_frozen_it_can_be_killed(self, unified: base.Manager) -> None:
        dies_frozen(unified)

    def test_pressure(self, unified: base.Manager) -> None:
        cgroup = unified.create()
        folder = directories_of(unified)[0] / cgroup.name
        if not (folder / "cpu.pressure").exists():
            pytest.skip("this machine lacks: PSI")
        with member(cgroup, "burn", 300) as child:
            child.wait()
        usage = cgroup.usage()
        assert usage.cpu_ns is not None
        assert usage.cpu_user_ns is not None
        assert usage.cpu_system_ns is not None
        assert abs(usage.cpu_user_ns + usage.cpu_system_ns - usage.cpu_ns) <= 2000
        total = int((folder / "cpu.pressure").read_text().splitlines()[0].rpartition("total=")[2])
        assert usage.cpu_pressure_ns == total * 1000
        assert usage.memory_pressure_ns is not None
        assert usage.io_pressure_ns is not None
        assert cgroup.remove()


class TestVersion2Files:
    def test_every_limit(self, fake: FakeKernel, tmp_path: Path) -> None:
        fake.populate(tmp_path, "cpu cpuset memory pids io", pids="1\n", kind="")
        with cgroups.open_manager(v2_layout(tmp_path, "/")) as manager:
            io = IoLimits(device=(8, 0), read_bytes=1 << 20, write_ops=50)
            limits = Limits(
                memory_bytes=64 << 20, swap_bytes=16 << 20, cpus=0.5, cpu_weight=250, cpuset=(0, 2), pids=7, io=io
            )
            cgroup = manager.create(limits)
            folder = directories_of(manager)[0] / cgroup.name
            names = ("memory.max", "memory.swap.max", "cpu.max", "cpu.weight", "cpuset.cpus", "pids.max", "io.max")
            assert {name: (folder / name).read_text().strip() for name in names} == {
                "memory.max": "67108864",
                "memory.swap.max": "16777216",
                "cpu.max": "50000 100000",
                "cpu.weight": "250",
                "cpuset.cpus": "0,2",
                "pids.max": "7",
                "io.max": "8:0 rbps=1048576 wbps=max riops=max wiops=50",
            }
            assert in_force(cgroup) == {
                "memory": 64 << 20,
                "swap": 16 << 20,
                "cpus": 0.5,
                "cpu_weight": 250,
                "cpuset": (0, 2),
                "pids": 7,
                "io_read": 1 << 20,
                "io_write_ops": 50,
            }
            assert cgroup.in_force[-1] == InForce(
                rule="io_write_ops", requested=50, effective=50, mechanism="cgroup v2 io.max wiops of 8:0"
            )
            found = cgroup.update(Limits(io=IoLimits(device=(8, 0), read_ops=9), cpu_weight=1))
            assert {one.rule: one.effective for one in found}["io_read_ops"] == 9
            assert (folder / "io.max").read_text() == "8:0 rbps=1048576 wbps=max riops=9 wiops=50\n"
            cgroup.remove()

    def test_controllers_on_demand(self, fake: FakeKernel, tmp_path: Path) -> None:
        fake.populate(tmp_path, "cpu cpuset memory pids io", pids="1\n", kind="")
        with cgroups.open_manager(v2_layout(tmp_path, "/")) as manager:
            manager.create(Limits(pids=5))
            folder = directories_of(manager)[0]
            handed_out = folder / "cgroup.subtree_control"
            assert handed_out.read_text().split() == ["cpu", "memory", "pids"]
            manager.create(Limits(cpuset=(0,)))
            assert handed_out.read_text().split() == ["cpu", "cpuset", "memory", "pids"]
            manager.create(live=True)
            assert handed_out.read_text().split() == ["cpu", "cpuset", "io", "memory", "pids"]

    def test_other_cpus_than_asked_for_are_an_error(self, fake: FakeKernel, tmp_path: Path) -> None:
        fake.effective_cpus = "0-1"
        fake.populate(tmp_path, "cpuset", pids="1\n", kind="")
        with cgroups.open_manager(v2_layout(tmp_path, "/")) as manager:
            with pytest.raises(KernelError, match="it has 0,1"):
                manager.create(Limits(cpuset=(5,)))
            assert [path for path in directories_of(manager)[0].iterdir() if path.is_dir()] == []

    def test_less_memory_than_is_in_use(self, fake: FakeKernel, tmp_path: Path) -> None:
        """The kernel would take the limit and kill for it, where version 1 refuses."""
        fake.populate(tmp_path, "memory pids", pids="1\n", kind="")
        with cgroups.open_manager(v2_layout(tmp_path, "/")) as manager:
            cgroup = manager.create(Limits(memory_bytes=64 << 20), live=True)
            folder = directories_of(manager)[0] / cgroup.name
            (folder / "memory.current").write_text(f"{50 << 20}\n")
            with pytest.raises(KernelError, match="52428800 bytes are in use") as caught:
                cgroup.update(Limits(memory_bytes=32 << 20))
            assert caught.value.errno == errno.EBUSY
            assert in_force(cgroup) == {"memory": 64 << 20}
            assert (folder / "memory.max").read_text().strip() == str(64 << 20)
            assert cgroup.limits == Limits(memory_bytes=64 << 20)

    def test_usage(self, fake: FakeKernel, tmp_path: Path) -> None:
        fake.populate(tmp_path, "memory io", pids="1\n", kind="")
        with cgroups.open_manager(v2_layout(tmp_path, "/")) as manager:
            cgroup = manager.create(live=True)
            folder = directories_of(manager)[0] / cgroup.name
            (folder / "io.stat").write_text(
                "8:0 rbytes=4096 wbytes=512 rios=1 wios=1 dbytes=0 dios=0\n253:1 rbytes=1 wbytes=2\n"
            )
            for name, total in (("memory", 7), ("cpu", 8), ("io", 9)):
                some = f"some avg10=0.00 avg60=0.00 avg300=0.00 total={total}\n"
                (folder / f"{name}.pressure").write_text(some + some.replace("some", "full").replace("=", "=9"))
            usage = cgroup.usage()
            assert (usage.io_read_bytes, usage.io_write_bytes) == (4097, 514)
            pressure = (usage.memory_pressure_ns, usage.cpu_pressure_ns, usage.io_pressure_ns)
            assert pressure == (7000, 8000, 9000)
            cgroup.remove()


class TestDisks:
    def test_of_this_machine(self) -> None:
        found = disks.disk_of(b"/dev/shm")
        assert (found.device, found.file_system) == (None, "tmpfs")
        assert found.reason == "/dev/shm is on tmpfs without one block device of its own"

    @pytest.mark.parametrize("partition", [True, False])
    def test_a_partition_counts_as_its_disk(self, tmp_path: Path, partition: bool) -> None:
        number = os.stat(tmp_path).st_dev
        name = f"{os.major(number)}:{os.minor(number)}"
        if os.major(number) == 0:
            pytest.skip("this machine lacks: a block device below its temporary folder")
        node = tmp_path / "devices/sda"
        leaf = node / "sda1" if partition else node
        leaf.mkdir(parents=True)
        (node / "dev").write_text("8:0\n")
        if partition:
            (leaf / "partition").write_text("1\n")
            (leaf / "dev").write_text("8:1\n")
        (tmp_path / "block").mkdir()
        (tmp_path / "block" / name).symlink_to(leaf)
        mounts = tmp_path / "mountinfo"
        # A name may hold what ends a line elsewhere.
        others = b"30 1 0:9 / /mnt/a\rb\x1cc rw - fuse.x a rw\n"
        mounts.write_bytes(others + f"31 1 {name} / / rw,relatime - xfs /dev/sda1 rw\n".encode())
        found = disks.disk_of(os.fsencode(tmp_path), blocks=os.fsencode(tmp_path / "block"), mountinfo=str(mounts))
        assert found == disks.Disk(device=(8, 0), file_system="xfs")
        bare = disks.disk_of(os.fsencode(tmp_path), blocks=b"/nowhere", mountinfo="/nowhere")
        assert bare.reason == f"/sys doesn't show the device {name} of {tmp_path}"
