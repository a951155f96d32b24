from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from kernel_parts import RELEASE, bzimage, debian_modules, elf_kernel, module

from ringfence.errors import SpecError, Unavailable
from ringfence.levels.vm import bzimage as reader
from ringfence.levels.vm import debian, kernel, modules

KERNEL = elf_kernel()


def lz4_legacy(data: bytes, block: int = 3000) -> bytes:
    """By hand: blocks of literals and, where the data repeat, a match with itself."""
    out = bytearray(b"\x02\x21\x4c\x18")
    for start in range(0, len(data), block):
        part, packed, at = data[start : start + block], bytearray(), 0
        while at < len(part):
            run = 1
            while at + run < len(part) and part[at + run] == part[at] and run < 900:
                run += 1
            if run < 10 or at + run + 5 >= len(part):
                run = 0
                literals = bytearray(part[at:])
                for end in range(at + 1, len(part) - 20):
                    if len(set(part[end : end + 10])) == 1:
                        literals = bytearray(part[at : end + 1])
                        break
                at += len(literals)
                match = 0
                if at < len(part):
                    while at + match < len(part) - 5 and part[at + match] == part[at - 1]:
                        match += 1
            else:
                literals, match = bytearray(part[at : at + 1]), run - 1
                at += 1
            packed.append(min(15, len(literals)) << 4 | (min(15, match - 4) if match >= 4 else 0))
            if len(literals) >= 15:
                packed += b"\xff" * ((len(literals) - 15) // 255) + bytes([(len(literals) - 15) % 255])
            packed += literals
            if at >= len(part):
                break
            assert match >= 4
            packed += b"\x01\x00"
            if match - 4 >= 15:
                packed += b"\xff" * ((match - 19) // 255) + bytes([(match - 19) % 255])
            at += match
        out += struct.pack("<I", len(packed)) + packed
    return bytes(out)


def size_of(data: bytes) -> bytes:
    return struct.pack("<I", len(data))


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("gzip", gzip.compress),
        ("xz", lambda data: lzma.compress(data, check=lzma.CHECK_CRC32) + size_of(data)),
        ("bzip2", lambda data: bz2.compress(data) + size_of(data)),
        ("lzma", lambda data: lzma.compress(data, lzma.FORMAT_ALONE) + size_of(data)),
        ("lz4", lambda data: lz4_legacy(data) + size_of(data)),
        ("none", lambda data: data),
    ],
)
def test_every_compression_gives_the_same_kernel(name: str, pack: object) -> None:
    payload = pack(KERNEL)  # type: ignore[operator]
    image = payload if name == "none" else bzimage(payload)
    assert reader.vmlinux(image) == KERNEL
    assert reader.release(image) == RELEASE


@pytest.mark.parametrize(("command", "suffix"), [(["lz4", "-l", "-c", "-9"], b""), (["zstd", "-c", "-19"], b"")])
def test_real_compressors(command: list[str], suffix: bytes) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs the {command[0]} command")
    big = elf_kernel(size=300_000)
    payload = subprocess.run(command, input=big, stdout=subprocess.PIPE, check=True).stdout + size_of(big)
    assert reader.vmlinux(bzimage(payload)) == big


def test_zstd_without_anything_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zstandard", "compression"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Unavailable, match="zstd") as caught:
        reader.vmlinux(bzimage(b"\x28\xb5\x2f\xfd" + bytes(50)))
    assert "apt-get install zstd" in caught.value.help


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"", "neither"),
        (b"MZ" + bytes(5000), "neither"),
        (bzimage(gzip.compress(KERNEL), magic=b"HdrX"), "neither"),
        (bzimage(gzip.compress(KERNEL), length=10**6), "cut short"),
        (bzimage(gzip.compress(KERNEL), length=0), "cut short"),
        (bzimage(b"????" + bytes(99)), "compression is unknown"),
        (bzimage(lzma.compress(KERNEL)[:40] + b"\xff" * 400), "damaged"),
        (bzimage(b"\x02\x21\x4c\x18" + size_of(b"123") + b"\x0f\x00\x00"), "damaged"),
        (bzimage(gzip.compress(b"not a kernel")), "no ELF"),
        (bzimage(gzip.compress(elf_kernel(pvh=False))), "PVH"),
        (b"\x7fELF" + bytes(10), "PVH"),
    ],
)
def test_a_bad_image_is_a_clear_error(image: bytes, says: str) -> None:
    with pytest.raises(Unavailable, match=says):
        reader.vmlinux(image)


