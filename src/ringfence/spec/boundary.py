"""The rules of a spec that change the boundary itself: namespaces, capabilities, the filter, devices."""

from __future__ import annotations

import os
import stat

from ringfence._value import Later, Value
from ringfence.errors import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from ringfence.spec import parse

    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
else:
    parse = Later("ringfence.spec.parse")  # most specs have nothing to be parsed

__all__ = [
    "CAPABILITIES",
    "NAMESPACES",
    "Device",
    "Kernel",
    "Namespaces",
    "Seccomp",
    "capabilities",
    "capability_names",
]

NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time")

# include/uapi/linux/capability.h: the number of each is its place.
CAPABILITIES = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID"),
    *("CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST"),
    *("CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO"),
    *("CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE"),
    *("CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE"),
    *("CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM"),
    *("CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE"),
)

# What a clock's offset may be: proc_timens_set_offset refuses what could overflow in the kernel's life.
_MOST_OFFSET_NS = 2**62


class Namespaces(Value):
    """Which namespaces a container has of its own, shares with the host, or joins.

    Each of user, mnt, pid, net, ipc, uts, cgroup and time is "own" (the default), "host", a path such as
    "/proc/1234/ns/net" or "/run/netns/blue", or the pid of a process whose namespace is joined.
    monotonic_offset, boottime_offset: how far the clocks of an own time namespace are ahead of the host's ("1h", "-30s"
    or seconds) -> *_ns.
    asked: the names that were given.

    Raises SpecError.
    """

    __slots__ = (*NAMESPACES, "asked", "boottime_offset_ns", "monotonic_offset_ns")
    user: str | bytes | int
    mnt: str | bytes | int
    pid: str | bytes | int
    net: str | bytes | int
    ipc: str | bytes | int
    uts: str | bytes | int
    cgroup: str | bytes | int
    time: str | bytes | int
    monotonic_offset_ns: int
    boottime_offset_ns: int
    asked: frozenset[str]

    def __init__(
        self,
        *,
        user: Path | int | None = None,
        mnt: Path | int | None = None,
        pid: Path | int | None = None,
        net: Path | int | None = None,
        ipc: Path | int | None = None,
        uts: Path | int | None = None,
        cgroup: Path | int | None = None,
        time: Path | int | None = None,
        monotonic_offset: str | int | float = 0,
        boottime_offset: str | int | float = 0,
    ) -> None:
        given = {
            "user": user,
            "mnt": mnt,
            "pid": pid,
            "net": net,
            "ipc": ipc,
            "uts": uts,
            "cgroup": cgroup,
            "time": time,
        }
        offsets = {
            "monotonic_offset": _offset(monotonic_offset, "monotonic_offset"),
            "boottime_offset": _offset(boottime_offset, "boottime_offset"),
        }
        chosen = {name: "own" if value is None else _namespace(name, value) for name, value in given.items()}
        if any(offsets.values()) and chosen["time"] != "own":
            raise SpecError("namespaces: clocks are only set ahead in a time namespace of its own")
        asked = {name for name, value in given.items() if value is not None}
        self._set(
            **chosen,
            **{f"{name}_ns": value for name, value in offsets.items()},
            asked=frozenset(asked | {name for name, value in offsets.items() if value}),
        )

    def _init_arguments(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) if name in self.asked else None for name in NAMESPACES},
            "monotonic_offset": self.monotonic_offset_ns / 10**9,
            "boottime_offset": self.boottime_offset_ns / 10**9,
        }


def _namespace(name: str, value: Any) -> str | bytes | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return parse.count(value, f"namespaces: {name}: a pid", 1, 2**22)
    if value in ("own", "host"):
        return str(value)
    found = parse.path_bytes(value, f"namespaces: {name}")
    if not found.startswith(b"/"):
        raise SpecError(f"namespaces: {name} must be 'own', 'host', an absolute path or a pid, not {value!r}")
    return found


def _offset(value: str | int | float, what: str) -> int:
    if value in (0, "0"):
        return 0
    negative = value.startswith("-") if isinstance(value, str) else value < 0
    size = value.removeprefix("-") if isinstance(value, str) else abs(value)
    found = parse.duration(size, f"namespaces: {what}")
    if found > _MOST_OFFSET_NS:
        raise SpecError(f"namespaces: {what} is more than the kernel takes: {value}")
    return -found if negative else found


class Seccomp(Value):
    """Which system calls a workload may make, and what becomes of the others.

    profile: "default" (after Docker's), "unconfined", the path of an OCI or Docker profile in JSON, or such a profile
    as a dict.
    mode: "enforce" denies without a word; "report" denies and lists in `Result.denials` what was denied; "audit" lets
    it through and lists it: for finding out what a workload needs, with code that is trusted.

    Raises SpecError. Source: runtime-spec, config-linux.md, "Seccomp".
    """

    __slots__ = ("mode", "profile")
    # A name, a path as bytes, or the text of a profile in JSON.
    profile: str | bytes
    mode: str

    def __init__(self, profile: Path | Mapping[str, Any] = "default", *, mode: str = "enforce") -> None:
        if mode not in ("enforce", "report", "audit"):
            raise SpecError(f"seccomp mode must be 'enforce', 'report' or 'audit', not {mode!r}")
        self._set(profile=_profile(profile), mode=mode)


