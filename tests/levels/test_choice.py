"""`isolation="auto"` and `require=`, by real measurements: what is chosen and refused, and that it is what runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ringfence as rf
from ringfence.comparison.choice import judged, measure
from ringfence.comparison.facts import bare_facts, level_facts
from ringfence.comparison.isolation import judge_all
from ringfence.spec import Spec
from support.sandboxes import SOURCES, need, need_level, need_root


@pytest.fixture(scope="module")
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def no_guests(level_is_there: None, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own: everything is measured, once, and there is no guest kernel, so no vm level."""
    monkeypatch.setenv("RINGFENCE_CACHE", str(empty_cache))
    monkeypatch.delenv("RINGFENCE_KERNEL", raising=False)


@pytest.fixture
def namespace() -> str:
    return os.readlink("/proc/self/ns/net")


def test_what_is_chosen_is_what_runs(no_guests: None, namespace: str) -> None:
    look = ["readlink", "/proc/self/ns/net"]
    cheap = rf.run(look, isolation="auto", require={"files": "restricted"}, text=True)
    assert (cheap.isolation, cheap.stdout.strip()) == ("process", namespace)
    own = rf.run(look, isolation="auto", require={"network": "own", "IPC": "own"}, text=True)
    assert own.isolation == "container"
    assert own.stdout.strip() not in ("", namespace)
    assert own.choice is not None
    assert own.choice.isolation == "container"
    assert "process does not: network is restricted" in own.choice.why
    assert own.to_json()["choice"]["require"] == {"network": "own", "IPC": "own"}
    assert rf.run(look, isolation="process").choice is None


def test_what_the_spec_itself_opens_is_seen(no_guests: None) -> None:
    """The same requirement, that a container meets, is refused as soon as the spec shares what it is about."""
    for options in ({"network": "host"}, {"namespaces": {"net": "host"}}):
        with pytest.raises(rf.CannotEnforce) as caught:
            rf.run(["true"], isolation="container", require={"network": "own"}, **options)
        (unmet,) = caught.value.unmet
        assert (unmet.rule, unmet.requested) == ("require", {"network": "own"})
        assert "network is shared (the host's" in unmet.reason
    with pytest.raises(rf.CannotEnforce, match="joined"):
        rf.run(["true"], require={"host name": "own"}, namespaces={"uts": os.getpid()})


def test_a_limit_is_what_makes_a_resource_restricted(no_guests: None) -> None:
    require = {"memory": "restricted"}
    with pytest.raises(rf.CannotEnforce, match="no limit asked for"):
        rf.run(["true"], isolation="auto", require=require)
    found = rf.run(["true"], isolation="auto", require=require, limits=rf.Limits(memory="2M"))
    assert found.choice is not None
    assert "at most 2 MiB" in found.choice.levels[0].judged[0].evidence


def test_a_rule_that_only_one_level_has_leads_to_it(no_guests: None) -> None:
    found = rf.run(["hostname"], isolation="auto", hostname="worker", text=True)
    assert (found.isolation, found.stdout) == ("container", "worker\n")
    assert found.choice is not None
    assert "process does not: hostname: a process has the host's name" in found.choice.why


def test_none_is_an_error_with_each_levels_reason_and_nothing_is_run(no_guests: None, tmp_path: Path) -> None:
    with pytest.raises(rf.CannotEnforce) as caught:
        rf.run(["touch", str(tmp_path / "ran")], isolation="auto", require={"kernel": "own"})
    reasons = [one.reason for one in caught.value.unmet]
    assert [one.split(":")[0] for one in reasons] == ["process", "container", "vm"]
    assert "the same boot id" in reasons[0]
    assert "unavailable here" in reasons[2]
    assert not (tmp_path / "ran").exists()


def test_a_sandbox_and_a_pool_choose_too(no_guests: None) -> None:
    require = {"processes": "own"}
    with rf.Sandbox(isolation="auto", require=require) as sandbox:
        assert (sandbox.isolation, sandbox.run(["true"]).isolation) == ("container", "container")
        assert sandbox.choice is not None
        sandbox.set_limits(rf.Limits(output="1M"))
    with rf.Pool(1, isolation="auto", require=require) as pool:
        done = pool.run(["true"])
        assert (pool.isolation, done.isolation, done.choice is None) == ("container", "container", False)
    with pytest.raises(rf.CannotEnforce):
        rf.Sandbox(isolation="process", require=require)


