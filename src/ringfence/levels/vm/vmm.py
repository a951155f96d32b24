"""The seam to a virtual machine monitor: a machine as values, a running VMM as an object. QEMU is behind it (qemu.py).

A VMM is the workload of a container sandbox of its own, which is its jail: what is written down here is what it sees of
the host, and nothing else.
"""

from __future__ import annotations

import _socket as socket
import os

from ringfence._value import Value
from ringfence.errors import ProtocolError, Unavailable
from ringfence.levels.container import ContainerSandbox
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

__all__ = ["Machine", "Share", "Vmm"]

_WORDS_BYTES = 4096


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
    disk_format: of all disks, "raw" or "qcow2".
    user: (uid, gid) of the VMM in its jail, which own the shared files there. cpu_weight, cpuset: of the host's CPUs,
    for the VMM as a whole, or None. card: its network card, or None.
    """

    __slots__ = (
        "accelerator",
        "card",
        "cpu_weight",
        "cpus",
        "cpuset",
        "disk_format",
        "disks",
        "initramfs",
        "kernel",
        "memory_bytes",
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
    user: tuple[int, int]
    cpu_weight: int | None
    cpuset: tuple[int, ...] | None
    sets: tuple[str, ...]
    card: Card | None

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
        cpu_weight: int | None = None,
        cpuset: tuple[int, ...] | None = None,
        sets: tuple[str, ...] = (),
        card: Card | None = None,
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
            user=user,
            cpu_weight=cpu_weight,
            cpuset=cpuset,
            sets=sets,
            card=card,
        )


class Vmm:
    """A running VMM. `channel`: frames to and from the guest's init. `control`: to the VMM itself, or None."""

    def __init__(
        self, channel: Channel, jail: ContainerSandbox, errors: int, control: socket.socket | None = None
    ) -> None:
        self.channel = channel
        self.control = Qmp(control, self.watch) if control is not None else None
        self._jail = jail
        self._errors = errors
        self._words = b""
        self._ended = False

    @property
    def jail(self) -> ContainerSandbox:
        return self._jail

    def watch(self) -> dict[int, Callable[[], None]]:
        """The descriptors to wait for beside the channel's, and what takes each."""
        found: dict[int, Callable[[], None]] = {}
        if not self._ended and self._jail.channel is not None:
            found[self._jail.channel.fileno()] = self._take
        return found

    def _take(self) -> None:
        """What the jail's init tells: that QEMU runs, or that it is over."""
        channel = self._jail.channel
        if channel is None:
            return
        for frame in channel.receive():
            if frame.type == Type.ERROR:
                error = messages.parse_error(frame.payload)
                raise Unavailable("vm", f"QEMU could not be started: {error}", "see 'ringfence doctor'")
            if frame.type == Type.EXITED:
                self._ended = True
            elif frame.type == Type.STARTED:
                self._jail.vmm_started = messages.parse_started(frame.payload)
            else:
                self._jail.take(frame)
        if channel.at_end:
            self._ended = True
        if self._ended:
            raise ProtocolError(f"QEMU ended{self.last_words()}")

    def last_words(self) -> str:
        """What QEMU wrote to stderr, for an error's text; "" for nothing."""
        try:
            while len(self._words) < _WORDS_BYTES and (more := os.read(self._errors, _WORDS_BYTES)):
                self._words += more
        except BlockingIOError:
            pass  # that was all
        words = self._words.decode("utf-8", "replace").strip()
        return f": {words}" if words else ""

    def applied(self) -> list[Applied]:
        """How it is jailed."""
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
        """Of the VMM and all its threads, on the host."""
        return self._jail.cgroup

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
        self._jail.close()
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1
