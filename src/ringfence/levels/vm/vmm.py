"""The seam to a virtual machine monitor: a machine as values, a running VMM as an object. QEMU is behind it (qemu.py).

docs/design/vmm.md says what another one would have to do.

A VMM is the workload of a container sandbox of its own, which is its jail: what is written down here is what it sees of
the host, and nothing else.
"""

from __future__ import annotations

import _socket as socket
import abc
import os
import select

from ringfence._value import Value
from ringfence.errors import ProtocolError, RingfenceError, Unavailable, printable
from ringfence.levels.container import ContainerSandbox
from ringfence.levels.drive import SandboxEnded
from ringfence.levels.namespaces import own_namespaces
from ringfence.levels.vm.qmp import Qmp
from ringfence.result import Applied
from ringfence.wire import messages
from ringfence.wire.channel import Channel
from ringfence.wire.frames import Type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.levels.vm.card import Card
    from ringfence.linux.cgroups import Cgroup

__all__ = ["JailedVmm", "Machine", "Share", "Vmm"]

_WORDS_BYTES = 4096
# From the end of the guest's channel to the report of how the VMM ended.
_REPORT_MS = 2000


class Share(Value):
    """A folder (or single file) that the guest finds in what it mounts by `tag`, at `name`; "" is the whole of it.

    A tag is one device of the machine, whatever number of shares it has. source: a host path, or None for the host's
    userland as a container sees it. writable: the same for all shares of a tag. owned: of the host's userland, whether
    root's files are root's there; else they are nobody's. secret: whether it may be a place of the host's secrets.
    """

    __slots__ = ("name", "owned", "secret", "source", "tag", "writable")
    tag: str
    name: str
    source: bytes | None
    writable: bool
    owned: bool
    secret: bool

    def __init__(
        self,
        *,
        tag: str,
        name: str = "",
        source: bytes | None,
        writable: bool,
        owned: bool = False,
        secret: bool = False,
    ) -> None:
        self._set(tag=tag, name=name, source=source, writable=writable, owned=owned, secret=secret)

    @property
    def path(self) -> str:
        """Where it is, in a folder that holds all tags."""
        return f"{self.tag}/{self.name}" if self.name else self.tag


class Machine(Value):
    """A virtual machine, as any VMM takes it.

    kernel, initramfs, disks: host paths. memory_bytes: the guest's whole memory. accelerator: "kvm" or "tcg".
    disk_format: of all disks, "raw" or "qcow2". disk_identity: (st_dev, st_ino) of a disk that the user gave.
    user: (uid, gid) of the VMM in its jail, which own the shared files there. cpu_weight, cpuset: of the host's CPUs,
    for the VMM as a whole, or None. card: its network card, or None.
    append: more of the kernel's command line.
    board: which machine of the VMM's, in its own words. program: the VMM's.
    """

    __slots__ = (
        "accelerator",
        "append",
        "board",
        "card",
        "cpu_weight",
        "cpus",
        "cpuset",
        "disk_format",
        "disk_identity",
        "disks",
        "initramfs",
        "kernel",
        "memory_bytes",
        "program",
        "sets",
        "shares",
        "user",
    )
    kernel: str
    initramfs: str
    memory_bytes: int
    cpus: int
    accelerator: str
    shares: tuple[Share, ...]
    disks: tuple[str, ...]
    disk_format: str
    disk_identity: tuple[int, int] | None
    user: tuple[int, int]
    cpu_weight: int | None
    cpuset: tuple[int, ...] | None
    sets: tuple[str, ...]
    card: Card | None
    append: str
    board: str
    program: str

    def __init__(
        self,
        *,
        kernel: str,
        initramfs: str,
        memory_bytes: int,
        cpus: int,
        accelerator: str,
        shares: tuple[Share, ...],
        disks: tuple[str, ...],
        user: tuple[int, int],
        disk_format: str = "raw",
        disk_identity: tuple[int, int] | None = None,
        cpu_weight: int | None = None,
        cpuset: tuple[int, ...] | None = None,
        sets: tuple[str, ...] = (),
        card: Card | None = None,
        append: str = "",
        board: str = "microvm",
        program: str = "/usr/bin/qemu-system-x86_64",
    ) -> None:
        self._set(
            kernel=kernel,
            initramfs=initramfs,
            memory_bytes=memory_bytes,
            cpus=cpus,
            accelerator=accelerator,
            shares=shares,
            disks=disks,
            disk_format=disk_format,
            disk_identity=disk_identity,
            user=user,
            cpu_weight=cpu_weight,
            cpuset=cpuset,
            sets=sets,
            card=card,
            append=append,
            board=board,
            program=program,
        )


class Vmm(abc.ABC):
    """A running VMM. `channel`: frames to and from the guest's init. `control`: to the VMM itself, or None."""

    channel: Channel
    control: Qmp | None

    @abc.abstractmethod
    def watch(self) -> dict[int, Callable[[], None]]:
        """The descriptors to wait for beside the channel's, and what takes each; always the same dict, which changes.

        What takes one raises SandboxEnded where the VMM has ended, Unavailable where that was before a guest was there.
        """

    @abc.abstractmethod
    def last_words(self) -> str:
        """What it wrote to stderr, for an error's text; "" for nothing."""

    @abc.abstractmethod
    def ended(self, when: str) -> RingfenceError:
        """Once the guest's channel is at its end: how the VMM ended. Unavailable where that is why no guest came up."""

    @abc.abstractmethod
    def applied(self) -> list[Applied]:
        """How it is jailed."""

    @property
    @abc.abstractmethod
    def jail(self) -> ContainerSandbox:
        """What it lives in."""

    @property
    @abc.abstractmethod
    def cgroup(self) -> Cgroup | None:
        """Of the VMM and all its threads, on the host."""

    @abc.abstractmethod
    def out_of_memory(self) -> bool:
        """Whether the host's kernel killed it at the limit of that cgroup."""

    @abc.abstractmethod
    def booted(self) -> None:
        """The guest has said its first word."""

    @abc.abstractmethod
    def kill(self) -> None:
        """Ends it at once. `watch` tells when it is over."""

    @abc.abstractmethod
    def forget(self) -> None:
        """In a forked child: closes what it holds, and ends nothing."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends it, and waits for that; may be called twice."""


