"""The vm level: a whole operating system, its own kernel included, on virtual hardware.

The VMM, QEMU, is itself the workload of a container sandbox: it has no network, no capabilities, an id that owns
nothing, and of the host's files it sees its own programs and what the guest is to see.
"""

from __future__ import annotations

import math
import os
import time

from ringfence.errors import CannotEnforce, ProtocolError, SpecError, StartError, Unavailable, Unmet
from ringfence.images import tree
from ringfence.levels import capabilities, filter, reach
from ringfence.levels.base import Ability, Command, Level, Outcome, Sandbox, requested
from ringfence.levels.drive import drive
from ringfence.levels.layer import Layer
from ringfence.levels.limits import cgroup_applied, cpuset_unmet, freeze, limit_abilities
from ringfence.levels.local import rlimits
from ringfence.levels.root import device_steps, directories_above, own_directories, private_steps
from ringfence.levels.state import state
from ringfence.levels.usage import Measured, of_guest
from ringfence.levels.users import resolve
from ringfence.levels.vm.vmm import Machine, Share, Vmm, start_qemu
from ringfence.linux import ids, seccomp
from ringfence.result import Applied, Change, Usage
from ringfence.spec.parse import match_pattern
from ringfence.spec.rules import Tmpfs
from ringfence.wire import frames, layers, messages
from ringfence.wire.frames import Type
from ringfence.wire.messages import BIND, INSIDE, NODEV, NOSUID, RDONLY, MountStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ringfence.levels.host import Host
    from ringfence.levels.vm.kernel import GuestKernel
    from ringfence.spec import FileIn, Limits, Mount, Spec

__all__ = ["VmLevel"]

_HOME = b"/work"
_HOSTNAME = "ringfence"
_USER = (1000, 1000)
# Under emulation a cold boot takes 2 to 3 s on an idle machine; many at once on a busy one take their time.
_BOOT_LIMIT_NS = 120_000_000_000
_START_LIMIT_NS = 60_000_000_000
# All that is brought back of one run: 1 GiB at some 15 MB/s, and as much again.
_COLLECT_LIMIT_NS = 150_000_000_000
_MOST_ENTRIES = 65536
# What the guest's own kernel and init take, on top of what the workload may use.
_KERNEL_BYTES = 128 << 20
_DEFAULT_MEMORY_BYTES = 512 << 20
_CPU_PERIOD_NS = 100_000_000
_MOST_CPUS = 64

_IMAGE = b"/.image"


