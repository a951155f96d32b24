"""From what people write ("256M", "1.5s", "out/*.csv") to what the rest of ringfence works with.

Each function raises SpecError with one sentence that begins with `what`, the name of what is wrong. None of
them imports `re`: its import alone would cost a tenth of what `import ringfence` may take.
"""

from __future__ import annotations

import os

from ringfence.errors import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

__all__ = [
    "absolute_path",
    "count",
    "cpus",
    "duration",
    "match_pattern",
    "number",
    "path_bytes",
    "relative_path",
    "size",
]

# K, M, G and T are powers of 1024, with or without "iB"; KB, MB, GB and TB are powers of 1000: as GNU dd has
# them.
_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "kib": 2**10,
    "kb": 10**3,
    "m": 2**20,
    "mib": 2**20,
    "mb": 10**6,
    "g": 2**30,
    "gib": 2**30,
    "gb": 10**9,
    "t": 2**40,
    "tib": 2**40,
    "tb": 10**12,
}
_DURATION_UNITS = {
    "": 10**9,
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "min": 60 * 10**9,
    "h": 3600 * 10**9,
    "d": 86400 * 10**9,
}
# What fits the kernel's signed 64-bit files and clocks.
_MOST = 2**63 - 1
# Longer than any sensible number; keeps int() of a megabyte of digits away.
_LONGEST_NUMBER = 40
# PATH_MAX with its NUL, and NAME_MAX, of limits.h.
_PATH_MAX = 4096
_NAME_MAX = 255
_INFINITY = float("inf")
_STAR = object()


def size(value: str | int | float, what: str = "size") -> int:
    """Bytes: "256M", "1.5 GiB", "10kB", or a number of bytes. Above 0; rounded down to a whole byte.

    K, M, G, T and KiB, MiB, GiB, TiB are powers of 1024, KB, MB, GB, TB powers of 1000; case doesn't matter.
    """
    return _positive(_quantity(value, what, 1, _SIZE_UNITS, "B, K, M, G, T, KiB, MiB, GiB, TiB"), value, what)


def duration(value: str | int | float, what: str = "duration") -> int:
    """Nanoseconds: "1.5s", "10ms", "2m" (minutes), "1h", or a number of seconds. Above 0.

    Units are ns, us, ms, s, m or min, h, d. Rounded down to a whole nanosecond.
    """
    return _positive(_quantity(value, what, 10**9, _DURATION_UNITS, "ns, us, ms, s, m, h, d"), value, what)


def number(value: str | int | float, what: str = "number") -> float:
    """A finite number from a number or its decimal spelling."""
    if isinstance(value, str):
        digits, unit = _split(value)
        if not digits or unit:
            raise SpecError(f"{what}: {shown(value)} is not a number")
        return float(digits)
    _check_number(value, what)
    return float(value)


def cpus(value: str | int | float, what: str = "cpus") -> float:
    """A number of CPUs, 0.01 to 8192: the kernel's scheduler takes no quota under 1 ms in its period of 100
    ms.
    """
    found = number(value, what)
    if found <= 0:
        raise SpecError(f"{what} must be positive, not {value}")
    if not 0.01 <= found <= 8192:
        raise SpecError(f"{what} must be between 0.01 and 8192, not {value}")
    return found


def count(value: str | int, what: str, least: int, most: int) -> int:
    """A whole number in the given bounds, from an int or its decimal spelling."""
    if isinstance(value, str):
        text = value.strip()
        if not (text.isascii() and text.isdigit() and len(text) <= _LONGEST_NUMBER):
            raise SpecError(f"{what}: {shown(value)} is not a whole number")
        value = int(text)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SpecError(f"{what} must be a whole number, not {shown(value)}")
    if value <= 0 < least:
        raise SpecError(f"{what} must be positive, not {value}")
    if not least <= value <= most:
        raise SpecError(f"{what} must be between {least} and {most}, not {value}")
    return value


