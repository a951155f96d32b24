"""The pytest plugin: each test runs a pytest of its own, with real comparisons at the process and container level."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.comparison import compare
from ringfence.comparison.document import level_named, save

pytest_plugins = ["pytester"]

SOURCE = Path(rf.__file__).parent.parent


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    return compare(["true"], levels=("process", "container"), repeat=4, probes=False).to_json()


@pytest.fixture(autouse=True)
def baseline(pytester: pytest.Pytester, compared: dict[str, Any]) -> dict[str, Any]:
    """What is in baseline.json of each inner pytest's folder."""
    save(compared, str(pytester.path / "baseline.json"))
    return compared


def run(pytester: pytest.Pytester, body: str, *words: str) -> pytest.RunResult:
    pytester.makepyfile(f"import pytest\nimport ringfence as rf\n\n{body}")
    # The plugin comes by its entry point; no other one is of use here.
    return pytester.runpytest_inprocess("-p", "no:randomly", "-p", "no:cacheprovider", "--strict-markers", *words)


def test_budgets_that_are_kept(pytester: pytest.Pytester) -> None:
    found = run(
        pytester,
        """
@pytest.mark.ringfence_budget(isolation="container", against="baseline.json", startup_ratio=50, probes=False)
def test_relative(): pass

@pytest.mark.ringfence_budget(
    isolation=("process", "container"), startup_ms=5000, require={"capabilities": "restricted"}, probes=False, repeat=2)
def test_absolute(): pass

def test_of_the_fixture(ringfence_budget):
    document = ringfence_budget(
        ["sh", "-c", "cat; cat data"], isolation="container", input="a", files={"data": "b"},
        require={"network": "own"}, repeat=1, probes=False)
    assert document["levels"][1]["runs"][0]["stdout_bytes"] == 2
""",
    )
    found.assert_outcomes(passed=3)


def test_a_weaker_boundary_fails_the_test_with_its_reason_in_one_paragraph(
    pytester: pytest.Pytester, baseline: dict[str, Any]
) -> None:
    better = json.loads(json.dumps(baseline))
    container = level_named(better, "container")
    assert container is not None
    container["isolation"]["kernel"]["verdict"] = "own"  # what no container has
    save(better, str(pytester.path / "better.json"))
    mark = 'isolation="container", against="better.json", startup_ratio=None, repeat=1, probes=False'
    found = run(
        pytester,
        f"""
@pytest.mark.ringfence_budget({mark})
def test_weaker(): raise SystemExit("the test itself isn't run")

@pytest.mark.ringfence_budget({mark}, verdicts=False)
def test_not_asked_for(): pass

@pytest.mark.ringfence_budget(isolation="process", against="better.json", startup_ratio=None, repeat=1, probes=False)
def test_another_level(): pass
""",
    )
    found.assert_outcomes(passed=2, failed=1)
    found.stdout.fnmatch_lines(
        [
            "the ringfence budget of 'true' is exceeded: container: kernel was own, is shared: *."
            " Compared with better.json.",
        ]
    )
    found.stdout.no_fnmatch_line("*SystemExit*")


def test_a_baseline_that_says_nothing_of_a_level_is_no_budget(
    pytester: pytest.Pytester, baseline: dict[str, Any]
) -> None:
    for file, changes in (("gone", {"unavailable": "no namespaces here"}), ("bare", {"isolation": {}})):
        less = json.loads(json.dumps(baseline))
        level_named(less, "container").update(changes)  # type: ignore[union-attr]
        save(less, str(pytester.path / f"{file}.json"))
    mark = 'isolation="container", startup_ratio=50, repeat=1, probes=False'
    found = run(
        pytester,
        f"""
@pytest.mark.ringfence_budget({mark}, against="gone.json")
def test_gone(): pass

@pytest.mark.ringfence_budget({mark}, against="gone.json", verdicts=False)
def test_gone_for_starts(): pass

@pytest.mark.ringfence_budget({mark}, against="bare.json")
def test_bare(): pass

@pytest.mark.ringfence_budget({mark}, against="bare.json", verdicts=False)
def test_not_asked_for(): pass

@pytest.mark.ringfence_budget(isolation="container", startup_ratio=50, repeat=1, against="baseline.json")
def test_no_probes_there(): pass
""",
    )
    found.assert_outcomes(passed=1, failed=4)
    found.stdout.fnmatch_lines(
        [
            "*is exceeded: container: it didn't run then (no namespaces here): *save that comparison anew. *gone.json.",
            "*is exceeded: container: it didn't run then (no namespaces here): *gone.json.",
            "*is exceeded: container: there were no verdicts of its isolation then: *bare.json.",
            "*is exceeded: container: there were no verdicts of its probes then: *baseline.json.",
        ]
    )


