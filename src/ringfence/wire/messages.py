"""What the frames say: requests as bytes, answers as values. `guest_messages` has what few sandboxes need of it."""

from __future__ import annotations

import struct

from ringfence._value import Value
from ringfence.errors import ProtocolError, StartError, printable
from ringfence.wire import frames
from ringfence.wire.frames import Type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "Exited",
    "MountStep",
    "Plan",
    "Started",
    "execute",
    "launch",
    "parse_error",
    "parse_exited",
    "parse_started",
]

# Attributes of a mount: the values of MOUNT_ATTR_* (mount_setattr(2)), then two of our own.
RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8
RECURSIVE, OPTIONAL, INSIDE, TOLD, NOFOLLOW = 0x100, 0x200, 0x400, 0x800, 0x1000
BIND = 4


class MountStep:
    """One step of a sandbox's file tree, as bytes but for its descriptor. See "Steps of the file tree" in
    docs/design/protocol.md.
    """

    __slots__ = ("_head", "_tail", "_whole", "fd", "kind", "target")

    def __init__(
        self,
        kind: int,
        target: bytes,
        *,
        flags: int = 0,
        mode: int = 0,
        fd: int | None = None,
        source: bytes = b"",
        fstype: bytes = b"",
        data: bytes = b"",
    ) -> None:
        if b"\0" in target + source + fstype + data:
            raise ValueError("a path of a mount contains a NUL byte")
        self._head = struct.pack("<BBHI", kind, 0, flags, mode)
        self._tail = b"%s\0%s\0%s\0%s\0" % (source, fstype, target, data)
        self.fd = fd
        self.kind = kind
        self.target = target
        self._whole = self.encode(frames.NO_FD)

    def encode(self, index: int = frames.NO_FD) -> bytes:
        """The attribute, with the descriptor's index in the frame."""
        return frames.attribute(3, self._head + struct.pack("<I", index) + self._tail)

    @property
    def without_fd(self) -> bytes:
        """The attribute of a step that refers to no descriptor."""
        return self._whole


def directory(target: bytes, mode: int = 0o755) -> MountStep:
    return MountStep(1, target, mode=mode)


def symlink(target: bytes, source: bytes) -> MountStep:
    return MountStep(2, target, source=source)


def file(target: bytes, data: bytes = b"", mode: int = 0o644) -> MountStep:
    return MountStep(3, target, data=data, mode=mode)


def bind(target: bytes, source: bytes | int, flags: int = 0) -> MountStep:
    """Mounts a path of the launcher's namespace, or a detached mount by its descriptor."""
    if isinstance(source, int):
        return MountStep(4, target, fd=source, flags=flags)
    return MountStep(4, target, source=source, flags=flags)


def filesystem(target: bytes, fstype: bytes, *, source: bytes = b"", data: bytes = b"", flags: int = 0) -> MountStep:
    return MountStep(5, target, fstype=fstype, source=source, data=data, flags=flags)


def mask(target: bytes) -> MountStep:
    return MountStep(6, target)


def readonly(target: bytes) -> MountStep:
    return MountStep(7, target)


