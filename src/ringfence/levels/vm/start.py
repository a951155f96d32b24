"""How a guest comes up: restored from a template, by a QEMU that waits already where there is one; or booted.

A template that turns out not to serve is made anew, once. Where none can be had the guest boots, as it would without
templates, and `Result.applied` tells why.
"""

from __future__ import annotations

import os
import select
import time

from ringfence.errors import ProtocolError, RingfenceError, Unavailable, printable
from ringfence.levels.vm import template as templates
from ringfence.levels.vm.agent import Agent
from ringfence.levels.vm.qemu import STATE_FD, Memory, start_qemu
from ringfence.levels.vm.qmp import restore
from ringfence.result import Applied
from ringfence.wire.frames import Type

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from typing import Any

    from ringfence.levels.host import Host
    from ringfence.levels.ready import Ready
    from ringfence.levels.state import State
    from ringfence.levels.vm.template import Template
    from ringfence.levels.vm.vmm import Machine, Vmm

__all__ = ["Guest", "Waiting", "prepare"]

# Under emulation a cold boot takes 2 to 3 s on an idle machine; many at once on a busy one take their time.
_BOOT_LIMIT_NS = 120_000_000_000
_RESTORE_LIMIT_NS = 60_000_000_000
# A kernel that doesn't come up is asked for its console: for how long, how much is kept, and how much of that is told.
_CONSOLE_S, _CONSOLE_BYTES, _CONSOLE_WORDS = 30.0, 16 << 10, 400
# How long a QEMU waits for a run of its kind.
_IDLE_S = 60.0
# By how much the wall clock and the monotonic one may differ, over any time, before the wall clock was set.
_STEP_NS = 1_000_000_000

# Told before what takes long, by the command line; an API that prints nothing has none.
progress: Callable[[str], None] | None = None
# Why no template of that key can be made, by this process.
_failed: dict[str, str] = {}


def prepare(host: Host, report: Callable[[str], None] | None = None) -> tuple[bool, Template]:
    """The template of a run that asks for nothing: whether it was there, and it. Raises RingfenceError, OSError."""
    from ringfence.levels.state import state
    from ringfence.levels.vm.shape import guest_kernel, machine_for
    from ringfence.linux import kvm
    from ringfence.spec import Spec

    spec = Spec.make(["-"], isolation="vm")
    machine = machine_for(spec, guest_kernel(), "kvm" if kvm.probe().usable else "tcg")
    found, there = templates.obtain(machine, host, state(), report)
    return there, found


class _ClockWasSet(ProtocolError):
    pass


class Guest:
    """A guest on its way up: its VMM, and what has to be known to hand it its plan.

    use_template: False boots it in any case. own_kernel: it isn't one that is known to come up, so where it doesn't
    for a template, that is all there is to say.
    """

    def __init__(
        self,
        machine: Machine,
        host: Host,
        state: State,
        *,
        stays: bool = False,
        use_template: bool = True,
        own_kernel: bool = False,
    ) -> None:
        self.machine = machine
        self._own_kernel = own_kernel
        self._host = host
        self._state = state
        self._stays = stays
        self._tries = 0 if use_template else 2
        self._why = "" if use_template else "a boot was asked for"
        self._template: Template | None = None
        self._begun: tuple[int, int] | None = None  # CLOCK_MONOTONIC and CLOCK_REALTIME when it was told to resume
        self.vmm: Vmm = self._start()

    def _start(self) -> Vmm:
        self._template = self._find() if self._tries < 2 else None
        self._begun = None
        self.waited = False  # whether its QEMU was there before it was wanted
        fds: tuple[int, ...] = ()
        if self._template is not None:
            try:
                fds = self._template.open_both()
            except OSError as error:
                templates.forget(self._template)
                self._template, self._why = None, f"a template did not serve: {error}"
        self.restored = self._template is not None
        try:
            memory = Memory(memory=fds[0], state=fds[1]) if fds else None
            return start_qemu(self.machine, self._host, self._state, stays=self._stays, memory=memory)
        finally:
            for fd in fds:
                os.close(fd)

    def _find(self) -> Template | None:
        key = templates.key_of(self.machine)
        if key in _failed:
            self._why = _failed[key]
            return None
        try:
            found, there = templates.obtain(self.machine, self._host, self._state, progress)
        except (RingfenceError, OSError) as error:
            if self._own_kernel and isinstance(error, templates.NotBooted):
                raise ProtocolError(f"{error}{_console(self.machine, self._host, self._state)}") from None
            _failed[key] = self._why = f"no template could be made: {error}"
            return None
        self._why = "a template" if there else "a template, made by this run"
        return found

    def begin(self) -> None:
        """Has a restored guest's VMM load its state, which goes on while Python does something else."""
        if self._template is not None and self._begun is None:
            assert self.vmm.control is not None
            self._begun = time.monotonic_ns(), time.time_ns()
            self.vmm.control.send(restore(STATE_FD))

    def clock(self) -> tuple[int, int]:
        """Waits for the guest. (The wall clock in ns, what the guest's CLOCK_MONOTONIC was then, or 0 for now).

        Raises ProtocolError, Unavailable where it doesn't come up, and another try wouldn't help.
        """
        while True:
            try:
                return self._clock()
            except (ProtocolError, Unavailable) as error:
                if self._template is None:
                    raise
                # QEMU reads what a qcow2 says of itself, which may be what it ended over.
                self.again(error, keep=self.machine.disk_format == "qcow2" or isinstance(error, _ClockWasSet))

    def _clock(self) -> tuple[int, int]:
        if self._template is None:
            agent = Agent(self.vmm, lambda frame: None)
            agent.wait_for(Type.READY, _BOOT_LIMIT_NS, "the guest did not boot")
            return time.time_ns(), 0
        self.begin()
        control = self.vmm.control
        assert control is not None and self._begun is not None
        resumed_ns = control.event("RESUME", time.monotonic_ns() + _RESTORE_LIMIT_NS)
        # It was after we asked, which may be long ago, and before now.
        (asked, earliest), now, latest = self._begun, time.monotonic_ns(), time.time_ns()
        if abs((latest - earliest) - (now - asked)) > _STEP_NS:
            raise _ClockWasSet("the host's clock was set, or the host slept, since the guest was restored")
        if not earliest - _STEP_NS <= resumed_ns <= latest + _STEP_NS:
            raise ProtocolError("QEMU tells a time that can't be")
        # Nothing is asked of it any more, and its guest may take it over soon.
        control.close()
        return resumed_ns, self._template.monotonic_ns

    def again(self, error: Exception, *, keep: bool = False) -> None:
        """The template didn't serve. Starts another guest in place of this one, from one that is made anew.

        keep: it needn't be the template's fault, as what is the caller's was in play. The other guest boots.
        """
        assert self._template is not None
        failed = self._template
        self.close()
        if keep:
            self._tries = 2
        else:
            templates.forget(failed)
            self._tries += 1
        self._why = f"a template did not serve: {error}"
        self.vmm = self._start()
        self.begin()

    def close(self) -> None:
        """May be called twice."""
        self.vmm.close()
        template, self._template = self._template, None
        if template is not None:
            templates.let_go(template)

    def applied(self) -> Applied:
        how = "restored" if self.restored else "booted"
        why = self._why + (", by a QEMU that waited" if self.waited else "")
        return Applied(rule="start", requested=None, effective=how, mechanism=why)


