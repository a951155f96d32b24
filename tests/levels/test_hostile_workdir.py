"""What a workload can leave in its work directory to hurt whoever reads or removes it: all of it is bounded in time and
memory, at both levels on the host's kernel, for root and for an unprivileged caller.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ringfence as rf
from ringfence.errors import SpecError
from ringfence.levels.workdir import WorkDirectory
from ringfence.spec import FileIn
from support import unprivileged
from support.sandboxes import LOCAL_LEVELS, need_root, python_json

# Each makes a mess in the current directory. What can't be made by an unprivileged user is passed over there.
MESSES = r"""
import errno, os, socket, struct, sys

def special():
    os.mkfifo("fifo")
    os.mkfifo("fifo.txt")
    try:
        socket.socket(socket.AF_UNIX).bind("socket.txt")
    except PermissionError:
        pass  # no sockets at the process level
    for kind in (0o020000, 0o060000):
        try:
            os.mknod("device.txt", 0o666 | kind, os.makedev(1, 5))
        except PermissionError:
            pass
    os.symlink("/etc/passwd", "link.txt")
    os.symlink(".", "loop.txt")
    os.symlink("/proc/self/fd/0", "stdin.txt")
    os.mkdir("folder.txt")
    open("good.txt", "w").write("good")

def deep():  # far deeper than PATH_MAX and than anybody's descriptors
    for _ in range(DEPTH):
        os.mkdir("d")
        os.chdir("d")
    open("bottom.txt", "w").close()

def deeper():  # by renames: each whole tree goes below a new directory
    os.mkdir("t")
    for index in range(DEPTH):
        os.mkdir("n")
        os.rename("t", "n/t")
        os.rename("n", "t")

def many():
    for index in range(100_000):
        if index % 30_000 == 0:  # a file system takes only so many names of one file
            os.close(os.open(base := f"file{index}", os.O_CREAT | os.O_WRONLY))
        os.link(base, f"f{index}")

def names():
    odd = [b"new\nline.txt", b"\xff\xfe.txt", b"-rf.txt", b" .txt", b"*.txt", b"\x1b[31m.txt", b"x" * 251 + b".txt",
           b"'\"`$(id).txt", "\u202egpj.txt".encode(), b"...txt", b"\x7f\x01.txt"]
    for name in odd:
        open(name, "wb").write(b"odd")

def hard_links():
    open("one.txt", "w").write("x")
    for index in range(2000):
        os.link("one.txt", f"link{index}")

def closed():
    for index in range(20):
        os.makedirs(f"closed{index}/inner")
        open(f"closed{index}/inner/file.txt", "w").write("x")
        os.chmod(f"closed{index}/inner/file.txt", 0)
        os.chmod(f"closed{index}/inner", 0)
        os.chmod(f"closed{index}", 0)
    open("mode0.txt", "w").write("x")
    os.chmod("mode0.txt", 0)
    os.chmod(".", 0)

def sparse():
    with open("sparse.txt", "w") as file:
        size = 1 << 40
        while True:
            try:
                os.truncate("sparse.txt", size)
                break
            except OSError as error:
                size >>= 1  # more than this file system takes
                assert size > 1 << 33

def attributes():
    open("file.txt", "w").write("x")
    for target in ("file.txt", "."):
        for index in range(64):
            try:
                os.setxattr(target, f"user.a{index}", b"v" * 60000)
            except OSError:
                try:
                    os.setxattr(target, f"user.a{index}", b"v" * 200)
                except OSError:
                    break
    for name in ("system.posix_acl_default", "system.posix_acl_access"):
        # An owner without rights, and two users more.
        nobody = 0xFFFFFFFF
        entries = [(1, 0, nobody), (2, 7, 12), (2, 7, 13), (4, 0, nobody), (16, 0, nobody), (32, 0, nobody)]
        acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)
        try:
            os.setxattr(".", name, acl)
        except OSError as error:
            assert error.errno in (errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL), error

