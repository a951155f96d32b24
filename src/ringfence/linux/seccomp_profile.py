"""Seccomp profiles in JSON: the OCI runtimes' `linux.seccomp`, and Docker's, which has conditions besides.

Read strictly: what isn't known, or can't be kept here, is refused and never left out. Compiled by libseccomp, with the
rules of runc where the formats leave something open; the program is then tried against the profile at the boundaries
of every condition.
Sources: runtime-spec, config-linux.md, "Seccomp"; moby's profiles/seccomp; runc's libcontainer/seccomp.
"""

from __future__ import annotations

import errno
import os

from ringfence._value import Value
from ringfence.errors import SpecError, Unmet
from ringfence.linux import seccomp
from ringfence.linux import seccomp_bpf as bpf
from ringfence.linux._syscall_lists import NEWER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

__all__ = ["Condition", "Profile", "Rule", "cached", "compile", "load", "parse"]

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


# ---- compiling ----


def cached(profile: Profile) -> bytes:
    """The profile's program: from memory, from the cache folder, or compiled. Raises Unmet, SpecError."""
    text = f"profile {(profile.default, profile.architectures, profile.flags)} " + repr(
        [(one.name, one.answer, [repr(each) for each in one.conditions]) for one in profile.rules]
    )
    return seccomp.kept(text, lambda: compile(profile))


def compile(profile: Profile) -> bytes:
    """The profile's program, tried against the profile.

    Of this machine's own calls those without conditions are libseccomp's, and conditions a few instructions of our own:
    libseccomp 2.5.4 merges several conditions on one argument of 64 bits wrongly ("less than 2**32, or at least 40" is
    not met by 2**32). Other architectures' calls are all libseccomp's.
    """
    library = seccomp.library()
    native: int = library.system_arch()
    filter = _filter(library, profile.default)
    rules: dict[int, list[Rule]] = {}
    for rule in profile.rules:
        number = _number(library, native, rule.name)
        if number == -1:
            _check_unknown(rule, profile.default)
        elif number >= 0:
            rules.setdefault(number, []).append(rule)
    checks = {}
    for number, about in rules.items():
        about = [one for one in about if one.answer != profile.default]
        _check_contradictions(about)
        if any(not one.conditions for one in about):
            _add(filter, library, about[0].replace(conditions=()), number)
        elif about:
            checks[number] = _block(about, profile.default)
    last = max(rules, default=0)
    program = _newer_calls(seccomp.exported(filter), {native: last}, profile.default, library)
    program = seccomp.condensed(program, checks, native)
    if profile.architectures:
        program = _beside(program, _foreign(library, native, profile), native)
    _try(bpf.bounded(program), profile, rules, native, last)
    return program


def _filter(library: Any, default: int) -> Any:
    filter = library.SyscallFilter(default)
    filter.set_attr(library.Attr.ACT_BADARCH, library.KILL_PROCESS)
    return filter


def _number(library: Any, arch: int, name: str) -> int:
    """-1 for what nobody knows, less for another architecture's."""
    found: int = library.resolve_syscall(arch, name)
    return NEWER.get(name, -1) if found == -1 else found


def _block(rules: Sequence[Rule], default: int) -> bytes:
    """Instructions that answer for one call: each rule in turn, then the default."""
    return b"".join(map(_rule_code, rules)) + bpf.instruction(bpf.RETURN, default)


def _rule_code(rule: Rule) -> bytes:
    """Returns the rule's answer where all conditions hold; goes on behind itself where one doesn't."""
    code = [bpf.instruction(bpf.RETURN, rule.answer)]
    # Backwards, as a condition that fails jumps over all that follows.
    for one in reversed(rule.conditions):
        code = _condition_code(one, len(code)) + code
    return b"".join(code)


