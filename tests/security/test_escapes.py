"""Ways out of a sandbox, and into what is outside it: each is attempted at every level, by the workload of root and of
an unprivileged caller, and fails with the exact error, beside a control where the same attempt works unconfined.

What test_denials.py has isn't here again. One sandbox makes all the attempts of a level: a vm boots once.
"""

from __future__ import annotations

import functools
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ringfence as rf
from support import leaks, unprivileged
from support.sandboxes import LEVELS, PROBE_FILE, need_root, python, unconfined

OK = "ok"  # by design: what it reaches is the sandbox's own, or nothing is gained


class Attempt(NamedTuple):
    """arguments: of `probe escape`, or, from try- on, of the probe itself; then what it prints at each level.

    In them {victim} is a process of the caller's outside, {other} one of another process sandbox of the caller's,
    {init} and {sibling} are of the same sandbox. own_user and own_container: at the levels process and container of an
    unprivileged caller, whose own user the workload is.
    """

    arguments: str
    process: str
    container: str
    vm: str
    own_user: str
    own_container: str


def row(
    arguments: str,
    process: str,
    container: str | None = None,
    *,
    vm: str | None = None,
    own_user: str | None = None,
    own_container: str | None = None,
) -> Attempt:
    """What isn't given is as at the level before."""
    container = container or process
    return Attempt(arguments, process, container, vm or container, own_user or process, own_container or container)


# Of a call on another process: (attempt, its call, the call that already fails where the process isn't seen).
ON_A_PROCESS = [
    ("tkill", "tkill", "tkill"),
    ("tgkill", "tgkill", "tgkill"),
    ("rt_sigqueueinfo", "rt_sigqueueinfo", "rt_sigqueueinfo"),
    ("pidfd_send_signal", "pidfd_send_signal", "pidfd_open"),
    ("pidfd_getfd", "pidfd_getfd", "pidfd_open"),
    ("process_madvise", "process_madvise", "pidfd_open"),
    ("get_robust_list", "get_robust_list", "get_robust_list"),
    ("sched_setscheduler", "sched_setscheduler", "sched_getscheduler"),
    ("sched_setaffinity", "sched_setaffinity", "sched_getaffinity"),
    ("setpriority", "setpriority", "getpriority"),
    ("ioprio_set", "ioprio_set", "ioprio_get"),
    ("prlimit", "prlimit64", "prlimit64"),
]
# Nobody's, whoever the other process is.
NEVER = ("process_vm_writev", "move_pages", "migrate_pages", "kcmp")
SIGNALS = ("tkill", "tgkill", "rt_sigqueueinfo", "pidfd_send_signal")
# What is seen of another process by its files: (attempt, the call that fails).
FILES_OF_A_PROCESS = [
    ("proc-read PID environ", "open"),
    ("proc-read PID maps", "open"),
    ("proc-open PID mem", "open"),
    ("proc-read PID syscall", "open"),
    ("proc-write PID oom_score_adj", "open"),
    ("proc-write PID exe", "open"),
    ("proc-open PID ns/mnt", "open"),
    ("proc-list PID fd", "opendir"),
    ("proc-list PID map_files", "opendir"),
    ("proc-link PID exe", "readlink"),
    ("proc-link PID cwd", "readlink"),
    ("proc-link PID root", "readlink"),
    ("proc-link PID ns/mnt", "readlink"),
    ("proc-through PID root", "open"),
    ("proc-through PID cwd", "open"),
]
# Of its own user's processes: some open, and it is reading that is judged; the numbers of descriptors can be listed.
OF_OWN_USER = {
    "proc-read PID syscall": "EPERM read",
    "proc-list PID fd": OK,
    "proc-list PID map_files": "EACCES readdir",
}


