"""Which process is a virtual machine monitor, and what is known of its guest.

By its program's name where that is a known one, else by a descriptor of a KVM virtual machine, which only a VMM has.
"""

from __future__ import annotations

import itertools
import os
import re

from ringfence._value import Plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

__all__ = ["Monitor", "monitor"]

# By the name of the program. runsc and libkrun's users run the guest in the process itself.
_NAMES = (
    (re.compile(r"qemu-system-\w+|qemu-kvm|kvm"), "QEMU"),
    (re.compile(r"firecracker(-v.*)?"), "Firecracker"),
    (re.compile(r"cloud-hypervisor"), "Cloud Hypervisor"),
    (re.compile(r"crosvm"), "crosvm"),
    (re.compile(r"runsc(-sandbox)?"), "gVisor"),
    (re.compile(r"krunvm|libkrun.*"), "libkrun"),
    (re.compile(r"VBoxHeadless|VirtualBoxVM"), "VirtualBox"),
    (re.compile(r"vmware-vmx"), "VMware"),
    (re.compile(r"lkvm"), "kvmtool"),
    (re.compile(r"dragonball|stratovirt"), "a microVM monitor"),
)
# How each names the thread of a virtual CPU.
_CPU_THREAD = re.compile(r"CPU \d+/\w+|fc_vcpu ?\d+|vcpu\d+|crosvm_vcpu\d+|kvm-vcpu-\d+")
_QEMU_DEFAULT_BYTES = 128 << 20


class Monitor(Plain):
    """program: "QEMU" or another's name, or "unknown". accelerator: "kvm", "tcg", "ptrace" or "systrap" of gVisor's, or
    None where nothing tells. memory_bytes: of the guest; cpus: virtual ones; None where nothing tells. devices: as its
    command line names them. machine: QEMU's machine type, or "".
    """

    __slots__ = ("accelerator", "cpus", "devices", "machine", "memory_bytes", "program")
    program: str
    accelerator: str | None
    memory_bytes: int | None
    cpus: int | None
    devices: tuple[str, ...]
    machine: str

    def __init__(
        self,
        *,
        program: str,
        accelerator: str | None,
        memory_bytes: int | None = None,
        cpus: int | None = None,
        devices: tuple[str, ...] = (),
        machine: str = "",
    ) -> None:
        self._set(
            program=program,
            accelerator=accelerator,
            memory_bytes=memory_bytes,
            cpus=cpus,
            devices=devices,
            machine=machine,
        )


def monitor(
    argv: Sequence[str], exe: str | None, descriptors: Mapping[int, str] | None, threads: Callable[[], Iterable[str]]
) -> Monitor | None:
    """None where the process is none. exe: the program's path, where it may be read. threads: gives their names."""
    links = list((descriptors or {}).values())
    program = _program(argv, exe)
    has_machine = any("anon_inode:kvm-vm" in link for link in links)
    if program is None and not has_machine:
        return None
    if program == "gVisor" and not _is_sandbox(argv):
        return None  # runsc's other parts: the gofer, the command line
    found: dict[str, Any] = {"program": program or "unknown"}
    found["accelerator"] = "kvm" if has_machine else _accelerator(program, argv)
    counted = sum("anon_inode:kvm-vcpu" in link for link in links)
    counted = counted or sum(bool(_CPU_THREAD.fullmatch(name)) for name in threads())
    found["cpus"] = counted or None
    if program == "QEMU":
        found |= _qemu(argv, counted)
    elif program in ("Cloud Hypervisor", "crosvm", "kvmtool"):
        found |= _by_options(argv)
    return Monitor(**found)


def _program(argv: Sequence[str], exe: str | None) -> str | None:
    # A deleted program's path has a note behind it; argv[0] is only what its starter says.
    names = [os.path.basename((exe or "").removesuffix(" (deleted)"))]
    if exe is None and argv:
        names.append(os.path.basename(argv[0]))
    for name in names:
        for pattern, program in _NAMES:
            if pattern.fullmatch(name):
                return program
    if argv and argv[0] == "runsc-sandbox":
        return "gVisor"
    return None