class VmLevel(Level):
    name = "vm"

    def unavailable(self, host: Host) -> tuple[str, str] | None:
        from ringfence.levels.vm import kernel

        if host.machine != "x86_64":
            return f"the guest's machine is x86_64, this one is {host.machine}", "use isolation='container'"
        if not os.access("/usr/bin/qemu-system-x86_64", os.X_OK):
            return "QEMU (qemu-system-x86_64) isn't installed", "run 'ringfence setup'"
        if host.user_namespaces:
            return f"QEMU is jailed in a container, and {host.user_namespaces}", "see 'ringfence doctor'"
        if kernel.find() is None:
            return "the guest's kernel isn't prepared", "run 'ringfence setup'"
        return host.ids

    def abilities(self, host: Host) -> Mapping[str, Ability]:
        cgroup = "the guest's cgroup v2"
        found = {
            "memory": f"the guest's memory, and {cgroup} memory.max",
            "cpus": f"virtual CPUs, and {cgroup} cpu.max",
            "pids": f"{cgroup} pids.max",
            "cpu_time": f"the guest's init, by {cgroup} cpu.stat",
            "wall_time": "the caller's clock",
            "output": "the channel",
            "hostname": "the guest's own kernel",
            "image": "9p share of the host's userland, or an erofs disk",
            "user": "the guest's own kernel",
            "mounts": "9p shares",
            "capabilities": "the guest's own kernel",
            "network=none": "no network card",
            "disk": "a tmpfs with a size in the guest, for the work directory and the overlay",
            "tmpfs": "tmpfs with a size in the guest",
        }
        abilities = {rule: Ability(rule=rule, mechanism=mechanism) for rule, mechanism in found.items()}
        local = limit_abilities(host)
        for rule in ("cpu_weight", "cpuset"):
            one = local[rule]
            mechanism = f"of QEMU: {one.mechanism}"
            abilities[rule] = Ability(rule=rule, mechanism=mechanism) if one.available else one
        abilities["swap"] = Ability(
            rule="swap", reason="a guest's kernel has no swap", help="leave it out: memory alone allows none"
        )
        for rule in ("io_read", "io_write", "io_read_ops", "io_write_ops"):
            abilities[rule] = Ability(
                rule=rule, reason="a guest's work directory is in its memory", help="use isolation='container'"
            )
        abilities["seccomp"] = filter.ability(host)
        abilities.update(reach.elsewhere())
        abilities["overlay"] = _overlay_ability()
        abilities["devices"] = Ability(
            rule="devices",
            reason="a guest has devices of its own, and none of the host's",
            help="use isolation='container'",
        )
        abilities["namespaces"] = Ability(
            rule="namespaces",
            reason="a guest's kernel has namespaces of its own, and shares none with the host's",
            help="use isolation='container'",
        )
        abilities["network=host"] = Ability(
            rule="network=host",
            reason="a virtual machine has a network stack of its own",
            help="use isolation='container'",
        )
        for rule in ("network=nat", "allow", "publish", "bandwidth"):
            abilities[rule] = Ability(
                rule=rule, reason="a guest has no network card yet", help="use network='none', or isolation='container'"
            )
        return abilities

    def unmet(self, spec: Spec, host: Host) -> list[Unmet]:
        from ringfence.levels.vm import kernel

        unmet = cpuset_unmet(spec, host)
        if isinstance(spec.user, str):
            try:
                resolve(spec.user, spec.image)
            except SpecError as error:
                unmet.append(Unmet("user", spec.user, str(error), "give a uid, or a user of the image"))
        if spec.limits.cpus is not None and spec.limits.cpus > _MOST_CPUS:
            unmet.append(Unmet("cpus", spec.limits.cpus, f"a guest has at most {_MOST_CPUS} CPUs", "ask for fewer"))
        if "seccomp" in spec.asked:
            guest = kernel.find()
            unmet += filter.unmet(spec, host, kernel=guest.release if guest is not None else "")
        if spec.overlay and spec.image == "host":
            reason = "a guest sees the host's files through a share, where they are nobody's: they couldn't be changed"
            unmet.append(Unmet("overlay", True, reason, "use a rootfs folder as image, or isolation='container'"))
        if len(spec.mounts) > 6:
            unmet.append(
                Unmet("mounts", requested(spec, "mounts"), "the machine has room for 6 shares", "share their parent")
            )
        return unmet

    def open(self, spec: Spec, host: Host, *, stays: bool = False) -> VmSandbox:
        return VmSandbox(spec, host, stays=stays)


