"""What a spec says of a container's namespaces: what can't be had, which ones are opened, and how they are told.

What is shared or joined is opened once, by descriptor, and its type asked of the kernel; the launcher enters by these
descriptors.
"""

from __future__ import annotations

import os

from ringfence.errors import CannotEnforce, SpecError, Unmet
from ringfence.levels.base import requested
from ringfence.levels.namespaces import FLAGS, Joined, Shared, ours, own_namespaces
from ringfence.result import Applied
from ringfence.spec.boundary import NAMESPACES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.levels.base import Outcome
    from ringfence.levels.host import Host
    from ringfence.spec import Spec

__all__ = ["applied", "choose", "unmet"]

# ioctl_ns(2): _IO(0xb7, 0x3).
_NS_GET_NSTYPE = 0xB703

_HELP_FILES = "use isolation='process', which sees the host's files"
_HELP_ROOT = "run as root, or join its user namespace as well"


def unmet(spec: Spec, host: Host) -> list[Unmet]:
    """What of `namespaces=` can't be had on this host, as far as that can be told before anything is opened."""
    wanted = spec.namespaces
    if not wanted.asked:
        return []
    kinds = {}
    for name in NAMESPACES:
        value = getattr(wanted, name)
        kinds[name] = value if value in ("own", "host") else "joined"
    found = _refused(kinds, spec, host)
    lacking = sorted(name for name in wanted.asked if name in NAMESPACES and name not in ours())
    lacking += ["time"] if _offsets(spec) is not None and "time" not in ours() and "time" not in lacking else []
    for name in lacking:
        found.append(_rule(name, spec, "this kernel has no such namespace", "use a newer kernel"))
    return found


def _rule(name: str, spec: Spec, reason: str, help: str) -> Unmet:
    value = getattr(spec.namespaces, name)
    return Unmet("namespaces", f"{name}={os.fsdecode(value) if isinstance(value, bytes) else value}", reason, help)


def _refused(kinds: dict[str, str], spec: Spec, host: Host) -> list[Unmet]:
    """kinds: "own", "host" or "joined" by name."""
    found = []
    if kinds["mnt"] != "own":
        reason = "a file tree of its own is what makes it a container"
        found.append(_rule("mnt", spec, reason, _HELP_FILES))
    if host.privileged:
        found += _refused_to_root(kinds, spec)
    else:
        found += _refused_unprivileged(kinds, spec)
    if kinds["user"] == "host" and spec.user is not None:
        reason = "with the host's user namespace ringfence chooses an id that no account has"
        found.append(Unmet("user", spec.user, reason, "leave user= out, or user='own' among the namespaces"))
    found += _refused_capabilities(kinds, spec)
    if kinds["user"] != "own":
        for rule in sorted(spec.asked & {"overlay", "devices", "disk"}):
            reason = "what it makes must belong to a user namespace of the sandbox's own"
            found.append(Unmet(rule, requested(spec, rule), reason, "leave user= out of the namespaces"))
    if kinds["uts"] != "own" and spec.hostname is not None:
        reason = f"the host name is that of the {'host' if kinds['uts'] == 'host' else 'joined namespace'}"
        found.append(Unmet("hostname", spec.hostname, reason, "leave hostname= or uts= out"))
    if kinds["ipc"] == "host":
        if host.seccomp:
            reason = f"nothing would keep the host's System V IPC from it: {host.seccomp}"
            found.append(_rule("ipc", spec, reason, "install libseccomp: 'ringfence setup'"))
        elif "seccomp" in spec.asked:
            reason = "only the default filter keeps the host's System V IPC from it"
            found.append(_rule("ipc", spec, reason, "leave seccomp= or ipc='host' out"))
    return found


def _refused_capabilities(kinds: dict[str, str], spec: Spec) -> list[Unmet]:
    """They must count in namespaces of its own, and nowhere else. `levels.capabilities` tells what else they need."""
    if not spec.capabilities:
        return []
    reasons = {}
    if kinds["pid"] != "own":
        reasons["pid"] = "without a PID namespace of its own they can't be kept from the masks over /proc"
    if kinds["ipc"] == "host":
        reasons["ipc"] = "the filter that keeps the host's System V IPC from it is the one without capabilities"
    return [
        Unmet("capabilities", spec.capabilities, reason, f"leave {name}= out of the namespaces")
        for name, reason in reasons.items()
    ]


def _refused_to_root(kinds: dict[str, str], spec: Spec) -> list[Unmet]:
    if kinds["pid"] == "joined" and kinds["user"] == "own":
        reason = "a user namespace of its own may not mount the /proc of another PID namespace"
        return [_rule("pid", spec, reason, "add user='host': the workload still gets an id that no account has")]
    if kinds["pid"] != "own" and kinds["user"] == "joined":
        reason = "its processes couldn't be told from others of that user namespace, to end them"
        return [_rule("pid", spec, reason, "join the PID namespace with user='host' instead")]
    return []


