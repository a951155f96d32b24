"""Real guests that end, stand still or run out of what they have: a Result or a typed error, and soon.

What no real guest does on demand is played in test_hostile_vmm.py.
"""

from __future__ import annotations

import time

import pytest

import ringfence as rf
from ringfence.levels import drive
from support.sandboxes import ended, need_level

SECOND_NS = 10**9
# A boot and the end that is waited for, on a busy machine.
SOON_S = 60
HALT = "syscall(169, 0xfee1dead, 672274793, 0xcdef0123, 0) == 0 or die $!"  # reboot(2), LINUX_REBOOT_CMD_HALT


@pytest.fixture(autouse=True)
def here() -> None:
    need_level("vm")


def run(script: str, **options: object) -> rf.Result:
    began = time.monotonic()
    try:
        return rf.run(["sh", "-c", script], isolation="vm", **options)  # type: ignore[arg-type]
    finally:
        assert time.monotonic() - began < SOON_S


@pytest.mark.parametrize("how", ["c", "b"])
def test_a_kernel_that_panics_or_reboots(how: str) -> None:
    """Root in the guest may end its own kernel: so it does, and that is told."""
    with pytest.raises(
        rf.ProtocolError, match=r"while it ran: QEMU exited with status 0.*powers off, reboots or panics"
    ):
        run(f"echo {how} >/proc/sysrq-trigger; sleep 30", user=0)


def test_a_kernel_that_halts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No event of QEMU's tells it, and nothing else would end the run."""
    monkeypatch.setattr(drive, "_SILENCE_NS", SECOND_NS)
    monkeypatch.setattr(drive, "_ANSWER_NS", 5 * SECOND_NS)
    with pytest.raises(rf.ProtocolError, match="stopped answering: nothing came for 5 s"):
        run(f"perl -e '{HALT}'; sleep 60", user=0, capabilities=["SYS_BOOT"])


def test_a_busy_guest_that_says_nothing_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: as silent, and at work."""
    monkeypatch.setattr(drive, "_SILENCE_NS", SECOND_NS // 2)
    monkeypatch.setattr(drive, "_ANSWER_NS", 20 * SECOND_NS)
    result = run("i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done; exit 3")
    assert ended(result) == ("exited", 3, None)


def test_a_guest_whose_disk_is_full() -> None:
    result = run("dd if=/dev/zero of=full bs=1M", limits=rf.Limits(disk="8M"))
    assert ended(result) == ("disk", 1, None)
    assert b"No space left" in result.stderr


def test_all_of_a_limit_can_be_used_by_the_first_of_a_template() -> None:
    """Which is the first to touch the template's pages: QEMU's own limit has to have room for these too."""
    # Twice 320 MB, as perl has the string and its copy. No other test of this process asks for a machine of that size.
    result = run("exec perl -e 'my $x = q(a) x (320 << 20); print length $x'", limits=rf.Limits(memory="790M"))
    assert ended(result) == ("exited", 0, None)


def test_a_guest_out_of_memory() -> None:
    """Without a limit of the caller's: the whole machine's memory."""
    result = run("exec perl -e 'push @all, q(a) x (8 << 20) while 1'")
    assert ended(result) == ("memory", None, 9)
    assert result.usage.oom_kills
