"""The cost suite: its table, what is parsed of those that measure, what is made of samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import ringfence as rf
from ringfence.comparison import density, inside, machine, tools
from ringfence.comparison.inside import Clock, parse
from ringfence.comparison.machine import machine_facts
from ringfence.comparison.measures import CATALOGUE, GROUPS, Measure
from ringfence.comparison.places import Answer, Place
from ringfence.comparison.report import unmeasured
from ringfence.comparison.taken import QUICK, Taken, in_rounds, judged

# ---- the table ----


def test_every_measure_says_what_it_is() -> None:
    assert len(CATALOGUE) >= 35
    assert {one.group for one in CATALOGUE.values()} == set(GROUPS)
    for name, one in CATALOGUE.items():
        found = one.to_json()
        assert (found["group"], found["unit"]) == (one.group, one.unit)
        assert found["what"].endswith("."), name
        assert found["better"] == ("higher" if "per_second" in one.unit else "lower")


@pytest.mark.parametrize(("group", "unit"), [("speed", "ns"), ("cpu", "ms")])
def test_a_measure_has_a_known_group_and_unit(group: str, unit: str) -> None:
    with pytest.raises(ValueError, match="no group"):
        Measure("new", group, "Something.", unit, "verb")


# ---- what is made of samples ----


def taken(*blocks: list[float]) -> Taken:
    found = Taken()
    found.blocks = [list(one) for one in blocks]
    return found


def test_a_measure_is_compared_with_bare() -> None:
    bare = taken([10, 12], [10, 11], [10, 10])
    found = judged(taken([20, 24], [20, 22], [20, 20]), bare)
    assert found["summary"]["p50"] == 20
    assert found["samples"] == [20, 24, 20, 22, 20, 20]
    assert (found["ratio"], found["low"], found["high"]) == (2, 2, 2)
    assert (found["source"], found["unavailable"]) == ("built in", None)
    alone = judged(bare, None)
    assert (alone["ratio"], alone["low"], alone["high"]) == (None, None, None)


def test_of_few_rounds_and_few_samples_there_is_no_interval() -> None:
    found = judged(taken([20], [21]), taken([10], [10]))
    assert (found["ratio"], found["low"], found["high"]) == (2.05, None, None)
    many = judged(taken([20.0 + i for i in range(10)]), taken([10.0 + i for i in range(10)]))
    assert many["low"] is not None


def test_what_failed_has_a_reason_and_no_figure() -> None:
    failed = taken([1, 2, 3])
    failed.give_up("EPERM socket")
    found = judged(failed, taken([1, 2, 3]))
    assert found["unavailable"] == "EPERM socket"
    assert (found["summary"], found["samples"], found["ratio"], found["source"]) == (None, [], None, None)
    assert judged(taken([1]), failed)["ratio"] is None
    assert judged(Taken(), None)["unavailable"] == "nothing was measured"


def test_rounds_are_as_many_as_fit_and_one_that_fails_is_given_up() -> None:
    calls: list[str] = []
    given_up: list[tuple[str, str]] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    def broken() -> None:
        calls.append("broken")
        if calls.count("broken") == 2:
            raise OSError("it broke\nin two lines")

    takes = {"quick": lambda: calls.append("quick"), "slow": slow, "broken": broken}
    in_rounds(takes, 5, 0.001, lambda *one: given_up.append(one), lambda turn: None)
    assert calls.count("quick") == 6  # the first isn't a round
    assert calls.count("slow") == 4  # at least three
    assert calls.count("broken") == 2
    assert given_up == [("broken", "it broke")]


# ---- what is printed inside ----


def test_what_the_probe_prints_is_parsed() -> None:
    found = parse(b"filesystem ef53\nfile_create 12.50 13\nfile_stat 1.00 2.00\nclock 1000 2000\n")
    assert found.figures == {"file_create": [12.5, 13.0], "file_stat": [1.0, 2.0]}
    assert (found.clock, found.filesystem) == ((1000, 2000), "ext4")
    assert parse(b"filesystem abc\nx 1\nclock 1 2\n").filesystem == "a file system 0xabc"


@pytest.mark.parametrize(
    "printed",
    [
        b"",
        b"x 1\n",
        b"clock 1 2\n",
        *(b"x" + samples + b"\nclock 1 2\n" for samples in (b"", b" 0", b" -1", b" nan", b" inf", b" a", b" 1" * 1001)),
        b"x 1\nclock 1\n",
        b"\xff 1\nclock 1 2\n",
        b"filesystem\nx 1\nclock 1 2\n",
    ],
)
def test_what_else_is_printed_is_refused(printed: bytes) -> None:
    with pytest.raises(rf.ProtocolError, match="the probe printed"):
        parse(printed)


MS = 1_000_000


def clock_of(rate: float, *, calls: int = 5, start_ms: int = 10) -> Clock:
    """Of calls of 100 ms that begin each second, whose probe starts after `start_ms` of them, by a clock of `rate`."""
    found = Clock()
    for number in range(calls):
        before = number * 1000 * MS
        began, ended = before + start_ms * MS, before + 99 * MS
        found.add(Answer(b"", before, before + 100 * MS), (int(began * rate), int(ended * rate)))
    return found


def test_a_clock_that_runs_as_ours_has_no_fault() -> None:
    for rate in (1.0, 1.02, 0.98):
        found = clock_of(rate)
        assert found.fault == ""
        low, high = found.rate() or (0, 0)
        assert low <= rate <= high
    assert Clock().fault == ""


def test_a_clock_that_runs_off_is_told() -> None:
    assert clock_of(0.5).fault == "the clock inside runs 48 % slow against the host's"
    assert "slow" in clock_of(0.9).fault
    with pytest.raises(rf.ProtocolError, match="ran off"):
        clock_of(1.1, start_ms=0)
    # Each call by itself could be true, all together can't.
    assert "fast against the host's" in clock_of(1.1, start_ms=30).fault


def test_a_clock_that_goes_back_or_stands_still_is_told() -> None:
    found = clock_of(1.0)
    for clock in ((10 * MS, 20 * MS), (9000 * MS, 9000 * MS), (9000 * MS, 8000 * MS)):
        with pytest.raises(rf.ProtocolError, match="clock inside"):
            found.add(Answer(b"", 8000 * MS, 9100 * MS), clock)


class Scripted(Place):
    """Prints what it is told to, a call each; an error is raised."""

    def __init__(self, name: str, *answers: bytes | Exception) -> None:
        self.name = name
        self.answers = list(answers)
        self.now = 0

    def call(self, argv: Sequence[str], *, network: bool = False) -> Answer:
        found = self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        self.now += 1000 * MS
        return Answer(found, self.now, self.now + 500 * MS)


def printed(samples: str, second: int, *, length: int = 400) -> bytes:
    began = second * 1000 + 50
    return f"system_call {samples}\nclock {began * MS} {(began + length) * MS}\n".encode()


def test_a_guest_whose_clock_runs_off_tells_no_figures() -> None:
    effort = QUICK.replace(rounds=3)
    good = Scripted("bare", *(printed("100 110", second) for second in (1, 2, 3, 4)))
    # Half a second of it goes by in each second of ours.
    slow = Scripted(
        "vm",
        *(f"system_call 50\nclock {500 * turn * MS} {(500 * turn + 9) * MS}\n".encode() for turn in range(4)),
    )
    refused = Scripted("process", rf.StartError("exec", "execve", 2, "x"))
    found = inside.take([CATALOGUE["system_call"]], [good, slow, refused], effort, lambda said: None)
    assert found["bare"]["system_call"].blocks == [[100, 110]] * 3  # the first warmed up
    assert "slow against the host's" in found["vm"]["system_call"].unavailable
    assert found["vm"]["system_call"].blocks == []
    assert "ENOENT" in found["process"]["system_call"].unavailable


# ---- what other tools print ----

FIO = """{"fio version": "fio-3.33", "jobs": [
 {"jobname": "fio_write", "error": 0, "read": {"iops": 0, "bw_bytes": 0},
  "write": {"iops": 112225.5, "bw_bytes": 7354813572}},
 {"jobname": "fio_read", "error": 0, "read": {"iops": 137011.5, "bw_bytes": 561199261},
  "write": {"iops": 0, "bw_bytes": 0}}]}"""
SYSBENCH = """sysbench 1.0.20 (using system LuaJIT 2.1.0-beta3)

