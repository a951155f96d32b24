"""What a workload could have from its caller though nobody means it: descriptors, a terminal, the program of init."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.wire import launcher as launcher_module
from ringfence.wire.launcher import core_path
from support import unprivileged
from support.sandboxes import LOCAL_LEVELS, PROBE, need_root, output, python_json

# A caller whose every descriptor is inheritable: files, folders, sockets, namespaces of the host, at high and low
# numbers. They are there before the launcher is started, and more of them before the second run.
GENEROUS = r"""
import json, os, socket, subprocess, sys
from pathlib import Path
import ringfence as rf
from ringfence.wire import launcher
from ringfence.wire.launcher import probe_path

isolation, closed = sys.argv[1:]
for fd in map(int, closed.split()):
    os.close(fd)

def give_away():
    fds = [os.open("/", os.O_RDONLY | os.O_DIRECTORY), os.open("/etc", os.O_PATH), os.open("/etc/passwd", os.O_RDONLY)]
    namespaces = ("mnt", "net", "pid", "user", "uts", "ipc", "cgroup")
    fds += [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in namespaces]
    fds += [one.detach() for one in socket.socketpair()] + list(os.pipe()) + [os.memfd_create("mine", 0)]
    fds += [os.pidfd_open(os.getpid())]
    fds += [os.dup2(fds[0], number) for number in (200, 900)]
    for fd in fds:
        os.set_inheritable(fd, True)
    return fds

probe = rf.File(Path(probe_path()).read_bytes(), 0o755)
given = give_away()
runs = []
for _ in range(2):
    runs.append(rf.run(["./probe", "ls-fds"], isolation=isolation, files={"probe": probe}).stdout.decode())
    given += give_away()
control = subprocess.run([probe_path(), "ls-fds"], stdin=subprocess.DEVNULL, capture_output=True, close_fds=False)
folder = f"/proc/{launcher._launcher.pid}/fd"
kept = [os.readlink(f"{folder}/{name}") for name in os.listdir(folder)] if os.geteuid() == 0 else []
Path(os.environ["HOME"], "found").write_text(json.dumps(
    {"runs": runs, "given": len(set(given)), "control": control.stdout.decode(), "launcher": kept}))
"""


@pytest.mark.parametrize("who", ["root", "unprivileged"])
@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_workload_has_no_descriptor_of_its_callers(isolation: str, who: str) -> None:
    need_root()
    found = generous(who, isolation, "")
    assert found["given"] > 30
    assert len(found["control"].splitlines()) > found["given"]  # with 0, 1 and 2
    for run in found["runs"]:
        lines = run.splitlines()
        assert [line.split()[0] for line in lines] == ["0", "1", "2"]
        assert all(line.split()[1].startswith(("/dev/null", "pipe:[")) for line in lines)
    assert not [one for one in found["launcher"] if one == "/etc/passwd" or "memfd:mine" in one]


@pytest.mark.parametrize("closed", ["0", "1 2", "0 1 2"])
def test_a_caller_without_the_standard_descriptors(closed: str) -> None:
    """What we open takes their numbers then."""
    need_root()
    found = generous("unprivileged", "process", closed)
    assert [line.split()[0] for line in found["runs"][0].splitlines()] == ["0", "1", "2"]


def generous(who: str, isolation: str, closed: str) -> Any:
    """It tells by a file, as it may have no stdout."""
    file = unprivileged.home() / "found"
    if who == "unprivileged":
        with unprivileged.caller(GENEROUS, isolation, closed) as caller:
            _, complaints = caller.communicate(timeout=60)
        assert caller.returncode == 0, complaints
    else:
        code = f"import os; os.environ['HOME'] = {str(file.parent)!r}\n{GENEROUS}\nprint(1)"
        python_json(code, isolation, closed)
    found = json.loads(file.read_text())
    file.unlink()
    return found


# ---- terminals ----

# In a session of its own with a terminal, of which it says what the probe can do: run bare, and in a sandbox.
WITH_TERMINAL = r"""
import errno, fcntl, json, os, pty, sys, termios
from pathlib import Path
isolation = sys.argv[1]
os.setsid()
master, slave = pty.openpty()
fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
name = os.ttyname(slave)
for fd in (0, 1, 2):
    os.dup2(slave, fd)
