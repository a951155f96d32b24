"""Answers for what a filter with a listener denies, and a list of it (seccomp_unotify(2)).

Python answers, in the loop that drives the command. While it doesn't, what was denied waits; when it is gone, the
listener is closed with it and the kernel answers ENOSYS. Nothing depends on the arguments of a denied call but the
list: what is denied stays denied whatever another thread does to memory meanwhile. Only `audit` lets a call through,
and is no boundary.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct

from ringfence.linux import seccomp_bpf as bpf
from ringfence.result import Denial

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Listener", "listed"]

# include/uapi/linux/seccomp.h: struct seccomp_notif is u64 id, u32 pid, u32 flags, struct seccomp_data;
# struct seccomp_notif_resp is u64 id, s64 val, s32 error, u32 flags.
_HEAD, _RESPONSE, _CALL = struct.Struct("=QII"), struct.Struct("=QqiI"), struct.Struct("=IIQ6Q")
_REQUEST_BYTES = _HEAD.size + bpf.DATA_BYTES
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1

# So many are answered before the loop looks at its clock and its other descriptors again.
_MOST_AT_ONCE = 64
# Numbers can be made up: those beyond are counted together.
_MOST_LISTED = 512


class Listener:
    """One sandbox's. answers: the filter as it was before the listener came in, which says what to answer.

    audit: let what is denied through.
    """

    def __init__(self, answers: bytes, *, audit: bool) -> None:
        self._answers = answers
        self._audit = audit
        self._found: dict[tuple[int, int, int | None], tuple[list[int], tuple[int, ...]]] = {}
        self._others = 0

    def watch(self, fd: int, gone: Callable[[], object]) -> Callable[[], None]:
        """What to call when the listener can be read. gone: called once nobody has the filter any more."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)

        def take() -> None:
            for _ in range(_MOST_AT_ONCE):
                ready = poll.poll(0)
                if not ready:
                    return
                if ready[0][1] & select.POLLIN:
                    self._take(fd)
                else:
                    gone()  # POLLHUP, from Linux 5.9 on
                    return

        return take

    def _take(self, fd: int) -> None:
        request = bytearray(_REQUEST_BYTES)  # the kernel wants it to be zero
        try:
            fcntl.ioctl(fd, _RECEIVE, request)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return  # the caller was killed meanwhile
            raise
        id, _, _ = _HEAD.unpack_from(request)
        number, arch, _, *arguments = _CALL.unpack_from(request, _HEAD.size)
        answered = bpf.answer_data(self._answers, memoryview(request)[_HEAD.size :])
        denied = answered & 0xFFFF if bpf.action(answered) == bpf.ERRNO else errno.EPERM
        response = _RESPONSE.pack(id, 0, *((0, _CONTINUE) if self._audit else (-denied, 0)))
        self._note(arch, number, None if self._audit else denied, tuple(arguments))
        try:
            fcntl.ioctl(fd, _SEND, response)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINPROGRESS):
                raise

    def _note(self, arch: int, number: int, denied: int | None, arguments: tuple[int, ...]) -> None:
        key = (arch, number, denied)
        known = self._found.get(key)
        if known is not None:
            known[0][0] += 1
        elif len(self._found) < _MOST_LISTED:
            self._found[key] = ([1], arguments)
        else:
            self._others += 1

    def take(self) -> tuple[Denial, ...]:
        """What was denied since the last call, the most frequent first."""
        noted, others = self._found, self._others
        self._found, self._others = {}, 0
        return listed(((*key, count[0], arguments) for key, (count, arguments) in noted.items()), others)


def listed(noted: Iterable[tuple[int, int, int | None, int, tuple[int, ...]]], others: int) -> tuple[Denial, ...]:
    """As values: (architecture, number, errno or None, count, the first arguments), and how many more there were."""
    found = [
        Denial(
            call=_name(arch, number),
            count=count,
            errno=None if denied is None else errno.errorcode.get(denied, str(denied)),
            arguments=arguments,
        )
        for arch, number, denied, count, arguments in noted
    ]
    found.sort(key=lambda one: (-one.count, one.call))
    if others:
        found.append(Denial(call="others", count=others, errno=None))
    return tuple(found)


def _name(arch: int, number: int) -> str:
    """By libseccomp, which is only loaded where something was denied; else by our own table."""
    from ringfence.linux import seccomp
    from ringfence.linux._syscall_lists import NEWER

    try:
        found: bytes = seccomp.library().resolve_syscall(arch, number)
        return os.fsdecode(found)
    except Exception:  # it isn't there, or doesn't know the number
        newer = {value: name for name, value in NEWER.items()}
        return newer.get(number, f"syscall_{number}")
