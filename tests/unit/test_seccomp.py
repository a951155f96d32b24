"""seccomp: the compiled program judged instruction by instruction, and by the kernel in a child that loads
it.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pyseccomp  # type: ignore[import-untyped]
import pytest

from ringfence.errors import Unmet
from ringfence.linux import seccomp, seccomp_program
from ringfence.linux._syscall_lists import ALLOWED, BY_CAPABILITY, DENIED, NEWER

ALLOW = 0x7FFF0000
EPERM, ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
KILL = 0x80000000
MODES = {
    "chmod": 1,
    "fchmod": 1,
    "fchmodat": 2,
    "fchmodat2": 2,
    "creat": 1,
    "mkdir": 1,
    "mkdirat": 2,
    "mknod": 1,
    "mknodat": 2,
}
OPENS = {"open": (1, 2), "openat": (2, 3)}
BY_ARGUMENT = ("clone", "ioctl", "personality", "socket", "socketpair", *MODES, *OPENS)
ON_X86_64 = os.uname().machine == "x86_64"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and a memory, of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RINGFENCE_CACHE", str(folder))
    monkeypatch.setattr(seccomp, "_in_memory", {})
    return folder


def verdict(program: bytes, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the kernel would answer: the few instructions of classic BPF that filters use."""
    data = struct.pack(
        "=iIQ6Q",
        number - 2**32 if number >= 2**31 else number,
        pyseccomp.system_arch() if arch is None else arch,
        0,
        *arguments,
        *[0] * (6 - len(arguments)),
    )
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return int(value)
        elif code == 0x05:
            at += value
        elif code == 0x54:
            accumulator &= value
        else:
            compare = {0x15: accumulator == value, 0x25: accumulator > value, 0x35: accumulator >= value}
            compare[0x45] = bool(accumulator & value)
            at += if_true if compare[code] else if_false


def number(name: str) -> int:
    found: int = pyseccomp.resolve_syscall(pyseccomp.system_arch(), name)
    return found if found >= 0 else NEWER.get(name, -1)


POLICIES = {
    "namespaces": seccomp.policy(namespaces=True),
    "host network": seccomp.policy(namespaces=False),
    "no network": seccomp.policy(namespaces=False, network=False),
}


@pytest.fixture(params=list(POLICIES.values()), ids=list(POLICIES))
def wanted(request: pytest.FixtureRequest) -> seccomp.Policy:
    found: seccomp.Policy = request.param
    return found


@pytest.fixture
def program(wanted: seccomp.Policy) -> bytes:
    return seccomp_program.compile(wanted)


