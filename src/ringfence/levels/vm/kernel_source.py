"""Where a guest's kernel comes from: its modules in a folder, or all of it in packages."""

from __future__ import annotations

import abc
import os
import stat

from ringfence.errors import Unavailable
from ringfence.images.held import beneath
from ringfence.levels.vm import debian, modules
from ringfence.levels.vm.bzimage import MAX_KERNEL_BYTES

__all__ = ["DirectoryTree", "MemoryTree", "ModuleTree", "unpack"]

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class ModuleTree(abc.ABC):
    """Where modules are looked up while a kernel is prepared: by name, as plain ELF."""

    def __init__(self, builtin: frozenset[str] | None) -> None:
        # None: there is no modules.builtin, so nothing tells what the kernel has in it.
        self.builtin = builtin

    @abc.abstractmethod
    def read(self, name: str) -> bytes | None:
        """A module's plain ELF, or None where there is no such file."""

    def close(self) -> None:
        """Lets go of the folder."""
        return


class DirectoryTree(ModuleTree):
    """An installed /lib/modules/<release>: that path, or a descriptor of the folder.

    No symlink below it is followed (`build` and `source` lead to the kernel's own tree), and what isn't a regular file
    is none of its modules: what is read here can be read by the guest.
    """

    def __init__(self, folder: str | int) -> None:
        self._folder = os.open(folder, _FOLDER) if isinstance(folder, str) else os.open(".", _FOLDER, dir_fd=folder)
        self._paths: dict[str, str] = {}
        try:
            super().__init__(self._look())
        except BaseException:
            self.close()
            raise

    def _look(self) -> frozenset[str] | None:
        """Finds the modules, and gives what is built into the kernel."""
        # What is to be used in place of a distribution's own is in other folders, such as "updates" or "extra".
        for here, folders, names, _ in os.fwalk(".", dir_fd=self._folder):
            folders.sort(reverse=True)
            for name in names:
                if ".ko" in name:
                    self._paths.setdefault(modules.canonical(name), os.path.join(here, name))
        text = self._read("modules.builtin")
        return None if text is None else builtin(text.decode("utf-8", "replace"))

    def _read(self, path: str) -> bytes | None:
        """A regular file's content, or None where it is none. Raises Unavailable where it is too large."""
        try:
            held = beneath(self._folder, path.encode("utf-8", "surrogateescape"))
        except OSError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(held).st_mode):
                return None
            with open(f"/proc/self/fd/{held}", "rb") as file:
                data = file.read(modules.MAX_MODULE_BYTES + 1)
        except OSError as error:
            raise Unavailable("vm", f"the kernel module {path} can't be read ({error.strerror})") from error
        finally:
            os.close(held)
        if len(data) > modules.MAX_MODULE_BYTES:
            raise Unavailable("vm", f"the kernel module {path} has more than {modules.MAX_MODULE_BYTES >> 20} MiB")
        return data

    def read(self, name: str) -> bytes | None:
        path = self._paths.get(name)
        data = self._read(path) if path is not None else None
        return None if path is None or data is None else modules.plain(path, data)

    def close(self) -> None:
        os.close(self._folder)


class MemoryTree(ModuleTree):
    """What was taken out of packages."""

    def __init__(self, builtin: frozenset[str] | None, found: dict[str, bytes]) -> None:
        super().__init__(builtin)
        self._found = found

    def read(self, name: str) -> bytes | None:
        return self._found.get(name)


def builtin(text: str) -> frozenset[str]:
    return frozenset(modules.canonical(line) for line in text.splitlines() if line)


def unpack(debs: list[str], fds: tuple[int, ...] = ()) -> tuple[bytes, MemoryTree]:
    """The kernel image and the wanted modules of kernel packages. fds: as for `debian.members`.

    A package holds some 4000 modules, 300 MB; which ones the wanted ones require shows only in themselves, so
    the packages are read again until nothing is missing. Once, but for a kernel with dependencies that we
    don't foresee.
    """
    image, built_in = b"", None
    found: dict[str, bytes] = {}
    wanted = {modules.canonical(name) for name in modules.every(modules.SETS)} | _FORESEEN
    while wanted:
        for deb in debs:
            for path, content in debian.members(deb, fds):
                name = os.path.basename(path)
                if path.startswith("boot/vmlinuz-"):
                    image = content.read(MAX_KERNEL_BYTES + 1)
                elif name == "modules.builtin":
                    built_in = builtin(content.read(modules.MAX_MODULE_BYTES).decode("utf-8", "replace"))
                elif ".ko" in name and "/kernel/" in path and modules.canonical(name) in wanted:
                    found[modules.canonical(name)] = modules.plain(name, content.read(modules.MAX_MODULE_BYTES + 1))
        required = {before for module in found.values() for before in modules.requires(module)}
        missing = required - found.keys() - (built_in or frozenset())
        # What was looked for and isn't there won't be there the next time either.
        wanted = missing - wanted
    if len(image) > MAX_KERNEL_BYTES:
        raise Unavailable("vm", f"the kernel has more than {MAX_KERNEL_BYTES >> 20} MiB")
    if not image:
        raise Unavailable("vm", f"there is no kernel image in {', '.join(map(os.path.basename, debs))}")
    return image, MemoryTree(built_in, found)


# What the modules of modules.SETS require in Linux 5.15 to 6.12, so that one pass over a package is enough.
_FORESEEN = frozenset(
    [
        "virtio",
        "virtio_ring",
        "virtio_pci_modern_dev",
        "virtio_pci_legacy_dev",
        "9pnet",
        "netfs",
        "fscache",
        "libcrc32c",
        "crc32c_generic",
        "lz4_decompress",
        "zstd_decompress",
        "failover",
        "net_failover",
    ]
)
