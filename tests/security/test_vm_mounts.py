"""A guest's mounts: folders of the host's through QEMU's 9p server, which a hostile guest attacks first."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from support.sandboxes import PROBE_FILE, need_level, need_root, output, unconfined_python

# As root of a guest with every capability that could matter, no filter, and so with the guest's kernel at its hand.
EVERY_POWER: dict[str, Any] = {
    "user": 0,
    "capabilities": (
        "CAP_SYS_ADMIN",
        "CAP_MKNOD",
        "CAP_FSETID",
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_SETFCAP",
    ),
    "seccomp": "unconfined",
}
OWNER = 12345
MANY = 10  # more than the machine has room for devices


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    for name in ("read", "write"):
        (tmp_path / name).mkdir()
    (tmp_path / "read" / "f").write_text("first\n")
    (tmp_path / "one").write_text("a single file\n")
    (tmp_path / "write" / "to-the-hosts").symlink_to("/etc/shadow")
    (tmp_path / "secret").write_text("the host's")
    if os.geteuid() == 0:
        for name in ("write", "one"):
            os.chown(tmp_path / name, OWNER, OWNER)
    return tmp_path


def mounts(at: Path) -> list[rf.Mount]:
    return [
        *(rf.Mount(at / "read", f"/m/{number}") for number in range(MANY)),
        rf.Mount(at / "one", "/deep/er/one", writable=True),
        rf.Mount(at / "write", "/w", writable=True),
        rf.Mount(at / "read", "/w2/inner"),
    ]


ORDINARY = """
import errno, mmap, os, fcntl
os.chdir("/w")
def tried(what, call):
    try:
        call()
    except OSError as error:
        print(what, errno.errorcode[error.errno])
    else:
        print(what, "ok")
with open("a", "wb") as file:
    file.write(b"1" * 200000); file.flush(); os.fsync(file.fileno())
