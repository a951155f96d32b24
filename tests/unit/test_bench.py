"""`measure` and `ringfence bench`: that what is missing is told, that rounds interleave, that promises are judged."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ringfence as rf
from ringfence.comparison import bench, peers, starts
from ringfence.comparison.bench import GROUPS, TARGETS, Bench, Measurement, Target, measure
from ringfence.comparison.bench_report import print_measurement
from ringfence.comparison.report import console


def test_rounds_interleave_and_a_name_may_have_fewer() -> None:
    order: list[str] = []
    with contextlib.ExitStack() as stack:
        one = Bench(stack)
        one.add("a", lambda: order.append("a"))
        one.add("b", lambda: order.append("b"))
        one.add("rare", lambda: order.append("rare"), most_rounds=2)
        samples = bench._rounds(one, 10, "test", None)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 10, "b": 10, "rare": 2}
    # After one of each that isn't counted, "a" and "b" never drift further apart than a round.
    counted = order[3:]
    for at in range(len(counted)):
        assert abs(counted[:at].count("a") - counted[:at].count("b")) <= 1
    # In no fixed order.
    assert len({tuple(one for one in counted[i : i + 2] if one != "rare") for i in range(6, 22, 2)}) > 1


def test_targets_are_judged_by_medians_and_unknown_is_none() -> None:
    found = Measurement(machine={}, samples={"a": [10, 30, 20], "b": [10]}, skipped={"c": "why"})
    summaries = found.summaries()
    assert Target("a", "b", 2).found(summaries) == 2
    assert Target("a", "", 2).found(summaries) == 20
    assert Target("a", "c", 2).found(summaries) is None
    assert Target("c", "", 2).found(summaries) is None


def test_a_group_has_its_samples_the_machine_and_json(tmp_path: Path) -> None:
    found = measure(2, ("import",))
    assert set(found.samples) == {"python -I -S -c pass", "import ringfence"}
    assert all(len(taken) == 2 and min(taken) > 0 for taken in found.samples.values())
    assert {"kernel", "cpu_model", "cpus", "cgroups", "nested", "date"} <= set(found.machine)
    data = json.loads(json.dumps(found.to_json()))
    assert len(data["targets"]) == len(TARGETS)
    with (tmp_path / "out").open("w+") as file:
        print_measurement(found, console(file))
        file.seek(0)
        text = file.read()
    assert "import ringfence" in text
    assert "not measured" in text  # the promises on other groups


def test_a_tool_that_is_missing_or_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "isn't installed" in peers.bubblewrap(["true"], str(tmp_path)).reason
    assert "isn't installed" in peers.oci_runtime("runc", ["true"], str(tmp_path)).reason
    failing = tmp_path / "crun"
    failing.write_text("#!/bin/sh\necho no way >&2\nexit 3\n")
    failing.chmod(0o755)
    found = peers.oci_runtime("crun", ["true"], str(tmp_path / "state"))
    assert found.start is None
    assert found.reason == "crun ended with 3: no way"


def test_a_starter_that_cannot_is_told() -> None:
    with contextlib.ExitStack() as stack:
        one = Bench(stack)
        one.add_starter("x", "no-such-kind", 0)
        assert one.takes == {}
        assert "no-such-kind" in one.skipped["x"]


def test_a_starter_starts_containers() -> None:
    with contextlib.ExitStack() as stack:
        one = Bench(stack)
        one.add_starter("x", "mounts", 3)
        if one.skipped:
            pytest.skip(one.skipped["x"])
        before = Path("/proc/self/mountinfo").read_text()
        assert one.takes["x"]() > 0
        assert Path("/proc/self/mountinfo").read_text() == before


def test_bench_on_the_command_line() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(rf.__file__).parent.parent)}
    line = [sys.executable, "-m", "ringfence", "bench"]
    words = ["-n", "1", "--groups", "import", "--json"]
    done = subprocess.run([*line, *words], capture_output=True, env=environment, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert json.loads(done.stdout)["unit"] == "ns"
    refused = subprocess.run([*line, "--groups", "none"], capture_output=True, env=environment, check=False)
    assert refused.returncode == 125
    assert b"none" in refused.stderr


def test_the_command_line_knows_every_group() -> None:
    from ringfence.cli.bench import _GROUPS

    assert tuple(GROUPS) == _GROUPS


def test_a_measuring_process_takes_nothing_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` looks there first: whoever may write to it would run code as the caller."""
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name in ("json", "runpy", "ringfence"):
        (tmp_path / f"{name}.py").write_text("import planted")
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "json"], check=False, capture_output=True)
    assert (tmp_path / "ran").exists()  # the control
    (tmp_path / "ran").unlink()
    assert starts._first_of_a_process("bare") > 0
    assert not (tmp_path / "ran").exists()
    for source in Path(rf.__file__).parent.rglob("*.py"):
        assert 'sys.executable, "-m"' not in source.read_text(encoding="utf-8"), source