def _profile(profile: Any) -> str | bytes:
    if isinstance(profile, str) and (profile in ("default", "unconfined") or profile.startswith("{")):
        return profile
    if hasattr(profile, "items"):
        import json

        try:
            return json.dumps(profile, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise SpecError(f"seccomp: the profile can't be written as JSON: {error}") from None
    return parse.host_path(profile, "seccomp: a profile")


class Device(Value):
    """A device node of the host to show inside, beside the standard ones.

    source: its path on the host, below /dev. target: its path inside, below /dev; the same by default.
    access: "r", "w" or "rw".

    Raises SpecError. Whether the source is a device is checked when a spec is made of it.
    """

    __slots__ = ("access", "source", "target")
    source: bytes
    target: bytes
    access: str

    def __init__(self, source: Path, target: Path | None = None, access: str = "rw") -> None:
        if access not in ("r", "w", "rw"):
            raise SpecError(f"a device's access must be 'r', 'w' or 'rw', not {access!r}")
        outside = parse.absolute_path(source, "a device's source")
        inside = outside if target is None else parse.absolute_path(target, "a device's target")
        for path in (outside, inside):
            if not path.startswith(b"/dev/"):
                raise SpecError(f"a device is below /dev, and {parse.shown(path)} isn't")
        self._set(source=outside, target=inside, access=access)


# COMMAND_LINE_SIZE of x86 is 2048, and ours take some 300.
_MOST_APPEND = 1024


class Kernel(Value):
    """The kernel of a virtual machine, in place of the one that `ringfence setup` prepared.

    path: a bzImage, an uncompressed ELF kernel, or a kernel package (.deb); built with CONFIG_PVH and what a guest is
    made of: virtio_console and, unless its modules are at hand, virtio_mmio by ACPI (virtio_pci on the machine q35).
    modules: its /lib/modules/<release>; without it that folder is looked for beside the image, above it, and on
    this host. A kernel that has all built in needs none.
    append: more of its command line.

    Raises SpecError.
    """

    __slots__ = ("append", "modules", "path")
    path: bytes
    modules: bytes | None
    append: str

    def __init__(self, path: Path, modules: Path | None = None, append: str = "") -> None:
        if not (append.isascii() and append.isprintable()):
            raise SpecError("kernel: append must be one line of ASCII")
        if len(append) > _MOST_APPEND:
            raise SpecError(f"kernel: append has {len(append)} characters: at most {_MOST_APPEND} are taken")
        if any(word.startswith("rf.") for word in append.replace('"', " ").split()):
            raise SpecError("kernel: append must not have words that begin with 'rf.': they are ringfence's own")
        self._set(
            path=_real(path, "kernel", stat.S_ISREG, "file"),
            modules=None if modules is None else _real(modules, "kernel modules", stat.S_ISDIR, "folder"),
            append=append,
        )


def _real(path: Path, what: str, is_kind: Any, kind: str) -> bytes:
    """The real path of something of the host that is there."""
    given = parse.host_path(path, what)
    try:
        real = os.path.realpath(given, strict=True)
        found = os.stat(real).st_mode
    except OSError as error:
        raise SpecError(f"{what}: {os.fsdecode(given)!r} is no {kind} ({error.strerror})") from None
    if not is_kind(found):
        raise SpecError(f"{what}: {os.fsdecode(given)!r} is no {kind}")
    return real


def capabilities(names: Any) -> tuple[str, ...]:
    """Names of capabilities as the kernel has them, sorted by number, from "net_raw", "CAP_NET_RAW" and their like."""
    if isinstance(names, (str, bytes)) or not hasattr(names, "__iter__"):
        raise SpecError(f"capabilities must be a list of names, not {names!r}")
    found = set()
    for one in names:
        name = one.upper() if isinstance(one, str) else ""
        name = name if name.startswith("CAP_") else f"CAP_{name}"
        if name not in CAPABILITIES:
            raise SpecError(f"capabilities: {one!r} is none: see capabilities(7)")
        found.add(name)
    return tuple(sorted(found, key=CAPABILITIES.index))


def capability_names(held: int) -> tuple[str, ...]:
    """A set's capabilities by name, from the kernel's bits; one that nobody knows by its number."""
    found = [name for number, name in enumerate(CAPABILITIES) if held >> number & 1]
    found += [f"CAP_{number}" for number in range(len(CAPABILITIES), 64) if held >> number & 1]
    return tuple(found)
