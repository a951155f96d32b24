"""Profiles as programs, by libseccomp, and with the rules of runc where the formats leave something open.

The program is tried against the profile at the boundaries of every condition before it is used.
"""

from __future__ import annotations

import errno
import struct

from ringfence.errors import SpecError, Unmet
from ringfence.linux import seccomp, seccomp_program
from ringfence.linux import seccomp_bpf as bpf
from ringfence.linux._syscall_lists import NEWER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from ringfence.linux.seccomp_profile import Condition, Profile, Rule

__all__ = ["cached", "compile"]


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
    program = _newer_calls(seccomp_program.exported(filter), {native: last}, profile.default, library)
    program = _condensed(program, checks, native)
    if profile.architectures:
        program = _beside(program, _foreign(library, native, profile), native)
    _try(bpf.bounded(program), profile, rules, native, last)
    return program


def _condensed(program: bytes, checks: dict[int, bytes], arch: int) -> bytes:
    try:
        return seccomp_program.condensed(program, checks, arch)
    except struct.error:
        # A conditional jump reaches no further than 255 instructions.
        reason = f"its search is too large for a filter: {len(checks)} calls have conditions"
        raise Unmet("seccomp", None, reason, "allow some of them without conditions") from None


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
    program = _with_unknown(seccomp_program.exported(filter), unknown, architectures, library)
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
