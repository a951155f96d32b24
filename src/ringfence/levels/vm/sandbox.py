"""A guest with its commands, files and limits."""

from __future__ import annotations

import os
import time

from ringfence.errors import CannotEnforce, ProtocolError, RingfenceError, SpecError, StartError, Unmet, printable
from ringfence.levels import capabilities, filter
from ringfence.levels.base import Command, Outcome, Sandbox, requested
from ringfence.levels.drive import drive
from ringfence.levels.layer import Layer
from ringfence.levels.limit_rules import cgroup_applied, freeze
from ringfence.levels.local import rlimits
from ringfence.levels.ready import kind_of
from ringfence.levels.state import state
from ringfence.levels.usage import Measured, of_guest
from ringfence.levels.vm import card
from ringfence.levels.vm.agent import TRANSFER_LIMIT_NS, Agent
from ringfence.levels.vm.shape import KERNEL_BYTES, guest_kernel, machine_for, user_of
from ringfence.levels.vm.start import Guest, Waiting
from ringfence.levels.vm.tree import HOME, HOSTNAME, guest_tree
from ringfence.linux import seccomp
from ringfence.result import Applied, Change, Usage
from ringfence.spec.parse import match_pattern
from ringfence.wire import frames, guest_messages, messages
from ringfence.wire.frames import Type
from ringfence.wire.messages import MountStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.levels.host import Host
    from ringfence.levels.vm.kernel import GuestKernel
    from ringfence.linux import cgroups
    from ringfence.spec import FileIn, Limits, Spec

__all__ = ["VmSandbox"]

_START_LIMIT_NS = 60_000_000_000
_CPU_PERIOD_NS = 100_000_000
# Where what a program of the host's executes comes from.
_PROGRAMS = frozenset((b"usr", b"bin", b"sbin", b"lib", b"lib32", b"lib64", b"libx32", b"etc"))


def _true_is_the_hosts(spec: Spec) -> bool:
    """Whether /usr/bin/true is the host's own, with the host's own libraries."""
    over = [mount.target for mount in spec.mounts] + [mount.target for mount in spec.tmpfs]
    return spec.image == "host" and _PROGRAMS.isdisjoint(target.split(b"/")[1] for target in over)


