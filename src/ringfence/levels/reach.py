"""What of the host a process may reach: the spec's `readable`, `writable`, `allow` and `publish`, by Landlock.

A path is opened once. What was opened is what is judged, and what the kernel's rule is about, whatever has that name
later. What an older Landlock can't deny, and was asked for, is refused.
"""

from __future__ import annotations

import os
import stat

from ringfence.errors import CannotEnforce, SpecError, Unmet
from ringfence.levels import commands
from ringfence.levels.base import Ability, requested
from ringfence.linux import landlock
from ringfence.result import Applied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.levels.host import Host
    from ringfence.linux.landlock import Ruleset
    from ringfence.spec import Spec
    from ringfence.wire.messages import Started

__all__ = ["abilities", "applied", "is_narrowed", "ruleset", "unmet"]

_CONTAINER = "use isolation='container'"
_RULES = frozenset(("readable", "writable", "allow", "publish", "mounts", "devices"))
# What each kind of access needs of a file's mode, and of a directory's.
_READ = (stat.S_IROTH, stat.S_IROTH | stat.S_IXOTH)
_WRITE = (stat.S_IWOTH, stat.S_IWOTH | stat.S_IXOTH)
_READ_WRITE = (_READ[0] | _WRITE[0], _READ[1] | _WRITE[1])


def abilities(host: Host) -> dict[str, Ability]:
    """Of the process level."""
    found = {}
    none = "this kernel has no Landlock"
    for rule in ("readable", "writable", "mounts", "devices"):
        found[rule] = (
            Ability(rule=rule, mechanism=f"Landlock ABI {host.landlock_abi}")
            if host.landlock_abi
            else Ability(rule=rule, reason=none, help=f"use a kernel with Landlock, or {_CONTAINER[4:]}")
        )
    if host.landlock_abi < landlock.NETWORK_ABI:
        reason = f"Landlock ABI {host.landlock_abi} has no rules for TCP" if host.landlock_abi else none
        found["allow"] = Ability(rule="allow", reason=reason, help=f"use Linux 6.7, or {_CONTAINER[4:]}")
    elif host.seccomp:
        found["allow"] = Ability(rule="allow", reason=host.seccomp, help="install libseccomp: 'ringfence setup'")
    else:
        found["allow"] = Ability(rule="allow", mechanism="Landlock: TCP ports; seccomp: no other sockets")
    found["publish"] = Ability(rule="publish", mechanism="the host's own port")
    found["bandwidth"] = Ability(
        rule="bandwidth", reason="a process has no network stack of its own to limit", help=_CONTAINER
    )
    return found


def is_narrowed(spec: Spec) -> bool:
    """Whether the spec asks for other than the default: all of the host read-only, the work directory writable."""
    return not spec.asked.isdisjoint(_RULES)


# ---- judging ----


def unmet(spec: Spec, host: Host) -> list[Unmet]:
    """What of this very spec can't be had, beyond what `abilities` tells."""
    if not is_narrowed(spec):
        return []
    found = _unmet_network(spec, host)
    if not host.landlock_abi:
        return found  # told once a rule by `abilities`
    found += _older(spec, host)
    for rule, path in _asked(spec):
        fd = _open(rule, path)
        try:
            found += _access(spec, host, rule, path, fd)
        finally:
            os.close(fd)
    if spec.readable is not None and not found:
        found += commands.outside(spec, (*spec.readable, *spec.writable, *(mount.source for mount in spec.mounts)))
    return found


def _asked(spec: Spec) -> list[tuple[str, bytes]]:
    """(rule, path) of every path that is named. A writable mount is judged like a writable path."""
    found = [("readable", path) for path in spec.readable or ()]
    found += [("writable", path) for path in spec.writable]
    return found + [("mounts", mount.source) for mount in spec.mounts if mount.writable]


