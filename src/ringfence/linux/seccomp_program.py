"""A policy's BPF program, for this architecture.

libseccomp compiles the names, through pyseccomp. The calls that are judged by an argument are a few instructions of our
own, because libseccomp can't say "any value but these" of one argument; and both are condensed into one search.
Imported where a program isn't kept yet.
"""

from __future__ import annotations

import errno
import os

from ringfence.linux import _seccomp_host, seccomp
from ringfence.linux import seccomp_bpf as bpf
from ringfence.linux._syscall_lists import NEWER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

__all__ = ["compile", "condensed", "exported", "without_network"]

# Flags of clone(2) that make namespaces: CLONE_NEW{CGROUP,UTS,IPC,USER,PID,NET} and CLONE_NEWNS.
# CLONE_NEWTIME is none of them: for clone its bit is a signal's.
_CLONE_NAMESPACES = 0x7E020000
# Put characters into a terminal's input, as if the user outside had typed them.
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
# Make a terminal's line discipline another one: loads kernel modules that nobody uses (n_gsm, n_hdlc), and has been the
# way to root more than once. And set a file's project, by which a disk quota counts.
_TIOCSETD, _FS_IOC_FSSETXATTR = 0x5423, 0x401C5820
# Plain Linux, 32 bits, either with the version number of 2.6, and the question for the present one.
_PERSONALITIES = (0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
_SOCK_STREAM, _SOCK_SEQPACKET, _SOCK_TYPE_MASK = 1, 5, 0xF
# S_ISUID and S_ISGID; O_CREAT and the bit of O_TMPFILE that makes it one. openat2(2) has its mode in memory, where a
# filter can't look: it is not in the lists, and so absent to a workload.
_SET_IDS, _CREATES = 0o6000, 0o100 | 0o20000000
_MODE_ARGUMENTS = (
    ("chmod", 1),
    ("fchmod", 1),
    ("fchmodat", 2),
    ("fchmodat2", 2),
    ("creat", 1),
    ("mkdir", 1),
    ("mkdirat", 2),
    ("mknod", 1),
    ("mknodat", 2),
)
_OPEN_ARGUMENTS = (("open", 1, 2), ("openat", 2, 3))

# More than any kernel has.
_MOST_NUMBERS = 1024


def compile(wanted: seccomp.Policy) -> bytes:
    """The policy's program for this architecture, made by libseccomp. Raises Unmet where that is missing."""
    pyseccomp = seccomp.library()
    arch: int = pyseccomp.system_arch()

    def number(name: str) -> int:
        found: int = pyseccomp.resolve_syscall(arch, name)
        # Negative: this architecture has no such call, or this libseccomp doesn't know the name.
        return found if found >= 0 else NEWER.get(name, -1)

    filter = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    filter.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    filter.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)  # a binary search; libseccomp 2.5
    for names, action in ((wanted.allowed, pyseccomp.ALLOW), (wanted.denied, pyseccomp.ERRNO(errno.EPERM))):
        for name in names:
            if number(name) >= 0:
                filter.add_rule(action, number(name))
    return bpf.bounded(condensed(exported(filter), _by_argument(wanted, number), arch))


def _by_argument(wanted: seccomp.Policy, number: Callable[[str], int]) -> dict[int, bytes]:
    """The calls that are judged by an argument: what to run for each number. It always returns.

    The kernel takes each of these arguments as 32 bits (clone's flags too), so only those are looked at: with
    all 64, a caller could pass a forbidden value with a bit set above, which the kernel would drop after the
    filter.
    """
    allow, deny = bpf.instruction(bpf.RETURN, bpf.ALLOW), bpf.instruction(bpf.RETURN, bpf.ERRNO | errno.EPERM)
    checks = (
        ("clone", [bpf.load_argument(0), bpf.instruction(bpf.JUMP_ANY_BIT, _CLONE_NAMESPACES, 0, 1), deny, allow]),
        ("ioctl", _one_of(1, (_TIOCSTI, _TIOCLINUX, _TIOCSETD, _FS_IOC_FSSETXATTR), deny, allow)),
        ("personality", _one_of(0, _PERSONALITIES, allow, deny)),
        ("socket", _one_of(0, wanted.families, allow, deny)),
        ("socketpair", _pair(wanted.pair_families, allow, deny)),
        *((name, _no_set_id(mode, allow, deny)) for name, mode in _MODE_ARGUMENTS),
        *((name, _no_set_id(mode, allow, deny, flags)) for name, flags, mode in _OPEN_ARGUMENTS),
    )
    # clone is in the list where it may make namespaces.
    judged = [one for one in checks if one[0] not in wanted.allowed]
    if wanted.only_tcp or wanted.shared_user:
        # The later one of two for the same call counts, and is the stricter one.
        judged += _seccomp_host.only_tcp(wanted.families) if wanted.only_tcp else ()
        judged += _seccomp_host.on_others() if wanted.shared_user else ()
    return {number(name): b"".join(check) for name, check in judged if number(name) >= 0}