def on_others() -> Iterator[Attempt]:
    for who in ("victim", "other"):
        for name, call, lookup in ON_A_PROCESS:
            yield row(f"{name} {{{who}}}", f"EPERM {call}", f"ESRCH {lookup}")
        for name, call in FILES_OF_A_PROCESS:
            own = OF_OWN_USER.get(name)
            yield row(name.replace("PID", f"{{{who}}}"), f"EACCES {call}", f"ENOENT {call}", own_user=own)
    for name, call, _ in ON_A_PROCESS:
        # The init of an unprivileged caller's container is of the same user. PID 1 takes no signal from inside; a limit
        # of its would end nobody but the sandbox.
        own = OK if name in (*SIGNALS, "prlimit") else None
        yield row(f"{name} {{init}}", f"EPERM {call}", own_container=own)
    for name, call in FILES_OF_A_PROCESS:
        yield row(name.replace("PID", "{init}"), f"EACCES {call}")
    for name in NEVER:
        for who in ("victim", "other", "init", "sibling"):
            yield row(f"{name} {{{who}}}", f"EPERM {name}")
    for who in ("victim", "other", "init", "sibling"):
        yield row(f"ptrace-attach {{{who}}}", "EPERM ptrace")
    # Its own children and siblings are a workload's to signal and to schedule, but where a filter can't tell them from
    # the caller's processes; and no debugger's.
    for name in SIGNALS:
        yield row(f"{name} {{sibling}}", OK)
    for name, call in (
        ("sched_setaffinity", "sched_setaffinity"),
        ("setpriority", "setpriority"),
        ("prlimit", "prlimit64"),
    ):
        yield row(f"{name} {{sibling}}", OK, own_user=f"EPERM {call}", own_container=OK)
    for name in ("pidfd_getfd", "process_madvise"):
        yield row(f"{name} {{sibling}}", f"EPERM {name}")
    yield row("proc-write {sibling} exe", "EACCES open")
    yield row("ptrace-traceme", "EPERM ptrace")
    yield row("ptrace-child", "EPERM ptrace")
    # As root the user has no other process; in a container of an unprivileged caller init is one that is above it.
    yield row("setpriority-user", OK, own_user="EPERM setpriority", own_container="EPERM setpriority")