def flags():  # immutable and append-only need a capability
    import fcntl
    fd = os.open("file.txt", os.O_CREAT | os.O_RDWR)
    for flag in (0x10, 0x20):
        try:
            fcntl.ioctl(fd, 0x40086602, struct.pack("l", flag))
            print("set")
        except OSError:
            pass

DEPTH = int(sys.argv[2])
globals()[sys.argv[1]]()
print("done")
"""
NAMES = (*("special", "deep", "deeper", "many", "names", "hard_links", "closed", "sparse", "attributes", "flags"),)
CALLER = r"""
import json, os, sys, time
import ringfence as rf
isolation, mess, depth, code = sys.argv[1:]
rf.run(["true"], isolation=isolation)
limits = rf.Limits(wall_time=60)
started = time.monotonic()
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
result = rf.run(["/usr/bin/python3", "-S", "-c", code, mess, depth], isolation=isolation, limits=limits)
made = time.monotonic()
told = {"out": result.stdout.decode(), "err": result.stderr.decode()}
try:
    # The mess again, and this time all of it is wanted.
    result = rf.run(["/usr/bin/python3", "-S", "-c", code, mess, depth], isolation=isolation, limits=limits,
                    collect=["*.txt", "**/*.txt", "**"])
    told["files"] = {name: data.decode() for name, data in result.files.items()}
except rf.SpecError as error:
    told["refused"] = str(error)
collected = time.monotonic()
parent = os.environ.get("TMPDIR", "/tmp")
path = next(os.path.join(parent, name) for name in os.listdir(parent) if name.startswith(f"ringfence-{os.getpid()}-"))
folders = [one.path for one in os.scandir(path) if not one.is_symlink()]  # links say where the cgroups are
told["left"] = [os.listdir(one) for one in folders]
told["grown_kib"] = peak() - before
told["seconds"] = [made - started, collected - made]
print(json.dumps(told))
"""
ODD = (
    *("new\nline.txt", "\udcff\udcfe.txt", "-rf.txt", " .txt", "*.txt", "\x1b[31m.txt", "x" * 251 + ".txt"),
    *("'\"`$(id).txt", "\u202egpj.txt", "...txt", "\x7f\x01.txt"),
)


@pytest.mark.parametrize("mess", NAMES)
@pytest.mark.parametrize("who", ["root", "unprivileged"])
@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_mess(isolation: str, who: str, mess: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: removed unseen, and collected as far as it can be. In memory, so that no disk counts."""
    need_root()
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    before = set(os.listdir("/dev/shm"))
    start = unprivileged.python_json if who == "unprivileged" else python_json
    # Landlock looks at every parent for each name, so that 10,000 levels take the workload itself half a minute.
    depth = "10000" if isolation == "container" else "3000"
    told = start(CALLER, isolation, mess, depth, MESSES, timeout=180)
    assert (told["out"], told["err"]) == ("done\n", "")
    assert all(not one for one in told["left"]), told["left"]
    assert max(told["seconds"]) < 60
    assert set(os.listdir("/dev/shm")) <= before
    # Names of 65,536 entries are the most that is held.
    assert told["grown_kib"] < 64 << 10, told["grown_kib"]
    files = told.get("files")
    if mess == "many":
        assert "more than 65536 entries" in told["refused"]
    elif mess == "sparse":
        assert "bytes together" in told["refused"]
    else:
        assert files is not None, told
    if mess == "special":
        assert files == {"good.txt": "good"}
    if mess == "names":
        assert files == dict.fromkeys(ODD, "odd")
    if mess == "deep":
        assert files == {}  # it lies deeper than anything is looked for
    if mess == "hard_links":
        assert len(files) == 2001
    if mess == "closed":
        # Root reads what its workload closed; an unprivileged caller leaves its own files as they are.
        assert set(files) <= {"mode0.txt", *(f"closed{index}/inner/file.txt" for index in range(20))}


# ---- files that change while they are read ----


@pytest.fixture
def work(tmp_path: Path) -> Iterator[WorkDirectory]:
    parent = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    made = WorkDirectory(parent, b"work", None)
    try:
        yield made
    finally:
        made.remove()
        os.close(parent)


