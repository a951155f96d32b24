"""`ringfence bench --vm`: what a guest costs: booted, restored from a template, waiting in a pool; time and memory.

One round takes everything once, in an order of its own, each after a pause in which what the one before left to be done
is done. The commands are the static probe on an erofs disk, which shows the guest's own cost, and the host's
/usr/bin/true over a 9p share, as a user's first `rf.run` has it.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time

from ringfence.api import level
from ringfence.comparison.machine import machine_facts
from ringfence.comparison.statistics import ratio, summarize
from ringfence.comparison.taken import run_in
from ringfence.errors import Unavailable
from ringfence.levels.host import host
from ringfence.pool import Pool
from ringfence.sandbox import Sandbox
from ringfence.spec import Limits, Spec
from ringfence.wire.launcher import probe_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

__all__ = ["lines", "measure"]

_BOOTS_AT_LEAST = 3
_PAUSE_S = 0.25
_GUESTS = 20
_TRUE = "/usr/bin/true"
_PROBE = "/bin/probe"

BOOT, BOOT_RUN = "boot to init's word", "boot to the first command's end, erofs"
RESTORE, RESTORE_RUN = "restore to init's word", "restore to the first command's end, erofs"
WAITED = "restore to init's word, by a QEMU that waited"
HOST_RUN = "rf.run, true, host's userland"
POOL, POOL_HOST = "pool, first command, erofs", "pool, first command, host's userland"
POOL_WARM, POOL_HOST_WARM = f"{POOL}, warm=", f"{POOL_HOST}, warm="

# (what, at most ms, or against what at most which part of it)
_TARGETS: tuple[tuple[str, float, str], ...] = (
    (RESTORE, 60, ""),
    (RESTORE_RUN, 150, ""),
    (RESTORE_RUN, 0.1, BOOT_RUN),
    (HOST_RUN, 300, ""),
    (POOL, 15, ""),
    (POOL_WARM, 15, ""),
)
_TARGET_PSS_BYTES = 30e6


def measure(rounds: int = 30, tell: Callable[[str], None] | None = None) -> dict[str, Any]:
    """All of it, for json.dumps. A boot is taken every tenth round. Raises Unavailable, and what `run` raises."""
    missing = level("vm").unavailable(host())
    if missing is not None:
        raise Unavailable("vm", *missing)
    say = tell if tell is not None else _nobody
    facts = machine_facts()
    with contextlib.ExitStack() as stack:
        image = _image(stack)
        takes = _takes(stack, image)
        samples: dict[str, list[int]] = {name: [] for name in takes}
        for name, take in takes.items():
            say(f"preparing: {name}")
            take()
        order = list(takes)
        shuffled = random.Random(rounds)
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            shuffled.shuffle(order)
            for name in order:
                boots = name in (BOOT, BOOT_RUN)
                if not boots or turn % 10 == 0 or turn < _BOOTS_AT_LEAST:
                    time.sleep(_PAUSE_S)
                    samples[name].append(takes[name]())
    say(f"memory of {_GUESTS} guests")
    memory = _memory()
    summaries = {name: summarize(taken) for name, taken in samples.items()}
    targets = []
    for what, most, against in _TARGETS:
        found = summaries[what]
        value = ratio(found, summaries[against]) if against else found.p50 / 1e6 if found else None
        targets.append({"what": what, "against": against or "ms", "most": most, "found": value})
    return {
        "machine": facts,
        "unit": "ns",
        "summaries": {name: one.to_json() if one else None for name, one in summaries.items()},
        "memory": memory,
        "targets": targets,
        "samples": samples,
    }


def _nobody(text: str) -> None:
    return


def _image(stack: contextlib.ExitStack) -> str:
    """A rootfs folder with nothing but the probe."""
    folder: str = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringfence-bench-"))
    os.chmod(folder, 0o755)
    os.mkdir(os.path.join(folder, "bin"), 0o755)
    program = os.path.join(folder, _PROBE[1:])
    shutil.copyfile(probe_path(), program)
    os.chmod(program, 0o755)
    return folder


def _takes(stack: contextlib.ExitStack, image: str) -> dict[str, Callable[[], int]]:
    """By name, what takes it once and tells how many ns that took."""
    from ringfence import api

    def pooled(pool: Pool, argv: Sequence[str]) -> int:
        pool.wait_until_full()
        time.sleep(_PAUSE_S)
        return _timed(lambda: pool.run(argv, check=True))

    disk = stack.enter_context(Pool(1, isolation="vm", image=image))
    userland = stack.enter_context(Pool(1, isolation="vm"))
    warm_disk = stack.enter_context(Pool(1, isolation="vm", image=image, warm=[_PROBE, "exit", "0"]))
    warm_userland = stack.enter_context(Pool(1, isolation="vm", warm=[_TRUE]))
    return {
        BOOT: lambda: _to_init(use_template=False),
        BOOT_RUN: lambda: _to_end(image, use_template=False),
        RESTORE: lambda: _to_init(use_template=True),
        WAITED: lambda: _to_init(use_template=True, ahead=True),
        RESTORE_RUN: lambda: _to_end(image, use_template=True),
        HOST_RUN: lambda: _timed(lambda: api.run([_TRUE], isolation="vm", check=True)),
        POOL: lambda: pooled(disk, [_PROBE, "exit", "0"]),
        POOL_HOST: lambda: pooled(userland, [_TRUE]),
        POOL_WARM: lambda: pooled(warm_disk, [_PROBE, "exit", "0"]),
        POOL_HOST_WARM: lambda: pooled(warm_userland, [_TRUE]),
    }


def _timed(start: Callable[[], object]) -> int:
    began = time.perf_counter_ns()
    start()
    return time.perf_counter_ns() - began


def _to_init(*, use_template: bool, ahead: bool = False) -> int:
    """From the decision to start a guest to an answer of its init. ahead: QEMU has been started before."""
    from ringfence.levels.state import state
    from ringfence.levels.vm.agent import Agent
    from ringfence.levels.vm.shape import guest_kernel, machine_for
    from ringfence.levels.vm.start import Guest
    from ringfence.linux import kvm
    from ringfence.wire import frames
    from ringfence.wire.frames import Type

    machine = machine_for(Spec.make([_TRUE], isolation="vm"), guest_kernel(), "kvm" if kvm.probe().usable else "tcg")
    began = time.perf_counter_ns()
    guest = Guest(machine, host(), state(), use_template=use_template)
    try:
        if ahead:
            time.sleep(_PAUSE_S)
            began = time.perf_counter_ns()
        guest.clock()
        guest.vmm.channel.send(frames.encode(Type.ASK_CLOCK))
        Agent(guest.vmm, lambda frame: None).wait_for(Type.CLOCK, 60_000_000_000, "the guest did not answer")
        return time.perf_counter_ns() - began
    finally:
        guest.vmm.close()


def _to_end(image: str, *, use_template: bool) -> int:
    """From the decision to start a guest to the end of a static command on its disk, the disk being there."""
    from ringfence.levels.vm.sandbox import VmSandbox

    spec = Spec.make([_PROBE, "exit", "0"], isolation="vm", image=image)
    began = time.perf_counter_ns()
    with VmSandbox(spec, host(), use_template=use_template) as sandbox:
        outcome = run_in(sandbox, spec, once=False)
        took = time.perf_counter_ns() - began
    if outcome.exited is None or outcome.exited.exit_code != 0:
        raise OSError("the probe did not end well in a guest")
    return took


# ---- memory ----


def _memory() -> dict[str, Any]:
    """What guests take that run at once, each after one command, by the kernel's own account (PSS)."""
    from ringfence.levels.state import state
    from ringfence.levels.vm import template

    state().ready.clear()
    with contextlib.ExitStack() as stack:
        for _ in range(_GUESTS):
            sandbox = stack.enter_context(Sandbox(isolation="vm", limits=Limits(wall_time=120)))
            sandbox.run([_TRUE], check=True)
        time.sleep(1)
        pss = _pss_of_guests()
        held = sum(os.fstat(one.memory_fd).st_blocks * 512 for one in template._loaded.values())
    return {
        "guests": len(pss),
        "pss_bytes_each": sum(pss) // len(pss) if pss else None,
        "pss_bytes": pss,
        "templates_in_memory_bytes": held,
        "most_bytes_each": _TARGET_PSS_BYTES,
    }