CPU speed:
    events per second:  1938.82

3209.46 MiB transferred (3194.40 MiB/sec)
"""
STRESS = """stress-ng, version 0.15.06 (gcc 12.2.0, x86_64 Linux 6.18.44)
stress-ng: metrc: [10702] stressor       bogo ops real time  usr time  sys time   bogo ops/s     bogo ops/s
stress-ng: metrc: [10702]                           (secs)    (secs)    (secs)   (real time) (usr+sys time)
stress-ng: metrc: [10702] switch           172240      1.00      0.06      0.68    172162.67      233623.37
"""


def test_what_other_tools_print_is_parsed() -> None:
    assert tools.fio(FIO) == ("fio 3.33", {"fio_read": 137011.5, "fio_write": 7354813572})
    assert tools.sysbench_cpu(SYSBENCH) == ("sysbench 1.0.20", {"sysbench_cpu": 1938.82})
    assert tools.sysbench_memory(SYSBENCH) == ("sysbench 1.0.20", {"sysbench_memory": 3194.40 * (1 << 20)})
    assert tools.stress_switch(STRESS) == ("stress-ng 0.15.06", {"stress_switch": 172162.67})


@pytest.mark.parametrize(
    ("parse_it", "said"),
    [
        (tools.fio, "nothing"),
        (tools.fio, "{}"),
        (tools.fio, FIO.replace('"error": 0', '"error": 2')),
        (tools.fio, FIO.replace("137011.5", "0")),
        (tools.sysbench_cpu, "sysbench 1.0.20\n"),
        (tools.sysbench_cpu, SYSBENCH.replace("1938.82", "0.00")),
        (tools.sysbench_memory, SYSBENCH.replace("MiB/sec", "GiB/sec")),
        (tools.stress_switch, STRESS.replace("switch ", "other ")),
        (tools.stress_switch, STRESS.replace("version", "")),
    ],
)
def test_what_is_no_figure_of_a_tool_is_refused(parse_it: Callable[[str], object], said: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_it(said)


def test_a_tool_that_is_not_installed_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    found = tools.take([CATALOGUE["fio_read"]], [Scripted("bare")], QUICK, lambda said: None)
    assert found["bare"]["fio_read"].unavailable == "fio isn't installed (Debian's package fio)"


# ---- what is told of them ----


def test_what_was_not_measured_is_told_by_its_reason() -> None:
    failed, other = Taken(unavailable="EPERM socket"), Taken(unavailable="no python3")
    level = {
        "a": judged(failed, None),
        "b": judged(taken([1]), None),
        "c": judged(failed, None),
        "d": judged(other, None),
    }
    assert unmeasured(level) == ["a, c: EPERM socket", "d: no python3"]


# ---- memory ----


def test_memory_is_told_of_as_many_as_there_were() -> None:
    found = {"memory_pss_50": Taken(), "memory_machine_50": Taken()}
    density._add(found, 50, {"count": 20, "why": "as many as 20 s allow", "pss": [30, 40], "machine": 2000})
    assert found["memory_pss_50"].blocks == [[30, 40]]
    assert found["memory_machine_50"].blocks == [[100]]
    assert found["memory_pss_50"].source == "built in, of 20 instead of 50: as many as 20 s allow"
    density._add(found, 50, {"count": 50, "why": "", "pss": [], "machine": -5})
    assert "only root" in found["memory_pss_50"].unavailable
    assert not found["memory_machine_50"].unavailable


def test_memory_that_others_disturb_is_not_told() -> None:
    for rounds, said in (
        ([100.0, 90.0, 120.0], ""),
        ([100.0], ""),
        ([100.0, -1.0, -2.0], "gave back more"),
        ([100.0, 10.0, 1.0], "from round to round"),
        ([100.0, 90.0, -120.0], "from round to round"),
    ):
        found = {"memory_machine_10": taken(*([one] for one in rounds)), "memory_pss_10": taken(rounds)}
        density._doubt(found)
        why = found["memory_machine_10"].unavailable
        assert said in why if said else not why, (rounds, why)
        assert not found["memory_pss_10"].unavailable


# ---- the machine ----


def test_the_machines_facts_are_those_of_the_kernel(tmp_path: Path) -> None:
    facts = machine_facts()
    assert facts["mounts"] == len(Path("/proc/self/mountinfo").read_bytes().splitlines()) > 0
    assert facts["swap_bytes"] % 1024 == 0
    assert facts["transparent_hugepage"] in ("always", "madvise", "never", None)
    assert (
        facts["clocksource"] in Path("/sys/devices/system/clocksource/clocksource0/available_clocksource").read_text()
    )
    assert machine._chosen("always [madvise] never") == "madvise"
    assert machine._chosen("always") is machine._chosen(None) is None
    assert machine._line(str(tmp_path / "nothing")) is None
