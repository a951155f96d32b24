"""Granted capabilities: that they work inside, for a user who isn't root too, and that they reach nothing outside."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.spec.boundary import CAPABILITIES
from support.sandboxes import applied, need, need_level, need_root, output, run_probe

PYTHON = "/usr/bin/python3"
SETS = ("effective", "permitted", "inheritable", "bounding", "ambient")

# Attempts as functions of no arguments; each prints the name of its errno, or "ok".
PRELUDE = r"""
import ctypes, errno, json, os, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)

def attempt(function):
    try:
        function()
        return "ok"
    except OSError as error:
        return errno.errorcode[error.errno]

def call(name, *arguments):
    ctypes.set_errno(0)
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)

def system_call(number, *arguments):
    ctypes.set_errno(0)
    given = [one if isinstance(one, bytes) else ctypes.c_long(one) for one in arguments]
    if libc.syscall(ctypes.c_long(number), *given) == -1:
        raise OSError(ctypes.get_errno(), str(number))

def other_user():
    # A child that is another user; needs CAP_SETUID, which every attempt has.
    child = os.fork()
    if child == 0:
        os.setuid(2000)
        time.sleep(60)
        os._exit(0)
    time.sleep(0.05)
    return child

def mount(source, target, kind, flags=0, data=None):
    call("mount", source, target, kind, flags, data)

def administer():
    mount(b"none", b"/mnt", b"tmpfs")
    call("sethostname", b"own", 3)
    call("unshare", 0x10000000)

def set_mtu():
    import fcntl
    fcntl.ioctl(socket.socket(), 0x8922, struct.pack("16si", b"lo", 1400) + bytes(20))

def clear_read_only(path):
    system_call(442, -100, path, 0, struct.pack("QQQQ", 0, 1, 0, 0), 32)

def overlay(lower):
    mount(b"none", b"/mnt", b"tmpfs")
    for name in ("upper", "work", "merged"):
        os.mkdir(f"/mnt/{name}")
    mount(b"none", b"/mnt/merged", b"overlay", 0, b"lowerdir=%s,upperdir=/mnt/upper,workdir=/mnt/work" % lower)

def handle(path):
    class Handle(ctypes.Structure):
        _fields_ = [("size", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_char * 128)]
    found, where = Handle(size=128), ctypes.c_int()
    call("name_to_handle_at", -100, path, ctypes.byref(found), ctypes.byref(where), 0)
    above = os.open(os.path.dirname(path), os.O_RDONLY)
    call("open_by_handle_at", above, ctypes.byref(found), 0)
