"""The sandbox that is made before it is asked for: used once, only for its kind, and gone with the caller."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.api import level
from ringfence.levels.ready import kind_of
from ringfence.levels.root import HOST_TEMPLATE
from ringfence.levels.state import State, state
from ringfence.spec import Spec
from support import leaks
from support.sandboxes import EXITED_0, LOCAL_LEVELS, ended, need_root, python, run_probe


@pytest.fixture(autouse=True)
def _none_waits() -> Any:
    state().ready.clear()
    yield
    state().ready.clear()


def waiting() -> list[Any]:
    return list(state().ready._waiting.values())


def inits() -> list[leaks.Process]:
    """Those that wait: nothing else of ours runs."""
    return leaks.settled_to(lambda: [one for one in below() if one.parent == state().launcher.pid])


def preforked() -> list[leaks.Process]:
    """The commands' processes that wait to be told what to execute."""
    return leaks.settled_to(lambda: [one for one in below() if one.parent != state().launcher.pid])


def below() -> list[leaks.Process]:
    """All of ours, but for those that have ended and weren't reaped yet."""
    found = leaks.descendants(state().launcher.pid)
    return [one for one in found if one.name.startswith("ringfence-core") and leaks.is_alive(one)]


def run(isolation: str, **options: Any) -> rf.Result:
    result = run_probe(isolation, "exit", "0", **options)
    assert ended(result) == EXITED_0
    return result


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_made_from_the_second_run_of_a_kind_on_and_used_once(isolation: str) -> None:
    run(isolation)
    assert not waiting()  # a single run pays for no other
    run(isolation)
    (first,) = waiting()
    (before,) = inits()
    run(isolation)
    (second,) = waiting()
    assert second is not first
    assert first.channel is None  # it was taken, and has ended
    assert before.key not in [one.key for one in inits()]


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_it_serves_whatever_comes_with_the_command(isolation: str) -> None:
    for number in range(4):
        result = rf.run(
            ["sh", "-c", "cat in; cat; echo $X >out; exit $X"],
            isolation=isolation,
            files={"in": f"file {number} "},
            input=f"input {number}",
            env={"X": str(number)},
            collect=["out"],
            limits=rf.Limits(wall_time=20 + number, output=100 + number),
        )
        assert (result.exit_code, result.stdout) == (number, b"file %d input %d" % (number, number))
        assert result.files == {"out": f"{number}\n".encode()}


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_another_kind_gets_none_of_it(isolation: str) -> None:
    for memory in (64 << 20, 64 << 20, 96 << 20, 64 << 20):
        result = run(isolation, limits=rf.Limits(memory=memory))
        assert [one.effective for one in result.applied if one.rule == "memory"] == [memory]


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_no_more_than_two_wait(isolation: str) -> None:
    for pids in (20, 20, 30, 30, 40, 40):
        run(isolation, limits=rf.Limits(pids=pids))
    first = set(state().ready._waiting)
    assert len(waiting()) == 2
    assert not leaks.settled(lambda: len(inits()) != 2, 2.0)
    # Those that come again keep their place; one that doesn't any more makes room.
    for _ in range(10):
        run(isolation, limits=rf.Limits(pids=40))
    assert len(waiting()) == 2
    assert len(first & set(state().ready._waiting)) == 1


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_one_that_was_killed_is_replaced(isolation: str) -> None:
    run(isolation)
    run(isolation)
    (init,) = inits()
    os.kill(init.pid, signal.SIGKILL)
    leaks.settled(lambda: init.pid in leaks.processes(), 2.0)
    run(isolation)


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_its_command_is_restricted_before_it_is_known(isolation: str) -> None:
    run(isolation)
    run(isolation)
    (command,) = preforked()
    about: dict[str, str] = {}

    def restricted() -> bool:
        text = Path(f"/proc/{command.pid}/status").read_text()
        for line in text.splitlines():
            name, _, value = line.partition(":\t")
            about[name] = value
        return about["Seccomp"] == "2" and len(os.listdir(f"/proc/{command.pid}/fd")) == 1

    leaks.settled(lambda: not restricted(), 2.0)
    assert (about["Seccomp"], about["NoNewPrivs"]) == ("2", "1")
    assert {about[f"Cap{name}"] for name in ("Eff", "Prm", "Inh", "Amb")} == {"0" * 16}
    # Only the socket by which init will tell it: no channel, no file of the host's, no cgroup.
    (descriptor,) = os.listdir(f"/proc/{command.pid}/fd")
    assert os.readlink(f"/proc/{command.pid}/fd/{descriptor}").startswith("socket:")
    uids = about["Uid"].split()
    assert len(set(uids)) == 1
    if os.geteuid() == 0:
        assert int(uids[0]) >= 0x70000000
    assert "ringfence-" in Path(f"/proc/{command.pid}/cgroup").read_text()


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_command_that_died_before_it_was_told_is_started_anew(isolation: str) -> None:
    run(isolation)
    run(isolation)
    (init,) = inits()
    (command,) = preforked()
    os.kill(command.pid, signal.SIGKILL)
    leaks.settled(lambda: command.pid in leaks.processes(), 2.0)
    assert [one.key for one in inits()] == [init.key]
    run(isolation)
    assert not leaks.settled(lambda: init.key in [one.key for one in below()], 1.0)


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_command_too_long_to_be_told_is_started_anew(isolation: str) -> None:
    run(isolation)
    run(isolation)
    result = rf.run(["sh", "-c", "echo ${#1}", "sh", "x" * 100_000], isolation=isolation)
    assert result.stdout == b"100000\n"


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_it_ends_with_a_caller_that_is_killed(isolation: str) -> None:
    caller = python(
        """
import sys, threading
import ringfence as rf
for _ in range(3):
    rf.run(["true"], isolation=sys.argv[1])
print("done", flush=True)
threading.Event().wait()
""",
        isolation,
    )
    try:
        assert caller.stdout is not None
        assert caller.stdout.readline() == b"done\n"
        # The launcher, and the init that waits.
        assert not leaks.settled(lambda: len(leaks.descendants(caller.pid)) < 2, 1.0)
        before = leaks.descendants(caller.pid)
    finally:
        caller.kill()
        caller.communicate(timeout=10)

    def left() -> list[object]:
        everyone = leaks.processes()
        alive: list[object] = [one for one in before if one.pid in everyone and everyone[one.pid].start == one.start]
        return alive + sorted(leaks.cgroups_of(caller.pid)) + sorted(leaks.run_folders_of(caller.pid))

    assert not leaks.settled(left, leaks.GRACE_S)


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_forked_child_leaves_it_to_its_parent(isolation: str) -> None:
    run(isolation)
    run(isolation)
    (kept,) = waiting()
    (init,) = inits()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if not state().ready._waiting and rf.run(["true"], isolation=isolation).exit_code == 0 else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    time.sleep(0.05)
    assert waiting() == [kept]
    assert [one.key for one in inits()] == [init.key]
    run(isolation)