def test_a_slower_start_fails_the_test(pytester: pytest.Pytester, baseline: dict[str, Any]) -> None:
    quick = json.loads(json.dumps(baseline))
    container = level_named(quick, "container")
    assert container is not None
    for one in container["runs"]:
        one["startup_ns"] = 1000 + one["startup_ns"] % 10
    save(quick, str(pytester.path / "quick.json"))
    mark = 'isolation="container", against="quick.json", repeat=4, probes=False'
    found = run(
        pytester,
        f"""
@pytest.mark.ringfence_budget({mark}, startup_ratio=1.2)
def test_slower(): pass

@pytest.mark.ringfence_budget({mark}, startup_ratio=None)
def test_not_asked_for(): pass
""",
    )
    found.assert_outcomes(passed=1, failed=1)
    found.stdout.fnmatch_lines(["*is exceeded: container: a start takes * took 1.0* us: x*in relation to the bare*"])


def test_what_an_absolute_budget_says(pytester: pytest.Pytester) -> None:
    common = 'isolation="process", repeat=1, probes=False'
    found = run(
        pytester,
        f"""
@pytest.mark.ringfence_budget({common}, startup_ms=0.001, require={{"kernel": "own", "network": "restricted"}})
def test_too_much(): pass

@pytest.mark.ringfence_budget({common}, require={{"kernal": "own"}})
def test_no_such_resource(): pass

@pytest.mark.ringfence_budget({common}, require={{"kernel": "ours"}})
def test_no_such_verdict(): pass
""",
    )
    found.assert_outcomes(failed=3)
    found.stdout.fnmatch_lines(
        [
            "*is exceeded: process: a start takes * (the median of 1), and may take 0.001 ms; process: kernel must be"
            " own, is shared: *.",
            "*there is no resource or probe 'kernal' (of kernel, memory, *",
            "*require: 'kernel' must be of own, restricted, shared, not 'ours'*",
        ]
    )


def test_what_cannot_be_judged_fails_and_says_what_helps(pytester: pytest.Pytester, baseline: dict[str, Any]) -> None:
    save({**baseline, "schema": 2}, str(pytester.path / "later.json"))
    found = run(
        pytester,
        """
@pytest.mark.ringfence_budget(isolation="process", against="none.json", repeat=1, probes=False)
def test_no_baseline(): pass

@pytest.mark.ringfence_budget(isolation="process", against="later.json", repeat=1, probes=False)
def test_another_version(): pass

@pytest.mark.ringfence_budget(["/no/such/command"], isolation="process", repeat=1, probes=False)
def test_no_command(): pass

@pytest.mark.ringfence_budget(isolation="process", startup=3)
def test_no_such_word(): pass

@pytest.mark.ringfence_budget()
def test_no_level(): pass

@pytest.mark.ringfence_budget(isolation="process", limits=rf.Limits(disk="1G"), repeat=1, probes=False)
def test_no_such_limit_there(): pass
""",
    )
    found.assert_outcomes(failed=6)
    found.stdout.fnmatch_lines(
        [
            "*there is no *none.json: make it by 'ringfence compare --levels process --save *none.json -- COMMAND'*",
            "*can't be judged: *later.json: a comparison of version 2; this ringfence reads version 1*",
            "*can't be judged: *ENOENT*",
            "*unexpected keyword argument 'startup'*",
            "*missing a required *'isolation'*",
            "*process doesn't run here: *disk*",
        ]
    )


def test_what_was_not_compared_is_told_also_where_all_passes(
    pytester: pytest.Pytester, baseline: dict[str, Any]
) -> None:
    other = {**baseline, "machine": {**baseline["machine"], "kernel": "0.0.1"}}
    save(other, str(pytester.path / "other.json"))
    found = run(
        pytester,
        """
@pytest.mark.ringfence_budget(isolation="process", against="other.json", repeat=1, probes=False)
def test_it(): pass
""",
    )
    found.assert_outcomes(passed=1)
    found.stdout.fnmatch_lines(["*ringfence budgets*", "*other.json: another host: kernel was 0.0.1, is *"])


def test_the_marker_and_the_fixture_are_documented(pytester: pytest.Pytester) -> None:
    found = run(pytester, "", "--markers", "--fixtures")
    found.stdout.fnmatch_lines(["@pytest.mark.ringfence_budget(argv=*"])


def test_nothing_of_ringfence_is_imported_without_a_budget() -> None:
    program = (
        "import sys, pytest_ringfence; print(sorted(one for one in sys.modules if one.partition('.')[0] in"
        " ('ringfence', 'rich', 'matplotlib', 'jinja2', 'json')))"
    )
    plain = "import sys, pytest; print(sorted(one for one in sys.modules if one.partition('.')[0] in ('json',)))"
    said = [
        subprocess.run(
            [sys.executable, "-c", one], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(SOURCE)}
        )
        for one in (program, plain)
    ]
    assert said[0].stdout == said[1].stdout