def relative_path(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], what: str) -> bytes:
    """A path beneath the work directory, without "." components.

    Refused: an absolute one, "..", an empty component ("a//b", "a/"), NUL bytes, longer than the kernel
    takes.
    """
    raw = path_bytes(path, what)
    if raw.startswith(b"/"):
        raise SpecError(f"{what}: {shown(raw)} must be relative to the work directory, not absolute")
    parts = raw.split(b"/")
    if b"" in parts:
        raise SpecError(f"{what}: {shown(raw)} has an empty component")
    if b".." in parts:
        raise SpecError(f"{what}: {shown(raw)} must not contain '..'")
    parts = [part for part in parts if part != b"."]
    if not parts:
        raise SpecError(f"{what}: {shown(raw)} is the work directory itself")
    return _bounded(parts, raw, what)


def absolute_path(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], what: str) -> bytes:
    """An absolute path inside the sandbox, without ".", doubled or trailing slashes. ".." is refused."""
    raw = path_bytes(path, what)
    if not raw.startswith(b"/"):
        raise SpecError(f"{what} must be an absolute path, not {shown(raw)}")
    parts = [part for part in raw.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise SpecError(f"{what}: {shown(raw)} must not contain '..'")
    return b"/" + _bounded(parts, raw, what)


def path_bytes(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], what: str) -> bytes:
    """A path as the kernel takes it: not empty, no NUL."""
    try:
        raw = os.fsencode(path)
    except (TypeError, UnicodeEncodeError):
        raise SpecError(f"{what} must be a path, not {shown(path)}") from None
    if not raw:
        raise SpecError(f"{what} must not be empty")
    if b"\0" in raw:
        raise SpecError(f"{what}: {shown(raw)} contains a NUL byte")
    return raw


def match_pattern(pattern: bytes, path: bytes) -> bool:
    """Whether a path relative to the work directory matches a pattern of `collect`.

    `*` is any run of characters and `?` any one, but not "/"; `[abc]`, `[a-z]`, `[!abc]` any one of (or but)
    the set; `**` as a whole component is any number of components, also none. A pattern matches whole paths.
    Names that begin with a dot match like all others. There is no escape: `[*]` is a literal star. Characters
    are those of UTF-8; a byte that isn't UTF-8 counts as one.

    It takes at most len(pattern) * len(path) steps, whatever the pattern.
    """
    parts = pattern.decode("utf-8", "surrogateescape").split("/")
    names = path.decode("utf-8", "surrogateescape").split("/")
    return _match([_STAR if part == "**" else _tokens(part) for part in parts], names, _match_name)


def _match(wanted: Sequence[Any], found: Sequence[Any], same: Callable[[Any, Any], bool]) -> bool:
    """Glob one sequence by another, _STAR in `wanted` standing for any number of items.

    All else matches exactly one item, so on a mismatch only the last star has to be reconsidered.
    """
    at = position = 0
    star = resume = -1
    while position < len(found):
        if at < len(wanted) and wanted[at] is _STAR:
            star, resume = at, position
            at += 1
        elif at < len(wanted) and same(wanted[at], found[position]):
            at += 1
            position += 1
        elif star >= 0:
            resume += 1
            at, position = star + 1, resume
        else:
            return False
    return all(one is _STAR for one in wanted[at:])


def _match_name(tokens: Sequence[Any], name: str) -> bool:
    return _match(tokens, name, _match_character)


def _match_character(token: Any, character: str) -> bool:
    if isinstance(token, str):
        return token == character
    negated, ranges = token
    found = any(low <= character <= high for low, high in ranges)
    return found is not negated


def _tokens(part: str) -> list[Any]:
    """One component of a pattern: _STAR, a literal character, or (negated, [(low, high), ...]) for `?` and
    sets.
    """
    tokens: list[Any] = []
    at = 0
    while at < len(part):
        character = part[at]
        at += 1
        if character == "*":
            tokens.append(_STAR)
        elif character == "?":
            tokens.append((True, ()))
        elif character == "[" and (end := _set_end(part, at)) > 0:
            tokens.append(_set(part[at:end]))
            at = end + 1
        else:
            tokens.append(character)
    return tokens


