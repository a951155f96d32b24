"""Cgroups of version 1: each controller, or few together, in a hierarchy of its own."""

from __future__ import annotations

import errno
import os

from ringfence.errors import KernelError
from ringfence.linux.cgroups import base
from ringfence.linux.cgroups.base import Base, Cgroup, Controller, InForce, Layout, Manager, Usage

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


def judge(name: str, path: bytes) -> Controller:
    """Whether ringfence can make cgroups of that controller in this process's own cgroup."""
    reason = base.may_make_directories(path)
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
        if not self._bases:
            for path in dict.fromkeys(self._paths.values()):
                parent_fd = base.open_directory(path)
                try:
                    name = self._new_base(parent_fd)
                    fd = base.open_directory(name, parent_fd)
                except BaseException:
                    os.close(parent_fd)
                    self.close()
                    raise
                self._bases[path] = Base(fd=fd, name=name, parent_fd=parent_fd)
        return tuple(self._bases.values())

    def create(
        self,
        *,
        memory_bytes: int | None = None,
        cpus: float | None = None,
        pids: int | None = None,
        measure: bool = True,
    ) -> V1Cgroup:
        wanted = [
            name for name, value in (("memory", memory_bytes), ("cpu", cpus), ("pids", pids)) if value is not None
        ]
        for name in wanted:
            if name not in self._paths:
                raise KernelError("mkdir", (name,), errno.ENOTSUP, self.usable(name).reason)
        if measure:
            wanted += [name for name in ("memory", "cpuacct") if name in self._paths and name not in wanted]
        self.bases()
        name = self._next_name()
        made = V1Cgroup(name)
        try:
            for path in dict.fromkeys(self._paths[one] for one in wanted):
                parent_fd = self._bases[path].fd
                base.make_directory(name, parent_fd)
                made.add([one for one, where in self._paths.items() if where == path], parent_fd)
            made.limit(memory_bytes, cpus, pids)
        except BaseException:
            made.remove()
            raise
        return made

    def close(self) -> None:
        while self._bases:
            path, one = next(iter(self._bases.items()))
            base.remove_children(one.fd)
            base.remove_directory(one.name, one.parent_fd)
            os.close(one.fd)
            os.close(one.parent_fd)
            del self._bases[path]