ON_THE_KERNEL = [
    # Mounts and the root.
    *(row(f"umount {path}", "EPERM umount2") for path in ("/proc/kcore", "/proc/sys", "/proc/keys", "/")),
    *(row(f"remount {path}", "EPERM mount") for path in ("/etc", "/proc/sys", "/proc/self/fd")),
    row("mount-bind /work", "EPERM mount"),
    row("mount-bind .", "EPERM mount"),
    *(
        row(f"mount-type {kind}", "EPERM mount")
        for kind in ("cgroup", "cgroup2", "proc", "sysfs", "overlay", "devtmpfs")
    ),
    *(row(name, f"EPERM {name}") for name in ("move_mount", "open_tree", "fspick", "mount_setattr", "pivot_root")),
    row("chroot-walk", "EPERM chroot"),
    *(row(f"clone {name}", "EPERM clone") for name in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")),
    # Others' namespaces: of a process outside, of another sandbox, of init; mnt by number as well.
    *(
        row(f"try-setns /proc/{{victim}}/ns/{name} {name}", "EACCES open", "ENOENT open")
        for name in ("mnt", "user", "pid", "net", "ipc", "uts", "cgroup", "time")
    ),
    *(row(f"try-setns /proc/1/ns/{name} {name}", "EACCES open") for name in ("mnt", "user", "pid", "net")),
    row("try-setns /proc/self/ns/mnt 0", "EPERM setns"),
    # Files outside.
    row("mknod-block block", "EACCES mknod", "EPERM mknod"),
    row("link {file} linked", "EPERM link", "ENOENT link"),
    row("chmod {file}", "EPERM chmod", "ENOENT stat"),
    row("utimensat {file}", "EPERM utimensat", "ENOENT stat"),
    # Kernels, modules, swap, accounting, quota, the log, terminals.
    *(
        row(name, f"EPERM {name}")
        for name in (
            *(
                "finit_module",
                "delete_module",
                "kexec_load",
                "kexec_file_load",
                "swapon",
                "swapoff",
                "acct",
                "quotactl",
            ),
            *("syslog", "vhangup", "clock_settime", "adjtimex", "setdomainname", "ioperm", "iopl", "personality"),
        )
    ),
    # Keys, BPF, perf, io_uring, fanotify, memory.
    row("add_key", "EPERM add_key"),
    row("request_key", "EPERM request_key"),
    *(row(name, "EPERM keyctl") for name in ("keyring session", "keyring user", "join-keyring")),
    row("bpf-load", "EPERM bpf"),
    row("perf-all", "EPERM perf_event_open"),
    *(row(name, f"EPERM {name}") for name in ("io_uring_enter", "io_uring_register", "set_mempolicy")),
    row("fanotify", "EPERM fanotify_init"),
    # Its own privileges.
    row("real-time", "EPERM sched_setscheduler"),
    row("negative-nice", "EACCES setpriority"),
    row("io-real-time", "EPERM ioprio_set"),
    row("raise-limit", "EPERM setrlimit"),
    row("replace-exe", "EPERM prctl"),
    row("drop-bounding", "EPERM prctl"),
    row("capset", "EPERM capset"),
    # In a network namespace of its own nothing answers it, and without CAP_AUDIT_CONTROL nothing is taken.
    row("netlink-audit", "EPERM socket", OK, vm="EPROTONOSUPPORT socket"),
    row("TIOCLINUX", "EACCES openpty", "EPERM ioctl"),
]

# Of the host, to be written to.
SYSTEM_FILES = (
    *("/proc/sys/kernel/modprobe", "/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches", "/proc/sysrq-trigger"),
    *("/proc/sys/fs/binfmt_misc/register", "/proc/irq/default_smp_affinity"),
)
SYS_FILES = (
    *("/sys/kernel/uevent_helper", "/sys/power/state", "/sys/kernel/mm/ksm/run"),
    *("/sys/module/kernel/parameters/panic", "{cgroup}/tasks", "{cgroup}/cgroup.procs", "{cgroup}/notify_on_release"),
    *("{hierarchy}/tasks", "{hierarchy}/cgroup.procs", "{hierarchy}/release_agent"),
)
DEVICES = (
    *("/dev/kmsg", "/dev/mem", "/dev/port", "/dev/console", "/dev/tty0", "/dev/kvm", "/dev/fuse", "/dev/net/tun"),
    *(
        "/dev/loop-control",
        "/dev/vda",
        "/dev/sda",
        "/dev/nvme0n1",
        "/dev/vhost-vsock",
        "/dev/userfaultfd",
        "/dev/vport1p1",
    ),
)
ON_FILES = [
    *(row(f"try-open-write {path}", "EACCES open") for path in SYSTEM_FILES),
    *(row(f"try-open-write {path}", "EACCES open", "ENOENT open") for path in (*SYS_FILES, *DEVICES)),
    *(row(f"try-open-read {path}", "EACCES open", "ENOENT open") for path in DEVICES),
    *(row(f"try-open-read {path}", "EACCES open") for path in ("/proc/kmsg", "/proc/1/environ", "/proc/slabinfo")),
]
ATTEMPTS = [*on_others(), *ON_THE_KERNEL, *ON_FILES]
NAMES = [attempt.arguments for attempt in ATTEMPTS]
assert len(set(NAMES)) == len(NAMES)


class Targets(NamedTuple):
    """On the host: a process of root and one of the unprivileged caller, one of a sandbox of each, a file of root's."""

    victim: int
    users_victim: int
    other: int
    users_other: int
    file: str

    def fill(self, arguments: str, who: str, **inside: str) -> str:
        root = who == "root"
        filled = arguments.format(
            victim=self.victim if root else self.users_victim,
            other=self.other if root else self.users_other,
            file=self.file,
            **inside,
            **cgroup_paths(),
        )
        return filled if filled.startswith("try-") else f"escape {filled}"


@functools.cache
def cgroup_paths() -> dict[str, str]:
    """Our own cgroup in some hierarchy with files to escape by, and the top of that hierarchy."""
    folders = leaks.cgroup_folders()
    folder = next(
        (one for one in folders if (one / "notify_on_release").exists()), folders[0] if folders else Path("/x")
    )
    top = next(one for one in (folder, *folder.parents) if os.path.ismount(one) or one == Path("/"))
    return {"cgroup": str(folder), "hierarchy": str(top)}


SLEEPER = """
import ringfence as rf
rf.run(["sleep", "654.25"], isolation="process")
"""


def sleeper(below: int) -> int:
    """The pid of the workload of SLEEPER, once it runs."""
    deadline = time.monotonic() + 30
    while True:
        for one in leaks.descendants(below):
            if Path(f"/proc/{one.pid}/cmdline").read_bytes() == b"sleep\x00654.25\x00":
                return one.pid
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def targets() -> Iterator[Targets]:
    need_root()
    file = unprivileged.home().parent / "of-root"
    file.touch(0o644)
    as_user = ["setpriv", f"--reuid={unprivileged.UID}", f"--regid={unprivileged.UID}", "--clear-groups"]
    with (
        subprocess.Popen(["/usr/bin/sleep", "1000"], env={"SECRET": "1"}) as victim,
        subprocess.Popen([*as_user, "/usr/bin/sleep", "1000"], env={"SECRET": "1"}) as users,
        python(SLEEPER) as caller,
        unprivileged.caller(SLEEPER) as users_caller,
    ):
        try:
            yield Targets(victim.pid, users.pid, sleeper(caller.pid), sleeper(users_caller.pid), str(file))
        finally:
            for one in (victim, users, caller, users_caller):
                one.kill()
    file.unlink()


AS_USER = """
import json, sys
from pathlib import Path
import ringfence as rf
from ringfence.wire.launcher import probe_path
probe = {"probe": rf.File(Path(probe_path()).read_bytes(), 0o755)}
result = rf.run(["sh", "-c", sys.argv[2]], isolation=sys.argv[1], files=probe)
print(json.dumps([result.stdout.decode(), result.stderr.decode()]))
"""


@functools.cache
def ends(isolation: str, who: str, targets: Targets) -> dict[str, str]:
    """What each attempt printed. `$PPID` of the shell is init, `$S` a sibling of the probe's."""
    commands = ["sleep 1000 & S=$!"]
    commands += ["./probe " + targets.fill(name, who, init="$PPID", sibling="$S") for name in NAMES]
    script = "\n".join([*commands, "kill $S"])
    if who == "root":
        result = rf.run(["sh", "-c", script], isolation=isolation, files=PROBE_FILE)
        out, err = result.stdout.decode(), result.stderr.decode()
    else:
        out, err = unprivileged.python_json(AS_USER, isolation, script)
    assert err == ""
    return dict(zip(NAMES, out.splitlines(), strict=True))


@functools.cache
def control(arguments: str, targets: Targets, folder: str) -> str:
    """By root, unconfined, on the process outside wherever a process is meant."""
    victim = str(targets.victim)
    mine = targets._replace(other=targets.victim)
    filled = mine.fill(arguments, "root", init=victim, sibling=victim)
    found = unconfined(*filled.split(), cwd=folder)[1].decode().strip()
    # That the name led there is what counts: nobody can write to a program that runs, or join the user namespace that
    # he is in.
    return OK if found in ("ETXTBSY open", "EINVAL setns") else found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("control"))