class JailedVmm(Vmm):
    """A VMM that runs in a jail of the container level. errors: what it writes to stderr can be read there."""

    def __init__(
        self, channel: Channel, jail: ContainerSandbox, errors: int, control: socket.socket | None = None
    ) -> None:
        self.channel = channel
        self.control = Qmp(control, self.watch) if control is not None else None
        self._jail = jail
        self._errors = errors
        self._words = b""
        self._how = ""
        self._booted = False
        self._watched: dict[int, Callable[[], None]] = {errors: self._take_words}
        if jail.channel is not None:
            self._watched[jail.channel.fileno()] = self._take

    @property
    def jail(self) -> ContainerSandbox:
        return self._jail

    def watch(self) -> dict[int, Callable[[], None]]:
        return self._watched

    def booted(self) -> None:
        self._booted = True

    def _take(self) -> None:
        """What the jail's init tells: that QEMU runs, or that it is over."""
        channel = self._jail.channel
        if channel is None:
            return
        ended = False
        for frame in channel.receive():
            if frame.type == Type.ERROR:
                error = messages.parse_error(frame.payload)
                raise Unavailable("vm", f"QEMU could not be started: {error}", "see 'ringfence doctor'")
            if frame.type == Type.EXITED:
                ended = True
                exited = messages.parse_exited(frame.payload)
                code, signal = exited.exit_code, exited.signal
                self._how = f"exited with status {code}" if code is not None else f"was ended by signal {signal}"
            elif frame.type == Type.STARTED:
                self._jail.vmm_started = messages.parse_started(frame.payload)
            else:
                self._jail.take(frame)
        if not ended and not channel.at_end:
            return
        self._watched.pop(channel.fileno(), None)
        self._how = self._how or "ended"
        found = self._ending("")
        raise SandboxEnded(str(found)) if isinstance(found, ProtocolError) else found

    def _ending(self, when: str) -> RingfenceError:
        how = f"QEMU {self._how or 'runs on'}{self.last_words()}"
        if self._how == "exited with status 0":
            how += ", as it does when its guest powers off, reboots or panics"
        if not self._booted and self._how.rpartition(" ")[2].isdigit() and self._how != "exited with status 0":
            return Unavailable("vm", f"{how} (before the guest was there)", "see 'ringfence doctor'")
        return ProtocolError(f"the virtual machine ended {when}: {how}" if when else how)

    def ended(self, when: str) -> RingfenceError:
        channel = self._jail.channel
        if not self._how and channel is not None:
            poll = select.poll()
            poll.register(channel.fileno(), select.POLLIN)
            try:
                while poll.poll(_REPORT_MS):  # its end is an exception
                    self._take()
            except SandboxEnded:
                pass  # as expected
        return self._ending(when)

    def _take_words(self) -> None:
        """Its stderr is drained while it runs: a guest that makes it complain must not make it stand still."""
        try:
            more = os.read(self._errors, 16 * _WORDS_BYTES)
        except BlockingIOError:
            return
        if not more:
            self._watched.pop(self._errors, None)
        self._words = (self._words + more)[-_WORDS_BYTES:]

    def last_words(self) -> str:
        if self._errors in self._watched:
            self._take_words()
        # It may repeat what a guest has told it.
        words = " ".join(printable(self._words.decode("utf-8", "replace"), " ").split())
        return f": {words}" if words else ""

    def applied(self) -> list[Applied]:
        started = self._jail.vmm_started
        if started is None:
            return []
        own = [name for name, inode in started.namespaces.items() if own_namespaces().get(name) != inode]
        held = [value for value in started.capabilities if value & ((1 << 41) - 1)]
        limits = {one.rule: one.effective for one in (self._jail.cgroup.in_force if self._jail.cgroup else ())}
        jail = f"namespaces {', '.join(own)}; capabilities {held or 'none'}; seccomp mode {started.seccomp}"
        if limits:
            jail += "; " + ", ".join(f"{rule} {value}" for rule, value in limits.items())
        return [Applied(rule="vmm jail", requested=None, effective=jail, mechanism="container level")]

    @property
    def cgroup(self) -> Cgroup | None:
        return self._jail.cgroup

    def out_of_memory(self) -> bool:
        used = self._jail.cgroup.usage() if self._jail.cgroup is not None else None
        return used is not None and bool(used.oom_kills)

    def kill(self) -> None:
        self._jail.kill()

    def forget(self) -> None:
        """In a forked child: closes what it holds, and ends nothing."""
        self.channel.close()
        if self.control is not None:
            self.control.close()
        self._jail.forget()
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1

    def close(self) -> None:
        self.channel.close()
        if self.control is not None:
            self.control.close()
        self._watched.clear()
        self._jail.close()
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1
