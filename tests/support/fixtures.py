"""The fixtures of every test that runs sandboxes: `from support.fixtures import *` in a conftest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import ringfence as rf
from support import leaks
from support.sandboxes import LEVELS, LOCAL_LEVELS, need_level

__all__ = ["level_is_there", "nothing_leaks"]

_warm: set[str] = set()


def _warm_up(isolation: str) -> None:
    """The first run opens what stays as long as this process: launcher, run folder, cgroups, trees, caches."""
    if isolation not in _warm:
        rf.run(["true"], isolation=isolation)
        _warm.add(isolation)


@pytest.fixture(autouse=True)
def level_is_there(request: pytest.FixtureRequest) -> None:
    """Skips, by name, what this machine lacks for the level; warms it up."""
    callspec = getattr(request.node, "callspec", None)
    isolation = callspec.params.get("isolation") if callspec is not None else None
    # A test of one level may well have neighbours of the two that cost nothing to start.
    for one in dict.fromkeys(LEVELS if isolation is None else (*LOCAL_LEVELS, isolation)):
        need_level(one)
        _warm_up(one)


@pytest.fixture(autouse=True)
def nothing_leaks(level_is_there: None) -> Iterator[None]:
    """After each test: no new process, mount, cgroup, interface, socket, folder or descriptor."""
    before = leaks.snapshot()
    yield
    found = leaks.leaked(before)
    assert not found, f"left behind: {found}"