def test_a_file_that_grows_is_read_as_it_was(work: WorkDirectory, tmp_path: Path) -> None:
    stop = threading.Event()
    (tmp_path / "work" / "grows").write_bytes(b"x" * 1000)

    def grow() -> None:
        with open(tmp_path / "work" / "grows", "ab", buffering=0) as file:
            while not stop.is_set() and file.tell() < 1 << 28:
                file.write(bytes(1 << 16))

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        started = time.monotonic()
        for _ in range(5):
            data = work.collect((b"grows",), 1 << 30)["grows"]
            assert data.startswith(b"x" * 1000)
        assert time.monotonic() - started < 20
    finally:
        stop.set()
        thread.join()


def test_a_hole_of_a_tebibyte_is_not_read(work: WorkDirectory, tmp_path: Path) -> None:
    (tmp_path / "work" / "hole").touch()
    size = 1 << 40
    while True:
        try:
            os.truncate(tmp_path / "work" / "hole", size)
            break
        except OSError:
            size >>= 1
    started = time.monotonic()
    with pytest.raises(SpecError, match="more than 1073741824 bytes together"):
        work.collect((b"hole",), 1 << 30)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("isolation", ["vm"])
def test_a_hole_in_a_guest_is_not_sent(isolation: str) -> None:
    started = time.monotonic()
    script = "mkfifo fifo.txt; ln -s /etc/passwd link.txt; truncate -s 1T hole.txt"
    with pytest.raises(rf.SpecError, match="bytes together"):
        rf.run(["sh", "-c", script], isolation=isolation, collect=["*.txt"])
    assert time.monotonic() - started < 60


# ---- names that change hands meanwhile ----

# Outside, with the rights of whoever owns the folder: exchanges two names without end (renameat2, RENAME_EXCHANGE).
SWAPPER = r"""
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
one, two = sys.argv[1].encode(), sys.argv[2].encode()
print("going", flush=True)
while True:
    libc.renameat2(-100, one, -100, two, 2)
"""
ROUNDS = 1000


