"""The tests of the process and the container level once more, in a guest of our own: on another kernel (Debian's 6.1),
on nothing but cgroup v2, as root and as an unprivileged user with a delegated cgroup, both at once in one guest.

What of the suite runs there, and what can't, is in the tables of support/in_a_guest.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support import foreign, in_a_guest
from support.guest import Suite, run_suites
from support.sandboxes import need_level, need_root

CALLERS = ("root", "user")
# How long a suite may take in the guest, seconds: idle, some 180 and some 900.
SOME_S, EVERYTHING_S = 700, 3000
# What of the tests must at least have passed, so that a suite that skips its way through doesn't count.
LEAST = {"root": 130, "user": 60}


@pytest.fixture(scope="module")
def guest() -> Callable[[bool], tuple[dict[str, Suite], str]]:
    """Both suites, run once for the tests below."""
    found: dict[bool, tuple[dict[str, Suite], str]] = {}

    def get(everything: bool) -> tuple[dict[str, Suite], str]:
        need_root()
        need_level("vm")
        if everything not in found:
            seconds = EVERYTHING_S if everything else SOME_S
            selection = (*in_a_guest.SOME, *in_a_guest.MORE) if everything else in_a_guest.SOME
            found[everything] = run_suites(*selection, seconds=seconds, everything=everything)
        return found[everything]

    return get


def check(who: str, suites: dict[str, Suite], least: int) -> None:
    suite = suites[who]
    failed = [f"{case.name}: {case.text}" for case in suite.cases if case.how == "failed"]
    assert not failed, f"{len(failed)} failed in the guest as {who}:\n\n" + "\n\n".join(failed)
    assert suite.status == 0, suite.printed
    skipped = {case.text.splitlines()[0] for case in suite.cases if case.how == "skipped"}
    unknown = {reason for reason in skipped if not in_a_guest.is_known(who, reason)}
    assert not unknown, unknown
    assert sum(case.how == "passed" for case in suite.cases) >= least, suite.printed


@pytest.mark.timeout(900)
@pytest.mark.parametrize("who", CALLERS)
def test_the_suite_passes_in_a_guest(who: str, guest: Callable[[bool], tuple[dict[str, Suite], str]]) -> None:
    check(who, guest(False)[0], LEAST[who])


@pytest.mark.timeout(900)
def test_nothing_is_left_in_the_guest(guest: Callable[[bool], tuple[dict[str, Suite], str]]) -> None:
    assert guest(False)[1] == ""


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("who", CALLERS)
def test_more_passes_in_a_guest(who: str, guest: Callable[[bool], tuple[dict[str, Suite], str]]) -> None:
    suites, left = guest(True)
    check(who, suites, LEAST[who])
    assert left == ""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_other_tools_on_cgroup_v2() -> None:
    """What `inspect` says of these, with nothing but cgroup v2, and with every capability to give away."""
    need_root()
    need_level("vm")
    for package in foreign.TOOLS:
        foreign.need_tool(package)
    suites, left = run_suites("tests/levels/test_foreign.py", "-m", "long", seconds=SOME_S, everything=True)
    check("root", suites, 25)
    assert left == ""
