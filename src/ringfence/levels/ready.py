"""The next sandbox, made before it is asked for.

Its init has its namespaces, its file tree and its plan, and waits for a command: the dearest part of a start is over
before the call. Each is used once, like any other sandbox, and is made of parts that no sandbox is in any more. Only
what a spec says of the sandbox itself has to be the same; command, files, streams and time come with the command.
"""

from __future__ import annotations

import os
import resource
from _thread import allocate_lock

from ringfence.errors import RingfenceError
from ringfence.levels.base import PLAIN_RULES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol, TypeVar

    from ringfence.levels.host import Host
    from ringfence.spec import Spec

    class Waits(Protocol):
        """What can wait for a run: a sandbox, or a VMM."""

        def send_off(self) -> None: ...
        def is_waiting(self) -> bool: ...
        def close(self) -> None: ...
        def forget(self) -> None: ...

    _Waits = TypeVar("_Waits", bound=Waits)

__all__ = ["Ready", "kind_of"]

# How many wait at once, each of another kind: an idle one costs some 300 KiB, most of it the kernel's.
_MOST = 2
# How many runs back a kind is known by: one is made ahead for a kind that comes again.
_RUNS = 8
# What the command's process uses while it waits, some 100 KiB, would show in the peak of a smaller limit.
_LEAST_MEMORY = 16 << 20


def kind_of(spec: Spec, host: Host) -> tuple[Any, ...] | None:
    """What has to be the same for a sandbox to serve that spec; None where it can't be made ahead."""
    # Any other rule, and any yet to come, may refer to what can change until the call.
    if not spec.asked <= PLAIN_RULES or isinstance(spec.user, str) or spec.network.mode not in ("none", "host"):
        return None
    limits = spec.limits
    if limits.memory_bytes is not None and limits.memory_bytes < _LEAST_MEMORY:
        return None
    return (
        spec.isolation,
        limits.memory_bytes,
        limits.cpus,
        limits.pids,
        limits.cpu_time_ns,
        spec.user,
        spec.hostname,
        spec.network.mode,
        # The limits that the caller itself is under go into the plan.
        resource.getrlimit(resource.RLIMIT_CORE),
        resource.getrlimit(resource.RLIMIT_CPU),
        os.geteuid(),
        id(host),
    )


class Ready:
    """The sandboxes that wait. May be called from any thread."""

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._waiting: dict[tuple[Any, ...], Waits] = {}
        self._last: list[tuple[Any, ...]] = []

    def take(self, kind: tuple[Any, ...]) -> Waits | None:
        """The one of that kind, which is the caller's from now on; None where there is none."""
        with self._lock:
            found = self._waiting.pop(kind, None)
        if found is not None and not found.is_waiting():
            found.close()  # its plan failed, or somebody ended it
            return None
        return found

    def next_of(self, kind: tuple[Any, ...], make: Callable[[], _Waits]) -> _Waits | None:
        """Another one of the kind of which a command is just running; None where none is needed, or none can be made.

        It is to be handed to `offer` once that command is over.
        """
        with self._lock:
            again = kind in self._last
            self._last = [*self._last[-_RUNS + 1 :], kind]
            if not again or kind in self._waiting or (len(self._waiting) >= _MOST and not self._unused()):
                return None
        try:
            return make()
        except (RingfenceError, OSError):
            return None  # whoever needs one makes it then, and is told what fails

    def _unused(self) -> list[tuple[Any, ...]]:
        """The kinds that wait and did not come again lately."""
        return [kind for kind in self._waiting if kind not in self._last]

    def offer(self, kind: tuple[Any, ...], sandbox: Waits) -> None:
        """Lets it wait for a run of its kind."""
        try:
            sandbox.send_off()
        except (RingfenceError, OSError):
            sandbox.close()
            return
        surplus = [sandbox]
        with self._lock:
            if kind not in self._waiting:
                self._waiting[kind] = surplus.pop()
                if len(self._waiting) > _MOST:
                    surplus.append(self._waiting.pop(next(iter(self._unused() or self._waiting))))
        for one in surplus:
            one.close()

    def expire(self, kind: tuple[Any, ...], sandbox: Waits) -> None:
        """Nobody has come for it: it is ended, unless somebody just did."""
        with self._lock:
            if self._waiting.get(kind) is not sandbox:
                return
            del self._waiting[kind]
        sandbox.close()

    def clear(self) -> None:
        """Ends all that wait."""
        with self._lock:
            found, self._waiting = list(self._waiting.values()), {}
            self._last = []
        for one in found:
            one.close()

    def forget(self) -> None:
        """Lets go of them without ending them: they are another process's, or their launcher is gone."""
        found, self._waiting = list(self._waiting.values()), {}
        for one in found:
            one.forget()
