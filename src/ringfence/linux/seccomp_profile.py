"""Seccomp profiles in JSON: the OCI runtimes' `linux.seccomp`, and Docker's, which has conditions besides.

Read strictly: what isn't known, or can't be kept here, is refused and never left out. `seccomp_compiler` makes a
program of a profile.
Sources: runtime-spec, config-linux.md, "Seccomp"; moby's profiles/seccomp; runc's libcontainer/seccomp.
"""

from __future__ import annotations

import errno
import os

from ringfence._value import Value
from ringfence.errors import SpecError, Unmet
from ringfence.linux import seccomp
from ringfence.linux import seccomp_bpf as bpf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

__all__ = ["Condition", "Profile", "Rule", "load", "parse"]

MOST_BYTES = 1 << 20
_MOST_RULES, _MOST_NAMES = 4096, 4096
_U64 = 2**64 - 1

_ACTIONS = {
    "SCMP_ACT_KILL": bpf.KILL_THREAD,
    "SCMP_ACT_KILL_THREAD": bpf.KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": bpf.KILL_PROCESS,
    "SCMP_ACT_TRAP": bpf.TRAP,
    "SCMP_ACT_ERRNO": bpf.ERRNO,
    "SCMP_ACT_LOG": bpf.LOG,
    "SCMP_ACT_ALLOW": bpf.ALLOW,
}
_UNKEPT_ACTIONS = {
    "SCMP_ACT_NOTIFY": "nobody here would answer: ringfence's own listener is mode='report' and mode='audit'",
    "SCMP_ACT_TRACE": "there is no tracer that it could ask",
}
# As libseccomp numbers them.
_OPERATORS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
# Flags of seccomp(2). TSYNC is about other threads, and there are none.
_FLAGS = {"SECCOMP_FILTER_FLAG_TSYNC": 0, "SECCOMP_FILTER_FLAG_LOG": 2, "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4}
# The names of runtime-spec, as pyseccomp's Arch has them; and Docker's names of the machine in `arches`.
_ARCHITECTURES = frozenset(
    [
        "X86",
        "X86_64",
        "X32",
        "ARM",
        "AARCH64",
        "LOONGARCH64",
        "M68K",
        "MIPS",
        "MIPS64",
        "MIPS64N32",
        "MIPSEL",
        "MIPSEL64",
        "MIPSEL64N32",
        "PPC",
        "PPC64",
        "PPC64LE",
        "S390",
        "S390X",
        "PARISC",
        "PARISC64",
        "RISCV64",
        "SH",
        "SHEB",
    ]
)
_MACHINES = {"x86_64": ("amd64", "X86_64"), "aarch64": ("arm64", "AARCH64"), "riscv64": ("riscv64", "RISCV64")}

_KEYS = frozenset(
    [
        "defaultAction",
        "defaultErrnoRet",
        "defaultErrno",
        "architectures",
        "archMap",
        "flags",
        "syscalls",
        "listenerPath",
        "listenerMetadata",
    ]
)
_RULE_KEYS = frozenset(["names", "name", "action", "errnoRet", "errno", "args", "comment", "includes", "excludes"])
_ARGUMENT_KEYS = frozenset(["index", "value", "valueTwo", "op"])
_WHEN_KEYS = frozenset(["caps", "arches", "minKernel"])


class Condition(Value):
    """index: of the argument. operator: as libseccomp numbers them. value, second: mask and value of MASKED_EQ."""

    __slots__ = ("index", "operator", "second", "value")
    index: int
    operator: int
    value: int
    second: int

    def __init__(self, *, index: int, operator: int, value: int, second: int = 0) -> None:
        self._set(index=index, operator=operator, value=value, second=second)

    def holds(self, given: int) -> bool:
        value = self.value
        if self.operator == 7:
            return given & value == self.second
        return (given != value, given < value, given <= value, given == value, given >= value, given > value)[
            self.operator - 1
        ]

    def boundaries(self) -> set[int]:
        """Values at which what holds may change."""
        found = {
            0,
            1,
            _U64,
            self.value,
            self.value - 1,
            self.value + 1,
            self.second,
            self.second ^ (self.value & -self.value),
        }
        found |= {self.value ^ 1 << 32, self.second | ~self.value & _U64, self.second ^ 1 << 63}
        return {one & _U64 for one in found}


class Rule(Value):
    """A call's answer (action and errno) where all conditions hold."""

    __slots__ = ("answer", "conditions", "name")
    name: str
    answer: int
    conditions: tuple[Condition, ...]

    def __init__(self, *, name: str, answer: int, conditions: tuple[Condition, ...] = ()) -> None:
        self._set(name=name, answer=answer, conditions=conditions)


class Profile(Value):
    """A profile as it applies here: Docker's conditions are decided.

    default: the answer where no rule holds. architectures: others than this machine's, as pyseccomp's Arch names them.
    flags: of seccomp(2). digest: SHA-256 in hex over the profile's JSON as it was read.
    """

    __slots__ = ("architectures", "default", "digest", "flags", "rules")
    default: int
    rules: tuple[Rule, ...]
    architectures: tuple[str, ...]
    flags: int
    digest: str

    def __init__(
        self, *, default: int, rules: tuple[Rule, ...], architectures: tuple[str, ...], flags: int, digest: str
    ) -> None:
        self._set(default=default, rules=rules, architectures=architectures, flags=flags, digest=digest)

    def may(self, name: str) -> bool:
        """Whether some call of that name is let through."""
        answers = {one.answer for one in self.rules if one.name == name}
        whole = {one.answer for one in self.rules if one.name == name and not one.conditions}
        return bool({bpf.ALLOW, bpf.LOG} & (answers if whole else answers | {self.default}))


# ---- reading ----


def load(profile: str | bytes) -> bytes:
    """The JSON of `Seccomp.profile`: the text itself, or the file's. Raises SpecError."""
    if isinstance(profile, str):
        data = profile.encode("utf-8", "surrogatepass")
    else:
        shown = os.fsdecode(profile)
        try:
            with open(profile, "rb") as file:
                data = file.read(MOST_BYTES + 1)
        except OSError as error:
            raise SpecError(f"seccomp: the profile {shown!r} can't be read: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise SpecError(f"seccomp: a profile has at most {MOST_BYTES} bytes")
    return data


def parse(data: bytes, *, capabilities: Sequence[str] = (), kernel: str = "", machine: str = "") -> Profile:
    """The profile that JSON says, for a workload with these capabilities, on that kernel (its release) and machine.

    Raises SpecError for what makes no sense, Unmet for what can't be kept here.
    """
    import json

    try:
        whole = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"seccomp: the profile is no JSON: {error}") from None
    about = _object(whole, _KEYS, "the profile")
    machine = machine or os.uname().machine
    goarch, native = _MACHINES.get(machine, (machine, machine.upper()))
    for key in ("listenerPath", "listenerMetadata"):
        if about.get(key):
            raise Unmet("seccomp", key, "nobody would connect a listener to it", "use mode='report' or mode='audit'")
    if "defaultAction" not in about:
        raise SpecError("seccomp: the profile has no defaultAction")
    default = _answer(about, "defaultAction", "defaultErrnoRet", "defaultErrno", "the default")
    rules = []
    for number, one in enumerate(_list(about, "syscalls", "the profile")):
        where = f"syscalls[{number}]"
        rule = _object(one, _RULE_KEYS, where)
        found = _rules(rule, where)  # judged even where it doesn't apply here
        if _applies(rule, where, set(capabilities), goarch, kernel or os.uname().release):
            rules += found
    if len(rules) > _MOST_RULES:
        raise SpecError(f"seccomp: a profile has at most {_MOST_RULES} rules, this one has {len(rules)}")
    return Profile(
        default=default,
        rules=tuple(rules),
        architectures=_architectures(about, native),
        flags=_flags(about),
        digest=seccomp.sha256(data).hex(),
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice in one object")
    return found


def _object(value: Any, keys: frozenset[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SpecError(f"seccomp: {where} must be an object")
    unknown = sorted(set(value) - keys)
    if unknown:
        raise SpecError(f"seccomp: {where} has {unknown[0]!r}, which is not known; it would be left out")
    return value


def _list(about: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = about.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise SpecError(f"seccomp: {key} of {where} must be a list")
    return value


def _strings(about: Mapping[str, Any], key: str, where: str) -> list[str]:
    found = _list(about, key, where)
    if not all(isinstance(one, str) and one for one in found):
        raise SpecError(f"seccomp: {key} of {where} must be a list of strings")
    return found


def _integer(value: Any, what: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise SpecError(f"seccomp: {what} must be a number from 0 to {most}, not {value!r:.40}")
    return value


def _answer(about: Mapping[str, Any], key: str, number_key: str, name_key: str, where: str) -> int:
    """An action with its errno, as the kernel has it."""
    name = about.get(key)
    if name in _UNKEPT_ACTIONS:
        raise Unmet("seccomp", name, _UNKEPT_ACTIONS[name], "use SCMP_ACT_ERRNO")
    if not isinstance(name, str) or name not in _ACTIONS:
        raise SpecError(f"seccomp: {where} has the action {name!r:.60}, which is none")
    found = _ACTIONS[name]
    number, by_name = about.get(number_key), about.get(name_key)
    if number is None and by_name is None:
        return found | errno.EPERM if found == bpf.ERRNO else found
    if found != bpf.ERRNO and number is not None:
        raise SpecError(f"seccomp: {where} has an errno, and {name} takes none")
    if found != bpf.ERRNO:
        return found  # podman's profiles name one with every action
    if by_name is not None:
        named = (
            getattr(errno, by_name, None) if isinstance(by_name, str) and by_name in errno.errorcode.values() else None
        )
        if named is None or number not in (None, named):
            raise SpecError(
                f"seccomp: {where} has the errno {by_name!r:.40}, which is none, or not that of {number_key}"
            )
        number = named
    # libseccomp takes no larger one.
    return found | _integer(number, f"{number_key} of {where}", 4094)


def _rules(rule: Mapping[str, Any], where: str) -> list[Rule]:
    answer = _answer(rule, "action", "errnoRet", "errno", where)
    names = _strings(rule, "names", where)
    if rule.get("name") is not None:
        if names or not isinstance(rule["name"], str) or not rule["name"]:
            raise SpecError(f"seccomp: {where} must have either 'names' or 'name'")
        names = [rule["name"]]
    if not names or len(names) > _MOST_NAMES:
        raise SpecError(f"seccomp: {where} must name between 1 and {_MOST_NAMES} calls")
    conditions = [_condition(one, f"args of {where}") for one in _list(rule, "args", where)]
    if len(conditions) > 6:
        raise SpecError(f"seccomp: {where} has more than 6 conditions")
    indexes = [one.index for one in conditions]
    # Two conditions on one argument are two rules, as runc has it: one filter rule can't say that.
    each = [(one,) for one in conditions] if len(set(indexes)) < len(indexes) else [tuple(conditions)]
    return [Rule(name=name, answer=answer, conditions=some) for name in names for some in each]


def _condition(one: Any, where: str) -> Condition:
    about = _object(one, _ARGUMENT_KEYS, where)
    operator = about.get("op")
    if not isinstance(operator, str) or operator not in _OPERATORS:
        raise SpecError(f"seccomp: {where} has the operator {operator!r:.60}, which is none")
    if "index" not in about or "value" not in about:
        raise SpecError(f"seccomp: {where} must have an index and a value")
    return Condition(
        index=_integer(about["index"], f"index in {where}", 5),
        operator=_OPERATORS[operator],
        value=_integer(about["value"], f"value in {where}", _U64),
        second=_integer(about.get("valueTwo") or 0, f"valueTwo in {where}", _U64),
    )


def _applies(rule: Mapping[str, Any], where: str, held: set[str], goarch: str, kernel: str) -> bool:
    """Docker's `includes` and `excludes`: all that is included must be so, and nothing that is excluded."""
    for key, wanted in (("excludes", False), ("includes", True)):
        when = _object(rule.get(key) or {}, _WHEN_KEYS, f"{key} of {where}")
        arches, caps = (_strings(when, name, f"{key} of {where}") for name in ("arches", "caps"))
        least = when.get("minKernel")
        newer = least is not None and _release(kernel) >= _release(least, f"minKernel of {where}")
        if wanted:
            if (arches and goarch not in arches) or not held.issuperset(caps) or (least is not None and not newer):
                return False
        elif goarch in arches or held.intersection(caps) or newer:
            return False
    return True


def _release(text: Any, where: str = "") -> tuple[int, int]:
    numbers = text.split("-")[0].split(".")[:2] if isinstance(text, str) else []
    if len(numbers) == 2 and all(one.isdecimal() and len(one) < 6 for one in numbers):
        return int(numbers[0]), int(numbers[1])
    if where:
        raise SpecError(f"seccomp: {where} must be like '4.8', not {text!r:.40}")
    return 0, 0


def _architectures(about: Mapping[str, Any], native: str) -> tuple[str, ...]:
    """Those besides this machine's own, which is always among them, as in libseccomp."""
    listed = _strings(about, "architectures", "the profile")
    mapped = _list(about, "archMap", "the profile")
    if listed and mapped:
        raise SpecError("seccomp: the profile has both 'architectures' and 'archMap'")
    for one in mapped:
        entry = _object(one, frozenset(("architecture", "subArchitectures")), "archMap")
        below = _strings(entry, "subArchitectures", "archMap")
        if entry.get("architecture") == f"SCMP_ARCH_{native}":
            listed = below
        for name in (entry.get("architecture"), *below):
            _architecture(name)
    return tuple(sorted({_architecture(one) for one in listed} - {native, "NATIVE"}))


def _architecture(name: Any) -> str:
    short = name.removeprefix("SCMP_ARCH_") if isinstance(name, str) and name.startswith("SCMP_ARCH_") else ""
    if short not in _ARCHITECTURES and short != "NATIVE":
        raise SpecError(f"seccomp: {name!r:.60} is no architecture")
    return short


def _flags(about: Mapping[str, Any]) -> int:
    found = 0
    for name in _strings(about, "flags", "the profile"):
        if name == "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV":
            raise Unmet("seccomp", name, "it is about a listener, and the profile has none", "leave it out")
        if name not in _FLAGS:
            raise SpecError(f"seccomp: {name!r:.60} is no flag")
        found |= _FLAGS[name]
    return found
