"""seccomp: which system calls a workload may make, compiled to the BPF program that the kernel runs at each
one.

The lists of names are in `_syscall_lists`. libseccomp compiles them, through pyseccomp. The calls that are
judged by an argument are a few instructions of our own, because libseccomp can't say "any value but these" of
one argument; and both are condensed into one search. The program is kept, so libseccomp is needed once for a
machine.

Allowed calls run; known ones that are denied give EPERM; unknown ones give ENOSYS, so that libraries fall
back as they do on an older kernel. A call by another architecture's convention (32-bit, x32) kills the
process.
Sources: seccomp(2), seccomp_rule_add(3), Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

from ringfence._value import Value
from ringfence.errors import RingfenceError, Unmet
from ringfence.linux import seccomp_bpf as bpf
from ringfence.linux._syscall_lists import ALLOWED, BY_CAPABILITY, DENIED, IN_A_USER_NAMESPACE, NEWER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

__all__ = [
    "Policy",
    "available",
    "cached",
    "compile",
    "condensed",
    "exported",
    "for_process",
    "kept",
    "library",
    "policy",
    "sha256",
    "without_network",
]

# Flags of clone(2) that make namespaces: CLONE_NEW{CGROUP,UTS,IPC,USER,PID,NET} and CLONE_NEWNS.
# CLONE_NEWTIME is none of them: for clone its bit is a signal's.
_CLONE_NAMESPACES = 0x7E020000
# Put characters into a terminal's input, as if the user outside had typed them.
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
# Make a terminal's line discipline another one: loads kernel modules that nobody uses (n_gsm, n_hdlc), and has been the
# way to root more than once. And set a file's project, by which a disk quota counts.
_TIOCSETD, _FS_IOC_FSSETXATTR = 0x5423, 0x401C5820
# Plain Linux, 32 bits, either with the version number of 2.6, and the question for the present one.
_PERSONALITIES = (0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK, _AF_PACKET = 1, 2, 10, 16, 17
_SOCK_STREAM, _SOCK_SEQPACKET, _SOCK_TYPE_MASK = 1, 5, 0xF
# S_ISUID and S_ISGID; O_CREAT and the bit of O_TMPFILE that makes it one. openat2(2) has its mode in memory, where a
# filter can't look: it is not in the lists, and so absent to a workload.
_SET_IDS, _CREATES = 0o6000, 0o100 | 0o20000000
_MODE_ARGUMENTS = (
    ("chmod", 1),
    ("fchmod", 1),
    ("fchmodat", 2),
    ("fchmodat2", 2),
    ("creat", 1),
    ("mkdir", 1),
    ("mkdirat", 2),
    ("mknod", 1),
    ("mknodat", 2),
)
_OPEN_ARGUMENTS = (("open", 1, 2), ("openat", 2, 3))

# More than any kernel has.
_MOST_NUMBERS = 1024

# The first bytes of a kept program; its last is the version of what this module makes of a policy.
_MAGIC = b"RFBPF\0\0\5"
_DIGEST_SIZE = 32

_in_memory: dict[Policy, bytes] = {}
_of_processes: dict[tuple[str, bool, bool, bool], Policy] = {}


class Policy(Value):
    """What a filter lets through.

    allowed, denied: names of system calls; a name that this architecture or libseccomp doesn't know is left
    out, and so gets ENOSYS. families, pair_families: the address families of socket(2) and of socketpair(2)
    that are allowed. only_tcp: of sockets nothing but TCP's. shared_user: of a sandbox whose user has other
    processes in its PID namespace, which it may not change.
    """

    __slots__ = ("allowed", "denied", "families", "only_tcp", "pair_families", "shared_user")
    allowed: tuple[str, ...]
    denied: tuple[str, ...]
    families: tuple[int, ...]
    pair_families: tuple[int, ...]
    only_tcp: bool
    shared_user: bool

    def __init__(
        self,
        *,
        allowed: tuple[str, ...],
        denied: tuple[str, ...],
        families: tuple[int, ...],
        pair_families: tuple[int, ...],
        only_tcp: bool = False,
        shared_user: bool = False,
    ) -> None:
        self._set(
            allowed=allowed,
            denied=denied,
            families=families,
            pair_families=pair_families,
            only_tcp=only_tcp,
            shared_user=shared_user,
        )


# Objects of these outlive their processes, so without an IPC namespace one sandbox would leave them to the next.
_SHARED_IPC = (
    *("shmget", "shmat", "shmdt", "shmctl", "semget", "semop", "semtimedop", "semctl"),
    *("msgget", "msgsnd", "msgrcv", "msgctl", "mq_open", "mq_unlink"),
)
_NAMESPACED = Policy(
    allowed=ALLOWED,
    denied=DENIED,
    families=(_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK),
    pair_families=(_AF_UNIX,),
)
_HOST_NETWORK = _NAMESPACED.replace(
    allowed=tuple(name for name in ALLOWED if name not in _SHARED_IPC), denied=(*DENIED, *_SHARED_IPC)
)
_NO_NETWORK = _HOST_NETWORK.replace(families=())


def policy(
    *, namespaces: bool, network: bool = True, capabilities: Iterable[str] = (), own_kernel: bool = False
) -> Policy:
    """The default policy.

    namespaces: of a sandbox with network and IPC namespaces of its own, which may use what is in them. Without: no
    System V IPC and POSIX message queues, which outlive a process; and without `network` no socket(2) at all, as an
    AF_UNIX one reaches the host's services by their paths (the system bus, a resolver, an agent). socketpair(2) stays.
    capabilities: names of those that a sandbox with namespaces of its own holds; each opens the calls that it is for.
    own_kernel: they count in the kernel's first user namespace, as in a guest.
    """
    if namespaces:
        return _with_capabilities(capabilities, own_kernel) if capabilities else _NAMESPACED
    return _HOST_NETWORK if network else _NO_NETWORK


def _with_capabilities(capabilities: Iterable[str], own_kernel: bool) -> Policy:
    opened = {name for one in capabilities for name in BY_CAPABILITY.get(one, "").split()}
    if not own_kernel:
        opened &= IN_A_USER_NAMESPACE
    families = (_AF_PACKET,) if "CAP_NET_RAW" in capabilities else ()
    return _NAMESPACED.replace(
        allowed=tuple(sorted({*ALLOWED, *opened})),
        denied=tuple(name for name in DENIED if name not in opened),
        families=_NAMESPACED.families + families,
    )


def for_process(network: str, *, tcp_only: bool, listen: bool, shared_user: bool) -> Policy:
    """The default policy of a process sandbox.

    network: "none" or "host". tcp_only: of the host's network only TCP, for Landlock to narrow. listen: whether it may
    listen there. shared_user: as for `Policy`.
    """
    key = (network, tcp_only, listen, shared_user)
    if key not in _of_processes:
        _of_processes[key] = _for_process(*key)
    return _of_processes[key]


def _for_process(network: str, tcp_only: bool, listen: bool, shared_user: bool) -> Policy:
    found = _NO_NETWORK if network == "none" else _HOST_NETWORK
    if tcp_only:
        found = found.replace(families=(_AF_INET, _AF_INET6), only_tcp=True)
        if not listen:
            # Not bind(2), which Landlock judges: a socket that was never bound listens at a port of the kernel's.
            allowed = tuple(name for name in found.allowed if name != "listen")
            found = found.replace(allowed=allowed, denied=(*found.denied, "listen"))
    return found.replace(shared_user=True) if shared_user else found


def cached(wanted: Policy) -> bytes:
    """The policy's program. Raises Unmet where it has to be compiled and libseccomp is missing."""
    program = _in_memory.get(wanted)
    if program is None:
        program = _in_memory[wanted] = kept(_text(wanted), lambda: compile(wanted))
    return program


