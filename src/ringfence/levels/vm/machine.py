"""QEMU's command line for a guest: the machine (microvm or q35), one virtio-serial port, shares and disks."""

from __future__ import annotations

import os

from ringfence.errors import SpecError
from ringfence.levels.vm import card
from ringfence.linux.tsc import host_tsc_khz

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

__all__ = [
    "CHANNEL_PORT",
    "MAX_DEVICES",
    "MIN_MEMORY_BYTES",
    "arguments",
    "host_tsc_khz",
    "kernel_command_line",
]

# The port's name, which the guest finds as /sys/class/virtio-ports/*/name. It is /dev/vport*p1.
CHANNEL_PORT = "ringfence"

# Debian's kernel doesn't come up in 64 MiB; in 96 it does, with little left.
MIN_MEMORY_BYTES = 96 << 20

# What has room on microvm's bus: 8 transports without a second I/O APIC, one of which is the channel's.
MAX_DEVICES = 7

_QEMU = "qemu-system-x86_64"

# Machine -> its properties, how its virtio devices end in QEMU's names, the module set that finds them.
# microvm: virtio-mmio, found by ACPI (acpi=on), as Debian's kernel finds it by nothing else. rtc: the guest's wall
# clock. Without PIT, PIC and what else a PC has there is less to emulate and to attack.
_BOARDS = {
    "microvm": ("acpi=on,rtc=on,pit=off,pic=off", "device", ()),
    "q35": ("smbus=off,sata=off,usb=off,vmport=off,hpet=off", "pci", ("pci",)),
}

# The JIT's cache of translated code. QEMU would take a gigabyte or a quarter of the guest's memory and never
# give it back; a boot and a Python start fill some 40 MB.
_TB_SIZE_MB = 64


def arguments(
    *,
    kernel: Path | None,
    initramfs: Path | None,
    memory_bytes: int,
    cpus: int,
    accel: str,
    channel_fd: int,
    shares: Sequence[tuple[str, Path, bool]] = (),
    disks: Sequence[Path] = (),
    disk_format: str = "raw",
    sets: Sequence[str] = (),
    card_fd: int | None = None,
    console_fd: int | None = None,
    append: str = "",
    board: str = "microvm",
    qemu: Path = _QEMU,
    memory: tuple[str, bool] | None = None,
    qmp_fd: int | None = None,
    tsc_khz: int | None = None,
) -> list[bytes]:
    """QEMU's argv.

    kernel: an uncompressed vmlinux; None, and initramfs too, for a guest whose state comes by QMP.
    memory_bytes: the guest's whole memory, rounded up to a MiB. cpus: 1 and more. accel: "kvm" or "tcg".
    channel_fd: a connected stream socket that QEMU inherits: the other end of the port.
    shares: (tag, folder, writable) of 9p shares. disks: /dev/vda, vdb, ... in this
    order, read-only; all of disk_format, "raw" or "qcow2". sets: module sets to load besides those that the
    devices need. card_fd: the tap of a network card, which QEMU inherits; None: there is no card. console_fd: a
    writable file descriptor that QEMU inherits and that gets the guest's console, to debug a boot (a pipe has to be
    read, or the guest stops); None: there is no console. append: more of the kernel's command line.
    memory: (file, whether what the guest writes gets there) in which the guest's memory is. qmp_fd: a connected socket
    for QMP. tsc_khz: None is as measured, 0 leaves it out.
    board: "microvm" or "q35".

    Raises SpecError where it makes no sense.
    """
    if accel not in ("kvm", "tcg"):
        raise SpecError(f"accel must be kvm or tcg, not {accel!r}")
    if memory_bytes < MIN_MEMORY_BYTES:
        raise SpecError(f"a guest needs at least {MIN_MEMORY_BYTES >> 20} MiB of memory, not {memory_bytes} bytes")
    if cpus < 1:
        raise SpecError(f"a guest needs at least one CPU, not {cpus}")
    devices = len(shares) + len(disks) + (card_fd is not None)
    if devices > MAX_DEVICES:
        raise SpecError(f"a guest takes at most {MAX_DEVICES} shares, disks and cards, not {devices}")
    needed = (("9p", bool(shares)), ("erofs", bool(disks)), ("net", card_fd is not None))
    properties, bus, its_sets = _BOARDS[board]
    if board == "microvm":
        properties += f",isa-serial={'on' if console_fd is not None else 'off'}"
    command_line = kernel_command_line(
        cpus=cpus,
        accel=accel,
        sets=("boot", *(name for name, wanted in needed if wanted), *its_sets, *sets),
        console=console_fd is not None,
        append=append,
        tsc_khz=tsc_khz,
    )
    megabytes = (memory_bytes + (1 << 20) - 1) >> 20
    argv: list[str | bytes] = [
        os.fspath(qemu),
        *("-machine", f"{board},{properties}" + (",memory-backend=memory" if memory is not None else "")),
        *("-accel", f"tcg,thread=multi,tb-size={_TB_SIZE_MB}" if accel == "tcg" else "kvm"),
        *("-cpu", "max", "-smp", str(cpus), "-m", f"{megabytes}M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-bios", "qboot.rom"),
        *_started_by(kernel, initramfs, command_line),
        *_memory(memory, megabytes),
        *(("-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control") if qmp_fd is not None else ()),
        *("-chardev", f"socket,id=channel,fd={channel_fd}"),
        *("-device", f"virtio-serial-{bus},max_ports=2"),
        *("-device", f"virtserialport,chardev=channel,name={CHANNEL_PORT}"),
    ]
    if card_fd is not None:
        argv += card.arguments(card_fd, bus)
    if console_fd is not None:
        # append: without it QEMU truncates, which a pipe refuses.
        argv += ["-add-fd", f"fd={console_fd},set=1", "-chardev", "file,id=console,path=/dev/fdset/1,append=on"]
        argv += ["-serial", "chardev:console"]
    for number, (tag, folder, writable) in enumerate(shares):
        argv += [
            "-fsdev",
            # security_model none: QEMU isn't root, so it can't give files other owners, and says so to
            # nobody. multidevs: a share of / spans file systems, whose inode numbers would collide.
            _options(
                f"local,id=share{number},path=",
                folder,
                ",security_model=none,multidevs=remap" + ("" if writable else ",readonly=on"),
            ),
            "-device",
            f"virtio-9p-{bus},fsdev=share{number},mount_tag={tag}",
        ]
    for number, image in enumerate(disks):
        argv += [
            "-blockdev",
            # locking: many guests share one image, which nobody writes.
            _options(f"driver=file,node-name=file{number},filename=", image, ",read-only=on,locking=off"),
            "-blockdev",
            _format(disk_format, number),
            "-device",
            f"virtio-blk-{bus},drive=disk{number}",
        ]
    return [os.fsencode(one) for one in argv]


