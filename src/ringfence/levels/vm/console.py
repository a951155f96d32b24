"""A whole operating system of the user's own, with its own kernel and its own init: nothing of ours runs in it.

It is started on QEMU's q35, a PC, in the jail that every guest's QEMU has: no network, no capabilities, and of the
host's files just those that were named, read-only. What it writes to its disk goes to a file of the jail's and is gone
with it. What there is of it for the caller is its first serial port.
"""

from __future__ import annotations

import _socket as socket
import os
import select
import stat
import time

from ringfence._value import Closing, Value
from ringfence.errors import ProtocolError, RingfenceError, SpecError, Unavailable
from ringfence.levels.container import ContainerSandbox
from ringfence.levels.drive import SandboxEnded
from ringfence.levels.host import host
from ringfence.levels.shown import host_mount
from ringfence.levels.state import state
from ringfence.levels.vm import VmLevel, emulator
from ringfence.levels.vm.qemu import (
    MEMORY_OVERHEAD_BYTES,
    jail_limits,
    kvm_group,
    program_steps,
    shown_program,
)
from ringfence.levels.vm.vmm import JailedVmm
from ringfence.spec import Spec, parse
from ringfence.wire import messages
from ringfence.wire.channel import Channel
from ringfence.wire.messages import NODEV, NOEXEC, NOSUID, RDONLY, MountStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.result import Applied

    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

__all__ = ["Console", "System"]

_QEMU_FD = 3
_MOST_BYTES = 16 << 20
_READ_BYTES = 64 << 10
_LEAST_BYTES, _MOST_CPUS = 16 << 20, 64
# QEMU keeps what is written by clusters of 64 KiB, with tables of its own.
_LEAST_WRITES, _MOST_WRITES = 1 << 20, 1 << 40


class System(Value):
    """What is started. kernel, initrd, disk: files of the host, or None; at least a kernel or a disk. append: the
    kernel's command line. disk_format: "raw" or "qcow2", or None without a disk. identities: (st_dev,
    st_ino) of each of these files when it was looked at. writes_bytes: how much of what it writes to its disk is kept.
    """

    __slots__ = (
        *("append", "cpus", "disk", "disk_format", "identities", "initrd", "kernel", "memory_bytes", "writes_bytes"),
    )
    kernel: bytes | None
    initrd: bytes | None
    disk: bytes | None
    disk_format: str | None
    identities: tuple[tuple[int, int] | None, ...]
    append: str
    memory_bytes: int
    cpus: int
    writes_bytes: int

    def __init__(
        self,
        *,
        kernel: bytes | None = None,
        initrd: bytes | None = None,
        disk: bytes | None = None,
        append: str = "",
        memory_bytes: int = 512 << 20,
        cpus: int = 1,
        writes_bytes: int = 256 << 20,
    ) -> None:
        if kernel is None and disk is None:
            raise SpecError("an operating system needs a kernel or a disk to boot from")
        if kernel is None and (initrd is not None or append):
            raise SpecError("an initrd and a command line are a kernel's: name that too")
        if not append.isprintable() or len(append) > 2000:
            raise SpecError("a kernel's command line is one line of at most 2000 characters")
        if memory_bytes < _LEAST_BYTES:
            raise SpecError(f"an operating system needs at least {_LEAST_BYTES >> 20} MiB of memory")
        if not 1 <= cpus <= _MOST_CPUS:
            raise SpecError(f"a machine has 1 to {_MOST_CPUS} CPUs, not {cpus}")
        if not _LEAST_WRITES <= writes_bytes <= _MOST_WRITES:
            raise SpecError(f"writes must be {_LEAST_WRITES >> 20} MiB to {_MOST_WRITES >> 30} GiB")
        kernel, initrd, disk = (None if one is None else os.path.realpath(one) for one in (kernel, initrd, disk))
        identities: list[tuple[int, int] | None] = []
        for path, what in ((kernel, "kernel"), (initrd, "initrd")):
            identities.append(None if path is None else _identity(path, what))
        disk_format = None
        if disk is not None:
            from ringfence.images import disk as disks

            found = disks.inspect(os.fsdecode(disk))  # a SpecError where it is more than one file
            disk_format = found.format
            identities.append(found.identity)
        else:
            identities.append(None)
        self._set(
            kernel=kernel,
            initrd=initrd,
            disk=disk,
            disk_format=disk_format,
            identities=tuple(identities),
            append=append,
            memory_bytes=memory_bytes,
            cpus=cpus,
            writes_bytes=writes_bytes,
        )

    def _init_arguments(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self._fields if name not in ("disk_format", "identities")}