def kept(text: str, make: Callable[[], bytes]) -> bytes:
    """The program of what `text` says whole, an array of struct sock_filter: from the cache folder, or made.

    A file of the cache is taken only if it is this user's own, nobody else can write to it, and its digest is
    right; any other is made anew. Without a usable cache folder it is compiled once in each process.
    """
    key = _key(text)
    path = _cache_path(key)
    program = _read(path, key) if path else None
    if program is None:
        program = make()
        if path:
            _write(path, key, program)
    return program


def available() -> tuple[bool, str]:
    """Whether filters can be made and used here, and by what or why not. The first call may compile them."""
    try:
        with open("/proc/sys/kernel/seccomp/actions_avail", encoding="utf-8") as file:
            actions = set(file.read().split())
    except OSError:
        return False, "this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)"
    if not {"kill_process", "errno", "allow"} <= actions:
        return False, "this kernel's seccomp can't kill a process (it needs Linux 4.14)"
    try:
        size = len(cached(_NAMESPACED)) // bpf.INSTRUCTION.size
        shared = os.geteuid() != 0  # the rarer ones are compiled when they are wanted
        for network in ("host", "none"):
            other = for_process(network, tcp_only=False, listen=True, shared_user=shared)
            path = _cache_path(_key(_text(other)))
            if path is None or not os.path.exists(path):
                cached(other)
    except Unmet as error:
        return False, error.reason
    return True, f"seccomp filter of {size} instructions"