import subprocess
import ringfence as rf
from ringfence.wire.launcher import probe_path
attempts = [["escape", "own-terminal"], ["try-open-read", name], ["try-open-write", name]]
bare = [subprocess.run([probe_path(), *one], capture_output=True).stdout.decode().strip() for one in attempts]
probe = {"probe": rf.File(Path(probe_path()).read_bytes(), 0o755)}
inside = [rf.run(["./probe", *one], isolation=isolation, files=probe).stdout.decode().strip() for one in attempts]
Path(os.environ["HOME"], "found").write_text(json.dumps([bare, inside]))
"""
NO_TERMINAL = {
    "process": ["ENXIO open", "EACCES open", "EACCES open"],
    "container": ["ENXIO open", "ENOENT open", "ENOENT open"],
}


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_the_callers_terminal_is_out_of_reach(isolation: str) -> None:
    """Of an unprivileged caller, whose own it is: not controlled by it, neither read from nor written to."""
    need_root()
    with unprivileged.caller(WITH_TERMINAL, isolation) as caller:
        _, complaints = caller.communicate(timeout=60)
    assert caller.returncode == 0, complaints
    file = unprivileged.home() / "found"
    bare, inside = json.loads(file.read_text())
    file.unlink()
    assert bare == ["ok", "ok", "ok"]
    assert inside == NO_TERMINAL[isolation]


# ---- the program that init executes ----

# A program is held by a descriptor while it runs, and written to once it doesn't: CVE-2019-5736.
OVERWRITE = r"""
import errno, json, os, subprocess, sys
program = sys.argv[1]
child = subprocess.Popen([program, "stubborn"], stdout=subprocess.PIPE)
child.stdout.readline()
held = os.open(f"/proc/{child.pid}/exe", os.O_RDONLY)
def write():
    try:
        os.write(os.open(f"/proc/self/fd/{held}", os.O_WRONLY), b"overwritten")
        return "ok"
    except OSError as error:
        return errno.errorcode[error.errno]
