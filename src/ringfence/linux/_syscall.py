"""System calls that Python has no function for, each as a checked function, by ctypes.

Importing ctypes costs some milliseconds, so this module is imported by the function that needs it.
"""

from __future__ import annotations

import ctypes
import errno

from ringfence.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["NUMBERS", "system_call"]

# The same on every architecture: all are from after the tables were unified in Linux 5.1.
NUMBERS = {
    "open_tree": 428,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}

_HELP = {
    errno.ENOSYS: "this kernel was built without it",
    errno.EOPNOTSUPP: "it is switched off at boot",
}

_libc = ctypes.CDLL(None, use_errno=True)


def system_call(name: str, *types: Any) -> Callable[..., int]:
    """The system call `name` of NUMBERS, as a function of arguments of the given ctypes types.

    The function returns the call's result, and raises KernelError with the call's name and arguments where it
    is negative.
    """
    prototype = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, *types, use_errno=True)
    function = prototype(("syscall", _libc))

    def check(result: Any, _function: Any, arguments: tuple[Any, ...]) -> Any:
        if result >= 0:
            return result
        number = ctypes.get_errno()
        # A structure is shown by its size: its bytes mean nothing to a reader.
        shown = [len(one) if isinstance(one, bytes) else one for one in arguments[1:]]
        raise KernelError(name, shown, number, _HELP.get(number))

    function.errcheck = check
    number = NUMBERS[name]
    return lambda *arguments: function(number, *arguments)
