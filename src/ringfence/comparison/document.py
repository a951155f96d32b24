"""The comparison's document as a file: written at once or not at all, and read only where it is what the schema says.

The schema is comparison.schema.json, which any JSON Schema validator takes. It is checked here by a small one of our
own that knows just the words which that schema uses, so that reading a saved comparison needs no other package.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat

from ringfence.errors import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

__all__ = ["BARE", "SCHEMA", "WORDS", "check", "level_named", "load", "may_be_replaced", "save", "schema", "write_file"]

# The version of the document. A reader takes unknown keys in its stride; what changes a key's meaning, or takes one
# away, is another version.
SCHEMA = 1
BARE = "bare"
# A comparison of ten levels with all that can be measured is some megabytes.
_MOST_BYTES = 256 << 20
# No count of nanoseconds, bytes or calls is more.
_MOST = 1 << 80
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
# What the validator knows; the second line says nothing of a value.
WORDS = frozenset(
    ("$ref", "additionalProperties", "anyOf", "const", "enum", "items", "minItems", "minimum", "properties", "required",
     "type", "$defs", "$schema", "description", "title")
)  # fmt: skip


def schema() -> dict[str, Any]:
    """The JSON Schema of the document."""
    path = os.path.join(os.path.dirname(__file__), "comparison.schema.json")
    with open(path, encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file)
    return found


def level_named(document: dict[str, Any], name: str) -> dict[str, Any] | None:
    """A level's part; None where it isn't in the document."""
    found: dict[str, Any] | None = next((one for one in document["levels"] if one["name"] == name), None)
    return found


# ---- reading ----


def load(path: str) -> dict[str, Any]:
    """A saved comparison. Raises SpecError where the file is none, is damaged, or is of another version; OSError where
    it can't be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES >> 20} MiB")
        document = json.loads(data, parse_constant=_no_constant, parse_int=_whole, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is no saved comparison: {error}") from None
    try:
        check(document)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
    found: dict[str, Any] = document
    return found


def check(document: Any) -> None:
    """Raises SpecError where a value is no comparison of this version, with the place of what is wrong."""
    if not isinstance(document, dict) or "schema" not in document:
        raise SpecError("no comparison: it has no 'schema'")
    version = document["schema"]
    if version != SCHEMA or isinstance(version, bool):
        raise SpecError(f"a comparison of version {version!r}; this ringfence reads version {SCHEMA}: save it anew")
    whole = schema()
    wrong = _wrong(document, whole, whole, "")
    if wrong is not None:
        raise SpecError(f"a damaged comparison: {wrong}")
    names = [one["name"] for one in document["levels"]]
    if names[0] != BARE or len(set(names)) < len(names):
        raise SpecError(f"a damaged comparison: levels must begin with {BARE!r} and be named once each, not {names}")


def _whole(word: str) -> int:
    found = int(word)
    if abs(found) > _MOST:
        raise ValueError(f"{_short(word)} is no figure of a measurement")
    return found


def _finite(word: str) -> float:
    found = float(word)
    if not abs(found) <= _MOST:  # 1e999 is JSON, and infinite
        raise ValueError(f"{_short(word)} is no figure of a measurement")
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _wrong(value: Any, rule: dict[str, Any], whole: dict[str, Any], where: str) -> str | None:
    """What is wrong about a value, and where; None where it is as the rule says."""
    if "$ref" in rule:
        return _wrong(value, whole["$defs"][rule["$ref"].removeprefix("#/$defs/")], whole, where)
    if "anyOf" in rule:
        found = [_wrong(value, one, whole, where) for one in rule["anyOf"]]
        # The last alternative is the one with something to say: the others are null.
        return found[-1] if all(one is not None for one in found) else None
    if "type" in rule and not _is_of(value, rule["type"]):
        return f"{where or 'it'} must be {rule['type']}, not {_short(value)}"
    if ("const" in rule and value != rule["const"]) or ("enum" in rule and value not in rule["enum"]):
        return f"{where} must be of {rule.get('enum', rule.get('const'))}, not {_short(value)}"
    if "minimum" in rule and isinstance(value, (int, float)) and value < rule["minimum"]:
        return f"{where} must be at least {rule['minimum']}, not {_short(value)}"
    if isinstance(value, dict):
        return _wrong_object(value, rule, whole, where)
    if isinstance(value, list):
        if len(value) < rule.get("minItems", 0):
            return f"{where} must not be empty"
        items = rule.get("items")
        found = [_wrong(one, items, whole, f"{where}/{at}") for at, one in enumerate(value)] if items else []
        return next((one for one in found if one is not None), None)
    return None


def _wrong_object(value: dict[str, Any], rule: dict[str, Any], whole: dict[str, Any], where: str) -> str | None:
    for name in rule.get("required", ()):
        if name not in value:
            return f"{where}/{name} is missing"
    known, others = rule.get("properties", {}), rule.get("additionalProperties")
    for name, inner in value.items():
        ruled = known.get(name, others)
        wrong = _wrong(inner, ruled, whole, f"{where}/{name}") if ruled is not None else None
        if wrong is not None:
            return wrong
    return None


def _is_of(value: Any, wanted: str | list[str]) -> bool:
    kinds = [wanted] if isinstance(wanted, str) else wanted
    if isinstance(value, bool):
        return "boolean" in kinds
    if isinstance(value, float) and value.is_integer() and "integer" in kinds:
        return True  # as JSON Schema has it: 1.0 is an integer
    return any(isinstance(value, _TYPES[kind]) for kind in kinds)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- writing ----


def save(document: dict[str, Any], path: str) -> None:
    """Writes it as JSON. Raises OSError."""
    write_file(path, json.dumps(document, indent=1).encode("ascii") + b"\n")


def may_be_replaced(path: str) -> bool:
    """Whether there is a regular file, or none: not a terminal, a pipe or a folder. Raises OSError."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return True


def write_file(path: str, data: bytes) -> None:
    """All of it or nothing: whoever reads the file meanwhile, or after a crash, finds the old one or the new one.

    What is no regular file (a terminal, a pipe) is written to, and a link stays one. Raises OSError.
    """
    if not may_be_replaced(path):
        with open(path, "wb") as file:
            file.write(data)
        return
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    scratch = os.path.join(folder, f".{name[:100]}.{os.urandom(6).hex()}")
    try:
        was = os.stat(target)
    except FileNotFoundError:
        was = None
    mode = 0o666 if was is None else 0o600
    try:
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            if was is not None:  # it stays as private as it was, and its owner's
                mode = stat.S_IMODE(was.st_mode) & 0o777
                try:
                    os.fchown(file.fileno(), was.st_uid, was.st_gid)
                except PermissionError:
                    mode &= ~0o070  # its group is ours now, to whom nobody gave it
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