def _pss_of_guests() -> list[int]:
    """Of each QEMU that is ours. Only root may look."""
    from ringfence.wire.launcher import launcher

    found = []
    parents = {int(name): _parent(name) for name in os.listdir("/proc") if name.isdigit()}
    for pid in parents:
        above = pid
        while above in parents and above > 1 and above != launcher().pid:
            above = parents[above]
        try:
            if above != launcher().pid or b"qemu-system" not in _read(f"/proc/{pid}/comm"):
                continue
            for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
                if line.startswith(b"Pss:"):
                    found.append(int(line.split()[1]) * 1024)
        except OSError:
            continue
    return found


def _parent(name: str) -> int:
    try:
        return int(_read(f"/proc/{name}/stat").rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


# ---- telling ----


def lines(found: dict[str, Any]) -> list[str]:
    """As text."""
    printed = [f"{'':<52}{'p50 ms':>10}{'p99 ms':>10}{'n':>6}"]
    for name, one in found["summaries"].items():
        if one is not None:
            count = len(found["samples"][name])
            high = f"{one['p99'] / 1e6:.1f}" if one["p99"] is not None else "-"  # of too few there is none
            printed.append(f"{name:<52}{one['p50'] / 1e6:>10.1f}{high:>10}{count:>6}")
    memory = found["memory"]
    if memory["pss_bytes_each"] is not None:
        each, count = memory["pss_bytes_each"] / 1e6, memory["guests"]
        printed.append(f"{f'PSS of each of {count} guests after a command':<52}{each:>7.1f} MB")
        printed.append(f"{'templates held in memory':<52}{memory['templates_in_memory_bytes'] / 1e6:>7.1f} MB")
    for one in found["targets"]:
        if one["found"] is not None:
            unit = "ms" if one["against"] == "ms" else f"of {one['against']}"
            met = "met" if one["found"] <= one["most"] else "missed"
            printed.append(f"target: {one['what']}: at most {one['most']:g} {unit}: {one['found']:.3g}, {met}")
    return printed
