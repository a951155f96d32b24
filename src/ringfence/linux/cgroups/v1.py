"""Cgroups of version 1: each controller, or few together, in a hierarchy of its own."""

from __future__ import annotations

import errno
import os

from ringfence.errors import KernelError
from ringfence.linux.cgroups import base, files
from ringfence.linux.cgroups.base import Cgroup, Manager
from ringfence.linux.cgroups.values import NO_LIMITS, Base, Controller, IoLimits, Layout, Limits, Usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["V1Cgroup", "V1Manager", "judge"]

# Also in the message of an absent limit: PAGE_COUNTER_MAX, in bytes.
_NO_LIMIT = 2**63 - 4096
# A cgroup is used again only where no more is charged to it than what the kernel frees late (it is some 300 KiB), and
# not under a limit for which that counts.
_LEFT_OVER_BYTES = 1 << 20
_REUSED_FROM_BYTES = 16 << 20

_MEMORY, _MEMORY_AND_SWAP = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
_DEFAULT_SHARES, _DEFAULT_WEIGHT = 1024, 100
_IO_FILES = {
    "io_read": "blkio.throttle.read_bps_device",
    "io_write": "blkio.throttle.write_bps_device",
    "io_read_ops": "blkio.throttle.read_iops_device",
    "io_write_ops": "blkio.throttle.write_iops_device",
}


def judge(name: str, path: bytes) -> Controller:
    """Whether ringfence can make cgroups of that controller in this process's own cgroup."""
    reason = files.may_make_directories(path)
    help = "run as root, or have the administrator make a cgroup for this user" if reason else ""
    return Controller(name=name, version=1, path=path, usable=not reason, reason=reason, help=help)


class V1Manager(Manager):
    """One base in each hierarchy that has a usable controller."""

    version = 1

    def __init__(self, found: Layout, claim: Callable[..., None] | None = None) -> None:
        super().__init__(found, claim)
        # Controllers that are mounted together have one path, and so one base.
        self._paths = {one.name: one.path for one in found.controllers if one.version == 1 and one.usable}
        self._bases: dict[bytes, Base] = {}

    def bases(self) -> tuple[Base, ...]:
        return tuple(self._base(path) for path in dict.fromkeys(self._paths.values()))

    def made(self) -> tuple[Base, ...]:
        return tuple(self._bases.values())

    def _base(self, path: bytes) -> Base:
        """The base in the hierarchy of that path, made when the first sandbox needs it."""
        if path not in self._bases:
            parent_fd = files.open_directory(path)
            try:
                name = self._new_base(parent_fd)
                fd = files.open_directory(name, parent_fd)
                self._bases[path] = Base(fd=fd, name=name, parent_fd=parent_fd)
            except BaseException:
                os.close(parent_fd)
                raise
            if self._paths.get("cpuset") == path:
                _inherit_cpuset(parent_fd, "", fd, "")
        return self._bases[path]

    def create(self, limits: Limits = NO_LIMITS, *, measure: bool = True, live: bool = False) -> V1Cgroup:
        wanted = limits.controllers()
        for name in wanted:
            if name not in self._paths:
                raise KernelError("mkdir", (name,), errno.ENOTSUP, self.usable(name).reason)
        if measure:
            wanted |= self._paths.keys() & {"memory", "cpuacct"}
        if live:
            wanted = set(self._paths)
        name = self._next_name()
        made = V1Cgroup(name, live=live)
        try:
            for path in dict.fromkeys(where for one, where in self._paths.items() if one in wanted):
                parent_fd = self._base(path).fd
                files.make_directory(name, parent_fd)
                made.add([one for one, where in self._paths.items() if where == path], parent_fd)
            made.limit(limits)
        except BaseException:
            made.remove()
            raise
        return made

    def close(self) -> None:
        while self._bases:
            path, one = next(iter(self._bases.items()))
            files.remove_children(one.fd)
            files.remove_directory(one.name, one.parent_fd)
            os.close(one.fd)
            os.close(one.parent_fd)
            del self._bases[path]


