"""The rate of the CPU's time stamp counter.

A guest under emulation reads the host's counter, and has no good clock to measure its rate against:
calibration on a busy host gave clocks that ran wrong, or hung. So it's told.
"""

from __future__ import annotations

import os
import time

# push rdx; rdtsc; shl rdx, 32; or rax, rdx; pop rdx; ret
_READ_TSC = bytes.fromhex("52 0f31 48c1e220 4809d0 5a c3")

_WINDOW_NS = 20_000_000


def host_tsc_khz() -> int | None:
    """The rate of this host's TSC in kHz, or None where it can't be told (not x86-64, or no constant TSC).

    Measured over 20 ms, to some 20 parts in a million; kept for the life of the process.
    """
    if not _known:
        _known.append(_measure() or _from_cpuinfo())
    return _known[0]


_known: list[int | None] = []


def _measure() -> int | None:
    """Count ticks against CLOCK_MONOTONIC_RAW: by a few bytes of machine code, as Python has no rdtsc."""
    if os.uname().machine != "x86_64" or "constant_tsc" not in _cpuinfo("flags").split():
        return None
    import ctypes
    import mmap

    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None  # A policy (SELinux execmem) forbids memory that is writable and executable.
    page.write(_READ_TSC)
    held = ctypes.c_char.from_buffer(page)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(held))

    def sample() -> tuple[int, int]:
        """(ns, ticks) of one instant: of several tries the one that took least."""
        best: tuple[int, int, int] | None = None
        for _ in range(20):
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            ticks = read()
            after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            if best is None or after - before < best[0]:
                best = (after - before, (before + after) // 2, ticks)
        assert best is not None
        return best[1], best[2]

    start_ns, start_ticks = sample()
    time.sleep(_WINDOW_NS / 1e9)
    end_ns, end_ticks = sample()
    return round((end_ticks - start_ticks) * 1_000_000 / (end_ns - start_ns))


def _from_cpuinfo() -> int | None:
    """In a virtual machine "cpu MHz" is the TSC's rate; on bare metal it is the core's of the moment."""
    if "hypervisor" not in _cpuinfo("flags").split():
        return None
    try:
        return round(float(_cpuinfo("cpu MHz")) * 1000)
    except ValueError:
        return None


def _cpuinfo(field: str) -> str:
    """A field of the first CPU in /proc/cpuinfo, or ""."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == field:
                    return value.strip()
    except OSError:
        pass
    return ""
