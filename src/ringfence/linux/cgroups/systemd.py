"""A cgroup from systemd, for a process whose own one isn't delegated: a transient scope, asked for over D-Bus.

systemd owns the tree of cgroups, and everything below a unit with Delegate=yes is that unit's own (systemd's document
"Control Group APIs and Delegation"). The process that the scope is made of is the launcher: what it starts is born in
the scope, and may so move on within it, while this process stays where it is. When the launcher is gone, the scope is
empty, and systemd removes it.

A user's own manager moves processes that are in its part of the tree; for one that isn't, such as a login session's, it
asks the system's manager, which checks that the process is the user's.
"""

from __future__ import annotations

import errno
import os
import time

from ringfence._value import Value
from ringfence.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.linux.dbus import Bus

__all__ = ["Systemd", "find", "places", "start_scope"]

_NAME, _PATH = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
_MANAGER = "org.freedesktop.systemd1.Manager"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_MOVE_S = 10.0


class Systemd(Value):
    """A manager that answers.

    socket: where. hello: whether that is a bus, which is to be greeted, or the manager's own socket. path: the
    directory of its own cgroup. controllers: those that it can hand on. mount: where cgroups of version 2 are mounted.
    """

    __slots__ = ("controllers", "hello", "mount", "path", "socket")
    socket: str
    hello: bool
    path: bytes
    controllers: frozenset[str]
    mount: bytes

    def __init__(self, *, socket: str, hello: bool, path: bytes, controllers: frozenset[str], mount: bytes) -> None:
        self._set(socket=socket, hello=hello, path=path, controllers=controllers, mount=mount)


def _sockets() -> list[tuple[str, bool]]:
    """(path, whether it is a bus) of those that this user's manager may answer on, the best first."""
    if os.geteuid() == 0:
        return [("/run/systemd/private", False)]
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    found = [(runtime + "/systemd/private", False)]
    for address in os.environ.get("DBUS_SESSION_BUS_ADDRESS", "").split(";"):
        kind, _, where = address.partition(":")
        path = dict(pair.partition("=")[::2] for pair in where.split(",")).get("path")
        if kind == "unix" and path:
            found.append((path, True))
    return [*found, (runtime + "/bus", True)]


def places() -> list[str]:
    """Where any manager may be asked for something: this user's, and the system's, for what is this user's there."""
    own = [path for path, _ in _sockets()]
    return [*own, "/run/systemd/private", "/run/dbus/system_bus_socket"]


def find(mount: bytes) -> Systemd | str:
    """The manager to ask, or why there is none."""
    from ringfence.linux.dbus import Bus, BusError

    reason = "no systemd manager of this user's is running"
    for path, hello in _sockets():
        if not os.path.exists(path):
            continue
        try:
            with Bus(path, hello=hello) as bus:
                group = _control_group(bus)
        except (BusError, OSError) as error:
            reason = f"systemd doesn't answer on {path}: {error}"
            continue
        own = mount + os.fsencode(group).rstrip(b"/")
        try:
            with open(own + b"/cgroup.controllers", encoding="ascii") as file:
                controllers = frozenset(file.read().split())
        except OSError as error:
            reason = f"systemd's own cgroup {group or '/'} can't be seen here: {error.strerror}"
            continue
        return Systemd(socket=path, hello=hello, path=own, controllers=controllers, mount=mount)
    return reason


def _control_group(bus: Bus) -> str:
    from ringfence.linux.dbus import BusError

    answer = bus.call(_NAME, _PATH, _PROPERTIES, "Get", "ss", (_MANAGER, "ControlGroup"))
    if len(answer) != 1 or not isinstance(answer[0], str) or ".." in answer[0].split("/"):
        raise BusError("its ControlGroup is no path")
    return answer[0]


def start_scope(manager: Systemd, pid: int) -> bytes:
    """Has a process that is this user's moved into a new scope, which is delegated. The directory of its cgroup.

    Raises KernelError with systemd's own words where it refuses, or doesn't do it in time.
    """
    from ringfence.linux.dbus import Bus, BusError, Variant

    unit = f"ringfence-{os.getpid()}-{os.urandom(4).hex()}.scope"
    properties = [
        ("Description", Variant("s", f"ringfence's sandboxes of process {os.getpid()}")),
        ("PIDs", Variant("au", [pid])),
        ("Delegate", Variant("b", True)),
        ("CollectMode", Variant("s", "inactive-or-failed")),  # a failed one isn't kept for anybody to look at
    ]
    try:
        with Bus(manager.socket, hello=manager.hello) as bus:
            bus.call(_NAME, _PATH, _MANAGER, "StartTransientUnit", "ssa(sv)a(sa(sv))", (unit, "fail", properties, []))
    except (BusError, OSError) as error:
        raise KernelError("StartTransientUnit", (unit,), errno.EACCES, f"systemd refused a scope: {error}") from None
    # The answer only says that the job is queued. That the process is there says that it is done.
    deadline = time.monotonic() + _MOVE_S
    while True:
        own = _cgroup_of(pid)
        if own.endswith(b"/" + unit.encode()):
            return manager.mount + own
        if time.monotonic() >= deadline:
            reason = f"systemd took the scope, but {pid} is still in {os.fsdecode(own)}"
            raise KernelError("StartTransientUnit", (unit,), errno.ETIMEDOUT, reason)
        time.sleep(0.002)


def _cgroup_of(pid: int) -> bytes:
    """The path of a process's cgroup of version 2, or b""."""
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as file:
            for line in file.read().splitlines():
                if line.startswith(b"0::"):
                    return line[3:]
    except FileNotFoundError:
        pass
    return b""