def test_what_may_change_until_the_call_is_never_made_ahead(tmp_path: Path) -> None:
    from ringfence.levels.host import host

    def kind(**options: Any) -> object:
        return kind_of(Spec.make(["true"], **options), host())

    assert kind() == kind(env={"A": "1"}, input=b"x", files={"f": b""}, limits=rf.Limits(wall_time=1))
    assert kind() != kind(hostname="other")
    assert kind() != kind(network="host")
    assert kind() != kind(limits=rf.Limits(cpu_time=1))
    assert kind(user=1000) != kind(user=1001)
    for options in (
        {"mounts": [rf.Mount("/usr", "/mnt")]},
        {"image": tmp_path},
        {"user": "nobody"},
        {"network": "nat"},
        {"overlay": True},
        {"capabilities": ["net_raw"]},
        {"seccomp": "unconfined"},
        {"devices": ["/dev/null"]},
        {"readable": ["/usr"]},
        {"namespaces": {"net": "host"}},
    ):
        assert kind(**options) is None


def test_the_launcher_begins_while_others_look_at_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_root()
    run("container")
    made: list[bytes] = []
    monkeypatch.setattr(State, "template", lambda self, name, make: made.append(name))
    level("container").begin(Spec.make(["true"]))
    assert made == [HOST_TEMPLATE]
    level("container").begin(Spec.make(["true"], image=tmp_path))
    assert made == [HOST_TEMPLATE]  # which a sandbox of an image has no use for

    def fails(self: State, name: bytes, make: Any) -> None:
        raise rf.KernelError("mount", ["/"], 1, "")

    monkeypatch.setattr(State, "template", fails)
    level("container").begin(Spec.make(["true"]))
    with pytest.raises(rf.KernelError):
        run("container")


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_work_directory_that_somebody_cleaned_away_is_replaced(isolation: str) -> None:
    for _ in range(2):
        run(isolation)
    (one,) = waiting()
    name = one.berth.name
    state().ready.clear()
    os.rmdir(os.path.join(state().run_path, name))  # its berth is the one that the next run takes
    result = rf.run(["sh", "-c", "echo x > file && cat file"], isolation=isolation)
    assert (result.ok, result.stdout) == (True, b"x\n")
