"""Other tools that start a workload in a sandbox, as near to a container of ours as each can be told: bubblewrap, crun,
runc, runsc, podman.

Each is optional: what isn't installed, or refuses this host, is left out with the reason. Nothing of a tool's own state
is outside the folder that it was given.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess

from ringfence._value import Closing, Value
from ringfence.errors import Unavailable
from ringfence.levels.host import host
from ringfence.linux import ids, seccomp
from ringfence.spec import DEFAULT_ENV

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    Words = Sequence[str | bytes]

__all__ = ["PEERS", "Peer", "Tool", "bubblewrap", "oci_runtime"]

# Name to Debian's package of it.
PEERS = {"bwrap": "bubblewrap", "crun": "crun", "runc": "runc", "runsc": "runsc", "podman": "podman"}
_IDS = 65536
# An id range that no account has: above the last one that systemd gives to containers, below ringfence's own.
_FIRST_ID = 0x70000000
_USER = 1000
_HIDDEN = ["nosuid", "nodev"]
_TRY_S = 60
_HOME = "/work"


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
        return Peer(reason=_missing("bwrap"))
    words = _bubblewrap_words(program)
    fds: tuple[int, ...] = ()
    if not host().seccomp:
        fds = (os.open(_filter(folder), os.O_RDONLY | os.O_CLOEXEC),)
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
        return Peer(reason=_missing(name))
    bundle = os.path.join(folder, name)
    _bundle(bundle, command)
    state = os.path.join(folder, f"{name}-state")
    counter = itertools.count()

    def start() -> None:
        _run([program, "--root", state, "run", "--bundle", bundle, f"bench-{os.getpid()}-{next(counter)}"], ())

    return _tried(start)


def _missing(name: str) -> str:
    return f"{name} isn't installed (Debian's package {PEERS[name]})"


def _run(words: Words, fds: Sequence[int], name: str = "") -> None:
    # A pipe for stdin: the OCI runtimes give the caller's streams to the ids inside, /dev/null itself too.
    done = subprocess.run(words, input=b"", capture_output=True, pass_fds=fds, check=False, timeout=_TRY_S)
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        name = name or os.path.basename(os.fsdecode(words[0]))
        raise OSError(f"{name} ended with {done.returncode}: {said[-1] if said else 'no word'}")


def _tried(start: Callable[[], None]) -> Peer:
    try:
        start()
    except (OSError, subprocess.TimeoutExpired) as error:
        return Peer(reason=str(error))
    return Peer(start)


# ---- what each is told ----


def _bubblewrap_words(program: str) -> list[str]:
    words = [program, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    words += ["--hostname", "ringfence", "--ro-bind", "/usr", "/usr", "--ro-bind", "/etc", "/etc"]
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            words += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            words += ["--ro-bind", f"/{name}", f"/{name}"]
    return [*words, "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/run", "--tmpfs", "/home"]


def _filter(folder: str) -> str:
    """Our own filter, as a file."""
    path = os.path.join(folder, "filter.bpf")
    with open(path, "wb") as file:
        file.write(seccomp.cached(seccomp.policy(namespaces=True)))
    return path


def _rootfs(folder: str) -> None:
    """Nothing but the places where the host's userland is mounted. Whatever the umask: a mapped root passes through."""
    for name in ("", "usr", "etc", "proc", "dev", "sys", "tmp", "run", "home", "work"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
        os.chmod(os.path.join(folder, name), 0o755)
    for name in ("bin", "sbin", "lib", "lib64"):
        os.symlink(f"usr/{name}", os.path.join(folder, name))


def _bundle(folder: str, command: Sequence[str]) -> None:
    """An OCI bundle whose root has the host's /usr and /etc, read-only (runtime-spec, config.md)."""
    os.makedirs(folder)
    os.chmod(folder, 0o755)
    _rootfs(os.path.join(folder, "rootfs"))
    config = _config("rootfs", command, ["PATH=/usr/bin:/bin"])
    config["linux"]["resources"] = {"memory": {"limit": 256 << 20}, "pids": {"limit": 64}}
    _write_config(folder, config)


def _write_config(folder: str, config: Mapping[str, Any]) -> None:
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8", errors="surrogateescape") as file:
        json.dump(config, file, ensure_ascii=False)


def _mapping() -> tuple[int, int, int]:
    """(inside, outside, how many) ids: root gives a range that owns nothing, anybody else its own id, as root inside:
    without a root runc has no mapping.
    """
    return (0, _FIRST_ID, _IDS) if os.geteuid() == 0 else (0, os.geteuid(), 1)


def _user() -> int:
    """Who the command is inside."""
    return _USER if os.geteuid() == 0 else 0


def _config(rootfs: str, command: Sequence[str], env: Sequence[str], work: str | None = None) -> dict[str, Any]:
    mounts: list[dict[str, Any]] = [
        {"destination": f"/{name}", "type": "bind", "source": f"/{name}", "options": ["rbind", "ro", *_HIDDEN]}
        for name in ("usr", "etc")
    ]
    mounts.append({"destination": "/proc", "type": "proc", "source": "proc"})
    mounts += [
        {"destination": at, "type": "tmpfs", "source": "tmpfs", "options": _HIDDEN} for at in ("/tmp", "/run", "/home")
    ]
    mounts.append({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]})
    if work is not None:
        mounts.append({"destination": _HOME, "type": "bind", "source": work, "options": ["rbind", "rw", *_HIDDEN]})
    inside, outside, size = _mapping()
    gid = outside if os.geteuid() == 0 else os.getegid()
    names = ("user", "mount", "pid", "network", "ipc", "uts", "cgroup")
    return {
        "ociVersion": "1.0.2",
        "hostname": "ringfence",
        "root": {"path": rootfs, "readonly": True},
        "process": {
            "terminal": False,
            "user": {"uid": _user(), "gid": _user()},
            "args": list(command),
            "env": list(env),
            "cwd": "/" if work is None else _HOME,
            "noNewPrivileges": True,
            "capabilities": {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable")},
        },
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": name} for name in names],
            "uidMappings": [{"containerID": inside, "hostID": outside, "size": size}],
            "gidMappings": [{"containerID": inside, "hostID": gid, "size": size}],
        },
    }


