"""Whether KVM serves here: not only opens, but runs a guest's instructions at the CPU's speed.

Under nested virtualisation /dev/kvm may open, and a guest may even run, while each of its instructions is
emulated: a kernel that boots in a second then takes minutes. So a few instructions are timed first, once per
boot of the host.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import time

from ringfence import _cache
from ringfence._value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "/dev/kvm"

# An instruction takes about 0.5 ns on hardware and took 270 where each was emulated; QEMU's own emulation
# takes some 2 on average, so that KVM is worth nothing long before this.
MAX_NS_PER_INSTRUCTION = 20.0

PROBE_SECONDS = 2.0
# After SIGKILL. A process that is stuck in the kernel is left to it.
_REAP_SECONDS = 1.0

_QEMU = "/usr/bin/qemu-system-x86_64"
_FORMAT = "1"


class KvmState(Value):
    """usable: whether guests should run on KVM. reason: why not, or what was measured.
    ns_per_instruction: nanoseconds, the best of a few runs; None where nothing could be measured.
    """

    __slots__ = ("ns_per_instruction", "reason", "usable")

    usable: bool
    reason: str
    ns_per_instruction: float | None

    def __init__(self, *, usable: bool, reason: str, ns_per_instruction: float | None) -> None:
        self._set(usable=usable, reason=reason, ns_per_instruction=ns_per_instruction)


def probe(cache_dir: str | None = None, *, qemu: str = _QEMU, refresh: bool = False) -> KvmState:
    """Whether KVM serves the caller. Takes up to 3 seconds (0.1 s as a rule) once per boot of the host, and
    then well under a millisecond; refresh: measure again. Never hangs.
    """
    if (state := _opens()) is not None:
        return state
    if os.uname().machine != "x86_64":
        return KvmState(usable=True, reason=f"{DEVICE} opens; its speed is untested here", ns_per_instruction=None)
    key = _key(qemu)
    path = os.path.join(_cache.root(cache_dir), f"kvm-{os.geteuid()}")
    if not refresh and (known := _read(path, key)):
        return known
    state = judge(_run_apart(os.path.join(os.path.dirname(__file__), "_kvm_timing.py")))
    try:
        _cache.write(path, _format(key, state))
    except OSError:
        pass  # It will be measured again.
    return state


def _opens() -> KvmState | None:
    """Why the device doesn't open, or None where it does."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return _unusable(f"there is no {DEVICE}: no hardware virtualisation, or the module kvm isn't loaded")
    except PermissionError:
        return _unusable(f"{DEVICE} is not for this user: join the group kvm ('usermod -aG kvm USER' as root)")
    except OSError as error:
        return _unusable(f"{DEVICE} doesn't open: {_name(error.errno)}")
    return None


def judge(said: str | None) -> KvmState:
    """What the timing program's output means; None: it was killed after PROBE_SECONDS."""
    if said is None:
        return _unusable(f"a guest of a few instructions didn't end within {PROBE_SECONDS:.0f} s")
    words = said.split()
    try:
        if words[0] == "ns":
            measured = float(words[1])
            if measured > MAX_NS_PER_INSTRUCTION:
                return _unusable(
                    f"{measured:.0f} ns an instruction, where hardware takes under 1: KVM emulates each one"
                    " (nested virtualisation?)",
                    measured,
                )
            return KvmState(usable=True, reason=f"{measured:.2f} ns an instruction", ns_per_instruction=measured)
        if words[0] == "failed":
            number = int(words[-1])
            about = f": {_name(number)}" if number else ""
            return _unusable(f"{' '.join(words[1:-1])} failed{about}")
    except (IndexError, ValueError):
        pass
    return _unusable("the timing program ended without a result")


def _run_apart(program: str, seconds: float = PROBE_SECONDS) -> str | None:
    """What the program printed, or None where it had to be killed."""
    if not sys.executable:
        return ""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", program],
            {},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, writer, 1),
                (os.POSIX_SPAWN_DUP2, null, 2),
            ],
        )
    except OSError:
        os.close(reader)
        return ""
    finally:
        os.close(writer)
        os.close(null)
    try:
        return _drain(reader, pid, seconds)
    finally:
        os.close(reader)


def _drain(reader: int, pid: int, seconds: float) -> str | None:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        # Another part of the process has reaped it; its output is in the pipe all the same.
        return _read_all(reader, lambda: False) or ""
    try:
        deadline = time.monotonic() + seconds
        said = _read_all(reader, lambda: time.monotonic() > deadline)
        try:
            # It is late, has said too much, or has closed its output, and then is about to end anyway.
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], _REAP_SECONDS)
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        except (ProcessLookupError, ChildProcessError):
            pass  # Another part of this process has reaped it.
        return said
    finally:
        os.close(pidfd)


def _read_all(reader: int, late: Callable[[], bool]) -> str | None:
    """All output up to its end (at most 4 KiB), or None once it's late."""
    said = b""
    while not late():
        ready, _, _ = select.select([reader], [], [], 0.05)
        if ready:
            more = os.read(reader, 4096)
            said += more
            if not more or len(said) > 4096:
                return said.decode("ascii", "replace")
    return None


def _unusable(reason: str, measured: float | None = None) -> KvmState:
    return KvmState(usable=False, reason=reason, ns_per_instruction=measured)


def _name(number: int | None) -> str:
    return errno.errorcode.get(number or 0, f"errno {number}")


def _key(qemu: str) -> str:
    """All that the measurement depends on, as one line: the boot of the host, the device, QEMU."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
    except OSError:
        boot = "unknown"
    return " ".join((_FORMAT, boot, _stat_of(DEVICE), _stat_of(qemu)))


def _stat_of(path: str) -> str:
    try:
        about = os.stat(path)
    except OSError as error:
        return _name(error.errno)
    # Without times: those of a device change with its use.
    return f"{about.st_dev}:{about.st_ino}:{about.st_rdev}:{about.st_mode:o}:{about.st_uid}:{about.st_gid}"


def _format(key: str, state: KvmState) -> bytes:
    measured = "" if state.ns_per_instruction is None else repr(state.ns_per_instruction)
    return f"{key}\n{int(state.usable)}\n{measured}\n{state.reason}\n".encode()


def _read(path: str, key: str) -> KvmState | None:
    try:
        with open(path, encoding="utf-8") as file:
            known, usable, measured, reason = file.read(8192).split("\n")[:4]
        if known != key:
            return None
        return KvmState(usable=usable == "1", reason=reason, ns_per_instruction=float(measured) if measured else None)
    except (OSError, ValueError):
        return None