class V1Cgroup(Cgroup):
    """A directory of the same name in each hierarchy that it needs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.in_force = ()
        self._prefix = name + "/"
        self._parents: dict[str, int] = {}  # controller to the base that has its directory
        self._join: tuple[int, ...] = ()
        self._cpu_fd = -1
        # Files that were read once: (controller, name) to descriptor, or None where this kernel has none.
        self._files: dict[tuple[str, str], int | None] = {}
        self._to_renew: dict[str, int] = {}  # controller to its counter, open for writing
        self._limited: tuple[int | None, float | None, int | None] = (None, None, None)
        self._refused_before = 0
        self._used_before = False

    def add(self, controllers: Iterable[str], parent_fd: int) -> None:
        """There is a directory of it in that base now, which serves those controllers."""
        for name in controllers:
            self._parents[name] = parent_fd

    def limit(self, memory_bytes: int | None, cpus: float | None, pids: int | None) -> None:
        """Set each limit that isn't None, and read it back."""
        found = []
        self._limited = (memory_bytes, cpus, pids)
        if memory_bytes is not None:
            found.append(self._limit_memory(memory_bytes))
        if cpus is not None:
            found.append(self._limit_cpus(cpus))
        if pids is not None:
            effective = self._set("pids", "pids.max", str(pids))
            found.append(
                InForce(
                    rule="pids",
                    requested=pids,
                    effective=None if effective == "max" else int(effective),
                    mechanism="cgroup v1 pids.max",
                )
            )
        self.in_force = tuple(found)

    def _limit_memory(self, memory_bytes: int) -> InForce:
        limit = int(self._set("memory", "memory.limit_in_bytes", str(memory_bytes)))
        mechanism = "cgroup v1 memory.limit_in_bytes"
        try:
            # Memory and swap together; it can't be below the limit of memory, so it comes second.
            both = int(self._set("memory", "memory.memsw.limit_in_bytes", str(memory_bytes)))
            limit = max(limit, both)
            mechanism += " and memory.memsw.limit_in_bytes"
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            # Without swap accounting (swapaccount=0): 0 keeps a cgroup at its limit from swapping at all.
            self._set("memory", "memory.swappiness", "0")
            mechanism += " and memory.swappiness"
        effective = None if limit >= _NO_LIMIT else limit
        return InForce(rule="memory", requested=memory_bytes, effective=effective, mechanism=mechanism)

    def _limit_cpus(self, cpus: float) -> InForce:
        period = int(self._set("cpu", "cpu.cfs_period_us", str(base.CPU_PERIOD_US)))
        quota = int(self._set("cpu", "cpu.cfs_quota_us", str(round(cpus * base.CPU_PERIOD_US))))
        return InForce(
            rule="cpus",
            requested=cpus,
            effective=quota / period if quota > 0 else None,
            mechanism="cgroup v1 cpu.cfs_quota_us",
        )

    def join_fds(self) -> tuple[int, ...]:
        if not self._join:
            # `tasks`, not cgroup.procs: that one waits for all CPUs, up to 8 ms after an idle time.
            self._join = tuple(base.open_to_write(self._prefix + "tasks", fd) for fd in self._directories())
        return self._join

    def cpu_fd(self) -> int | None:
        if self._cpu_fd < 0 and "cpuacct" in self._parents:
            self._cpu_fd = base.open_to_read(self._prefix + "cpuacct.usage", self._parents["cpuacct"])
        return self._cpu_fd if self._cpu_fd >= 0 else None

    def cpu_ns(self) -> int | None:
        fd = self.cpu_fd()
        return None if fd is None else int(os.pread(fd, 64, 0))

    def usage(self) -> Usage:
        refused = self._keyed("pids", "pids.events", "max")
        return Usage(
            memory_peak_bytes=self._number("memory", "memory.max_usage_in_bytes"),
            memory_bytes=self._number("memory", "memory.usage_in_bytes"),
            cpu_ns=self.cpu_ns(),
            oom_kills=self._keyed("memory", "memory.oom_control", "oom_kill"),
            # pids.peak needs Linux 6.1, pids.events 4.4. The peak can't be reset.
            pids_peak=None if self._used_before else self._number("pids", "pids.peak"),
            pids_refused=None if refused is None else refused - self._refused_before,
            throttled_ns=self._keyed("cpu", "cpu.stat", "throttled_time"),
            source="cgroup v1",
        )

    def is_clean(self) -> bool:
        memory_bytes, cpus, pids = self._limited
        if cpus is not None or (memory_bytes is not None and memory_bytes < _REUSED_FROM_BYTES):
            return False  # the quota's counters can't be reset; what is left would weigh on a small limit
        left = self._number("memory", "memory.usage_in_bytes") or 0
        if left > _LEFT_OVER_BYTES or self._keyed("memory", "memory.oom_control", "oom_kill"):
            return False
        # Whoever joins one joins all. To read a list of processes takes longer than their number.
        count = self._number("pids", "pids.current")
        if self.processes() if count is None else count:
            return False
        return pids is None or self._number("pids", "pids.max") == pids

    def renew(self) -> None:
        for controller, name in (("memory", "memory.max_usage_in_bytes"), ("cpuacct", "cpuacct.usage")):
            if controller in self._parents:
                if controller not in self._to_renew:
                    self._to_renew[controller] = base.open_to_write(self._prefix + name, self._parents[controller])
                os.write(self._to_renew[controller], b"0")
        self._refused_before = self._keyed("pids", "pids.events", "max") or 0
        self._used_before = True

    def processes(self) -> set[int]:
        found: set[int] = set()
        for fd in self._directories():
            found |= base.read_pids(fd, self._prefix)
        return found

    def kill(self, timeout_s: float = 2.0) -> None:
        if "pids" in self._parents:
            # No more forks, so the rounds can't be outrun by a fork bomb.
            self._set("pids", "pids.max", "0")
        self._kill_each(timeout_s)

    def _rmdir(self) -> None:
        for fd in self._directories():
            base.rmdir_if_there(self.name, fd)

    def _close(self) -> None:
        read = [fd for fd in self._files.values() if fd is not None]
        for fd in (*self._join, *read, *self._to_renew.values(), *([self._cpu_fd] if self._cpu_fd >= 0 else [])):
            os.close(fd)
        self._join, self._parents, self._files, self._to_renew, self._cpu_fd = (), {}, {}, {}, -1

    def _directories(self) -> Iterable[int]:
        """The bases that have a directory of it, each once."""
        return dict.fromkeys(self._parents.values())

    def _set(self, controller: str, name: str, value: str) -> str:
        return base.set_and_read(self._parents[controller], self._prefix + name, value)

    def _read(self, controller: str, name: str) -> str | None:
        """A file's text, by a descriptor that is kept: it is read after each command. None where there is none."""
        where = (controller, name)
        if where not in self._files:
            parent_fd = self._parents.get(controller)
            try:
                self._files[where] = None if parent_fd is None else base.open_to_read(self._prefix + name, parent_fd)
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
