"""QEMU behind the seam: started in a jail of the container level, which is all that it sees of the host."""

from __future__ import annotations

import _socket as socket
import os

from ringfence._value import Value
from ringfence.levels.container import ContainerSandbox
from ringfence.levels.shown import device, host_mount, userland
from ringfence.levels.vm import machine
from ringfence.levels.vm.userland import owned_userland
from ringfence.levels.vm.vmm import JailedVmm, Machine, Vmm
from ringfence.spec import Limits, Spec
from ringfence.wire import messages
from ringfence.wire.channel import Channel
from ringfence.wire.messages import NODEV, NOEXEC, NOSUID, RDONLY, MountStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ringfence.levels.host import Host
    from ringfence.levels.state import State
    from ringfence.spec import Network

__all__ = [
    "MEMORY_OVERHEAD_BYTES",
    "STATE_FD",
    "Memory",
    "command_line",
    "jail_limits",
    "jail_spec",
    "kvm_group",
    "program_steps",
    "shown_program",
    "start_qemu",
]

# What QEMU takes beside the guest's memory: its own, the cache of translated code, buffers of 9p.
MEMORY_OVERHEAD_BYTES = 256 << 20
_OWN_CPUS = 0.5
_OWN_THREADS = 128
# Where a QEMU is shown that isn't in what the jail shows of the host anyway.
_OWN_QEMU = b"/vm/qemu"
_KVM = b"/dev/kvm"
# As QEMU numbers what it gets.
_CHANNEL_FD, _QMP_FD, _MEMORY_FD, STATE_FD = 3, 4, 5, 6


def shown_program(path: str) -> tuple[bytes, bool]:
    """The path in a jail of that program of the host's, and whether it has to be mounted there."""
    from ringfence.images import tree

    name = os.fsencode(path)
    shown = any(name.startswith(b"/" + entry.name + b"/") for entry in tree.host_entries() if entry.kind == "directory")
    return (name, False) if shown else (_OWN_QEMU, True)


def jail_limits(host: Host, memory_bytes: int, cpus: int, **more: Any) -> Limits:
    """What a VMM may take of the host, as far as that has cgroups for it. memory_bytes: QEMU's own among them."""
    usable = {name: host.cgroups.controller(name).usable for name in ("memory", "cpu", "pids")}
    return Limits(
        memory=memory_bytes if usable["memory"] else None,
        # A vCPU each, and a share of one for QEMU's own threads. Its pool of those that wait for files is 64.
        cpus=cpus + _OWN_CPUS if usable["cpu"] else None,
        pids=cpus + _OWN_THREADS if usable["pids"] else None,
        **more,
    )


def kvm_group(accelerator: str) -> int | None:
    """/dev/kvm belongs to a group, and a jail's ids are nobody's: QEMU gets that group and no other."""
    return os.stat(_KVM).st_gid if accelerator == "kvm" else None


def program_steps(jail: ContainerSandbox, program: str, accelerator: str) -> list[MountStep]:
    """QEMU itself where the jail doesn't show it anyway, and /dev/kvm where that is used."""
    steps: list[MountStep] = []
    at, own = shown_program(program)
    if own:
        steps += host_mount(jail, os.fsencode(os.path.realpath(program)), at, RDONLY | NOSUID | NODEV)
    if accelerator == "kvm":
        steps += [messages.file(_KVM, mode=0o666), messages.bind(_KVM, device(jail, _KVM), NOSUID | NOEXEC)]
    return steps


class Memory(Value):
    """Where the memory of a guest is that is saved or restored, as descriptors. memory: a file of its size. state: what
    else there is of a guest that is restored; None for one that is to be saved.
    """

    __slots__ = ("memory", "state")
    memory: int
    state: int | None

    def __init__(self, *, memory: int, state: int | None) -> None:
        self._set(memory=memory, state=state)


def _jail_steps(spec: Machine, jail: ContainerSandbox, memory: Memory | None) -> list[MountStep]:
    """What QEMU sees beside its programs: the guest's kernel, disks and shares, and /dev/kvm where it is used. A guest
    that is to be saved gets shares with nothing in them.
    """
    flags = RDONLY | NOSUID | NODEV | NOEXEC
    steps: list[MountStep] = [messages.directory(b"/vm")]
    saved = memory is not None and memory.state is None
    if memory is None or saved:
        steps += host_mount(jail, os.fsencode(spec.kernel), b"/vm/kernel", flags)
        steps += host_mount(jail, os.fsencode(spec.initramfs), b"/vm/initramfs", flags)
    for number, disk in enumerate(spec.disks):
        # A guest that is to be saved has a blank one of ours.
        identity = None if saved else spec.disk_identity
        steps += host_mount(jail, os.fsencode(disk), b"/vm/disk%d" % number, flags, expected=identity)
    for share in spec.shares:
        if saved:
            steps.append(messages.directory(b"/vm/" + share.tag.encode()))
            continue
        at = b"/vm/" + share.path.encode()
        if share.source is None:
            steps += [messages.directory(at), *(owned_userland(jail, at) if share.owned else userland(jail, at))]
            continue
        kept = NOSUID | NODEV | NOEXEC | (0 if share.writable else RDONLY)
        steps += host_mount(jail, share.source, at, kept, must=share.writable, secret=share.secret)
    return steps + program_steps(jail, spec.program, spec.accelerator)