"""

# What a capability is for: how to use it, and what happens without it.
USES = {
    "CAP_CHOWN": ("open('/tmp/f', 'w').close(); os.chown('/tmp/f', 5, 5)", "EPERM"),
    "CAP_DAC_OVERRIDE": ("open('/tmp/f', 'w').close(); os.chmod('/tmp/f', 0); open('/tmp/f').close()", "EACCES"),
    "CAP_KILL": ("os.kill(other_user(), signal.SIGKILL)", "EPERM"),
    "CAP_NET_BIND_SERVICE": ("socket.socket().bind(('127.0.0.1', 80))", "EACCES"),
    "CAP_NET_RAW": ("socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)", "EPERM"),
    "CAP_NET_ADMIN": ("set_mtu()", "EPERM"),
    "CAP_SYS_CHROOT": ("os.chroot('/tmp')", "EPERM"),
    "CAP_SYS_PTRACE": ("call('ptrace', 0x4206, other_user(), None, None)", "EPERM"),
    "CAP_SYS_ADMIN": ("administer()", "EPERM"),
    "CAP_SYS_NICE": ("system_call(239, 0, 0, 0, 0, 0)", "EPERM"),
}  # fmt: skip

# What must stay out of reach with every capability, as root inside: (attempt, errno in the sandbox, errno or "ok" where
# the very same mounts belong to the workload's own user namespace, or None where that proves nothing).
REACHES = {
    "umount2 of a read-only path": ("call('umount2', b'/proc/sys', 2)", "EINVAL"),
    "umount2 of a mask": ("call('umount2', b'/etc/shadow', 2)", "EINVAL"),
    "umount2 of /proc": ("call('umount2', b'/proc', 2)", "EINVAL"),
    "remount of /proc/sys": ("mount(None, b'/proc/sys', None, 0x1020)", "EPERM"),
    "remount of /": ("mount(None, b'/', None, 0x1020)", "EPERM"),
    "remount of /usr": ("mount(None, b'/usr', None, 0x1020)", "EPERM"),
    "remount of a spec's mount": ("mount(None, b'/data', None, 0x1020)", "EPERM"),
    "a write to a read-only mount": ("open('/data/new', 'w').close()", "EROFS"),
    "mount_setattr of /": ("clear_read_only(b'/')", "EPERM"),
    "another proc": ("mount(b'proc', b'/mnt', b'proc')", "EPERM"),
    "sysfs": ("mount(b'sysfs', b'/mnt', b'sysfs')", "EPERM"),
    "a file system of a device": ("mount(b'/dev/null', b'/mnt', b'ext4')", "EPERM"),
    "a bind of what is under a mask": ("mount(b'/etc', b'/mnt', None, 0x1000)", "EINVAL"),
    "an overlay of what is under a mask": ("overlay(b'/etc')", "EINVAL"),
    "core_pattern": ("open('/proc/sys/kernel/core_pattern', 'w').close()", "EROFS"),
    "mknod": ("os.mknod('/tmp/node', 0o20666, os.makedev(1, 3))", "EPERM"),
    "the root of init": ("os.listdir('/proc/1/root')", "EACCES"),
    "the memory of init": ("open('/proc/1/mem', 'rb').close()", "EACCES"),
    "ptrace of init": ("call('ptrace', 0x4206, 1, None, None)", "EPERM"),
    "a descriptor of init": ("system_call(438, os.pidfd_open(1), 3, 0)", "EPERM"),
    "the namespaces of init": ("call('setns', os.pidfd_open(1), 0x20000)", "EPERM"),
    "another outer namespace": ("__import__('fcntl').ioctl(os.open('/proc/self/ns/user', 0), 0xb702)", "EPERM"),
    "reboot": ("call('reboot', 0x01234567)", "EPERM"),
    "a file by its handle": ("handle(b'/usr/bin/env')", "EPERM"),
    "iopl": ("system_call(172, 3)", "EPERM"),
    "settimeofday": ("system_call(164, 0, bytes(8))", "EPERM"),
    "init_module": ("system_call(175, 0, 0, 0)", "EPERM"),
    "bpf": ("system_call(321, 0, 0, 0)", "EPERM"),
    "syslog": ("system_call(103, 3, 0, 0)", "EPERM"),
    "pivot_root": ("system_call(155, 0, 0)", "EPERM"),
    "kexec_load": ("system_call(246, 0, 0, 0, 0xffff)", "EPERM"),
    "swapoff": ("system_call(168, 0)", "EPERM"),
    "keyctl": ("system_call(250, 9999, 0, 0, 0, 0)", "EPERM"),
    "a set-user-ID file": ("open('/tmp/s', 'w').close(); os.chmod('/tmp/s', 0o4755)", "EPERM"),
}  # fmt: skip
# Without the second user namespace these succeed, as every engine's CAP_SYS_ADMIN has it.
ONLY_LOCKED = ("remount of /proc/sys", "umount2 of a read-only path", "remount of /", "another proc")


def script(attempts: dict[str, str]) -> str:
    """Each attempt in a process of its own, so that none is in another's way."""
    return (
        PRELUDE
        + "found = {}\n"
        + f"for name, code in {attempts!r}.items():\n"
        + r"""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, attempt(lambda: exec(code)).encode())
        os._exit(0)
    os.close(write)
    found[name] = os.read(read, 100).decode()
    os.waitpid(child, 0)
print(json.dumps(found))
"""
    )


def inside(attempts: dict[str, str], **options: Any) -> tuple[dict[str, str], rf.Result]:
    result = rf.run([PYTHON, "-I", "-S", "-c", script(attempts)], isolation="container", **options)
    found: dict[str, str] = json.loads(output(result))
    return found, result


