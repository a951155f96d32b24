"""`Pool`: sandboxes that wait, so that a run finds its boundary already built."""

from __future__ import annotations

import atexit
import collections
import os
import threading
import time
import weakref

from ringfence._value import Closing
from ringfence.api import check_spec, execute, level, settle
from ringfence.errors import RingfenceError, SpecError
from ringfence.sandbox import command_spec, sandbox_spec
from ringfence.spec import Spec, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from ringfence.levels.base import Sandbox as OpenSandbox
    from ringfence.result import Result
    from ringfence.spec.options import CommandOptions, Path, SandboxOptions

__all__ = ["Pool"]

_MOST_WAITING = 256


class Pool(Closing):
    """Keeps `size` sandboxes of one kind waiting. Each is used once, for one command, and never again: what a command
    leaves goes with it, as with `rf.run`. A context manager; `close` leaves nothing of it.

        with rf.Pool(4, isolation="container", limits=rf.Limits(memory="256M")) as pool:
            results = [pool.run(["python3", "-c", code]) for code in submissions]

    size: 1 to 256. idle: how long sandboxes wait without any run, in seconds or as "90s"; then they end, and the next
    run has the pool filled again. Without it they wait until the pool is closed. warm: at the vm level, a command that
    each guest runs before it waits, under the restrictions and the time limit of every other: what it has had read and
    translated makes a run of the same program quicker. Its processes end, its files stay, its CPU time isn't counted;
    its memory is in the peak of the run. A RingfenceError where it doesn't exit with 0. The other arguments are those
    of `rf.run` that aren't one command's own, the same for all its sandboxes. Waiting sandboxes are made, and used ones
    removed, by a thread of the pool's own; where none is waiting, a run makes its own. What a waiting one holds: a
    process, and at the container level its namespaces, some 300 KiB; at the vm level a machine that has booted and run
    a command of ours, some 30 MB. They are of the moment that they were made: a user, a mount's source or a limit that
    changes on the host later doesn't reach them.

    Every method may be called from any thread. Raises what `rf.run` raises, the constructor all of what is checked
    before anything starts.
    """

    def __init__(
        self,
        size: int,
        *,
        idle: float | str | None = None,
        warm: Sequence[Path] = (),
        **options: Unpack[SandboxOptions],
    ) -> None:
        self.size = parse.count(size, "a pool's size", 1, _MOST_WAITING)
        self._spec = settle(sandbox_spec(options))
        idle_ns = None if idle is None else parse.duration(idle, "a pool's idle time")
        first = Spec.make(warm).argv if warm else ()
        if first and not level(self._spec.isolation).warms_up:
            raise SpecError(f"warm: a {self._spec.isolation} starts as quickly without: leave it out, or take a vm")
        self._keeper = _Keeper(self._spec, size, None if idle_ns is None else idle_ns / 1e9, first)
        # The thread holds the keeper, not the pool: a pool that is forgotten ends like one that is closed.
        self._finalizer = weakref.finalize(self, self._keeper.close)
        self._finalizer.atexit = False  # the keeper has a better place in that order

    def run(self, argv: Sequence[Path], **options: Unpack[CommandOptions]) -> Result:
        """Runs a command in a sandbox of its own, one that waits if there is one. The arguments of `rf.Sandbox.run`.

        Its `usage.teardown_ns` is None: the sandbox is removed after the call.
        """
        called_ns = time.monotonic_ns()
        spec, command = command_spec(self._spec, argv, options)
        sandbox = self._keeper.take()
        try:
            return execute(sandbox, spec, called_ns, once=True, **command)
        finally:
            self._keeper.used(sandbox)

    @property
    def isolation(self) -> str:
        """The level of its sandboxes."""
        return self._spec.isolation

    @property
    def waiting(self) -> int:
        """How many sandboxes wait now."""
        return len(self._keeper.waiting)

    def wait_until_full(self, timeout: float = 60) -> bool:
        """Waits until `size` sandboxes wait and all used ones are gone; False where that takes longer, seconds."""
        return self._keeper.settled(timeout)

    def close(self) -> None:
        """Ends the waiting sandboxes, and waits until all are gone. A run that is under way in another thread ends as
        it would, and then its sandbox goes too. May be called twice.
        """
        self._finalizer()