os.link("a", "b"); os.rename("b", "c"); os.truncate("a", 5000)
with open("a", "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 5000); mapped[0:5] = b"hello"; mapped.flush(); mapped.close()
print(open("c", "rb").read(6), os.stat("c").st_size, os.stat("a").st_nlink, os.stat("a").st_ino == os.stat("c").st_ino)
one, two = open("appended", "ab", buffering=0), open("appended", "ab", buffering=0)
one.write(b"x"); two.write(b"y"); print(open("appended", "rb").read())
os.makedirs("dir/below"); os.symlink("/etc/hostname", "dir/l"); print(os.readlink("dir/l"))
gone = open("gone", "w+b"); gone.write(b"data"); gone.flush(); os.unlink("gone"); gone.seek(0); print(gone.read())
tried("times", lambda: os.utime("a", (1, 1)))
tried("lock", lambda: fcntl.flock(open("a"), fcntl.LOCK_EX))
tried("not empty", lambda: os.rmdir("dir"))
tried("read-only", lambda: open("/m/3/x", "w"))
tried("read-only, in it", lambda: open("/w2/inner/f", "w"))
tried("across", lambda: os.rename("a", "/m/0/a"))
tried("fifo", lambda: os.mkfifo("pipe"))
with open("/deep/er/one", "r+") as file:
    print(file.read().strip()); file.seek(0); file.truncate(); file.write("changed")
print({os.stat(path).st_uid - os.getuid() for path in (".", "a", "dir", "/deep/er/one")})
print(os.listdir("/.mounts"), os.listdir("/.writable"))
"""


def test_a_folder_of_the_hosts_is_as_on_a_file_system_of_ones_own(folders: Path) -> None:
    """13 mounts in two devices; owners at both ends, links, renames, mappings, appending, what the host changes."""
    need_level("vm")
    with rf.Sandbox(isolation="vm", mounts=mounts(folders)) as sandbox:
        printed = output(sandbox.run(["python3", "-c", ORDINARY])).decode().splitlines()
        assert printed == [
            "b'hello1' 5000 2 True",
            "b'xy'",
            "/etc/hostname",
            "b'data'",
            "times ok",
            "lock ok",
            "not empty ENOTEMPTY",
            "read-only EROFS",
            "read-only, in it EROFS",
            "across EXDEV",
            "fifo ENXIO",
            "a single file",
            "{0}",
            "[] []",
        ]
        assert output(sandbox.run(["cat", f"/m/{MANY - 1}/f"])) == b"first\n"
        (folders / "read" / "f").write_text("of the host, later\n")
        assert output(sandbox.run(["cat", f"/m/{MANY - 1}/f"])) == b"of the host, later\n"
        shown = output(sandbox.run(["sh", "-c", "grep -c 9p /proc/self/mountinfo; grep ' /w ' /proc/self/mountinfo"]))
        assert {"rw", "nosuid", "nodev"} <= set(shown.decode().splitlines()[1].split()[5].split(","))
    owner = OWNER if os.geteuid() == 0 else os.geteuid()
    assert {path.lstat().st_uid for path in (folders / "write").rglob("*") if path.name != "to-the-hosts"} == {owner}
    assert (folders / "one").read_text() == "changed"
    assert (folders / "write" / "c").stat().st_nlink == 2


HOSTILE = """
import errno, os, subprocess, sys
os.chdir("/w")
def tried(what, call):
    try:
        found = call()
    except OSError as error:
        print(what, errno.errorcode[error.errno])
    else:
        print(what, "ok", found if isinstance(found, (bytes, list)) else "")
def read(path):
    with open(path, "rb") as file:
        return file.read(100)
def made(path):
    with open(path, "w") as file:
        file.write("#!/bin/sh")
    return path
tried("planted by the host", lambda: read("to-the-hosts"))
os.symlink(sys.argv[1], "secret"); os.symlink("/", "root"); os.symlink("../../../../../../..", "up")
for name in ("secret", "root" + sys.argv[1], "up" + sys.argv[1], "../" + sys.argv[1]):
    tried("through a link", lambda: read(name))
tried("device", lambda: os.mknod("null", 0o20666, os.makedev(1, 3)))
tried("disk", lambda: os.mknod("disk", 0o60666, os.makedev(8, 0)))
tried("setuid", lambda: os.chmod(made("setuid"), 0o4755))
tried("setgid", lambda: os.chmod(made("setgid"), 0o2755))
tried("created setuid", lambda: os.open("created", os.O_CREAT | os.O_WRONLY, 0o4777))
tried("capability", lambda: os.setxattr(made("caps"), "security.capability", b"\\1\\0\\0\\2\\xff" + bytes(15)))
tried("trusted", lambda: os.setxattr(made("trusted"), "trusted.overlay.opaque", b"y"))
tried("to root", lambda: os.chown(made("given"), 4242, 4242))
# The shares as they are, with what hides them taken off and nothing but the server to say no.
for tag in ("mounts", "writable"):
    subprocess.run(["umount", "/." + tag], check=True)
    subprocess.run(["mount", "-o", "remount,rw", "/." + tag], check=True)
    tried("all of " + tag, lambda: sorted(os.listdir("/." + tag), key=int))
    tried("made in " + tag, lambda: made("/." + tag + "/new"))
tried("read-only by the server", lambda: made("/.mounts/1/new"))
tried("removed", lambda: os.unlink("/.mounts/1/f"))
"""
EXPECTED = {
    "planted by the host": "EACCES",  # no more than a name in the guest, whose own /etc/shadow is hidden
    "through a link": "ENOENT",
    "device": "EPERM",
    "disk": "EPERM",
    "setuid": "EPERM",
    "setgid": "EPERM",
    "capability": "ENOTSUP",  # of its own kernel; the server lacks CAP_SETFCAP
    "trusted": "ENOTSUP",
    "made in mounts": "EROFS",
    "made in writable": "EROFS",
    "read-only by the server": "EROFS",
    "removed": "EROFS",
}


def test_a_guests_root_leaves_nothing_dangerous_in_a_writable_folder(folders: Path) -> None:
    """Links that lead out, devices, set-user-ID files and capabilities, by a guest's root with every capability."""
    need_root()
    need_level("vm")
    control = folders / "control"
    control.mkdir()
    made = unconfined_python(
        "import os, sys; os.chdir(sys.argv[1]); os.mknod('null', 0o20666, os.makedev(1, 3));"
        "open('s', 'w').close(); os.chmod('s', 0o4755); os.symlink('/', 'root');"
        "print(open('root' + sys.argv[2]).read())",
        str(control),
        str(folders / "secret"),
    )
    assert made == b"the host's\n"
    result = rf.run(
        ["python3", "-c", HOSTILE, str(folders / "secret")], isolation="vm", mounts=mounts(folders), **EVERY_POWER
    )
    found: dict[str, set[str]] = {}
    for line in result.stdout.decode().splitlines():
        what, _, said = line.rpartition(" E") if " ok" not in line else line.partition(" ok")
        found.setdefault(what, set()).add("E" + said if " ok" not in line else said)
    assert result.exit_code == 0, (result.stderr, found)
    assert {what: found[what] for what in EXPECTED} == {what: {said} for what, said in EXPECTED.items()}
    assert b"the host's" not in result.stdout
    # What is on the host's disk now: nothing but folders, files and links, none of them more than its owner's.
    for path in (folders / "write").rglob("*"):
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode) or stat.S_ISLNK(mode), path
        assert not mode & (stat.S_ISUID | stat.S_ISGID), path
        if path.name != "to-the-hosts":
            assert (path.lstat().st_uid, path.lstat().st_gid) == (OWNER, OWNER)
        if stat.S_ISREG(mode):
            assert "security.capability" not in os.listxattr(path)
    assert (folders / "read" / "f").read_text() == "first\n"
    assert sorted(os.listdir(folders / "read")) == ["f"]


def test_more_mounts_than_a_guest_takes_are_refused(tmp_path: Path) -> None:
    need_level("vm")
    too_many = [rf.Mount(tmp_path, f"/m/{number}") for number in range(33)]
    with pytest.raises(rf.CannotEnforce) as caught:
        rf.run(["true"], isolation="vm", mounts=too_many)
    assert [one.rule for one in caught.value.unmet] == ["mounts"]
    assert output(rf.run(["./probe", "exit", "0"], isolation="vm", mounts=too_many[:32], files=PROBE_FILE)) == b""
