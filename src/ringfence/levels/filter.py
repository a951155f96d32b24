"""The filter of a spec that asks for one: its profile, its mode, what can't be had, and how it is told.

A spec that doesn't ask gets the default policy without any of this, straight from `linux.seccomp`.
"""

from __future__ import annotations

from ringfence._value import Value
from ringfence.errors import CannotEnforce, Unmet
from ringfence.levels.base import Ability, requested
from ringfence.linux import privileges, seccomp
from ringfence.linux import seccomp_bpf as bpf
from ringfence.result import Applied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.levels.host import Host
    from ringfence.linux.seccomp_profile import Profile
    from ringfence.spec import Spec
    from ringfence.wire.messages import Plan, Started

__all__ = ["Filter", "ability", "applied", "cgroup_unmet", "choose", "unmet"]


class Filter(Value):
    """program: what the kernel runs; b"" is none. answers: the same before a listener was put into it, or b"" where
    nobody listens. audit: whether what is denied is let through. foreign: whether it isn't a policy of ours, which is
    known to deny keyctl(2) and to allow what the command reads itself back by. flags: of seccomp(2). mechanism: for
    `applied`.
    """

    __slots__ = ("answers", "audit", "flags", "foreign", "mechanism", "program")
    program: bytes
    answers: bytes
    audit: bool
    foreign: bool
    flags: int
    mechanism: str

    def __init__(
        self, *, program: bytes, answers: bytes, audit: bool, foreign: bool, flags: int, mechanism: str
    ) -> None:
        self._set(program=program, answers=answers, audit=audit, foreign=foreign, flags=flags, mechanism=mechanism)

    def put(self, plan: Plan, *, guest: bool = False) -> None:
        """guest: init answers there, and not Python."""
        if self.program:
            plan.seccomp(self.program)
        plan.seccomp_flags(
            notify=bool(self.answers),
            foreign=self.foreign,
            kernel=self.flags,
            audit=guest and self.audit,
            answers=self.answers if guest else b"",
        )


def ability(host: Host) -> Ability:
    if host.seccomp:
        return Ability(rule="seccomp", reason=host.seccomp, help="install libseccomp: 'ringfence setup'")
    return Ability(rule="seccomp", mechanism="seccomp filter, by libseccomp")


def profile(spec: Spec, kernel: str = "") -> Profile | None:
    """The spec's own profile; None for the default policy and for none. Raises SpecError, Unmet."""
    if spec.seccomp.profile in ("default", "unconfined"):
        return None
    from ringfence.linux import seccomp_profile

    data = seccomp_profile.load(spec.seccomp.profile)
    return seccomp_profile.parse(data, capabilities=spec.capabilities, kernel=kernel)


def unmet(spec: Spec, host: Host, *, kernel: str = "") -> list[Unmet]:
    """What of a spec's profile and mode can't be kept at its level on this host. Raises SpecError.

    kernel: the release of a guest's kernel, "" for the host's.
    """
    try:
        own = profile(spec, kernel)
    except Unmet as error:
        return [Unmet("seccomp", error.requested or requested(spec, "seccomp"), error.reason, error.help)]
    return _judged(spec, host, own)


def _judged(spec: Spec, host: Host, own: Profile | None) -> list[Unmet]:
    wanted, found = spec.seccomp, []
    asked = requested(spec, "seccomp")

    def refuse(reason: str, help: str) -> None:
        found.append(Unmet("seccomp", asked, reason, help))

    if wanted.mode != "enforce":
        if wanted.profile == "unconfined":
            refuse("without a filter nothing is denied that could be listed", "leave the mode out")
        # A guest's kernel is Linux 5.0 or later.
        if spec.isolation != "vm" and not _can_notify():
            refuse("this kernel tells nobody what a filter denies", "use Linux 5.0 or later")
    loose = wanted.profile == "unconfined" or wanted.mode == "audit"
    try:
        if wanted.profile != "unconfined":
            _program(spec, own)
    except Unmet as error:
        found.append(Unmet("seccomp", error.requested or asked, error.reason, error.help))

    def may(*names: str) -> bool:
        return loose or (own is not None and any(map(own.may, names)))

    if spec.isolation == "process":
        if loose and spec.network.mode == "none":
            refuse("network 'none' is kept by the filter at this level", "use network='host', or isolation='container'")
        if (not host.privileged or spec.user is not None) and not host.landlock_abi:
            # /proc/PID/mem needs no system call of its own that a filter could deny.
            refuse(
                "the workload could look into its user's other processes, and change them: only Landlock denies that",
                "use isolation='container'",
            )
    if spec.isolation != "vm":  # whose filter is the guest's
        found += cgroup_unmet(spec, host, may)
    return found