def _identity(path: bytes, what: str) -> tuple[int, int]:
    """(st_dev, st_ino) of a file, by which it is told from what is put into its place later. Raises SpecError."""
    try:
        about = os.lstat(path)
    except OSError as error:
        raise SpecError(f"{what}: {os.fsdecode(path)} is not a file ({error.strerror})") from None
    if not stat.S_ISREG(about.st_mode):
        raise SpecError(f"{what}: {os.fsdecode(path)} is not a file")
    return about.st_dev, about.st_ino


def arguments(system: System, accelerator: str, qemu: bytes) -> list[bytes]:
    """QEMU's. Its files are where `_jail_steps` shows them."""
    megabytes = (system.memory_bytes + (1 << 20) - 1) >> 20
    import json

    node: dict[str, object]
    argv: list[str | bytes] = [
        qemu,
        # SeaBIOS, which every disk for PCs boots by. A PC's timers stay: another system may know no other clock.
        # graphics=off: SeaBIOS shows on the serial port what a boot loader writes to the screen, and takes keys there.
        *("-machine", "q35,smbus=off,sata=off,usb=off,vmport=off,graphics=off"),
        *("-accel", "tcg,thread=multi,tb-size=64" if accelerator == "tcg" else "kvm"),
        *("-cpu", "max", "-smp", str(system.cpus), "-m", f"{megabytes}M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-chardev", f"socket,id=serial,fd={_QEMU_FD}", "-serial", "chardev:serial"),
    ]
    if system.kernel is not None:
        argv += ["-kernel", "/vm/kernel", "-append", system.append]
    if system.initrd is not None:
        argv += ["-initrd", "/vm/initrd"]
    if system.disk is not None:
        # snapshot: what is written goes to a file in $TMPDIR that has no name any more. Where that is full the system
        # is told so, as by a disk that is broken there; by default QEMU would stop it, and say so to nobody.
        # Only JSON can say that nothing is behind a qcow2, whatever its header says; its commas are written twice.
        node = {"driver": system.disk_format, "read-only": True}
        node["file"] = {"driver": "file", "filename": "/vm/disk", "read-only": True, "locking": "off"}
        if system.disk_format == "qcow2":
            node["backing"] = None
        argv += [
            "-drive",
            f"if=none,id=disk,snapshot=on,werror=report,rerror=report,file=json:{json.dumps(node).replace(',', ',,')}",
        ]
        argv += ["-device", "virtio-blk-pci,drive=disk"]
    return [os.fsencode(one) for one in argv]


def _jail_steps(system: System, jail: ContainerSandbox, accelerator: str, program: str) -> list[MountStep]:
    flags = RDONLY | NOSUID | NODEV | NOEXEC
    steps: list[MountStep] = [messages.directory(b"/vm")]
    shown = ((system.kernel, b"/vm/kernel"), (system.initrd, b"/vm/initrd"), (system.disk, b"/vm/disk"))
    for (path, at), identity in zip(shown, system.identities, strict=True):
        if path is not None:
            steps += host_mount(jail, path, at, flags, expected=identity)
    return steps + program_steps(jail, program, accelerator)


