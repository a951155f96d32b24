"""What process and container sandboxes have in common: they run on the host's kernel, started by the launcher."""

from __future__ import annotations

import abc
import os
import resource
import select
import time

from ringfence.errors import CannotEnforce, KernelError, ProtocolError, RingfenceError, SpecError, Unmet
from ringfence.levels.base import Command, Outcome, Sandbox, requested
from ringfence.levels.drive import Pipes, drive
from ringfence.levels.limits import cgroup_limits
from ringfence.levels.ready import kind_of
from ringfence.levels.state import Berth, State
from ringfence.levels.state import state as this_state
from ringfence.levels.usage import Measured, of_cgroup
from ringfence.linux import ids, landlock_abi, seccomp
from ringfence.wire import frames, messages
from ringfence.wire.frames import Type
from ringfence.wire.launcher import LauncherGone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from ringfence.levels.denials import Listener
    from ringfence.levels.filter import Filter
    from ringfence.levels.host import Host
    from ringfence.levels.layer import Layer
    from ringfence.levels.network.session import NetworkSession
    from ringfence.levels.workdir import WorkDirectory
    from ringfence.linux import cgroups
    from ringfence.linux.cgroups import Cgroup, InForce
    from ringfence.linux.seccomp import Policy
    from ringfence.result import Applied, Change, Usage
    from ringfence.spec import FileIn, Limits, Spec
    from ringfence.wire.channel import Channel

    _Local = TypeVar("_Local", bound="LocalSandbox")

__all__ = ["LocalSandbox", "open_local", "rlimits"]

_START_LIMIT_NS = 30_000_000_000
# From the kill to the last process being reaped. A sandbox that takes longer has one in uninterruptible sleep.
_END_LIMIT_MS = 10_000
# A result whose rules nobody has asked for yet keeps its spec.
_INPUT_KEPT_BYTES = 64 << 10

# Leave to be more urgent than others, which a workload doesn't inherit where its caller has it.
_PRIORITIES = (resource.RLIMIT_NICE, resource.RLIMIT_RTPRIO)