class TestTheProgram:
    def test_every_number_gets_what_its_list_says(self, wanted: seccomp.Policy, program: bytes) -> None:
        expected = {number(name): EPERM for name in DENIED} | {number(name): ALLOW for name in ALLOWED}
        if wanted is not POLICIES["namespaces"]:
            # What would outlive the process, and be the next sandbox's to read.
            names = (
                "shmget shmat shmdt shmctl semget semop semtimedop semctl msgget msgsnd msgrcv msgctl mq_open mq_unlink"
            )
            expected |= {number(name): EPERM for name in names.split()}
        skipped = {number(name) for name in BY_ARGUMENT}
        for one in range(2000):
            if one not in skipped:
                assert verdict(program, one) == expected.get(one, ENOSYS), one
        assert len([one for one in expected.values() if one == ALLOW]) > 250
        assert len([one for one in expected.values() if one == EPERM]) > 60

    def test_another_architecture_is_killed(self, program: bytes) -> None:
        for one in (0, 1, 20, number("clone"), number("socket"), number("mount"), 999):
            assert verdict(program, one, arch=pyseccomp.Arch.X86) == KILL
        if ON_X86_64:
            assert verdict(program, 0x40000000 | number("getpid")) == KILL
            assert verdict(program, 0x40000000 | number("clone")) == KILL

    def test_clone_makes_no_namespaces(self, program: bytes) -> None:
        clone = number("clone")
        for bit in range(64):
            denied = bit in (17, 25, 26, 27, 28, 29, 30)
            assert verdict(program, clone, 1 << bit) == (EPERM if denied else ALLOW), bit
        assert verdict(program, clone, 0x3D0F00) == ALLOW  # a thread
        assert verdict(program, clone, 0x3D0F00 | 1 << 28) == EPERM

    def test_ioctl_cannot_type_into_a_terminal(self, program: bytes) -> None:
        ioctl = number("ioctl")
        for request in (0x5412, 0x541C, 0x5412 | 1 << 32, 0x541C | 1 << 63):
            assert verdict(program, ioctl, 0, request) == EPERM
        # Nor make it another line discipline, nor a file another project's.
        for request in (0x5423, 0x401C5820, 0x401C5820 | 1 << 40):
            assert verdict(program, ioctl, 0, request) == EPERM
        for request in (0x5411, 0x5413, 0x541B, 0x541D, 0x5401, 0, 0xFFFFFFFF):
            assert verdict(program, ioctl, 0x5412, request) == ALLOW

    def test_personality_is_limited(self, program: bytes) -> None:
        personality = number("personality")
        for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF):
            assert verdict(program, personality, value) == ALLOW
        for value in (1, 0x40000, 0x400000, 0xFFFFFFFE, 0x40000 | 1 << 32):
            assert verdict(program, personality, value) == EPERM

    @pytest.mark.parametrize("call", ["socket", "socketpair"])
    @pytest.mark.parametrize("name", POLICIES)
    def test_families(self, call: str, name: str) -> None:
        program = seccomp_program.compile(POLICIES[name])
        allowed = {1} if call == "socketpair" else set() if name == "no network" else {1, 2, 10, 16}
        for family in range(64):
            assert verdict(program, number(call), family, 1) == (ALLOW if family in allowed else EPERM)
            # The kernel reads an int: a bit above must not make another family of it.
            assert verdict(program, number(call), family | 1 << 32, 1) == (ALLOW if family in allowed else EPERM)

    def test_a_pair_is_of_streams(self, program: bytes) -> None:
        """Half of a pair of datagrams can be sent from to any path of the host, or connected to it."""
        for kind in range(16):
            for flags in (0, 0o2000000, 0o4000, 1 << 32):
                expected = ALLOW if kind in (1, 5) else EPERM
                assert verdict(program, number("socketpair"), 1, kind | flags) == expected, kind

    def test_no_file_is_made_set_id(self, program: bytes) -> None:
        for name, at in MODES.items():
            for mode in (0o4755, 0o2755, 0o6000, 0o4000 | 1 << 40):
                assert verdict(program, number(name), *[0] * at, mode) == EPERM, name
            for mode in (0o755, 0o1777, 0, 0o100644):
                assert verdict(program, number(name), *[0] * at, mode) == ALLOW, name
        for name, (flags, mode) in OPENS.items():
            for creates in (os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TMPFILE | os.O_RDWR):
                arguments = [0] * flags + [creates] + [0] * (mode - flags - 1)
                assert verdict(program, number(name), *arguments, 0o4755) == EPERM, name
                assert verdict(program, number(name), *arguments, 0o755) == ALLOW, name
            # Without a flag to create by, the mode is whatever the register held.
            assert verdict(program, number(name), *[0] * flags, os.O_RDONLY | os.O_DIRECTORY, 0o6000) == ALLOW
        assert verdict(program, number("openat2")) == ENOSYS

    def test_a_capability_opens_what_it_is_for(self) -> None:
        def opened(*capabilities: str, own_kernel: bool = False) -> set[str]:
            policy = seccomp.policy(namespaces=True, capabilities=capabilities, own_kernel=own_kernel)
            made = seccomp_program.compile(policy)
            names = {*DENIED, "clone3"}
            assert verdict(made, number("openat2")) == ENOSYS
            assert verdict(made, number("chmod"), 0, 0o4755) == EPERM
            return {name for name in names if number(name) >= 0 and verdict(made, number(name)) == ALLOW}

        assert opened("CAP_CHOWN") == set()
        assert opened("CAP_SYS_CHROOT") == {"chroot"}
        assert opened("CAP_DAC_READ_SEARCH") == {"open_by_handle_at"}
        # No power in a user namespace, so nothing is opened for it there.
        for one in ("CAP_SYS_TIME", "CAP_SYS_MODULE", "CAP_BPF", "CAP_PERFMON", "CAP_SYSLOG", "CAP_SYS_RAWIO"):
            assert opened(one) == set()
        assert opened("CAP_SYS_TIME", own_kernel=True) == {"settimeofday", "clock_settime"}
        assert opened("CAP_SYS_MODULE", own_kernel=True) == {"init_module", "finit_module", "delete_module"}
        everything = opened(*BY_CAPABILITY)
        assert everything < opened(*BY_CAPABILITY, own_kernel=True)
        never = "io_uring_setup userfaultfd keyctl add_key request_key kexec_load pivot_root swapon bpf syslog"
        assert not everything & set(never.split())
        assert {"mount", "unshare", "setns", "clone3", "ptrace"} <= everything

    def test_namespaces_and_packets_by_capability(self) -> None:
        admin = seccomp_program.compile(seccomp.policy(namespaces=True, capabilities=("CAP_SYS_ADMIN",)))
        assert verdict(admin, number("clone"), 1 << 28) == ALLOW
        assert verdict(admin, number("socket"), 17, 3) == EPERM
        raw = seccomp_program.compile(seccomp.policy(namespaces=True, capabilities=("CAP_NET_RAW",)))
        assert verdict(raw, number("clone"), 1 << 28) == EPERM
        assert verdict(raw, number("socket"), 17, 3) == ALLOW
        assert verdict(raw, number("socket"), 40, 1) == EPERM

    def test_it_is_small_enough_and_the_lists_are_sound(self, program: bytes) -> None:
        assert len(program) % 8 == 0
        assert len(program) // 8 < 1000
        assert len(set(ALLOWED)) == len(ALLOWED)
        assert not set(ALLOWED) & set(DENIED)
        assert not (set(ALLOWED) | set(DENIED)) & {*BY_ARGUMENT, "clone3"}
        # Names that no list of this libseccomp and no table of ours knows are typing errors.
        gone = {"riscv_hwprobe"}
        unknown = {
            name
            for name in (*ALLOWED, *DENIED)
            if pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) == -1 and name not in NEWER
        }
        assert unknown - gone <= {"uretprobe"}

    def test_our_numbers_agree_with_those_that_libseccomp_knows(self) -> None:
        known = 0
        for name, ours in NEWER.items():
            theirs = pyseccomp.resolve_syscall(pyseccomp.system_arch(), name)
            if theirs >= 0:
                known += 1
                assert theirs == ours, name
        assert known > 0


