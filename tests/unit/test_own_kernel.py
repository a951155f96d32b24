"""A kernel that a spec names: what of it is kept, and what isn't even read."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from kernel_parts import RELEASE, bzimage, debian_modules, elf_kernel

from ringfence.errors import SpecError, Unavailable
from ringfence.levels.vm import kernel, own_kernel
from ringfence.spec import Kernel

KERNEL = elf_kernel()


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A bzImage with its modules beside it, as a distribution has them."""
    folder = tmp_path / "os/lib/modules" / RELEASE
    (folder / "kernel/fs").mkdir(parents=True)
    for name, data in debian_modules().items():
        (folder / "kernel/fs" / f"{name}.ko").write_bytes(data)
    (folder / "modules.builtin").write_text("")
    (tmp_path / "os/boot").mkdir()
    path = tmp_path / "os/boot/vmlinuz"
    path.write_bytes(bzimage(gzip.compress(KERNEL)))
    return path


def modules_of(image: Path) -> Path:
    return image.parents[1] / "lib/modules" / RELEASE


def test_it_is_prepared_once_until_it_changes(image: Path, cache: str) -> None:
    said: list[str] = []
    made = own_kernel.prepare(Kernel(image), cache, progress=said.append)
    assert (made.release, made.source, len(said)) == (RELEASE, str(image), 1)
    assert Path(made.vmlinux).read_bytes() == KERNEL
    assert "9p" in made.sets
    assert own_kernel.prepare(Kernel(image), cache, progress=said.append) == made
    assert own_kernel.prepare(Kernel(image, modules_of(image)), cache, progress=said.append) == made
    assert len(said) == 1
    again = elf_kernel(size=200_000)
    image.write_bytes(bzimage(gzip.compress(again)))
    other = own_kernel.prepare(Kernel(image), cache, progress=said.append)
    assert (Path(other.vmlinux).read_bytes(), len(said)) == (again, 2)
    assert other.digest != made.digest
    # Modules that are installed later, as depmod(8) tells.
    (modules_of(image) / "kernel/fs/9p.ko").unlink()
    (modules_of(image) / "modules.dep").write_text("")
    assert "9p" not in own_kernel.prepare(Kernel(image), cache).sets


def test_few_are_kept(image: Path, cache: str) -> None:
    for number in range(10):
        image.write_bytes(bzimage(gzip.compress(KERNEL)) + bytes(number + 1))
        made = own_kernel.prepare(Kernel(image), cache)
    listed = [one for one in os.listdir(os.path.join(cache, "own-kernels")) if not one.startswith(".")]
    assert len(listed) == 8
    assert os.path.exists(made.vmlinux)


def test_one_in_a_single_piece(tmp_path: Path, cache: str) -> None:
    (tmp_path / "vmlinux").write_bytes(KERNEL)
    assert own_kernel.prepare(Kernel(tmp_path / "vmlinux"), cache).read_module("9p") is None


def test_a_module_that_is_a_symlink_or_a_fifo_is_not_read(image: Path, cache: str, tmp_path: Path) -> None:
    """It would be handed to the guest: whatever the caller may read, and the owner of the folder perhaps not."""
    secret = tmp_path / "secret"
    secret.write_bytes(debian_modules()["9p"] + b"only the caller's")
    fs = modules_of(image) / "kernel/fs"
    for name, make in (("9p.ko", lambda path: path.symlink_to(secret)), ("9pnet.ko", os.mkfifo)):
        (fs / name).unlink()
        make(fs / name)
    made = own_kernel.prepare(Kernel(image), cache)
    assert "9p" not in made.sets
    assert not any(b"only the caller's" in path.read_bytes() for path in Path(made.modules).iterdir())


def test_modules_that_another_account_put_there_are_not_taken(tmp_path: Path) -> None:
    """As /tmp/lib/modules for /tmp/build/bzImage: nobody named that folder."""
    image = tmp_path / "build" / "bzImage"
    folder = tmp_path / "lib" / "modules" / "6.99.0-mine"
    image.parent.mkdir()
    folder.mkdir(parents=True)
    assert kernel.folder_beside(str(image), folder.name) == str(folder)
    tmp_path.chmod(0o1777)
    assert kernel.folder_beside(str(image), folder.name) == str(folder)
    folder.chmod(0o777)
    assert kernel.folder_beside(str(image), folder.name) is None
    folder.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(folder.parent, 65534, 65534)
        assert kernel.folder_beside(str(image), folder.name) is None


def test_a_release_that_leads_elsewhere(tmp_path: Path, cache: str) -> None:
    """What an image says of itself is no path."""
    elsewhere = tmp_path / "a/lib/modules"
    elsewhere.mkdir(parents=True)
    (tmp_path / "a/boot").mkdir()
    path = tmp_path / "a/boot/vmlinuz"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "modules.builtin").write_text("kernel/fs/9p/9p.ko\n")
    named = "../../../outside"
    path.write_bytes(bzimage(gzip.compress(KERNEL), release=named))
    assert own_kernel.prepare(Kernel(path), cache).builtin == frozenset()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda image: Kernel(image.parent), "no file"),
        (lambda image: Kernel(image.parent / "none"), "no file"),
        (lambda image: Kernel(image, image), "no folder"),
        (lambda image: Kernel(image, append="a\nb"), "one line"),
        (lambda image: Kernel(image, append="é"), "one line"),
        (lambda image: Kernel(image, append="x" * 1025), "1025 characters"),
        (lambda image: Kernel(image, append="quiet rf.sets=boot"), "rf."),
        (lambda image: Kernel(image, append='"rf.sets=boot"'), "rf."),
    ],
)
def test_what_makes_no_sense(make: object, says: str, image: Path) -> None:
    with pytest.raises(SpecError, match=says):
        make(image)  # type: ignore[operator]


def test_what_guests_cannot_be_started_from(image: Path, cache: str) -> None:
    image.write_bytes(b"hello" * 100)
    with pytest.raises(Unavailable, match="neither an x86 bzImage"):
        own_kernel.prepare(Kernel(image), cache)
    image.write_bytes(bzimage(gzip.compress(KERNEL)))
    (modules_of(image) / "modules.builtin").unlink()
    with pytest.raises(Unavailable, match=r"no file modules\.builtin"):
        own_kernel.prepare(Kernel(image), cache)
    (modules_of(image) / "modules.builtin").touch()
    (modules_of(image) / "kernel/fs/virtio_ring.ko").unlink()
    with pytest.raises(Unavailable, match="lacks the module virtio_ring"):
        own_kernel.prepare(Kernel(image), cache)
