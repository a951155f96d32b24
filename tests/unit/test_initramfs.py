from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from kernel_parts import debian_modules

from ringfence.errors import Unavailable
from ringfence.levels.vm import initramfs, modules
from ringfence.levels.vm.kernel import GuestKernel


def entries(archive: bytes) -> dict[str, tuple[int, tuple[int, int], bytes]]:
    """name -> (mode, (major, minor), data) of a newc archive, checked as strictly as the kernel does."""
    found: dict[str, tuple[int, tuple[int, int], bytes]] = {}
    at = 0
    while True:
        head = archive[at : at + 110]
        assert head[:6] == b"070701"
        fields = [int(head[6 + 8 * index : 14 + 8 * index], 16) for index in range(13)]
        name = archive[at + 110 : at + 110 + fields[11]]
        assert name.endswith(b"\0")
        start = (at + 110 + fields[11] + 3) // 4 * 4
        data = archive[start : start + fields[6]]
        assert len(data) == fields[6]
        at = (start + fields[6] + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return found
        assert name[:-1].decode() not in found
        found[name[:-1].decode()] = (fields[1], (fields[9], fields[10]), data)


@pytest.fixture
def guest(tmp_path: Path) -> GuestKernel:
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, data in debian_modules().items():
        (folder / f"{name}.ko").write_bytes(modules.plain("x.ko", data))
    return GuestKernel(
        release="6.1",
        vmlinux=str(tmp_path / "vmlinux"),
        modules=str(folder),
        sets=tuple(modules.SETS),
        builtin=frozenset(),
        digest="d1",
        source="test",
    )


@pytest.fixture
def core(tmp_path: Path) -> str:
    path = tmp_path / "core"
    path.write_bytes(b"\x7fELF static init")
    return str(path)


def test_what_is_in_it(tmp_path: Path, guest: GuestKernel, core: str) -> None:
    found = entries(Path(initramfs.build(guest, core, cache_dir=str(tmp_path / "cache"))).read_bytes())
    assert found["init"] == (stat.S_IFREG | 0o755, (0, 0), b"\x7fELF static init")
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, (5, 1), b"")
    lines = [line.split(" ") for line in found["modules/list"][2].decode().splitlines()]
    assert [file[3:-3] for name, file in lines if name == "boot"] == [
        "virtio_ring",
        "virtio",
        "virtio_mmio",
        "virtio_console",
    ]
    assert [file[3:-3] for name, file in lines if name == "9p"] == [
        "9pnet",
        "9pnet_virtio",
        "netfs",
        "fscache",
        "9p",
    ]
    assert [file[3:-3] for name, file in lines if name == "erofs"] == [
        "virtio_blk",
        "crc32c_generic",
        "libcrc32c",
        "erofs",
    ]
    assert [file for _, file in lines] == sorted(file for _, file in lines)
    for _, file in lines:
        mode, _, data = found[f"modules/{file}"]
        assert mode == stat.S_IFREG | 0o644
        assert data == guest.read_module(file[3:-3])
    assert {name for name in found if name.startswith("modules/")} == {
        "modules/list",
        *(f"modules/{file}" for _, file in lines),
    }
    # A folder comes before what is in it, or the kernel drops that.
    names = list(found)
    assert names.index("dev") < names.index("dev/console")
    assert names.index("modules") < names.index("modules/list")


def test_it_is_made_once_for_the_same_inputs(tmp_path: Path, guest: GuestKernel, core: str) -> None:
    cache = str(tmp_path / "cache")
    path = initramfs.build(guest, core, cache_dir=cache)
    data, inode = Path(path).read_bytes(), os.stat(path).st_ino
    assert initramfs.build(guest, core, cache_dir=cache) == path
    assert os.stat(path).st_ino == inode
    Path(path).write_bytes(data[:100])
    assert initramfs.build(guest, core, cache_dir=cache) == path
    assert Path(path).read_bytes() == data
    assert Path(initramfs.build(guest, core, cache_dir=str(tmp_path / "other"))).read_bytes() == data
    others = {
        initramfs.build(guest.replace(digest="d2"), core, cache_dir=cache),
        initramfs.build(guest, core, modules={"boot": modules.SETS["boot"]}, cache_dir=cache),
    }
    Path(core).write_bytes(b"another init")
    others.add(initramfs.build(guest, core, cache_dir=cache))
    assert len(others) == 3
    assert path not in others


def test_a_module_of_two_sets_is_in_both_but_for_boot(tmp_path: Path, guest: GuestKernel, core: str) -> None:
    sets = {"9p": ("9p",), "two": ("fscache", "virtio_blk"), "boot": ("virtio",)}
    path = initramfs.build(guest, core, modules=sets, cache_dir=str(tmp_path / "cache"))
    found = entries(Path(path).read_bytes())
    lines = found["modules/list"][2].decode().splitlines()
    assert lines == [
        "boot 00-virtio_ring.ko",
        "boot 01-virtio.ko",
        "9p 02-9pnet.ko",
        "9p 03-netfs.ko",
        "9p 04-fscache.ko",
        "9p 05-9p.ko",
        "two 03-netfs.ko",
        "two 04-fscache.ko",
        "two 06-virtio_blk.ko",
    ]


def test_a_builtin_module_needs_no_file(tmp_path: Path, guest: GuestKernel, core: str) -> None:
    os.unlink(os.path.join(guest.modules, "virtio_ring.ko"))
    with pytest.raises(Unavailable, match="lacks the module virtio_ring"):
        initramfs.build(guest, core, cache_dir=str(tmp_path / "cache"))
    having = guest.replace(builtin=frozenset({"virtio_ring"}))
    found = entries(Path(initramfs.build(having, core, cache_dir=str(tmp_path / "cache"))).read_bytes())
    assert b"virtio_ring" not in found["modules/list"][2]


def test_a_kernel_in_one_piece(tmp_path: Path, guest: GuestKernel, core: str) -> None:
    for name in os.listdir(guest.modules):
        os.unlink(os.path.join(guest.modules, name))
    found = entries(Path(initramfs.build(guest, core, cache_dir=str(tmp_path / "cache"))).read_bytes())
    assert found["modules/list"][2] == b""
