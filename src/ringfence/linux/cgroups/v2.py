"""Cgroups of version 2: one hierarchy for all controllers.

Where they can be made is told by `home`.
"""

from __future__ import annotations

import errno
import os
import time

from ringfence.errors import KernelError
from ringfence.linux.cgroups import base, files
from ringfence.linux.cgroups.base import Cgroup, Manager
from ringfence.linux.cgroups.home import WANTED, Home, find_home, is_ours, words
from ringfence.linux.cgroups.values import NO_LIMITS, Base, IoLimits, Layout, Limits, Usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ringfence.linux.cgroups.systemd import Systemd

__all__ = ["V2Cgroup", "V2Manager"]

# Only once a sandbox asks for them, as each makes a cgroup dearer.
_ON_DEMAND = ("cpuset", "io")
_IO_KEYS = {"io_read": "rbps", "io_write": "wbps", "io_read_ops": "riops", "io_write_ops": "wiops"}
_SELF = "ringfence-self"
_MOVE_ROUNDS = 10


class V2Manager(Manager):
    """One base, with the controllers that its home hands out."""

    version = 2

    def __init__(
        self,
        found: Layout,
        home: Home | None = None,
        claim: Callable[..., None] | None = None,
        helper: int | None = None,
    ) -> None:
        """helper: the process that starts the sandboxes, which goes into a scope of systemd's; None is this one, which
        then isn't moved anywhere: there is no cgroup where only systemd could give one.
        """
        super().__init__(found, claim)
        self._home = home if home is not None else find_home(found.unified, found.mount)
        self._base: Base | None = None
        self._moved = False
        self._helper = helper

    def bases(self) -> tuple[Base, ...]:
        return () if self._home.reason else (self._made_base(),)

    def made(self) -> tuple[Base, ...]:
        return () if self._base is None else (self._base,)

    def _made_base(self) -> Base:
        if self._base is None:
            if self._home.reason:
                raise KernelError("mkdir", ("cgroup",), errno.EACCES, self._home.reason)
            if self._home.manager is not None:
                self._home = self._ask(self._home.manager)
            wanted = [name for name in WANTED if name in self._home.controllers]
            parent_fd = files.open_directory(self._home.path)
            name = b""
            made = -1
            try:
                if self._home.move and wanted:
                    self._move_to_leaf(parent_fd)
                _hand_out(parent_fd, wanted)
                name = self._new_base(parent_fd)
                made = files.open_directory(name, parent_fd)
                _hand_out(made, wanted)
            except BaseException:
                if made >= 0:
                    os.close(made)
                if name:
                    files.remove_directory(name, parent_fd)
                self._move_back(parent_fd)
                os.close(parent_fd)
                raise
            self._base = Base(fd=made, name=name, parent_fd=parent_fd)
        return self._base

    def _ask(self, manager: Systemd) -> Home:
        """A scope of systemd's with our helper in it. Raises KernelError."""
        if self._helper is None:
            raise KernelError("mkdir", ("cgroup",), errno.EACCES, "only systemd could give a cgroup, for a helper")
        from ringfence.linux.cgroups import systemd

        path = systemd.start_scope(manager, self._helper)
        fd = files.open_directory(path)
        try:
            return Home(path=path, controllers=words(fd, "cgroup.controllers"), move=True)
        finally:
            os.close(fd)

    @property
    def asks(self) -> bool:
        return self._base is None and self._home.manager is not None

    def create(self, limits: Limits = NO_LIMITS, *, measure: bool = True, live: bool = False) -> V2Cgroup:
        wanted = limits.controllers()
        if self._home.manager is not None:
            self._made_base()  # what the scope really has is known only then
        for name in wanted - self._home.controllers:
            reason = self.usable(name).reason or f"the {name} controller isn't in {os.fsdecode(self._home.path)}"
            raise KernelError("mkdir", (name,), errno.ENOTSUP, reason)
        parent = self._made_base()
        extra = [name for name in _ON_DEMAND if name in (self._home.controllers if live else wanted)]
        if extra:
            _hand_out(parent.parent_fd, extra)
            _hand_out(parent.fd, extra)
        name = self._next_name()
        files.make_directory(name, parent.fd)
        made = V2Cgroup(name, parent.fd, live=live)
        try:
            made.limit(limits)
        except BaseException:
            made.remove()
            raise
        return made

    def close(self) -> None:
        if self._base is None:
            return
        files.remove_children(self._base.fd)
        files.remove_directory(self._base.name, self._base.parent_fd)
        self._move_back(self._base.parent_fd)
        os.close(self._base.fd)
        os.close(self._base.parent_fd)
        self._base = None

    def _move_to_leaf(self, own_fd: int) -> None:
        """Make room: this process and its descendants go to a leaf, still under the same limits."""
        if self._claim is not None:
            self._claim(own_fd, os.fsencode(_SELF), True)
        files.make_directory(_SELF, own_fd)
        self._moved = True
        leaf_fd = files.open_directory(_SELF, own_fd)
        try:
            _move(own_fd, leaf_fd)
        finally:
            os.close(leaf_fd)

    def _move_back(self, own_fd: int) -> None:
        if not self._moved:
            return
        self._moved = False
        for name in words(own_fd, "cgroup.subtree_control"):
            files.set_and_read(own_fd, "cgroup.subtree_control", f"-{name}")
        leaf_fd = files.open_directory(_SELF, own_fd)
        try:
            _move(leaf_fd, own_fd)
        finally:
            os.close(leaf_fd)
        files.remove_directory(_SELF, own_fd)