@contextlib.contextmanager
def swapping(one: Path, two: Path) -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-S", "-c", SWAPPER, one, two], stdout=subprocess.PIPE) as swapper:
        assert swapper.stdout is not None
        assert swapper.stdout.readline() == b"going\n"
        try:
            yield
        finally:
            swapper.send_signal(signal.SIGKILL)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that must stay as it is, and whose content must not come out."""
    folder = tmp_path / "outside"
    (folder / "below").mkdir(parents=True)
    (folder / "file").write_text("secret")
    (folder / "below" / "file").write_text("secret")
    return folder


def as_it_was(outside: Path) -> bool:
    found = {str(one.relative_to(outside)): one.read_text() for one in outside.rglob("*") if one.is_file()}
    return found == {"file": "secret", "below/file": "secret"}


@pytest.mark.parametrize("other", ["symlink", "fifo", "file"])
def test_collect_while_names_change_hands(work: WorkDirectory, tmp_path: Path, outside: Path, other: str) -> None:
    """A folder that is a symlink to one outside, and a file that is a FIFO, by the next moment: never followed, never
    waited for; what comes out is the folder's or the file's own, or nothing.
    """
    base = tmp_path / "work"
    (base / "name").mkdir()
    (base / "name" / "file").write_text("own")
    if other == "symlink":
        (base / "other").symlink_to(outside)
    elif other == "fifo":
        os.mkfifo(base / "other")
    else:
        (base / "other").write_text("own")
    (base / "plain").write_text("own")
    (base / "link").symlink_to(outside / "file")
    seen = set()
    with swapping(base / "name", base / "other"), swapping(base / "plain", base / "link"):
        for _ in range(ROUNDS):
            found = work.collect((b"**",), 1 << 20)
            assert set(found.values()) <= {b"own"}
            seen.add(frozenset(found))
    assert len(seen) > 1  # it did change under our hands
    assert as_it_was(outside)


def test_put_while_names_change_hands(work: WorkDirectory, tmp_path: Path, outside: Path) -> None:
    """Into a folder that is a symlink by the next moment: made inside, or an error."""
    base = tmp_path / "work"
    (base / "name").mkdir()
    (base / "other").symlink_to(outside)
    ends = {"put": 0, "refused": 0}
    before = len(os.listdir("/proc/self/fd"))
    with swapping(base / "name", base / "other"):
        for index in range(ROUNDS):
            try:
                work.put((FileIn(path=b"name/below/put%d" % index, data=b"x", mode=0o644),))
                ends["put"] += 1
            except OSError:
                ends["refused"] += 1
    assert min(ends.values()) > 0, ends
    assert as_it_was(outside)
    assert len(os.listdir("/proc/self/fd")) == before


def test_remove_while_names_change_hands(tmp_path: Path, outside: Path) -> None:
    """Nothing outside goes, and inside all does, at the latest when nobody is at work in it any more."""
    parent = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    base = tmp_path / "work"
    as_link = 0
    with swapping(base / "name", base / "other"):
        for _ in range(ROUNDS):
            work = WorkDirectory(parent, b"work", None)
            (base / "other").symlink_to(outside)
            (base / "name").mkdir()
            for name in ("name", "other"):
                # Whichever of them is the folder at this moment.
                with contextlib.suppress(OSError):
                    deep = os.open(base / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                    try:
                        os.mkdir("below", dir_fd=deep)
                        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=deep))
                    finally:
                        os.close(deep)
            as_link += (base / "name").is_symlink()
            work.remove()
            assert not base.exists()
    assert 0 < as_link < ROUNDS
    assert as_it_was(outside)
    os.close(parent)


def test_a_folder_that_is_refilled_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody of the same user outside makes names faster than they go: an error in the end, and no endless loop."""
    monkeypatch.setattr("ringfence.levels.workdir_files._MOST_ROUNDS", 5)
    parent = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    work = WorkDirectory(parent, b"work", None)
    stop = threading.Event()

    def fill() -> None:
        while not stop.is_set():
            for index in range(5):
                with contextlib.suppress(OSError):
                    os.mkdir(tmp_path / "work" / f"{index}")

    threads = [threading.Thread(target=fill) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    started = time.monotonic()
    with contextlib.suppress(OSError):
        work.remove()
    assert time.monotonic() - started < 30
    stop.set()
    for thread in threads:
        thread.join()
    os.close(parent)


def test_a_run_collects_from_a_folder_that_changes(tmp_path: Path, outside: Path) -> None:
    """The same through rf.run: somebody outside swaps names in the work directory of a running sandbox."""
    need_root()
    stop = threading.Event()
    folders = Path(os.environ.get("TMPDIR", "/tmp"))

    def swap() -> None:
        while not stop.is_set():
            for base in folders.glob(f"ringfence-{os.getpid()}-*/w*"):
                with contextlib.suppress(OSError):
                    (base / "moved").symlink_to(outside)
                with contextlib.suppress(OSError):
                    os.rename(base / "folder", base / "away")
                    os.rename(base / "moved", base / "folder")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for isolation in LOCAL_LEVELS:
            for _ in range(25):
                with contextlib.suppress(OSError):  # as there is somebody at work in it
                    script = "mkdir folder; echo own > folder/file; sleep 0.01"
                    result = rf.run(["sh", "-c", script], isolation=isolation, collect=["**"])
                    assert set((result.files or {}).values()) <= {b"own\n"}
    finally:
        stop.set()
        thread.join()
        # What came too late, into a work directory that already waits for the next sandbox, is this test's own.
        for left in folders.glob(f"ringfence-{os.getpid()}-*/w*/moved"):
            left.unlink()
    assert as_it_was(outside)


def touch(path: Path, what: str) -> None:
    if what.startswith("made"):
        (path / "file").write_text("x")
    if what == "made and removed":
        (path / "file").unlink()
    if what == "mode":
        path.chmod(0o755)
        path.chmod(0o700)
    if what == "attribute":
        os.setxattr(path, "user.left", b"x")
    if what == "times":
        os.utime(path, ns=(1, 1))


def test_only_an_untouched_one_is_used_again_without_a_look(tmp_path: Path) -> None:
    parent = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for what in ("made", "made and removed", "mode", "attribute", "times"):
            work = WorkDirectory(parent, what.encode(), None)
            assert work.is_pristine(), what
            assert not work.is_untouched(), "a change of the same tick would not show"
            time.sleep(0.05)
            assert work.is_pristine(), what
            assert work.is_untouched(), what
            touch(tmp_path / what, what)
            assert not work.is_untouched(), what
            work.remove()
        gone = WorkDirectory(parent, b"gone", None)
        os.rmdir(tmp_path / "gone")  # as one does who cleans /tmp
        assert not gone.is_pristine()
        os.close(gone.fd)
    finally:
        os.close(parent)


def test_one_of_a_file_system_that_counts_seconds_is_looked_at_for_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a change may have the time of what was seen long before it. And where change times can be set, as they are
    those of the last write, none is believed.
    """
    real = os.fstat

    def in_seconds(fd: int, coupled: bool = False) -> os.stat_result:
        about = real(fd)
        changed_ns = about.st_mtime_ns if coupled else about.st_ctime_ns // 10**9 * 10**9
        return os.stat_result((*about[:10], *([0.0] * 3), about.st_atime_ns, about.st_mtime_ns, changed_ns))

    parent = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    now = time.time_ns
    try:
        for coupled, after_ns, believed in ((False, 10**9, False), (False, 4 * 10**9, True), (True, 4 * 10**9, False)):
            with monkeypatch.context() as patched:
                patched.setattr("ringfence.levels.workdir.os.fstat", lambda fd, how=coupled: in_seconds(fd, how))
                while time.time_ns() % 10**9 < 10**8:
                    time.sleep(0.02)  # the time when it was made is the second's beginning
                work = WorkDirectory(parent, b"work", None)
                assert work.renew()
                if not coupled:
                    work._renewed_ns = os.fstat(work.fd).st_ctime_ns  # though it was made in the same second
                patched.setattr(time, "time_ns", lambda late=after_ns: now() // 10**9 * 10**9 + late)
                assert work.is_pristine()
                assert work.is_untouched() == believed
                work.remove()
    finally:
        os.close(parent)


LEFT = r"""
import json, sys
import ringfence as rf
LEAVE = '''
import fcntl, os, struct
fd = os.open(".", os.O_RDONLY)
try:
    fcntl.ioctl(fd, 0x40086602, struct.pack("l", 0x8 | 0x40 | 0x80))  # FS_IOC_SETFLAGS: sync, nodump, noatime
except OSError as error:
    print(error.errno)
os.utime(".", ns=(123456789, 987654321))
'''
LOOK = '''
import fcntl, json, os, struct
fd = os.open(".", os.O_RDONLY)
try:
    flags = struct.unpack("l", fcntl.ioctl(fd, 0x80086601, bytes(8)))[0]
except OSError as error:
    flags = 0
about = os.stat(".")
print(json.dumps([flags & 0xc8, about.st_atime_ns, about.st_mtime_ns]))
'''
def run(code):
    result = rf.run(["/usr/bin/python3", "-S", "-c", code], isolation=sys.argv[1])
    assert result.ok, result
    return result.stdout.decode()
left = [run(LEAVE) for _ in range(3)]
print(json.dumps({"left": left, "found": [json.loads(run(LOOK)) for _ in range(3)]}))
"""


@pytest.mark.parametrize("who", ["root", "unprivileged"])
@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_the_next_one_finds_neither_its_times_nor_its_flags(isolation: str, who: str) -> None:
    need_root()
    told = (unprivileged.python_json if who == "unprivileged" else python_json)(LEFT, isolation)
    assert set(told["left"]) <= {"", "95\n", "25\n"}  # EOPNOTSUPP, ENOTTY: a file system without
    for flags, read_ns, written_ns in told["found"]:
        assert flags == 0
        assert read_ns > 10**18 and written_ns > 10**18, "a time of the last one's"