running = write()
child.kill()
child.wait()
print(json.dumps([running, write(), open(program, "rb").read(11).decode(errors="replace")]))
"""


def test_the_program_of_init_cannot_be_overwritten(tmp_path: Path) -> None:
    """The launcher and each init execute a sealed copy in memory. The control is a program that is a file."""
    copy = shutil.copy(PROBE, tmp_path / "program")
    done = subprocess.run(
        ["/usr/bin/python3", "-c", OVERWRITE, copy], capture_output=True, check=True, text=True, timeout=60
    )
    assert json.loads(done.stdout) == ["ETXTBSY", "ok", "overwritten"]

    rf.run(["true"], isolation="process")
    helper = launcher_module.launcher()
    held = os.open(f"/proc/{helper.pid}/exe", os.O_RDONLY)
    try:
        assert os.readlink(f"/proc/self/fd/{held}").startswith("/memfd:ringfence-core")
        import fcntl

        assert fcntl.fcntl(held, 1034) & 0xF == 0xF  # F_GET_SEALS
        with pytest.raises(OSError, match=r"not permitted|busy"):
            os.write(os.open(f"/proc/self/fd/{held}", os.O_WRONLY), b"overwritten")
    finally:
        os.close(held)
    sealed = launcher_module.sealed_core()
    try:
        writable = os.open(f"/proc/self/fd/{sealed}", os.O_RDWR)
        try:
            with pytest.raises(PermissionError):
                os.write(writable, b"overwritten")
            with pytest.raises(PermissionError):
                os.ftruncate(writable, 0)
        finally:
            os.close(writable)
        with open(f"/proc/self/fd/{sealed}", "rb") as file:
            assert hashlib.sha256(file.read()).digest() == hashlib.sha256(Path(core_path()).read_bytes()).digest()
    finally:
        os.close(sealed)


def test_a_host_that_executes_nothing_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the file instead: nothing is started, and nothing stays open."""

    def forbidden(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", forbidden)
        with pytest.raises(rf.Unavailable, match=r"vm\.memfd_noexec"):
            launcher_module.Launcher()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_spawn", forbidden)
        with pytest.raises(rf.Unavailable, match="security module"):
            launcher_module.Launcher()


# By the interpreter of a script the command itself becomes init's program, as the workload's user.
SCRIPT = {"script": rf.File(b"#!/proc/self/exe --version\n", 0o755)}
WRITERS = r"""
for target in /proc/1/exe /proc/self/exe /proc/$PPID/exe; do
    (echo x > $target) 2>&1 | grep -o "[A-Z][a-z -]*$"
done
"""


@pytest.mark.parametrize("user", [None, "root"])
def test_a_script_whose_interpreter_is_init(user: str | None) -> None:
    before = hashlib.sha256(Path(core_path()).read_bytes()).digest()
    for isolation in LOCAL_LEVELS:
        options: Any = {"user": user} if user and isolation == "container" else {}
        result = rf.run(["./script"], isolation=isolation, files=SCRIPT, **options)
        assert (result.exit_code, result.stdout) == (2, b"")
        assert result.stderr.startswith(b"usage: ringfence-core")
        written = output(rf.run(["sh", "-c", WRITERS], isolation=isolation, **options)).decode().splitlines()
        assert len(written) == 3
        assert set(written) <= {"Permission denied", "Text file busy", "Read-only file system"}
    assert hashlib.sha256(Path(core_path()).read_bytes()).digest() == before


MASKED = ("/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/kcore", "/proc/interrupts")


def test_masks_are_empty() -> None:
    """What opens behind a mask has nothing in it; the control is that there is something on the host."""
    need_root()
    assert any(Path(path).read_bytes() for path in ("/proc/timer_list", "/proc/interrupts"))
    script = "for path in " + " ".join(MASKED) + "; do cat $path 2>/dev/null; done; true"
    assert output(rf.run(["sh", "-c", script], isolation="container")) == b""


# ---- memory and files ----

OWN_MEMORY = r"""
import mmap, os, sys
with open(sys.argv[1], "rb") as file:
    for kind in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
        mapping = mmap.mmap(file.fileno(), 0, flags=kind, prot=mmap.PROT_READ)
        import ctypes
        address = None
        for line in open("/proc/self/maps"):
            if line.rstrip().endswith(sys.argv[1]):
                address = int(line.split("-")[0], 16)
        try:
            with open("/proc/self/mem", "rb+", buffering=0) as memory:
                memory.seek(address)
                memory.write(b"changed")
            print("written", mapping[:7].decode())
        except OSError as error:
            print(error.errno)
        mapping.close()
"""


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_read_only_file_is_not_written_to_through_memory(isolation: str, tmp_path: Path) -> None:
    """/proc/self/mem writes over a private mapping's pages, which are then its own, and over a shared one's never."""
    need_root()
    file = Path(unprivileged.home().parent) / "shared-file"
    file.write_bytes(b"as it was\n" * 500)
    mounts = [rf.Mount(file, file)]
    result = rf.run(["/usr/bin/python3", "-S", "-c", OWN_MEMORY, str(file)], isolation=isolation, mounts=mounts)
    # At the process level not even the door is open: /proc is not to be written to.
    wanted = {"process": ["13", "13"], "container": ["written changed", "5"]}[isolation]
    assert result.stdout.decode().splitlines() == wanted
    assert file.read_bytes() == b"as it was\n" * 500
