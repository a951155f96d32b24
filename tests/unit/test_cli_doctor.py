"""`ringfence doctor` and `ringfence setup`: what they find, how they say it, and their exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from ringfence import _setup
from ringfence.cli import doctor, main
from ringfence.errors import CannotEnforce, StartError, Unavailable, Unmet
from ringfence.levels.host import host
from ringfence.result import Result
from ringfence.spec import ISOLATIONS

RINGFENCE = [sys.executable, "-m", "ringfence"]


def good(argv: list[str], *, isolation: str, **more: Any) -> Result:
    return Result(isolation=isolation, termination_reason="exited", exit_code=0)


def test_the_real_one_runs_a_command_at_each_level() -> None:
    done = subprocess.run([*RINGFENCE, "doctor", "--json"], capture_output=True, timeout=200, check=False)
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    assert report["tried"] is True
    assert list(report["levels"]) == list(ISOLATIONS)
    for name in ("process", "container"):
        assert report["levels"][name]["works"] is True, report["levels"][name]
        assert report["levels"][name]["detail"].startswith("a command was run, started in ")
    vm = report["levels"]["vm"]
    # Where it doesn't work it says why, and what would help.
    assert vm["detail"].startswith("a command was run by ") if vm["works"] else vm["detail"] and vm["help"]
    assert report["facts"]["kernel"]["detail"].startswith("Linux ")
    assert {
        "cgroups",
        "cgroup memory",
        "user namespaces",
        "Landlock",
        "seccomp",
        "KVM",
        "qemu",
        "erofs-utils",
        "guest kernel",
        "ids",
    } <= report["facts"].keys()


def test_quick_runs_nothing() -> None:
    def never(*words: Any, **more: Any) -> Result:
        raise AssertionError("a command was run")

    report = doctor.examine(host(), quick=True, run=never)
    assert report.tried is False
    assert all(one.detail == "not tried" for one in report.levels if one.works)


def test_text_has_a_line_for_every_rule_and_fact() -> None:
    report = doctor.examine(host(), quick=True)
    lines = doctor.as_text(report).splitlines()
    assert lines[0] == "Levels and their rules"
    for level in report.levels:
        assert any(line.split()[1] == level.name for line in lines if line.startswith("  "))
    for fact in report.facts:
        assert any(fact.name in line and fact.detail in line for line in lines)
    marks = {"ok", "no", "-"}
    assert all(line.split()[0] in marks for line in lines if line.startswith("  "))
    assert lines[-1] in ("Nothing is in the way of any level; none was tried.", "Not usable here: vm.")


def test_what_the_host_lacks_is_told_with_its_reason() -> None:
    machine = host().replace(user_namespaces="switched off", landlock_abi=0, seccomp="no libseccomp")
    report = doctor.examine(machine, quick=False, run=good)
    process, container, _ = report.levels
    assert process.works
    rules = {one.rule: one for one in process.abilities}
    assert not rules["network=none"].available
    assert rules["network=none"].reason == "no libseccomp"
    assert (container.works, container.detail) == (False, "switched off")
    assert container.help
    assert not report.ok
    facts = {one.name: one for one in report.facts}
    assert (facts["user namespaces"].ok, facts["user namespaces"].detail) == (False, "switched off")
    assert facts["Landlock"].ok is False
    text = doctor.as_text(report)
    assert "Not usable here: container" in text
    assert "[help: " in text
    json.dumps(report.to_json())


@pytest.mark.parametrize(
    ("outcome", "detail", "help"),
    [
        (StartError("mounts", "mount", 1, "/proc"), 'mounts: mount("/proc"): EPERM (Operation not permitted)', ""),
        (Unavailable("process", "no core", "pip install ."), "no core", "pip install ."),
        (
            Result(isolation="process", termination_reason="wall_time"),
            "a command that exits with 0 was run, but the workload was stopped: it reached its wall_time limit",
            "",
        ),
    ],
)
def test_a_trial_that_goes_wrong_is_told_and_the_next_level_is_looked_at(
    outcome: Result | Exception, detail: str, help: str
) -> None:
    def run(argv: list[str], *, isolation: str, **more: Any) -> Result:
        if isolation != "process":
            return good(argv, isolation=isolation)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    report = doctor.examine(host(), quick=False, run=run)
    assert not report.ok
    assert (report.levels[0].works, report.levels[0].detail, report.levels[0].help) == (False, detail, help)
    assert report.levels[1].works


def test_a_network_that_only_a_trial_shows_to_be_impossible() -> None:
    def run(argv: list[str], *, isolation: str, network: str | None = None, **more: Any) -> Result:
        if network == "nat":
            raise CannotEnforce(isolation, [Unmet("network", "nat", "no tproxy", "load it")])
        return good(argv, isolation=isolation)

    report = doctor.examine(host(), quick=False, run=run)
    container = {one.rule: one for one in report.levels[1].abilities}
    for rule in ("network=nat", "allow", "publish", "bandwidth"):
        assert (container[rule].available, container[rule].reason, container[rule].help) == (
            False,
            "no tproxy",
            "load it",
        )
    assert container["network=none"].available


def test_exit_status(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for works, status in ((True, 0), (False, 1)):
        level = doctor.LevelReport(name="vm", works=works, detail="so")
        report = doctor.Report(levels=[level], facts=[], tried=True)
        monkeypatch.setattr(doctor, "examine", lambda *words, found=report, **more: found)
        assert main(["doctor"]) == status
        assert ("All three levels work here." if works else "Not usable here: vm.") in capfd.readouterr().out
        assert main(["doctor", "--json"]) == status
        assert json.loads(capfd.readouterr().out)["ok"] is works


def test_in_colour(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="needs rich")
    level = doctor.LevelReport(name="vm", works=False, detail="[bold]no[/bold] \x1b[2J", help="[x]")
    doctor._show_in_colour(doctor.Report(levels=[level], facts=[doctor.Fact("f", None, "d")], tried=True))
    text = capfd.readouterr().out
    # Neither rich's markup nor a terminal's is taken from what is shown.
    assert "[bold]no[/bold] \\x1b[2J" in text
    assert "[x]" in text
    assert "\x1b[2J" not in text


# ---- setup ----


def steps(*found: _setup.Step) -> Any:
    return lambda levels, **more: list(found)


PRESENT = _setup.Step(name="qemu", state="present", detail="/usr/bin/qemu")
DONE = _setup.Step(name="guest kernel", state="done", detail="6.1")
NEEDS = _setup.Step(name="erofs-utils", state="needs", detail="not installed", command="sudo apt-get install -y x")
AGAIN = _setup.Step(name="libseccomp", state="needs", detail="not installed", command="sudo apt-get install -y x")
FAILED = _setup.Step(name="kvm", state="failed", detail="odd\nline")


def test_setup_when_all_is_there(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_setup, "steps", steps(PRESENT, DONE))
    assert main(["setup"]) == 0
    assert capfd.readouterr() == ("ok    qemu          /usr/bin/qemu\ndone  guest kernel  6.1\n", "")


def test_setup_says_the_command_to_run_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_setup, "steps", steps(PRESENT, NEEDS, AGAIN, FAILED))
    assert main(["setup"]) == 1
    out = capfd.readouterr().out
    assert out.endswith("\n\nTo get what is missing, run:\n  sudo apt-get install -y x\n")
    assert "failed  kvm          odd\\nline\n" in out
    assert main(["setup", "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert [one["state"] for one in found] == ["present", "needs", "needs", "failed"]


def test_setup_of_some_levels(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def record(levels: Any, **more: Any) -> list[_setup.Step]:
        asked.append((tuple(levels), more["progress"]))
        return []

    monkeypatch.setattr(_setup, "steps", record)
    assert main(["setup", "--level", "process", "--level=vm"]) == 0
    assert main(["setup"]) == 0
    # No progress where stderr is no terminal.
    assert asked == [(("process", "vm"), None), (_setup.LEVELS, None)]
    assert main(["setup", "--level", "vmm"]) == 125


def test_setup_for_the_process_level_is_real() -> None:
    done = subprocess.run([*RINGFENCE, "setup", "--level", "process"], capture_output=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout
    assert b"ok    libseccomp" in done.stdout or b"ok  libseccomp" in done.stdout