class Plan:
    """A PLAN under construction: its attributes, and the descriptors that it refers to."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.fds: list[int] = []

    def _fd(self, fd: int) -> int:
        self.fds.append(fd)
        return len(self.fds) - 1

    def hostname(self, name: bytes) -> None:
        self._parts.append(frames.string(1, name))

    def loopback(self) -> None:
        self._parts.append(frames.attribute(2))

    def mounts(self, steps: Iterable[MountStep]) -> None:
        for step in steps:
            self._parts.append(step.without_fd if step.fd is None else step.encode(self._fd(step.fd)))

    def ids(self, uid: int, gid: int) -> None:
        self._parts.append(frames.u32(4, uid) + frames.u32(5, gid))

    def seccomp(self, program: bytes) -> None:
        self._parts.append(frames.attribute(6, program))

    def rlimit(self, resource: int, soft: int, hard: int) -> None:
        self._parts.append(frames.attribute(7, struct.pack("<IIQQ", resource, 0, soft, hard)))

    def landlock(self, ruleset: int) -> None:
        self._parts.append(frames.u32(8, self._fd(ruleset)))

    def cgroup(self, join: int) -> None:
        self._parts.append(frames.u32(9, self._fd(join)))

    def cpu_limit(self, nanoseconds: int, usage: int | None) -> None:
        """`usage`: the file that tells the CPU time used; None in a guest, which has its own."""
        self._parts.append(frames.u64(10, nanoseconds))
        if usage is not None:
            self._parts.append(frames.u32(11, self._fd(usage)))

    def flags(self, *, cgroup_namespace: bool = False, enter: bool = False, no_new_privs: bool = True) -> None:
        self._parts.append(frames.u32(12, cgroup_namespace * 1 | enter * 2 | no_new_privs * 4))

    def workdir(self, path: bytes) -> None:
        self._parts.append(frames.string(14, path))

    def capabilities(self, mask: int) -> None:
        self._parts.append(frames.u64(15, mask))

    def seccomp_flags(
        self,
        *,
        notify: bool = False,
        foreign: bool = False,
        kernel: int = 0,
        audit: bool = False,
        answers: bytes = b"",
    ) -> None:
        """kernel: SECCOMP_FILTER_FLAG_LOG (2) and SECCOMP_FILTER_FLAG_SPEC_ALLOW (4). audit, answers: of a guest, whose
        init answers for its filter.
        """
        flags = notify * 1 | foreign * 2 | (kernel & 6) << 1 | audit * 16
        self._parts.append(frames.attribute(19, struct.pack("<I", flags) + answers))

    def give_back(self) -> None:
        """At its end all in the work directory is given to the command's user."""
        self._parts.append(frames.attribute(27))

    def sockets(self, supply: int) -> None:
        """`supply`: on which requests for sockets of the sandbox's network namespace come."""
        self._parts.append(frames.u32(23, self._fd(supply)))

    def tap(self, tun: int) -> None:
        """A tap in the sandbox's network namespace, to be asked for on `sockets`. tun: the folder of the node tun."""
        self._parts.append(frames.u32(22, self._fd(tun)))

    def encode(self) -> bytes:
        return frames.encode(Type.PLAN, b"".join(self._parts), nfds=len(self.fds))


def launch(
    *,
    clone_flags: int,
    uid_map: bytes | None = None,
    gid_map: bytes | None = None,
    kill_uid: int | None = None,
    host_mounts: bool = False,
    joins: Iterable[int] = (),
    offsets_ns: tuple[int, int] | None = None,
    later: bool = False,
    own_network: bool = False,
) -> bytes:
    """LAUNCH; its descriptors are the socket for the answers, then those of the namespaces to join.

    joins: the CLONE_NEW* flag of each, in that order. offsets_ns: how far the monotonic and the boot clock of its own
    time namespace are ahead. later: when it is in no other sandbox's way.
    """
    payload = frames.u64(1, clone_flags)
    if uid_map is not None:
        payload += frames.string(2, uid_map)
    if gid_map is not None:
        payload += frames.string(3, gid_map)
    if kill_uid is not None:
        payload += frames.u32(5, kill_uid)
    if host_mounts:
        payload += frames.attribute(6)
    nfds = 1
    for flag in joins:
        payload += frames.attribute(7, struct.pack("<QI", flag, nfds))
        nfds += 1
    if offsets_ns is not None:
        payload += frames.attribute(8, struct.pack("<qq", *offsets_ns))
    if own_network:
        payload += frames.attribute(9)
    if later:
        payload += frames.attribute(10)
    return frames.encode(Type.LAUNCH, payload, nfds=nfds)


def template(name: bytes, steps: Iterable[MountStep]) -> tuple[bytes, list[int]]:
    """TEMPLATE, and the descriptors that follow the answer socket's."""
    fds: list[int] = []
    parts = [frames.string(9, name)]
    for step in steps:
        if step.fd is not None:
            fds.append(step.fd)
        parts.append(step.without_fd if step.fd is None else step.encode(len(fds)))
    return frames.encode(Type.TEMPLATE, b"".join(parts), nfds=1 + len(fds)), fds


def own(kind: int, name: bytes) -> bytes:
    """OWN; its descriptors are the answer socket and the parent directory."""
    return frames.encode(Type.OWN, frames.u32(1, kind) + frames.string(2, name), nfds=2)


def user_namespace(uid_map: bytes, gid_map: bytes) -> bytes:
    return frames.encode(Type.USERNS, frames.string(2, uid_map) + frames.string(3, gid_map), nfds=1)


def settle() -> bytes:
    """SETTLE; its one descriptor is the answer socket."""
    return frames.encode(Type.SETTLE, nfds=1)