def _console(machine: Machine, host: Host, state: State) -> str:
    """The end of what the kernel prints as it doesn't come up, as the end of a sentence; "" where it prints nothing."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    said = b""
    try:
        with open(reader, "rb", buffering=0) as console:
            try:
                vmm = start_qemu(machine, host, state, console=writer)
            finally:
                os.close(writer)
            try:
                poll = select.poll()
                poll.register(console.fileno(), select.POLLIN)
                until = time.monotonic() + _CONSOLE_S
                while (left := until - time.monotonic()) > 0 and poll.poll(int(left * 1000) + 1):
                    if not (data := console.read(65536)):
                        break
                    said = (said + data)[-_CONSOLE_BYTES:]
            finally:
                vmm.close()
    except (RingfenceError, OSError):
        return ""
    lines = [" ".join(line.split()) for line in said.decode("ascii", "replace").splitlines()]
    lines = [printable(line, " ") for line in lines if line]
    told = [line for line in lines if "Kernel panic" in line or "ringfence:" in line] or lines[-3:]
    return f"; its console: {' / '.join(told)[-_CONSOLE_WORDS:]}" if told else ""


class Waiting:
    """A QEMU that waits for its guest's state, for the next run of a kind (`levels.ready`).

    make: gives its guest. It is started by `send_off`, and ends by itself where nobody takes it for a while.
    """

    def __init__(self, kind: tuple[Any, ...], ready: Ready, make: Callable[[], Guest]) -> None:
        self._kind = kind
        self._ready = ready
        self._make = make
        self._guest: Guest | None = None
        self._timer: threading.Timer | None = None

    def send_off(self) -> None:
        import threading

        self._guest = self._make()
        if not self._guest.restored:
            raise ProtocolError("there is no template to wait with")
        self._timer = threading.Timer(_IDLE_S, self._ready.expire, (self._kind, self))
        self._timer.daemon = True
        self._timer.start()

    def is_waiting(self) -> bool:
        """Whether it is there still."""
        self._end_timer()
        return self._guest is not None and self._guest.vmm.channel.is_quiet()

    def _end_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def take(self, machine: Machine) -> Guest | None:
        """Its guest, where it is one of that machine: the kernel may be another one by now."""
        guest, self._guest = self._guest, None
        if guest is None or guest.machine != machine:
            if guest is not None:
                guest.close()
            return None
        guest.waited = True
        return guest

    def close(self) -> None:
        self._end_timer()
        guest, self._guest = self._guest, None
        if guest is not None:
            guest.close()

    def forget(self) -> None:
        """In a forked child: closes what it holds, and ends nothing."""
        guest, self._guest = self._guest, None
        if guest is not None:
            guest.vmm.forget()
