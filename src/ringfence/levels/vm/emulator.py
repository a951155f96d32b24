"""Which QEMU is here: where, of which version, and which of the machines that we can drive it was built with.

$RINGFENCE_QEMU names another program than /usr/bin/qemu-system-x86_64, $RINGFENCE_MACHINE one of `MACHINES` instead of
the first one that it has.
"""

from __future__ import annotations

import os

from ringfence import _cache, _trust
from ringfence._value import Value
from ringfence.errors import SpecError, Unavailable

__all__ = ["LEAST_VERSION", "MACHINES", "Emulator", "look"]

# The best first: microvm has less to emulate and to attack; q35 is what every QEMU for x86 has.
MACHINES = ("microvm", "q35")
# The first whose microvm has ACPI, without which Debian's kernel finds no device there.
LEAST_VERSION = (5, 2)

_QEMU = "/usr/bin/qemu-system-x86_64"
_SECONDS = 10
_WORDS_BYTES = 64 << 10
_KEPT = 16
_HELP = "run 'ringfence setup', or name another one in RINGFENCE_QEMU"


class Emulator(Value):
    """A QEMU. path: absolute. version: such as (7, 2, 22). machines: those of `MACHINES` that it has."""

    __slots__ = ("machines", "path", "version")
    path: str
    version: tuple[int, ...]
    machines: tuple[str, ...]

    def __init__(self, *, path: str, version: tuple[int, ...], machines: tuple[str, ...]) -> None:
        self._set(path=path, version=version, machines=machines)

    def machine(self) -> str:
        """The machine to use: the one that $RINGFENCE_MACHINE names, else the first. Raises SpecError, Unavailable."""
        named = os.environ.get("RINGFENCE_MACHINE")
        if named and named not in MACHINES:
            raise SpecError(f"RINGFENCE_MACHINE must be {' or '.join(MACHINES)}, not {named!r}")
        if named and named not in self.machines:
            raise Unavailable("vm", f"{self.path} has no machine {named}, which RINGFENCE_MACHINE names", _HELP)
        return named or self.machines[0]


# What was found, by which file it was: a QEMU that was replaced is asked again.
_known: dict[tuple[object, ...], Emulator] = {}


def look() -> Emulator:
    """The QEMU of this host. Raises Unavailable where none can be used, SpecError for a path that is none.

    It is asked once for the same file (40 ms), and the answer kept in the cache.
    """
    path = os.environ.get("RINGFENCE_QEMU") or _QEMU
    if not os.path.isabs(path):
        raise SpecError(f"RINGFENCE_QEMU must be an absolute path, not {path!r}")
    if not os.access(path, os.X_OK) or not os.path.isfile(path):
        raise Unavailable("vm", f"QEMU isn't installed: there is no program {path}", _HELP)
    about = os.stat(path)
    key = (path, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    if key not in _known:
        # It is asked outside of any jail, and as the caller.
        if reason := _trust.why_not_ours(path):
            raise Unavailable("vm", f"{path} isn't run as QEMU: {reason}", _HELP)
        _known[key] = _from_cache(path, key) or _ask(path, key)
    return _known[key]


def _cache_file(key: tuple[object, ...]) -> str:
    import hashlib

    digest = hashlib.sha256(repr(key).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return os.path.join(_cache.root(), f"qemu-{digest}")


def _from_cache(path: str, key: tuple[object, ...]) -> Emulator | None:
    try:
        with open(_cache_file(key), encoding="ascii") as file:
            version, _, machines = file.read(256).partition("\n")
        numbers = tuple(int(one) for one in version.split("."))
    except (OSError, ValueError):
        return None
    found = tuple(one for one in MACHINES if one in machines.split())
    return Emulator(path=path, version=numbers, machines=found) if found and numbers >= LEAST_VERSION else None


def _ask(path: str, key: tuple[object, ...]) -> Emulator:
    import re

    said = _output(path, "--version")
    # "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"
    match = re.search(r"^QEMU emulator version (\d{1,4}(?:\.\d{1,4}){1,3})", said)
    if match is None:
        raise Unavailable("vm", f"{path} --version doesn't tell a version of QEMU: {said[:80]!r}", _HELP)
    version = tuple(int(one) for one in match[1].split("."))
    if version < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise Unavailable("vm", f"{path} is QEMU {match[1]}, and at least {least} is needed", _HELP)
    listed = {line.split(" ", 1)[0] for line in _output(path, "-machine", "help").splitlines()}
    machines = tuple(one for one in MACHINES if one in listed)
    if not machines:
        raise Unavailable("vm", f"{path} was built without the machines {' and '.join(MACHINES)}", _HELP)
    found = Emulator(path=path, version=version, machines=machines)
    try:
        _cache.write(_cache_file(key), f"{match[1]}\n{' '.join(machines)}\n".encode())
        _forget_old()
    except OSError:
        pass  # it will be asked again
    return found


def _forget_old() -> None:
    """Of the answers of programs that were replaced since, few are kept. Raises OSError."""
    with os.scandir(_cache.root()) as found:
        kept = sorted((one.stat().st_mtime_ns, one.path) for one in found if one.name.startswith("qemu-"))
    for _, path in kept[:-_KEPT]:
        os.unlink(path)


def _output(path: str, *words: str) -> str:
    """What QEMU prints. Raises Unavailable, with what it wrote to stderr, where it doesn't end well."""
    import subprocess

    try:
        run = subprocess.run(
            [path, *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False, cwd="/"
        )
    except subprocess.TimeoutExpired:
        raise Unavailable("vm", f"{path} {words[0]} took over {_SECONDS} s", _HELP) from None
    except OSError as error:
        raise Unavailable("vm", f"{path} can't be run: {error.strerror}", _HELP) from None
    if run.returncode:
        how = f"was ended by signal {-run.returncode}" if run.returncode < 0 else f"exited with {run.returncode}"
        words_of_it = " ".join(run.stderr[:_WORDS_BYTES].decode(errors="replace").split())[:400]
        raise Unavailable("vm", f"{path} {words[0]} {how}{': ' if words_of_it else ''}{words_of_it}", _HELP)
    return run.stdout[:_WORDS_BYTES].decode(errors="replace")