@pytest.mark.parametrize("user", [None, 0])
def test_the_five_sets(user: int | None) -> None:
    granted = ("CAP_CHOWN", "CAP_NET_RAW", "CAP_SYS_CHROOT")
    code = "print(json.dumps([line.split() for line in open('/proc/self/status') if line.startswith('Cap')]))"
    command = [PYTHON, "-I", "-S", "-c", PRELUDE + code]
    result = rf.run(command, isolation="container", user=user, capabilities=["chown", "NET_RAW", "cap_sys_chroot"])
    told = dict(json.loads(output(result)))
    assert {int(one, 16) for one in told.values()} == {1 << 0 | 1 << 13 | 1 << 18}
    row = applied(result)["capabilities"]
    assert row.requested == granted
    assert row.effective == dict.fromkeys(SETS, granted)


@pytest.mark.parametrize("capability", USES)
def test_it_works_for_a_user_who_is_not_root(capability: str) -> None:
    if capability == "CAP_SYS_ADMIN":
        need_root()
    code, without = USES[capability]
    # Somebody else to kill or to trace takes CAP_SETUID.
    helper = ["CAP_SETUID"] if "other_user" in code and rf.host().privileged else []
    if "other_user" in code:
        need("root", rf.host().privileged)
    attempts = {capability: code}
    assert inside(attempts, capabilities=[capability, *helper])[0] == {capability: "ok"}
    assert inside(attempts, capabilities=helper)[0] == {capability: without}


@functools.cache
def reached(mount: Path) -> dict[str, str]:
    attempts = {name: code for name, (code, _) in REACHES.items()}
    mounts = [rf.Mount(mount, "/data")]
    return inside(attempts, capabilities=CAPABILITIES, user=0, mounts=mounts)[0]


def test_all_of_them_reach_nothing_outside(tmp_path: Path) -> None:
    need_root()
    assert reached(tmp_path) == {name: denied for name, (_, denied) in REACHES.items()}
    assert list(tmp_path.iterdir()) == []


def test_an_image_stays_read_only(tmp_path: Path) -> None:
    """Its files on disk are the same ids inside, so writing is all that root inside lacks."""
    need_root()
    (tmp_path / "usr").mkdir()
    for granted in ((), CAPABILITIES):
        result = run_probe(
            "container", "try-create", "/usr/new", image=tmp_path, user=0, capabilities=granted, check=False
        )
        assert result.stdout == b"EROFS open\n"
    # A whole user's land to remount it from: python is the host's, the image is mounted.
    attempts = {"remount": "mount(None, b'/data', None, 0x1020)", "write": "open('/data/usr/new', 'w').close()"}
    found, _ = inside(attempts, capabilities=CAPABILITIES, user=0, mounts=[rf.Mount(tmp_path, "/data")])
    assert found == {"remount": "EPERM", "write": "EROFS"}


