"""The launcher: one small static process beside this one, which starts sandboxes and outlives us just long enough to
remove them.

It is started on first use by posix_spawn, so that nothing of Python runs between fork and exec, and ends when the last
copy of our end of its socket is closed: when this process exits or dies, by whatever signal.
"""

from __future__ import annotations

import _socket as socket  # as in channel.py
import atexit
import errno
import os
from _thread import allocate_lock

from ringfence.errors import ProtocolError, RingfenceError, Unavailable
from ringfence.linux import ids, privileges
from ringfence.wire import frames, messages
from ringfence.wire.channel import Channel, send_packet
from ringfence.wire.frames import Type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "OWN_CGROUP",
    "OWN_HELD",
    "OWN_LEAF",
    "OWN_TREE",
    "Launcher",
    "LauncherGone",
    "core_path",
    "end_launcher",
    "launcher",
    "namespaces_here",
    "probe_path",
    "sealed_core",
]

OWN_TREE, OWN_CGROUP, OWN_HELD, OWN_LEAF = 1, 2, 3, 4
# How long this process waits at its own end for the launcher to have cleaned up.
_GOODBYE_MS = 5000
# From the end of its socket to its own.
_DYING_MS = 1000


# namespaces(7): those that a thread is in, and those that its children will be.
_NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time", "pid_for_children", "time_for_children")


def core_path() -> str:
    """Where the static helper is: in the package."""
    return _binary("ringfence-core")


def probe_path() -> str:
    """Where the static probe workload is: in the package."""
    return _binary("ringfence-probe")


def namespaces_here() -> dict[str, str | None]:
    """The namespaces of the calling thread and of its children, by kind, and which folder its root is; None where one
    can't be told. Takes 60 us.
    """
    found: dict[str, str | None] = {}
    for kind in _NAMESPACES:
        try:
            found[kind] = os.readlink(f"/proc/thread-self/ns/{kind}")
        except OSError:
            found[kind] = None
    root = os.stat("/")  # chroot(2) leaves the namespaces as they are
    found["root"] = f"{root.st_dev}:{root.st_ino}"
    return found


# linux/memfd.h, linux/fcntl.h.
_MFD_EXEC = 0x10
_ALL_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, SHRINK, GROW and WRITE


