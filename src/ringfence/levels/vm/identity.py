"""What tells one guest from another: guests that are restored from one template start as the same machine.

The kernel's own (boot_id, the random pool) is made anew by the guest's kernel out of the seed in its PLAN.
"""

from __future__ import annotations

import os

from ringfence.wire import messages
from ringfence.wire.messages import INSIDE, NODEV, NOEXEC, NOSUID, OPTIONAL, RDONLY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.wire.messages import MountStep

__all__ = ["identity_steps"]

_HIDDEN = b"/.machine-id"


def identity_steps() -> tuple[list[MountStep], list[MountStep]]:
    """A machine-id of its own (machine-id(5)), where the image has one: what is made, and what is mounted over that."""
    flags = RDONLY | NOSUID | NODEV | NOEXEC | INSIDE | OPTIONAL
    made = messages.file(_HIDDEN, os.urandom(16).hex().encode() + b"\n", 0o444)
    return [made], [messages.bind(b"/etc/machine-id", _HIDDEN, flags), messages.mask(_HIDDEN)]