# ---- one that runs any command ----


class Tool(Closing):
    """One of the peers, ready to start commands with a work directory. name: as in PEERS. version: what it says of
    itself. note: what differs from a container of ours, a sentence. work: the work directory on the host; owner: whose
    it has to be, or None.
    """

    def __init__(self, name: str, folder: str) -> None:
        """folder: an empty one, which ids mapped elsewhere may pass through. Raises Unavailable with the reason."""
        program = shutil.which(name)
        if program is None:
            raise Unavailable(name, _missing(name).removesuffix(f" (Debian's package {PEERS[name]})"),
                              f"install Debian's package {PEERS[name]}")  # fmt: skip
        as_root = os.geteuid() == 0
        if as_root and name != "bwrap" and (taken := ids.whose(_FIRST_ID, _IDS)):
            raise Unavailable(name, f"the ids that it is given, {_FIRST_ID} and on, are partly {taken}'s")
        self.name, self.program, self.folder = name, program, folder
        self.version = _version(program, folder)
        self.note = _NOTES[name]
        self.work = os.path.join(folder, "work")
        self.owner = (_FIRST_ID + _USER, _FIRST_ID + _USER) if as_root and name != "bwrap" else None
        self._stack = contextlib.ExitStack()
        self._counter = itertools.count()
        self._through: list[str] = []  # what it is entered by
        self._filter = _filter(folder) if name == "bwrap" and not host().seccomp else ""
        os.mkdir(self.work)
        self.renew()
        if name != "bwrap":
            self._rootfs = os.path.join(folder, "rootfs")
            _rootfs(self._rootfs)
            if as_root and name == "podman":  # it makes places for its own mounts there, as the mapped root
                for at in ("", "run", "etc", "dev"):
                    os.chown(os.path.join(self._rootfs, at), _FIRST_ID, _FIRST_ID)
        try:
            self._try()
        except BaseException:
            self.close()
            raise

    def _try(self) -> None:
        """Starts `true` once; once more out of the hybrid layout's sight, where that is what it minds."""
        true = [shutil.which("true") or "/usr/bin/true"]
        try:
            self.run(true)
            return
        except (OSError, subprocess.TimeoutExpired) as error:
            if "hybrid" not in str(error) or os.geteuid() != 0:
                raise Unavailable(self.name, str(error)) from None
        self._through = self._stack.enter_context(_without_unified())
        self.note += (
            "; it refuses the hybrid cgroup layout, so in a mount namespace without its unified half, by nsenter"
        )
        try:
            self.run(true)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(self.name, str(error)) from None

    def run(self, argv: Words, env: Mapping[bytes, bytes] | None = None) -> None:
        """A command, to its end. Raises OSError where it doesn't exit with 0."""
        with self.prepared(argv, env) as (words, fds):
            _run(words, fds, self.name)

    @contextlib.contextmanager
    def prepared(
        self, argv: Words, env: Mapping[bytes, bytes] | None = None
    ) -> Iterator[tuple[list[str | bytes], tuple[int, ...]]]:
        """What is to be executed, and with which descriptors, to start that command in a new sandbox, once."""
        given = {**dict(DEFAULT_ENV), b"HOME": os.fsencode(_HOME), **(env or {})}
        number = next(self._counter)
        command = [os.fsdecode(word) for word in argv]
        if self.name == "bwrap":
            with self._bubblewrap(given) as (words, fds):
                yield [*words, "--", *command], fds
            return
        name = f"compare-{os.getpid()}-{number}"
        if self.name == "podman":
            yield [*self._through, *self._podman(given, name), *command], ()
            return
        bundle = os.path.join(self.folder, f"bundle-{number}")
        os.mkdir(bundle, 0o755)
        os.chmod(bundle, 0o755)
        try:
            pairs = [f"{os.fsdecode(key)}={os.fsdecode(value)}" for key, value in given.items()]
            _write_config(bundle, _config(self._rootfs, command, pairs, self.work))
            more = ["--network=none"] if self.name == "runsc" else []
            yield [*self._through, self.program, "--root", self._state(), *more, "run", "--bundle", bundle, name], ()
        finally:
            shutil.rmtree(bundle)

    def _state(self) -> str:
        return os.path.join(self.folder, "state")

    @contextlib.contextmanager
    def _bubblewrap(self, env: Mapping[bytes, bytes]) -> Iterator[tuple[list[str | bytes], tuple[int, ...]]]:
        words: list[str | bytes] = [*_bubblewrap_words(self.program), "--bind", self.work, _HOME, "--chdir", _HOME]
        for key, value in env.items():
            words += ["--setenv", key, value]
        if not self._filter:
            yield words, ()
            return
        fd = os.open(self._filter, os.O_RDONLY | os.O_CLOEXEC)  # one each: it is read to its end
        try:
            yield [*words, "--seccomp", str(fd)], (fd,)
        finally:
            os.close(fd)

    def _podman(self, env: Mapping[bytes, bytes], name: str) -> list[str | bytes]:
        # Short names: podman refuses a runroot of more than 50 characters. Without these it and its runtime leave files
        # in /run, in the home and among the temporary ones.
        at = self.folder
        words: list[str | bytes] = ["env", *(f"{key}={value}" for key, value in _own(at).items()), self.program]
        words += ["--root", f"{at}/root", "--runroot", f"{at}/run", "--tmpdir", f"{at}/tmp"]
        words += ["--runtime-flag", f"root={at}/oci"]
        words += ["--events-backend=none", "--storage-driver=vfs", "--cgroup-manager=cgroupfs"]
        words += ["run", "--rm", "--interactive", "--name", name, "--cgroups=disabled", "--network=none", "--no-hosts"]
        words += ["--log-driver=none", "--hostname=ringfence", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
        words += ["--read-only", "--read-only-tmpfs=false", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"]
        words += [f"--user={_user()}:{_user()}", f"--workdir={_HOME}", f"--volume={self.work}:{_HOME}"]
        if os.geteuid() == 0:
            words.append(f"--uidmap=0:{_FIRST_ID}:{_IDS}")
        words += [f"--volume=/{one}:/{one}:ro" for one in ("usr", "etc")]
        for key, value in env.items():
            words += ["--env", key + b"=" + value]
        return [*words, "--rootfs", self._rootfs]

    def end(self, words: Sequence[str | bytes]) -> None:
        """Ends what was started by `words`, and whose starter was killed: bubblewrap's ends by itself."""
        if self.name == "podman":
            at = words.index("--name")
            base = words[: words.index("run")]
            _quietly([*base, "rm", "--force", "--time=0", words[at + 1]])
        elif self.name != "bwrap":
            _quietly([*self._through, self.program, "--root", self._state(), "delete", "--force", words[-1]])

    def renew(self) -> None:
        """Empties the work directory."""
        shutil.rmtree(self.work)
        os.mkdir(self.work, 0o700)
        if self.owner is not None:
            os.chown(self.work, *self.owner)

    def close(self) -> None:
        """Ends what it is entered by. Its folder is its maker's to remove."""
        self._stack.close()


def _quietly(words: Words) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_TRY_S)


_NOTES = {
    "bwrap": "no cgroup, no time namespace, our own filter; as root its user namespace maps to the host's root",
    "crun": "no seccomp filter, no time namespace; the command is PID 1",
    "runc": "no seccomp filter, no time namespace; the command is PID 1",
    "runsc": "gVisor: a kernel of its own in user space; no network but its loopback",
    "podman": "podman run --rootfs, its own seccomp filter, no cgroup, no time namespace; the command is PID 1",
}


def _own(folder: str) -> dict[str, str]:
    """The environment by which podman keeps all that it keeps in that folder."""
    return dict.fromkeys(("HOME", "XDG_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "TMPDIR"), folder)


def _version(program: str, folder: str) -> str:
    """The first line that it prints of itself: "bubblewrap 0.8.0"."""
    try:
        done = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_TRY_S,
            env={**os.environ, **_own(folder)},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return lines[0].strip() if lines else ""


@contextlib.contextmanager
def _without_unified() -> Iterator[list[str]]:
    """Words that execute the rest in a mount namespace without cgroup2, which lives as long as this context.

    crun 1.8 refuses the hybrid layout wherever it sees it, also with its cgroup manager off.
    """
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        unified = [line.split()[4] for line in file if " - cgroup2 " in line]
    script = 'umount -l "$@" && echo ready && read -r _'
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *unified]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            if holder.stdout.readline() != b"ready\n":
                raise OSError("a mount namespace without cgroup2 could not be made by unshare and umount")
            yield ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", "--"]
        finally:
            holder.stdin.close()