def sealed_core() -> int:
    """A descriptor of a copy of the static helper in memory that nobody can change. The caller closes it.

    The launcher and every init execute this copy: through /proc/PID/exe, and through a script whose interpreter is
    /proc/self/exe, a workload gets hold of the file that init executes, and where it is the caller's own user it could
    otherwise write to that file once nobody executes it (CVE-2019-5736; as runc does since).

    Raises Unavailable where the kernel lets no memfd be executed.
    """
    import fcntl

    source = os.open(core_path(), os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        try:
            copy = os.memfd_create("ringfence-core", flags | _MFD_EXEC)
        except OSError as error:
            if error.errno == errno.EACCES:
                reason = "the sysctl vm.memfd_noexec is 2: no program can be executed from memory"
                raise Unavailable("every", reason, "set it to 0 or 1") from None
            if error.errno != errno.EINVAL:
                raise
            copy = os.memfd_create("ringfence-core", flags)  # before Linux 6.3 all of them can be executed
        try:
            # Above those that the launcher gets as 0 to 3.
            high = fcntl.fcntl(copy, fcntl.F_DUPFD_CLOEXEC, 16)
        finally:
            os.close(copy)
        try:
            left = os.fstat(source).st_size
            while left > 0 and (sent := os.sendfile(high, source, None, left)):
                left -= sent
            os.fchmod(high, 0o555)
            fcntl.fcntl(high, fcntl.F_ADD_SEALS, _ALL_SEALS)
        except BaseException:
            os.close(high)
            raise
        return high
    finally:
        os.close(source)


def _binary(name: str) -> str:
    path = os.path.join(os.path.dirname(os.path.dirname(__file__)), "_core", name)
    if not os.access(path, os.X_OK):
        raise Unavailable("every", f"{path} is missing", "install ringfence by 'pip install .', which builds it")
    return path


class LauncherGone(ProtocolError):
    """It was killed before the request reached it. The next one starts another launcher."""


class Launcher:
    """A running launcher. Every method may be called from any thread."""

    def __init__(self) -> None:
        # Of an unprivileged user it stays in the host's mount namespace and takes sources by path.
        self.own_mounts = privileges.privileged()
        # Those that sandboxes are made from, wherever the caller goes by unshare(2) or setns(2) later.
        self.namespaces = namespaces_here()
        # What is mounted there, as long as this is open: templates are made of it, wherever the caller is by then.
        self.mountinfo = open("/proc/thread-self/mountinfo", "rb", 0) if self.own_mounts else None  # noqa: SIM115
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            try:
                program = sealed_core()
            except BaseException:
                os.close(null)
                raise
            try:
                self.pid = os.posix_spawn(
                    f"/proc/self/fd/{program}",
                    ["ringfence-core", "launcher", *_ids(self.own_mounts)],
                    {},
                    file_actions=[(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
                    + [(os.POSIX_SPAWN_DUP2, theirs.fileno(), 3)],
                    setsid=True,
                )
            except PermissionError:
                reason = "a security module of this host lets no program be executed from memory (memfd)"
                raise Unavailable("every", reason, "allow it to the program that calls ringfence") from None
            finally:
                os.close(program)
                os.close(null)
        except BaseException:
            ours.close()
            if self.mountinfo is not None:
                self.mountinfo.close()
            raise
        finally:
            theirs.close()
        self._pidfd = os.pidfd_open(self.pid)
        self._socket = ours
        self.templates: set[bytes] = set()
        # Answers that nobody has waited for yet, each with the template that it is of.
        self._unconfirmed: list[tuple[Channel, bytes]] = []
        self.lock = allocate_lock()

    def launch(self, request: bytes, joins: Sequence[int] = ()) -> Channel:
        """Starts a sandbox's init. Returns the channel on which LAUNCHED, and all of init's answers, will come.

        joins: descriptors of the namespaces that the request names.
        """
        channel = self._post(request, joins)
        if self._unconfirmed:
            try:
                self.confirm()  # while init is being started
            except BaseException:
                channel.close()
                raise
        return channel

    def template(self, name: bytes, steps: Iterable[messages.MountStep]) -> None:
        """Makes a tree in the launcher's mount namespace, at /t/NAME. What the steps name by path is this process's.
        Whether that worked shows at the next launch.
        """
        request, fds = messages.template(name, steps)
        self._unconfirmed.append((self._post(request, fds), name))
        self.templates.add(name)

    def own(self, kind: int, parent: int, name: bytes) -> None:
        """Hands over `name` below the directory `parent`: the launcher removes it when we are gone, whether it is there
        already or is yet to be made. OWN_LEAF: a cgroup that this process itself went down into, which goes up again.
        OWN_HELD: it only keeps the descriptor open until every sandbox is gone.

        The launcher reads it before it sees our end, and before any later request. Whether it had room for it shows at
        the next launch.
        """
        self._unconfirmed.append((self._post(messages.own(kind, name), [parent]), b""))

    def user_namespace(self, uid_map: bytes, gid_map: bytes) -> int:
        """A descriptor of a new user namespace with these maps. The caller closes it."""
        fds = self._ask(messages.user_namespace(uid_map, gid_map), [])
        if len(fds) != 1:
            raise ProtocolError("the launcher did not hand over a user namespace")
        return fds[0]

    def settle(self) -> None:
        """Returns once the launcher has seen to every sandbox whose init has ended by now: where one was killed, what
        it left is killed too.
        """
        self._ask(messages.settle(), [])

    def close(self) -> bool:
        """Ends the launcher, with every sandbox that it still has, and waits until it has cleaned up.

        False where it was killed before, and so has left what it owned.
        """
        self._let_go()
        return self._reap(_GOODBYE_MS)

    def _reap(self, wait_ms: int) -> bool:
        """Waits for its end, once. Whether it ended by itself, as far as can be told."""
        import select

        with self.lock:
            pidfd, self._pidfd = self._pidfd, -1
        if pidfd < 0:
            return False
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(wait_ms):
                return True
            ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            return ended is None or (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)
        except ChildProcessError:
            return True  # the application ignores SIGCHLD, or reaps everybody's children
        finally:
            os.close(pidfd)

    def forget(self) -> None:
        """In a forked child: lets go of the parent's launcher, which must not wait for us to end."""
        self._let_go()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _let_go(self) -> None:
        self._drop_answers()
        self._socket.close()
        if self.mountinfo is not None:
            self.mountinfo.close()

    def _drop_answers(self) -> None:
        while self._unconfirmed:
            self._unconfirmed.pop()[0].close()

    def __del__(self) -> None:
        # Of a launcher that was killed: see `_gone`.
        if hasattr(self, "_socket"):
            self._let_go()

    def _send(self, request: bytes, fds: Sequence[int]) -> None:
        if len(request) > frames.PACKET_MAX:
            raise ValueError(f"a request of {len(request)} bytes is more than the launcher takes")
        try:
            send_packet(self._socket, request, fds)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._gone() from error

    def _gone(self) -> Exception:
        """Why the launcher ended: its last words, where it had any. The next request starts another one."""
        global _launcher
        with _lock:
            if _launcher is self:
                _launcher = None
        # Its socket is closed with the last thread that may be about to use it.
        self._reap(_DYING_MS)
        try:
            words = self._socket.recv(frames.PACKET_MAX, socket.MSG_DONTWAIT)
            if words:
                _, length, _, _ = frames.parse_header(words)
                return messages.parse_error(words[frames.HEADER_BYTES : frames.HEADER_BYTES + length])
        except (OSError, ProtocolError):
            pass  # it left none; what follows says all that is known
        return LauncherGone("the launcher ended unexpectedly")

    def confirm(self) -> None:
        """Waits for the answers that nobody has waited for yet, and raises the first error among them."""
        failed: Exception | None = None
        while True:
            try:
                channel, template = self._unconfirmed.pop(0)
            except IndexError:
                break  # by us or by another thread
            try:
                self._answer(channel)
            except RingfenceError as error:
                self.templates.discard(template)
                failed = failed or error
        if failed is not None:
            raise failed

    def _ask(self, request: bytes, fds: Sequence[int]) -> list[int]:
        return self._answer(self._post(request, fds))

    def _post(self, request: bytes, fds: Sequence[int]) -> Channel:
        """Sends a request, and returns the channel on which its answer comes."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._send(request, [theirs.fileno(), *fds])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Channel(ours, trusted=True)

    def _answer(self, channel: Channel) -> list[int]:
        """The descriptors that come with it. Closes the channel; raises the launcher's error."""
        try:
            channel.block()
            while not channel.at_end:
                for frame in channel.receive():
                    if frame.type == Type.ERROR:
                        raise messages.parse_error(frame.payload)
                    if frame.type == Type.DONE:
                        return frame.fds
            raise self._gone()
        finally:
            channel.close()


def _ids(privileged: bool) -> tuple[str, ...]:
    """What the launcher is told of the ids that it may kill by."""
    if not privileged:
        return ("unprivileged",)
    found = ids.range_()
    return str(found.first), str(found.count)


_lock = allocate_lock()
_launcher: Launcher | None = None


def launcher() -> Launcher:
    """This process's launcher, started on first use."""
    global _launcher
    found = _launcher
    if found is None:
        with _lock:
            if _launcher is None:
                _launcher = Launcher()
                atexit.register(_at_exit)
            found = _launcher
    return found


def end_launcher() -> bool:
    """Ends this process's launcher, which removes all that it owns first. False where it had been killed before."""
    global _launcher
    found, _launcher = _launcher, None
    return found is None or found.close()


def _at_exit() -> None:
    end_launcher()


def _after_fork_in_child() -> None:
    global _launcher, _lock
    _lock = allocate_lock()
    if _launcher is not None:
        _launcher.forget()
        atexit.unregister(_at_exit)
        _launcher = None


os.register_at_fork(after_in_child=_after_fork_in_child)
