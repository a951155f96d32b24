"""Who made a process: which tool or service manager, and which container or unit of it this is.

By the path of its cgroup, by the programs above it that are outside of it, and by what Docker and Podman keep of their
containers on disk. None of it is proof: whoever may name cgroups and programs may name them so.
"""

from __future__ import annotations

import os
import re
import stat

from ringfence._value import Plain
from ringfence.errors import KernelError
from ringfence.observe.proc import Proc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

__all__ = ["Container", "Origin", "origin"]

_ID = r"(?P<id>[0-9a-f]{64})"
# By a part of a cgroup's path, the innermost one; the first line that fits counts.
_BY_CGROUP = tuple(
    (re.compile(pattern), maker)
    for pattern, maker in (
        (rf"/kubepods.*[/-]{_ID}", "Kubernetes"),
        (r"/kubepods", "Kubernetes"),
        (rf"/docker[-/]{_ID}", "Docker"),
        (r"/docker/", "Docker"),
        (rf"/libpod-{_ID}", "Podman"),
        (r"/libpod[-_]", "Podman"),
        (r"/buildah-", "Buildah"),
        (rf"/crio-{_ID}", "CRI-O"),
        (r"/crio-", "CRI-O"),
        (r"/lxc\.payload[./](?P<name>[^/]+)", "LXC"),
        (r"/lxc/(?P<name>[^/]+)", "LXC"),
        (r"/lxc\.monitor[./]", "LXC"),
        (r"/machine-(qemu|lxc)\\x2d\d+\\x2d(?P<name>[^/]+)\.scope", "libvirt"),
        (r"/machine\.slice/machine-(?P<name>[^/]+)\.scope", "systemd-nspawn"),
        (r"/machine\.slice/systemd-nspawn@(?P<name>[^/]+)\.service", "systemd-nspawn"),
        (r"/ringfence-\d+-[0-9a-f]{16}(/|$)", "ringfence"),
    )
)
_UNIT = re.compile(r"/([^/]+\.(?:service|scope))(?=/|$)")
_ENGINES = {"moby": "Docker", "k8s.io": "Kubernetes"}
# A program above and outside of a container, by the name of its file, to the maker.
_ABOVE = (
    (re.compile(r"containerd-shim.*"), "containerd"),
    (re.compile(r"conmon"), "Podman"),
    (re.compile(r"lxc-(start|execute|unpriv-start)|lxd|incusd"), "LXC"),
    (re.compile(r"systemd-nspawn"), "systemd-nspawn"),
    (re.compile(r"bwrap"), "bubblewrap"),
    (re.compile(r"firejail"), "Firejail"),
    (re.compile(r"ringfence-core"), "ringfence"),
    (re.compile(r"runc"), "runc"),
    (re.compile(r"crun"), "crun"),
)
_MOST_ABOVE = 16
_MOST_BYTES = 4 << 20


class Container(Plain):
    """id: the engine's. name, image: as its user calls them. Each is "" where nothing tells it."""

    __slots__ = ("id", "image", "name")
    id: str
    name: str
    image: str

    def __init__(self, *, id: str = "", name: str = "", image: str = "") -> None:
        self._set(id=id, name=name, image=image)


class Origin(Plain):
    """maker: what seems to have made it, or "". container: where it is one of that maker's. unit: the innermost service
    or scope of systemd's that it is in, or "".
    """

    __slots__ = ("container", "maker", "unit")
    maker: str
    container: Container | None
    unit: str

    def __init__(self, *, maker: str = "", container: Container | None = None, unit: str = "") -> None:
        self._set(maker=maker, container=container, unit=unit)


def origin(process: Proc, parent: int, cgroups: Mapping[str, str], hostname_file: str, *, confined: bool) -> Origin:
    """hostname_file: what its /etc/hostname is on the host, or "". confined: its mount namespace is its own: only then
    what is above it is looked at.
    """
    maker, container = _by_cgroup(cgroups)
    unit = next((found[-1] for path in cgroups.values() if (found := _UNIT.findall(path))), "")
    if not confined:
        return Origin(maker=maker, unit=unit)
    more = _by_program_above(process, parent) if maker != "ringfence" else None
    if more is not None and (not maker or more[0] == maker):
        maker, told, bundle = more
        container = _joined(container, told)
        if container is not None and maker == "Podman" and container.id:
            container = container.replace(image=_podman_image(bundle, container.id))
    if maker == "Docker":
        container = _joined(container, _by_docker(hostname_file))
    return Origin(maker=maker, container=container, unit=unit)


def _joined(one: Container | None, other: Container | None) -> Container | None:
    """What both tell of the same container; the first one's where they contradict each other."""
    if one is None or other is None or (one.id and other.id and one.id != other.id):
        return one or other
    return Container(id=one.id or other.id, name=one.name or other.name, image=one.image or other.image)