# A name, a system call's number, its arguments.
Call = tuple[str, int, tuple[int, ...]]

# A child loads the program from argv[1] (or "" for the control) and prints the errno of each call of argv[2].
CHILD = r"""
import ctypes, json, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
if sys.argv[1]:
    program = open(sys.argv[1], "rb").read()
    code = ctypes.create_string_buffer(program, len(program))
    filter = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, filter, 0, 0) == 0, ctypes.get_errno()
found = {}
for name, number, arguments in json.loads(sys.argv[2]):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(one) for one in arguments])
    found[name] = ctypes.get_errno() if result == -1 else 0
print(json.dumps(found))
"""

# Calls that need a privilege or make something, with arguments that do no harm even to root: they are refused
# for being wrong (by any errno but these two) where no filter is.
ATTEMPTS: dict[str, tuple[int, ...]] = {
    "mount": (0, 0, 0, 0, 0),
    "umount2": (0, 0),
    "pivot_root": (0, 0),
    "chroot": (0,),
    "unshare": (1,),
    "setns": (-1, 0),
    "bpf": (9999, 0, 0),
    "perf_event_open": (0, 0, 0, 0, 0),
    "userfaultfd": (0xFFFF,),
    "io_uring_setup": (0, 0),
    "keyctl": (9999, 0, 0, 0, 0),
    "add_key": (0, 0, 0, 0, 0),
    "request_key": (0, 0, 0, 0),
    "finit_module": (-1, 0, 0),
    "delete_module": (0, 0),
    "kexec_load": (0, 0, 0, 0xFFFF),
    "reboot": (0, 0, 0, 0),
    "swapon": (0, 0),
    "swapoff": (0,),
    "acct": (1,),
    "settimeofday": (1, 0),
    "clock_settime": (9999, 0),
    "sethostname": (0, -1),
    "setdomainname": (0, -1),
    "syslog": (9999, 0, 0),
    "iopl": (99,),
    "ptrace": (16, 0, 0, 0),
    "process_vm_readv": (0, 0, 0, 0, 0, 1),
    "process_vm_writev": (0, 0, 0, 0, 0, 1),
    "kcmp": (0, 0, 99, 0, 0),
    "pidfd_getfd": (-1, -1, 0),
    "open_by_handle_at": (-1, 0, 0),
    "fanotify_init": (0xFFFFFFFF, 0),
    "quotactl": (0xFFFFFFFF, 0, 0, 0),
    "fsopen": (0, 0xFF),
    "fsmount": (-1, 0xFF, 0),
    "move_mount": (-1, 0, -1, 0, 0xFFFF),
    "open_tree": (-1, 0, 0xFFFFFF),
    "mount_setattr": (-1, 0, 0xFFFFFF, 0, 0),
    "move_pages": (0, 1, 0, 0, 0, 0xFFFF),
    "mbind": (1, 0, 99, 0, 0, 0),
}