def _refused_unprivileged(kinds: dict[str, str], spec: Spec) -> list[Unmet]:
    found = []
    if kinds["user"] == "host":
        reason = "an unprivileged caller can make the other namespaces only in a user namespace of its own"
        found.append(_rule("user", spec, reason, "run as root"))
    if kinds["pid"] != "own":
        reason = "its processes couldn't be told from your own, to end them"
        found.append(_rule("pid", spec, reason, "run as root"))
    if kinds["user"] != "joined":
        for name, kind in kinds.items():
            if kind == "joined" and name not in ("mnt", "pid"):
                reason = "joining it needs CAP_SYS_ADMIN in the user namespace that owns it"
                found.append(_rule(name, spec, reason, _HELP_ROOT))
    return found


def _offsets(spec: Spec) -> tuple[int, int] | None:
    found = (spec.namespaces.monotonic_offset_ns, spec.namespaces.boottime_offset_ns)
    return found if any(found) else None


# ---- opening ----


def choose(spec: Spec, host: Host, keep_fd: Callable[[int], int]) -> Shared:
    """What the spec asks for, with the namespaces to join open. keep_fd: takes each descriptor, to close it later.

    Raises SpecError where there is no such namespace, CannotEnforce where one turns out to be the host's and may not.
    """
    kinds: dict[str, str | Joined] = {}
    for name in NAMESPACES:
        value = getattr(spec.namespaces, name)
        if value in ("own", "host"):
            kinds[name] = value
            continue
        fd = keep_fd(_open(name, value))
        about = os.fstat(fd)
        # What is the host's by another name is no less the host's.
        if (about.st_dev, about.st_ino) == ours().get(name):
            kinds[name] = "host"
        else:
            kinds[name] = Joined(name, fd, f"pid {value}" if isinstance(value, int) else os.fsdecode(value))
    words = {name: "joined" if isinstance(kind, Joined) else kind for name, kind in kinds.items()}
    refused = _refused(words, spec, host)
    if refused:
        raise CannotEnforce("container", refused)
    return Shared(kinds, _offsets(spec))


def _open(name: str, value: bytes | int) -> int:
    shown = f"the {name} namespace of pid {value}" if isinstance(value, int) else os.fsdecode(value)
    try:
        fd = _open_of_pid(name, value) if isinstance(value, int) else os.open(value, _HOW)
    except OSError as error:
        raise SpecError(f"namespaces: {shown}: {error.strerror}") from None
    try:
        import fcntl

        try:
            kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
        except OSError:
            raise SpecError(f"namespaces: {name}: {shown} is no namespace") from None
        if kind != FLAGS[name]:
            found = next((one for one, flag in FLAGS.items() if flag == kind), "another")
            raise SpecError(f"namespaces: {name}: {shown} is a {found} namespace")
    except BaseException:
        os.close(fd)
        raise
    return fd


# A path may lead to anything: not to wait for a FIFO's other end, nor to get a terminal.
_HOW = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def _open_of_pid(name: str, pid: int) -> int:
    """The process's own: that its pidfd still lives afterwards shows that the number was its all the time."""
    import select

    pidfd = os.pidfd_open(pid)
    try:
        fd = os.open(f"/proc/{pid}/ns/{name}", _HOW)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if poll.poll(0):
            os.close(fd)
            raise ProcessLookupError(3, "No such process")
        return fd
    finally:
        os.close(pidfd)


# ---- telling ----


def applied(spec: Spec, shared: Shared, outcome: Outcome, *, host_network: bool) -> list[Applied]:
    """Each namespace as the command read it, and how it was come by."""
    started = outcome.started
    assert started is not None
    ours = own_namespaces()
    found = []
    for name in ours:
        inode = started.namespaces.get(name)
        kind = shared.kinds.get(name, "own")
        if isinstance(kind, Joined):
            wanted: str | None = kind.label
            holds, how = inode == kind.inode, f"joined: {kind.label}, by setns"
        elif kind == "host" or (name == "net" and host_network):
            wanted = "host" if name in spec.namespaces.asked else None
            holds, how = inode == ours.get(name), "the host's"
        else:
            wanted = "own"
            holds, how = inode != ours.get(name), "its own, by /proc/self/ns"
        if inode is None:
            holds, how = False, "it was not told"  # which is never a restriction
        elif not holds:
            how = "the host's" if inode == ours.get(name) else "another one"
        found.append(
            Applied(rule=f"namespace {name}", requested=wanted, effective=inode if holds else None, mechanism=how)
        )
    if shared.offsets_ns is not None:
        monotonic, boottime = shared.offsets_ns
        # The command's clock at its start, less ours when we heard of it: a little less than what was asked for.
        late = monotonic - (started.clock_ns - outcome.started_ns)
        for rule, value, holds in (
            ("monotonic_offset", monotonic, abs(late) < _MOST_LATE_NS),
            ("boottime_offset", boottime, True),
        ):
            if rule in spec.namespaces.asked:
                how = "time namespace, /proc/PID/timens_offsets"
                found.append(Applied(rule=rule, requested=value, effective=value if holds else None, mechanism=how))
    return found


# More than a report takes on the busiest machine, ns.
_MOST_LATE_NS = 10 * 10**9
