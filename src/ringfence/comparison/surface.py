"""The system-call surface: which calls of the host's kernel can be reached from inside each level.

The probe calls every number once, with arguments that no call can act on (core/probe_surface.c), without a boundary and
inside. Of a guest it is the VMM's surface that counts, as that is what stands between the guest and the host's kernel:
the probe runs in the jail that QEMU runs in. What a guest can ask of its own kernel is told beside it.
"""

from __future__ import annotations

import os
import subprocess

from ringfence._value import Value
from ringfence.api import run, run_spec
from ringfence.comparison.probes_place import probe_file
from ringfence.errors import ProtocolError, RingfenceError, Unmet
from ringfence.levels.host import host
from ringfence.linux import seccomp
from ringfence.linux._syscall_lists import NEWER
from ringfence.spec import Spec
from ringfence.wire.launcher import probe_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

__all__ = ["Surface", "call_names", "judge", "parse", "surfaces"]

_PROBE = "ringfence-probe"
# x86-64's own numbers beyond the old ones that every architecture shares from 424 on.
_X86_64 = {"uretprobe": 335, "uprobe": 336}
# All calls, each with its own time limit, on a busy machine.
_TIMEOUT_SECONDS = 120
_DENIALS = ("EPERM", "ENOSYS", "EACCES", "signal 31")


class Surface(Value):
    """calls: by name, "reachable", "denied ERRNO", "absent", or "unknown ERRNO" where the unconfined call gives the
    same error and so can't tell. by: who makes them, where that isn't the workload. guest: a guest's own kernel's, or
    None; there what a filter answers with ENOSYS counts as absent, as nobody is without a filter there.
    """

    __slots__ = ("by", "calls", "guest")
    calls: dict[str, str]
    by: str
    guest: Surface | None

    def __init__(self, calls: Mapping[str, str], by: str = "", guest: Surface | None = None) -> None:
        self._set(calls=dict(calls), by=by, guest=guest)

    def count(self, word: str) -> int:
        """How many calls are that: "reachable", "denied", "absent", "unknown"."""
        return sum(one.partition(" ")[0] == word for one in self.calls.values())

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        found: dict[str, Any] = {word: self.count(word) for word in ("reachable", "denied", "absent", "unknown")}
        return {
            **found,
            "by": self.by or None,
            "calls": self.calls,
            "guest": self.guest.to_json() if self.guest is not None else None,
        }


def call_names() -> dict[int, str]:
    """The names of this architecture's system calls, by number. Raises Unmet where libseccomp is missing."""
    library = seccomp.library()
    arch: int = library.system_arch()
    found = {}
    for number in range(max(NEWER.values()) + 1):
        try:
            name: bytes = library.resolve_syscall(arch, number)
        except ValueError:
            continue  # no call, or one that this libseccomp doesn't know
        found[number] = name.decode()
    more = {**NEWER, **(_X86_64 if os.uname().machine == "x86_64" else {})}
    return {**{number: name for name, number in more.items()}, **found}


def parse(output: bytes) -> dict[int, str]:
    """What the probe's verb `surface` printed, by number. Raises ProtocolError."""
    found = {}
    for line in output.decode("ascii", "replace").splitlines():
        number, _, said = line.partition(" ")
        if not number.isdecimal() or not said:
            raise ProtocolError(f"the probe printed {line[:80]!r} for a system call")
        found[int(number)] = said
    if not found:
        raise ProtocolError("the probe printed nothing of system calls")
    return found


def judge(
    outside: Mapping[int, str], inside: Mapping[int, str], names: Mapping[int, str], *, same_kernel: bool = True
) -> dict[str, str]:
    """Each call by name; numbers that no call has are left out unless they do something. same_kernel: whether what the
    unconfined run gave says which calls there are.
    """
    found = {}
    for number, said in inside.items():
        control = outside.get(number, "ENOSYS") if same_kernel else said if said == "ENOSYS" else ""
        if control == "ENOSYS":
            word = "absent"  # whatever a filter says of it
        elif said not in _DENIALS:
            word = "reachable"
        else:
            word = f"unknown {said}" if control == said else f"denied {said}"
        if number in names or word != "absent":
            found[names.get(number, f"number {number}")] = word
    return found


def _outside() -> dict[int, str]:
    """Raises ProtocolError where it doesn't end, or gives nothing."""
    words = [probe_path(), "surface"]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, check=False, cwd="/", timeout=_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ProtocolError(f"the probe of system calls did not end in {_TIMEOUT_SECONDS} s") from None
    return parse(done.stdout)


def _in_the_jail() -> bytes:
    """What the probe prints in a VMM's jail."""
    from ringfence.levels.vm.qemu import jail_limits, jail_spec
    from ringfence.levels.vm.shape import USER

    made = jail_spec(f"./{_PROBE}".encode(), USER, jail_limits(host(), 256 << 20, 1))
    files = Spec.make(["-"], isolation="container", files={_PROBE: probe_file()}).files
    done: bytes = run_spec(made.replace(argv=(made.argv[0], b"surface"), files=files)).stdout
    return done


def _inside(name: str) -> bytes:
    done: bytes = run([f"./{_PROBE}", "surface"], isolation=name, files={_PROBE: probe_file()}).stdout
    return done


def surfaces(names: Iterable[str], tell: Callable[[str], None]) -> dict[str, dict[str, Any] | None]:
    """The surface of each column, for json.dumps; "bare" is always there. None where it can't be told here."""
    try:
        calls = call_names()
    except Unmet:
        return dict.fromkeys(("bare", *names))
    tell("system calls, bare")
    outside = _outside()
    found: dict[str, dict[str, Any] | None] = {"bare": Surface(judge(outside, outside, calls)).to_json()}
    for name in names:
        tell(f"system calls, {name}")
        try:
            if name == "vm":
                guest = Surface(judge(outside, parse(_inside(name)), calls, same_kernel=False))
                jail = parse(_in_the_jail())
                found[name] = Surface(judge(outside, jail, calls), "QEMU, in its jail", guest).to_json()
            else:
                found[name] = Surface(judge(outside, parse(_inside(name)), calls)).to_json()
        except RingfenceError:
            found[name] = None
    return found