def _by_cgroup(cgroups: Mapping[str, str]) -> tuple[str, Container | None]:
    for path in dict.fromkeys(cgroups.values()):
        for pattern, maker in _BY_CGROUP:
            if matches := list(pattern.finditer(path)):
                told = {name: _unescaped(value) for name, value in matches[-1].groupdict().items()}
                return maker, Container(**told) if told else None
    return "", None


def _unescaped(name: str) -> str:
    r"""systemd writes what a unit's name can't hold as \x2d."""
    return re.sub(r"\\x([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), name)


# ---- the programs above it ----


def _by_program_above(process: Proc, parent: int) -> tuple[str, Container | None, str] | None:
    """(maker, container, folder of its OCI bundle), by the nearest known program that is in another mount namespace."""
    own = process.link("ns/mnt")
    for above in _upwards(parent, process.folder):
        with above:
            there = above.link("ns/mnt")
            if there is not None and there == own:
                continue
            argv = above.argv()
            exe = above.link("exe") or "/"
            # crun runs a copy of itself that nobody can overwrite, and that has no path.
            if argv and (exe == "/" or exe.startswith("/memfd:")):
                exe = argv[0]
            name = os.path.basename(exe.removesuffix(" (deleted)"))
            for pattern, maker in _ABOVE:
                if pattern.fullmatch(name):
                    return _told(maker, argv)
    return None


def _upwards(pid: int, proc: str) -> Iterator[Proc]:
    for _ in range(_MOST_ABOVE):
        if pid <= 1:
            return
        try:
            process = Proc(pid, proc)
        except KernelError:
            return
        status = process.status()
        yield process
        pid = int(status.get("PPid", "0"))


def _told(maker: str, argv: Sequence[str]) -> tuple[str, Container | None, str]:
    """What its command line tells of the container."""
    if maker == "containerd":
        found = Container(id=_option(argv, "-id"))
        return _ENGINES.get(_option(argv, "-namespace"), maker), found, ""
    if maker == "Podman":
        # CRI-O has the same monitor.
        maker = "CRI-O" if "crio" in " ".join(argv) and "podman" not in " ".join(argv) else maker
        return maker, Container(id=_option(argv, "-c"), name=_option(argv, "-n")), _option(argv, "-b")
    if maker == "LXC":
        # It calls itself "[lxc monitor] FOLDER NAME".
        title = re.fullmatch(r"\[lxc monitor\] \S+ (\S+)", " ".join(argv))
        name = title[1] if title else _option(argv, "-n", "--name")
        return maker, Container(name=name), ""
    if maker == "systemd-nspawn":
        folder = os.path.basename(_option(argv, "-D", "--directory").rstrip("/"))
        return maker, Container(name=_option(argv, "-M", "--machine") or folder), ""
    if maker in ("runc", "crun"):
        return maker, Container(id=argv[-1]), ""
    return maker, None, ""


def _option(argv: Sequence[str], *names: str) -> str:
    for at, word in enumerate(argv):
        if word in names and at + 1 < len(argv):
            return argv[at + 1]
        for name in names:
            if name.startswith("--") and word.startswith(name + "="):
                return word[len(name) + 1 :]
    return ""


# ---- what engines keep on disk ----


def _by_docker(hostname_file: str) -> Container | None:
    """From the folder that Docker keeps of each container, where the file is that it mounts as /etc/hostname."""
    found = re.fullmatch(rf"(.*/containers/{_ID})/hostname", hostname_file)
    if found is None:
        return None
    about = _json(f"{found[1]}/config.v2.json")
    name = _text(about, "Name").removeprefix("/")
    return Container(id=found["id"], name=name, image=_text(about.get("Config"), "Image"))


def _podman_image(bundle: str, identity: str) -> str:
    """From the list of all containers in Podman's storage, above the folder of one: .../containers.json."""
    found = re.fullmatch(rf"(.*/[a-z0-9]+-containers)/{_ID}/userdata", bundle)
    if found is None:
        return ""
    listed = _json(f"{found[1]}/containers.json", list)
    one = next((one for one in listed if isinstance(one, dict) and one.get("id") == identity), {})
    return _text(_parsed(_text(one, "metadata"), dict), "image-name")


def _text(value: Any, key: str) -> str:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""


def _json(path: str, kind: type[Any] = dict) -> Any:
    """What is in a file that may be anybody's: empty where it isn't what it is thought to be."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return kind()
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_size > _MOST_BYTES:
            return kind()
        return _parsed(os.pread(fd, _MOST_BYTES, 0), kind)
    except OSError:
        return kind()
    finally:
        os.close(fd)


def _parsed(text: str | bytes, kind: type[Any]) -> Any:
    import json

    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) else kind()
