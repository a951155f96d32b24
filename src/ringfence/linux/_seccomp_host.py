"""The calls that a filter judges by an argument for a sandbox in the host's own namespaces.

Imported where a filter is compiled. `number` and the blocks are as in `seccomp`: each block is run once the call is
known, and returns.
"""

from __future__ import annotations

import errno
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["on_others", "only_tcp"]

# include/uapi/linux/seccomp.h, filter.h and bpf_common.h.
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _AND, _RETURN, _EQUAL, _ANY_BIT = 0x20, 0x54, 0x06, 0x15, 0x45
_ARGUMENTS_AT = 16  # struct seccomp_data
_SOCK_STREAM, _SOCK_TYPE_MASK = 1, 0xF
_IPPROTO_TCP = 6
_TCP_ULP = 31
_MSG_FASTOPEN = 0x20000000
# What setpriority(2) and ioprio_set(2) call a process and a process group.
_PRIO_PROCESS, _PRIO_PGRP = 0, 1
_IOPRIO_PROCESS, _IOPRIO_PGRP = 1, 2


def _do(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _load(index: int, *, high: bool = False) -> bytes:
    """Load 32 bits of an argument: the low ones, which are all that the kernel takes of an int."""
    return _do(_LOAD, _ARGUMENTS_AT + 8 * index + (4 if high == (sys.byteorder == "little") else 0))


_PASS = _do(_RETURN, _ALLOW)
_DENY = _do(_RETURN, _ERRNO | errno.EPERM)


def only_tcp(families: Sequence[int]) -> tuple[tuple[str, list[bytes]], ...]:
    """Of sockets nothing but TCP's, which Landlock's rules are about.

    They don't reach what speaks TCP by another name: IPPROTO_MPTCP and IPPROTO_SMC (Landlock erratum 1 of ABI 4), the
    SMC that TCP_ULP turns a socket into, and the connection that MSG_FASTOPEN opens without connect(2) (unfixed before
    Linux 7.2). A protocol that isn't there is EPROTONOSUPPORT, so that libraries take TCP instead.
    """
    other_protocol = _do(_RETURN, _ERRNO | errno.EPROTONOSUPPORT)
    protocol = [_load(2), _do(_EQUAL, 0, 2), _do(_EQUAL, _IPPROTO_TCP, 1)]
    protocol += [other_protocol, _PASS]
    kind = [_load(1), _do(_AND, _SOCK_TYPE_MASK), _do(_EQUAL, _SOCK_STREAM, 1), _DENY]
    jumps = [_do(_EQUAL, one, len(families) - at) for at, one in enumerate(families)]
    fast_open = _do(_ANY_BIT, _MSG_FASTOPEN, 0, 1)
    option = [_load(1), _do(_EQUAL, _IPPROTO_TCP, 0, 2)]
    option += [_load(2), _do(_EQUAL, _TCP_ULP, 1, 0), _PASS, _DENY]
    return (
        ("socket", [_load(0), *jumps, _DENY, *kind, *protocol]),
        ("sendto", [_load(3), fast_open, _DENY, _PASS]),
        ("sendmsg", [_load(2), fast_open, _DENY, _PASS]),
        ("sendmmsg", [_load(3), fast_open, _DENY, _PASS]),
        ("setsockopt", option),
    )


def on_others() -> tuple[tuple[str, list[bytes]], ...]:
    """What changes another process of the same user without being a signal: its limits, its priorities, its CPUs.

    Landlock keeps only signals in. 0 is the caller itself; a thread of its own by number is refused along with others,
    as a filter can't tell them apart.
    """
    itself = [_load(0), _do(_EQUAL, 0, 1), _DENY, _PASS]
    # Reading limits is harmless: the pointer to the new ones is null, in both halves.
    pointer = [_load(2), _do(_EQUAL, 0, 0, 2)]
    pointer += [_load(2, high=True), _do(_EQUAL, 0, 1, 0), _DENY, _PASS]
    limits = [_load(0), _do(_EQUAL, 0, 0, 1), _PASS, *pointer]
    return (
        ("prlimit64", limits),
        ("setpriority", _own(_PRIO_PROCESS, _PRIO_PGRP)),
        ("ioprio_set", _own(_IOPRIO_PROCESS, _IOPRIO_PGRP)),
        *((name, itself) for name in ("sched_setaffinity", "sched_setparam", "sched_setscheduler", "sched_setattr")),
    )


def _own(process: int, group: int) -> list[bytes]:
    """Argument 0 is one of these two, and argument 1, whose it is, 0."""
    kind = [_load(0), _do(_EQUAL, process, 2), _do(_EQUAL, group, 1), _DENY]
    return [*kind, _load(1), _do(_EQUAL, 0, 1), _DENY, _PASS]
