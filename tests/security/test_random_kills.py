"""Callers, launchers, inits and workloads are killed at random moments, and nothing is left behind: no process, no
cgroup, no folder, no mount, no interface; and no run tells what isn't so, or hangs.

The seed is in the failure's message. RINGFENCE_SEED repeats a storm, as far as a machine does.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import leaks
from support.sandboxes import need_root
from support.storm import Storm, for_anybody

UID = 64001  # an unprivileged caller's
# How many kills make up a storm, and how long it may take in the usual run of the tests, seconds.
FEW, MOST_S = 60, 25
MANY = 500


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("RINGFENCE_SEED") or random.SystemRandom().getrandbits(30))


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="storm-") as made:
        for_anybody(Path(made), UID)
        yield Path(made)


def rage(storm: Storm, seed: int, kills: int, most_s: float) -> None:
    mounts, interfaces = leaks.host_mounts(), leaks.interfaces()
    storm.run(kills, until=time.monotonic() + most_s)
    told = f"seed {seed}: {storm.report()}"
    print(told)
    assert not storm.left, f"{told}\n" + "\n".join(storm.left)
    assert not storm.unexpected, f"{told}\n" + "\n".join(storm.unexpected[:20])
    assert leaks.host_mounts() == mounts
    assert leaks.interfaces() == interfaces
    # It was a storm: of each kind there were some, and there were runs that nobody killed.
    assert sum(storm.kills.values()) >= kills / 3
    assert kills < MANY or storm.kills.keys() == storm.kinds.keys()
    assert storm.ends["exited 0"] > 0


def test_a_short_storm(seed: int) -> None:
    need_root()
    rage(Storm(seed), seed, FEW, MOST_S)


def test_a_short_storm_over_an_unprivileged_caller(seed: int, folder: Path) -> None:
    need_root()
    rage(Storm(seed, uid=UID, folder=folder), seed, FEW, MOST_S)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_long_storm(seed: int) -> None:
    need_root()
    rage(Storm(seed), seed, MANY, 1700)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_long_storm_over_an_unprivileged_caller(seed: int, folder: Path) -> None:
    need_root()
    rage(Storm(seed, uid=UID, folder=folder), seed, MANY, 1700)
