"""A program of its own: does KVM run guest code at the CPU's speed? `python -I -S _kvm_timing.py` prints one
line: "ns <nanoseconds an instruction>" or "failed <call> <errno>".

It runs apart, to be killed: on some hosts with nested virtualisation KVM_RUN never returns. It imports
nothing of ringfence. Source: Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import sys
import time

_INSTRUCTIONS = 20_000 * 2
_TRIES = 5

# mov ecx, 20000; again: dec ecx; jnz again; hlt (in real mode, hence the operand size prefix 66)
_CODE = b"\x66\xb9" + struct.pack("<I", _INSTRUCTIONS // 2) + b"\x66\x49\x75\xfc\xf4"
_LOAD_ADDRESS = 0x1000
_MEMORY_BYTES = 0x3000

_EXIT_HLT = 5
_IO, _IOW, _IOR = 0, 1, 2


def _request(number: int, size: int = 0, direction: int = _IO) -> int:
    """An ioctl number of KVM's (type 0xAE)."""
    return direction << 30 | size << 16 | 0xAE << 8 | number


_CREATE_VM = _request(0x01)
_GET_VCPU_MMAP_SIZE = _request(0x04)
_CREATE_VCPU = _request(0x41)
_SET_USER_MEMORY_REGION = _request(0x46, 32, _IOW)
_SET_TSS_ADDR = _request(0x47)
_RUN = _request(0x80)
_SET_REGS = _request(0x82, 144, _IOW)
_GET_SREGS = _request(0x83, 312, _IOR)
_SET_SREGS = _request(0x84, 312, _IOW)

# Three pages below 4 GiB that the guest doesn't use; Intel's CPUs want them for real mode.
_TSS_ADDRESS = 0xFFFBD000


def main() -> int:
    step = "open"
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        step = "KVM_CREATE_VM"
        machine = fcntl.ioctl(kvm, _CREATE_VM, 0)
        memory = mmap.mmap(-1, _MEMORY_BYTES, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        memory[: len(_CODE)] = _CODE
        step = "KVM_SET_TSS_ADDR"
        _ioctl(machine, _SET_TSS_ADDR, _TSS_ADDRESS)
        step = "KVM_SET_USER_MEMORY_REGION"
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        region = struct.pack("<IIQQQ", 0, 0, _LOAD_ADDRESS, _MEMORY_BYTES, address)
        fcntl.ioctl(machine, _SET_USER_MEMORY_REGION, region)
        step = "KVM_CREATE_VCPU"
        vcpu = fcntl.ioctl(machine, _CREATE_VCPU, 0)
        state = mmap.mmap(vcpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0))
        step = "KVM_SET_SREGS"
        sregs = bytearray(312)
        fcntl.ioctl(vcpu, _GET_SREGS, sregs)
        # Code segment: base 0, selector 0.
        struct.pack_into("<Q", sregs, 0, 0)
        struct.pack_into("<H", sregs, 12, 0)
        fcntl.ioctl(vcpu, _SET_SREGS, bytes(sregs))
        best = None
        # The best of a few: on a busy host another process may run in the middle of one.
        for _ in range(_TRIES):
            step = "KVM_SET_REGS"
            registers = bytearray(144)
            struct.pack_into("<QQ", registers, 128, _LOAD_ADDRESS, 2)  # rip, rflags
            fcntl.ioctl(vcpu, _SET_REGS, bytes(registers))
            step = "KVM_RUN"
            start = time.monotonic_ns()
            _ioctl(vcpu, _RUN, 0)
            took = time.monotonic_ns() - start
            reason = struct.unpack_from("<I", state, 8)[0]
            if reason != _EXIT_HLT:
                print(f"failed KVM_RUN (exit reason {reason}) 0")
                return 0
            best = took if best is None else min(best, took)
    except OSError as error:
        print(f"failed {step} {error.errno}")
        return 0
    assert best is not None
    print(f"ns {best / _INSTRUCTIONS:.3f}")
    return 0


def _ioctl(fd: int, request: int, argument: int) -> None:
    """ioctl(2) with an argument that may have more than 31 bits, which fcntl.ioctl refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_ulong(argument)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    sys.exit(main())