class V2Cgroup(Cgroup):
    """One directory, with all the controllers that its base hands out."""

    def __init__(self, name: str, parent_fd: int, *, live: bool = False) -> None:
        super().__init__(name, live=live)
        self._prefix = name + "/"
        self._parent_fd = parent_fd
        self._join: tuple[int, ...] = ()
        self._cpu_fd = -1
        self._io_device = (0, 0)

    # ---- limits ----

    def _set_limits(self, controller: str, limits: Limits) -> None:
        if controller == "memory":
            self._limit_memory(limits.memory_bytes, limits.swap_bytes)
        elif controller == "cpu":
            self._limit_cpus(limits.cpus)
            self._weigh_cpus(limits.cpu_weight)
        elif controller == "cpuset":
            self._limit_cpuset(limits.cpuset)
        elif controller == "pids":
            if limits.pids is not None or "pids" in self._in_force:
                found = self._set("pids.max", "max" if limits.pids is None else str(limits.pids))
                self._note("pids", limits.pids, _number_or_max(found), "cgroup v2 pids.max")
        else:
            self._limit_io(limits.io)

    def _limit_memory(self, memory_bytes: int | None, swap_bytes: int | None) -> None:
        if memory_bytes is None and swap_bytes is not None:
            raise KernelError(
                "update", (self.name,), errno.EINVAL, "swap is what comes on top of memory: limit memory too"
            )
        if memory_bytes is None and "memory" not in self._in_force:
            return
        if "memory" in self._in_force and memory_bytes is not None:
            self._make_room(memory_bytes)
        limit = _number_or_max(self._set("memory.max", "max" if memory_bytes is None else str(memory_bytes)))
        mechanism = "cgroup v2 memory.max"
        try:
            swap = _number_or_max(self._set("memory.swap.max", "max" if memory_bytes is None else str(swap_bytes or 0)))
            if swap_bytes is None:
                limit = None if limit is None or swap is None else limit + swap
                mechanism += " and memory.swap.max"
        except KernelError as error:
            # No such file: this kernel has no swap, or doesn't count it, which _has_swap tells apart.
            if error.errno != errno.ENOENT or swap_bytes or _has_swap():
                raise
            swap = 0
        # At the limit all of the sandbox dies, not one process of it: it has one cause of death. Linux 4.19.
        if files.read(self._parent_fd, self._prefix + "memory.oom.group") is not None:
            self._set("memory.oom.group", "1")
        self._note("memory", memory_bytes, limit, mechanism)
        self._note("swap", swap_bytes, swap, "cgroup v2 memory.swap.max")

    def _make_room(self, memory_bytes: int) -> None:
        """Before a limit shrinks: this version would kill for what doesn't fit, where the first refuses."""
        name = self._prefix + "memory.current"
        used = files.read_number(self._parent_fd, name) or 0
        if used <= memory_bytes:
            return
        try:
            files.write(self._parent_fd, self._prefix + "memory.reclaim", str(used - memory_bytes))  # Linux 5.19
        except KernelError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOENT, errno.EINVAL):  # less was freed; no such file
                raise
        used = files.read_number(self._parent_fd, name) or 0
        if used > memory_bytes:
            raise KernelError("write", ("memory.max", memory_bytes), errno.EBUSY, f"{used} bytes are in use")

    def _limit_cpus(self, cpus: float | None) -> None:
        if cpus is None and "cpus" not in self._in_force:
            return
        quota = "max" if cpus is None else str(round(cpus * base.CPU_PERIOD_US))
        used, period = self._set("cpu.max", f"{quota} {base.CPU_PERIOD_US}").split()
        self._note("cpus", cpus, None if used == "max" else int(used) / int(period), "cgroup v2 cpu.max")

    def _weigh_cpus(self, weight: int | None) -> None:
        if weight is not None or "cpu_weight" in self._in_force:
            found = int(self._set("cpu.weight", "100" if weight is None else str(weight)))
            self._note("cpu_weight", weight, found, "cgroup v2 cpu.weight")

    def _limit_cpuset(self, cpuset: tuple[int, ...] | None) -> None:
        if cpuset is None:
            if "cpuset" in self._in_force:
                self._set("cpuset.cpus", "\n")  # those of the cgroup above
                self._note("cpuset", None, None, "")
            return
        self._set("cpuset.cpus", files.cpu_list(cpuset))
        # Where the cgroups above have none of the list, the kernel gives all that they have: not what was asked for.
        effective = files.cpus_in(files.read(self._parent_fd, self._prefix + "cpuset.cpus.effective") or "")
        self._note("cpuset", cpuset, effective, "cgroup v2 cpuset.cpus.effective")
        if effective != cpuset:
            has = files.cpu_list(effective)
            raise KernelError("write", ("cpuset.cpus", files.cpu_list(cpuset)), errno.EINVAL, f"it has {has}")

    def _limit_io(self, io: IoLimits | None) -> None:
        wanted = {} if io is None else io.rules()
        if all(wanted.get(rule) is None and rule not in self._in_force for rule in _IO_KEYS):
            return
        self._io_device = self._io_device if io is None else io.device
        device = f"{self._io_device[0]}:{self._io_device[1]}"
        rates = " ".join(f"{key}={wanted.get(rule) or 'max'}" for rule, key in _IO_KEYS.items())
        found = {}
        for line in self._set("io.max", f"{device} {rates}").splitlines():
            name, *pairs = line.split()
            if name == device:
                found = dict(pair.split("=") for pair in pairs)
        for rule, key in _IO_KEYS.items():
            effective = _number_or_max(found.get(key, "max"))
            self._note(rule, wanted.get(rule), effective, f"cgroup v2 io.max {key} of {device}")

    # ---- what runs in it ----

    def join_fds(self) -> tuple[int, ...]:
        if not self._join:
            self._join = (files.open_to_write(self._prefix + "cgroup.procs", self._parent_fd),)
        return self._join

    def cpu_fd(self) -> int:
        if self._cpu_fd < 0:
            self._cpu_fd = files.open_to_read(self._prefix + "cpu.stat", self._parent_fd)
        return self._cpu_fd

    def cpu_ns(self) -> int | None:
        key, value = os.pread(self.cpu_fd(), 4096, 0).split(maxsplit=2)[:2]
        return int(value) * 1000 if key == b"usage_usec" else None

    def usage(self) -> Usage:
        cpu = dict(line.split() for line in os.pread(self.cpu_fd(), 4096, 0).splitlines())
        io = self._io_bytes()
        return Usage(
            # memory.peak needs Linux 5.19, pids.peak 6.1; older kernels don't say.
            memory_peak_bytes=files.read_number(self._parent_fd, self._prefix + "memory.peak"),
            cpu_ns=_ns(cpu.get(b"usage_usec")),
            cpu_user_ns=_ns(cpu.get(b"user_usec")),
            cpu_system_ns=_ns(cpu.get(b"system_usec")),
            oom_kills=files.read_keyed(self._parent_fd, self._prefix + "memory.events").get("oom_kill"),
            pids_peak=files.read_number(self._parent_fd, self._prefix + "pids.peak"),
            throttled_ns=_ns(cpu.get(b"throttled_usec")),
            io_read_bytes=io.get("rbytes"),
            io_write_bytes=io.get("wbytes"),
            memory_pressure_ns=self._pressure_ns("memory.pressure"),
            cpu_pressure_ns=self._pressure_ns("cpu.pressure"),
            io_pressure_ns=self._pressure_ns("io.pressure"),
            source="cgroup v2",
        )

    def _pressure_ns(self, name: str) -> int | None:
        """The total of "some": `some avg10=0.00 avg60=0.00 avg300=0.00 total=123`, in microseconds."""
        try:
            line = (files.read(self._parent_fd, self._prefix + name) or "").partition("\n")[0]
        except KernelError:
            return None  # psi=0 on the kernel's command line: the file is there, and gives EOPNOTSUPP
        _, found, total = line.partition("total=")
        return int(total) * 1000 if found else None

    def _io_bytes(self) -> dict[str, int]:
        """rbytes and wbytes, of all devices together: lines like "254:0 rbytes=4096 wbytes=0 rios=1"."""
        text = files.read(self._parent_fd, self._prefix + "io.stat")
        if text is None:
            return {}
        found = {"rbytes": 0, "wbytes": 0}
        for line in text.splitlines():
            for pair in line.split()[1:]:
                key, _, value = pair.partition("=")
                if key in found:
                    found[key] += int(value)
        return found

    def _write_freezer(self, frozen: bool) -> None:
        self._set("cgroup.freeze", "1" if frozen else "0")  # Linux 5.2

    def _is_frozen(self) -> bool:
        return files.read_keyed(self._parent_fd, self._prefix + "cgroup.events").get("frozen") == 1

    def processes(self) -> set[int]:
        return files.read_pids(self._parent_fd, self._prefix)

    def kill(self, timeout_s: float = 2.0) -> None:
        try:
            fd = files.open_to_write(self._prefix + "cgroup.kill", self._parent_fd)
        except FileNotFoundError:  # before Linux 5.14
            self._kill_each(timeout_s)
            return
        deadline = time.monotonic() + timeout_s
        try:
            while self.processes():
                os.write(fd, b"1")
                self._pause(deadline)
        finally:
            os.close(fd)

    def _rmdir(self) -> None:
        files.rmdir_if_there(self.name, self._parent_fd)

    def _close(self) -> None:
        for fd in (*self._join, *([self._cpu_fd] if self._cpu_fd >= 0 else [])):
            os.close(fd)
        self._join, self._cpu_fd = (), -1

    def _set(self, name: str, value: str) -> str:
        return files.set_and_read(self._parent_fd, self._prefix + name, value)