@pytest.mark.parametrize("isolation", ["process", "container"])
def test_the_verdicts_are_those_of_a_comparison(no_guests: None, isolation: str) -> None:
    spec = Spec.make(["true"], isolation=isolation)
    ours = judged.verdicts(spec, measure.Here(rf.host()))
    facts = level_facts(isolation)
    # By which it is known that there is no other kernel, whatever /proc shows.
    assert facts["level"] == isolation
    assert [one["level"] for one in measure.Here(rf.host()).facts(spec)] == ["bare", isolation]
    theirs = judge_all(bare_facts(), facts)
    files = {"files"}  # which are judged by the spec as well
    assert {name: str(one.isolation) for name, one in ours.items() if name not in files} == {
        name: str(one.isolation) for name, one in theirs.items() if name not in files
    }


# What is seen before and after unshare(2), by `choose`, by `compare` and by its probes.
_MOVES = """
import ctypes, json, os, sys
import ringfence as rf
from ringfence.comparison import facts, probes_run
def told():
    one = rf.choose(isolation="process", require={"host name": "own", "files": "restricted"}).levels[0]
    try:
        facts.level_facts("process")
        summary = ""
    except rf.RingfenceError as error:
        summary = str(error)
    _, refused = probes_run.look(["process"], lambda text: None)
    return [{row.resource: [row.verdict, row.evidence] for row in one.judged}, summary, refused]
before = told()
library = ctypes.CDLL(None, use_errno=True)
new_uts, new_user = 0x04000000, 0x10000000
if library.unshare(new_uts if os.geteuid() == 0 else new_uts | new_user):
    sys.exit(f"unshare: {os.strerror(ctypes.get_errno())}")
print(json.dumps([before, told()]))
"""


def test_a_caller_that_has_left_its_namespaces_gets_no_verdicts(no_guests: None) -> None:
    """What is the sandboxes' and not the caller's any more isn't their own for that."""
    done = subprocess.run(
        [sys.executable, "-c", _MOVES],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    need("user namespaces", not done.stderr.startswith("unshare: "))
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    assert {name: word for name, (word, _) in before[0].items()} == {"host name": "restricted", "files": "restricted"}
    assert before[1:] == ["", {}]
    assert {name: word for name, (word, _) in after[0].items()} == {"host name": "unknown", "files": "unknown"}
    for reason in (after[0]["host name"][1], after[1], after[2]["process"]):
        assert "the caller is in other namespaces (" in reason
        assert "uts" in reason


_CHROOT = """
import os, sys
import ringfence as rf
from ringfence.comparison import facts
assert rf.run(["true"], isolation="process").ok
facts.check_namespaces()
os.chroot(sys.argv[1])
try:
    facts.check_namespaces()
except rf.RingfenceError as error:
    print(error)
"""


def test_neither_does_one_that_has_another_root_since(tmp_path: Path) -> None:
    need_root()  # to mount, and for chroot(2)
    (tmp_path / "proc").mkdir()
    script = 'mount -t proc none "$1/proc" && exec "$2" -P -c "$3" "$1"'
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(tmp_path), sys.executable]
    done = subprocess.run([*words, _CHROOT], capture_output=True, text=True, timeout=60, check=False)
    assert "the caller is in other namespaces (root) than" in done.stdout, done


def test_an_image_without_a_shell_is_looked_at_all_the_same(no_guests: None, tmp_path: Path) -> None:
    (tmp_path / "root" / "usr").mkdir(parents=True)
    found = rf.choose(isolation="container", image=str(tmp_path / "root"), require={"mounts": "own", "files": "own"})
    assert {one.resource: one.verdict for one in found.levels[0].judged} == {"mounts": "own", "files": "restricted"}


def ringfence(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ringfence", *words],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_line_chooses_explains_and_refuses(no_guests: None) -> None:
    done = ringfence("run", "-i", "auto", "--require", "network=own", "-v", "--", "echo", "here")
    assert (done.returncode, done.stdout) == (0, "here\n")
    assert done.stderr.startswith("chosen: container is the cheapest that gives network=own; process does not: ")
    refused = ringfence("run", "-i", "auto", "--require", "kernel=own", "--", "echo", "here")
    assert (refused.returncode, refused.stdout) == (125, "")
    assert "require: process: kernel is shared" in refused.stderr
    there = ringfence("choose", "--require", "network=own")
    assert there.returncode == 0
    assert there.stdout.splitlines()[-1].startswith("container is the cheapest")
    told = ringfence("choose", "--require", "kernel=own", "--json")
    assert (told.returncode, json.loads(told.stdout)["isolation"]) == (1, None)


def test_a_kernel_of_its_own_is_a_guests() -> None:
    need_level("vm")
    found = rf.run(["uname", "-r"], isolation="auto", require={"kernel": "own", "network": "own"}, text=True)
    assert found.isolation == "vm"
    assert found.stdout.strip() != os.uname().release
    assert found.choice is not None
    costs = [one.start_ns for one in found.choice.levels]
    assert costs == sorted(costs, key=lambda one: one or 0)
    assert all(costs)
