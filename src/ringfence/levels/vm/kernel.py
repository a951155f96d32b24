"""The guest's kernel: found, fetched, uncompressed once, and kept by digest in the cache.

Where it comes from, in this order:

1. the file that $RINGFENCE_KERNEL names: a bzImage, an uncompressed kernel, or a kernel package (.deb). Its
   modules are looked for in $RINGFENCE_KERNEL_MODULES, else in lib/modules/<release> beside or above it,
   else in /lib/modules/<release>, where that and all above it is root's or ours;
2. the generic kernel package of Debian or Ubuntu, only downloaded and unpacked;
3. the host's own, /boot/vmlinuz-<release>, where it can be read and has every module.
"""

from __future__ import annotations

import os

from ringfence import _cache
from ringfence._trust import why_not_ours
from ringfence._value import Value
from ringfence.errors import SpecError, Unavailable
from ringfence.levels.vm import bzimage, debian, modules
from ringfence.levels.vm.kernel_source import DirectoryTree, MemoryTree, ModuleTree, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[str], None]

_KIND = "kernels"
# The entry that `find` takes: a link, so that a newer kernel replaces it at once. Another one for each choice of
# modules: versions of ringfence that want different ones don't take each other's kernel.
_CURRENT = "current"
_MANIFEST = "manifest.json"
_FORMAT = 1