def _hand_out(fd: int, controllers: Iterable[str]) -> None:
    """Let a cgroup's children have those controllers. Raises KernelError; EBUSY with processes in it."""
    missing = [name for name in controllers if name not in words(fd, "cgroup.subtree_control")]
    if missing:
        files.set_and_read(fd, "cgroup.subtree_control", " ".join(f"+{name}" for name in missing))


def _move(from_fd: int, to_fd: int) -> None:
    """Move this process and its descendants from one cgroup to another, until none is left there."""
    for _ in range(_MOVE_ROUNDS):
        pids = [pid for pid in files.read_pids(from_fd) if is_ours(pid)]
        if not pids:
            return
        fd = files.open_to_write("cgroup.procs", to_fd)
        try:
            for pid in pids:
                try:
                    os.write(fd, str(pid).encode())
                except ProcessLookupError:
                    continue
                except OSError as error:
                    raise KernelError("write", ("cgroup.procs", pid), error.errno or 0) from error
        finally:
            os.close(fd)


def _ns(microseconds: bytes | None) -> int | None:
    return None if microseconds is None else int(microseconds) * 1000


def _number_or_max(text: str) -> int | None:
    return None if text == "max" else int(text)


def _has_swap() -> bool:
    try:
        with open("/proc/swaps", "rb") as file:
            return len(file.read().splitlines()) > 1
    except OSError:
        return True  # unknown, so the limit might leak into swap