class V1Cgroup(Cgroup):
    """A directory of the same name in each hierarchy that it needs."""

    def __init__(self, name: str, *, live: bool = False) -> None:
        super().__init__(name, live=live)
        self._prefix = name + "/"
        self._parents: dict[str, int] = {}  # controller to the base that has its directory
        self._join: tuple[int, ...] = ()
        self._cpu_fd = -1
        # Files that were read once: (controller, name) to descriptor, or None where this kernel has none.
        self._files: dict[tuple[str, str], int | None] = {}
        self._to_renew: dict[str, int] = {}  # controller to its counter, open for writing
        self._used_before = False
        self._io_device = (0, 0)

    def add(self, controllers: Iterable[str], parent_fd: int) -> None:
        """There is a directory of it in that base now, which serves those controllers."""
        for name in controllers:
            self._parents[name] = parent_fd
            if name == "cpuset":
                _inherit_cpuset(parent_fd, "", parent_fd, self._prefix)

    # ---- limits ----

    def _set_limits(self, controller: str, limits: Limits) -> None:
        if controller not in self._parents:
            raise KernelError("update", (self.name,), errno.ENOTSUP, f"it was made without the {controller} controller")
        if controller == "memory":
            self._limit_memory(limits.memory_bytes, limits.swap_bytes)
        elif controller == "cpu":
            self._limit_cpus(limits.cpus)
            self._weigh_cpus(limits.cpu_weight)
        elif controller == "cpuset":
            self._limit_cpuset(limits.cpuset)
        elif controller == "pids":
            self._limit_pids(limits.pids)
        else:
            self._limit_io(limits.io)

    def _limit_memory(self, memory_bytes: int | None, swap_bytes: int | None) -> None:
        if memory_bytes is None and swap_bytes is not None:
            raise KernelError(
                "update", (self.name,), errno.EINVAL, "swap is what comes on top of memory: limit memory too"
            )
        if memory_bytes is None and "memory" not in self._in_force:
            return
        both = -1 if memory_bytes is None else memory_bytes + (swap_bytes or 0)
        order = [(_MEMORY, -1 if memory_bytes is None else memory_bytes), (_MEMORY_AND_SWAP, both)]
        # Memory and swap together can never be below memory alone, on the way neither.
        before = self._number("memory", _MEMORY_AND_SWAP) if "memory" in self._in_force else None
        if before is not None and (both < 0 or both > before):
            order.reverse()
        found = {name: self._set_memory(name, value) for name, value in order}
        limit, both_found = found[_MEMORY], found[_MEMORY_AND_SWAP]
        assert limit is not None
        mechanism, swap_mechanism = f"cgroup v1 {_MEMORY}", f"cgroup v1 {_MEMORY_AND_SWAP} less {_MEMORY}"
        if both_found is None:
            # Without swap accounting (swapaccount=0): 0 keeps a cgroup at its limit from swapping at all.
            if swap_bytes:
                raise KernelError("open", (_MEMORY_AND_SWAP,), errno.ENOENT, "this kernel doesn't count swap")
            self._set("memory", "memory.swappiness", "0" if memory_bytes is not None else "60")
            mechanism += " and memory.swappiness"
            both_found, swap_mechanism = limit, "cgroup v1 memory.swappiness"
        elif swap_bytes is None:
            mechanism += f" and {_MEMORY_AND_SWAP}"
        swap = both_found - limit
        held = limit if swap_bytes is not None else max(limit, both_found)
        self._note("memory", memory_bytes, None if held >= _NO_LIMIT else held, mechanism)
        self._note("swap", swap_bytes, swap, swap_mechanism)

    def _set_memory(self, name: str, value: int) -> int | None:
        """What is in force then; None where there is no such file of swap."""
        try:
            return int(self._set("memory", name, str(value)))
        except KernelError as error:
            if error.errno == errno.ENOENT and name == _MEMORY_AND_SWAP:
                return None
            if error.errno != errno.EBUSY:
                raise
            used = self._number("memory", "memory.usage_in_bytes")
            raise KernelError("write", (name, value), errno.EBUSY, f"{used} bytes are in use") from None

    def _limit_cpus(self, cpus: float | None) -> None:
        if cpus is None and "cpus" not in self._in_force:
            return
        period = int(self._set("cpu", "cpu.cfs_period_us", str(base.CPU_PERIOD_US)))
        quota = int(self._set("cpu", "cpu.cfs_quota_us", str(-1 if cpus is None else round(cpus * base.CPU_PERIOD_US))))
        self._note("cpus", cpus, quota / period if quota > 0 else None, "cgroup v1 cpu.cfs_quota_us")

    def _weigh_cpus(self, weight: int | None) -> None:
        if weight is None and "cpu_weight" not in self._in_force:
            return
        # As systemd maps CPUWeight= (src/core/cgroup.c): linear, as both are, with 1024 for 100. The OCI runtimes map
        # shares to weights so that the old range spans the new one, where 1024 became 39: others have 100 here.
        shares = max(2, _DEFAULT_SHARES if weight is None else weight * _DEFAULT_SHARES // _DEFAULT_WEIGHT)
        found = int(self._set("cpu", "cpu.shares", str(shares)))
        effective = max(1, round(found * _DEFAULT_WEIGHT / _DEFAULT_SHARES))
        self._note("cpu_weight", weight, effective, f"cgroup v1 cpu.shares, {found}")

    def _limit_cpuset(self, cpuset: tuple[int, ...] | None) -> None:
        if cpuset is None:
            if "cpuset" in self._in_force:
                _inherit_cpuset(self._parents["cpuset"], "", self._parents["cpuset"], self._prefix)
                self._note("cpuset", None, None, "")
            return
        self._set("cpuset", "cpuset.cpus", files.cpu_list(cpuset))
        # Those of the list that are online and the cgroups above have too. The file came with Linux 4.
        name = "cpuset.effective_cpus"
        found = files.read(self._parents["cpuset"], self._prefix + name)
        if found is None:
            name = "cpuset.cpus"
            found = files.read(self._parents["cpuset"], self._prefix + name) or ""
        effective = files.cpus_in(found)
        self._note("cpuset", cpuset, effective, f"cgroup v1 {name}")
        if effective != cpuset:
            raise KernelError(
                "write", ("cpuset.cpus", files.cpu_list(cpuset)), errno.EINVAL, f"it has {files.cpu_list(effective)}"
            )

    def _limit_pids(self, pids: int | None) -> None:
        if pids is None and "pids" not in self._in_force:
            return
        effective = self._set("pids", "pids.max", "max" if pids is None else str(pids))
        self._note("pids", pids, None if effective == "max" else int(effective), "cgroup v1 pids.max")

    def _limit_io(self, io: IoLimits | None) -> None:
        for rule, name in _IO_FILES.items():
            wanted = None if io is None else io.rules()[rule]
            if wanted is None and rule not in self._in_force:
                continue
            if wanted is not None and rule in ("io_write", "io_write_ops"):
                raise KernelError("write", (name,), errno.ENOTSUP, "what is written back later is on nobody's account")
            disk = self._io_device if io is None else io.device
            self._io_device = disk
            device = f"{disk[0]}:{disk[1]}"
            found = self._set("io", name, f"{device} {wanted or 0}")
            rates = dict(line.split() for line in found.splitlines())
            effective = int(rates[device]) if device in rates else None
            self._note(rule, wanted, effective, f"cgroup v1 {name} of {device}")

    # ---- what runs in it ----

    def join_fds(self) -> tuple[int, ...]:
        if not self._join:
            # `tasks`, not cgroup.procs: that one waits for all CPUs, up to 8 ms after an idle time.
            self._join = tuple(files.open_to_write(self._prefix + "tasks", fd) for fd in self._directories())
        return self._join

    def cpu_fd(self) -> int | None:
        if self._cpu_fd < 0 and "cpuacct" in self._parents:
            self._cpu_fd = files.open_to_read(self._prefix + "cpuacct.usage", self._parents["cpuacct"])
        return self._cpu_fd if self._cpu_fd >= 0 else None

    def cpu_ns(self) -> int | None:
        fd = self.cpu_fd()
        return None if fd is None else int(os.pread(fd, 64, 0))

    def usage(self) -> Usage:
        io = self._io_bytes() if "io" in self._parents else {}
        return Usage(
            memory_peak_bytes=self._number("memory", "memory.max_usage_in_bytes"),
            cpu_ns=self.cpu_ns(),
            # cpuacct has its parts only by the tick, or in units of 10 ms that can't be reset: init knows them better.
            oom_kills=self._keyed("memory", "memory.oom_control", "oom_kill"),
            # pids.peak needs Linux 6.1, and can't be reset.
            pids_peak=None if self._used_before else self._number("pids", "pids.peak"),
            throttled_ns=self._keyed("cpu", "cpu.stat", "throttled_time"),
            io_read_bytes=io.get("Read"),
            io_write_bytes=io.get("Write"),
            source="cgroup v1",
        )

    def _io_bytes(self) -> dict[str, int]:
        """Read and Write, of all devices together: lines like "254:0 Read 4096"."""
        text = self._read("io", "blkio.throttle.io_service_bytes")
        if text is None:
            return {}
        found = {"Read": 0, "Write": 0}
        for line in text.splitlines():
            words = line.split()
            if len(words) == 3 and words[1] in found:
                found[words[1]] += int(words[2])
        return found

    @property
    def lasts(self) -> bool:
        limits = self.limits
        # The counters of the quota and of the devices can't be reset, and one that was changed isn't what the next one
        # asks for. What is left of the last one would weigh on a small limit of memory.
        if self._live or self._changed or limits.cpus is not None or limits.io is not None:
            return False
        return limits.memory_bytes is None or limits.memory_bytes >= _REUSED_FROM_BYTES

    def is_clean(self) -> bool:
        limits = self.limits
        if not self.lasts or (self._number("memory", "memory.usage_in_bytes") or 0) > _LEFT_OVER_BYTES:
            return False
        if self._keyed("memory", "memory.oom_control", "oom_kill"):
            return False
        # Whoever joins one joins all. To read a list of processes takes longer than their number.
        count = self._number("pids", "pids.current")
        if count or (count is None and self._read(next(iter(self._parents), ""), "cgroup.procs")):
            return False
        return limits.pids is None or self._number("pids", "pids.max") == limits.pids

    def renew(self) -> None:
        for controller, name in (("memory", "memory.max_usage_in_bytes"), ("cpuacct", "cpuacct.usage")):
            if controller in self._parents:
                if controller not in self._to_renew:
                    self._to_renew[controller] = files.open_to_write(self._prefix + name, self._parents[controller])
                os.write(self._to_renew[controller], b"0")
        self._used_before = True

    def _write_freezer(self, frozen: bool) -> None:
        if "freezer" not in self._parents:
            raise KernelError("freeze", (self.name,), errno.ENOTSUP, "it was made without the freezer controller")
        self._set("freezer", "freezer.state", "FROZEN" if frozen else "THAWED")

    def _is_frozen(self) -> bool:
        return (self._read("freezer", "freezer.state") or "").strip() == "FROZEN"

    def processes(self) -> set[int]:
        found: set[int] = set()
        for fd in self._directories():
            found |= files.read_pids(fd, self._prefix)
        return found

    def kill(self, timeout_s: float = 2.0) -> None:
        if "pids" in self._parents:
            # No more forks, so the rounds can't be outrun by a fork bomb.
            self._set("pids", "pids.max", "0")
            self._changed = True
        self._kill_each(timeout_s)

    def _rmdir(self) -> None:
        for fd in self._directories():
            files.rmdir_if_there(self.name, fd)

    def _close(self) -> None:
        read = [fd for fd in self._files.values() if fd is not None]
        for fd in (*self._join, *read, *self._to_renew.values(), *([self._cpu_fd] if self._cpu_fd >= 0 else [])):
            os.close(fd)
        self._join, self._parents, self._files, self._to_renew, self._cpu_fd = (), {}, {}, {}, -1

    def _directories(self) -> Iterable[int]:
        """The bases that have a directory of it, each once."""
        return dict.fromkeys(self._parents.values())

    def _set(self, controller: str, name: str, value: str) -> str:
        return files.set_and_read(self._parents[controller], self._prefix + name, value)

    def _read(self, controller: str, name: str) -> str | None:
        """A file's text, by a descriptor that is kept: it is read after each command. None where there is none."""
        where = (controller, name)
        if where not in self._files:
            parent_fd = self._parents.get(controller)
            try:
                self._files[where] = None if parent_fd is None else files.open_to_read(self._prefix + name, parent_fd)
            except FileNotFoundError:
                self._files[where] = None
        fd = self._files[where]
        return None if fd is None else os.pread(fd, 4096, 0).decode()

    def _number(self, controller: str, name: str) -> int | None:
        text = self._read(controller, name)
        return None if text is None or text.startswith("max") else int(text)

    def _keyed(self, controller: str, name: str, key: str) -> int | None:
        for line in (self._read(controller, name) or "").splitlines():
            word, _, number = line.partition(" ")
            if word == key:
                return int(number)
        return None


def _inherit_cpuset(from_fd: int, from_prefix: str, to_fd: int, to_prefix: str) -> None:
    """A new cgroup of cpuset has no CPU and no memory node, and takes no process so: it gets those of the one above."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        above = (files.read(from_fd, from_prefix + name) or "").strip()
        files.set_and_read(to_fd, to_prefix + name, above)
