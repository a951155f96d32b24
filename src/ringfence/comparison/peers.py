"""The same start by other tools: bubblewrap, crun and runc, as near to a container of ours as each can be told.

Each is optional: what isn't installed, or refuses this host, is skipped with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess

from ringfence._value import Value
from ringfence.levels.host import host
from ringfence.linux import seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

__all__ = ["Peer", "bubblewrap", "oci_runtime"]

_IDS = 65536
# An id range that no account has, below ringfence's own.
_FIRST_ID = 0x6F000000


class Peer(Value):
    """Another tool that starts the workload. start: once, from the call to its end; reason: why it can't, or ""."""

    __slots__ = ("reason", "start")
    start: Callable[[], None] | None
    reason: str

    def __init__(self, start: Callable[[], None] | None = None, reason: str = "") -> None:
        self._set(start=start, reason=reason)


def bubblewrap(command: Sequence[str], folder: str) -> Peer:
    """Every namespace that it knows (all of ours but time), no capabilities, and our own seccomp filter."""
    program = shutil.which("bwrap")
    if program is None:
        return Peer(reason="bwrap isn't installed (Debian's package bubblewrap)")
    words = [program, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    words += ["--hostname", "ringfence", "--ro-bind", "/usr", "/usr", "--ro-bind", "/etc", "/etc"]
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            words += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            words += ["--ro-bind", f"/{name}", f"/{name}"]
    words += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/run", "--tmpfs", "/home"]
    fds: tuple[int, ...] = ()
    if not host().seccomp:
        path = os.path.join(folder, "filter.bpf")
        with open(path, "wb") as file:
            file.write(seccomp.cached(seccomp.policy(namespaces=True)))
        fds = (os.open(path, os.O_RDONLY | os.O_CLOEXEC),)
        words += ["--seccomp", str(fds[0])]
    words += ["--", *command]

    def start() -> None:
        for fd in fds:
            os.lseek(fd, 0, os.SEEK_SET)  # it reads to the end, and the position is shared
        _run(words, fds)

    return _tried(start)


def oci_runtime(name: str, command: Sequence[str], folder: str) -> Peer:
    """crun or runc: every namespace but time, no capabilities, memory and pids limits in cgroups; no filter."""
    program = shutil.which(name)
    if program is None:
        return Peer(reason=f"{name} isn't installed (Debian's package {name})")
    bundle = os.path.join(folder, name)
    _bundle(bundle, command)
    state = os.path.join(folder, f"{name}-state")
    counter = iter(range(1 << 30))

    def start() -> None:
        _run([program, "--root", state, "run", "--bundle", bundle, f"bench-{os.getpid()}-{next(counter)}"], ())

    return _tried(start)


def _run(words: Sequence[str], fds: Sequence[int]) -> None:
    # A pipe for stdin: the OCI runtimes give the caller's streams to the ids inside, /dev/null itself too.
    done = subprocess.run(words, input=b"", capture_output=True, pass_fds=fds, check=False)
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise OSError(f"{os.path.basename(words[0])} ended with {done.returncode}: {said[-1] if said else 'no word'}")


def _tried(start: Callable[[], None]) -> Peer:
    try:
        start()
    except OSError as error:
        return Peer(reason=str(error))
    return Peer(start)


def _bundle(folder: str, command: Sequence[str]) -> None:
    """An OCI bundle whose root has the host's /usr and /etc, read-only (runtime-spec, config.md)."""
    rootfs = os.path.join(folder, "rootfs")
    for name in ("usr", "etc", "proc", "dev", "tmp", "run", "home"):
        os.makedirs(os.path.join(rootfs, name))
    for name in ("bin", "sbin", "lib", "lib64"):
        os.symlink(f"usr/{name}", os.path.join(rootfs, name))
    for name in ("", "rootfs"):
        os.chmod(os.path.join(folder, name), 0o755)  # whatever the umask: the mapped root passes through
    hidden = ["nosuid", "nodev"]
    mounts: list[dict[str, Any]] = [
        {"destination": f"/{name}", "type": "bind", "source": f"/{name}", "options": ["rbind", "ro", *hidden]}
        for name in ("usr", "etc")
    ]
    mounts.append({"destination": "/proc", "type": "proc", "source": "proc"})
    mounts += [
        {"destination": at, "type": "tmpfs", "source": "tmpfs", "options": hidden} for at in ("/tmp", "/run", "/home")
    ]
    mounts.append({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]})
    mapping = [{"containerID": 0, "hostID": _FIRST_ID, "size": _IDS}]
    names = ("user", "mount", "pid", "network", "ipc", "uts", "cgroup")
    config = {
        "ociVersion": "1.0.2",
        "hostname": "ringfence",
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "terminal": False,
            "user": {"uid": 1000, "gid": 1000},
            "args": list(command),
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable")},
        },
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": name} for name in names],
            "uidMappings": mapping,
            "gidMappings": mapping,
            "resources": {"memory": {"limit": 256 << 20}, "pids": {"limit": 64}},
        },
    }
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)
