"""Templates: a guest that has booted, saved before anything of a spec was in it, and restored for each run.

A template is a memory and a state. The memory is mapped copy-on-write by each QEMU that is restored from it; the state
is what the devices are in. What must be the same at the restore as at the save is in the template's key: QEMU and its
firmware, kernel, initramfs, the machine and its devices, the host's CPU. What is different for each guest comes with
the PLAN, before the first command: the wall clock, a seed for the random pool, the machine-id. Shares are empty and
disks are blank when a template is made: no workload's data, and no code but the kernel and our init, was ever in one.
"""

from __future__ import annotations

import os
import stat
import time
from _thread import allocate_lock

from ringfence import _cache
from ringfence.errors import ProtocolError
from ringfence.levels.vm import memory
from ringfence.levels.vm.agent import Agent
from ringfence.levels.vm.qemu import Memory, command_line, start_qemu
from ringfence.wire import frames, guest_messages
from ringfence.wire.frames import Type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ringfence.levels.host import Host
    from ringfence.levels.state import State
    from ringfence.levels.vm.vmm import Machine, Vmm

    Progress = Callable[[str], None]

__all__ = ["KIND", "NotBooted", "Template", "forget", "key_of", "let_go", "loaded", "machine_memory", "obtain"]

KIND = "templates"
_FORMAT = 1
_MEMORY, _RUNS, _STATE, _MANIFEST = "memory", "runs", "state", "manifest.json"
_FIRMWARE = ("/usr/share/qemu/qboot.rom", "/usr/share/seabios/qboot.rom")

# A boot and a save, on a machine that is busy with others.
_MAKE_LIMIT_NS = 180_000_000_000
# After init's first word some of the kernel's own work is still to be done.
_SETTLE_S = 0.1
# The guest's clock is known as well as the fastest of these answers came.
_CLOCK_SAMPLES = 50
_CLOCK_GOOD_NS = 4_000_000
_CLOCK_BAD_NS = 40_000_000
_STATE_BYTES = 64 << 20
# How many this process has in its memory at once: each holds some 80 MB.
_MOST_LOADED = 4
_MIB = 1 << 20
# By how much one may grow by what its guests touch until it is unpacked anew (40 ms). A guest that runs `true` has its
# template grow by 0.3 MiB, the first that runs Python by 5, and those after it by nothing.
MOST_GROWN_BYTES = 16 * _MIB
# All templates together, on disk; the ones that weren't used for longest go.
MOST_BYTES = 1 << 30


