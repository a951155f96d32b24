"""System calls that Python has no function for, each as a checked function.

By `_ctypes`, which the module ctypes wraps: importing that one too takes a millisecond, in which a container starts.
"""

from __future__ import annotations

import errno
from _ctypes import FUNCFLAG_CDECL, FUNCFLAG_USE_ERRNO, CFuncPtr, _SimpleCData, dlopen, dlsym, get_errno

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

# As array and struct have them: int, unsigned int, long, size_t (unsigned long), and bytes that end with a zero byte.
_TYPES = {code: type(f"_{code}", (_SimpleCData,), {"_type_": code}) for code in "iIlLz"}


class _Function(CFuncPtr):
    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _TYPES["l"]


_address = dlsym(dlopen(None, 0), "syscall")  # type: ignore[arg-type]  # None: of this program and its libraries


def system_call(name: str, types: str) -> Callable[..., int]:
    """The system call `name` of NUMBERS, as a function of arguments of these types, a letter of _TYPES each.

    The function returns the call's result, and raises KernelError with the call's name and arguments where it
    is negative.
    """
    function: Any = _Function(_address)
    function.argtypes = (_TYPES["l"], *(_TYPES[code] for code in types))

    def check(result: Any, _function: Any, arguments: tuple[Any, ...]) -> Any:
        if result >= 0:
            return result
        number = get_errno()
        # A structure is shown by its size: its bytes mean nothing to a reader.
        shown = [len(one) if isinstance(one, bytes) else one for one in arguments[1:]]
        raise KernelError(name, shown, number, _HELP.get(number))

    function.errcheck = check
    number = NUMBERS[name]
    return lambda *arguments: function(number, *arguments)
