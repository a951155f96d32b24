"""Which version of Landlock this kernel has. Apart from `landlock`, as most who ask make no ruleset."""

from __future__ import annotations

import errno

from ringfence.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DEVICE_CONTROL_ABI", "NETWORK_ABI", "SCOPES_ABI", "TRUNCATE_ABI", "abi", "create_ruleset"]

# From which version on each is handled.
TRUNCATE_ABI = 3
NETWORK_ABI = 4
DEVICE_CONTROL_ABI = 5
SCOPES_ABI = 6

_CREATE_RULESET_VERSION = 1

_known_abi: int | None = None
_known_call: Callable[..., int] | None = None


def abi() -> int:
    """The version of Landlock that this kernel has (7 with Linux 6.15); 0 where it has none or it is off."""
    global _known_abi
    if _known_abi is None:
        try:
            _known_abi = create_ruleset()(None, 0, _CREATE_RULESET_VERSION)
        except KernelError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            _known_abi = 0
    return _known_abi


def create_ruleset() -> Callable[..., int]:
    """landlock_create_ruleset(2)."""
    global _known_call
    if _known_call is None:
        from ringfence.linux._syscall import system_call

        _known_call = system_call("landlock_create_ruleset", "zLI")
    return _known_call
