#!/usr/bin/env python3
"""Compiles the static binaries that ringfence ships: `ringfence-core` and `ringfence-probe`.

    python core/build.py [--strict] [--check] [DIRECTORY]

setup.py calls it for a wheel and for an editable install; tests/style calls it for the warnings of each compiler.
It takes $CC if that is set, else the first of gcc, cc and musl-gcc that links a static program.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A static program needs no C library of the sandbox's image, and of none but the kernel's interfaces.
FLAGS = (
    "-std=gnu11",
    "-O2",
    "-static",
    "-s",
    "-fstack-protector-strong",
    "-D_FORTIFY_SOURCE=2",
)
WARNINGS = ("-Wall", "-Wextra", "-Wconversion")
# musl-gcc hides the system's include directory, where the kernel's headers are. After musl's own, so that no header of
# glibc takes the place of one of musl's.
_KERNEL_HEADERS = ("/usr/include", f"/usr/include/{os.uname().machine}-linux-gnu")

HELP = """\
ringfence is built from C, and no compiler here makes a static program.
On Debian or Ubuntu: apt-get install gcc libc6-dev     (or: apt-get install musl-tools linux-libc-dev)
Another compiler can be named by the environment variable CC.
What was tried:"""

_TRIAL = "#include <linux/mount.h>\n#include <unistd.h>\nint main(void) { return getpid() < 0; }\n"


class BuildError(Exception):
    """No compiler serves, or the sources don't compile."""


def sources() -> dict[str, list[Path]]:
    """The files of each binary: probe*.c are the probe's, all others the core's."""
    probe = sorted(HERE.glob("probe*.c"))
    return {
        "ringfence-core": [path for path in sorted(HERE.glob("*.c")) if path not in probe],
        "ringfence-probe": probe,
    }


def compiler() -> list[str]:
    """The command of a compiler that makes static programs, with the options that it needs for it.

    Raises BuildError, with what each candidate said, where there is none.
    """
    named = shlex.split(os.environ.get("CC", ""))
    candidates = [_complete(command) for command in ([named] if named else [["gcc"], ["cc"], ["musl-gcc"]])]
    tried = []
    for command in candidates:
        reason = _refusal(command)
        if reason is None:
            return command
        tried.append(f"  {shlex.join(command)}: {reason}")
    raise BuildError("\n".join([HELP, *tried]))


def _complete(command: list[str]) -> list[str]:
    """The command with the options that this compiler needs to find the kernel's headers."""
    if not command[0].endswith("musl-gcc"):
        return command
    return [*command, *(f"-idirafter{path}" for path in _KERNEL_HEADERS if os.path.isdir(path))]


def _refusal(command: list[str]) -> str | None:
    """Why this compiler doesn't serve, or None."""
    if shutil.which(command[0]) is None:
        return "not found"
    with tempfile.TemporaryDirectory(prefix="ringfence-build-") as folder:
        source = Path(folder, "trial.c")
        source.write_text(_TRIAL)
        done = _run([*command, *FLAGS, "-o", str(Path(folder, "trial")), str(source)])
    if done.returncode == 0:
        return None
    said = [line for line in done.stderr.splitlines() if "error" in line or "cannot" in line] or ["it failed"]
    return said[0].strip()


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)


def build(directory: Path, *, release: str, strict: bool = False, command: list[str] | None = None) -> list[Path]:
    """Compiles both binaries into `directory` and returns their paths.

    release: what `ringfence-core --version` says. strict: warnings are errors. Raises BuildError.
    """
    command = command or compiler()
    directory.mkdir(parents=True, exist_ok=True)
    built = []
    for name, files in sources().items():
        # Beside its final name, then renamed: a running binary can't be written to, and none is ever half there.
        fresh = directory / f".{name}.{os.getpid()}"
        options = [*FLAGS, *WARNINGS, *(["-Werror"] if strict else []), f'-DRF_RELEASE="{release}"']
        try:
            done = _run([*command, *options, "-o", str(fresh), *map(str, files)])
            if done.returncode != 0:
                raise BuildError(f"{shlex.join(command)} could not compile {name}:\n{done.stderr}")
            if done.stderr:
                print(done.stderr, file=sys.stderr, end="")
            fresh.chmod(0o755)
            fresh.rename(directory / name)
        finally:
            fresh.unlink(missing_ok=True)
        built.append(directory / name)
    return built


def release() -> str:
    """`__version__` of the package, without importing it."""
    for line in (HERE.parent / "src/ringfence/__init__.py").read_text().splitlines():
        if line.startswith("__version__ = "):
            return line.split('"')[1]
    raise BuildError("src/ringfence/__init__.py has no __version__")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile ringfence's static binaries.")
    parser.add_argument("--strict", action="store_true", help="treat warnings as errors")
    parser.add_argument("--check", action="store_true", help="only say which compiler would be taken")
    parser.add_argument("directory", nargs="?", type=Path, default=HERE.parent / "src/ringfence/_core")
    given = parser.parse_args()
    try:
        if given.check:
            print(shlex.join(compiler()))
            return 0
        for path in build(given.directory, release=release(), strict=given.strict):
            print(path)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