def library() -> Any:
    """libseccomp, by pyseccomp. Raises Unmet where it is missing."""
    # Some 30 ms, and a search for the library: only where nothing is kept yet.
    try:
        import pyseccomp  # type: ignore[import-untyped]
    except (ImportError, RuntimeError) as error:
        raise Unmet(
            "seccomp",
            None,
            f"the filter can't be compiled: {error}",
            "run 'ringfence setup', or install libseccomp2 (Debian), libseccomp (Fedora, Arch, Alpine)",
        ) from None
    return pyseccomp


def compile(wanted: Policy) -> bytes:
    """The policy's program for this architecture, made by libseccomp. Raises Unmet where that is missing."""
    pyseccomp = library()
    arch: int = pyseccomp.system_arch()

    def number(name: str) -> int:
        found: int = pyseccomp.resolve_syscall(arch, name)
        # Negative: this architecture has no such call, or this libseccomp doesn't know the name.
        return found if found >= 0 else NEWER.get(name, -1)

    filter = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    filter.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    filter.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)  # a binary search; libseccomp 2.5
    for names, action in ((wanted.allowed, pyseccomp.ALLOW), (wanted.denied, pyseccomp.ERRNO(errno.EPERM))):
        for name in names:
            if number(name) >= 0:
                filter.add_rule(action, number(name))
    return bpf.bounded(condensed(exported(filter), _by_argument(wanted, number), arch))


def _by_argument(wanted: Policy, number: Callable[[str], int]) -> dict[int, bytes]:
    """The calls that are judged by an argument: what to run for each number. It always returns.

    The kernel takes each of these arguments as 32 bits (clone's flags too), so only those are looked at: with
    all 64, a caller could pass a forbidden value with a bit set above, which the kernel would drop after the
    filter.
    """
    allow, deny = bpf.instruction(bpf.RETURN, bpf.ALLOW), bpf.instruction(bpf.RETURN, bpf.ERRNO | errno.EPERM)
    checks = (
        ("clone", [bpf.load_argument(0), bpf.instruction(bpf.JUMP_ANY_BIT, _CLONE_NAMESPACES, 0, 1), deny, allow]),
        ("ioctl", _one_of(1, (_TIOCSTI, _TIOCLINUX, _TIOCSETD, _FS_IOC_FSSETXATTR), deny, allow)),
        ("personality", _one_of(0, _PERSONALITIES, allow, deny)),
        ("socket", _one_of(0, wanted.families, allow, deny)),
        ("socketpair", _pair(wanted.pair_families, allow, deny)),
        *((name, _no_set_id(mode, allow, deny)) for name, mode in _MODE_ARGUMENTS),
        *((name, _no_set_id(mode, allow, deny, flags)) for name, flags, mode in _OPEN_ARGUMENTS),
    )
    # clone is in the list where it may make namespaces.
    judged = [one for one in checks if one[0] not in wanted.allowed]
    if wanted.only_tcp or wanted.shared_user:
        from ringfence.linux import _seccomp_host

        # The later one of two for the same call counts, and is the stricter one.
        judged += _seccomp_host.only_tcp(wanted.families) if wanted.only_tcp else ()
        judged += _seccomp_host.on_others() if wanted.shared_user else ()
    return {number(name): b"".join(check) for name, check in judged if number(name) >= 0}