def machine_memory(wanted_bytes: int) -> int:
    """The memory of a machine that is to have at least so much: sizes that many specs share.

    What a workload may use of it is the guest's cgroup's business, which has the exact figure.
    """
    step = 64 * _MIB
    while wanted_bytes > 8 * step:
        step *= 2
    return -(-wanted_bytes // step) * step


class NotBooted(ProtocolError):
    """Its guest never said a word."""


class Template:
    """A template in this process's memory: two sealed files. monotonic_ns: the guest's clock when it was saved."""

    __slots__ = ("folder", "key", "memory_fd", "monotonic_ns", "state_fd", "unpacked_bytes")

    def __init__(self, key: str, folder: str, memory_fd: int, state_fd: int, monotonic_ns: int) -> None:
        self.key = key
        self.folder = folder
        self.memory_fd = memory_fd
        self.state_fd = state_fd
        self.monotonic_ns = monotonic_ns
        self.unpacked_bytes = self.held_bytes

    @property
    def size_bytes(self) -> int:
        """On disk."""
        return sum(one.st_blocks * 512 for one in map(os.stat, os.scandir(self.folder)))

    @property
    def held_bytes(self) -> int:
        """Of the host's memory, by the file of the guest's memory."""
        return os.fstat(self.memory_fd).st_blocks * 512

    def open_both(self) -> tuple[int, int]:
        """Descriptors of memory and state with positions of their own, for one QEMU. Raises OSError."""
        opened: list[int] = []
        try:
            for fd in (self.memory_fd, self.state_fd):
                # An unprivileged caller's QEMUs are of the uid that owns these files: one that its guest has taken over
                # may have closed them to the next.
                os.fchmod(fd, 0o666)
                opened.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise
        return opened[0], opened[1]

    def __del__(self) -> None:
        # By its last user, of whom there may be one in every thread.
        for fd in (self.memory_fd, self.state_fd):
            os.close(fd)


_lock = allocate_lock()
_loaded: dict[str, Template] = {}


# ---- the key ----


def key_of(machine: Machine, cache_dir: str | None = None) -> str:
    """By what a template is kept: the digest of all that went into it."""
    import hashlib

    of = (
        _FORMAT,
        [_identity(path) for path in (machine.program, *_FIRMWARE)],
        # The rate of the TSC is measured anew by each process: the host's CPU stands for it.
        command_line(_blank(machine), Memory(memory=0, state=None), tsc_khz=0),
        _host_cpu(),
        _content(machine.kernel),
        _content(machine.initramfs),
        _disk_bytes(machine),
    )
    return hashlib.sha256(repr(of).encode()).hexdigest()[:32]


def _identity(path: str) -> tuple[object, ...] | None:
    """A program of the system's, by its stat(2) data: another one when a package is upgraded."""
    try:
        about = os.stat(path)
    except OSError:
        return None
    return (os.path.realpath(path), about.st_size, about.st_mtime_ns, about.st_ino)


def _content(path: str) -> tuple[object, ...]:
    """A file of the cache, whose folder is named by what is in it; a file elsewhere by its stat(2) data."""
    return (path, *(_identity(path) or ()))


def _host_cpu() -> list[str]:
    """What tells this host's CPU from another one's: the first one's lines of /proc/cpuinfo, and which host it is."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags")
    found = []
    with open("/proc/cpuinfo", "rb") as file:
        for line in file.read(16384).decode("ascii", "replace").partition("\n\n")[0].splitlines():
            if line.partition(":")[0].strip() in wanted:
                found.append(line)
    try:
        with open("/etc/machine-id", encoding="ascii", errors="replace") as text:
            found.append(text.read(64))
    except OSError:
        found.append("")
    return [*found, os.uname().release]


def _blank(machine: Machine) -> Machine:
    """The machine without what is one spec's own: who QEMU is, how much of the host it may use, what is open to it."""
    closed = machine.card.closed() if machine.card is not None else None
    return machine.replace(user=(0, 0), cpu_weight=None, cpuset=None, disk_format="raw", card=closed)


def _disk_bytes(machine: Machine) -> list[int]:
    """How large the guest sees each disk: all that it knows of one before it is restored."""
    if machine.disk_format == "raw":
        return [os.stat(disk).st_size for disk in machine.disks]
    from ringfence.images.disk import inspect

    return [inspect(disk).size_bytes for disk in machine.disks]


# ---- finding and making ----


def loaded(machine: Machine) -> Template | None:
    """The machine's template, where this process has it in memory or the cache has one that is whole."""
    key = key_of(machine)
    with _lock:
        if (found := _loaded.pop(key, None)) is not None:
            _loaded[key] = found  # the last used is the last to go
            return found
    folder = _cache.find(KIND, key)
    if folder is None:
        return None
    try:
        return _load(key, folder)
    except ProtocolError:
        _cache.remove(KIND, key)  # whoever put it there
        return None


def obtain(machine: Machine, host: Host, state: State, progress: Progress | None = None) -> tuple[Template, bool]:
    """The machine's template, made now where there is none, and whether it was there.

    Raises RingfenceError, OSError.
    """
    if (found := loaded(machine)) is not None:
        return found, True
    key = key_of(machine)
    made = []

    def fill(folder: str) -> None:
        made.append(folder)
        if progress:
            progress(f"making a template of a guest with {machine.memory_bytes >> 20} MiB (once)")
        _make(machine, host, state, folder)

    folder = _cache.obtain(KIND, key, fill, progress=progress)
    _cache.limit(KIND, MOST_BYTES, keep=key)
    return _load(key, folder), not made


def forget(template: Template) -> None:
    """It doesn't serve: the next one who needs it makes it anew."""
    with _lock:
        _loaded.pop(template.key, None)
    _cache.remove(KIND, template.key)


def let_go(template: Template) -> None:
    """A guest of it has ended. Holes that guests touch become pages of the file of its memory, and the seals keep us
    from giving them back: where they are many, the next guest has a new file.
    """
    if template.held_bytes <= template.unpacked_bytes + MOST_GROWN_BYTES:
        return
    with _lock:
        if _loaded.get(template.key) is template:
            del _loaded[template.key]


def _load(key: str, folder: str) -> Template:
    """Raises ProtocolError where the entry isn't ours or makes no sense."""
    import json

    opened: list[int] = []
    try:
        for name in (_MEMORY, _RUNS, _STATE, _MANIFEST):
            opened.append(_open_own(os.path.join(folder, name)))
        packed, runs, state, manifest = opened
        about: Any = json.loads(_read(manifest, 1 << 16))
        size, clock = about["memory_bytes"], about["monotonic_ns"]
        if about["format"] != _FORMAT or not isinstance(size, int) or not isinstance(clock, int) or size <= 0:
            raise ProtocolError(f"the template in {folder} was made by another version")
        memory_fd = memory.unpack(packed, _read(runs, 16 << 20), size)
        try:
            state_fd = memory.sealed("ringfence-state", _read(state, _STATE_BYTES))
        except BaseException:
            os.close(memory_fd)
            raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ProtocolError(f"the template in {folder} can't be used: {error}") from error
    finally:
        for fd in opened:
            os.close(fd)
    os.utime(folder)  # what was used last is the last to be pruned
    return _keep(Template(key, folder, memory_fd, state_fd, clock))


def _keep(made: Template) -> Template:
    with _lock:
        made = _loaded.setdefault(made.key, made)  # another thread may have been as quick
        while len(_loaded) > _MOST_LOADED:
            del _loaded[next(iter(_loaded))]
    return made


def _open_own(path: str) -> int:
    """A file of the cache that nobody else could have put there."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_uid not in (0, os.geteuid()) or about.st_mode & 0o022:
        os.close(fd)
        raise ProtocolError(f"{path} isn't ours alone")
    return fd


def _read(fd: int, most: int) -> bytes:
    size = os.fstat(fd).st_size
    data = os.pread(fd, min(size, most), 0)
    if len(data) != size:
        raise ProtocolError("a file of a template is larger than it can be")
    return data


def _make(machine: Machine, host: Host, state: State, folder: str) -> None:
    """Boots a guest, saves it, writes its files."""
    import json

    deadline = time.monotonic_ns() + _MAKE_LIMIT_NS
    disks = []
    for number, size in enumerate(_disk_bytes(machine)):
        # Blank: what is on a spec's disk is never seen by a kernel that others will run.
        blank = os.path.join(folder, f"disk{number}")
        with open(blank, "xb") as file:
            file.truncate(size)
        os.chmod(blank, 0o644)
        disks.append(blank)
    memory_fd = memory.create("ringfence-making", machine.memory_bytes)
    state_fd = memory.create("ringfence-saving", 0)
    try:
        plain = _blank(machine).replace(disks=tuple(disks), user=machine.user)
        vmm = start_qemu(plain, host, state, memory=Memory(memory=memory_fd, state=None))
        try:
            monotonic_ns = _save(vmm, state_fd, deadline)
        finally:
            vmm.close()
        memory.pack(memory_fd, os.path.join(folder, _MEMORY), os.path.join(folder, _RUNS))
        _cache.write(os.path.join(folder, _STATE), _read(state_fd, _STATE_BYTES))
    finally:
        os.close(memory_fd)
        os.close(state_fd)
        for blank in disks:
            os.unlink(blank)
    about = {
        "format": _FORMAT,
        "memory_bytes": machine.memory_bytes,
        "monotonic_ns": monotonic_ns,
        "cpus": machine.cpus,
        "shares": len(machine.shares),
        "disks": len(machine.disks),
        "accelerator": machine.accelerator,
        "kernel": machine.kernel,
    }
    _cache.write(os.path.join(folder, _MANIFEST), json.dumps(about, indent=1).encode())


def _save(vmm: Vmm, state_fd: int, deadline: int) -> int:
    """Waits for the guest, and saves it. Its CLOCK_MONOTONIC at that moment, ns."""
    control = vmm.control
    assert control is not None
    agent = Agent(vmm, _nothing_else)
    try:
        agent.wait_for(Type.READY, deadline - time.monotonic_ns(), "the guest did not boot")
    except ProtocolError as error:
        raise NotBooted(str(error)) from error
    time.sleep(_SETTLE_S)
    ahead_ns = _clock(vmm, agent, deadline)
    control.capabilities(deadline)
    control.execute("getfd", deadline, (state_fd,), fdname="state")
    control.execute("migrate", deadline, uri="fd:state")
    while (status := control.execute("query-migrate", deadline).get("status")) != "completed":
        if status in ("failed", "cancelled"):
            raise ProtocolError(f"QEMU did not save the guest{vmm.last_words()}")
        time.sleep(0.002)
    stopped_ns = control.event("STOP", deadline)
    # Clocks of the host, which differ by what they did all the while.
    stopped_ns += time.monotonic_ns() - time.time_ns()
    return stopped_ns + ahead_ns


def _clock(vmm: Vmm, agent: Agent, deadline: int) -> int:
    """By how much the guest's CLOCK_MONOTONIC is ahead of ours, ns: usually far less than nothing."""
    best = (_CLOCK_BAD_NS, 0)
    for _ in range(_CLOCK_SAMPLES):
        asked = time.monotonic_ns()
        vmm.channel.send(frames.encode(Type.ASK_CLOCK))
        answer = agent.wait_for(Type.CLOCK, deadline - asked, "the guest did not tell its clock")
        took = time.monotonic_ns() - asked
        best = min(best, (took, guest_messages.parse_clock(answer.payload) - asked - took // 2))
        if best[0] < _CLOCK_GOOD_NS:
            break
    if best[0] >= _CLOCK_BAD_NS:
        raise ProtocolError("this machine is too busy to tell a guest's clock")
    return best[1]


def _nothing_else(frame: frames.Frame) -> None:
    raise ProtocolError(f"the guest sent a frame of type {frame.type} before its plan")
