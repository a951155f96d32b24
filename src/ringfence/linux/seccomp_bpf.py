"""Seccomp programs as bytes: what one answers, and others made of it.

A program is an array of struct sock_filter. Sources: seccomp(2), include/uapi/linux/{seccomp,filter,bpf_common}.h,
Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import errno
import struct
import sys

from ringfence.errors import RingfenceError
from ringfence.linux.seccomp import MOST_INSTRUCTIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "ALLOW",
    "DATA_BYTES",
    "ERRNO",
    "INSTRUCTION",
    "KILL_PROCESS",
    "KILL_THREAD",
    "LOG",
    "MOST_INSTRUCTIONS",
    "TRAP",
    "USER_NOTIF",
    "action",
    "answer",
    "auditing",
    "guarded",
    "instruction",
    "load_argument",
    "reporting",
]

KILL_PROCESS, KILL_THREAD, TRAP, ERRNO = 0x80000000, 0x00000000, 0x00030000, 0x00050000
USER_NOTIF, LOG, ALLOW = 0x7FC00000, 0x7FFC0000, 0x7FFF0000
_ACTION_MASK = 0xFFFF0000

LOAD, AND, RETURN = 0x20, 0x54, 0x06
JUMP, JUMP_EQUAL, JUMP_ABOVE, JUMP_AT_LEAST, JUMP_ANY_BIT = 0x05, 0x15, 0x25, 0x35, 0x45
INSTRUCTION = struct.Struct("=HBBI")
# struct seccomp_data: int nr, u32 arch, u64 instruction_pointer, u64 args[6].
_DATA = struct.Struct("=IIQ6Q")
_WORD = struct.Struct("=I")
DATA_BYTES = _DATA.size
NUMBER_AT, ARCH_AT, ARGUMENTS_AT = 0, 4, 16
# Where x32's numbers begin on x86-64.
X32_BIT = 0x40000000

_SET_MODE_FILTER, _NEW_LISTENER = 1, 8


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return INSTRUCTION.pack(code, if_true, if_false, value)


def load_argument(index: int, *, high: bool = False) -> bytes:
    """Load the low 32 bits of an argument, or the high ones."""
    last = high == (sys.byteorder == "little")
    return instruction(LOAD, ARGUMENTS_AT + 8 * index + 4 * last)


def action(answered: int) -> int:
    """What an answer does, without its data (the errno)."""
    return answered & _ACTION_MASK


def answer(program: bytes, arch: int, number: int, arguments: Sequence[int] = ()) -> int:
    """What the kernel would answer to a call. Raises RingfenceError for an instruction that filters don't have."""
    given = (*arguments, *(0,) * (6 - len(arguments)))
    return answer_data(program, _DATA.pack(number & 0xFFFFFFFF, arch, 0, *given))


def answer_data(program: bytes, data: bytes | memoryview) -> int:
    """The same of a struct seccomp_data."""
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = INSTRUCTION.unpack_from(program, at * INSTRUCTION.size)
        at += 1
        if code == LOAD:
            (accumulator,) = _WORD.unpack_from(data, value)
        elif code == JUMP_EQUAL:
            at += if_true if accumulator == value else if_false
        elif code == JUMP_AT_LEAST:
            at += if_true if accumulator >= value else if_false
        elif code == JUMP_ABOVE:
            at += if_true if accumulator > value else if_false
        elif code == JUMP_ANY_BIT:
            at += if_true if accumulator & value else if_false
        elif code == RETURN:
            return int(value)
        elif code == JUMP:
            at += value
        elif code == AND:
            accumulator &= value
        else:
            raise RingfenceError(f"the filter has an instruction {code:#x} that was not expected")


def guarded(program: bytes, checks: Mapping[int, bytes], arch: int) -> bytes:
    """The program behind checks of our own: for each number instructions that always return. Calls of another
    architecture, and x32's, kill, as the checks would be passed by by them.
    """
    head = [instruction(LOAD, ARCH_AT), instruction(JUMP_EQUAL, arch, 1, 0), instruction(RETURN, KILL_PROCESS)]
    head.append(instruction(LOAD, NUMBER_AT))
    head += [instruction(JUMP_AT_LEAST, X32_BIT, 0, 1), instruction(RETURN, KILL_PROCESS)]
    for number, check in checks.items():
        # Over a jump that reaches further than 255.
        head += [instruction(JUMP_EQUAL, number, 1, 0), instruction(JUMP, len(check) // INSTRUCTION.size), check]
    return bounded(b"".join(head) + program)


def bounded(program: bytes) -> bytes:
    if len(program) > MOST_INSTRUCTIONS * INSTRUCTION.size:
        raise RingfenceError(f"the filter has {len(program) // 8} instructions, more than the kernel takes")
    return program


def reporting(program: bytes, seccomp_number: int, arch: int) -> bytes:
    """The program with a listener asked where it denied by an errno."""
    return _listened(program, {ERRNO}, seccomp_number, arch)


def auditing(program: bytes, seccomp_number: int, arch: int) -> bytes:
    """The program with a listener asked where it didn't let a call through, also where it killed."""
    return _listened(program, {ERRNO, TRAP, KILL_THREAD, KILL_PROCESS}, seccomp_number, arch)


def _listened(program: bytes, asked: set[int], seccomp_number: int, arch: int) -> bytes:
    ask = instruction(RETURN, USER_NOTIF)
    code = [
        ask if kind == RETURN and action(value) in asked else INSTRUCTION.pack(kind, if_true, if_false, value)
        for kind, if_true, if_false, value in INSTRUCTION.iter_unpack(program)
    ]
    # Of two filters that ask, the newer one's listener is asked, which could let a call through that ours denies. The
    # kernel takes no second listener (EBUSY, as of Linux 6.18); this doesn't depend on that.
    head = [
        instruction(LOAD, ARCH_AT),
        instruction(JUMP_EQUAL, arch, 0, 7),
        instruction(LOAD, NUMBER_AT),
        instruction(JUMP_EQUAL, seccomp_number, 0, 5),
        load_argument(0),
        instruction(JUMP_EQUAL, _SET_MODE_FILTER, 0, 3),
        load_argument(1),
        instruction(JUMP_ANY_BIT, _NEW_LISTENER, 0, 1),
        instruction(RETURN, ERRNO | errno.EBUSY),
    ]
    return bounded(b"".join(head + code))