class _Keeper:
    """The sandboxes of a pool: those that wait, those that were used, and the thread that sees to both."""

    def __init__(self, spec: Spec, size: int, idle_s: float | None, warm: tuple[bytes, ...]) -> None:
        self._spec = spec
        self._warm = warm
        self._idle_s = idle_s
        self._asleep = False  # nobody has come for long: none is kept waiting
        self._size = size
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._used: collections.deque[OpenSandbox] = collections.deque()
        self._busy = 0  # sandboxes that are being made or removed
        self._closed = False
        self._trouble: BaseException | None = None
        # The first one here: what is wrong with it is told by the constructor. It also starts the launcher, whose own
        # end at the exit of Python must come after ours.
        self.waiting: collections.deque[OpenSandbox] = collections.deque([self._make_ahead()])
        try:
            self._thread = threading.Thread(target=self._keep, name="ringfence-pool", daemon=True)
            self._thread.start()
        except BaseException:  # no room for another thread, or Ctrl-C
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self.waiting.pop().close()
            raise
        atexit.register(self.close)

    def _make(self) -> OpenSandbox:
        """One for a run that is there already."""
        boundary, machine = check_spec(self._spec)
        return boundary.open(self._spec, machine)

    def _make_ahead(self) -> OpenSandbox:
        made = self._make()
        try:
            made.prepare(self._warm)
        except BaseException:
            made.close()
            raise
        return made

    def take(self) -> OpenSandbox:
        """One that waits, or a new one."""
        if self._pid != os.getpid():
            raise RingfenceError("the pool belongs to the process that made it, not to one forked off it")
        with self._changed:
            if self._closed:
                raise RingfenceError("the pool is closed")
            self._asleep = False
            if self.waiting:
                return self.waiting.popleft()
        return self._make()

    def used(self, sandbox: OpenSandbox) -> None:
        """Its run is over. Only now the thread gets to work: not beside the run."""
        with self._changed:
            if not self._closed:
                self._used.append(sandbox)
                self._changed.notify_all()
                return
        sandbox.close()

    def settled(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._used and not self._busy and self._full(), timeout)

    def _over(self) -> bool:
        return self._closed

    def _full(self) -> bool:
        return len(self.waiting) >= self._size

    def _has_work(self) -> bool:
        return bool(self._closed or self._used or not (self._full() or self._trouble or self._asleep))

    def _next(self) -> OpenSandbox | None:
        """Waits for work. A sandbox to be removed, or None where one is to be made. With the lock."""
        while not self._changed.wait_for(self._has_work, self._idle_s if self.waiting else None):
            self._asleep = True
            self._used.extend(self.waiting)
            self.waiting.clear()
        return self._used.popleft() if self._used else None

    def _keep(self) -> None:
        while True:
            with self._changed:
                used = self._next()
                if self._over():
                    if used is not None:
                        self._used.append(used)
                    return
                self._busy += 1
            made, trouble = None, None
            try:
                if used is not None:
                    used.close()
                else:
                    made = self._make_ahead()
            except BaseException as error:
                trouble = error
            with self._changed:
                self._busy -= 1
                # After trouble with making one, runs make their own and tell it; the next one used lets us try again.
                self._trouble = trouble
                if made is not None and not self._over():
                    self.waiting.append(made)
                    made = None
                self._changed.notify_all()
            if made is not None:
                made.close()

    def close(self) -> None:
        atexit.unregister(self.close)
        if self._pid != os.getpid():
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        for left in (self._used, self.waiting):
            while left:
                left.popleft().close()