def _older(spec: Spec, host: Host) -> list[Unmet]:
    """What this kernel's Landlock is too old for."""
    found = []
    abi = host.landlock_abi
    if abi < landlock.TRUNCATE_ABI:
        for rule in sorted(spec.asked & {"writable", "mounts"}):
            found.append(
                Unmet(
                    rule,
                    None,
                    f"Landlock ABI {abi} can't deny truncate(2): files elsewhere could be emptied",
                    f"use Linux 6.2, or {_CONTAINER[4:]}",
                )
            )
    if abi < landlock.DEVICE_CONTROL_ABI:
        for rule, path in _asked(spec):
            real = os.path.realpath(path)
            if real == b"/" or (real + b"/").startswith(b"/dev/") or _is_device(real):
                found.append(
                    Unmet(
                        rule,
                        os.fsdecode(path),
                        f"Landlock ABI {abi} can't deny ioctl(2) on the devices that are there",
                        "name paths without devices, or use Linux 6.10",
                    )
                )
    return found


def _is_device(path: bytes) -> bool:
    mode = os.stat(path).st_mode
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _access(spec: Spec, host: Host, rule: str, path: bytes, fd: int) -> list[Unmet]:
    """Whether the workload's user has the permission, without which Landlock's is worth nothing."""
    verb = "read" if rule == "readable" else "write in"
    if host.privileged:
        user = spec.user if isinstance(spec.user, tuple) else None
        needs = _READ if rule == "readable" else _READ_WRITE
        able = _may(fd, needs, user) and _may_pass(os.path.realpath(path), user)
        # uid 0 without a capability is a user like any other, and so is the slot's, which owns nothing.
        help = "name its owner by user=, or use isolation='container'"
    else:
        mode = os.R_OK if rule == "readable" else os.R_OK | os.W_OK
        able = os.access(f"/proc/self/fd/{fd}", mode, effective_ids=True)
        help = "name a path that you may use yourself"
    if able:
        return _limits_there(spec, host, rule, path, fd) if verb == "write in" else []
    return [Unmet(rule, os.fsdecode(path), f"the workload's uid may not {verb} {os.fsdecode(path)}", help)]


def _limits_there(spec: Spec, host: Host, rule: str, path: bytes, fd: int) -> list[Unmet]:
    """Whether its own limits could be changed in what it may write to."""
    if host.privileged and spec.user is None:
        return []
    from ringfence.levels import owned

    limits = spec.asked & owned.CGROUP_LIMITS
    if not limits or not owned.is_owner(spec, host) or not owned.shows_cgroups(fd):
        return []
    return [Unmet(rule, os.fsdecode(path), owned.why_not_writable(path), "leave cgroups out of what is writable")]


def _may(about: int | bytes, needs: tuple[int, int], user: tuple[int, int] | None) -> bool:
    """Whether a user without capabilities and groups has all of these permissions; user: None is one that owns
    nothing.
    """
    status = os.stat(about)
    wanted = needs[stat.S_ISDIR(status.st_mode)]
    if user is not None and user[0] == status.st_uid:
        wanted <<= 6
    elif user is not None and user[1] == status.st_gid:
        wanted <<= 3
    return status.st_mode & wanted == wanted


def _may_pass(path: bytes, user: tuple[int, int] | None) -> bool:
    """Whether every directory above can be passed through."""
    passing = (0, stat.S_IXOTH)
    while path != b"/":
        path = os.path.dirname(path)
        if not _may(path, passing, user):
            return False
    return True