def _condition_code(one: Condition, rest: int) -> list[bytes]:
    """Falls through where the condition holds; else jumps over `rest` more instructions."""
    high, low = one.value >> 32, one.value & 0xFFFFFFFF
    load_high, load_low = bpf.load_argument(one.index, high=True), bpf.load_argument(one.index)

    def jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
        return bpf.instruction(code, value, if_true, if_false)

    if one.operator == 7:
        masked = [(load_high, high, one.second >> 32, 3 + rest), (load_low, low, one.second & 0xFFFFFFFF, rest)]
        return [
            each
            for load, mask, value, fail in masked
            for each in (load, bpf.instruction(bpf.AND, mask), jump(bpf.JUMP_EQUAL, value, 0, fail))
        ]
    if one.operator == 4:
        first = jump(bpf.JUMP_EQUAL, high, 0, 2 + rest)
        return [load_high, first, load_low, jump(bpf.JUMP_EQUAL, low, 0, rest)]
    if one.operator == 1:
        return [load_high, jump(bpf.JUMP_EQUAL, high, 0, 2), load_low, jump(bpf.JUMP_EQUAL, low, rest, 0)]
    above = bpf.JUMP_AT_LEAST if one.operator in (2, 5) else bpf.JUMP_ABOVE
    if one.operator in (5, 6):
        first, second = jump(bpf.JUMP_ABOVE, high, 3, 0), jump(bpf.JUMP_EQUAL, high, 0, 2 + rest)
        return [load_high, first, second, load_low, jump(above, low, 0, rest)]
    first, second = jump(bpf.JUMP_ABOVE, high, 3 + rest, 0), jump(bpf.JUMP_EQUAL, high, 0, 2)
    return [load_high, first, second, load_low, jump(above, low, rest, 0)]


def _beside(program: bytes, foreign: bytes, native: int) -> bytes:
    """The program for this machine's own calls, another one for all others, x32's among them."""
    size = len(program) // bpf.INSTRUCTION.size
    head = [bpf.instruction(bpf.LOAD, bpf.ARCH_AT), bpf.instruction(bpf.JUMP_EQUAL, native, 1, 0)]
    head += [bpf.instruction(bpf.JUMP, size + 3), bpf.instruction(bpf.LOAD, bpf.NUMBER_AT)]
    head += [bpf.instruction(bpf.JUMP_AT_LEAST, bpf.X32_BIT, 0, 1), bpf.instruction(bpf.JUMP, size)]
    return b"".join(head) + program + foreign


def _foreign(library: Any, native: int, profile: Profile) -> bytes:
    """The program for the profile's other architectures."""
    filter = _filter(library, profile.default)
    architectures = {native: 0}
    for name in profile.architectures:
        token = getattr(library.Arch, name, None)
        try:
            if token is None:
                raise OSError(errno.EINVAL, "this libseccomp doesn't know it")
            filter.add_arch(token)
            architectures[token] = 0
        except OSError as error:
            reason = f"libseccomp can't filter for it here: {error.strerror}"
            raise Unmet("seccomp", name, reason, "leave it out") from None
    # libseccomp up to 2.5.4 makes a wrong tree of no rules at all, so few are searched in line, as runc does.
    if len(profile.rules) > 32:
        filter.set_attr(library.Attr.CTL_OPTIMIZE, 2)
    unknown: dict[int, int] = {}  # numbers that libseccomp doesn't know, and their answers
    for rule in profile.rules:
        number: int = library.resolve_syscall(native, rule.name)
        for token in architectures:
            architectures[token] = max(architectures[token], _number(library, token, rule.name))
        if number == -1 and rule.name in NEWER:
            # It can't say which call of another architecture that is. The numbers are the same everywhere.
            _note_unknown(unknown, NEWER[rule.name], rule)
        elif number != -1 and rule.answer != profile.default:
            _add(filter, library, rule, number)
    program = _with_unknown(seccomp.exported(filter), unknown, architectures, library)
    return _newer_calls(program, architectures, profile.default, library)


def _note_unknown(unknown: dict[int, int], number: int, rule: Rule) -> None:
    if rule.conditions or unknown.get(number, rule.answer) != rule.answer:
        raise Unmet(
            "seccomp",
            rule.name,
            "libseccomp is too old to compile its conditions for several architectures",
            "leave 'architectures' and 'archMap' out, or install a newer libseccomp",
        )
    unknown[number] = rule.answer


def _with_unknown(program: bytes, unknown: Mapping[int, int], architectures: Mapping[int, int], library: Any) -> bytes:
    """The program behind the answers for calls that libseccomp doesn't know, on each of the architectures."""
    if not unknown:
        return program
    answers = []
    for number, answer in sorted(unknown.items()):
        answers.append(bpf.instruction(bpf.JUMP_EQUAL, number, 0, 1))
        answers.append(bpf.instruction(bpf.RETURN, answer))
    code = []
    for token in architectures:
        if token == library.Arch.X32:
            continue  # x86-64's, with a bit more
        block = [bpf.instruction(bpf.LOAD, bpf.NUMBER_AT)]
        if token == library.Arch.X86_64 and library.Arch.X32 in architectures:
            block.append(bpf.instruction(bpf.AND, ~bpf.X32_BIT & 0xFFFFFFFF))
        block += answers
        code += [bpf.instruction(bpf.LOAD, bpf.ARCH_AT), bpf.instruction(bpf.JUMP_EQUAL, token, 1, 0)]
        code += [bpf.instruction(bpf.JUMP, len(block)), *block]
    return b"".join(code) + program