def cgroup_unmet(spec: Spec, host: Host, may: Callable[..., bool] | None = None) -> list[Unmet]:
    """The limits that the workload could lift, as its user owns its cgroup. may: whether the spec's filter allows one
    of these calls; without it, the filter is the default one, or there is none.
    """
    if host.privileged and spec.user is None:
        return []
    from ringfence.levels import owned

    return owned.unmet(spec, host, may or (lambda *_: bool(host.seccomp)))


def _can_notify() -> bool:
    try:
        with open("/proc/sys/kernel/seccomp/actions_avail", encoding="ascii") as file:
            return "user_notif" in file.read().split()
    except OSError:
        return False


# The last few, so that a profile is read and compiled once and not for each run.
_known: dict[tuple[object, ...], Filter] = {}
_MOST_KNOWN = 16


def choose(spec: Spec, host: Host, *, kernel: str = "") -> Filter:
    """The filter of a spec that was checked, and asks for one. Raises SpecError, CannotEnforce."""
    wanted = spec.seccomp
    where = (spec.isolation, spec.network.mode == "none", spec.user is not None, spec.capabilities, kernel)
    if wanted.profile == "unconfined":
        return Filter(program=b"", answers=b"", audit=False, foreign=True, flags=0, mechanism="no filter")
    own = None
    if wanted.profile != "default":
        # Once more: a file may have changed since it was checked.
        try:
            own = profile(spec, kernel)
            refused = _judged(spec, host, own)
        except Unmet as error:
            refused = [error]
        if refused:
            raise CannotEnforce(spec.isolation, refused)
    key = (wanted.mode, "default" if own is None else own.digest, *where)
    if key not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = _make(spec, own)
    return _known[key]


def _make(spec: Spec, own: Profile | None) -> Filter:
    program, mode = _program(spec, own), spec.seccomp.mode
    if own is None:
        mechanism = f"libseccomp filter, sha256 {seccomp.sha256(program).hex()[:16]} of the program"
    else:
        mechanism = f"libseccomp filter, sha256 {own.digest[:16]} of the profile"
    answers = b""
    if mode != "enforce":
        number, arch = _seccomp_number()
        answers, program = program, (bpf.auditing if mode == "audit" else bpf.reporting)(program, number, arch)
        mechanism += ", with a listener"
    return Filter(
        program=program,
        answers=answers,
        audit=mode == "audit",
        # What is audited may call keyctl.
        foreign=own is not None or mode == "audit",
        flags=own.flags if own is not None else 0,
        mechanism=mechanism,
    )


def _program(spec: Spec, own: Profile | None) -> bytes:
    without_network = spec.isolation == "process" and spec.network.mode == "none"
    if own is None and spec.isolation == "process":
        shared = spec.user is not None or not privileges.privileged()
        return seccomp.cached(seccomp.for_process(spec.network.mode, tcp_only=False, listen=True, shared_user=shared))
    if own is None:
        return seccomp.cached(
            seccomp.policy(
                namespaces=True,
                capabilities=spec.capabilities,
                own_kernel=spec.isolation == "vm",
            )
        )
    from ringfence.linux import seccomp_compiler, seccomp_program

    program = seccomp_compiler.cached(own)
    if without_network:
        if own.architectures:
            others = ", ".join(own.architectures)
            raise Unmet(
                "seccomp", own.architectures, f"network 'none' can't be kept for {others}", "use network='host'"
            )
        program = seccomp_program.without_network(program)
    return program


def _seccomp_number() -> tuple[int, int]:
    library = seccomp.library()
    arch: int = library.system_arch()
    return library.resolve_syscall(arch, "seccomp"), arch


def applied(spec: Spec, host: Host, started: Started, filter: Filter | None) -> Applied:
    """What is in force, read back from the process. filter: of a spec that asks for one."""
    enforced = started.seccomp == 2
    if filter is None:
        return Applied(
            rule="seccomp",
            requested=None,
            effective="filter" if enforced else None,
            mechanism="libseccomp filter; the mode read from /proc/self/status" if enforced else host.seccomp,
        )
    asked = requested(spec, "seccomp")
    if not filter.program:
        inherited = ", but the caller's own filter, which is inherited" if enforced else ""
        return Applied(rule="seccomp", requested=asked, effective="unconfined", mechanism=filter.mechanism + inherited)
    return Applied(
        rule="seccomp",
        requested=asked,
        effective=asked if enforced else None,
        mechanism=f"{filter.mechanism}; the mode read from /proc",
    )
