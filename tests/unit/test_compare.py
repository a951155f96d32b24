"""Whether outputs are told to be the same or how they differ; the whole of `compare` at process and container."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.comparison import BARE, Comparison, Isolation, LevelReport, compare
from ringfence.comparison.cost import Run, bare_memory, bare_run, differences
from ringfence.comparison.facts import ATTEMPTS, parse
from ringfence.comparison.figures import duration, size
from ringfence.comparison.report import console, print_comparison
from ringfence.spec import Spec
from ringfence.wire.launcher import probe_path

PROBE = probe_path()
LOCAL = ("process", "container")
SOURCE = Path(rf.__file__).parent.parent


def a_run(**changes: Any) -> Run:
    given: dict[str, Any] = {
        "exit_code": 0,
        "signal": None,
        "termination_reason": "exited",
        "stdout": b"",
        "stderr": b"",
        "files": {},
        "startup_ns": 1,
        "wall_ns": 2,
        "teardown_ns": 3,
        "total_ns": 6,
        "cpu_ns": None,
        "memory_peak_bytes": None,
        "source": "",
    }
    return Run(**{**given, **changes})


# ---- differences ----


def test_the_same_is_no_difference_whatever_it_took() -> None:
    assert differences(a_run(stdout=b"a\n"), a_run(stdout=b"a\n", wall_ns=10**9)) == ()


def test_the_first_line_that_differs_is_shown_with_the_sizes() -> None:
    found = differences(a_run(stdout=b"one\ntwo\nthree\n"), a_run(stdout=b"one\n2\nthree\n"))
    assert found == ("stdout differs in line 2: '2', not 'two' (12 bytes, not 14)",)


def test_output_that_ends_early_differs_where_it_ends() -> None:
    (found,) = differences(a_run(stderr=b"one\ntwo"), a_run(stderr=b"one"))
    assert found == "stderr differs in line 2: nothing, not 'two' (3 bytes, not 7)"


def test_a_missing_newline_at_the_end_is_a_difference() -> None:
    (found,) = differences(a_run(stdout=b"a\n"), a_run(stdout=b"a"))
    assert "line 2: nothing, not ''" in found


def test_bytes_that_are_no_text_and_long_lines_fit_in_a_sentence() -> None:
    (found,) = differences(a_run(stdout=b"\xff" * 500), a_run(stdout=b"\xfe" * 500))
    assert len(found) < 250
    assert "\\\\xfe" in found


def test_how_it_ended_is_compared() -> None:
    killed = a_run(exit_code=None, signal=9, termination_reason="signaled")
    stopped = a_run(exit_code=None, signal=9, termination_reason="memory")
    assert differences(a_run(exit_code=3), a_run(exit_code=4)) == ("it ended by exit 4, not exit 3",)
    assert differences(killed, stopped) == ("it ended by memory, not signal 9",)


def test_files_are_compared_by_name_and_content() -> None:
    found = differences(a_run(files={"a": b"1", "b": b"2"}), a_run(files={"b": b"3", "c": b""}))
    assert len(found) == 3
    assert found[0] == "the file a is missing"
    assert found[1].startswith("the file b differs in line 1: '3', not '2'")
    assert found[2] == "there is a file c more"


# ---- the bare run ----


def a_spec(*argv: str, **more: Any) -> Spec:
    return Spec.make(list(argv), isolation="process", **more)


def test_a_bare_run_has_its_streams_files_and_a_clean_environment() -> None:
    script = "cat; cat given >&2; env | sort | cut -d= -f1 >out; exit 7"
    spec = a_spec("sh", "-c", script, input=b"in", files={"given": b"file"}, collect=["out"], env={"MINE": "1"})
    done = bare_run(spec)
    assert (done.exit_code, done.stdout, done.stderr) == (7, b"in", b"file")
    assert set(done.files["out"].split()) - {b"PWD", b"OLDPWD", b"SHLVL", b"_"} == {
        *(b"PATH", b"HOME", b"LANG", b"TERM"),
        b"MINE",
    }
    assert done.startup_ns is not None
    assert done.wall_ns is not None
    assert 0 < done.startup_ns + done.wall_ns <= done.total_ns
    assert done.teardown_ns is None


def test_a_bare_run_that_a_signal_ends() -> None:
    done = bare_run(a_spec(PROBE, "signal", "11"))
    assert (done.exit_code, done.signal, done.ending) == (None, 11, "signal 11")


def test_a_bare_run_that_takes_too_long_is_ended_with_its_children() -> None:
    done = bare_run(a_spec("sh", "-c", "sleep 60 & echo begun; wait", limits=rf.Limits(wall_time="300ms")))
    assert (done.ending, done.stdout) == ("wall_time", b"begun\n")
    assert done.total_ns < 10 * 10**9


def test_a_bare_command_that_is_not_there_is_a_start_error() -> None:
    with pytest.raises(rf.StartError, match="ENOENT"):
        bare_run(a_spec("/no/such/command"))


def test_the_bare_memory_is_the_commands_own() -> None:
    little, source = bare_memory(a_spec(PROBE, "exit", "0"))
    much, _ = bare_memory(a_spec(PROBE, "hog", "64M"))
    if little is None or much is None:
        pytest.skip("no cgroup counts memory here")
    assert source.startswith("cgroup")
    assert little < 16 << 20  # this Python alone has more
    assert 64 << 20 <= much < 96 << 20


# ---- the probe's answers ----


def test_the_probes_answers_are_parsed() -> None:
    lines = ['{"pid": 1}', *("EPERM call" for _ in ATTEMPTS)]
    found = parse("\n".join(lines).encode())
    assert found["pid"] == 1
    assert set(found["attempts"]) == {name for name, _ in ATTEMPTS}


@pytest.mark.parametrize("output", [b"", b"no json\n", b'{"pid": 1}\nok\n', b"[]\n"])
def test_a_probe_that_says_something_else_is_an_error(output: bytes) -> None:
    with pytest.raises(rf.ProtocolError, match="probe printed"):
        parse(output)


# ---- all of it ----


@pytest.fixture(scope="module")
def compared() -> Comparison:
    script = "cat; echo made >out.txt; exit 3"
    limits = rf.Limits(memory="64M")
    return compare(["sh", "-c", script], levels=LOCAL, input="given\n", collect=["*.txt"], limits=limits, repeat=3)


def test_a_command_does_the_same_at_every_level(compared: Comparison) -> None:
    assert [one.name for one in compared.levels] == [BARE, *LOCAL]
    assert compared.complete
    assert compared.identical, [one.differences for one in compared.levels]
    for one in compared.levels:
        assert len(one.runs) == 3
        assert one.runs[0].ending == "exit 3"
        assert one.runs[0].stdout == b"given\n"
        assert one.runs[0].files == {"out.txt": b"made\n"}
        assert not one.varies


def test_the_levels_isolate_what_they_promise(compared: Comparison) -> None:
    assert {str(one.isolation) for one in compared[BARE].isolation.values()} <= {"shared", "unknown"}
    container, process = compared["container"].isolation, compared["process"].isolation
    for name in ("processes", "users", "mounts", "IPC", "network", "host name", "cgroups"):
        assert container[name].isolation is Isolation.OWN, container[name]
    assert container["kernel"].isolation is process["kernel"].isolation is Isolation.SHARED
    for found in (container, process):
        assert found["memory"].isolation is Isolation.RESTRICTED
        assert found["system calls"].isolation is Isolation.RESTRICTED
        assert found["capabilities"].isolation in (Isolation.RESTRICTED, Isolation.SHARED)


def test_the_costs_are_known(compared: Comparison) -> None:
    for one in compared.levels:
        for measure in ("startup_ns", "wall_ns", "total_ns", "cpu_ns"):
            found = one.costs[measure]
            assert found is not None, (one.name, measure)
            assert found.n == 3
            assert found.p50 > 0


def test_a_comparison_prints_and_goes_to_json(compared: Comparison, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+") as file:
        print_comparison(compared.to_json(), console(file))
        file.seek(0)
        text = file.read()
    for word in ("identical", "capabilities", "own", "peak memory", "container", "Probes: what", " shared"):
        assert word in text
    data = json.loads(json.dumps(compared.to_json()))
    assert data["identical"] is True
    assert [one["name"] for one in data["levels"]] == [BARE, *LOCAL]
    assert data["levels"][1]["isolation"]["kernel"]["verdict"] == "shared"
    assert data["probes"]["kernel-identity"]["group"] == "kernel"
    for one in data["levels"]:
        assert one["probes"].keys() == data["probes"].keys()
        assert one["probes"]["kernel-identity"]["verdict"] == "shared"


def test_a_level_that_cannot_enforce_a_limit_is_a_column_that_says_why(tmp_path: Path) -> None:
    found = compare(["true"], levels=("process",), limits=rf.Limits(disk="1G"), repeat=1, probes=False)
    report = found["process"]
    assert not found.complete
    assert "disk" in report.unavailable
    assert report.runs == ()
    with (tmp_path / "out").open("w+") as file:
        print_comparison(found.to_json(), console(file))
        file.seek(0)
        assert "process: did not run" in file.read()


def test_a_command_that_varies_is_told_to() -> None:
    found = compare(["sh", "-c", "cat /proc/sys/kernel/random/uuid"], levels=("process",), repeat=2, probes=False)
    assert not found.identical
    assert found[BARE].varies
    assert "stdout differs in line 1" in found["process"].differences[0]


def test_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(rf.SpecError, match="isolation"):
        compare(["true"], levels=("jail",))
    with pytest.raises(rf.SpecError, match="levels"):
        compare(["true"], levels=())
    with pytest.raises(rf.SpecError, match="repeat"):
        compare(["true"], levels=("process",), repeat=0)
    with pytest.raises(rf.SpecError, match="argv"):
        compare("true", levels=("process",))


def test_an_unknown_column_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        Comparison(argv=(b"x",), machine={}, levels=(LevelReport(name=BARE),))["vm"]


def test_figures_have_three_digits_and_a_unit() -> None:
    assert [duration(ns) for ns in (312_000, 8_120_000, 81_200_000, 1_500_000_000)] == [
        *("312 us", "8.12 ms", "81.2 ms"),
        "1.50 s",
    ]
    assert [size(count) for count in (512_000, 3 << 20, 3 << 30)] == ["500 KiB", "3.00 MiB", "3.00 GiB"]


# ---- the command line ----


def command_line(*words: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    line = [sys.executable, "-m", "ringfence", *words]
    return subprocess.run(line, input=input, capture_output=True, env=environment, check=False)


def test_compare_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"from a file\n")
    done = command_line(
        *("compare", "--levels", "process,container", "--repeat", "1", "--input", "-"),
        *("--file", f"given={tmp_path / 'data'}", "--collect", "*.out", "--", "sh", "-c", "cat - given | tee a.out"),
        input=b"from stdin\n",
    )
    assert done.returncode == 0, done.stderr
    assert b"1 collected, identical" in done.stdout
    assert b"23 bytes, identical" in done.stdout
    assert done.stderr == b""  # progress is for terminals


def test_every_probe_is_shown_where_that_is_asked_for() -> None:
    done = command_line("compare", "--levels", "process", "--repeat", "1", "--probes", "--surface", "--", "true")
    assert done.returncode == 0, done.stderr
    for words in ("channels between two sandboxes", "attack-fork-bomb", "mount: EPERM", "Probes: what", "System calls"):
        assert words in done.stdout.decode(), words


def test_compare_as_json_and_its_exit_status() -> None:
    same = command_line("compare", "--levels", "process", "--repeat", "1", "--json", "--", "true")
    assert same.returncode == 0, same.stderr
    assert json.loads(same.stdout)["identical"] is True
    other = command_line("compare", "--levels", "process", "--repeat", "1", "--json", "--", "sh", "-c", "id -u; pwd")
    assert other.returncode == 1
    assert json.loads(other.stdout)["identical"] is False


def test_compare_refuses_what_makes_no_sense() -> None:
    for words, said in (
        ((), b"a command is missing"),
        (("--levels", "jail", "--", "true"), b"jail"),
        (("--repeat", "0", "--", "true"), b"repeat"),
        (("--levels", "process", "--", "/no/such/command"), b"ENOENT"),
    ):
        done = command_line("compare", *words)
        assert done.returncode == 125, done
        assert said in done.stderr
        assert done.stdout == b""