def without_network(program: bytes) -> bytes:
    """A program that isn't ours, behind checks that let no socket(2) through, nor what makes sockets without it."""
    pyseccomp = seccomp.library()
    arch: int = pyseccomp.system_arch()
    allow, deny = bpf.instruction(bpf.RETURN, bpf.ALLOW), bpf.instruction(bpf.RETURN, bpf.ERRNO | errno.EPERM)
    checks = {"socket": deny, "io_uring_setup": deny, "socketpair": b"".join(_pair((seccomp.AF_UNIX,), allow, deny))}
    return bpf.guarded(program, {pyseccomp.resolve_syscall(arch, name): one for name, one in checks.items()}, arch)


def condensed(program: bytes, checks: dict[int, bytes], arch: int) -> bytes:
    """libseccomp's program and ours as one, a binary search over ranges of numbers with the same answer.

    libseccomp searches by single numbers: four times as many instructions, and the kernel's work to check, convert and
    compile them is the dearest step of a command's start, some 0.2 ms. What it answers is taken from its own program,
    number by number.
    """
    labels: list[tuple[int, object]] = []
    for number in (*range(_MOST_NUMBERS), bpf.X32_BIT):
        label: object = ("check", number) if number in checks else bpf.answer(program, arch, number)
        if not labels or labels[-1][1] != label:
            labels.append((number, label))
    nodes: list[tuple[int, int, object, object]] = []  # own (first, last) range, and where to go: right, left

    def search(first: int, last: int) -> object:
        """The label of the search over labels[first:last]."""
        if last - first == 1:
            return labels[first][1]
        middle = (first + last) // 2
        at = len(nodes)
        nodes.append((labels[middle][0], at, None, None))
        left, right = search(first, middle), search(middle, last)
        nodes[at] = (labels[middle][0], at, right, left)
        return ("node", at)

    search(0, len(labels))
    answers = sorted({label for _, label in labels if isinstance(label, int)})
    # Where each label is, counted from the first node. Checks are reached by a jump that may go further than 255.
    place: dict[object, int] = {("node", at): at for _, at, _, _ in nodes}
    place.update({answer: len(nodes) + index for index, answer in enumerate(answers)})
    wanted = [label for _, label in labels if not isinstance(label, int)]
    place.update({label: len(nodes) + len(answers) + index for index, label in enumerate(wanted)})
    code = [bpf.instruction(bpf.LOAD, bpf.ARCH_AT), bpf.instruction(bpf.JUMP_EQUAL, arch, 1, 0)]
    code += [bpf.instruction(bpf.RETURN, bpf.KILL_PROCESS), bpf.instruction(bpf.LOAD, bpf.NUMBER_AT)]
    for start, at, right, left in nodes:
        code.append(bpf.instruction(bpf.JUMP_AT_LEAST, start, place[right] - at - 1, place[left] - at - 1))
    code += [bpf.instruction(bpf.RETURN, answer) for answer in answers]
    after = 0
    blocks = []
    for index, label in enumerate(wanted):
        assert isinstance(label, tuple)
        block = checks[label[1]]
        code.append(bpf.instruction(bpf.JUMP, len(wanted) - index - 1 + after))
        blocks.append(block)
        after += len(block) // bpf.INSTRUCTION.size
    return b"".join(code + blocks)


def _one_of(argument: int, values: Sequence[int], then: bytes, otherwise: bytes) -> list[bytes]:
    """Return `then` where the argument is one of the values."""
    jumps = [bpf.instruction(bpf.JUMP_EQUAL, value, len(values) - index, 0) for index, value in enumerate(values)]
    return [bpf.load_argument(argument), *jumps, otherwise, then]


def _pair(families: Sequence[int], allow: bytes, deny: bytes) -> list[bytes]:
    """socketpair(2), but none of datagrams: half of such a pair can still be sent from, or connected, to any path."""
    jumps = [bpf.instruction(bpf.JUMP_EQUAL, one, len(families) - index, 0) for index, one in enumerate(families)]
    kind = [bpf.load_argument(1), bpf.instruction(bpf.AND, _SOCK_TYPE_MASK)]
    kind += [
        bpf.instruction(bpf.JUMP_EQUAL, _SOCK_STREAM, 2, 0),
        bpf.instruction(bpf.JUMP_EQUAL, _SOCK_SEQPACKET, 1, 0),
    ]
    return [bpf.load_argument(0), *jumps, deny, *kind, deny, allow]


def _no_set_id(mode: int, allow: bytes, deny: bytes, flags: int | None = None) -> list[bytes]:
    """A file is not made set-user-ID or set-group-ID: where it lies on the host, others could run it there.

    mode, flags: which arguments these are; with flags the mode counts only where they create a file.
    """
    check = [bpf.load_argument(mode), bpf.instruction(bpf.JUMP_ANY_BIT, _SET_IDS, 0, 1), deny, allow]
    if flags is None:
        return check
    return [bpf.load_argument(flags), bpf.instruction(bpf.JUMP_ANY_BIT, _CREATES, 0, len(check) - 1), *check]


def exported(filter: Any) -> bytes:
    fd = os.memfd_create("ringfence-seccomp", os.MFD_CLOEXEC)
    with open(fd, "w+b") as file:
        filter.export_bpf(file)
        file.seek(0)
        return file.read()