def test_the_locks_are_what_denies(tmp_path: Path) -> None:
    """The positive control: root of a user namespace that the mounts belong to."""
    need_root()
    attempts = {name: REACHES[name][0] for name in ONLY_LOCKED}
    prepare = "mount --bind -o ro /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && "
    command = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc", "/bin/sh", "-c"]
    code = script(attempts)
    done = subprocess.run(
        [*command, prepare + 'exec "$0" -I -S -c "$1"', sys.executable, code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == dict.fromkeys(ONLY_LOCKED, "ok")


def test_an_overlay_where_nothing_is_masked() -> None:
    """The control of the overlay that is refused."""
    need_root()
    assert inside({"overlay": "overlay(b'/usr')"}, capabilities=CAPABILITIES, user=0)[0] == {"overlay": "ok"}


def test_cgroups_can_be_seen_and_not_changed() -> None:
    need_root()
    kinds = {one.version for one in rf.host().cgroups.controllers if one.usable}
    attempts = {}
    for kind, data, files in (
        ("cgroup", "b'memory'", ("tasks", "release_agent")),
        ("cgroup2", "None", ("cgroup.procs",)),
    ):
        seen = f"call('unshare', 0x20000); mount(b'none', b'/mnt', b'{kind}', 0, {data})"
        attempts[kind] = seen
        attempts[f"{kind} mkdir"] = f"{seen}; os.mkdir('/mnt/below')"
        attempts |= {f"{kind} {name}": f"{seen}; open('/mnt/{name}', 'w').close()" for name in files}
    found = inside(attempts, capabilities=CAPABILITIES, user=0)[0]
    if 1 not in kinds:
        found = {name: one for name, one in found.items() if "cgroup2" in name}
    shown = {name for name, one in found.items() if name in ("cgroup", "cgroup2") and one == "ok"}
    assert shown
    for name, one in found.items():
        if name not in shown and name.split()[0] in shown:
            assert one == "EACCES", name


def test_they_can_end_the_sandbox_and_no_more() -> None:
    """The control: without the capability the workload goes on."""
    code = PRELUDE + "print(attempt(lambda: call('reboot', 0x01234567)))"
    command = [PYTHON, "-I", "-S", "-c", code]
    ended = rf.run(command, isolation="container", capabilities=["sys_boot"])
    assert (ended.termination_reason, ended.stdout) == ("killed", b"")
    assert output(rf.run(command, isolation="container")) == b"EPERM\n"


def test_signals_do_not_end_init() -> None:
    """It is told apart by who may send them at all: the control, without the capability."""
    code = (
        "[os.kill(1, one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSTOP)]; time.sleep(0.2)"
    )
    assert inside({"kill": code}, capabilities=["kill"])[0] == {"kill": "ok"}
    assert inside({"kill": code})[0] == {"kill": "EPERM"}


def test_in_a_guest_they_count_in_its_own_kernel() -> None:
    """There also those that need the kernel's first user namespace: the clock, device nodes."""
    need_level("vm")
    attempts = {
        "clock": "time.clock_settime(time.CLOCK_REALTIME, time.time() + 3600)",
        "node": "os.mknod('/tmp/node', 0o20666, os.makedev(1, 3))",
        "packet": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)",
        "module": "system_call(175, 0, 0, 0)",
    }
    command = [PYTHON, "-I", "-S", "-c", script(attempts)]
    granted = rf.run(command, isolation="vm", capabilities=["sys_time", "mknod", "net_raw"])
    assert json.loads(output(granted)) == {"clock": "ok", "node": "ok", "packet": "ok", "module": "EPERM"}
    row = applied(granted)["capabilities"]
    assert row.requested == ("CAP_NET_RAW", "CAP_SYS_TIME", "CAP_MKNOD")
    assert row.effective == dict.fromkeys(SETS, row.requested)
    assert "without power" not in row.mechanism
    bare = rf.run(command, isolation="vm")
    assert set(json.loads(output(bare)).values()) == {"EPERM"}


class TestRefusals:
    def refused(self, isolation: str, **options: Any) -> list[tuple[object, str]]:
        with pytest.raises(rf.CannotEnforce) as caught:
            rf.run(["true"], isolation=isolation, **options)
        assert {one.rule for one in caught.value.unmet} == {"capabilities"}
        return [(one.requested, one.reason) for one in caught.value.unmet]

    def test_a_process_has_none(self) -> None:
        ((requested, reason),) = self.refused("process", capabilities=["net_raw"])
        assert requested == ("CAP_NET_RAW",)
        assert "they would be the host's" in reason

    def test_no_power_over_the_hosts_network(self) -> None:
        ((requested, reason),) = self.refused("container", capabilities=["net_admin", "chown"], network="host")
        assert requested == ("CAP_NET_ADMIN",)
        assert "network namespace that belongs to the sandbox" in reason

    def test_no_file_capabilities_on_the_host(self, tmp_path: Path) -> None:
        mounts = [rf.Mount(tmp_path, "/data", writable=True)]
        ((requested, _),) = self.refused("container", capabilities=["setfcap", "chown"], mounts=mounts)
        assert requested == ("CAP_SETFCAP",)
        assert rf.run(["true"], isolation="container", capabilities=["chown"], mounts=mounts).ok

    def test_a_caller_who_maps_himself_grants_no_sys_admin(self) -> None:
        from ringfence.api import check_spec
        from ringfence.spec import Spec

        host = rf.host().replace(privileged=False)
        with pytest.raises(rf.CannotEnforce, match="the caller's own outside"):
            check_spec(Spec.make(["true"], capabilities=["sys_admin"]), on=host)
        check_spec(Spec.make(["true"], capabilities=["net_raw"]), on=host)