def _taken_bytes(spec: Machine, memory: Memory | None) -> int:
    """What QEMU may take of the host. A guest that is restored takes a page of its template's, be it a hole in that,
    for each of its own that it is the first to touch: the kernel charges both to who did.
    """
    own = spec.memory_bytes * (2 if memory is not None and memory.state is not None else 1)
    return own + MEMORY_OVERHEAD_BYTES


def jail_spec(command: bytes, user: tuple[int, int], limits: Limits, network: Network | None = None) -> Spec:
    """The spec of a VMM's jail: of a container whose only difference from others is what it sees."""
    return Spec.make(
        [command],
        isolation="container",
        user=f"{user[0]}:{user[1]}",
        hostname="vmm",
        limits=limits,
        network=network,
    )


def start_qemu(
    spec: Machine,
    host: Host,
    state: State,
    *,
    stays: bool = False,
    memory: Memory | None = None,
    console: int | None = None,
) -> Vmm:
    """Starts QEMU in its jail. stays: as for `Level.open`. memory: of a guest that is to be saved, or that QEMU
    waits for until it is told by QMP. console: where a guest that boots writes its console, or None.
    Raises Unavailable, StartError; leaves nothing then.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    jail: ContainerSandbox | None = None
    channel = Channel(ours, trusted=False)
    control: tuple[socket.socket, socket.socket] | None = None
    errors, errors_of_qemu = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.set_blocking(errors_of_qemu, True)
        taken = _taken_bytes(spec, memory)
        limits = jail_limits(host, taken, spec.cpus, cpu_weight=spec.cpu_weight, cpuset=spec.cpuset)
        card = spec.card.network if spec.card is not None else None
        what = jail_spec(shown_program(spec.program)[0], spec.user, limits, card)
        jail = ContainerSandbox(
            what,
            host,
            state,
            extra=lambda one: _jail_steps(spec, one, memory),
            extra_gid=kvm_group(spec.accelerator),
            stays=stays,
            guest=spec.card is not None,
            writes=False,
        )
        fds = [state.null, errors_of_qemu, errors_of_qemu, theirs.fileno()]
        if memory is not None:
            control = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            fds += [control[1].fileno(), memory.memory, *([] if memory.state is None else [memory.state])]
        if jail.network is not None:
            fds.append(jail.network.tap)
        if console is not None:
            fds.append(console)
        request = messages.execute(
            command_line(spec, memory, console=console is not None),
            what.environment(b"/work"),
            b"/work",
            id=1,
            once=True,
            streams=False,
            nfds=len(fds),
        )
        assert jail.channel is not None
        jail.channel.send(request, fds)
        if jail.network is not None:
            jail.channel.flush_blocking()
            jail.network.tap_was_handed_on()
        return JailedVmm(channel, jail, errors, control[0] if control is not None else None)
    except BaseException:
        if control is not None:
            control[0].close()
        channel.close()
        os.close(errors)
        if jail is not None:
            jail.close()
        raise
    finally:
        theirs.close()
        if control is not None:
            control[1].close()
        os.close(errors_of_qemu)


def _card_fd(memory: Memory | None) -> int:
    """The card's is the last."""
    if memory is None:
        return _CHANNEL_FD + 1
    return (_MEMORY_FD if memory.state is None else STATE_FD) + 1


def command_line(
    spec: Machine, memory: Memory | None, *, console: bool = False, tsc_khz: int | None = None
) -> list[bytes]:
    """QEMU's argv, with the descriptors as `start_qemu` hands them over. tsc_khz: as for `machine.arguments`."""
    card = spec.card is not None
    boots = memory is None or memory.state is None
    return machine.arguments(
        kernel=b"/vm/kernel" if boots else None,
        initramfs=b"/vm/initramfs" if boots else None,
        memory_bytes=spec.memory_bytes,
        cpus=spec.cpus,
        accel=spec.accelerator,
        channel_fd=_CHANNEL_FD,
        shares=[
            (tag, b"/vm/" + tag.encode(), writable)
            for tag, writable in {share.tag: share.writable for share in spec.shares}.items()
        ],
        disks=[b"/vm/disk%d" % number for number in range(len(spec.disks))],
        disk_format=spec.disk_format,
        sets=spec.sets,
        card_fd=_card_fd(memory) if card else None,
        # The last of all.
        console_fd=_card_fd(memory) + card if console else None,
        append=spec.append,
        board=spec.board,
        qemu=shown_program(spec.program)[0],
        memory=None if memory is None else (f"/proc/self/fd/{_MEMORY_FD}", boots),
        qmp_fd=None if memory is None else _QMP_FD,
        tsc_khz=tsc_khz,
    )