def _is_sandbox(argv: Sequence[str]) -> bool:
    return bool(argv) and (argv[0] == "runsc-sandbox" or "boot" in argv)


def _accelerator(program: str | None, argv: Sequence[str]) -> str | None:
    if program == "gVisor":
        return _option(argv, "--platform")
    if program == "QEMU":
        names = [value.partition(",")[0] for value in _options(argv, "accel")]
        for machine in _options(argv, "machine") + _options(argv, "M"):
            names += [part.removeprefix("accel=") for part in machine.split(",") if part.startswith("accel=")]
        # With KVM it would have a descriptor of the machine; where those may not be read, its command line tells.
        return "kvm" if any("kvm" in name for name in names) or "-enable-kvm" in argv else "tcg"
    return None


def _qemu(argv: Sequence[str], counted: int) -> dict[str, Any]:
    found: dict[str, Any] = {"memory_bytes": _QEMU_DEFAULT_BYTES}
    for value in _options(argv, "m"):
        parts = dict(part.partition("=")[::2] for part in value.split(",") if "=" in part)
        found["memory_bytes"] = _bytes(parts.get("size", value.partition(",")[0]), 1 << 20)
    for value in _options(argv, "smp"):
        parts = dict(part.partition("=")[::2] for part in value.split(",") if "=" in part)
        number = parts.get("cpus", value.partition(",")[0])
        if not counted and number.isdecimal():
            found["cpus"] = int(number)
    if not counted:
        found.setdefault("cpus", 1)
    found["machine"] = next((one.partition(",")[0] for one in _options(argv, "machine") + _options(argv, "M")), "")
    devices = [value.partition(",")[0] for value in _options(argv, "device")]
    devices += ["netdev " + value.partition(",")[0] for value in _options(argv, "netdev") + _options(argv, "nic")]
    devices += ["drive" for _ in _options(argv, "drive")]
    devices += ["share " + _part(value, "path") for value in _options(argv, "fsdev") + _options(argv, "virtfs")]
    found["devices"] = tuple(devices)
    return found


def _by_options(argv: Sequence[str]) -> dict[str, Any]:
    """Cloud Hypervisor's, crosvm's and kvmtool's: --memory size=512M, --mem 512, --cpus boot=2."""
    found: dict[str, Any] = {}
    for name in ("--memory", "--mem", "-m"):
        value = _option(argv, name)
        if value:
            parts = dict(part.partition("=")[::2] for part in value.split(",") if "=" in part)
            found["memory_bytes"] = _bytes(parts.get("size", value.partition(",")[0]), 1 << 20)
    wanted = ("--disk", "--net", "--fs", "--vsock", "--device", "--block", "--rwdisk", "--shared-dir")
    found["devices"] = tuple(word.lstrip("-") for word in argv if word.partition("=")[0] in wanted)
    return found


def _options(argv: Sequence[str], name: str) -> list[str]:
    """The values of an option of QEMU's, which takes one dash or two."""
    return [value for word, value in itertools.pairwise(argv) if word in (f"-{name}", f"--{name}")]


def _option(argv: Sequence[str], name: str) -> str | None:
    for number, word in enumerate(argv):
        if word == name and number + 1 < len(argv):
            return argv[number + 1]
        if word.startswith(name + "="):
            return word[len(name) + 1 :]
    return None


def _part(value: str, name: str) -> str:
    return next((part[len(name) + 1 :] for part in value.split(",") if part.startswith(name + "=")), "")


def _bytes(text: str, unit: int) -> int | None:
    """ "512M", or a number of `unit`."""
    match = re.fullmatch(r"(\d+)([KMGTkmgt])?i?[Bb]?", text.strip())
    if match is None:
        return None
    scale = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    return int(match[1]) * (scale[match[2].lower()] if match[2] else unit)
