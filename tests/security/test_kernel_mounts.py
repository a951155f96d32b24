"""What is mounted of the kernel's own in an image, or below a folder of the host that is shown, isn't seen inside: a
proc in a chroot's place tells of all processes of the host.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.images import kernel_mounts
from ringfence.images.kernel_mounts import kernel_mount_of
from support.sandboxes import need_level, need_root

TOP = "/mnt"
# In a mount namespace of its own, as root, with a proc and a tmpfs below /opt and in an image; one of them below
# another mount.
SETUP = """
mount -t tmpfs none "$1" && mkdir -p "$1/opt/chroot/proc" "$1/image/srv/deep" "$1/image/usr" "$1/image/proc" &&
mount --bind "$1/opt" /opt && mount -t proc none /opt/chroot/proc && mkdir /opt/data &&
mkdir "$(printf '/opt/a\\rb')" && mount -t tmpfs none "$(printf '/opt/a\\rb')" &&
mount -t tmpfs none /opt/data && echo kept >/opt/data/file && mkdir /opt/data/dev &&
mount -t devpts none /opt/data/dev && mount -t tmpfs none "$1/image/srv/deep" &&
mkdir "$1/image/srv/deep/a b" && mount -t proc none "$1/image/srv/deep/a b" &&
echo kept >"$1/image/srv/deep/file" && mount -t proc none "$1/image/proc" && mount --rbind /usr "$1/image/usr" &&
for name in bin lib lib64; do ln -s usr/$name "$1/image/$name"; done && chmod 755 "$1" && shift && exec "$@"
"""
SCRIPT = """
import os, sys
import ringfence as rf
from ringfence.levels.vm.images import erofs_disk

top, how = sys.argv[1:]
if how == "user":
    os.setgid(65534), os.setuid(65534)
for overlay in (False, True):
    for image, proc, kept in (
        ("host", "/opt/chroot/proc", "/opt/data"), (top + "/image", "/srv/deep/a b", "/srv/deep")
    ):
        if overlay and how == "user":
            continue
        words = ["sh", "-c", 'ls -A "$1"; echo; cat "$2/file"; ls -A /opt/data/dev 2>/dev/null || :', "sh", proc, kept]
        result = rf.run(words, isolation="container", image=image, overlay=overlay)
        assert result.ok and result.stdout == b"\\nkept\\n", (image, overlay, result)
        result = rf.run(["cat", "/proc/self/stat"], isolation="container", image=image, overlay=overlay)
        assert result.ok, result
for folder, reason in (
    ("/opt/chroot", "a proc of the host's is mounted below it, at /opt/chroot/proc"), ("/opt/chroot/proc", "in a proc")
):
    for isolation in ("container", "vm")[:1 if how == "user" else 2]:
        try:
            rf.run(["true"], isolation=isolation, mounts=[rf.Mount(folder, "/data")])
        except rf.CannotEnforce as error:
            assert reason in str(error), error
        else:
            raise AssertionError(folder)
assert rf.run(["cat", "/data/file"], isolation="container", mounts=[rf.Mount("/opt/data/file", "/data/file")]).ok
try:
    erofs_disk(top + "/image", top)
except rf.SpecError as error:
    assert "/image/proc is a proc of the host's" in str(error), error
else:
    raise AssertionError("a disk")
