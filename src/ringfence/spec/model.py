"""The spec: one frozen value that says what to run and under which rules, the same for every level.

`Spec.make` takes what people write and is the only place where it is judged; everything below it can trust a
Spec.
"""

from __future__ import annotations

import os
import stat

from ringfence._value import Later, Value
from ringfence.errors import SpecError
from ringfence.spec import boundary
from ringfence.spec.boundary import Device, Kernel, Namespaces, Seccomp
from ringfence.spec.network import Network
from ringfence.spec.rules import File, FileIn, Limits, Mount, Tmpfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any, Unpack

    from ringfence.comparison.choice import Choice
    from ringfence.spec import parse
    from ringfence.spec.options import Options

    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
else:
    parse = Later("ringfence.spec.parse")  # most specs have nothing to be parsed

__all__ = ["AUTO", "DEFAULT_ENV", "ISOLATIONS", "Spec"]

ISOLATIONS = ("process", "container", "vm")
# In place of one of these: whichever is the cheapest that will do.
AUTO = "auto"

# The whole environment of a workload whose caller gives none, but for HOME, which is its work directory.
DEFAULT_ENV = (
    (b"PATH", b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    (b"LANG", b"C.UTF-8"),
    (b"TERM", b"dumb"),
)

# MAX_ARG_STRLEN of include/uapi/linux/binfmts.h: 32 pages, the NUL included.
_MOST_STRING_BYTES = 32 * 4096
# argv and environment together, each string with its NUL and its pointer: half of what execve(2) takes at the
# usual 8 MiB stack, and within one frame to init.
_MOST_STRINGS_BYTES = 2**20
# __NEW_UTS_LEN of include/uapi/linux/utsname.h.
_MOST_HOSTNAME_BYTES = 64
# (uid_t)-1 means "leave it" to setresuid(2), so it is no id.
_MOST_ID = 2**32 - 2

_NO_LIMITS = Limits()
_NO_NETWORK = Network("none")
_OWN_NAMESPACES = Namespaces()
_DEFAULT_SECCOMP = Seccomp()

# Options that mean the same at any time, where a path may be another file by the next call, and types whose values
# can't change. Most calls differ from the one before in their command alone, so what all else says is judged once.
_LASTING = frozenset(("isolation", "network", "limits", "hostname", "check", "text"))
_FROZEN = frozenset((str, bool, type(None), Limits, Network))


class Spec(Value):
    """What to run and under which rules, judged and normalised. Made by `Spec.make`; the fields are trusted.

    argv: the command, bytes. isolation: "process", "container" or "vm"; "auto" until one is chosen.
    require: (resource, "own" or "restricted") pairs, sorted: what the level has to isolate. choice: how the level was
    chosen, or found to meet that; None where nothing was to be chosen, or it isn't yet.
    input: all of stdin; None is an empty one. env: the caller's own variables (see `environment`).
    files: what goes into the work directory. collect: patterns of what comes back (`parse.match_pattern`).
    mounts, tmpfs: sorted by target, so that parents come first. image: "host" or the absolute path of a rootfs
    folder or of a disk image. overlay: whether the root can be written to, in a layer that is gone with the sandbox.
    user: (uid, gid) inside, a name that the level has to resolve there, or None for the level's default.
    hostname: or None for the level's default. network, limits, namespaces, seccomp: as given.
    capabilities: names, sorted by number. devices: sorted by target.
    kernel: of a virtual machine, or None for the one that is prepared for all.
    readable: the only paths that may be read besides the work directory, or None for all. writable: paths that may be
    written to besides it.
    check: whether an end other than exit status 0 is an exception. text: whether stdout and stderr are str.
    asked: the names of the rules that the caller gave explicitly; a level must enforce these or refuse.
    """

    __slots__ = (
        "argv",
        "asked",
        "capabilities",
        "check",
        "choice",
        "collect",
        "devices",
        "env",
        "files",
        "hostname",
        "image",
        "input",
        "isolation",
        "kernel",
        "limits",
        "mounts",
        "namespaces",
        "network",
        "overlay",
        "readable",
        "require",
        "seccomp",
        "text",
        "tmpfs",
        "user",
        "writable",
    )
    argv: tuple[bytes, ...]
    isolation: str
    input: bytes | None
    env: tuple[tuple[bytes, bytes], ...]
    files: tuple[FileIn, ...]
    collect: tuple[bytes, ...]
    mounts: tuple[Mount, ...]
    tmpfs: tuple[Tmpfs, ...]
    image: str
    overlay: bool
    user: tuple[int, int] | str | None
    hostname: str | None
    network: Network
    limits: Limits
    namespaces: Namespaces
    capabilities: tuple[str, ...]
    seccomp: Seccomp
    devices: tuple[Device, ...]
    kernel: Kernel | None
    readable: tuple[bytes, ...] | None
    writable: tuple[bytes, ...]
    check: bool
    text: bool
    asked: frozenset[str]
    require: tuple[tuple[str, str], ...]
    choice: Choice | None

    def __init__(
        self, *, require: tuple[tuple[str, str], ...] = (), choice: Choice | None = None, **fields: Any
    ) -> None:
        self._set(require=require, choice=choice, **fields)

    @classmethod
    def make(cls, argv: Sequence[Path], **options: Unpack[Options]) -> Spec:
        """The spec of a run, from the arguments of `rf.run`. Raises SpecError; nothing is started.

        image, user, hostname, network, namespaces, seccomp: None is the default (image "host", network "none"), which
        nobody asked for and a level may therefore apply as far as the host lets it. env: {name: value}, each str or
        bytes. files: {path: bytes, str, File or (data, mode)}. readable, writable: paths that exist.
        """
        global _last
        known, made = _last
        lasting = options.keys() <= _LASTING and _FROZEN.issuperset(map(type, options.values()))
        if lasting and made is not None and known == options:
            command = _argv(argv)
            _check_exec_size(command, ())
            return made._changed(argv=command)
        made = cls._judged(argv, **options)
        if lasting:
            _last = (options, made)
        return made

    @classmethod
    def _judged(
        cls,
        argv: Sequence[Path],
        *,
        isolation: str = "container",
        input: bytes | bytearray | memoryview | str | None = None,
        env: Mapping[Any, Any] | None = None,
        files: Mapping[Any, Any] | None = None,
        collect: Iterable[Path] = (),
        mounts: Iterable[Mount | Tmpfs] = (),
        image: Path | None = None,
        overlay: bool = False,
        user: int | str | None = None,
        hostname: str | None = None,
        network: str | Network | None = None,
        limits: Limits | None = None,
        namespaces: Namespaces | Mapping[str, Any] | None = None,
        capabilities: Iterable[str] = (),
        seccomp: str | Mapping[str, Any] | Seccomp | None = None,
        devices: Iterable[Device | Path] = (),
        kernel: Kernel | Path | None = None,
        readable: Iterable[Path] | None = None,
        writable: Iterable[Path] = (),
        require: Mapping[str, str] | None = None,
        check: bool = False,
        text: bool = False,
    ) -> Spec:
        """The one signature; `spec.options` has it as a type."""
        if isolation not in ISOLATIONS and isolation != AUTO:
            raise SpecError(f"isolation must be 'process', 'container', 'vm' or 'auto', not {isolation!r}")
        if limits is not None and not isinstance(limits, Limits):
            raise SpecError(f"limits must be Limits(...), not {type(limits).__name__}")
        limits = limits if limits is not None else _NO_LIMITS
        command = _argv(argv)
        variables = _env(env)
        _check_exec_size(command, variables)
        # What was left out, as most are in most calls, isn't looked at.
        mounted, in_memory = _mounts(mounts) if mounts != () else ((), ())
        shared = _namespaces(namespaces)
        wanted_network = _network(network, shared)
        granted = boundary.capabilities(capabilities) if capabilities != () else ()
        nodes = _devices(devices) if devices != () else ()
        may_read = None if readable is None else _paths(readable, "readable")
        may_write = _paths(writable, "writable") if writable != () else ()
        given = {
            "hostname": hostname is not None,
            "user": user is not None,
            "network": network is not None or shared.net == "host",
            "allow": wanted_network.allow is not None,
            "publish": bool(wanted_network.publish),
            "bandwidth": wanted_network.bandwidth_bytes_per_second is not None,
            "mounts": bool(mounted),
            "tmpfs": bool(in_memory),
            "image": image is not None,
            "overlay": bool(overlay),
            "namespaces": bool(shared.asked),
            "capabilities": bool(granted),
            "seccomp": seccomp is not None,
            "devices": bool(nodes),
            "kernel": kernel is not None,
            "readable": may_read is not None,
            "writable": bool(may_write),
        }
        return cls(
            argv=command,
            isolation=isolation,
            input=None if input is None else parse.content(input, "input"),
            env=variables,
            files=_files(files),
            collect=_collect(collect),
            mounts=mounted,
            tmpfs=in_memory,
            image=_image(image),
            overlay=bool(overlay),
            user=None if user is None else _user(user),
            hostname=None if hostname is None else _hostname(hostname),
            network=wanted_network,
            limits=limits,
            namespaces=shared,
            capabilities=granted,
            seccomp=_seccomp(seccomp),
            devices=nodes,
            kernel=kernel if kernel is None or isinstance(kernel, Kernel) else Kernel(kernel),
            readable=may_read,
            writable=may_write,
            require=_require(require),
            check=bool(check),
            text=bool(text),
            asked=limits.asked | {name for name, was_given in given.items() if was_given},
        )

    @property
    def settled(self) -> bool:
        """Whether its level is known, and known to isolate what is required."""
        return self.choice is not None or (self.isolation != AUTO and not self.require)

    @property
    def image_is_disk(self) -> bool:
        """Whether the image is a disk image, not a folder."""
        return self.image != "host" and os.path.isfile(self.image)

    def environment(self, home: bytes) -> tuple[tuple[bytes, bytes], ...]:
        """The workload's whole environment: DEFAULT_ENV, HOME=`home`, and over them the caller's own
        variables.
        """
        own = (*DEFAULT_ENV, (b"HOME", home))
        return tuple({**dict(own), **dict(self.env)}.items()) if self.env else own


# The last options of these, and the spec that they made.
_last: tuple[Options, Spec | None] = ({}, None)


def _argv(argv: Sequence[Path]) -> tuple[bytes, ...]:
    if isinstance(argv, (str, bytes, bytearray)):
        raise SpecError(f"argv must be a list, not a {type(argv).__name__}: ringfence never runs a shell")
    if not hasattr(argv, "__iter__"):
        raise SpecError(f"argv must be a list of str or bytes, not {type(argv).__name__}")
    command = _short_strings(argv) or tuple(_string(one, f"argv[{index}]") for index, one in enumerate(argv))
    if not command:
        raise SpecError("argv must not be empty: it has to name a command")
    if not command[0]:
        raise SpecError("argv[0] must not be empty: it names the command")
    return command


def _short_strings(argv: Sequence[Path]) -> tuple[bytes, ...]:
    """All at once, as most commands are of short str without a NUL; () where each has to be looked at."""
    if type(argv) is not list and type(argv) is not tuple:
        return ()  # what can be read only once
    try:
        raw = os.fsencode("\0".join(argv))
    except (TypeError, UnicodeEncodeError):
        return ()
    command = tuple(raw.split(b"\0"))
    return command if len(command) == len(argv) and len(raw) < _MOST_STRING_BYTES else ()


def _env(env: Mapping[Any, Any] | None) -> tuple[tuple[bytes, bytes], ...]:
    if env is None:
        return ()
    if not hasattr(env, "items"):
        raise SpecError(f"env must be a dict, not {type(env).__name__}")
    variables: dict[bytes, bytes] = {}
    for key, value in env.items():
        name = _string(key, "a name in env")
        if not name or b"=" in name:
            raise SpecError(f"env: {key!r} can't be a variable's name: it is empty or has a '='")
        if name in variables:
            raise SpecError(f"env: {key!r} is given twice, as str and as bytes")
        variables[name] = _string(value, f"env[{key!r}]")
        if len(name) + 1 + len(variables[name]) >= _MOST_STRING_BYTES:
            raise SpecError(f"env[{key!r}] is too long: Linux takes at most {_MOST_STRING_BYTES - 1} bytes a string")
    return tuple(variables.items())


def _require(require: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """Which resources there are, is for those to say who judge them."""
    if require is None:
        return ()
    if not hasattr(require, "items"):
        raise SpecError(f"require must be a dict of {{resource: 'own' or 'restricted'}}, not {type(require).__name__}")
    for name, word in require.items():
        if word not in ("own", "restricted"):
            raise SpecError(f"require: {name!r} must be 'own' or 'restricted', not {word!r}")
    return tuple(sorted((str(name), str(word)) for name, word in require.items()))


def _check_exec_size(argv: tuple[bytes, ...], env: tuple[tuple[bytes, bytes], ...]) -> None:
    pointer_and_nul = 9
    total = 0
    for one in argv:
        total += len(one) + pointer_and_nul
    for name, value in env:
        total += len(name) + 1 + len(value) + pointer_and_nul
    if total > _MOST_STRINGS_BYTES:
        raise SpecError(f"argv and env together take {total} bytes, more than 1 MiB: pass them by input or files")


def _string(value: object, what: str) -> bytes:
    """A string for execve(2): str by the file system's encoding, no NUL, not longer than the kernel takes."""
    if isinstance(value, bytes):
        raw = value
    elif isinstance(value, (str, os.PathLike)):
        try:
            raw = os.fsencode(value)
        except UnicodeEncodeError:
            raise SpecError(f"{what} has a character that can't be encoded") from None
    else:
        raise SpecError(f"{what} must be str or bytes, not {type(value).__name__}")
    if b"\0" in raw:
        raise SpecError(f"{what} contains a NUL byte")
    if len(raw) >= _MOST_STRING_BYTES:
        raise SpecError(f"{what} has {len(raw)} bytes: Linux takes at most {_MOST_STRING_BYTES - 1} in one string")
    return raw


def _files(files: Mapping[Any, Any] | None) -> tuple[FileIn, ...]:
    if files is None:
        return ()
    if not hasattr(files, "items"):
        raise SpecError(f"files must be a dict of {{name: content}}, not {type(files).__name__}")
    found: dict[bytes, FileIn] = {}
    for name, content in files.items():
        path = parse.relative_path(name, "files")
        if path in found:
            raise SpecError(f"files: {os.fsdecode(path)!r} is given twice")
        if isinstance(content, tuple):
            if len(content) != 2:
                raise SpecError(f"files[{name!r}] must be bytes, str, File or (data, mode)")
            content = File(*content)
        elif not isinstance(content, File):
            content = File(parse.content(content, f"files[{name!r}]"))
        found[path] = FileIn(path=path, data=content.data, mode=content.mode)
    for path in found:
        parent = path
        while b"/" in parent:
            parent = parent.rpartition(b"/")[0]
            if parent in found:
                raise SpecError(f"files: {os.fsdecode(parent)!r} is a file and a folder of {os.fsdecode(path)!r}")
    return tuple(found.values())


def _collect(collect: Iterable[Path]) -> tuple[bytes, ...]:
    if isinstance(collect, (str, bytes)) or not hasattr(collect, "__iter__"):
        raise SpecError(f"collect must be a list of patterns, not a {type(collect).__name__}")
    return tuple(parse.relative_path(pattern, "collect") for pattern in collect)


def _mounts(mounts: Iterable[Mount | Tmpfs]) -> tuple[tuple[Mount, ...], tuple[Tmpfs, ...]]:
    if not hasattr(mounts, "__iter__"):
        raise SpecError(f"mounts must be a list of Mount(...), not {type(mounts).__name__}")
    found: dict[bytes, Mount | Tmpfs] = {}
    for mount in mounts:
        if not isinstance(mount, (Mount, Tmpfs)):
            raise SpecError(f"mounts must be a list of Mount(...) and Tmpfs(...), not of {type(mount).__name__}")
        if mount.target in found:
            raise SpecError(f"mounts: two of them have the target {os.fsdecode(mount.target)!r}")
        if isinstance(mount, Mount) and not os.path.exists(mount.source):
            raise SpecError(f"mounts: the source {os.fsdecode(mount.source)!r} doesn't exist")
        found[mount.target] = mount
    in_order = [found[target] for target in sorted(found)]
    binds = tuple(one for one in in_order if isinstance(one, Mount))
    return binds, tuple(one for one in in_order if isinstance(one, Tmpfs))


def _devices(devices: Iterable[Device | Path]) -> tuple[Device, ...]:
    if isinstance(devices, (str, bytes)) or not hasattr(devices, "__iter__"):
        raise SpecError(f"devices must be a list of paths or Device(...), not {type(devices).__name__}")
    found: dict[bytes, Device] = {}
    for one in devices:
        device = one if isinstance(one, Device) else Device(one)
        if device.target in found:
            raise SpecError(f"devices: two of them have the target {os.fsdecode(device.target)!r}")
        try:
            mode = os.stat(device.source).st_mode
        except OSError as error:
            raise SpecError(f"devices: {os.fsdecode(device.source)!r}: {error.strerror}") from None
        if not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
            raise SpecError(f"devices: {os.fsdecode(device.source)!r} is no device")
        found[device.target] = device
    return tuple(found[target] for target in sorted(found))


def _paths(paths: Iterable[Path], what: str) -> tuple[bytes, ...]:
    if isinstance(paths, (str, bytes)) or not hasattr(paths, "__iter__"):
        raise SpecError(f"{what} must be a list of paths, not a {type(paths).__name__}")
    found = tuple(sorted({parse.absolute_path(path, what) for path in paths}))
    for path in found:
        if not os.path.exists(path):
            raise SpecError(f"{what}: {os.fsdecode(path)!r} doesn't exist")
    return found


def _namespaces(namespaces: Namespaces | Mapping[str, Any] | None) -> Namespaces:
    if namespaces is None:
        return _OWN_NAMESPACES
    if isinstance(namespaces, Namespaces):
        return namespaces
    if not hasattr(namespaces, "items"):
        raise SpecError(f"namespaces must be Namespaces(...) or a dict, not {type(namespaces).__name__}")
    try:
        return Namespaces(**namespaces)
    except TypeError as error:
        raise SpecError(f"namespaces: {error}") from None


def _seccomp(seccomp: str | Mapping[str, Any] | Seccomp | None) -> Seccomp:
    if seccomp is None:
        return _DEFAULT_SECCOMP
    return seccomp if isinstance(seccomp, Seccomp) else Seccomp(seccomp)


def _image(image: Path | None) -> str:
    if image is None or image in ("host", b"host"):
        return "host"
    folder = os.fsdecode(parse.host_path(image, "image"))
    try:
        mode = os.stat(folder).st_mode
        real = os.path.realpath(folder)  # an error where a symlink on the way is swapped under way
    except OSError as error:
        raise SpecError(f"image: {os.fsdecode(image)!r} is neither 'host' nor a folder ({error.strerror})") from None
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise SpecError(f"image: {os.fsdecode(image)!r} is neither 'host' nor a folder nor a disk image")
    if real == "/":
        raise SpecError("image: / would show all of the host, its secrets too: use 'host'")
    return real


def _user(user: int | str) -> tuple[int, int] | str:
    if isinstance(user, int) and not isinstance(user, bool):
        uid = _id(user, user)
        return uid, uid
    if not isinstance(user, str):
        raise SpecError(f"user must be a uid, 'uid:gid' or a name, not {user!r}")
    if user == "root":
        return 0, 0
    first, colon, second = user.partition(":")
    if first.isdecimal() and (second.isdecimal() or not colon):
        return _id(first, user), _id(second or first, user)
    for part in (first, second) if colon else (first,):
        # What useradd(8) takes, and what a passwd file can hold.
        if not (part and part.isascii() and part.replace("-", "").replace(".", "").replace("_", "").isalnum()):
            raise SpecError(f"user must be a uid, 'uid:gid' or a name, not {user!r}")
    return user


def _id(value: int | str, shown: object) -> int:
    # Bounded before int(): a str of a million digits is no id.
    found = int(value) if isinstance(value, int) or len(value) <= 10 else -1
    if not 0 <= found <= _MOST_ID:
        raise SpecError(f"user: {shown!r:.40} is out of range: an id is between 0 and {_MOST_ID}")
    return found


def _hostname(hostname: str) -> str:
    """RFC 1123, section 2.1: letters, digits and hyphens, in labels of at most 63."""
    if not isinstance(hostname, str):
        raise SpecError(f"hostname must be a str, not {type(hostname).__name__}")
    if len(hostname) > _MOST_HOSTNAME_BYTES:
        raise SpecError(f"hostname has {len(hostname)} characters: Linux takes at most {_MOST_HOSTNAME_BYTES}")
    for label in hostname.split("."):
        plain = label.isascii() and label.replace("-", "").isalnum()
        if not plain or label[0] == "-" or label[-1] == "-" or len(label) > 63:
            raise SpecError(f"hostname {hostname!r} must be of letters, digits and inner hyphens, in labels with dots")
    return hostname


def _network(network: str | Network | None, shared: Namespaces) -> Network:
    """What `network` asks for, or a namespace that is the host's: both say the same, or it is refused."""
    if network is None:
        return Network("host") if shared.net == "host" else _NO_NETWORK
    if not isinstance(network, (str, Network)):
        raise SpecError(f"network must be 'none', 'nat', 'host' or Network(...), not {type(network).__name__}")
    found = network if isinstance(network, Network) else Network(network)
    if "net" in shared.asked and (found.mode == "host") != (shared.net == "host"):
        raise SpecError(f"network={found.mode!r} and a network namespace that is {shared.net!r} contradict each other")
    if shared.net not in ("own", "host"):
        raise SpecError("network: a joined network namespace is the network: leave network= out")
    return found
