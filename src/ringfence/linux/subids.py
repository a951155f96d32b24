"""Whose ids are whose: /etc/subuid and /etc/subgid give ranges of them to accounts (subuid(5)); and the accounts."""

from __future__ import annotations

import os

__all__ = ["accounts", "ranges"]

# More than any host has of either. Larger is read up to here.
_MOST_BYTES = 16 << 20


def _lines(path: str) -> list[list[str]]:
    """The fields of each line; [] of a file that isn't there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        parts = []
        left = _MOST_BYTES
        while left > 0 and (part := os.read(fd, min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(fd)
    return [line.split(":") for line in b"".join(parts).decode("utf-8", "replace").splitlines()]


def _is_id(text: str) -> bool:
    return text.isdecimal() and len(text) <= 10


def ranges(path: str) -> list[tuple[str, int, int]]:
    """(account by name or number, first id, how many) of a file as subuid(5) has it."""
    return [
        (fields[0], int(fields[1]), int(fields[2]))
        for fields in _lines(path)
        if len(fields) == 3 and _is_id(fields[1]) and _is_id(fields[2]) and int(fields[2]) > 0
    ]


def accounts(path: str, field: int) -> list[tuple[str, int]]:
    """(name, the number in that field) of a file as passwd(5) or group(5) has it."""
    return [(fields[0], int(fields[field])) for fields in _lines(path) if len(fields) > field and _is_id(fields[field])]
