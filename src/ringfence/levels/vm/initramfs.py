"""The guest's initramfs: our init, the modules that it loads, nothing else. Some 2 MB.

    /init                 the static ringfence-core
    /dev/console          what the kernel opens as init's stdin, stdout and stderr
    /modules/NN-name.ko   plain ELF
    /modules/list         "<set> <file>" a line, in the order in which they load

init loads the lines whose set the kernel command line names (rf.sets=boot,9p). A module that two sets need
has a line in both, so EEXIST from finit_module(2) is no error.
"""

from __future__ import annotations

import os

from ringfence import _cache
from ringfence.errors import Unavailable
from ringfence.levels.vm import modules as _modules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ringfence.levels.vm.kernel import GuestKernel

_KIND = "initramfs"
_FILE = "initramfs.cpio"
# Part of the key: to be raised when the same inputs shall give another file.
_FORMAT = 1
# One for each kernel and init: an upgrade of ringfence makes a new one.
_KEPT = 8

_DIRECTORY = 0o040755
_EXECUTABLE = 0o100755
_DATA = 0o100644
_CONSOLE = 0o020600


def build(
    kernel: GuestKernel,
    init_path: str,
    *,
    modules: Mapping[str, tuple[str, ...]] | None = None,
    cache_dir: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> str:
    """Path of the initramfs with this init and these modules (set -> names; by default all sets of the
    kernel but its file systems for disks of the user's own).

    Made once for the same inputs; after that it takes about 2 ms. Raises Unavailable where the kernel lacks a
    module.
    """
    import hashlib

    sets = modules if modules is not None else _sets(kernel, ())
    with open(init_path, "rb") as file:
        init = file.read()
    of = (_FORMAT, kernel.digest, hashlib.sha256(init).hexdigest(), sorted(sets.items()))
    key = hashlib.sha256(repr(of).encode()).hexdigest()[:32]

    def fill(folder: str) -> None:
        _cache.write(os.path.join(folder, _FILE), archive(init, *_listed(kernel, sets)))

    if (found := _cache.find(_KIND, key, cache_dir)) is None:
        found = _cache.obtain(_KIND, key, fill, cache_dir=cache_dir, progress=progress)
        _cache.forget_old(_KIND, _KEPT, cache_dir)
    return os.path.join(found, _FILE)


def for_disks(kernel: GuestKernel, init_path: str, cache_dir: str | None = None) -> str:
    """The same with what reads a disk of the user's own."""
    return build(kernel, init_path, modules=_sets(kernel, _modules.FILE_SYSTEMS), cache_dir=cache_dir)


def _sets(kernel: GuestKernel, more: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    left_out = set(_modules.FILE_SYSTEMS).difference(more)
    return {name: _modules.SETS[name] for name in kernel.sets if name not in left_out}


def _listed(kernel: GuestKernel, sets: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, bytes], list[tuple[str, str]]]:
    """({file: ELF}, [(set, file)]): the files of all sets, and the order in which each set loads."""
    files: dict[str, bytes] = {}
    numbered: dict[str, str] = {}
    lines: list[tuple[str, str]] = []
    boot: set[str] = set()
    # boot first: every guest loads it, so that no other set repeats what it has.
    for name in sorted(sets, key=lambda name: name != "boot"):
        try:
            order = _modules.load_order(sets[name], kernel.read_module, kernel.builtin)
        except LookupError as missing:
            if not os.listdir(kernel.modules):
                continue  # A kernel in one piece.
            raise Unavailable("vm", f"kernel {kernel.release} lacks the module {missing.args[0]}") from missing
        for module, data in order.items():
            if module in boot:
                continue
            if module not in numbered:
                numbered[module] = f"{len(numbered):02}-{module}.ko"
                files[numbered[module]] = data
            lines.append((name, numbered[module]))
        if name == "boot":
            boot = set(order)
    return files, lines


def archive(init: bytes, files: Mapping[str, bytes], lines: list[tuple[str, str]]) -> bytes:
    """The cpio archive (format "newc", Documentation/driver-api/early-userspace/buffer-format.rst). Not
    compressed: unpacking costs the guest more than reading. The same input gives the same bytes.
    """
    out = bytearray()
    _add(out, "dev", _DIRECTORY)
    _add(out, "dev/console", _CONSOLE, device=(5, 1))
    _add(out, "init", _EXECUTABLE, init)
    _add(out, "modules", _DIRECTORY)
    for name, data in files.items():
        _add(out, f"modules/{name}", _DATA, data)
    _add(out, "modules/list", _DATA, "".join(f"{name} {file}\n" for name, file in lines).encode())
    _add(out, "TRAILER!!!", 0)
    return bytes(out)


def _add(out: bytearray, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
    path = name.encode() + b"\0"
    # Any number will do that no other entry has.
    inode = len(out) + 1
    # magic; inode, mode, uid, gid, links, mtime, size, device of the file (2), of the node (2), path's
    # length, check
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    out += b"070701" + b"".join(b"%08x" % field for field in fields) + path
    out += b"\0" * (-len(out) % 4) + data
    out += b"\0" * (-len(out) % 4)