def execute(
    argv: Sequence[bytes],
    env: Iterable[tuple[bytes, bytes]],
    cwd: bytes,
    *,
    id: int,
    once: bool,
    streams: bool,
    nfds: int,
    warm: bool = False,
    own: bool = False,
) -> bytes:
    """EXEC. With `streams`, stdin, stdout and stderr travel as frames; else they are the first descriptors. warm: it is
    no command of the caller's, and doesn't count to the CPU time limit. own: a guest's init executes its own program.
    """
    payload = frames.attribute(1, b"\0".join(argv) + b"\0")
    payload += frames.attribute(2, b"".join(b"%s=%s\0" % pair for pair in env))
    payload += frames.string(3, cwd) + frames.u32(4, once * 1 | streams * 2 | warm * 4 | own * 8)
    return frames.encode(Type.EXEC, payload, id=id, nfds=nfds)


class Started(Value):
    """What the command read back of itself after its last restriction, before exec.

    capabilities: (effective, permitted, inheritable, bounding, ambient), bit masks. ids: (real, effective,
    saved uid, real, effective, saved gid). seccomp: the mode (2 is a filter). namespaces: {name: inode}.
    rlimits: {resource: (soft, hard)}, RLIM_INFINITY as 2**64-1. landlock: whether a ruleset was entered.
    kernel: its release. clock_ns: when that was, by the CLOCK_MONOTONIC of its kernel.
    """

    __slots__ = (
        "capabilities",
        "clock_ns",
        "hostname",
        "ids",
        "kernel",
        "landlock",
        "namespaces",
        "no_new_privs",
        "pid",
        "rlimits",
        "seccomp",
    )
    pid: int
    capabilities: tuple[int, ...]
    ids: tuple[int, ...]
    no_new_privs: bool
    seccomp: int
    namespaces: dict[str, int]
    rlimits: dict[int, tuple[int, int]]
    landlock: bool
    hostname: str
    kernel: str
    clock_ns: int

    def __init__(
        self,
        *,
        pid: int,
        capabilities: tuple[int, ...],
        ids: tuple[int, ...],
        no_new_privs: bool,
        seccomp: int,
        namespaces: dict[str, int],
        rlimits: dict[int, tuple[int, int]],
        landlock: bool,
        hostname: str,
        kernel: str,
        clock_ns: int,
    ) -> None:
        self._set(
            pid=pid,
            capabilities=capabilities,
            ids=ids,
            no_new_privs=no_new_privs,
            seccomp=seccomp,
            namespaces=namespaces,
            rlimits=rlimits,
            landlock=landlock,
            hostname=hostname,
            kernel=kernel,
            clock_ns=clock_ns,
        )


# Not a Value: it is made once a run, when the caller waits for nothing else.
class Exited:
    """How a command ended, from the attributes of EXITED by their numbers.

    exit_code or signal; reason: 0 none, 1 the CPU time limit, 2 killed on request. cpu_user_ns, cpu_system_ns, and
    cpu_ns together: of all that init reaped. io_read_bytes, io_write_bytes: the same, from and to block devices.
    resident_peak_bytes: of its largest process. clock_ns: when the command was reaped, by the CLOCK_MONOTONIC of its
    kernel. All others: of a guest's cgroup, None elsewhere and where its kernel doesn't tell.
    """

    __slots__ = (
        "clock_ns",
        "cpu_ns",
        "cpu_pressure_ns",
        "cpu_system_ns",
        "cpu_user_ns",
        "exit_code",
        "io_pressure_ns",
        "io_read_bytes",
        "io_write_bytes",
        "memory_peak_bytes",
        "memory_pressure_ns",
        "oom_kills",
        "pids_peak",
        "reason",
        "resident_peak_bytes",
        "signal",
        "throttled_ns",
    )

    def __init__(self, values: Mapping[int, int]) -> None:
        get = values.get
        how, status = get(1), get(2, 0)
        if not ((how == 1 and status <= 255) or (how == 2 and 1 <= status <= 64)):
            raise ProtocolError("EXITED says neither an exit status nor a signal")
        self.exit_code = status if how == 1 else None
        self.signal = status if how == 2 else None
        self.cpu_user_ns = get(3, 0)
        self.cpu_system_ns = get(4, 0)
        self.cpu_ns = self.cpu_user_ns + self.cpu_system_ns
        self.resident_peak_bytes = get(5, 0)
        self.reason = get(6, 0)
        self.oom_kills = get(7)
        self.memory_peak_bytes = get(8)
        self.clock_ns = get(9, 0)
        self.io_read_bytes = get(10, 0)
        self.io_write_bytes = get(11, 0)
        self.pids_peak = get(12)
        self.throttled_ns = get(13)
        self.memory_pressure_ns = get(14)
        self.cpu_pressure_ns = get(15)
        self.io_pressure_ns = get(16)


