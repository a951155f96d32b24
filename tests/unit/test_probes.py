"""How probes are judged, each way by itself and the whole catalogue; what the probe's own verbs for them print."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ringfence.comparison import probes_place, surface
from ringfence.comparison.facts import ATTEMPTS, bare_facts
from ringfence.comparison.isolation import Isolation
from ringfence.comparison.probes import (
    GROUPS,
    Probe,
    Seen,
    Way,
    between,
    fewer,
    instance,
    overload,
    reach,
    same,
)
from ringfence.comparison.probes_catalogue import PROBES
from ringfence.comparison.probes_place import Place
from ringfence.comparison.probes_table import counts
from ringfence.comparison.surface import judge as judge_surface
from ringfence.comparison.surface import parse as parse_surface
from ringfence.errors import ProtocolError
from ringfence.wire.launcher import probe_path
from support.probes import VERDICTS

RECORDED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("compare_facts.json").read_text())
OWN, RESTRICTED, SHARED, NOT_TESTABLE = (
    Isolation.OWN,
    Isolation.RESTRICTED,
    Isolation.SHARED,
    Isolation.NOT_TESTABLE,
)


def seen(level: str, **said: str) -> Seen:
    """The recorded facts of a level, with these answers to attempts, whose names have _ for a space."""
    return Seen(RECORDED[level], {name.replace("_", " "): answer for name, answer in said.items()})


def verdict(way: Way, host: Seen, inside: Seen) -> Isolation:
    found = way.judge(host, inside)
    assert found.evidence
    return found.isolation


# ---- the catalogue ----


def test_a_covered_boot_id_is_no_kernel_of_its_own() -> None:
    """What the place is, is with its facts; another tool's may be anything."""
    (probe,) = (one for one in PROBES if one.name == "kernel-identity")
    release, line = RECORDED["bare"]["kernel_release"], probe.way.attempt

    def at(level: str, boot_id: str) -> Seen:
        def ask(words: object, given: bytes) -> tuple[bytes, str]:
            facts = {"boot_id": boot_id, "kernel_release": release, "level": "said by the probe"}
            lines = [boot_id if one == line else "ok" for one in given.decode().splitlines()[1:]]
            return "\n".join([json.dumps(facts), *lines]).encode(), ""

        return Seen(*Place(ask, ask, level=level).ask_all(dict.fromkeys(("victim", "host", "disk", "cgroup"), "1")))

    host = at("bare", "one")
    told = {level: probe.way.judge(host, at(level, "other")).isolation for level in ("process", "container", "vm", "")}
    assert told == {"process": RESTRICTED, "container": RESTRICTED, "vm": OWN, "": OWN}
    assert probe.way.judge(host, at("vm", "one")).isolation is SHARED


