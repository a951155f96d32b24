"""Thin typed wrappers of the kernel's interfaces. Each module names the manual page or header it follows."""

from __future__ import annotations

import os

__all__ = ["read_text"]

_READ_BYTES = 1 << 16


def read_text(path: str | bytes, errors: str = "surrogateescape") -> str:
    """All of a file of /proc or /sys. errors: what becomes of bytes that aren't UTF-8. Raises OSError.

    Not open(), whose layers take longer than such a file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, _READ_BYTES):
            parts.append(part)
    finally:
        os.close(fd)
    return b"".join(parts).decode("utf-8", errors)