_U32, U64, _SETS, _IDS, _LIMIT = map(struct.Struct, ("<I", "<Q", "<5Q", "<6I", "<IIQQ"))


def unpack(form: struct.Struct, data: bytes, what: str) -> tuple[int, ...]:
    if form.size != len(data):
        raise ProtocolError(f"{what} has {len(data)} bytes")
    return form.unpack(data)


def _text(data: bytes) -> str:
    """A string of the other side's, made fit to print: it may come from a guest."""
    return printable(data.rstrip(b"\0").decode("utf-8", "replace")[:1024], "?")


def parse_error(payload: bytes) -> StartError:
    """The error record, as the exception that it becomes."""
    errno, texts = 0, {2: "", 3: "", 4: ""}
    for tag, data in frames.attributes(payload):
        if tag == 1:
            (errno,) = unpack(_U32, data, "an error's errno")
        elif tag in texts:
            texts[tag] = _text(data)
        else:
            raise ProtocolError(f"an error record has the unknown attribute {tag}")
    return StartError(texts[2], texts[3], errno if errno < 4096 else 0, texts[4])


def parse_started(payload: bytes) -> Started:
    pid, no_new_privs, seccomp, landlock, clock_ns = 0, 0, 0, 0, 0
    # What is missing must never look like a restriction in force.
    capabilities: tuple[int, ...] = (2**64 - 1,) * 5
    ids: tuple[int, ...] = (0,) * 6
    namespaces: dict[str, int] = {}
    rlimits: dict[int, tuple[int, int]] = {}
    hostname = kernel = ""
    for tag, data in frames.attributes(payload):
        if tag == 1:
            (pid,) = unpack(_U32, data, "a pid")
        elif tag == 2:
            capabilities = unpack(_SETS, data, "the capability sets")
        elif tag == 3:
            ids = unpack(_IDS, data, "the ids")
        elif tag == 4:
            (no_new_privs,) = unpack(_U32, data, "no_new_privs")
        elif tag == 5:
            (seccomp,) = unpack(_U32, data, "the seccomp mode")
        elif tag == 6:
            namespaces = _namespaces(data)
        elif tag == 7:
            resource, _, soft, hard = unpack(_LIMIT, data, "a resource limit")
            rlimits[resource] = (soft, hard)
        elif tag == 8:
            (landlock,) = unpack(_U32, data, "landlock")
        elif tag == 9:
            hostname = _text(data)
        elif tag == 10:
            kernel = _text(data)
        elif tag == 11:
            (clock_ns,) = unpack(U64, data, "a time")
        else:
            raise ProtocolError(f"STARTED has the unknown attribute {tag}")
    return Started(
        pid=pid,
        capabilities=capabilities,
        ids=ids,
        no_new_privs=no_new_privs == 1,
        seccomp=seccomp,
        namespaces=namespaces,
        rlimits=rlimits,
        landlock=landlock == 1,
        hostname=hostname,
        kernel=kernel,
        clock_ns=clock_ns,
    )


_NAMESPACES = {name.encode(): name for name in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time")}


def _namespaces(data: bytes) -> dict[str, int]:
    """From "mnt:[4026531841]" and its like, each with its NUL."""
    found = {}
    for entry in data.split(b"\0")[:-1]:
        name, colon, inode = entry.partition(b":[")
        if not colon or not inode.endswith(b"]") or not inode[:-1].isdigit() or len(inode) > 20:
            raise ProtocolError("STARTED names a namespace that is none")
        found[_NAMESPACES.get(name) or _text(name)] = int(inode[:-1])
    return found


_EXITED_U32 = (1, 2, 6)


def parse_exited(payload: bytes) -> Exited:
    values: dict[int, int] = {}
    for tag, data in frames.attributes(payload):
        if not 1 <= tag <= 16:
            raise ProtocolError(f"EXITED has the unknown attribute {tag}")
        if len(data) != (4 if tag in _EXITED_U32 else 8):
            raise ProtocolError(f"an attribute of EXITED has {len(data)} bytes")
        values[tag] = int.from_bytes(data, "little")
    return Exited(values)