def rlimits(spec: Spec) -> list[tuple[int, int]]:
    """(resource, limit) of a spec: no core files, and CPU time as the backstop of the group's own limit."""
    # 1, not 0: the kernel still runs a core_pattern that is a pipe for 0, and doesn't for 1 (core(5)).
    found = [(resource.RLIMIT_CORE, 1)]
    if spec.limits.cpu_time_ns is not None:
        # For one process, in whole seconds: init watches the whole group more finely.
        found.append((resource.RLIMIT_CPU, spec.limits.cpu_time_ns // 10**9 + 2))
    return found


def open_local(level: type[_Local], spec: Spec, host: Host, state: State, *, stays: bool = False) -> _Local:
    """A sandbox of that level: the one that waits for such a spec, or a new one, as any is that stays."""
    if stays:
        return level(spec, host, state, stays=True)
    # An unprivileged process sandbox is the caller's own user: without scoped signals it could stop one that waits.
    safe = host.privileged or spec.isolation != "process" or host.landlock_abi >= landlock_abi.SCOPES_ABI
    kind = kind_of(spec, host) if safe else None
    if kind is not None:
        waiting = state.ready.take(kind)
        if isinstance(waiting, level):
            waiting.adopt(spec)
            return waiting
    try:
        made = level(spec, host, state)
    except LauncherGone:  # the one that we had turns out to be dead: by another one
        made = level(spec, host, this_state())
    made.kind = kind
    return made


class LocalSandbox(Sandbox):
    """Owns all that a sandbox has on the host: its init, its channel, its cgroup, its work directory, its ids.

    later: it is made ahead, for a spec of the same kind (`ready.kind_of`), which `adopt` hands it. stays: it takes more
    than one command, so its limits may change, and it may be frozen.
    """

    # Whether the kernel itself ends everything with init.
    pid_namespace = False

    def __init__(self, spec: Spec, host: Host, state: State, *, later: bool = False, stays: bool = False) -> None:
        self.spec = spec
        self.later = later
        self.kind = kind_of(spec, host) if later else None
        self._next: LocalSandbox | None = None
        self.in_force: tuple[InForce, ...] = ()
        self._unsent: tuple[bytes, messages.Plan, Sequence[int]] | None = None
        self._pipes: Pipes | None = None
        self.state = state
        self._launcher = state.launcher
        self.host = host
        self.berth: Berth | None = None
        self.cgroup: Cgroup | None = None
        self.channel: Channel | None = None
        self.network: NetworkSession | None = None
        self.pidfd = -1
        self._next_id = 1
        self._before: cgroups.Usage | None = None
        self.layer: Layer | None = None
        # Whether init told that nobody is left. One that was killed didn't.
        self._nobody_left = False
        self._launched = False
        self._owned_fds: list[int] = []
        self.filter: Filter | None = None  # of a spec that asks for one
        self._listener: Listener | None = None
        self._watched: dict[int, Callable[[], None]] = {}
        self._stays = stays
        self._cgroup_limits = cgroup_limits(spec.limits, host)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    # ---- starting ----

    @abc.abstractmethod
    def _open(self) -> None:
        """Takes a berth and a cgroup, makes the plan, starts init. On an error what it took is given back."""

    def put_files(self) -> None:
        """The spec's files, unless it is another one that will be run."""
        if not self.later:
            assert self.berth is not None
            self.berth.workdir.put(self.spec.files)

    def adopt(self, spec: Spec) -> None:
        """Becomes the sandbox of that spec, for whose kind it was made."""
        self.spec = spec
        self.later = False
        try:
            self.put_files()
        except BaseException:
            self.close()
            raise

    def _another(self) -> LocalSandbox:
        """One of the same kind, made ahead. It keeps nothing of this one's command."""
        spec = self.spec.replace(argv=(), input=None, env=(), files=(), collect=())
        return type(self)(spec, self.host, self.state, later=True)

    def _prepare_next(self) -> None:
        """Makes the next sandbox, once the command runs: before, init and the command's process are on our CPU, where
        we would be in their way. Where it fails, `Ready.offer` finds out.
        """
        assert self.kind is not None
        self._next = self.state.ready.next_of(self.kind, self._another)
        if self._next is not None:
            try:
                self._next.send_off()
            except (RingfenceError, OSError):
                return

    def is_waiting(self) -> bool:
        """Whether init has said nothing yet, as one does that has made all that its plan says, or still does."""
        return self.channel is not None and self.channel.is_quiet()

    def forget(self) -> None:
        """In a forked child, or once the launcher is gone: closes what it holds, and ends nothing."""
        channel, self.channel = self.channel, None
        if channel is not None:
            channel.close()
        self._close_pipes()

    def _close_pipes(self) -> None:
        pipes, self._pipes = self._pipes, None
        if pipes is not None:
            pipes.close()

    def make_cgroup(self) -> None:
        timed = "cpu_time" in self.spec.asked
        self.cgroup = self.state.cgroup(self._cgroup_limits, live=self._stays, timed=timed)

    def keep_fd(self, fd: int) -> int:
        """A descriptor that the sandbox closes at its end."""
        self._owned_fds.append(fd)
        return fd

    def common_plan(self, plan: messages.Plan) -> None:
        """What both levels tell init alike."""
        for which, limit in rlimits(self.spec):
            _, hard = resource.getrlimit(which)
            value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            plan.rlimit(which, value, value)
        for which in _PRIORITIES:
            if resource.getrlimit(which)[1] != 0:
                plan.rlimit(which, 0, 0)
        if self.cgroup is not None:
            for fd in self.cgroup.join_fds():
                plan.cgroup(fd)
            if self.spec.limits.cpu_time_ns is not None:
                usage = self.cgroup.cpu_fd()
                if usage is None:
                    raise KernelError("open", ["cpuacct.usage"], 2, "the cgroup tells no CPU time")
                plan.cpu_limit(self.spec.limits.cpu_time_ns, usage)

    def put_filter(self, plan: messages.Plan, policy: Callable[[], Policy]) -> None:
        """The spec's filter; else the policy's, where this host can have one."""
        if "seccomp" in self.spec.asked:
            from ringfence.levels import filter

            self.filter = filter.choose(self.spec, self.host)
            self.filter.put(plan)
            if self.filter.answers:
                from ringfence.levels.denials import Listener

                self._listener = Listener(self.filter.answers, audit=self.filter.audit)
        elif not self.host.seccomp:
            plan.seccomp(seccomp.cached(policy()))

    def start(self, request: bytes, plan: messages.Plan, joins: Sequence[int] = ()) -> None:
        """Has init started and hands it the plan. Its answers come while a command is driven. joins: descriptors of the
        namespaces that the request names.
        """
        if self.later and self._unsent is None:
            self._unsent = (request, plan, joins)
            return
        if len(plan.fds) > frames.FDS_MAX:
            self._refuse_as_too_many(len(plan.fds))
        if self.state.launcher is not self._launcher:
            # What the plan refers to was made in another one's mount namespace.
            raise LauncherGone("the launcher was replaced while the sandbox was made")
        self._launched = True
        try:
            self.channel = self._launcher.launch(request, joins)
        except OSError:  # no descriptor, no memory: it wasn't asked at all
            self._launched = False
            raise
        self.channel.send(plan.encode(), plan.fds)

    def _refuse_as_too_many(self, count: int) -> None:
        """Init takes them with one message. What the rest is depends on the image, cgroups and devices."""
        spec = self.spec
        rule = "mounts" if spec.mounts else "devices" if spec.devices else "image"
        reason = (
            f"it takes {count} descriptors, of which init takes {frames.FDS_MAX}: about one for each mount, device and"
        )
        help = f"leave {count - frames.FDS_MAX} out, or mount a folder that holds several"
        raise CannotEnforce(
            spec.isolation, [Unmet(rule, requested(spec, rule), f"{reason} name at the image's top", help)]
        )

    def send_off(self) -> None:
        """Has the init of a sandbox that is made ahead started."""
        if self._unsent is not None and self.channel is None:
            self.start(*self._unsent)
            self.prepare()

    def prepare(self, warm: tuple[bytes, ...] = ()) -> None:
        if self._pipes is None:
            self._pipes = Pipes(None, self.state.null)  # what most commands take

    def open_network(self, plan: messages.Plan, *, local_dns: bool, guest: bool) -> None:
        """Takes what a network of its own with a way out needs of the host. Only for who asks for one.

        guest: as for the session.
        """
        from ringfence.levels.network.session import NetworkSession

        level = "vm" if guest else self.spec.isolation
        self.network = NetworkSession(self.spec.network, level, local_dns=local_dns, guest=guest)
        if guest:
            plan.tap(self.keep_fd(os.open("/dev/net", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)))
        plan.sockets(self.network.supply.theirs())

    def start_network(self, network: NetworkSession) -> None:
        """Once init has the plan: it is what hands over sockets, unless it had to give up."""
        channel = self.channel
        assert channel is not None
        network.supply.handed_over()
        if channel.wants_to_send:
            channel.flush_blocking()
        network.request()
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        poll.register(network.supply.fileno(), select.POLLIN)
        deadline = time.monotonic_ns() + _START_LIMIT_NS
        while network.supply.fileno() not in [fd for fd, _ in poll.poll(1000)]:
            for frame in channel.receive():
                if frame.type == Type.ERROR:
                    raise messages.parse_error(frame.payload)
                self.take(frame)
            if channel.at_end or time.monotonic_ns() > deadline:
                raise ProtocolError("init did not set up the sandbox")
        network.on_failure = self.kill
        network.start()

    # ---- running ----

    def run(self, command: Command) -> Outcome:
        channel = self.channel
        assert channel is not None
        if self.cgroup is not None and self.cgroup.frozen:
            raise SpecError("the sandbox is paused: what would be started in it would stand still too")
        id = self._next_id
        self._next_id += 1
        if self.layer is not None:
            self.layer.begin()
        pipes, self._pipes = self._pipes, None
        if pipes is not None and command.input:
            pipes.close()
            pipes = None
        if pipes is None:
            pipes = Pipes(command.input, self.state.null)
        try:
            request = messages.execute(
                command.argv, command.env, command.cwd, id=id, once=command.once, streams=False, nfds=len(pipes.child)
            )
            channel.send(request, pipes.child)
            if channel.wants_to_send:
                channel.flush_blocking()
            pipes.sent()
            outcome = drive(
                channel,
                command,
                id=id,
                pipes=pipes,
                start_limit_ns=_START_LIMIT_NS,
                kill_hard=self.kill,
                on_frame=self.take,
                watch=self._watched,
                on_started=self._prepare_next if command.once and self.kind is not None else None,
            )
        finally:
            pipes.close()
        if self.network is not None:
            self.network.check()
        if outcome.exited is None and outcome.started is None:
            raise ProtocolError("the sandbox ended before the command was started")
        if self._listener is not None:
            outcome.denials = self._listener.take()
        self._nobody_left = command.once and outcome.exited is not None
        outcome.settle()
        return outcome

    def take(self, frame: frames.Frame) -> None:
        """A frame that isn't of the command."""
        if frame.type == Type.LAUNCHED and len(frame.fds) == 1 and self.pidfd < 0:
            self.pidfd = frame.fds[0]
        elif frame.type == Type.LISTENER and len(frame.fds) == 1 and self._listener is not None:
            fd = self.keep_fd(frame.fds[0])
            self._watched[fd] = self._listener.watch(fd, lambda: self._unwatch(fd))
        elif self.layer is not None and (frame.type == Type.DONE or self.layer.take(frame)):
            return  # the end of a file that was put in, for one
        else:
            raise ProtocolError(f"init sent a frame of type {frame.type}")

    def _unwatch(self, fd: int) -> None:
        """Nobody has that listener's filter any more."""
        del self._watched[fd]
        self._owned_fds.remove(fd)
        os.close(fd)

    def kill(self) -> None:
        """Ends init by SIGKILL, where it doesn't answer any more."""
        import signal

        self.thaw()
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended in this moment

    # ---- a sandbox that stays ----

    def put(self, files: tuple[FileIn, ...]) -> None:
        assert self.berth is not None
        if self.spec.limits.disk_bytes is None:
            self.berth.workdir.put(files, replace=True)
            return
        for id in self.send_files(files):
            self._await_done(id)

    def send_files(self, files: tuple[FileIn, ...]) -> list[int]:
        """Has init write files, as a file system of the sandbox's own namespace takes none from an id that isn't its
        own. Init answers each, by the number that is told here.
        """
        assert self.channel is not None
        from ringfence.wire import guest_messages

        sent = []
        for one in files:
            sent.append(self._next_id)
            self._next_id += 1
            for request in guest_messages.put(one.path, one.mode, one.data, id=sent[-1]):
                self.channel.send(request)
        return sent

    def _await_done(self, id: int) -> None:
        channel = self.channel
        assert channel is not None
        channel.flush_blocking()
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        while not channel.at_end and poll.poll(_END_LIMIT_MS):
            for frame in channel.receive():
                if frame.type == Type.ERROR:
                    raise messages.parse_error(frame.payload)
                if frame.type == Type.DONE and frame.id == id:
                    return
                self.take(frame)
        raise ProtocolError("the sandbox doesn't take a file")

    @property
    def workdir(self) -> WorkDirectory:
        """Where the command's files are: on disk, or, where they have a limit, in a file system that init made."""
        assert self.berth is not None
        limited = self.layer is not None and self.spec.limits.disk_bytes is not None
        return self.layer.workdir if limited and self.layer is not None else self.berth.workdir

    def read(self, path: bytes, limit_bytes: int) -> bytes | None:
        return self.workdir.read(path, limit_bytes)

    def files(self) -> list[tuple[bytes, int]]:
        return self.workdir.files()

    def mark(self) -> None:
        self._before = self.cgroup.usage() if self.cgroup is not None else None

    def stats(self) -> Usage:
        return of_cgroup(self.cgroup.usage() if self.cgroup is not None else None, None).usage()

    def set_limits(self, limits: Limits, changed: frozenset[str]) -> list[Applied]:
        from ringfence.levels.limit_rules import change_limits

        return change_limits(self.cgroup, limits, changed, self.host, self.spec.isolation)

    def freeze(self) -> None:
        from ringfence.levels.limit_rules import freeze

        freeze(self.cgroup, self.host, self.spec.isolation)

    def thaw(self) -> None:
        if self.cgroup is not None:
            self.cgroup.thaw()

    def collect(self, patterns: tuple[bytes, ...], limit_bytes: int) -> dict[str, bytes]:
        return self.workdir.collect(patterns, limit_bytes)

    # ---- telling ----

    def disk_full(self) -> bool:
        return self.layer is not None and self.spec.limits.disk_bytes is not None and self.layer.full()

    def changes(self) -> tuple[Change, ...] | None:
        return self.layer.changes() if self.layer is not None and self.spec.overlay else None

    def usage(self, outcome: Outcome) -> Measured:
        used = self.cgroup.usage() if self.cgroup is not None else None
        if used is not None and self._before is not None:
            used = used.since(self._before)
        return of_cgroup(used, outcome.exited)

    def tell(self, outcome: Outcome) -> Sequence[Applied] | Callable[[], Sequence[Applied]]:
        """Of a sandbox of a kind, all was read back by now. Its rows take some 70 us, and few ask for them; but what
        came in with a spec isn't kept alive for that.
        """
        if self.kind is None or self.spec.files or len(self.spec.input or b"") > _INPUT_KEPT_BYTES:
            return self.applied(outcome)
        return lambda: self.applied(outcome)

    def applied(self, outcome: Outcome) -> list[Applied]:
        from ringfence.levels import told

        return told.of_local(self, outcome)

    def user_mechanism(self) -> str:
        return "setresuid, read by getresuid"

    # ---- ending ----

    def _end(self) -> bool:
        """Has init end everything, and waits for it. Whether its end was seen."""
        channel, self.channel = self.channel, None
        if channel is None:
            return True
        try:
            if self.cgroup is not None:
                self.cgroup.thaw()  # what version 1 has frozen can't be killed
            if not self._nobody_left:
                channel.finish()  # its end is init's sign, where init doesn't leave by itself
            if self.pidfd < 0:
                self._await_pidfd(channel)
            if self.pidfd < 0:
                # It ended without a report, or was never started. That its end of the channel is closed tells.
                return channel.at_end
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            if not poll.poll(_END_LIMIT_MS):
                self.kill()
                if not poll.poll(_END_LIMIT_MS):
                    raise ProtocolError("the sandbox doesn't end: one of its processes hangs in the kernel")
            return True
        finally:
            channel.close()

    # Whether the end of all that ran in it was seen; before, what it may write to can't be removed.
    ended = False

    def close(self) -> None:
        ended = False
        try:
            ended = self.ended = self._end()
        finally:
            self._close_pipes()
            if self.network is not None:
                self.network.close()
            following, self._next = self._next, None
            if following is not None and self.kind is not None:
                self.state.ready.offer(self.kind, following)
            if self.pidfd >= 0:
                os.close(self.pidfd)
                self.pidfd = -1
            for fd in self._owned_fds:
                os.close(fd)
            self._owned_fds.clear()
            if self.layer is not None:
                self.layer.close()
            cgroup, self.cgroup = self.cgroup, None
            if cgroup is not None:
                self.in_force = cgroup.in_force
            berth, self.berth = self.berth, None
            # What something may still run in is left to the launcher, which removes it in the end.
            if ended and (self._nobody_left or not self._launched or self._end_rest(cgroup, berth)):
                if cgroup is not None:
                    self.state.leave_cgroup(cgroup)
                if berth is not None:
                    self.state.leave(berth)

    def _end_rest(self, cgroup: Cgroup | None, berth: Berth | None) -> bool:
        """Before the next sandbox gets its ids and its work directory: what an init that was killed left behind at the
        process level dies by the launcher, but that takes a moment, and the launcher may have been killed as well.
        Whether nobody is left.
        """
        # Were it to kill by the uid only later, it would be the next sandbox that it kills.
        if not self._settle():
            return False
        if cgroup is not None:
            if cgroup.processes():
                cgroup.kill()
            return True
        if self.pid_namespace or berth is None or berth.slot is None:
            return True
        deadline = time.monotonic() + _END_LIMIT_MS / 1000
        while left := ids.anybody_has(ids.process_uid(berth.slot)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
        return not left

    def _settle(self) -> bool:
        """False where it can't be asked, for want of descriptors."""
        try:
            self.state.launcher.settle()
        except RingfenceError:
            return True  # it is gone itself: each init was told so, and has ended what it had
        except OSError:
            return False
        return True

    def _await_pidfd(self, channel: Channel) -> None:
        """Init hands over its pidfd with its first report; one that ends before, ends the channel instead."""
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        deadline = time.monotonic() + _END_LIMIT_MS / 1000
        while self.pidfd < 0 and not channel.at_end and time.monotonic() < deadline:
            poll.poll(1000)
            for frame in channel.receive():
                if frame.type == Type.LAUNCHED:
                    self.take(frame)
