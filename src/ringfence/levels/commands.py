"""Whether a command can be started from a set of paths: itself, and the interpreter or loader that it names.

Only to say beforehand what would be a bare EACCES at exec. The kernel judges again.
"""

from __future__ import annotations

import os
import stat
import struct

from ringfence.errors import Unmet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.spec import Spec

__all__ = ["outside"]

_MOST_INTERPRETERS = 4  # as the kernel has it (exec_binprm)
_HEAD_BYTES = 4096
_PT_INTERP = 3


def outside(spec: Spec, paths: tuple[bytes, ...]) -> list[Unmet]:
    """What the command needs to start and isn't beneath any of `paths`: at most one, the first."""
    found, head = _find(spec)
    beneath = [os.path.realpath(path) for path in paths]
    for _ in range(_MOST_INTERPRETERS):
        if found is not None:
            real = os.path.realpath(found)
            if not any(real == one or one == b"/" or real.startswith(one + b"/") for one in beneath):
                shown = os.fsdecode(found) + (f" (which is {os.fsdecode(real)})" if real != found else "")
                help = f"add {os.fsdecode(os.path.dirname(real))!r}, or /usr: a program needs its libraries too"
                return [Unmet("readable", None, f"the command needs {shown}", help)]
            head = _head(real)
        found = _interpreter(head)
        if found is None:
            break
    return []


def _find(spec: Spec) -> tuple[bytes | None, bytes]:
    """The command's path on the host, or None and the content where it is one of the spec's own files."""
    name = spec.argv[0]
    if not name.startswith(b"/") and b"/" in name:
        here = os.path.normpath(name)
        return None, next((one.data[:_HEAD_BYTES] for one in spec.files if one.path == here), b"")
    if b"/" in name:
        return name, b""
    for folder in dict(spec.environment(b"/")).get(b"PATH", b"").split(b":"):
        candidate = os.path.join(folder, name)
        if folder.startswith(b"/") and os.access(candidate, os.X_OK) and os.path.isfile(candidate):
            return candidate, b""
    return None, b""


def _head(path: bytes) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, _HEAD_BYTES) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)


def _interpreter(head: bytes) -> bytes | None:
    """What the kernel loads along with a program: of a script its #!, of an ELF file its loader (elf(5))."""
    if head.startswith(b"#!"):
        words = head[2:].partition(b"\n")[0].split()
        return words[0] if words and words[0].startswith(b"/") else None
    if head[:6] != b"\x7fELF\x02\x01" or len(head) < 64:  # 64 bits, little-endian
        return None
    (table,) = struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    for at in range(table, min(table + size * count, len(head) - 55), size or 1):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", head, at)
        if kind == _PT_INTERP and offset + length <= len(head):
            return head[offset : offset + length].partition(b"\0")[0] or None
    return None