class GuestKernel(Value):
    """A kernel that a guest can be started from. Equal ones have the same content.

    release: as `uname -r` in the guest prints it. vmlinux: path of the uncompressed ELF kernel. modules: path
    of a folder with `<name>.ko`, plain ELF without signature, of every module of `sets` and all that they
    require. sets: names in modules.SETS that this kernel has. builtin: names of modules that are part of the
    kernel. digest: SHA-256 in hex over the kernel and the modules. source: where it came from, for people.
    """

    __slots__ = ("builtin", "digest", "modules", "release", "sets", "source", "vmlinux")

    release: str
    vmlinux: str
    modules: str
    sets: tuple[str, ...]
    builtin: frozenset[str]
    digest: str
    source: str

    def __init__(
        self,
        *,
        release: str,
        vmlinux: str,
        modules: str,
        sets: tuple[str, ...],
        builtin: frozenset[str],
        digest: str,
        source: str,
    ) -> None:
        self._set(
            release=release,
            vmlinux=vmlinux,
            modules=modules,
            sets=sets,
            builtin=builtin,
            digest=digest,
            source=source,
        )

    def read_module(self, name: str) -> bytes | None:
        """A module's ELF, or None where this kernel has no such file."""
        try:
            with open(os.path.join(self.modules, f"{name}.ko"), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None


def find(cache_dir: str | None = None) -> GuestKernel | None:
    """The prepared kernel, or None where `prepare` has to make it. Takes about a millisecond; makes no
    kernel.

    Raises SpecError where the cache folder can't be trusted or $RINGFENCE_KERNEL names no file.
    """
    key = _key_of_file(named) if (named := _named()) else current()
    folder = _cache.find(_KIND, key, cache_dir)
    return load(os.path.realpath(folder)) if folder else None


def prepare(cache_dir: str | None = None, *, refresh: bool = False, progress: Progress | None = None) -> GuestKernel:
    """The prepared kernel, made now where it's missing or damaged (10 s; from a package a download of some 70
    MB).

    refresh: look for a newer package even where a kernel is at hand. Raises Unavailable, with the reason of
    each source that failed, where no kernel can be had.
    """
    if os.uname().machine != "x86_64":
        raise Unavailable("vm", f"guests are x86-64 and this host is {os.uname().machine}")
    if not refresh and (found := find(cache_dir)):
        return found
    if named := _named():
        return load(_from_file(named, cache_dir, progress))
    failures: list[Unavailable] = []
    for source in (_from_package, _from_host):
        try:
            folder = source(cache_dir, progress)
        except Unavailable as failure:
            failures.append(failure)
        else:
            _point(folder)
            return load(folder)
    raise Unavailable(
        "vm",
        "no kernel for guests: " + "; ".join(failure.reason for failure in failures),
        next((failure.help for failure in failures if failure.help), ""),
    )


def current() -> str:
    """The name of the link to the kernel that `find` takes."""
    return f"{_CURRENT}-{sets_digest()}"


def _named() -> str | None:
    path = os.environ.get("RINGFENCE_KERNEL")
    if path and not os.path.isfile(path):
        raise SpecError(f"RINGFENCE_KERNEL names {path!r}, which is not a file")
    return os.path.realpath(path) if path else None


def _key_of_file(path: str) -> str:
    """A named file's key: another one when its stat(2) data, or where its modules are, change."""
    import hashlib

    about = os.stat(path)
    named = os.environ.get("RINGFENCE_KERNEL_MODULES")
    of = (path, about.st_size, about.st_mtime_ns, about.st_ino, named, sets_digest())
    return f"file-{hashlib.sha256(repr(of).encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def _from_file(path: str, cache_dir: str | None, progress: Progress | None) -> str:
    def fill(folder: str) -> None:
        _tell(progress, f"preparing the guest's kernel from {path}")
        tree: ModuleTree
        if path.endswith(".deb"):
            image, tree = unpack([path])
        else:
            with open(path, "rb") as file:
                image = file.read()
            tree = _modules_beside(path, bzimage.release(image))
        try:
            write(folder, image, tree, source=path, required=("boot",))
        finally:
            tree.close()

    return _cache.obtain(_KIND, _key_of_file(path), fill, cache_dir=cache_dir, progress=progress)


def _from_package(cache_dir: str | None, progress: Progress | None) -> str:
    import shutil

    packages = debian.kernel_packages()
    image = packages[0]

    def fill(folder: str) -> None:
        scratch = os.path.join(folder, "packages")
        debs = []
        for number, package in enumerate(packages):
            size = f" ({package.size_bytes / 1e6:.0f} MB)" if package.size_bytes else ""
            _tell(progress, f"downloading {package.name} {package.version}{size}")
            os.makedirs(os.path.join(scratch, str(number)))
            debs.append(debian.download(package, os.path.join(scratch, str(number))))
        _tell(progress, "unpacking the guest's kernel")
        vmlinuz, tree = unpack(debs)
        write(
            folder,
            vmlinuz,
            tree,
            source=f"package {image.name} {image.version}",
            required=modules.REQUIRED,
        )
        shutil.rmtree(scratch)

    key = f"{image.name}_{image.version.replace(':', '%3a')}-{sets_digest()}"
    return _cache.obtain(_KIND, key, fill, cache_dir=cache_dir, progress=progress)


def _from_host(cache_dir: str | None, progress: Progress | None) -> str:
    release = os.uname().release
    path = f"/boot/vmlinuz-{release}"
    try:
        with open(path, "rb") as file:
            image = file.read()
    except OSError as error:
        raise Unavailable("vm", f"the host's own kernel {path} can't be read ({error.strerror})") from error

    def fill(folder: str) -> None:
        _tell(progress, f"preparing the guest's kernel from {path}")
        tree = DirectoryTree(f"/lib/modules/{release}")
        try:
            write(folder, image, tree, source=f"the host's own {path}", required=modules.REQUIRED)
        finally:
            tree.close()

    return _cache.obtain(_KIND, f"host-{_key_of_file(path)}", fill, cache_dir=cache_dir, progress=progress)


def _modules_beside(path: str, release: str) -> ModuleTree:
    if named := os.environ.get("RINGFENCE_KERNEL_MODULES"):
        if not os.path.isdir(named):
            raise SpecError(f"RINGFENCE_KERNEL_MODULES names {named!r}, which is not a folder")
        return DirectoryTree(named)
    beside = folder_beside(path, release)
    return DirectoryTree(beside) if beside is not None else MemoryTree(None, {})


def folder_beside(path: str, release: str) -> str | None:
    """Where the modules of a kernel of that path and release are, as a distribution has them. Nobody named the folder:
    one that another account could have put there isn't taken, as /tmp/lib for /tmp/build/bzImage.
    """
    here = os.path.dirname(path)
    # The release is what the image says of itself, which may be anything.
    candidates = [] if "/" in release or release in (".", "..") else [here, os.path.dirname(here), "/"]
    folders = (os.path.join(root, "lib/modules", release) for root in candidates)
    return next((folder for folder in folders if os.path.isdir(folder) and not why_not_ours(folder)), None)


def write(folder: str, image: bytes, tree: ModuleTree, *, source: str, required: tuple[str, ...]) -> None:
    """Write kernel, modules and manifest. Raises Unavailable where a required set isn't complete."""
    import hashlib
    import json

    release = bzimage.release(image)
    kernel = bzimage.vmlinux(image)
    kept: dict[str, bytes] = {}
    sets = []
    for name, wanted in modules.SETS.items():
        if tree.builtin is None:
            # A kernel without a modules folder: one piece, as small kernels for virtual machines are. What it
            # lacks shows as an error of the guest's own.
            sets.append(name)
            continue
        try:
            kept.update(modules.load_order(wanted, tree.read, tree.builtin))
            sets.append(name)
        except LookupError as missing:
            if name in required:
                raise Unavailable(
                    "vm",
                    f"kernel {release} from {source} lacks the module {missing.args[0]}",
                    "name another kernel, such as Debian's generic one",
                ) from missing
    os.mkdir(os.path.join(folder, "modules"), 0o755)
    digest = hashlib.sha256(kernel)
    for name in sorted(kept):
        digest.update(hashlib.sha256(name.encode() + b"\0" + kept[name]).digest())
        _cache.write(os.path.join(folder, "modules", f"{name}.ko"), kept[name])
    _cache.write(os.path.join(folder, "vmlinux"), kernel)
    manifest = {
        "format": _FORMAT,
        "release": release,
        "source": source,
        "sets": sets,
        # Only the names that a look-up may ask for again.
        "builtin": sorted((tree.builtin or frozenset()) & _names_asked_for(kept)),
        "digest": digest.hexdigest(),
    }
    _cache.write(os.path.join(folder, _MANIFEST), json.dumps(manifest, indent=1).encode())


def sets_digest() -> str:
    import hashlib

    return hashlib.sha256(repr(sorted(modules.SETS.items())).encode()).hexdigest()[:8]


def _names_asked_for(kept: dict[str, bytes]) -> set[str]:
    asked = {modules.canonical(name) for name in modules.every(modules.SETS)}
    return asked.union(*(modules.requires(module) for module in kept.values()))


def load(folder: str) -> GuestKernel:
    import json

    with open(os.path.join(folder, _MANIFEST), encoding="utf-8") as file:
        manifest = json.load(file)
    if manifest["format"] != _FORMAT:
        raise Unavailable("vm", f"the prepared kernel in {folder} was made by another version", f"remove {folder}")
    return GuestKernel(
        release=manifest["release"],
        vmlinux=os.path.join(folder, "vmlinux"),
        modules=os.path.join(folder, "modules"),
        sets=tuple(manifest["sets"]),
        builtin=frozenset(manifest["builtin"]),
        digest=manifest["digest"],
        source=manifest["source"],
    )


def _point(folder: str) -> None:
    """Make `folder` the current kernel."""
    parent, name = os.path.split(folder)
    place = os.path.join(parent, current())
    link = f"{place}.{os.getpid()}-{os.urandom(4).hex()}"
    os.symlink(name, link)
    os.replace(link, place)


def _tell(progress: Progress | None, text: str) -> None:
    if progress:
        progress(text)