class VmSandbox(Sandbox):
    home = HOME

    def __init__(self, spec: Spec, host: Host, *, stays: bool = False, use_template: bool = True) -> None:
        from ringfence.linux import kvm

        self._spec = spec
        self._host = host
        self._kernel: GuestKernel = guest_kernel(spec)
        state_of_kvm = kvm.probe()
        self.accelerator = "kvm" if state_of_kvm.usable else "tcg"
        self._why_accelerator = state_of_kvm.reason
        self._user = user_of(spec)
        self._ready: dict[str, int] | None = None
        self._filter: filter.Filter | None = None
        self._denied: tuple[int, list[tuple[int, int, int | None, int, tuple[int, ...]]]] = (0, [])
        # What init reported of the last command, and of the one before this one.
        self._last: messages.Exited | None = None
        self._before: messages.Exited | None = None
        self._vmm_before: cgroups.Usage | None = None
        self._killed_on_host = False  # QEMU, at the limit of its own cgroup
        self._layer = Layer()
        self._machine = machine_for(spec, self._kernel, self.accelerator)
        self._clock = (0, 0)
        self._kind = kind_of(spec, host) if use_template and not stays else None
        self._next: Waiting | None = None
        self._guest = self._waiting() or Guest(
            self._machine,
            host,
            state(),
            stays=stays,
            use_template=use_template,
            own_kernel=spec.kernel is not None,
        )
        self._guest.begin()
        self._meet()

    def _waiting(self) -> Guest | None:
        """The guest of a QEMU that waits for a run of this kind."""
        found = state().ready.take(self._kind) if self._kind is not None else None
        return found.take(self._machine) if isinstance(found, Waiting) else None

    def _meet(self) -> None:
        """The guest is another one now."""
        self._vmm = self._guest.vmm
        self._agent = Agent(self._vmm, self._take)
        self._answered = False

    # ---- running ----

    def run(self, command: Command) -> Outcome:
        self._boot()
        return self._first(command)

    def _first(self, command: Command, *, warm: bool = False, own: bool = False) -> Outcome:
        """Runs a command. Where a restored guest has never said a word, by another guest, which boots."""
        try:
            return self._run(command, warm=warm, own=own)
        except ProtocolError as error:
            if self._answered or not self._guest.restored or self._spec.image_is_disk:
                raise
            # It was restored and hasn't said a word since: no command has been started. Not by a disk of the caller's,
            # which may be made to end its guest, and would end the next one too.
            self._guest.again(error, keep=True)
            self._ready = None
            self._boot()
            return self._run(command, warm=warm, own=own)

    def prepare(self, warm: tuple[bytes, ...] = ()) -> None:
        """Restores the guest, hands it its plan and runs commands of ours, so that the first one of the caller's finds
        the kernel's ways of starting one translated, and what all programs need in its memory. Of an image or a mount
        nothing is run that the caller hasn't asked for by `warm`.
        """
        self._boot()
        self._warm_up((b"ringfence", b"warm"), own=True)
        if _true_is_the_hosts(self._spec):
            self._warm_up((b"/usr/bin/true",))
        if warm:
            self._warm_up_by(warm)
        self.mark()

    def _warm_up(self, argv: tuple[bytes, ...], *, own: bool = False) -> None:
        """own: the program of the guest's init, which is there whatever its tree is."""
        try:
            self._first(self._before_all(argv, (), _START_LIMIT_NS), warm=True, own=own)
        except StartError as error:
            if error.whole:
                raise
            # A host without it, a filter that denies it: what comes first is slower then.

    def _warm_up_by(self, argv: tuple[bytes, ...]) -> None:
        """By a command of the caller's, as the spec would have it run. One that fails would warm up little."""
        limits = self._spec.limits
        wall_time_ns = _START_LIMIT_NS if limits.wall_time_ns is None else limits.wall_time_ns
        command = self._before_all(argv, self._spec.environment(self.home), wall_time_ns, limits.output_bytes)
        outcome = self._first(command, warm=True)
        ended = outcome.exited
        if outcome.stopped is not None or ended is None or ended.exit_code != 0:
            how = outcome.stopped or "it was killed"
            if ended is not None and outcome.stopped is None:
                how = f"status {ended.exit_code}" if ended.signal is None else f"signal {ended.signal}"
            said = printable(bytes(outcome.stderr[-200:]).decode(errors="replace").strip(), " ")
            raise RingfenceError(
                f"what was to warm the guest up didn't end well ({how}): {os.fsdecode(argv[0])}: {said}"
            )

    def _before_all(
        self, argv: tuple[bytes, ...], env: tuple[tuple[bytes, bytes], ...], wall_time_ns: int, output_bytes: int = 4096
    ) -> Command:
        return Command(
            argv=argv,
            env=env,
            cwd=self.home,
            input=None,
            wall_time_ns=wall_time_ns,
            output_bytes=output_bytes,
            once=False,
        )

    def _run(self, command: Command, *, warm: bool = False, own: bool = False) -> Outcome:
        channel = self._vmm.channel
        self._layer.begin()
        id = self._agent.next_id()
        channel.send(
            messages.execute(
                command.argv,
                command.env,
                command.cwd,
                id=id,
                once=command.once,
                streams=True,
                nfds=0,
                warm=warm,
                own=own,
            )
        )
        if command.once and self._kind is not None:
            self._next = state().ready.next_of(self._kind, self._another)
        outcome = drive(
            channel,
            command,
            id=id,
            pipes=None,
            start_limit_ns=_START_LIMIT_NS,
            kill_hard=self._vmm.kill,
            on_frame=self._take,
            watch=self._vmm.watch(),
        )
        self._killed_on_host = outcome.exited is None and outcome.stopped is None and self._vmm.out_of_memory()
        if outcome.exited is None and outcome.stopped is None and not self._killed_on_host:
            raise self._agent.died("while it ran" if outcome.started else "before the command was started")
        if self._filter is not None and self._filter.answers:
            from ringfence.levels.denials import listed

            (others, noted), self._denied = self._denied, (0, [])
            outcome.denials = listed(noted, others)
        outcome.settle()
        self._last = outcome.exited
        return outcome

    def _boot(self) -> None:
        """Waits for the guest's init, and hands it the plan and the first files. Its answers are taken later."""
        if self._ready is not None:
            return
        self._clock = self._guest.clock()
        self._meet()
        self._vmm.booted()
        self._vmm.channel.send(self._plan().encode())
        self._ready = {}
        self._agent.put(self._spec.files)

    def _take(self, frame: frames.Frame) -> None:
        if frame.type == Type.READY and self._ready == {} and frame.payload:
            self._ready = guest_messages.parse_ready(frame.payload)
            self._answered = True
        elif frame.type == Type.LISTENER and self._filter is not None and self._filter.answers:
            self._denied = guest_messages.parse_denials(frame.payload)
        elif self._layer.take(frame):
            return
        elif frame.type == Type.DONE:
            self._agent.took()
        elif frame.type not in (Type.CREDIT, Type.PONG):  # for a stdin that is through; that came late
            raise ProtocolError(f"the guest sent a frame of type {frame.type}")

    # ---- the plan ----

    def _plan(self) -> messages.Plan:
        spec, limits = self._spec, self._spec.limits
        plan = guest_messages.GuestPlan()
        quota = limits.cpus
        plan.guest(
            realtime_ns=self._clock[0],
            realtime_at_ns=self._clock[1],
            entropy=os.urandom(64),
            # Without a limit too: the guest's own kernel must keep some, or it stands still before it kills anybody.
            memory_bytes=limits.memory_bytes or self._machine.memory_bytes - KERNEL_BYTES,
            pids=limits.pids or 0,
            cpu_ns=round(quota * _CPU_PERIOD_NS) if quota is not None and quota % 1 else 0,
        )
        plan.hostname((spec.hostname or HOSTNAME).encode("ascii"))
        plan.loopback()
        if self._machine.card is not None:
            card.put(plan, self._vmm.jail)
        plan.mounts(self._tree())
        plan.ids(*self._user)
        plan.flags(enter=True, no_new_privs=True)
        plan.workdir(HOME)
        if "seccomp" in spec.asked:
            self._filter = filter.choose(spec, self._host, kernel=self._kernel.release)
            self._filter.put(plan, guest=True)
        elif not self._host.seccomp:
            wanted = seccomp.policy(namespaces=True, capabilities=spec.capabilities, own_kernel=True)
            plan.seccomp(seccomp.cached(wanted))
        if spec.capabilities:
            plan.capabilities(capabilities.mask(spec.capabilities))
        for which, limit in rlimits(spec):
            plan.rlimit(which, limit, limit)
        if limits.cpu_time_ns is not None:
            plan.cpu_limit(limits.cpu_time_ns, None)
        return plan

    def _tree(self) -> list[MountStep]:
        steps, mounted = guest_tree(self._spec, self._user, self._machine.memory_bytes)
        if self._spec.overlay:
            self._layer.made_by_us(mounted)
        return steps

    # ---- a sandbox that stays ----

    def put(self, files: tuple[FileIn, ...]) -> None:
        self._boot()
        self._agent.put(files)
        self._agent.until_taken()

    def read(self, path: bytes, limit_bytes: int) -> bytes | None:
        try:
            return self._agent.read(path, limit_bytes, time.monotonic_ns() + TRANSFER_LIMIT_NS)
        except StartError:
            return None  # no regular file, says the guest

    def files(self) -> list[tuple[bytes, int]]:
        listed = self._agent.entries(time.monotonic_ns() + TRANSFER_LIMIT_NS)
        return [(entry.path, entry.size_bytes) for entry in listed if entry.kind == "f"]

    def mark(self) -> None:
        self._before = self._last
        self._vmm_before = self._vmm_usage()

    def _vmm_usage(self) -> cgroups.Usage | None:
        """What QEMU has used until now."""
        return self._vmm.cgroup.usage() if self._vmm.cgroup is not None else None

    def stats(self) -> Usage:
        last, vmm = self._last, self._vmm_usage()
        return Usage(
            memory_peak_bytes=last.memory_peak_bytes if last is not None else None,
            vmm_cpu_ns=vmm.cpu_ns if vmm is not None else None,
            vmm_memory_peak_bytes=vmm.memory_peak_bytes if vmm is not None else None,
            source="the guest's cgroup v2" if last is not None else "",
        )

    def set_limits(self, limits: Limits, changed: frozenset[str]) -> list[Applied]:
        help = "open another sandbox, or use isolation='container'"
        unmet = [
            Unmet(rule, limits.given()[rule], "a machine's limits are fixed when it boots", help)
            for rule in sorted(changed - {"wall_time", "output"})
        ]
        if unmet:
            raise CannotEnforce("vm", unmet)
        return []

    def freeze(self) -> None:
        freeze(self._vmm.cgroup, self._host, "vm")

    def thaw(self) -> None:
        if self._vmm.cgroup is not None:
            self._vmm.cgroup.thaw()

    # ---- files ----

    def collect(self, patterns: tuple[bytes, ...], limit_bytes: int) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        left = limit_bytes
        until = time.monotonic_ns() + TRANSFER_LIMIT_NS
        for entry in self._agent.entries(until):
            if entry.kind != "f" or not any(match_pattern(pattern, entry.path) for pattern in patterns):
                continue
            if entry.size_bytes > left:
                # A hole can be of any size: it isn't sent for.
                raise SpecError(f"collect: the files that match are more than {limit_bytes} bytes together")
            try:
                data = self._agent.read(entry.path, left, until)
            except StartError:
                continue  # not a file, or not there, any more: the guest said so
            left -= len(data)
            found[os.fsdecode(entry.path)] = data
        return found

    # ---- telling ----

    def disk_full(self) -> bool:
        return self._spec.limits.disk_bytes is not None and self._layer.full()

    def changes(self) -> tuple[Change, ...] | None:
        return self._layer.changes() if self._spec.overlay else None

    def usage(self, outcome: Outcome) -> Measured:
        vmm = self._vmm_usage()
        if vmm is not None and self._vmm_before is not None:
            vmm = vmm.since(self._vmm_before)
        return of_guest(outcome.exited, self._before, vmm, killed=self._killed_on_host)

    def applied(self, outcome: Outcome) -> list[Applied]:
        spec, limits, started = self._spec, self._spec.limits, outcome.started
        machine = self._machine
        found = [
            Applied(rule="accelerator", requested=None, effective=self.accelerator, mechanism=self._why_accelerator),
            Applied(
                rule="machine",
                requested=None,
                effective=f"{machine.cpus} CPU, {machine.memory_bytes} bytes",
                mechanism=f"QEMU {machine.board}",
            ),
            self._guest.applied(),
            *self._vmm.applied(),
        ]
        read = self._ready or {}
        for rule, asked, effective in (
            ("memory", limits.memory_bytes, read.get("memory") or None),
            ("pids", limits.pids, read.get("pids") or None),
            ("cpus", limits.cpus, read.get("cpu_ns", 0) / _CPU_PERIOD_NS or float(machine.cpus)),
        ):
            if asked is not None:
                where = "virtual CPUs, the guest's cgroup v2" if rule == "cpus" else f"the guest's cgroup v2 {rule}.max"
                mechanism = f"{where}, as the guest tells"
                found.append(Applied(rule=rule, requested=asked, effective=effective, mechanism=mechanism))
        if self._vmm.cgroup is not None:
            on_host = [one for one in self._vmm.cgroup.in_force if one.rule in ("cpu_weight", "cpuset")]
            found += [one.replace(mechanism=f"of QEMU: {one.mechanism}") for one in cgroup_applied(on_host, spec.asked)]
        if limits.wall_time_ns is not None:
            wall = limits.wall_time_ns
            found.append(Applied(rule="wall_time", requested=wall, effective=wall, mechanism="the caller's clock"))
        if limits.cpu_time_ns is not None:
            cpu = limits.cpu_time_ns
            found.append(
                Applied(rule="cpu_time", requested=cpu, effective=cpu, mechanism="the guest's init, by its cgroup")
            )
        output = limits.output_bytes
        asked_output = output if "output" in spec.asked else None
        found.append(Applied(rule="output", requested=asked_output, effective=output, mechanism="the channel"))
        if started is None:
            return found
        found += [
            Applied(
                rule="kernel",
                requested=requested(spec, "kernel"),
                effective=started.kernel,
                mechanism="its own, read back by uname",
            ),
            Applied(
                rule="user",
                requested=requested(spec, "user"),
                effective=f"{started.ids[1]}:{started.ids[4]}",
                mechanism="the guest's setresuid, read back",
            ),
            capabilities.applied(spec, started, "the guest's user, as it tells", first_namespace=True),
            Applied(
                rule="no_new_privs",
                requested=None,
                effective=True if started.no_new_privs else None,
                mechanism="the guest's prctl",
            ),
            filter.applied(spec, self._host, started, self._filter),
            Applied(
                rule="hostname", requested=spec.hostname, effective=started.hostname, mechanism="the guest's own kernel"
            ),
            *card.applied(self._vmm.jail, spec),
            Applied(
                rule="files",
                requested=spec.image if "image" in spec.asked else None,
                effective=f"{spec.image}, {'below an overlay' if spec.overlay else 'read-only'};"
                " its own /tmp, /dev and /proc; /run and /home empty",
                mechanism="9p, read-only"
                if spec.image == "host"
                else f"a {machine.disk_format} disk, read-only"
                if spec.image_is_disk
                else "erofs disk",
            ),
        ]
        found += self._layer.applied(spec, "as the guest tells")
        for mount in spec.mounts:
            shown = "writable" if mount.writable else "read-only"
            found.append(
                Applied(
                    rule=f"mount {os.fsdecode(mount.target)}", requested=shown, effective=shown, mechanism="9p share"
                )
            )
        return found

    def _another(self) -> Waiting:
        """A QEMU for the next run of this kind, which is started once this one is over."""
        assert self._kind is not None
        machine, host = self._machine, self._host
        return Waiting(self._kind, state().ready, lambda: Guest(machine, host, state()))

    def close(self) -> None:
        self._guest.close()
        following, self._next = self._next, None
        if following is not None and self._kind is not None:
            state().ready.offer(self._kind, following)