meant = [rf.Mount("/opt/chroot", "/data", secret=True)]
shown = rf.run(["test", "-e", "/data/proc/self/stat"], isolation="container", mounts=meant)
print("ok", shown.exit_code)
"""


@pytest.mark.parametrize("how", ["root", "user"])
def test_what_is_mounted_of_the_kernels_own_is_not_seen(how: str) -> None:
    need_root()  # to mount
    need_level("container")
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", SETUP, "sh", TOP]
    words += [sys.executable, "-P", "-c", SCRIPT, TOP, how]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok 0\n"


def test_what_is_the_kernels_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        b"1 0 8:1 / / rw - ext4 /dev/vda rw",
        b"2 1 0:5 / /proc rw - proc proc rw",
        b"3 1 0:9 / /opt/a\\040b rw shared:1 - sysfs sysfs rw",
        b"4 3 0:9 / /opt/a\\040b/fs/bpf rw - bpf bpf rw",
        b"5 1 0:9 / /opt/auto rw - autofs systemd-1 rw",
        b"6 5 0:9 / /opt/auto rw - nfs4 server:/ rw",
        b"7 1 0:9 / /opt/idle rw - autofs systemd-1 rw",
        b"8 1 0:9 / /opt/ssh rw - fuse.sshfs x rw",
        b"9 1 0:9 / /opt/fuses rw - fusectl x rw",
        b"10 1 0:9 / /opt/net rw - nsfs nsfs rw",
        b"11 1 0:9 / /opt/both rw - proc proc rw",
        b"12 11 0:9 / /opt/both rw - tmpfs none rw",
        b"13 1 0:9 / /option rw - proc proc rw",
        b"14 1 0:9 / /srv/a\rb\x85c rw - proc pr\roc rw",
        b"15 1 0:9 / /dev rw - devtmpfs none rw",
        b"16 15 0:9 / /dev/shm rw - tmpfs none rw",
        b"17 1 0:9 / /covered/deep rw - tmpfs none rw",
        b"18 1 0:9 / /covered rw - sysfs none rw",
    )
    mounts = kernel_mounts._parse(b"\n".join(lines) + b"\n")
    monkeypatch.setattr(kernel_mounts, "_own_mounts", lambda: mounts)
    assert kernel_mounts.kernel_mounts([b"/opt", b"/usr"]) == [
        (b"/opt/a b", b"sysfs"),
        (b"/opt/both", b"proc"),
        (b"/opt/fuses", b"fusectl"),
        (b"/opt/idle", b"autofs"),
        (b"/opt/net", b"nsfs"),
    ]
    assert kernel_mounts.kernel_mounts([b"/proc"]) == [(b"/proc", b"proc")]
    assert kernel_mount_of(b"/opt/a b/fs/bpf/x") == b"bpf"
    assert kernel_mount_of(b"/opt/both/1") == b"proc"
    assert kernel_mount_of(b"/opt/ssh/x") == kernel_mount_of(b"/optional") == b""
    # A name may hold what ends a line elsewhere.
    assert kernel_mounts.kernel_mounts([b"/srv"]) == [(b"/srv/a\rb\x85c", b"proc")]
    # The nearest mount counts, and what was mounted over it later.
    assert kernel_mount_of(b"/dev/shm/image") == b""
    assert kernel_mount_of(b"/dev/x") == b"devtmpfs"
    assert kernel_mount_of(b"/covered/deep/x") == b"sysfs"


@pytest.mark.parametrize(
    ("fstype", "data"),
    [
        *((name, True) for name in ("ext4", "tmpfs", "overlay", "fuse", "fuse.sshfs", "fuseblk", "nfs4", "zfs")),
        *((name, False) for name in ("proc", "sysfs", "a-new-one", "not-known-here", "autofs", "fusectl", "cgroup2")),
    ],
)
def test_what_is_on_no_disk_and_not_known_as_data_is_of_the_kernel(
    fstype: str, data: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_mounts, "_on_disk", lambda: {b"ext4", b"fuseblk"})
    _, points = kernel_mounts._parse(f"1 0 0:9 / /x rw - {fstype} none rw\n".encode())
    assert (points == []) is data


CHANGES = """
import os, subprocess, sys
from ringfence.images.kernel_mounts import kernel_mounts

def mount(*words):
    subprocess.run(words, check=True)

place = os.fsencode(sys.argv[1])
assert kernel_mounts([place]) == []
for _ in range(3):
    mount("mount", "-t", "proc", "none", sys.argv[1])
    assert kernel_mounts([place]) == kernel_mounts([place]) == [(place, b"proc")]
    mount("umount", sys.argv[1])
    assert kernel_mounts([place]) == kernel_mounts([place]) == []
mount("mount", "-t", "proc", "none", sys.argv[1])
child = os.fork()
found = kernel_mounts([place])
if child == 0:
    os._exit(found != [(place, b"proc")])
assert found == [(place, b"proc")]
assert os.waitpid(child, 0)[1] == 0
# Under another root the places have other names.
parent, name = os.path.split(place)
os.mkdir(parent + b"/proc")
mount("mount", "-t", "proc", "none", parent + b"/proc")
os.chroot(parent)
assert kernel_mounts([b"/" + name]) == [(b"/" + name, b"proc")], kernel_mounts([b"/"])
print("ok")
"""
# Templates are made of the mounts of the namespace that the launcher started in, wherever the caller is by then.
LEFT = """
import ctypes, subprocess
import ringfence as rf
from ringfence.levels.state import state

subprocess.run("mount -t tmpfs none /opt && mkdir /opt/proc && mount -t proc none /opt/proc", shell=True, check=True)
state()
assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
subprocess.run(["umount", "/opt/proc"], check=True)
seen = rf.run(["ls", "-A", "/opt/proc"], isolation="container")
assert seen.ok and seen.stdout == b"", seen
print("ok")
"""


def test_a_mount_is_seen_at_once(tmp_path: Path) -> None:
    need_root()  # to mount
    words = ["unshare", "--mount", "--propagation", "private", sys.executable, "-P", "-c", CHANGES, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "ok\n", done.stderr


def test_a_template_hides_what_was_mounted_where_the_launcher_started() -> None:
    need_root()  # to mount
    need_level("container")
    words = ["unshare", "--mount", "--propagation", "private", sys.executable, "-P", "-c", LEFT]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "ok\n", done.stderr