def without_network(program: bytes) -> bytes:
    """A program that isn't ours, behind checks that let no socket(2) through, nor what makes sockets without it."""
    pyseccomp = library()
    arch: int = pyseccomp.system_arch()
    allow, deny = bpf.instruction(bpf.RETURN, bpf.ALLOW), bpf.instruction(bpf.RETURN, bpf.ERRNO | errno.EPERM)
    checks = {"socket": deny, "io_uring_setup": deny, "socketpair": b"".join(_pair((_AF_UNIX,), allow, deny))}
    return bpf.guarded(program, {pyseccomp.resolve_syscall(arch, name): one for name, one in checks.items()}, arch)


def condensed(program: bytes, checks: dict[int, bytes], arch: int) -> bytes:
    """libseccomp's program and ours as one, a binary search over ranges of numbers with the same answer.

    libseccomp searches by single numbers: four times as many instructions, and the kernel's work to check, convert and
    compile them is the dearest step of a command's start, some 0.2 ms. What it answers is taken from its own program,
    number by number.
    """
    labels: list[tuple[int, object]] = []
    for number in (*range(_MOST_NUMBERS), bpf.X32_BIT):
        label: object = ("check", number) if number in checks else bpf.answer(program, arch, number)
        if not labels or labels[-1][1] != label:
            labels.append((number, label))
    nodes: list[tuple[int, int, object, object]] = []  # own (first, last) range, and where to go: right, left

    def search(first: int, last: int) -> object:
        """The label of the search over labels[first:last]."""
        if last - first == 1:
            return labels[first][1]
        middle = (first + last) // 2
        at = len(nodes)
        nodes.append((labels[middle][0], at, None, None))
        left, right = search(first, middle), search(middle, last)
        nodes[at] = (labels[middle][0], at, right, left)
        return ("node", at)

    search(0, len(labels))
    answers = sorted({label for _, label in labels if isinstance(label, int)})
    # Where each label is, counted from the first node. Checks are reached by a jump that may go further than 255.
    place: dict[object, int] = {("node", at): at for _, at, _, _ in nodes}
    place.update({answer: len(nodes) + index for index, answer in enumerate(answers)})
    wanted = [label for _, label in labels if not isinstance(label, int)]
    place.update({label: len(nodes) + len(answers) + index for index, label in enumerate(wanted)})
    code = [bpf.instruction(bpf.LOAD, bpf.ARCH_AT), bpf.instruction(bpf.JUMP_EQUAL, arch, 1, 0)]
    code += [bpf.instruction(bpf.RETURN, bpf.KILL_PROCESS), bpf.instruction(bpf.LOAD, bpf.NUMBER_AT)]
    for start, at, right, left in nodes:
        code.append(bpf.instruction(bpf.JUMP_AT_LEAST, start, place[right] - at - 1, place[left] - at - 1))
    code += [bpf.instruction(bpf.RETURN, answer) for answer in answers]
    after = 0
    blocks = []
    for index, label in enumerate(wanted):
        assert isinstance(label, tuple)
        block = checks[label[1]]
        code.append(bpf.instruction(bpf.JUMP, len(wanted) - index - 1 + after))
        blocks.append(block)
        after += len(block) // bpf.INSTRUCTION.size
    return b"".join(code + blocks)


def _one_of(argument: int, values: Sequence[int], then: bytes, otherwise: bytes) -> list[bytes]:
    """Return `then` where the argument is one of the values."""
    jumps = [bpf.instruction(bpf.JUMP_EQUAL, value, len(values) - index, 0) for index, value in enumerate(values)]
    return [bpf.load_argument(argument), *jumps, otherwise, then]