def _unmet_network(spec: Spec, host: Host) -> list[Unmet]:
    network = spec.network
    found: list[Unmet] = []
    if network.mode != "host":
        return found  # nat is refused as a whole
    for one in network.allow or ():
        if one.host != "*":
            found.append(
                Unmet(
                    "allow",
                    str(one),
                    "Landlock knows ports, and neither names nor addresses",
                    f"allow '*:{one.port or '*'}', or use isolation='container' with network='nat'",
                )
            )
    if network.allow is not None and "seccomp" in spec.asked:
        found.append(
            Unmet(
                "allow",
                requested(spec, "allow"),
                "a filter of its own leaves nothing but TCP, and there can't be two",
                "leave seccomp out, or use isolation='container'",
            )
        )
    for outer, inner in network.publish:
        if outer != inner:
            found.append(
                Unmet(
                    "publish",
                    network.publish,
                    "a process has the host's ports: none leads to another",
                    f"let it listen at {outer}, or use isolation='container'",
                )
            )
        elif outer < _first_unprivileged_port():
            found.append(
                Unmet(
                    "publish",
                    network.publish,
                    f"port {outer} needs CAP_NET_BIND_SERVICE, which the workload hasn't",
                    "use a port from 1024 on, or isolation='container'",
                )
            )
    return found


def _first_unprivileged_port() -> int:
    try:
        with open("/proc/sys/net/ipv4/ip_unprivileged_port_start", "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 1024


# ---- enforcing ----


def _open(rule: str, path: bytes) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise SpecError(f"{rule}: {os.fsdecode(path)!r} can't be opened: {error.strerror}") from None


def ruleset(spec: Spec, host: Host, workdir: int) -> Ruleset:
    """The Landlock ruleset of a spec that `is_narrowed`. workdir: a descriptor of the work directory.

    Raises CannotEnforce where a path has changed since it was judged, so that it can't be had any more.
    """
    opened: list[int] = []
    try:
        readable: list[int] | None = None if spec.readable is None else []
        writable = [workdir]
        changed: list[Unmet] = []
        for rule, path in _asked(spec):
            fd = _open(rule, path)
            opened.append(fd)
            changed += _access(spec, host, rule, path, fd)
            if rule != "readable":
                writable.append(fd)
            elif readable is not None:
                readable.append(fd)
        if changed:
            raise CannotEnforce("process", changed)
        for mount in spec.mounts:
            if readable is not None:
                opened.append(_open("mounts", mount.source))
                readable.append(opened[-1])
        made = landlock.of_paths(readable, writable, network=_handled(spec), version=host.landlock_abi)
        try:
            for one in spec.network.allow or ():
                if one.port is not None:
                    made.allow_port(one.port, landlock.CONNECT_TCP)
            for port, _ in spec.network.publish:
                made.allow_port(port, landlock.BIND_TCP)
            for device in spec.devices:
                opened.append(_open("devices", device.source))
                made.allow(opened[-1], landlock.device_access(device.access))
        except BaseException:
            made.close()
            raise
        return made
    finally:
        for fd in opened:
            os.close(fd)


def _handled(spec: Spec) -> int:
    """The rights on TCP ports that are taken away, but for those that are given back one by one."""
    network = spec.network
    if network.mode == "none":
        return landlock.BIND_TCP | landlock.CONNECT_TCP
    if network.allow is None:
        return 0
    anywhere = any(one.port is None for one in network.allow)
    return landlock.BIND_TCP | (0 if anywhere else landlock.CONNECT_TCP)


# ---- telling ----


def applied(spec: Spec, started: Started, mechanism: str) -> list[Applied]:
    """The rows of `allow` and `publish`, and of each path."""
    found = []
    in_force = bool(started.landlock)
    for rule, paths in (("readable", spec.readable), ("writable", spec.writable or None)):
        if paths is not None:
            shown = [os.fsdecode(path) for path in paths]
            found.append(
                Applied(rule=rule, requested=shown, effective=shown if in_force else None, mechanism=mechanism)
            )
    network = spec.network
    if network.allow is not None:
        allowed = [str(one) for one in network.allow]
        found.append(
            Applied(
                rule="allow",
                requested=allowed,
                effective=allowed if in_force and started.seccomp == 2 else None,
                mechanism="Landlock: TCP ports; seccomp: no other sockets, so no names are resolved (DNS by UDP)",
            )
        )
    if network.publish:
        ports = [f"{outer}:{inner}" for outer, inner in network.publish]
        found.append(
            Applied(rule="publish", requested=ports, effective=ports, mechanism="the host's own port, at any address")
        )
    return found