def _set_end(part: str, start: int) -> int:
    """Where the "]" of a set is, or -1: a "]" in the first place, after "!" or "^", is one of the set, as in
    glob(7).
    """
    first = start + 1 if part[start : start + 1] in ("!", "^") else start
    return part.find("]", first + 1)


def _set(inner: str) -> tuple[bool, list[tuple[str, str]]]:
    negated = inner[0] in "!^"
    inner = inner[1:] if negated else inner
    ranges: list[tuple[str, str]] = []
    at = 0
    while at < len(inner):
        if at + 2 < len(inner) and inner[at + 1] == "-":
            ranges.append((inner[at], inner[at + 2]))
            at += 3
        else:
            ranges.append((inner[at], inner[at]))
            at += 1
    return negated, ranges


def _quantity(value: str | int | float, what: str, base: int, units: dict[str, int], known: str) -> int:
    """A number times its unit, in whole steps; a bare number is in steps of `base`."""
    if not isinstance(value, str):
        _check_number(value, what)
        # An integer stays exact; a float has 53 bits anyway.
        return value * base if isinstance(value, int) else int(value * base)
    text = value.strip()
    digits, unit = _split(text.removeprefix("-"))
    if not digits:
        raise SpecError(f"{what}: {shown(value)} is not a number with a unit (such as {known})")
    if unit.lower() not in units:
        raise SpecError(f"{what}: {shown(value)} has no known unit (use {known})")
    whole, _, fraction = digits.partition(".")
    # Integers all the way: 1.1 * 10**9 in floats is not a whole number of nanoseconds.
    scaled: int = int(whole + fraction) * units[unit.lower()] // 10 ** len(fraction)
    return -scaled if text.startswith("-") else scaled


def _split(text: str) -> tuple[str, str]:
    """("1.5", "GiB") of "1.5 GiB"; ("", ...) where it doesn't begin with a plain decimal number."""
    text = text.strip()
    end = 0
    while end < len(text) and (text[end] in "0123456789."):
        end += 1
    digits = text[:end]
    whole, _, fraction = digits.partition(".")
    if not whole.isdigit() or (digits != whole and not fraction.isdigit()) or end > _LONGEST_NUMBER:
        return "", text
    return digits, text[end:].strip()


def _positive(found: int, value: object, what: str) -> int:
    if found <= 0:
        raise SpecError(f"{what} must be positive, not {value}")
    if found > _MOST:
        raise SpecError(f"{what}: {shown(value)} is too large")
    return found


def _check_number(value: object, what: str) -> None:
    # A bool is an int to Python, and memory=True is a mistake to everybody else.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SpecError(f"{what} must be a number or a str, not {value!r:.40}")
    if isinstance(value, float) and not -_INFINITY < value < _INFINITY:
        raise SpecError(f"{what} must be a finite number, not {value}")


def _bounded(parts: list[bytes], raw: bytes, what: str) -> bytes:
    path = b"/".join(parts)
    if len(path) > _PATH_MAX - 2 or any(len(part) > _NAME_MAX for part in parts):
        raise SpecError(f"{what}: {shown(raw)} is longer than the kernel takes ({_NAME_MAX} bytes a component)")
    return path


def shown(value: object) -> str:
    """A value in an error's one sentence, cut where it is long."""
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def host_path(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], what: str) -> bytes:
    """A path of the host, made absolute by the current directory and otherwise as given.

    ".." stays: dropping it together with the component before it would be wrong after a symlink.
    """
    return os.path.join(os.getcwdb(), path_bytes(path, what))


def content(value: object, what: str) -> bytes:
    """Bytes from anything with a buffer, or from a str as UTF-8."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        try:
            return value.encode("utf-8")
        except UnicodeEncodeError:
            raise SpecError(f"{what} has a character that UTF-8 can't encode: give it as bytes") from None
    raise SpecError(f"{what} must be bytes or str, not {type(value).__name__}")
