"""What is measured for a choice: facts of the probe inside and outside, and what a start costs; and where it is kept.

Both are kept in the cache by all that they follow from: this kernel's boot, its settings that decide what an ordinary
program may do, ringfence's own binaries, who the caller is and in which namespaces, QEMU and the guest's kernel, and of
a spec whatever changes its boundary. What is damaged there, or could have been written by another account, is measured
anew, as is what follows from things that a path or a pid merely names.
"""

from __future__ import annotations

import hashlib
import json
import os
import time

from ringfence import _cache
from ringfence._value import Value
from ringfence.api import check_spec, execute, run_spec
from ringfence.comparison import facts as probe
from ringfence.comparison.facts import ATTEMPTS
from ringfence.errors import ProtocolError, RingfenceError, SpecError, StartError
from ringfence.spec import NAMESPACES, File, FileIn, Limits, Network, Spec
from ringfence.wire.launcher import core_path, namespaces_here, probe_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ringfence.levels.host import Host

__all__ = ["Here"]

# Told before what takes long, by the command line; an API that prints nothing has none.
progress: Callable[[str], None] | None = None

_FORMAT = 2
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_FACTS, _STARTS = "choices", "starts"
_MOST_BYTES = 4 << 20
_FILE = "measured.json"
_PROBE = "ringfence-probe"
# The first start of a kind makes what the next ones use.
_STARTS_OF = {"process": 9, "container": 9, "vm": 3}
# What `judged.lowered` takes off, or what decides nothing: a folder may be another one in each call.
_NOT_PROBED = frozenset(("mounts", "tmpfs", "devices", "hostname"))
# What decides what an ordinary program of this host may do (proc_sys_kernel(5), proc_sys_user(5)).
_SETTINGS = (
    "kernel/yama/ptrace_scope",
    "kernel/perf_event_paranoid",
    "kernel/unprivileged_bpf_disabled",
    "kernel/unprivileged_userns_clone",
    "kernel/apparmor_restrict_unprivileged_userns",
    "kernel/io_uring_disabled",
    "kernel/modules_disabled",
    "kernel/dmesg_restrict",
    "user/max_user_namespaces",
    "user/max_net_namespaces",
    "vm/unprivileged_userfaultfd",
)
_CREDENTIALS = (
    *("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
    *("NoNewPrivs", "Seccomp", "Seccomp_filters", "Cpus_allowed_list"),
)

# What this process has measured or read, by key; and the keys of starts that failed in it.
_known: dict[str, Any] = {}
_failed: set[str] = set()
_MOST_KNOWN = 64


class Here:
    """This host as a caller finds it now: what is known of it, and what is measured where it isn't. For one choice."""

    def __init__(self, machine: Host) -> None:
        self._host = _host(machine)
        self._levels: dict[str, list[Any]] = {}

    def _key(self, what: str, isolation: str, *more: object) -> str:
        if isolation not in self._levels:
            self._levels[isolation] = _level(isolation)
        return _key(what, self._host, self._levels[isolation], *more)

    def start_ns(self, isolation: str) -> int | None:
        """The lower quartile of what a run takes at a level that does nothing, from the second of its kind on; None
        where it can't be run. Not the median: the levels are measured one after the other, and what else the machine
        does meanwhile would decide between them.
        """
        key = self._key("start", isolation)
        if key not in _failed:
            try:
                samples = _kept(_STARTS, key, lambda: _starts(isolation), _are_samples)
                return int(sorted(samples)[len(samples) // 4])
            except (RingfenceError, OSError):
                _failed.add(key)  # tried again by the next process
        return None

    def facts(self, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
        """The facts without a boundary, and those inside a sandbox of that spec, at the level that it names.

        Raises what `run` raises, ProtocolError where the probe doesn't answer, and RingfenceError where this thread has
        left the namespaces that sandboxes are made from.
        """
        probe.check_namespaces()
        probed = _probed(spec)

        def measure() -> list[Any]:
            _tell(f"looking at what the {spec.isolation} level isolates")
            return [probe.bare_facts(), _inside(probed)]

        joined = any(getattr(spec.namespaces, name) not in ("own", "host") for name in NAMESPACES)
        if joined or not _first_line(_BOOT_ID):
            # Of whom a pid or a path is the namespace changes; and what is of no boot that is known may be of another.
            bare, inside = measure()
        else:
            key = self._key("facts", spec.isolation, _boundary(probed))
            bare, inside = _kept(_FACTS, key, measure, _are_facts)
        return bare, inside


# ---- measuring ----


def _starts(isolation: str) -> list[int]:
    _tell(f"measuring what a start costs at the {isolation} level")
    spec = Spec.make([f"./{_PROBE}", "exit", "0"], isolation=isolation, files={_PROBE: _program()})
    taken = []
    for _ in range(_STARTS_OF[isolation] + 1):
        began = time.monotonic_ns()
        done = run_spec(spec)
        taken.append(time.monotonic_ns() - began)
        if not done.ok:
            raise ProtocolError(f"a command that exits with 0 was run, but {done.describe()}")
    return taken[1:]


def _are_samples(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(type(one) is int and one > 0 for one in found)


def _are_facts(found: Any) -> bool:
    if not isinstance(found, list) or len(found) != 2:
        return False
    return all(isinstance(one, dict) and isinstance(one.get("attempts"), dict) for one in found)


def _probed(spec: Spec) -> Spec:
    """The spec with the probe as its command, and of its rules those that decide what is isolated. Of a limit it is
    decided by whether there is one.
    """
    asked, limits = spec.limits.asked, Limits()
    if spec.isolation != "vm":
        limits = Limits(
            memory="256M" if "memory" in asked else None,
            cpus=1 if "cpus" in asked else None,
            pids=256 if "pids" in asked else None,
            cpuset=spec.limits.cpuset,
        )
    network, left_out = spec.network, _NOT_PROBED | spec.limits.asked
    if network.mode == "nat":
        # A port can be published once, and the gateway's rules decide nothing of what is a sandbox's own.
        network, left_out = Network("nat"), left_out | {"allow", "publish", "bandwidth"}
    return spec.replace(
        argv=_words("facts"),
        files=(),
        input=None,
        env=(),
        collect=(),
        check=False,
        text=False,
        mounts=(),
        tmpfs=(),
        devices=(),
        hostname=None,
        network=network,
        limits=limits,
        asked=(spec.asked - left_out) | limits.asked,
        require=(),
        choice=None,
    )


def _program() -> File:
    with open(probe_path(), "rb") as file:
        return File(file.read(), 0o755)


def _inside(probed: Spec) -> dict[str, Any]:
    """What `level_facts` gives, in a sandbox of a spec, and without a shell, which not every image has."""
    probed = probed.replace(files=(FileIn(path=_PROBE.encode(), data=_program().data, mode=0o755),))
    if probed.isolation == "vm":
        # One guest for all: what is its own there is its own kernel's, whichever of its cgroups it is in.
        boundary, machine = check_spec(probed)
        with boundary.open(probed, machine, stays=True) as sandbox:
            return _look_around(
                lambda argv: execute(sandbox, probed.replace(argv=argv), time.monotonic_ns(), once=False),
                probed.isolation,
            )
    return _look_around(lambda argv: run_spec(probed.replace(argv=argv)), probed.isolation)


def _look_around(run: Callable[[tuple[bytes, ...]], Any], isolation: str) -> dict[str, Any]:
    seen = run(_words("facts"))
    if not seen.ok:
        raise ProtocolError(f"the probe gave no facts: {seen.describe()}")
    lines = [seen.stdout]
    for _, attempt in ATTEMPTS:
        try:
            done = run(_words(attempt.replace("VICTIM", str(os.getpid()))))
        except StartError as error:
            raise ProtocolError(f"the probe was not run again: {error}") from None
        said = done.stdout.strip().splitlines()
        # One that is killed prints nothing.
        lines.append(said[0] if said else f"died {done.describe()}".encode())
    found = probe.parse(b"\n".join(line.strip(b"\n") for line in lines))
    found["accelerator"] = None
    found["level"] = isolation
    return found


def _words(verb: str) -> tuple[bytes, ...]:
    return tuple(os.fsencode(word) for word in (f"./{_PROBE}", *verb.split()))


# ---- what it follows from ----


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts], sort_keys=True, default=_spelled).encode()).hexdigest()[:32]


def _spelled(value: Any) -> Any:
    """Every field of a value: a repr of one is cut where it is long."""
    if isinstance(value, Value):
        return [type(value).__name__, {name: getattr(value, name) for name in value._fields}]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    return repr(value)


def _host(machine: Host) -> list[Any]:
    from ringfence import __version__

    layout = machine.cgroups
    return [
        __version__,
        [_file_id(path) for path in (core_path(), probe_path(), "/", "/etc/subuid", "/etc/subgid")],
        [_first_line(f"/proc/sys/{name}") for name in ("kernel/random/boot_id", *_SETTINGS)],
        # Where its own cgroup is differs from login to login, and decides nothing.
        [machine.replace(cgroups=layout.replace(unified=b"", controllers=())), _controllers(machine)],
        _credentials(),
        namespaces_here(),
    ]


def _controllers(machine: Host) -> list[Any]:
    return [(one.name, one.version, one.usable, one.reason) for one in machine.cgroups.controllers]


def _credentials() -> list[str]:
    with open("/proc/thread-self/status", encoding="ascii", errors="replace") as file:
        return [line for line in file.read().splitlines() if line.partition(":")[0] in _CREDENTIALS]


def _level(isolation: str) -> list[Any]:
    if isolation != "vm":
        return [isolation]
    from ringfence.levels.vm import emulator, kernel
    from ringfence.linux import kvm

    try:
        qemu = emulator.look()
        guest = kernel.find()
    except RingfenceError as error:
        return [isolation, str(error)]
    state = kvm.probe()
    return [isolation, qemu, _file_id(qemu.path), qemu.machine(), guest, state.usable]


def _boundary(probed: Spec) -> list[Any]:
    """What of a spec decides what is isolated; of what a path leads to, which file it is."""
    paths = [*(probed.readable or ()), *probed.writable, os.fsencode(probed.image)]
    fields = [name for name in Spec._fields if name not in ("argv", "files", "isolation")]
    return [
        {name: getattr(probed, name) for name in fields},
        [_file_id(path, content=False) for path in paths],
        _kernel_digest(probed),
    ]


def _kernel_digest(probed: Spec) -> str | None:
    """Over the content of a kernel of the spec's own, and of its modules. Raises what preparing it raises."""
    if probed.kernel is None:
        return None
    from ringfence.levels.vm import own_kernel

    return own_kernel.prepare(probed.kernel).digest


def _file_id(path: str | bytes, *, content: bool = True) -> list[int] | None:
    try:
        about = os.stat(path)
    except OSError:
        return None
    which = [about.st_dev, about.st_ino, about.st_mode]
    return [*which, about.st_size, about.st_mtime_ns] if content and not os.path.isdir(path) else which


def _first_line(path: str) -> str | None:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return None


# ---- where it is kept ----


def _kept(kind: str, key: str, measure: Callable[[], Any], valid: Callable[[Any], bool]) -> Any:
    """What was measured under that key, in this process, or before, or now. Raises what `measure` raises."""
    name = f"{kind}/{key}"
    if name not in _known:
        found = _from_cache(kind, key, measure, valid)
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[name] = found
    return _known[name]


def _from_cache(kind: str, key: str, measure: Callable[[], Any], valid: Callable[[Any], bool]) -> Any:
    measured: list[Any] = []

    def fill(scratch: str) -> None:
        measured.append(measure())
        _cache.write(os.path.join(scratch, _FILE), json.dumps(measured[0]).encode())

    try:
        folder = _cache.obtain(kind, key, fill)
        if not measured:
            found = _read(folder)
            if valid(found):
                return found
            # Sealed, and yet not what is written here.
            _cache.remove(kind, key)
            return measure()
        _cache.limit(kind, _MOST_BYTES, keep=key)
    except (OSError, SpecError):
        # Without a cache folder that can be trusted, or written to, there is none.
        if not measured:
            return measure()
    return measured[0]


def _read(folder: str) -> Any:
    try:
        with open(os.path.join(folder, _FILE), "rb") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _tell(text: str) -> None:
    if progress is not None:
        progress(text)