COLUMNS = {"process": "own_user", "container": "own_container"}
CASES = [(level, "root") for level in LEVELS] + [(level, "unprivileged") for level in COLUMNS]


@pytest.mark.parametrize(("isolation", "who"), CASES)
def test_no_way_out(isolation: str, who: str, targets: Targets, folder: str) -> None:
    """All of them that have a control here."""
    column = isolation if who == "root" else COLUMNS[isolation]
    expected = {
        attempt.arguments: getattr(attempt, column)
        for attempt in ATTEMPTS
        if control(attempt.arguments, targets, folder) == OK
    }
    found = ends(isolation, who, targets)
    assert {name: found[name] for name in expected} == expected
    assert len(expected) > 200


def test_an_attempt_without_a_control_proves_nothing(targets: Targets, folder: str) -> None:
    """And is told: this machine's own kernel or rights refuse it to root, unconfined."""
    refused = {name: bare for name in NAMES if (bare := control(name, targets, folder)) != OK}
    if refused:
        pytest.skip("not proven here: " + "; ".join(f"{name}: {bare}" for name, bare in refused.items()))


def test_the_targets_are_as_they_were(targets: Targets) -> None:
    """After all of it, in whatever order: the processes outside run on, with their limits and priorities."""
    for isolation, who in CASES:
        if isolation != "vm":
            ends(isolation, who, targets)
    for pid in targets[:4]:
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
        assert "unlimited" in Path(f"/proc/{pid}/limits").read_text()


# To all that it may reach, and to all of its group; what it leaves of itself is the status by that signal.
TO_EVERYBODY = "sleep 1000 & kill -9 -1; kill -9 0"
AS_USER_SIGNALS = """
import json, sys
import ringfence as rf
result = rf.run(["sh", "-c", sys.argv[2]], isolation=sys.argv[1])
print(json.dumps([result.exit_code, result.signal]))
"""


@pytest.mark.parametrize(("isolation", "who"), [case for case in CASES if case[0] != "vm"])
def test_a_signal_to_everybody_reaches_its_own(isolation: str, who: str, targets: Targets) -> None:
    """Neither the caller nor its processes nor another sandbox. The control has a PID namespace to kill in."""
    control = [
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        "sh",
        "-c",
        "sleep 1000 & S=$!; kill -9 -1; wait $S; echo $?",
    ]
    assert subprocess.run(control, capture_output=True, check=True).stdout == b"137\n"
    if who == "root":
        result = rf.run(["sh", "-c", TO_EVERYBODY], isolation=isolation)
        ended = [result.exit_code, result.signal]
    else:
        ended = unprivileged.python_json(AS_USER_SIGNALS, isolation, TO_EVERYBODY)
    assert ended == [None, 9]
    for pid in targets[:4]:
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
