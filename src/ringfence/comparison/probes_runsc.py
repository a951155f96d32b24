"""The probes under gVisor: a container whose system calls runsc's own kernel answers, in a process of the host's.

Optional: where runsc isn't installed or doesn't run here, there is no column, and the reason is told.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile

from ringfence.comparison.probes_place import Place
from ringfence.errors import Unavailable
from ringfence.wire.launcher import probe_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

__all__ = ["RUNSC", "runsc"]

RUNSC = "runsc"
_PROBE = "ringfence-probe"
_TIMEOUT_SECONDS = 120


def _config(words: Sequence[str]) -> dict[str, Any]:
    """An OCI bundle's (runtime-spec, config.md): a root with the probe and the host's /usr and /etc, no capabilities,
    and every namespace but the user's.
    """
    capabilities: dict[str, list[str]] = {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable")}
    return {
        "ociVersion": "1.0.2",
        "hostname": "runsc",
        "root": {"path": "rootfs", "readonly": False},
        "process": {
            "terminal": False,
            "user": {"uid": 1000, "gid": 1000},
            "args": [f"/{_PROBE}", *words],
            "env": ["PATH=/"],
            "cwd": "/work",
            "noNewPrivileges": True,
            "capabilities": capabilities,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            *(
                {"destination": f"/{name}", "type": "bind", "source": f"/{name}", "options": ["rbind", "ro"]}
                for name in ("usr", "etc")
            ),
        ],
        "linux": {
            "namespaces": [{"type": name} for name in ("mount", "pid", "network", "ipc", "uts")],
        },
    }


class _Runsc:
    """Runs the probe in bundles of a folder, a container for each run. `close` ends those that hold marks."""

    def __init__(self, program: str, folder: str) -> None:
        self._program, self._folder = program, folder
        self._holders: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._count = 0

    def _bundle(self, words: Sequence[str]) -> tuple[str, list[str]]:
        """(the container's id, the command that runs it)."""
        self._count += 1
        name = f"ringfence-{os.getpid()}-{self._count}"
        bundle = os.path.join(self._folder, name)
        rootfs = os.path.join(bundle, "rootfs")
        for folder in ("proc", "dev", "tmp", "usr", "etc", "work"):
            os.makedirs(os.path.join(rootfs, folder))
        os.chmod(os.path.join(rootfs, "work"), 0o777)
        shutil.copy(probe_path(), os.path.join(rootfs, _PROBE))
        os.chmod(os.path.join(rootfs, _PROBE), 0o755)
        with open(os.path.join(bundle, "config.json"), "w", encoding="utf-8") as file:
            json.dump(_config(words), file)
        # It doesn't take every layout of cgroups, so it gets no limits; and where it is in a guest only ptrace serves.
        options = ["--root", os.path.join(self._folder, "state"), "--network", "none", "--ignore-cgroups"]
        return name, [self._program, *options, "--platform", "ptrace", "run", "--bundle", bundle, name]

    def ask(self, words: Sequence[str], given: bytes) -> tuple[bytes, str]:
        """As `probes_run.Ask`. What is to stay in the background stays as a container of its own."""
        if words[0] == "hold":
            return self._hold(words), ""
        _, command = self._bundle(words)
        try:
            done = subprocess.run(command, input=given, capture_output=True, check=False, timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            return b"", f"nothing in {_TIMEOUT_SECONDS} s"
        if done.returncode == 128 and not done.stdout:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise Unavailable(RUNSC, f"it doesn't run here: {said[-1] if said else 'no word'}", "")
        return done.stdout, f"signal {done.returncode - 128}" if done.returncode > 128 else ""

    def ask_holder(self, words: Sequence[str], given: bytes) -> tuple[bytes, str]:
        """The same, in the container that holds marks."""
        name = self._holders[-1][0]
        command = [self._program, "--root", os.path.join(self._folder, "state"), "exec", name, f"/{_PROBE}", *words]
        try:
            done = subprocess.run(command, input=given, capture_output=True, check=False, timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            return b"", f"nothing in {_TIMEOUT_SECONDS} s"
        return done.stdout, f"signal {done.returncode - 128}" if done.returncode > 128 else ""

    def _hold(self, words: Sequence[str]) -> bytes:
        name, command = self._bundle(words[:-1])
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # `close` ends it, also where we were ended by the terminal
        )
        self._holders.append((name, process))
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(b"pid "):
                break
        return b"".join(lines)

    def close(self) -> None:
        """Ends all that still runs."""
        for name, process in self._holders:
            for words in (["kill", name, "KILL"], ["delete", "--force", name]):
                subprocess.run(
                    [self._program, "--root", os.path.join(self._folder, "state"), *words],
                    capture_output=True,
                    check=False,
                )
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@contextlib.contextmanager
def runsc() -> Iterator[Place]:
    """Where probes are made under runsc. Raises Unavailable where it isn't installed, or doesn't run here."""
    program = shutil.which(RUNSC)
    if program is None:
        raise Unavailable(RUNSC, "runsc isn't installed", "install Debian's package runsc, or gVisor's own")
    with tempfile.TemporaryDirectory(prefix="ringfence-runsc-") as folder:
        os.chmod(folder, 0o755)
        tool = _Runsc(program, folder)
        try:
            tool.ask(["exit", "0"], b"")
            yield Place(tool.ask, tool.ask, limited=False, same=tool.ask_holder)
        finally:
            tool.close()