def test_there_are_enough_of_every_group() -> None:
    assert len(PROBES) >= 60
    assert {one.group for one in PROBES} == set(GROUPS)
    assert [one.group for one in PROBES] == sorted((one.group for one in PROBES), key=GROUPS.index)
    names = [one.name for one in PROBES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("probe", PROBES, ids=lambda one: one.name)
def test_a_probe_is_told_in_sentences(probe: Probe) -> None:
    for sentence in (probe.tries, probe.why):
        assert sentence[0].isupper() or sentence.startswith(("flock", "clone3", "vsock"))
        assert sentence.endswith(".")
        assert len(sentence) < 120
    assert probe.name.replace("-", "").isalnum()
    assert probe.name.islower()


def test_the_catalogue_of_the_documentation_is_this_one() -> None:
    """With the verdicts that the tests of the levels expect."""
    text = (Path(__file__).parents[2] / "docs/design/probes.md").read_text()
    rows = [line for line in text.partition("## The catalogue")[2].splitlines() if line.startswith("| ")]
    found = [row for row in rows if not row.startswith("| probe |")]
    assert found == [f"| {one.name} | {one.tries} | {one.why} | {' | '.join(VERDICTS[one.name])} |" for one in PROBES]


def told_ok(probe: Probe) -> str:
    """An answer of an unconfined run that is one."""
    if probe.way.attempt.startswith("read "):
        return "a value"
    return "did 1 ok" if "attack" in probe.name else "ok"


def everything_worked(level: str) -> Seen:
    said = {one.way.attempt: told_ok(one) for one in PROBES if one.way.attempt}
    said |= {f"hold {one.way.attempt.split()[1]}": "ok" for one in PROBES if one.way.where == "pair"}
    facts = {**RECORDED[level], "groups": [4, 24]}
    return Seen(facts, said)


def test_the_host_against_itself_is_shared_in_everything() -> None:
    host = everything_worked("bare")
    assert {one.name: one.judge(host, host).isolation for one in PROBES} == dict.fromkeys(
        (one.name for one in PROBES), SHARED
    )


def test_nothing_is_claimed_where_the_control_fails() -> None:
    """Even where what is inside looks best."""
    facts = dict.fromkeys(RECORDED["bare"])
    host = Seen(facts, {one.way.attempt: "EPERM call" for one in PROBES if one.way.attempt})
    for one in PROBES:
        assert one.judge(host, everything_worked("container")).isolation is NOT_TESTABLE, one.name


def test_nothing_is_claimed_of_what_was_not_seen() -> None:
    host = everything_worked("bare")
    for one in PROBES:
        assert one.judge(host, Seen({}, {})).isolation in (NOT_TESTABLE, RESTRICTED), one.name
        if one.way.attempt:
            assert one.judge(host, Seen(RECORDED["container"], {})).isolation in (NOT_TESTABLE, RESTRICTED), one.name


NO_ANSWERS = [
    "timeout",
    "nothing said",
    "ringfence-probe: no such verb",
    "",
    "died signal 11",
    "died signal 9",
    "EAGAIN fork",
    "not tried: too little memory",
]


@pytest.mark.parametrize("said", NO_ANSWERS)
@pytest.mark.parametrize("level", ["process", "container", "vm"])
def test_an_attempt_that_gave_no_answer_proves_nothing(level: str, said: str) -> None:
    """Also where a namespace or a kernel of its own is known."""
    for way in (reach("try x"), reach("try x", private="pid", gone=True), reach("try x", kernel=False)):
        assert verdict(way, seen("bare", try_x="ok"), seen(level, try_x=said)) is NOT_TESTABLE
        assert verdict(way, seen("bare", try_x=said), seen(level, try_x="EPERM x")) is NOT_TESTABLE
    for way in (same(attempt="try x"), same(attempt="try x", kernel=False), same(attempt="try x", private="uts")):
        assert verdict(way, seen("bare", try_x="a value"), seen(level, try_x=said)) is NOT_TESTABLE
        assert verdict(way, seen("bare", try_x="a value"), seen(level)) is NOT_TESTABLE


# ---- the ways ----


def test_reach() -> None:
    host = seen("bare", try_x="ok")
    way = reach("try x")
    assert verdict(way, host, seen("container", try_x="ok")) is SHARED
    assert verdict(way, host, seen("container", try_x="EPERM x")) is RESTRICTED
    assert verdict(way, host, seen("container", try_x="ENOENT x")) is RESTRICTED
    assert verdict(way, host, seen("container", try_x="died signal 31")) is RESTRICTED
    assert verdict(way, host, seen("vm", try_x="ok")) is OWN
    assert verdict(reach("try x", kernel=False), host, seen("vm", try_x="ok")) is SHARED


def test_reach_what_is_gone_or_of_a_namespace() -> None:
    host = seen("bare", try_x="ok")
    assert verdict(reach("try x", gone=True), host, seen("process", try_x="ENOENT x")) is OWN
    assert verdict(reach("try x", gone=True), host, seen("process", try_x="EACCES x")) is RESTRICTED
    # In a namespace of its own it acted on another; in the host's it did not.
    assert verdict(reach("try x", private="uts"), host, seen("container", try_x="ok")) is OWN
    assert verdict(reach("try x", private="uts"), host, seen("process", try_x="ok")) is SHARED


FINDS = [one for one in PROBES if one.way.attempt.startswith("find ") and one.way.where == "inside"]


@pytest.mark.parametrize("probe", FINDS, ids=lambda one: one.name)
@pytest.mark.parametrize("level", ["process", "container", "vm"])
def test_what_was_found_of_the_callers_is_shared_whatever_is_known_of_the_boundary(level: str, probe: Probe) -> None:
    """A mark is named by a random token, so who finds it has found the caller's."""
    attempt = probe.way.attempt
    host = Seen(RECORDED["bare"], {attempt: "ok"})
    assert probe.judge(host, Seen(RECORDED[level], {attempt: "ok"})).isolation is SHARED
    if probe.name in ("files-temporary", "ipc-posix-memory"):  # files of the host's can be in a guest, too
        refused = probe.judge(host, Seen(RECORDED[level], {attempt: "EACCES open"}))
        assert refused.isolation is RESTRICTED


def test_the_call_and_its_errno_are_shown() -> None:
    found = reach("try x").judge(seen("bare", try_x="ok"), seen("process", try_x="EPERM sethostname"))
    assert (found.evidence, found.control) == ("sethostname: EPERM", "ok")
    failed = reach("try x").judge(seen("bare", try_x="ENOSYS init_module"), seen("process", try_x="ok"))
    assert failed.evidence == "the control fails: init_module: ENOSYS"


def channel(level: str, held: str, found: str, there: str = "ok", *, timed: bool = False) -> Isolation:
    host = Seen(RECORDED["bare"], {"find key {pair}": "ok", "hold key": "ok"})
    inside = Seen(RECORDED[level], {"find key {pair}": found, "hold key": held, "same key": there})
    return verdict(between("key", timed=timed), host, inside)


def test_between() -> None:
    assert channel("container", "ok", "ok") is SHARED
    assert channel("vm", "ok", "ok") is SHARED  # whatever the kernels, it was seen
    assert channel("container", "ok", "ENOKEY keyctl") is OWN
    assert channel("container", "ok", "EPERM keyctl") is RESTRICTED
    assert channel("container", "EPERM add_key", "ENOKEY keyctl") is RESTRICTED
    assert channel("vm", "EPERM add_key", "EPERM keyctl") is OWN
    assert channel("container", "ok", "timeout") is NOT_TESTABLE


def test_an_absence_counts_where_the_mark_is_found_by_who_has_set_it() -> None:
    """Else the holder may have ended, or this can't be found anywhere."""
    for level in ("process", "container", "vm"):
        for there in ("ENOKEY keyctl", "EPERM keyctl", "timeout", ""):
            assert channel(level, "ok", "ENOKEY keyctl", there) is NOT_TESTABLE
    assert channel("container", "ok", "EPERM keyctl", "ENOKEY keyctl") is RESTRICTED  # a refusal is one by itself
    # Chance, and no refusal.
    assert channel("process", "EADDRINUSE bind", "ok") is NOT_TESTABLE
    assert channel("vm", "EEXIST open", "EACCES open") is NOT_TESTABLE
    # What wasn't seen in some seconds may still be there.
    assert channel("container", "ok", "ENOENT read", timed=True) is RESTRICTED
    assert channel("vm", "ok", "ENOENT read", timed=True) is OWN


def test_same() -> None:
    way = same(attempt="read x")
    host = seen("bare", read_x="one")
    assert verdict(way, host, seen("container", read_x="one")) is SHARED
    assert verdict(way, host, seen("container", read_x="two")) is OWN
    assert verdict(way, host, seen("container", read_x="EACCES open")) is RESTRICTED
    assert verdict(way, host, seen("vm", read_x="one")) is OWN
    assert verdict(way, seen("bare", read_x="EACCES open"), seen("container", read_x="one")) is NOT_TESTABLE
    less = same(attempt="read x", differs=RESTRICTED)
    assert verdict(less, host, seen("container", read_x="two")) is RESTRICTED


def test_fewer() -> None:
    def count(level: str, number: int) -> Seen:
        return Seen({**RECORDED[level], "groups": list(range(number))}, {})

    way = fewer("groups", "groups")
    assert verdict(way, count("bare", 3), count("container", 2)) is RESTRICTED
    assert verdict(way, count("bare", 3), count("container", 3)) is SHARED
    assert verdict(way, count("bare", 3), count("vm", 9)) is OWN
    assert verdict(way, count("bare", 0), count("container", 0)) is NOT_TESTABLE  # none can't get less


def test_instance() -> None:
    assert verdict(instance("uts"), seen("bare"), seen("container")) is OWN
    assert verdict(instance("uts"), seen("bare"), seen("process")) is SHARED
    assert verdict(instance("uts"), seen("bare"), seen("vm")) is OWN
    assert verdict(instance("none"), seen("bare"), seen("container")) is NOT_TESTABLE


def test_overload() -> None:
    way = overload("fork x", "the limit", "pids", (" EAGAIN",))
    host = seen("bare", fork_x="forked 100 ok")

    def limited(level: str, said: str, *kept: str) -> Seen:
        return Seen({**RECORDED[level], "kept": list(kept)}, {"fork x": said})

    assert verdict(way, host, limited("container", "forked 62 EAGAIN", "pids")) is RESTRICTED
    assert verdict(way, host, limited("container", "forked 100 ok", "pids")) is SHARED
    assert verdict(way, host, limited("container", "forked 100 ok")) is SHARED
    assert verdict(way, host, limited("vm", "forked 62 EAGAIN", "pids")) is OWN
    assert verdict(way, seen("bare", fork_x="forked 9 EAGAIN"), limited("container", "ok", "pids")) is NOT_TESTABLE
    # What ended otherwise, or by a limit that isn't the sandbox's, was not held by it.
    for level in ("container", "vm"):
        assert verdict(way, host, limited(level, "forked 62 EAGAIN", "memory")) is NOT_TESTABLE
        for said in ("forked 62 ENOMEM", "died signal 11", "ended by killed by signal 9", "timeout"):
            assert verdict(way, host, limited(level, said, "pids")) is NOT_TESTABLE


def test_the_limit_of_memory_is_told_by_how_the_attack_ended() -> None:
    (one,) = (one for one in PROBES if one.name == "attack-memory")
    host = Seen(RECORDED["bare"], {one.way.attempt: "ok"})
    kept = {**RECORDED["container"], "kept": ["memory"]}
    for said, wanted in {
        "ended by the workload was stopped: it reached its memory limit": RESTRICTED,
        "ENOMEM mmap": RESTRICTED,
        "ended by signal 9": NOT_TESTABLE,
        "not tried: no limit holds it": NOT_TESTABLE,
    }.items():
        assert one.judge(host, Seen(kept, {one.way.attempt: said})).isolation is wanted, said


def test_counts() -> None:
    probes = {str(n): {"verdict": word} for n, word in enumerate(["own", "own", "shared", "not testable"])}
    assert counts(probes) == "4 probes: 2 own, 0 restricted, 1 shared, 1 not testable"


# ---- the probe's verbs ----


def probe(*words: str, given: str = "") -> list[str]:
    done = subprocess.run([probe_path(), *words], input=given, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


def test_each_tells_a_crash_a_kill_and_a_hang_and_goes_on() -> None:
    lines = [
        "exit 0",
        "signal 11",
        "spin 60",
        "no-such-verb",
        "both 1",
        "read /no/such/file",
        "cwd x",
        "exit 3",
        "argv last",
    ]
    found = probe("each", "0.5", given="".join(f"{line}\n" for line in lines))
    assert found == [
        "ok",
        "died signal 11",
        "timeout",
        "ringfence-probe: no such verb; try `ringfence-probe help`",
        "out 0; err 0",
        "ENOENT open",
        "usage: ringfence-probe cwd — print the working directory",
        "nothing said",
        "last ",
    ]


def test_each_does_not_wait_for_what_a_hung_attempt_has_started() -> None:
    assert probe("each", "0.3", given="spin-children 2 60\nexit 0\n") == ["timeout", "ok"]


def test_a_crash_of_an_attempt_starts_no_handler() -> None:
    """At a limit of 0 the kernel still starts one behind a pipe; at 1 it makes no core at all (core(5))."""
    (facts,) = probe("each", given="facts\n")
    assert json.loads(facts)["rlimits"]["core"] == [1, 1]


def test_the_benches_server_is_on_loopback_unless_it_is_told_otherwise() -> None:
    for words, elsewhere in (((), False), (("0.0.0.0",), True)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with subprocess.Popen([probe_path(), "bench-serve", str(port), "20", *words]) as server:
            try:
                connected = {one: tries(one, port) for one in ("127.0.0.1", "127.0.0.2")}
            finally:
                server.kill()
        assert connected == {"127.0.0.1": True, "127.0.0.2": elsewhere}


def tries(address: str, port: int) -> bool:
    """Whether a connection is made, the server being given time to begin where it should be there."""
    for _ in range(100 if address == "127.0.0.1" else 1):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((address, port), timeout=5):
            return True
        time.sleep(0.05)
    return False


def test_memory_is_not_taken_without_a_limit_where_little_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for the control, nor inside where the host can't limit it."""
    asked: list[list[str]] = []

    def ask(words: Sequence[str], given: bytes) -> tuple[bytes, str]:
        asked.append(list(words))
        return b"ok\n", ""

    monkeypatch.setattr(probes_place, "_free_memory", lambda: 1 << 29)
    (said,) = Place(ask, ask, kept={"pids"}).attack().values()
    assert said.startswith("not tried: ")
    assert asked == []
    assert Place(ask, ask, kept={"memory"}).attack() == {"try-memory 160M": "ok"}
    monkeypatch.setattr(probes_place, "_free_memory", lambda: 1 << 31)
    assert Place(ask, ask).attack() == {"try-memory 160M": "ok"}


def test_what_the_summary_creates_in_usr_has_another_name_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed one left would make the control fail for good."""
    given: list[bytes] = []

    def ran(words: Sequence[str], *, input: bytes, **_: object) -> subprocess.CompletedProcess[bytes]:
        given.append(input)
        return subprocess.CompletedProcess(words, 0, b"{}\n" + b"ok\n" * len(ATTEMPTS))

    monkeypatch.setattr(subprocess, "run", ran)
    for _ in range(2):
        bare_facts()
    names = [[line for line in one.split(b"\n") if line.startswith(b"try-create ")] for one in given]
    assert len(names[0]) == len(names[1]) == 1
    assert names[0] != names[1]


def test_a_surface_that_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\nexec sleep 60\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(surface, "probe_path", lambda: str(hangs))
    monkeypatch.setattr(surface, "_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(ProtocolError, match="did not end"):
        surface.surfaces([], lambda _: None)


def test_what_would_load_a_module_is_not_tried(tmp_path: Path) -> None:
    """Its names are whole words; where the file can't be read it is another boundary's, and the attempt is made."""
    listed = tmp_path / "listed"
    listed.write_text("235 autofs\n229 fuse-other\nloop")
    said = {
        f"{listed} autofs": "0 ",
        f"{listed} loop": "0 ",
        f"{listed} fuse": "ENODEV not-loaded",
        f"{listed} auto": "ENODEV not-loaded",
        f"{tmp_path}/none fuse": "0 ",
    }
    assert probe("each", given="".join(f"if-listed {one} argv 0\n" for one in said)) == list(said.values())
    of_modules = re.compile(r"try-socket (alg|vsock)|/dev/(kvm|fuse|loop)")
    loads = [one.way.attempt for one in PROBES if of_modules.search(one.way.attempt)]
    assert len(loads) == 5
    assert all(one.startswith("if-listed /proc/") for one in loads)


# ---- the surface ----


def test_a_call_is_judged_by_both_answers() -> None:
    names = {0: "read", 1: "bpf", 2: "old", 3: "newer", 4: "rare", 5: "gone"}
    outside = {0: "EBADF", 1: "EINVAL", 2: "ENOSYS", 3: "EFAULT", 4: "EPERM", 5: "ENOSYS", 6: "ENOSYS"}
    inside = {0: "EBADF", 1: "EPERM", 2: "ENOSYS", 3: "ENOSYS", 4: "EPERM", 5: "EPERM", 6: "ENOSYS"}
    assert judge_surface(outside, inside, names) == {
        "read": "reachable",
        "bpf": "denied EPERM",
        "old": "absent",
        "newer": "denied ENOSYS",
        "rare": "unknown EPERM",
        "gone": "absent",
    }
    killed = judge_surface(outside, {**inside, 0: "signal 31", 1: "signal 11"}, names)
    assert (killed["read"], killed["bpf"]) == ("denied signal 31", "reachable")


def test_without_a_boundary_nothing_is_denied() -> None:
    outside = {0: "EBADF", 1: "ENOSYS", 2: "exits", 3: "waits", 4: "signal 11"}
    found = judge_surface(outside, outside, dict.fromkeys(outside, "x") | {n: f"call{n}" for n in outside})
    assert set(found.values()) == {"reachable", "absent"}


def test_a_number_without_a_name_is_told_where_it_does_something() -> None:
    assert judge_surface({9: "EINVAL"}, {9: "EINVAL"}, {}) == {"number 9": "reachable"}


@pytest.mark.parametrize("output", [b"", b"x y\n", b"3\n"])
def test_a_surface_that_is_none_is_an_error(output: bytes) -> None:
    with pytest.raises(ProtocolError, match="the probe printed"):
        parse_surface(output)