def _start(system: System) -> tuple[socket.socket, JailedVmm, str]:
    """The serial port, its QEMU, and the accelerator. Raises Unavailable."""
    from ringfence.linux import kvm

    machine = host()
    found = emulator.look()
    if "q35" not in found.machines:
        raise Unavailable("vm", f"{found.path} was built without the machine q35, which a whole system takes")
    missing = VmLevel().unavailable(machine, kernel_needed=False)
    if missing is not None:
        raise Unavailable("vm", *missing)
    accelerator = "kvm" if kvm.probe().usable else "tcg"
    what = Spec.make(
        [shown_program(found.path)[0]],
        isolation="container",
        user="1000:1000",
        hostname="vmm",
        env={"TMPDIR": "/work"},
        limits=jail_limits(
            machine,
            # What is written is memory, too.
            system.memory_bytes + MEMORY_OVERHEAD_BYTES + (system.writes_bytes if system.disk is not None else 0),
            system.cpus,
            disk=system.writes_bytes if system.disk is not None else None,
        ),
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    errors, errors_of_qemu = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    jail: ContainerSandbox | None = None
    try:
        os.set_blocking(errors_of_qemu, True)
        here = state()
        jail = ContainerSandbox(
            what,
            machine,
            here,
            extra=lambda one: _jail_steps(system, one, accelerator, found.path),
            extra_gid=kvm_group(accelerator),
            writes=system.disk is not None,
        )
        argv = arguments(system, accelerator, shown_program(found.path)[0])
        request = messages.execute(argv, what.environment(b"/work"), b"/work", id=1, once=True, streams=False, nfds=4)
        assert jail.channel is not None
        jail.channel.send(request, [here.null, errors_of_qemu, errors_of_qemu, theirs.fileno()])
        # Its channel carries no frames, but is closed as any is.
        return ours, JailedVmm(Channel(ours, trusted=False), jail, errors), accelerator
    except BaseException:
        ours.close()
        os.close(errors)
        if jail is not None:
            jail.close()
        raise
    finally:
        theirs.close()
        os.close(errors_of_qemu)


class Console(Closing):
    """A whole operating system in a virtual machine of its own, and its serial console.

        with rf.Console(kernel="vmlinuz", initrd="initrd.img", append="console=ttyS0") as console:
            console.expect(b"login: ", timeout=60)
            console.write(b"root\\n")

    kernel: an image that QEMU boots (a bzImage, an ELF with a PVH note), its initrd, and its command line `append`,
    which must name the serial port (Linux: console=ttyS0). disk: a raw or qcow2 image, /dev/vda in Linux; without a
    kernel it is booted from, by SeaBIOS. The image itself is never written to: what the system writes to it is kept in
    memory until the end, up to `writes`, beyond which the disk fails it. memory, writes: bytes, or "512M".

    There is no network, and nothing of `run` reaches it: no files, no limits of processes in it. What the machine takes
    of the host is bounded, and it ends with the console. Raises SpecError, Unavailable; KernelError, StartError.
    """

    def __init__(
        self,
        *,
        kernel: Path | None = None,
        initrd: Path | None = None,
        disk: Path | None = None,
        append: str = "",
        memory: str | int = "512M",
        cpus: int = 1,
        writes: str | int = "256M",
    ) -> None:
        paths = {"kernel": kernel, "initrd": initrd, "disk": disk}
        self.system = System(
            **{name: None if path is None else parse.host_path(path, name) for name, path in paths.items()},
            append=append,
            memory_bytes=parse.size(memory, "memory"),
            cpus=cpus,
            writes_bytes=parse.size(writes, "writes"),
        )
        self._unread = bytearray()
        self._heard = False
        self._ended: RingfenceError | None = None
        self._socket, self._vmm, self.accelerator = _start(self.system)
        self._open = True

    def fileno(self) -> int:
        """Of the serial port: readable when the system has printed something, or is over."""
        return self._socket.fileno()

    def read(self, timeout: float | None = None) -> bytes:
        """What it has printed since, waiting for that; b"" once it is over. timeout: seconds, or None for ever.

        Raises TimeoutError, and Unavailable where QEMU couldn't even start.
        """
        if self._unread:
            data, self._unread = bytes(self._unread), bytearray()
            return data
        return self._receive(None if timeout is None else time.monotonic() + timeout)

    def _receive(self, until: float | None) -> bytes:
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                data = None
            except ConnectionResetError:
                data = b""
            if data is not None:
                if not data:
                    self._took_end()
                self._heard = True
                return data
            self._poll(select.POLLIN, until)

    def _took_end(self) -> None:
        if self._ended is None:
            self._ended = self._vmm.ended("")
            if isinstance(self._ended, Unavailable) and not self._heard:
                raise self._ended

    def _poll(self, events: int, until: float | None) -> None:
        """Waits for the port. Raises TimeoutError."""
        poll = select.poll()
        poll.register(self._socket.fileno(), events)
        watch = self._vmm.watch()
        for fd in watch:
            poll.register(fd, select.POLLIN)
        left = None if until is None else max(0.0, until - time.monotonic())
        found = poll.poll(None if left is None else min(int(left * 1000) + 1, 2**31 - 1))
        for fd, _ in found:
            if fd in watch:
                try:
                    watch[fd]()
                except SandboxEnded as error:
                    self._ended = error  # what it printed until then is in the socket
        if not found or (until is not None and time.monotonic() > until + 1):
            raise TimeoutError("the console said nothing in time")

    def write(self, data: bytes, timeout: float = 30) -> None:
        """Types that. Raises ProtocolError where the system takes no input for so long, or is over."""
        until = time.monotonic() + timeout
        left = memoryview(data)
        while left:
            try:
                left = left[self._socket.send(left, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                try:
                    self._poll(select.POLLOUT, until)
                except TimeoutError:
                    raise ProtocolError("the system takes no input") from None
            except (BrokenPipeError, ConnectionResetError):
                raise self._vmm.ended("before it was written to") from None

    def expect(self, text: bytes, timeout: float) -> bytes:
        """All that it printed up to and with that text, as soon as that is there.

        Raises TimeoutError, and ProtocolError where it is over without, or prints more than 16 MiB; each with the end
        of what was printed instead.
        """
        until = time.monotonic() + timeout
        while (at := self._unread.find(text)) < 0:
            said = repr(bytes(self._unread[-200:]))
            try:
                more = self._receive(until) if time.monotonic() < until else None
            except TimeoutError:
                more = None
            if more is None:
                raise TimeoutError(f"the console didn't say {text!r} in {timeout:g} s, but {said}")
            if not more or len(self._unread) > _MOST_BYTES:
                raise ProtocolError(f"the console didn't say {text!r}, but {said}; {self._ended or 'and goes on'}")
            self._unread += more
        found = bytes(self._unread[: at + len(text)])
        del self._unread[: at + len(text)]
        return found

    def wait(self, timeout: float | None = None) -> bytes:
        """Waits until the machine is off, and gives what it still printed. Raises TimeoutError, and ProtocolError where
        QEMU didn't end by itself and well.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while data := self._receive(until):
            self._unread += data
            if len(self._unread) > _MOST_BYTES:
                raise ProtocolError("the console prints more than it may while its end is awaited")
        said, self._unread = bytes(self._unread), bytearray()
        if "exited with status 0" not in str(self._ended):
            raise self._ended or ProtocolError("the machine is over")
        return said

    @property
    def applied(self) -> tuple[Applied, ...]:
        """The machine, and how it is jailed."""
        from ringfence.result import Applied

        system = self.system
        return (
            Applied(rule="accelerator", requested=None, effective=self.accelerator, mechanism="QEMU"),
            Applied(
                rule="machine",
                requested=None,
                effective=f"{system.cpus} CPU, {system.memory_bytes} bytes",
                mechanism="QEMU q35",
            ),
            *self._vmm.applied(),
        )

    def close(self) -> None:
        """Ends the machine, as if its plug was pulled, and removes everything. May be called twice."""
        if self._open:
            self._open = False
            self._vmm.close()