def test_a_module_says_what_it_requires() -> None:
    assert modules.requires(module({"depends": "virtio,virtio-ring", "name": "x"})) == (
        "virtio",
        "virtio_ring",
    )
    assert modules.requires(module({"depends": ""})) == ()
    soft = module({"softdep": "post: late pre: crc32c crypto-crc32c post: later", "depends": "a"})
    assert modules.requires(soft) == ("crc32c_generic", "crc32c_generic", "a")
    with pytest.raises(Unavailable, match="damaged"):
        modules.requires(b"\x7fELF\x02\x01" + bytes(80))


def test_plain_decompresses_and_drops_the_signature() -> None:
    bare = module({"depends": ""})
    signed = module({"depends": ""}, signature=b"s" * 77)
    assert signed != bare
    for name, data in (
        ("a.ko", signed),
        ("a.ko", bare),
        ("a.ko.xz", lzma.compress(signed)),
        ("a.ko.gz", gzip.compress(signed)),
    ):
        assert modules.plain(name, data) == bare


def test_a_module_that_unpacks_to_too_much_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "MAX_MODULE_BYTES", 1 << 20)
    big = bytes(8 << 20)
    packed = [("a.ko.xz", lzma.compress(big)), ("a.ko.gz", gzip.compress(big)), ("a.ko", big)]
    if shutil.which("zstd"):
        done = subprocess.run(["zstd", "-c"], input=big, stdout=subprocess.PIPE, check=True)
        packed.append(("a.ko.zst", done.stdout))
    for name, data in packed:
        with pytest.raises(Unavailable, match="more than 1 MiB"):
            modules.plain(name, data)
    for name, data in (("a.ko.xz", b"x" * 100), ("a.ko.gz", b"x" * 100)):
        with pytest.raises(Unavailable, match="damaged"):
            modules.plain(name, data)