def _started_by(kernel: Path | None, initramfs: Path | None, command_line: str) -> list[str | bytes]:
    if kernel is None or initramfs is None:
        return ["-incoming", "defer"]
    return ["-kernel", os.fspath(kernel), "-initrd", os.fspath(initramfs), "-append", command_line]


def _memory(memory: tuple[str, bool] | None, megabytes: int) -> list[str]:
    if memory is None:
        return []
    path, shared = memory
    return [
        "-object",
        f"memory-backend-file,id=memory,size={megabytes}M,mem-path={path},share={'on' if shared else 'off'}",
    ]


def _format(format: str, number: int) -> str:
    """Never probed, as what a guest once wrote to a raw disk could look like another format; and of a qcow2 no other
    file, whatever its header says.
    """
    if format == "raw":
        return f"driver=raw,node-name=disk{number},file=file{number},read-only=on"
    # Only JSON can say null.
    node = f'"node-name":"disk{number}","file":"file{number}"'
    return f'{{"driver":"qcow2",{node},"read-only":true,"backing":null}}'


def kernel_command_line(
    *,
    cpus: int,
    accel: str,
    sets: Sequence[str],
    console: bool = False,
    append: str = "",
    tsc_khz: int | None = None,
) -> str:
    """The guest kernel's command line; init takes `rf.sets=` from it."""
    words = [
        "console=ttyS0" if console else "quiet",
        # End QEMU at a panic or a reboot: it runs with -no-reboot, and reboot=t is a triple fault.
        "reboot=t",
        "panic=-1",
        # Self-tests, auditing and security modules that nothing here uses cost start-up time.
        "cryptomgr.notests=1",
        "audit=0",
        "lsm=landlock",
        "rcupdate.rcu_expedited=1",
    ]
    if cpus == 1:
        words.append("noreplace-smp")
    if accel == "tcg":
        # Detours around the speculation of a real CPU: an emulated one has none, and they cost most there.
        words.append("mitigations=off")
    if accel == "tcg" and (khz := host_tsc_khz() if tsc_khz is None else tsc_khz):
        # Without these a guest calibrates its TSC against an emulated timer, which hung 5 of 8 boots.
        words += [f"tsc_early_khz={khz}", "tsc=reliable"]
    words.append(f"rf.sets={','.join(dict.fromkeys(sets))}")
    return " ".join(words + ([append] if append else []))


def _options(before: str, path: Path, after: str) -> bytes:
    """A path within QEMU's comma-separated options, where a comma is written twice."""
    return before.encode() + os.fsencode(path).replace(b",", b",,") + after.encode()
