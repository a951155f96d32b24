"""QEMU behind the seam: started in a jail of the container level, which is all that it sees of the host."""

from __future__ import annotations

import os
import socket

from ringfence.levels.container import ContainerSandbox
from ringfence.levels.vm import machine
from ringfence.levels.vm.vmm import Machine, Vmm
from ringfence.spec import Limits, Spec
from ringfence.wire import messages
from ringfence.wire.channel import Channel
from ringfence.wire.messages import NODEV, NOEXEC, NOSUID, RDONLY, MountStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.levels.host import Host
    from ringfence.levels.state import State

__all__ = ["MEMORY_OVERHEAD_BYTES", "start_qemu"]

# What QEMU takes beside the guest's memory: its own, the cache of translated code, buffers of 9p.
MEMORY_OVERHEAD_BYTES = 256 << 20
_OWN_CPUS = 0.5
_OWN_THREADS = 128
_QEMU = b"/usr/bin/qemu-system-x86_64"
_KVM = b"/dev/kvm"


def _jail_steps(spec: Machine, jail: ContainerSandbox) -> list[MountStep]:
    """What QEMU sees beside its programs: the guest's kernel, disks and shares, and /dev/kvm where it is used."""
    flags = RDONLY | NOSUID | NODEV | NOEXEC
    steps = jail.host_mount(os.fsencode(spec.kernel), b"/vm/kernel", flags)
    steps += jail.host_mount(os.fsencode(spec.initramfs), b"/vm/initramfs", flags)
    for number, disk in enumerate(spec.disks):
        steps += jail.host_mount(os.fsencode(disk), b"/vm/disk%d" % number, flags)
    for share in spec.shares:
        at = b"/vm/" + share.path.encode()
        if share.source is None:
            steps += [messages.directory(at), *jail.userland(at)]
            continue
        kept = NOSUID | NODEV | NOEXEC | (0 if share.writable else RDONLY)
        steps += jail.host_mount(share.source, at, kept, must=share.writable)
    if spec.accelerator == "kvm":
        steps += [messages.file(_KVM, mode=0o666), messages.bind(_KVM, jail.device(_KVM), NOSUID | NOEXEC)]
    return steps


def start_qemu(spec: Machine, host: Host, state: State, *, stays: bool = False) -> Vmm:
    """Starts QEMU in its jail. stays: as for `Level.open`. Raises Unavailable, StartError; leaves nothing then."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    jail: ContainerSandbox | None = None
    channel = Channel(ours, trusted=False)
    errors, errors_of_qemu = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.set_blocking(errors_of_qemu, True)
        usable = {name: host.cgroups.controller(name).usable for name in ("memory", "cpu", "pids")}
        limits = Limits(
            memory=spec.memory_bytes + MEMORY_OVERHEAD_BYTES if usable["memory"] else None,
            # A vCPU each, and a share of one for QEMU's own threads. Its pool of those that wait for files is 64.
            cpus=spec.cpus + _OWN_CPUS if usable["cpu"] else None,
            pids=spec.cpus + _OWN_THREADS if usable["pids"] else None,
            cpu_weight=spec.cpu_weight,
            cpuset=spec.cpuset,
        )
        what = Spec.make(
            [_QEMU], isolation="container", user=f"{spec.user[0]}:{spec.user[1]}", hostname="vmm", limits=limits
        )
        # /dev/kvm belongs to a group, and the jail's ids are nobody's: QEMU gets that group and no other.
        group = os.stat(_KVM).st_gid if spec.accelerator == "kvm" else None
        jail = ContainerSandbox(
            what, host, state, extra=lambda one: _jail_steps(spec, one), extra_gid=group, stays=stays
        )
        argv = machine.arguments(
            kernel=b"/vm/kernel",
            initramfs=b"/vm/initramfs",
            memory_bytes=spec.memory_bytes,
            cpus=spec.cpus,
            accel=spec.accelerator,
            channel_fd=3,
            shares=[
                (tag, b"/vm/" + tag.encode(), writable)
                for tag, writable in {share.tag: share.writable for share in spec.shares}.items()
            ],
            disks=[b"/vm/disk%d" % number for number in range(len(spec.disks))],
            sets=spec.sets,
            qemu=_QEMU,
        )
        request = messages.execute(argv, what.environment(b"/work"), b"/work", id=1, once=True, streams=False, nfds=4)
        assert jail.channel is not None
        jail.channel.send(request, [state.null, errors_of_qemu, errors_of_qemu, theirs.fileno()])
        return Vmm(channel, jail, errors)
    except BaseException:
        channel.close()
        os.close(errors)
        if jail is not None:
            jail.close()
        raise
    finally:
        theirs.close()
        os.close(errors_of_qemu)
