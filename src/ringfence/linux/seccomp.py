"""seccomp: which system calls a workload may make, and the BPF program of it that the kernel runs at each one.

The lists of names are in `_syscall_lists`, and `seccomp_program` compiles them. The program is kept, so that and
libseccomp are needed once for a machine.

Allowed calls run; known ones that are denied give EPERM; unknown ones give ENOSYS, so that libraries fall
back as they do on an older kernel. A call by another architecture's convention (32-bit, x32) kills the
process.
Sources: seccomp(2), seccomp_rule_add(3), Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import os
import stat
import sys

from ringfence._value import Value
from ringfence.errors import RingfenceError, Unmet
from ringfence.linux import read_text
from ringfence.linux._syscall_lists import ALLOWED, BY_CAPABILITY, DENIED, IN_A_USER_NAMESPACE, NEWER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

__all__ = [
    "Policy",
    "available",
    "cached",
    "for_process",
    "kept",
    "library",
    "policy",
    "sha256",
]

AF_UNIX = 1
_AF_INET, _AF_INET6, _AF_NETLINK, _AF_PACKET = 2, 10, 16, 17
# The first bytes of a kept program; its last is the version of what this module makes of a policy.
_MAGIC = b"RFBPF\0\0\5"
_DIGEST_SIZE = 32
# struct sock_filter; BPF_MAXINSNS.
INSTRUCTION_BYTES, MOST_INSTRUCTIONS = 8, 4096

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
    families=(AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK),
    pair_families=(AF_UNIX,),
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


def cached(wanted: Policy, make: Callable[[Policy], bytes] | None = None) -> bytes:
    """The policy's program. Raises Unmet where it has to be compiled and libseccomp is missing."""
    program = _in_memory.get(wanted)
    if program is None:
        program = _in_memory[wanted] = kept(_text(wanted), lambda: (make or _compiled)(wanted))
    return program


def _compiled(wanted: Policy) -> bytes:
    from ringfence.linux import seccomp_program

    return seccomp_program.compile(wanted)


def _first_of_all(wanted: Policy) -> bytes:
    """With the others that most sandboxes need, while libseccomp is there. They come before it: where this one is kept,
    they are too. The rarer ones are compiled when they are wanted.
    """
    for network in ("host", "none"):
        cached(for_process(network, tcp_only=False, listen=True, shared_user=os.geteuid() != 0))
    return _compiled(wanted)


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
        actions = set(read_text("/proc/sys/kernel/seccomp/actions_avail").split())
    except OSError:
        return False, "this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)"
    if not {"kill_process", "errno", "allow"} <= actions:
        return False, "this kernel's seccomp can't kill a process (it needs Linux 4.14)"
    try:
        program = cached(_NAMESPACED, _first_of_all)
    except Unmet as error:
        return False, error.reason
    size = len(program) // INSTRUCTION_BYTES
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
    from ringfence import _cache_folder

    try:
        folder = os.path.join(_cache_folder.root(), "seccomp")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        about = os.lstat(folder)
    except (OSError, RingfenceError):  # no home, read-only, or another account's
        return None
    private = stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o077
    return os.path.join(folder, key.hex() + ".bpf") if private else None


def _read(path: str, key: bytes) -> bytes | None:
    """A kept program; None where there is none, or not one to trust."""
    header = len(_MAGIC) + _DIGEST_SIZE
    most = header + MOST_INSTRUCTIONS * INSTRUCTION_BYTES
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(fd, "rb") as file:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
            return None
        if not header < about.st_size <= most or (about.st_size - header) % INSTRUCTION_BYTES:
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