def _add(filter: Any, library: Any, rule: Rule, number: int) -> None:
    conditions = [library.Arg(one.index, one.operator, one.value, one.second) for one in rule.conditions]
    try:
        filter.add_rule(rule.answer, number, *conditions)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise SpecError(f"seccomp: rules for {rule.name} contradict each other") from None
        if number >= 0:
            raise SpecError(f"seccomp: libseccomp can't compile a rule for {rule.name}: {error.strerror}") from None
        # Another architecture's call: there is none here that it could be about.


def _check_unknown(rule: Rule, default: int) -> None:
    """A call that nobody knows gets the default, which is well where that denies."""
    if default in (bpf.ALLOW, bpf.LOG) and rule.answer not in (bpf.ALLOW, bpf.LOG):
        raise Unmet(
            "seccomp",
            rule.name,
            "neither libseccomp nor ringfence knows its number, so it couldn't be denied",
            "correct the name, or install a newer libseccomp",
        )


def _check_contradictions(rules: Sequence[Rule]) -> None:
    """libseccomp drops a condition where another rule of the call has none, whatever they say."""
    whole = {one.answer for one in rules if not one.conditions}
    if whole and whole != {one.answer for one in rules}:
        raise SpecError(f"seccomp: rules for {rules[0].name} contradict each other: one has no args, and takes all")


def _newer_calls(program: bytes, architectures: Mapping[int, int], default: int, library: Any) -> bytes:
    """ENOSYS for calls that are newer than all that the profile names, as runc has it: so that libraries fall back."""
    if default in (bpf.ALLOW, bpf.LOG, bpf.ERRNO | errno.ENOSYS):
        return program
    code = []
    for token, last in architectures.items():
        if not last or token == library.Arch.X32:
            continue
        wide = token == library.Arch.X86_64
        code.append(bpf.instruction(bpf.LOAD, bpf.ARCH_AT))
        code.append(bpf.instruction(bpf.JUMP_EQUAL, token, 0, 4 if wide else 3))
        code.append(bpf.instruction(bpf.LOAD, bpf.NUMBER_AT))
        if wide:
            code.append(bpf.instruction(bpf.JUMP_AT_LEAST, bpf.X32_BIT, 2, 0))
        code.append(bpf.instruction(bpf.JUMP_ABOVE, last, 0, 1))
        code.append(bpf.instruction(bpf.RETURN, bpf.ERRNO | errno.ENOSYS))
    return b"".join(code) + program


def expected(profile: Profile, rules: Sequence[Rule], arguments: Sequence[int]) -> int:
    """What the profile says of a call with these rules. Raises SpecError where two that hold say different things."""
    found = {one.answer for one in rules if all(each.holds(arguments[each.index]) for each in one.conditions)}
    if len(found - {profile.default}) > 1:
        raise SpecError(f"seccomp: rules for {rules[0].name} contradict each other")
    return (found - {profile.default} or {profile.default}).pop()


def _try(program: bytes, profile: Profile, rules: Mapping[int, Sequence[Rule]], native: int, last: int) -> None:
    """Tries the program at the boundaries of every condition, and at every number."""
    newer = bpf.ERRNO | errno.ENOSYS if profile.default not in (bpf.ALLOW, bpf.LOG) else profile.default
    for number in range(1024):
        of_this = rules.get(number, ())
        for arguments in _points(of_this) if of_this else ((0,) * 6,):
            if of_this:
                wanted = expected(profile, of_this, arguments)
            else:
                wanted = newer if last and number > last else profile.default
            if bpf.answer(program, native, number, arguments) != wanted:
                name = of_this[0].name if of_this else f"number {number}"
                raise Unmet(
                    "seccomp",
                    name,
                    f"its program answers otherwise for {name} with {arguments}",
                    "write its rules in another way",
                )


def _points(rules: Sequence[Rule]) -> Iterator[tuple[int, ...]]:
    """Arguments at the boundaries of the conditions: each alone, then in some combinations."""
    values: list[list[int]] = [[0] for _ in range(6)]
    for index in range(6):
        found = {one for rule in rules for each in rule.conditions if each.index == index for one in each.boundaries()}
        values[index] = sorted(found | {0})
    total = 1
    for one in values:
        total *= len(one)
    # All of them where they are few; else every so many, by a step that meets all values of each argument.
    step = max(1, total // 4096) | 1
    for at in range(0, total, step):
        point, rest = [], at
        for one in values:
            rest, digit = divmod(rest, len(one))
            point.append(one[digit])
        yield tuple(point)