def test_load_order_puts_what_is_required_first() -> None:
    tree = {name: modules.plain(name, data) for name, data in debian_modules().items()}
    order = list(modules.load_order(modules.every(modules.SETS), tree.get, frozenset()))
    assert sorted(order) == sorted(tree)
    for before, after in (
        ("virtio_ring", "virtio"),
        ("virtio", "virtio_mmio"),
        ("netfs", "fscache"),
        ("fscache", "9p"),
        ("crc32c_generic", "libcrc32c"),
        ("libcrc32c", "erofs"),
    ):
        assert order.index(before) < order.index(after)
    without = {name: data for name, data in tree.items() if name != "netfs"}
    assert "netfs" not in modules.load_order(["9p"], without.get, frozenset({"netfs"}))
    with pytest.raises(LookupError, match="netfs"):
        modules.load_order(["9p"], without.get, frozenset())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("RINGFENCE_KERNEL", "RINGFENCE_KERNEL_MODULES", "RINGFENCE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return str(tmp_path / "cache")


def install(root: Path, *, leave_out: str = "", builtin: str = "") -> Path:
    """A kernel with its modules as a distribution puts them; some compressed. The bzImage's path."""
    folder = root / "lib/modules" / RELEASE
    (folder / "kernel/fs").mkdir(parents=True)
    for name, data in debian_modules().items():
        if name == leave_out:
            continue
        path = folder / "kernel/fs" / f"{name.replace('_', '-')}.ko"
        if name.startswith("v"):
            path = path.with_name(path.name + ".xz")
            data = lzma.compress(data)
        path.write_bytes(data)
    (folder / "modules.builtin").write_text(f"kernel/net/unix/unix.ko\n{builtin}\n")
    (root / "boot").mkdir()
    image = root / "boot" / f"vmlinuz-{RELEASE}"
    image.write_bytes(bzimage(gzip.compress(KERNEL)))
    return image


def test_a_named_kernel_is_prepared_once(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_KERNEL", str(install(tmp_path)))
    assert kernel.find(cache) is None
    said: list[str] = []
    made = kernel.prepare(cache, progress=said.append)
    assert len(said) == 1
    assert (made.release, made.sets) == (RELEASE, tuple(modules.SETS))
    assert Path(made.vmlinux).read_bytes() == KERNEL
    assert made.read_module("virtio_ring") == modules.plain("x.ko", debian_modules()["virtio_ring"])
    assert made.read_module("nonsense") is None
    assert kernel.find(cache) == made
    assert kernel.prepare(cache, progress=said.append) == made
    assert len(said) == 1
    assert not [name for name in os.listdir(os.path.join(cache, "kernels")) if name.startswith(".new")]


def test_others_can_read_the_kernel_whatever_the_umask_is(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGFENCE_KERNEL", str(install(tmp_path)))
    before = os.umask(0o077)
    try:
        made = kernel.prepare(cache)
    finally:
        os.umask(before)
    assert os.stat(made.vmlinux).st_mode & 0o777 == 0o644
    assert os.stat(made.modules).st_mode & 0o777 == 0o755
    assert os.stat(cache).st_mode & 0o777 == 0o700


@pytest.mark.parametrize("what", ["vmlinux", "modules/9p.ko", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_kernel_is_made_anew(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch, what: str, how: str
) -> None:
    monkeypatch.setenv("RINGFENCE_KERNEL", str(install(tmp_path)))
    made = kernel.prepare(cache)
    path = Path(made.vmlinux).parent / what
    good = path.read_bytes()
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(good[:-1] if how == "cut" else bytes([good[0] ^ 1]) + good[1:])
    assert kernel.find(cache) is None
    assert kernel.prepare(cache) == made
    assert path.read_bytes() == good
    assert kernel.find(cache) == made


def test_a_touched_kernel_is_no_damaged_one(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_KERNEL", str(install(tmp_path)))
    made = kernel.prepare(cache)
    os.utime(made.vmlinux, (1, 1))
    assert kernel.find(cache) == made


def test_two_processes_make_it_once(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_KERNEL", str(install(tmp_path)))
    program = (
        "import sys; from ringfence.levels.vm import kernel\n"
        "said = []\n"
        "made = kernel.prepare(sys.argv[1], progress=said.append)\n"
        "print(made.digest, sum('preparing' in line for line in said))"
    )
    source = str(Path(kernel.__file__).parents[3])
    several = [
        subprocess.Popen(
            [sys.executable, "-c", program, cache],
            env={**os.environ, "PYTHONPATH": source},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    said = [one.communicate(timeout=60)[0].split() for one in several]
    assert all(one.returncode == 0 for one in several)
    assert len({digest for digest, _ in said}) == 1
    assert sum(int(count) for _, count in said) == 1


def test_threads_make_it_once(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_KERNEL", str(install(tmp_path)))
    said: list[str] = []
    made: list[kernel.GuestKernel] = []
    several = [
        threading.Thread(target=lambda: made.append(kernel.prepare(cache, progress=said.append))) for _ in range(8)
    ]
    for one in several:
        one.start()
    for one in several:
        one.join()
    assert len(made) == 8
    assert len(set(made)) == 1
    assert sum("preparing" in line for line in said) == 1


def test_a_missing_module(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a named kernel only the channel's modules are demanded.
    monkeypatch.setenv("RINGFENCE_KERNEL", str(install(tmp_path / "a", leave_out="netfs")))
    assert kernel.prepare(cache).sets == tuple(name for name in modules.SETS if name != "9p")
    monkeypatch.setenv("RINGFENCE_KERNEL", str(install(tmp_path / "b", leave_out="virtio_ring")))
    with pytest.raises(Unavailable, match="lacks the module virtio_ring"):
        kernel.prepare(cache)
    assert not [name for name in os.listdir(os.path.join(cache, "kernels")) if name.startswith(".new")]
    image = install(tmp_path / "c", leave_out="virtio_ring", builtin="kernel/drivers/virtio/virtio_ring.ko")
    monkeypatch.setenv("RINGFENCE_KERNEL", str(image))
    made = kernel.prepare(cache)
    assert made.builtin == {"virtio_ring"}
    assert made.read_module("virtio_ring") is None


def test_a_named_kernel_that_is_none(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_KERNEL", str(tmp_path / "missing"))
    with pytest.raises(SpecError, match="not a file"):
        kernel.find(cache)
    (tmp_path / "text").write_text("hello")
    monkeypatch.setenv("RINGFENCE_KERNEL", str(tmp_path / "text"))
    with pytest.raises(Unavailable, match="neither an x86 bzImage"):
        kernel.prepare(cache)


def make_deb(tmp_path: Path, name: str = f"linux-image-{RELEASE}", version: str = "1.0") -> Path:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    tree = tmp_path / "tree"
    tree.mkdir()
    install(tree)
    (tree / "DEBIAN").mkdir()
    control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: x <x@example.org>\n"
    (tree / "DEBIAN/control").write_text(control + "Description: a test\n")
    path = tmp_path / f"{name}_{version}_amd64.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zxz", "-b", tree, path], check=True, capture_output=True)
    shutil.rmtree(tree)
    return path


def test_a_named_package(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_KERNEL", str(make_deb(tmp_path)))
    made = kernel.prepare(cache)
    assert (made.release, made.sets) == (RELEASE, tuple(modules.SETS))
    assert Path(made.vmlinux).read_bytes() == KERNEL
    assert sorted(os.listdir(made.modules)) == sorted(f"{name}.ko" for name in debian_modules())


def test_a_broken_package(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deb = make_deb(tmp_path)
    deb.write_bytes(deb.read_bytes()[:2000])
    monkeypatch.setenv("RINGFENCE_KERNEL", str(deb))
    with pytest.raises(Unavailable, match="can't be read"):
        kernel.prepare(cache)


def fake_apt(folder: Path, deb: Path | None, version: str = "1.0") -> None:
    """apt-cache and apt-get that know one kernel; without a .deb a download fails as with old lists."""
    folder.mkdir(exist_ok=True)
    image = f"linux-image-{RELEASE}"
    cache = f"""#!/bin/sh
case "$3" in
linux-image-amd64) printf 'Package: %s\\nVersion: 1\\nDepends: {image} (= {version})\\n\\n' "$3";;
{image}) printf 'Package: %s\\nVersion: {version}\\nSize: 1000000\\n\\n' "$3";;
*) echo "E: No packages found" >&2; exit 100;;
esac
"""
    fetch = f'cp {deb} . && echo "$@" >> {folder}/downloads' if deb else "echo 'E: 404 Not Found' >&2; exit 100"
    for name, text in (("apt-cache", cache), ("apt-get", f"#!/bin/sh\n{fetch}\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def test_the_package_that_apt_knows(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    fake_apt(tools, make_deb(tmp_path))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert kernel.find(cache) is None
    said: list[str] = []
    made = kernel.prepare(cache, progress=said.append)
    assert said == [f"downloading linux-image-{RELEASE} 1.0 (1 MB)", "unpacking the guest's kernel"]
    assert made.source == f"package linux-image-{RELEASE} 1.0"
    assert kernel.find(cache) == made
    assert "packages" not in os.listdir(os.path.dirname(made.vmlinux))
    kernel.prepare(cache)
    assert len((tools / "downloads").read_text().splitlines()) == 1

    # A newer version is looked for only when asked, and takes the old one's place.
    fake_apt(tools, make_deb(tmp_path, version="2.0"), version="2.0")
    assert kernel.prepare(cache) == made
    newer = kernel.prepare(cache, refresh=True)
    assert newer.source.endswith(" 2.0")
    assert kernel.find(cache) == newer


def test_a_failed_download_says_what_to_do(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_apt(tmp_path / "bin", None)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(kernel, "_from_host", _no_host_kernel)
    with pytest.raises(Unavailable, match="404 Not Found") as caught:
        kernel.prepare(cache)
    assert "apt-get update" in caught.value.help
    assert "no host kernel" in caught.value.reason
    assert os.listdir(os.path.join(cache, "kernels")) == [".lock"]


def test_no_apt_at_all(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(kernel, "_from_host", _no_host_kernel)
    with pytest.raises(Unavailable, match="no apt here") as caught:
        kernel.prepare(cache)
    assert "RINGFENCE_KERNEL" in caught.value.help


def _no_host_kernel(cache_dir: str | None, progress: object) -> str:
    raise Unavailable("vm", "no host kernel")


def test_the_real_apt_knows_a_kernel() -> None:
    if shutil.which("apt-cache") is None:
        pytest.skip("needs apt")
    try:
        image = debian.kernel_packages()[0]
    except Unavailable as error:
        pytest.skip(f"needs package lists: {error.reason}")
    assert image.name.startswith("linux-image-")
    assert image.size_bytes is not None
    assert image.size_bytes > 5_000_000


@pytest.mark.parametrize(("mode", "path"), [(0o777, None), (0o700, "relative/cache")])
def test_a_cache_that_is_not_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, path: str | None
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    monkeypatch.setenv("RINGFENCE_CACHE", path or str(folder))
    with pytest.raises(SpecError, match="cache folder"):
        kernel.find()