class VmSandbox(Sandbox):
    home = _HOME

    def __init__(self, spec: Spec, host: Host, *, stays: bool = False) -> None:
        from ringfence.levels.vm import initramfs, kernel
        from ringfence.linux import kvm
        from ringfence.wire.launcher import core_path

        self._spec = spec
        self._host = host
        found = kernel.find()
        if found is None:  # it was there a moment ago
            raise Unavailable("vm", "the guest's kernel isn't prepared", "run 'ringfence setup'")
        self._kernel: GuestKernel = found
        state_of_kvm = kvm.probe()
        self.accelerator = "kvm" if state_of_kvm.usable else "tcg"
        self._why_accelerator = state_of_kvm.reason
        self._user = resolve(spec.user, spec.image) if spec.user is not None else _USER
        self._ready: dict[str, int] | None = None
        self._filter: filter.Filter | None = None
        self._denied: tuple[int, list[tuple[int, int, int | None, int, tuple[int, ...]]]] = (0, [])
        self._next_id = 1
        self._untaken = 0  # files that were put in, and whose DONE hasn't come yet
        self._collect_until = 0
        # What init reported of the last command, and of the one before this one.
        self._last: messages.Exited | None = None
        self._before: messages.Exited | None = None
        self._layer = Layer()
        shares, disks = [], []
        if spec.image == "host":
            shares.append(Share(tag="image", source=None, writable=False))
        else:
            from ringfence.levels.vm import images

            disks.append(images.erofs_disk(spec.image))
        for number, mount in enumerate(spec.mounts):
            shares.append(Share(tag=f"mount{number}", source=mount.source, writable=mount.writable))
        limits = spec.limits
        memory = (limits.memory_bytes + _KERNEL_BYTES) if limits.memory_bytes is not None else _DEFAULT_MEMORY_BYTES
        self._machine = Machine(
            kernel=self._kernel.vmlinux,
            initramfs=initramfs.build(self._kernel, core_path()),
            memory_bytes=memory,
            cpus=max(1, math.ceil(limits.cpus or 1)),
            accelerator=self.accelerator,
            shares=tuple(shares),
            disks=tuple(disks),
            # The guest's user is QEMU's on the host, so that both see the same owners in a share.
            user=self._user if max(self._user) < ids.CONTAINER_IDS else _USER,
            cpu_weight=limits.cpu_weight,
            cpuset=limits.cpuset,
            sets=("overlay",) if spec.overlay else (),
        )
        self._vmm: Vmm = start_qemu(self._machine, host, state(), stays=stays)

    # ---- running ----

    def run(self, command: Command) -> Outcome:
        channel = self._vmm.channel
        self._boot()
        self._layer.begin()
        id = self._id()
        channel.send(
            messages.execute(command.argv, command.env, command.cwd, id=id, once=command.once, streams=True, nfds=0)
        )
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
        if outcome.exited is None and outcome.stopped is None:
            raise self._died("while it ran" if outcome.started else "before the command was started")
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
        self._await(Type.READY, _BOOT_LIMIT_NS, "the guest did not boot")
        self._vmm.channel.send(self._plan().encode())
        self._ready = {}
        self._send_files(self._spec.files)

    def _send_files(self, files: tuple[FileIn, ...]) -> None:
        for one in files:
            for request in messages.put(one.path, one.mode, one.data, id=self._id()):
                self._vmm.channel.send(request)
            self._untaken += 1

    def _id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _take(self, frame: frames.Frame) -> None:
        if frame.type == Type.READY:
            self._ready = messages.parse_ready(frame.payload)
        elif frame.type == Type.LISTENER and self._filter is not None and self._filter.answers:
            self._denied = messages.parse_denials(frame.payload)
        elif self._layer.take(frame):
            return
        elif frame.type == Type.DONE:
            self._untaken -= 1
        elif frame.type != Type.CREDIT:  # for a stdin that is through
            raise ProtocolError(f"the guest sent a frame of type {frame.type}")

    def _died(self, when: str) -> Exception:
        return ProtocolError(f"the virtual machine ended {when}{self._vmm.last_words()}")

    def _await(self, kind: int, limit_ns: int, what: str) -> frames.Frame:
        """The next frame of that type. Raises StartError for an ERROR, ProtocolError where none comes."""
        for frame in self._frames(limit_ns, what):
            if frame.type == kind:
                return frame
        raise self._died(what)

    def _frames(self, limit_ns: int, what: str) -> list[frames.Frame]:
        """What has come, waiting for the first of it."""
        import select

        channel = self._vmm.channel
        deadline = time.monotonic_ns() + limit_ns
        poll = select.poll()
        watch = self._vmm.watch()
        poll.register(channel.fileno(), select.POLLIN)
        for fd in watch:
            poll.register(fd, select.POLLIN)
        while not channel.at_end:
            poll.modify(channel.fileno(), select.POLLIN | (select.POLLOUT if channel.wants_to_send else 0))
            left = deadline - time.monotonic_ns()
            if left <= 0:
                break
            for fd, event in poll.poll(left // 1_000_000 + 1):
                if fd in watch:
                    watch[fd]()
                elif event & select.POLLOUT:
                    channel.flush()
            found = channel.receive()
            for frame in found:
                if frame.type == Type.ERROR:
                    raise messages.parse_error(frame.payload)
            if found:
                return found
        if channel.at_end:
            raise self._died(f"({what})")
        raise ProtocolError(f"{what} in time{self._vmm.last_words()}")

    # ---- the plan ----

    def _plan(self) -> messages.Plan:
        spec, limits = self._spec, self._spec.limits
        plan = messages.Plan()
        quota = limits.cpus
        plan.guest(
            realtime_ns=time.time_ns(),
            entropy=os.urandom(64),
            memory_bytes=limits.memory_bytes or 0,
            pids=limits.pids or 0,
            cpu_ns=round(quota * _CPU_PERIOD_NS) if quota is not None and quota % 1 else 0,
        )
        plan.hostname((spec.hostname or _HOSTNAME).encode("ascii"))
        plan.loopback()
        plan.mounts(self._tree())
        plan.ids(*self._user)
        plan.flags(enter=True, no_new_privs=True)
        plan.workdir(_HOME)
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
        """The same tree as a container's, of a share or a disk."""
        spec = self._spec
        uid, gid = self._user
        disk = spec.limits.disk_bytes
        steps, shown = self._skeleton()
        if disk is not None or spec.overlay:
            steps.insert(0, layers.memory_layer(disk if disk is not None else self._machine.memory_bytes // 2))
        if spec.overlay:
            # What is mounted comes after what is made: only that is below the overlay.
            steps.append(layers.overlay(b"/", None))
        steps += shown
        # In a kernel of its own there is nothing of the host's to mask.
        steps += private_steps(self._user, masks=False)
        if disk is not None:
            steps.append(layers.place(_HOME, 0o700))
        else:
            work = b"mode=0700,uid=%d,gid=%d" % (uid, gid)
            steps.append(messages.filesystem(_HOME, b"tmpfs", data=work, flags=NOSUID | NODEV))
        mounted = self._mounts()
        if spec.overlay:
            self._layer.made_by_us(mounted)
        return [*steps, *mounted, messages.mask(_IMAGE), *(() if spec.overlay else (messages.readonly(b"/"),))]

    def _skeleton(self) -> tuple[list[MountStep], list[MountStep]]:
        """What a root is made of before anything is mounted in it, and the mounts: of the image and of the devices."""
        spec = self._spec
        steps = [*own_directories(), messages.directory(_IMAGE)]
        if spec.image == "host":
            entries = tree.host_entries()
            shown = [_share(b"image", _IMAGE, writable=False)]
        else:
            entries = tree.entries(spec.image)
            flags = RDONLY | NOSUID | NODEV
            # "ro" too: a file system that may be written to can't be made of a read-only disk (EACCES).
            shown = [messages.filesystem(_IMAGE, b"erofs", source=b"/dev/vda", data=b"ro", flags=flags)]
        for entry in entries:
            at = b"/" + entry.name
            if entry.kind == "symlink":
                steps.append(messages.symlink(at, entry.target))
                continue
            steps.append(messages.directory(at) if entry.kind == "directory" else messages.file(at))
            if spec.overlay and entry.kind == "directory":
                shown.append(layers.overlay(at, _IMAGE + at, inside=True))
            else:
                shown.append(messages.bind(at, _IMAGE + at, RDONLY | NOSUID | NODEV | INSIDE))
        devices = device_steps(lambda path: path)  # of the guest's own devtmpfs
        steps += [step for step in devices if step.kind != BIND]
        return steps, shown + [step for step in devices if step.kind == BIND]

    def _mounts(self) -> list[MountStep]:
        """The spec's own mounts, parents first."""
        numbers = {mount.target: number for number, mount in enumerate(self._spec.mounts)}
        both: list[Mount | Tmpfs] = [*self._spec.mounts, *self._spec.tmpfs]
        steps: list[MountStep] = []
        for one in sorted(both, key=lambda one: one.target):
            if isinstance(one, Tmpfs):
                steps += [*directories_above(one.target), messages.directory(one.target)]
                steps.append(layers.tmpfs(one.target, one.size_bytes, one.mode, self._user))
            else:
                tag = b"mount%d" % numbers[one.target]
                steps += _mount_steps(tag, one.source, one.target, writable=one.writable)
        return steps

    # ---- a sandbox that stays ----

    def put(self, files: tuple[FileIn, ...]) -> None:
        self._boot()
        self._send_files(files)
        deadline = time.monotonic_ns() + _COLLECT_LIMIT_NS
        while self._untaken > 0:
            for frame in self._frames(deadline - time.monotonic_ns(), "the guest did not take the files"):
                self._take(frame)

    def read(self, path: bytes, limit_bytes: int) -> bytes | None:
        self._collect_until = time.monotonic_ns() + _COLLECT_LIMIT_NS
        try:
            return self._read(path, limit_bytes)
        except StartError:
            return None  # no regular file, says the guest

    def files(self) -> list[tuple[bytes, int]]:
        self._collect_until = time.monotonic_ns() + _COLLECT_LIMIT_NS
        return [(entry.path, entry.size_bytes) for entry in self._list() if entry.kind == "f"]

    def mark(self) -> None:
        self._before = self._last

    def stats(self) -> Usage:
        last = self._last
        if last is None:
            return Usage()
        return Usage(memory_peak_bytes=last.memory_peak_bytes, source="the guest's cgroup v2")

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
        self._collect_until = time.monotonic_ns() + _COLLECT_LIMIT_NS
        for entry in self._list():
            if entry.kind != "f" or not any(match_pattern(pattern, entry.path) for pattern in patterns):
                continue
            if entry.size_bytes > left:
                # A hole can be of any size: it isn't sent for.
                raise SpecError(f"collect: the files that match are more than {limit_bytes} bytes together")
            try:
                data = self._read(entry.path, left)
            except StartError:
                continue  # not a file, or not there, any more: the guest said so
            left -= len(data)
            found[os.fsdecode(entry.path)] = data
        return found

    def _list(self) -> list[messages.Entry]:
        entries: dict[bytes, messages.Entry] = {}

        def take(frame: frames.Frame) -> None:
            for entry in messages.parse_entries(frame.payload):
                # The names become keys of Result.files, and then perhaps paths of the caller's.
                if entry.path.startswith(b"/") or b".." in entry.path.split(b"/") or not entry.path:
                    raise ProtocolError("the guest lists a file outside its work directory")
                entries[entry.path] = entry
            if len(entries) > _MOST_ENTRIES:
                raise ProtocolError("the guest lists more files than it may")

        self._answer(frames.encode(Type.LIST, id=self._id()), Type.ENTRIES, take)
        return [entries[path] for path in sorted(entries)]

    def _read(self, path: bytes, limit_bytes: int) -> bytes:
        data = bytearray()

        def take(frame: frames.Frame) -> None:
            data.extend(frame.payload)
            if len(data) > limit_bytes:
                raise SpecError(f"collect: the files that match are more than {limit_bytes} bytes together")

        self._answer(messages.read(path, id=self._id()), Type.DATA, take)
        return bytes(data)

    def _answer(self, request: bytes, kind: int, take: Callable[[frames.Frame], None]) -> None:
        """Hands on the frames of an answer up to its DONE. The guest is hostile: what it sends must get on."""
        self._vmm.channel.send(request)
        empty = 0
        while True:
            for frame in self._frames(
                self._collect_until - time.monotonic_ns(), "the guest did not hand over its files"
            ):
                if frame.type == Type.DONE and self._untaken > 0:
                    self._untaken -= 1  # the end of a file that was put in before
                    continue
                if frame.type == Type.DONE:
                    return
                if frame.type != kind:
                    raise ProtocolError(f"the guest answered with a frame of type {frame.type}")
                empty += not frame.payload
                if empty > 1:
                    raise ProtocolError("the guest sends frames with nothing in them")
                take(frame)

    # ---- telling ----

    def disk_full(self) -> bool:
        return self._spec.limits.disk_bytes is not None and self._layer.full()

    def changes(self) -> tuple[Change, ...] | None:
        return self._layer.changes() if self._spec.overlay else None

    def usage(self, outcome: Outcome) -> Measured:
        return of_guest(outcome.exited, self._before)

    def applied(self, outcome: Outcome) -> list[Applied]:
        spec, limits, started = self._spec, self._spec.limits, outcome.started
        machine = self._machine
        found = [
            Applied(rule="accelerator", requested=None, effective=self.accelerator, mechanism=self._why_accelerator),
            Applied(
                rule="machine",
                requested=None,
                effective=f"{machine.cpus} CPU, {machine.memory_bytes} bytes",
                mechanism="QEMU microvm",
            ),
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
            Applied(rule="kernel", requested=None, effective=started.kernel, mechanism="its own, read back by uname"),
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
            Applied(
                rule="network",
                requested=spec.network.mode if "network" in spec.asked else None,
                effective="none",
                mechanism="no network card",
            ),
            Applied(
                rule="files",
                requested=spec.image if "image" in spec.asked else None,
                effective=f"{spec.image}, {'below an overlay' if spec.overlay else 'read-only'};"
                " its own /tmp, /dev and /proc; /run and /home empty",
                mechanism="9p, read-only" if spec.image == "host" else "erofs disk",
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

    def close(self) -> None:
        self._vmm.close()


def _overlay_ability() -> Ability:
    from ringfence.levels.vm import kernel

    found = kernel.find()
    if found is None or "overlay" in found.sets:
        return Ability(rule="overlay", mechanism="overlayfs in the guest")
    return Ability(rule="overlay", reason="the guest's kernel has no overlayfs", help="use isolation='container'")


def _share(tag: bytes, target: bytes, *, writable: bool) -> MountStep:
    # cache=loose keeps what was read; nobody but us changes a read-only share's files while the guest is there.
    options = b"trans=virtio,version=9p2000.L,msize=512000,cache=" + (b"mmap" if writable else b"loose")
    flags = NOSUID | NODEV | (0 if writable else RDONLY)
    return messages.filesystem(target, b"9p", source=tag, data=options, flags=flags)


def _mount_steps(tag: bytes, source: bytes, target: bytes, *, writable: bool) -> list[MountStep]:
    """A share shows a folder; a single file is in a folder of its own there, and bound to its place."""
    steps = directories_above(target)
    if os.path.isdir(source):
        return [*steps, messages.directory(target), _share(tag, target, writable=writable)]
    hidden = b"/." + tag
    flags = NOSUID | NODEV | INSIDE | (0 if writable else RDONLY)
    return [
        *steps,
        messages.file(target),
        messages.directory(hidden),
        _share(tag, hidden, writable=writable),
        messages.bind(target, hidden + b"/file", flags),
        messages.mask(hidden),
    ]
