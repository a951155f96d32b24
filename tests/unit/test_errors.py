"""The exception tree: its shape, its one-line messages, and that all of it can be pickled."""

from __future__ import annotations

import errno
import pickle

import pytest

from ringfence import errors
from ringfence.errors import (
    CannotEnforce,
    KernelError,
    ProtocolError,
    RingfenceError,
    SpecError,
    StartError,
    Unavailable,
    Unmet,
    WorkloadFailed,
)
from ringfence.result import Result

MEMORY = Unmet("memory", 268435456, "no memory controller", "run 'ringfence doctor'")
PIDS = Unmet("pids", 64, "no pids controller")
EXAMPLES: list[RingfenceError] = [
    RingfenceError("something"),
    SpecError("memory must be positive, not 0"),
    MEMORY,
    CannotEnforce("process", [MEMORY, PIDS]),
    Unavailable("vm", "QEMU is not installed", "run 'ringfence setup'"),
    StartError("exec", "execve", errno.ENOENT, "/bin/nope"),
    KernelError("mount", ("overlay", "/x"), errno.EPERM, "needs CAP_SYS_ADMIN"),
    ProtocolError("frame of 99 bytes"),
    WorkloadFailed(Result(isolation="vm", termination_reason="exited", exit_code=3)),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_pickles_with_type_message_and_fields(error: RingfenceError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)

    def fields(one: RingfenceError) -> dict[str, str]:
        return {name: repr(value) for name, value in vars(one).items()}

    assert fields(again) == fields(error)


def test_every_exported_error_is_a_ringfence_error_and_drawn_in_the_docstring() -> None:
    classes = [getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)]
    assert len(classes) == 9
    for cls in classes:
        assert issubclass(cls, RingfenceError)
        assert cls.__name__ in (errors.__doc__ or "")
    assert {type(error) for error in EXAMPLES} == set(classes)


def test_messages_are_one_line_with_call_arguments_and_help() -> None:
    assert str(EXAMPLES[6]) == 'mount("overlay", "/x"): EPERM (needs CAP_SYS_ADMIN)'
    assert str(KernelError("openat", (3, b'a\n"b\xff'), errno.ENOENT)) == (
        r'openat(3, "a\n\"b\udcff"): ENOENT (No such file or directory)'
    )
    assert str(EXAMPLES[5]) == 'exec: execve("/bin/nope"): ENOENT (No such file or directory)'
    assert str(EXAMPLES[4]) == ("vm isolation is unavailable here: QEMU is not installed (run 'ringfence setup')")
    assert str(MEMORY) == "memory: no memory controller (run 'ringfence doctor')"
    assert str(EXAMPLES[8]) == "the workload exited with status 3"
    for error in EXAMPLES:
        assert "\n" not in str(error)


def test_spec_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="positive"):
        raise SpecError("memory must be positive, not 0")


def test_cannot_enforce_is_a_group_that_names_every_rule() -> None:
    error = CannotEnforce("process", [MEMORY, PIDS])
    assert str(error) == (
        "process isolation can't enforce here: memory (no memory controller); pids (no pids controller)"
    )
    assert error.unmet == (MEMORY, PIDS)
    assert error.isolation == "process"
    caught: list[BaseException] = []
    try:
        raise error
    except* Unmet as group:
        caught.extend(group.exceptions)
    assert caught == [MEMORY, PIDS]


def test_cannot_enforce_splits_into_its_own_kind() -> None:
    error = CannotEnforce("container", [MEMORY, PIDS])
    part = error.subgroup(lambda one: getattr(one, "rule", "") == "pids")
    assert isinstance(part, CannotEnforce)
    assert part.unmet == (PIDS,)
    assert part.isolation == "container"
    assert "memory" not in str(part)


def test_errno_names() -> None:
    assert StartError("exec", "execve", errno.EACCES).errno_name == "EACCES"
    assert StartError("exec", "execve", errno.EACCES).strerror == "Permission denied"
    assert StartError("exec", "execve", 9999).errno_name == "errno 9999"
    assert KernelError("clone3", (), errno.ENOSPC).errno_name == "ENOSPC"