def _pair(families: Sequence[int], allow: bytes, deny: bytes) -> list[bytes]:
    """socketpair(2), but none of datagrams: half of such a pair can still be sent from, or connected, to any path."""
    jumps = [bpf.instruction(bpf.JUMP_EQUAL, one, len(families) - index, 0) for index, one in enumerate(families)]
    kind = [bpf.load_argument(1), bpf.instruction(bpf.AND, _SOCK_TYPE_MASK)]
    kind += [
        bpf.instruction(bpf.JUMP_EQUAL, _SOCK_STREAM, 2, 0),
        bpf.instruction(bpf.JUMP_EQUAL, _SOCK_SEQPACKET, 1, 0),
    ]
    return [bpf.load_argument(0), *jumps, deny, *kind, deny, allow]


def _no_set_id(mode: int, allow: bytes, deny: bytes, flags: int | None = None) -> list[bytes]:
    """A file is not made set-user-ID or set-group-ID: where it lies on the host, others could run it there.

    mode, flags: which arguments these are; with flags the mode counts only where they create a file.
    """
    check = [bpf.load_argument(mode), bpf.instruction(bpf.JUMP_ANY_BIT, _SET_IDS, 0, 1), deny, allow]
    if flags is None:
        return check
    return [bpf.load_argument(flags), bpf.instruction(bpf.JUMP_ANY_BIT, _CREATES, 0, len(check) - 1), *check]


def exported(filter: Any) -> bytes:
    fd = os.memfd_create("ringfence-seccomp", os.MFD_CLOEXEC)
    with open(fd, "w+b") as file:
        filter.export_bpf(file)
        file.seek(0)
        return file.read()


def _text(wanted: Policy) -> str:
    flags = (wanted.only_tcp, wanted.shared_user)
    return str((wanted.allowed, wanted.denied, wanted.families, wanted.pair_families, flags))


def _key(text: str) -> bytes:
    """What a kept program was made of: the policy, the architecture and this module's version.

    libseccomp's version isn't: names that it doesn't know have their numbers from NEWER, so each version
    makes a program of the same meaning, and asking for it would load the library at each start.
    """
    return sha256(_MAGIC + f"{os.uname().machine} {text} {sorted(NEWER.items())}".encode())


def _cache_path(key: bytes) -> str | None:
    """Where a program is kept, in a folder that only this user can open; None where there can't be one."""
    from ringfence import _cache

    try:
        folder = os.path.join(_cache.root(), "seccomp")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        about = os.lstat(folder)
    except (OSError, RingfenceError):  # no home, read-only, or another account's
        return None
    private = stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o077
    return os.path.join(folder, key.hex() + ".bpf") if private else None


def _read(path: str, key: bytes) -> bytes | None:
    """A kept program; None where there is none, or not one to trust."""
    header = len(_MAGIC) + _DIGEST_SIZE
    most = header + bpf.MOST_INSTRUCTIONS * bpf.INSTRUCTION.size
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(fd, "rb") as file:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
            return None
        if not header < about.st_size <= most or (about.st_size - header) % bpf.INSTRUCTION.size:
            return None
        kept = file.read(most)
    digest, program = kept[len(_MAGIC) : header], kept[header:]
    return program if kept.startswith(_MAGIC) and digest == sha256(key + program) else None


def _write(path: str, key: bytes, program: bytes) -> None:
    """Keep a program: whole or not at all. That it can't be kept is no error, it is compiled again then."""
    scratch = f"{path}.{os.getpid()}-{os.urandom(4).hex()}"
    try:
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(_MAGIC + sha256(key + program) + program)
            os.rename(scratch, path)
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError:
        return


def sha256(data: bytes) -> bytes:
    # hashlib loads OpenSSL, some 10 ms; these are the modules that it falls back to without it.
    try:
        module = __import__("_sha2" if sys.version_info >= (3, 12) else "_sha256")
    except ImportError:
        module = __import__("hashlib")
    digest: bytes = module.sha256(data).digest()
    return digest