def run_child(tmp_path: Path, program: bytes, calls: list[tuple[str, int, tuple[int, ...]]]) -> dict[str, int]:
    path = ""
    if program:
        path = str(tmp_path / "program.bpf")
        Path(path).write_bytes(program)
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CHILD, path, json.dumps(calls)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    result: dict[str, int] = json.loads(found.stdout)
    return result


class TestInTheKernel:
    def test_denied_calls_give_eperm(self, tmp_path: Path, program: bytes) -> None:
        calls: list[Call] = [
            (name, number(name), arguments) for name, arguments in ATTEMPTS.items() if number(name) >= 0
        ]
        control = run_child(tmp_path, b"", calls)
        # A kernel built without a call answers ENOSYS itself, which proves nothing.
        proven = {name for name, code in control.items() if code not in (errno.ENOSYS, errno.EPERM)}
        if os.geteuid() == 0:
            assert {"mount", "unshare", "setns", "ptrace", "reboot", "pivot_root", "keyctl"} <= proven
        assert len(proven) > 15
        found = run_child(tmp_path, program, calls)
        assert {name: found[name] for name in proven} == dict.fromkeys(proven, errno.EPERM)

    def test_namespaces_by_clone_and_clone3(self, tmp_path: Path, program: bytes) -> None:
        # CLONE_SIGHAND without CLONE_VM is refused (EINVAL) before anything is made.
        flags = {bit: 0x800 | 1 << bit for bit in (17, 25, 26, 27, 28, 29, 30)}
        calls: list[Call] = [(f"clone {bit}", number("clone"), (value, 0, 0, 0, 0)) for bit, value in flags.items()]
        calls += [("clone plain", number("clone"), (0x800, 0, 0, 0, 0)), ("clone3", number("clone3"), (0, 0))]
        assert set(run_child(tmp_path, b"", calls).values()) == {errno.EINVAL}
        found = run_child(tmp_path, program, calls)
        assert found.pop("clone3") == errno.ENOSYS
        assert found.pop("clone plain") == errno.EINVAL
        assert set(found.values()) == {errno.EPERM}

    @pytest.mark.parametrize("name", POLICIES)
    def test_sockets(self, tmp_path: Path, name: str) -> None:
        families = {"unix": 1, "inet": 2, "inet6": 10, "netlink": 16, "packet": 17, "alg": 38, "vsock": 40}
        stream = 1
        calls: list[Call] = [(family, number("socket"), (value, stream, 0)) for family, value in families.items()]
        control = run_child(tmp_path, b"", calls)
        assert errno.EPERM not in [code for name, code in control.items() if name != "packet"]
        found = run_child(tmp_path, seccomp_program.compile(POLICIES[name]), calls)
        allowed = set() if name == "no network" else {"unix", "inet", "inet6", "netlink"}
        assert found == {one: control[one] if one in allowed else errno.EPERM for one in families}
        assert control["unix"] == control["inet"] == 0

    def test_ioctl_and_personality(self, tmp_path: Path, program: bytes) -> None:
        calls: list[Call] = [
            ("TIOCSTI", number("ioctl"), (-1, 0x5412, 0)),
            ("TIOCSTI, a bit above", number("ioctl"), (-1, 0x5412 | 1 << 40, 0)),
            ("TIOCLINUX", number("ioctl"), (-1, 0x541C, 0)),
            ("TIOCGWINSZ", number("ioctl"), (-1, 0x5413, 0)),
            ("personality, ask", number("personality"), (0xFFFFFFFF,)),
            ("personality, no random addresses", number("personality"), (0x40000,)),
        ]
        control = run_child(tmp_path, b"", calls)
        assert list(control.values()) == [errno.EBADF] * 4 + [0, 0]
        denied, bad = errno.EPERM, errno.EBADF
        assert list(run_child(tmp_path, program, calls).values()) == [denied, denied, denied, bad, 0, denied]

    def test_an_ordinary_program_runs(self, tmp_path: Path, program: bytes) -> None:
        (tmp_path / "program.bpf").write_bytes(program)
        script = (
            CHILD
            + r"""
import subprocess, threading, time, tempfile, mmap, signal, multiprocessing
thread = threading.Thread(target=time.sleep, args=(0.01,)); thread.start(); thread.join()
print(subprocess.run(["/bin/sh", "-c", "echo $((6*7)) | cat; ls / >/dev/null"], capture_output=True).stdout)
with tempfile.TemporaryFile() as file:
    file.write(b"x" * 8192); file.flush(); mmap.mmap(file.fileno(), 0)[0]
with multiprocessing.Pool(2) as pool:
    print(pool.map(abs, [-1, 2, -3]))
"""
        )
        found = subprocess.run(
            [sys.executable, "-I", "-c", script, str(tmp_path / "program.bpf"), "[]"],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert found.stdout.splitlines()[1:] == ["b'42\\n'", "[1, 2, 3]"]

    @pytest.mark.skipif(not ON_X86_64, reason="the 32-bit call is x86-64 machine code")
    @pytest.mark.parametrize("convention", ["32-bit", "x32"])
    def test_another_architectures_call_kills(self, tmp_path: Path, program: bytes, convention: str) -> None:
        (tmp_path / "program.bpf").write_bytes(program)
        script = (
            CHILD
            + r"""
import mmap
number = 20 if sys.argv[3] == "32-bit" else 0x40000000 | 39
call = b"\xcd\x80" if sys.argv[3] == "32-bit" else b"\x0f\x05"
code = mmap.mmap(-1, 4096, prot=7)
code.write(b"\xb8" + struct.pack("<I", number) + call + b"\xc3")
function = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
print(function())
"""
        )

        def run(path: str) -> subprocess.CompletedProcess[bytes]:
            command = [sys.executable, "-I", "-S", "-c", script, path, "[]", convention]
            return subprocess.run(command, capture_output=True, timeout=60, check=False)

        if run("").returncode != 0:
            pytest.skip(f"this kernel has no {convention} system calls")
        assert run(str(tmp_path / "program.bpf")).returncode == -signal.SIGSYS


class TestTheCache:
    def kept(self, cache: Path) -> Path:
        (path,) = (cache / "seccomp").iterdir()
        return path

    def again(self, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, int]:
        """The program as a fresh process gets it, and how often it was compiled for that."""
        compiled: list[seccomp.Policy] = []
        real = seccomp_program.compile

        def counting(wanted: seccomp.Policy) -> bytes:
            compiled.append(wanted)
            return real(wanted)

        with monkeypatch.context() as patch:
            patch.setattr(seccomp, "_in_memory", {})
            patch.setattr(seccomp_program, "compile", counting)
            program = seccomp.cached(seccomp.policy(namespaces=True))
            assert seccomp.cached(seccomp.policy(namespaces=True)) is program
        return program, len(compiled)

    def test_compiled_once_and_kept_privately(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first, times = self.again(monkeypatch)
        assert times == 1
        assert first == seccomp_program.compile(seccomp.policy(namespaces=True))
        assert self.again(monkeypatch) == (first, 0)
        assert self.kept(cache).stat().st_mode & 0o777 == 0o600
        assert (cache / "seccomp").stat().st_mode & 0o777 == 0o700
        assert seccomp.cached(seccomp.policy(namespaces=False)) != first
        assert len(list((cache / "seccomp").iterdir())) == 2

    @pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "long", "writable", "link", "other key"])
    def test_a_damaged_file_is_made_anew(self, cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
        first, _ = self.again(monkeypatch)
        path = self.kept(cache)
        good = path.read_bytes()
        match damage:
            case "cut":
                path.write_bytes(good[:-8])
            case "flip":
                path.write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
            case "empty":
                path.write_bytes(b"")
            case "text":
                path.write_bytes(b"#!/bin/sh\n" * 100)
            case "long":
                path.write_bytes(good + bytes(8 * 4096))
            case "writable":
                path.chmod(0o666)
            case "link":
                path.rename(cache / "elsewhere")
                path.symlink_to(cache / "elsewhere")
            case "other key":
                # Another policy's program, whole in itself, under this policy's name.
                path.rename(cache / "aside")
                seccomp.cached(seccomp.policy(namespaces=False))
                self.kept(cache).rename(path)
        assert self.again(monkeypatch) == (first, 1)
        assert path.read_bytes() == good
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o777 == 0o600
        assert self.again(monkeypatch) == (first, 0)
        assert [one.name for one in (cache / "seccomp").iterdir()] == [path.name]

    def test_an_open_folder_is_not_used(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.again(monkeypatch)
        (cache / "seccomp").chmod(0o777)
        assert self.again(monkeypatch)[1] == 1

    def test_no_usable_cache_folder_is_no_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_bytes(b"")
        monkeypatch.setenv("RINGFENCE_CACHE", str(tmp_path / "file" / "below"))
        first, times = self.again(monkeypatch)
        assert times == 1
        assert first

    def test_a_kept_program_needs_no_libseccomp(self, cache: Path) -> None:
        script = """
import sys
from ringfence.linux import seccomp
assert seccomp.cached(seccomp.policy(namespaces=True))
print([name for name in ("pyseccomp", "ctypes", "hashlib", "subprocess", "typing", "re") if name in
sys.modules])
"""
        command = [sys.executable, "-S", "-c", script]
        path = [one for one in sys.path if one]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        for expected in ("pyseccomp", "[]"):
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
            assert expected in found.stdout

    def test_without_libseccomp_it_says_what_to_do(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyseccomp", None)
        with pytest.raises(Unmet, match="libseccomp2") as caught:
            seccomp.cached(seccomp.policy(namespaces=True))
        assert caught.value.rule == "seccomp"
        usable, reason = seccomp.available()
        assert not usable
        assert "can't be compiled" in reason
        monkeypatch.undo()

    def test_available(self) -> None:
        usable, reason = seccomp.available()
        assert usable
        assert reason.startswith("seccomp filter of ")


class TestInTheHostsNamespaces:
    """Policies of process sandboxes: `for_process`."""

    def test_the_default_is_the_plain_policy(self) -> None:
        for network in ("none", "host"):
            found = seccomp.for_process(network, tcp_only=False, listen=True, shared_user=False)
            assert found == seccomp.policy(namespaces=False, network=network == "host")

    @pytest.mark.parametrize("listen", [False, True])
    def test_only_tcp(self, listen: bool) -> None:
        program = seccomp_program.compile(seccomp.for_process("host", tcp_only=True, listen=listen, shared_user=False))
        no_protocol = 0x00050000 | errno.EPROTONOSUPPORT
        for family in range(64):
            for kind in range(16):
                for protocol in (0, 6, 17, 132, 256, 262, 262 | 1 << 32, 1 << 31):
                    found = verdict(program, number("socket"), family, kind | 0o2000000, protocol)
                    wanted = (
                        EPERM if family not in (2, 10) or kind != 1 else ALLOW if protocol in (0, 6) else no_protocol
                    )
                    assert found == wanted, (family, kind, protocol)
        assert verdict(program, number("socket"), 2 | 1 << 32, 1, 6 | 1 << 40) == ALLOW  # the kernel reads ints
        fast_open = 0x20000000
        for name, at in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
            for flags, wanted in ((0, ALLOW), (0x4040, ALLOW), (fast_open, EPERM), (fast_open | 0x4000, EPERM)):
                assert verdict(program, number(name), *[9] * at, flags) == wanted
        for level, option, wanted in (
            (6, 31, EPERM),
            (6, 30, ALLOW),
            (1, 31, ALLOW),
            (6 | 1 << 32, 31 | 1 << 32, EPERM),
        ):
            assert verdict(program, number("setsockopt"), 9, level, option) == wanted
        assert verdict(program, number("listen"), 9, 9) == (ALLOW if listen else EPERM)
        assert verdict(program, number("socketpair"), 1, 1) == ALLOW
        for name in ("bind", "connect", "accept4"):
            assert verdict(program, number(name)) == ALLOW

    def test_other_processes_of_the_user_are_left_alone(self) -> None:
        program = seccomp_program.compile(seccomp.for_process("none", tcp_only=False, listen=False, shared_user=True))
        limit = number("prlimit64")
        for pid, new, wanted in (
            (0, 0x7FFF12340000, ALLOW),
            (1 << 32, 0x7FFF12340000, ALLOW),
            (77, 0, ALLOW),
            (77, 0x12340000, EPERM),
            (77, 0x7FFF00000000, EPERM),
        ):
            assert verdict(program, limit, pid, 7, new) == wanted
        for name in ("sched_setaffinity", "sched_setparam", "sched_setscheduler", "sched_setattr"):
            assert verdict(program, number(name), 0) == ALLOW
            assert verdict(program, number(name), 77) == EPERM
        for name, process in (("setpriority", 0), ("ioprio_set", 1)):
            for kind in range(5):
                own = kind in (process, process + 1)
                assert verdict(program, number(name), kind, 0) == (ALLOW if own else EPERM)
                assert verdict(program, number(name), kind, 77) == EPERM

    def test_a_user_of_its_own_has_nobody_to_harm(self) -> None:
        program = seccomp_program.compile(seccomp.for_process("none", tcp_only=False, listen=False, shared_user=False))
        assert verdict(program, number("prlimit64"), 77, 7, 0x1000) == ALLOW
        assert verdict(program, number("setpriority"), 2, 77) == ALLOW
