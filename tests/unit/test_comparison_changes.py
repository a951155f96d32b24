"""What counts as worse between two comparisons, and what is noise."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comparison_parts import MACHINE, a_document, a_level, gone, measured, starts, surface, tried, verdict

import ringfence as rf
from ringfence.comparison.changes import Changes, Tolerance, changes_between
from ringfence.comparison.document import save
from ringfence.comparison.probes_table import print_probes
from ringfence.comparison.report import console, print_changes, print_comparison

SOURCE = Path(rf.__file__).parent.parent


def between(old: dict[str, Any], new: dict[str, Any], **options: Any) -> Changes:
    """Of two documents that have one level each, behind the bare one."""
    return changes_between(a_document(old), a_document(new), **options)


def told(changes: Changes) -> list[tuple[str, str, str]]:
    return [(one.kind, one.about, one.name) for one in changes.changes]


def test_the_same_is_no_change() -> None:
    found = changes_between(a_document(), a_document())
    assert (found.changes, found.notes) == ((), ())


ORDER = ("own", "restricted", "shared")


@pytest.mark.parametrize("section", ["isolation", "probes"])
@pytest.mark.parametrize("before", [*ORDER, "unknown", "not testable"])
@pytest.mark.parametrize("after", [*ORDER, "unknown", "not testable"])
def test_verdicts_are_ordered(section: str, before: str, after: str) -> None:
    make = verdict if section == "isolation" else tried
    old = {**a_level("container"), section: {"x": make(before), "other": make("own")}}
    new = {**a_level("container"), section: {"x": make(after), "other": make("own")}}
    found = between(old, new)
    if before in ORDER and after in ORDER:
        step = ORDER.index(after) - ORDER.index(before)
        expected = ["worse"] if step > 0 else ["better"] if step < 0 else []
    elif before in ORDER:
        expected = ["worse"]
    else:
        expected = ["changed"] if after in ORDER else []
    assert [one.kind for one in found.changes] == expected
    if expected:
        assert f"x was {before}, is {after}: " in found.changes[0].sentence


def test_what_cannot_be_told_any_more_is_allowed_where_that_is_asked_for() -> None:
    old = a_level("vm", isolation={"a": verdict("own"), "b": verdict("own")}, probes={"p": tried("own")})
    new = a_level("vm", isolation={"a": verdict("unknown")}, probes={})
    strict = between(old, new)
    assert [one.kind for one in strict.changes] == ["worse"] * 3
    allowed = between(old, new, allow_unknown=True)
    assert [one.kind for one in allowed.changes] == ["changed"] * 3
    assert allowed.worse == ()
    assert [one.name for one in allowed.changes] == ["a", "b", ""]


def test_a_real_weakening_is_worse_even_where_unknown_is_allowed() -> None:
    old, new = (a_level("vm", isolation={"a": verdict(word)}) for word in ("own", "restricted"))
    assert len(between(old, new, allow_unknown=True).worse) == 1


def test_a_level_that_is_gone_is_worse_and_so_is_one_that_there_is_nothing_to_hold_against() -> None:
    there = a_level("container")
    other = changes_between(a_document(there), a_document(a_level("process")))
    assert [(one.level, one.kind, one.about) for one in other.changes] == [
        ("container", "worse", "level"),
        ("process", "worse", "level"),
    ]
    assert told(between(there, gone("container"))) == [("worse", "level", "")]
    assert told(between(gone("container"), there)) == [("worse", "level", "")]
    assert told(between(gone("container"), there, allow_unknown=True)) == [("worse", "level", "")]
    # Of a level that doesn't run, and of another tool, nothing is promised.
    assert told(changes_between(a_document(there), a_document(there, gone("vm"), a_level("crun")))) == []
    for section, about in (("isolation", "isolation"), ("probes", "probe")):
        blank = {**there, section: {}}
        seen = {**there, section: {"x": verdict("shared") if section == "isolation" else tried("shared")}}
        assert told(between(blank, seen)) == [("worse", about, "")]
    assert told(between(gone("container"), gone("container"))) == []


def test_output_that_differs_since_is_worse_unless_the_command_varies() -> None:
    same, other = a_level("vm"), a_level("vm", differences=["stdout differs in line 1"])
    assert told(between(same, other)) == [("worse", "output", "")]
    assert told(between(other, same)) == [("better", "output", "")]
    assert told(between(other, other)) == []
    assert told(between(same, {**other, "varies": True})) == [("changed", "output", "")]


def test_a_system_call_that_was_denied_and_is_reached_is_worse() -> None:
    old = a_level("vm", surface=surface(bpf="denied EPERM", new="absent", read="reachable", kexec="denied EPERM"))
    new = a_level("vm", surface=surface(bpf="reachable", new="reachable", read="denied SIGSYS", kexec="denied ENOSYS"))
    found = between(old, new)
    assert [(one.kind, one.sentence) for one in found.changes] == [
        ("worse", "1 system call is reached that was denied: bpf"),
        ("better", "1 system call is denied that was reached: read"),
        ("changed", "1 system call is reached that wasn't there: new"),
    ]
    only = between(old, a_level("vm"))
    assert only.changes == ()
    assert "only one of the two tried them" in only.notes[0]


# ---- starts ----


def test_a_start_that_takes_longer_is_worse() -> None:
    found = between(a_level("container", starts(3e6)), a_level("container", starts(4e6, seed=2)))
    assert told(found) == [("worse", "start", "start")]
    assert "a start takes 4.0" in found.worse[0].sentence
    quicker = between(a_level("container", starts(4e6)), a_level("container", starts(3e6, seed=2)))
    assert told(quicker) == [("better", "start", "start")]


@pytest.mark.parametrize(
    ("before_ns", "after_ns", "why"),
    [
        (10e6, 10.5e6, "less than the share"),
        (1e6, 1.15e6, "less than the time"),
    ],
)
def test_a_little_longer_is_not(before_ns: float, after_ns: float, why: str) -> None:
    assert between(a_level("vm", starts(before_ns)), a_level("vm", starts(after_ns, seed=2))).changes == (), why


def test_starts_that_took_no_time_are_none() -> None:
    found = between(a_level("vm", [0, 0, 0, 1e9]), a_level("vm", starts(1e9)))
    assert found.changes == ()
    assert "vm: starts aren't compared: 1 and " in found.notes[0]


def test_the_tolerance_is_the_callers() -> None:
    old, new = a_level("vm", starts(10e6)), a_level("vm", starts(13e6, seed=2))
    assert len(between(old, new).worse) == 1
    assert between(old, new, tolerance=Tolerance(share=0.5)).changes == ()
    assert between(old, new, tolerance=Tolerance.parse("10%,5ms")).changes == ()
    assert len(between(old, new, tolerance=Tolerance.parse("10%,1ms")).worse) == 1


def test_a_higher_median_of_samples_that_scatter_is_noise() -> None:
    old = a_level("container", [1e6, 1e6, 9e6, 2e6, 8e6, 1e6])
    new = a_level("container", [8e6, 9e6, 1e6, 1e6, 9e6, 2e6])
    assert between(old, new).changes == ()


def test_a_machine_that_is_slower_as_a_whole_is_no_regression() -> None:
    """The bare command takes twice the time as well."""
    old = a_document(a_level("container", starts(3e6)))
    new = a_document(a_level("container", starts(6e6, seed=2)))
    new["levels"][0] = a_level("bare", starts(2e6, seed=3))
    found = changes_between(old, new)
    assert [(one.kind, one.level) for one in found.changes] == [("changed", "bare"), ("changed", "container")]
    assert "so does all else here" in found.changes[1].sentence


def test_few_runs_are_not_judged_and_that_is_told() -> None:
    found = between(a_level("vm", [1e8, 1e8]), a_level("vm", [9e8] * 5))
    assert found.changes == ()
    assert found.notes == ("vm: starts aren't compared: 2 and 5 runs, and it takes 3 (--repeat)",)


def test_another_accelerator_is_not_compared() -> None:
    found = between(a_level("vm", starts(1e7)), {**a_level("vm", starts(9e7)), "accelerator": "kvm"})
    assert found.changes == ()
    assert "it ran by tcg, runs by kvm" in found.notes[0]


@pytest.mark.parametrize("fact", ["kernel", "cpu_model"])
def test_across_hosts_verdicts_are_judged_and_times_are_not(fact: str) -> None:
    old = a_document(a_level("container", starts(1e6), isolation={"a": verdict("own")}))
    new = a_document(
        a_level("container", starts(9e6), isolation={"a": verdict("shared")}), machine={**MACHINE, fact: "another"}
    )
    found = changes_between(old, new)
    assert told(found) == [("worse", "isolation", "a")]
    assert found.notes[0] == f"another host: {fact} was {MACHINE[fact]}, is another"
    assert "times aren't compared across hosts" in found.notes[1]


def test_another_memory_size_is_told_and_times_are_compared() -> None:
    old = a_document(a_level("container", starts(1e6)))
    new = a_document(a_level("container", starts(9e6)), machine={**MACHINE, "memory_bytes": 1 << 30})
    found = changes_between(old, new)
    assert told(found) == [("worse", "start", "start")]
    assert len(found.notes) == 1


def test_other_tools_and_the_bare_run_are_only_told_of() -> None:
    old = a_level("bwrap", starts(1e6), isolation={"a": verdict("own")})
    new = a_level("bwrap", starts(9e6), isolation={"a": verdict("shared")})
    assert told(between(old, new)) == [("changed", "isolation", "a"), ("changed", "start", "start")]


def test_other_costs_are_told_and_no_failure() -> None:
    old = a_level("vm", measures={"getpid": measured(starts(100.0)), "memcpy": measured(starts(1e9))})
    new = a_level("vm", measures={"getpid": measured(starts(300.0)), "memcpy": measured(starts(1e9, seed=4))})
    found = between(old, new)
    assert told(found) == [("changed", "cost", "getpid")]
    assert found.changes[0].sentence.startswith("getpid: 299 ns, was 100 ns: x3.00")


def test_another_command_is_told_and_its_own_costs_are_not_compared() -> None:
    old = a_document(a_level("vm", measures={"getpid": measured(starts(100.0))}))
    new = a_document(a_level("vm", measures={"getpid": measured(starts(300.0))}), argv=["false"])
    found = changes_between(old, new)
    assert found.changes == ()
    assert found.notes == ("the command was another",)


@pytest.mark.parametrize("text", ["", "10", "-1%", "x%", "10%,", "10%,soon", "nan%"])
def test_a_tolerance_that_is_none(text: str) -> None:
    with pytest.raises(ValueError):
        Tolerance.parse(text)


# ---- what is printed ----


def text_of(print_it: Any, tmp_path: Path) -> str:
    with (tmp_path / "out").open("w+") as file:
        print_it(console(file))
        file.seek(0)
        return file.read()


def test_changes_are_printed_the_worst_first(tmp_path: Path) -> None:
    old = a_document(a_level("vm", isolation={"a": verdict("restricted"), "b": verdict("own")}))
    new = a_document(a_level("vm", isolation={"a": verdict("own"), "b": verdict("shared", "evil \x1b[2J")}))
    text = text_of(lambda to: print_changes(changes_between(old, new), to), tmp_path)
    assert text.index("worse   vm: b was own, is shared: evil \\x1b[2J") < text.index("better  vm: a was")
    assert "1 worse than it was" in text
    assert "\x1b" not in text


def test_a_document_with_everything_is_printed(tmp_path: Path) -> None:
    peers = [a_level(f"tool{at}", isolation={"kernel": verdict("shared", "hidden")}) for at in range(4)]
    whole = a_document()
    text = text_of(lambda to: print_comparison(whole, to), tmp_path)
    for word in (
        "signals",
        "2 own",
        "1 not testable",
        "System calls",
        "reachable",
        "getpid",
        "x1.50 1.35 to 1.65",
        "951 MiB/s",
    ):
        assert word in text, word
    wide = text_of(lambda to: print_comparison({**whole, "levels": [*whole["levels"], *peers]}, to), tmp_path)
    assert "hidden" not in wide  # no room for it
    assert "tool3" in wide


def test_what_a_file_says_moves_no_terminal_and_is_no_markup(tmp_path: Path) -> None:
    evil = "\x1b]0;pwned\x07[red]x[/red][/x]"
    probe = {"group": evil, "tries": evil, "why": evil}
    levels = [
        a_level(
            f"vm{evil}",
            accelerator=evil,
            memory_source=evil,
            isolation={evil: verdict("own", evil)},
            probes={evil: tried("own", evil)},
            measures={evil: measured([1.0, 2.0, 3.0], 1.5)},
            surface={**surface(bpf="absent"), "by": evil},
        )
    ]
    measure = {"group": evil, "what": evil, "unit": "ns", "better": "lower"}
    document = a_document(*levels, probes={evil: probe}, measures={evil: measure}, argv=[evil])
    for print_it in (print_comparison, print_probes):
        text = "".join(text_of(functools.partial(print_it, document), tmp_path).split())
        assert "\x1b" not in text and "\x07" not in text
        assert "\\x1b]0;pwned" in text and "[red]x[/red][/x]" in text


# ---- the command line ----


def command_line(*words: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run(
        [sys.executable, "-m", "ringfence", "compare", *words], capture_output=True, env=environment, check=False
    )


def test_saved_and_compared_on_the_command_line(tmp_path: Path) -> None:
    saved, weaker = str(tmp_path / "saved.json"), str(tmp_path / "weaker.json")
    done = command_line("--levels", "container", "--repeat", "4", "--save", saved, "--", "true")
    assert done.returncode == 0, done.stderr
    document = json.loads(Path(saved).read_text())
    same = command_line("--load", saved, "--against", saved)
    assert (same.returncode, same.stderr) == (0, b"")
    assert b"Nothing is worse than it was" in same.stdout
    # A boundary that lost its network namespace, and one that lost 2 ms.
    container = document["levels"][1]
    assert container["isolation"]["network"]["verdict"] == "own"
    container["isolation"]["network"]["verdict"] = "shared"
    save(document, weaker)
    worse = command_line("--load", weaker, "--against", saved, "--json")
    assert worse.returncode == 1
    assert [one["name"] for one in json.loads(worse.stdout)["changes"]["changes"]] == ["network"]
    # And with a run of its own: of the levels of the old one, one isn't there.
    other = command_line("--levels", "process", "--repeat", "1", "--against", saved, "--", "true")
    assert other.returncode == 1
    assert b"worse   container: it is gone" in other.stdout
    assert b"worse   process: that comparison has no such level" in other.stdout
    container.update(unavailable="no namespaces here")
    save(document, weaker)
    for now, then, said in (
        (weaker, saved, b"worse   container: it doesn't run any more: no namespaces here"),
        (saved, weaker, b"worse   container: it didn't run then (no namespaces here): there is nothing"),
    ):
        lost = command_line("--load", now, "--against", then)
        assert lost.returncode == 1
        assert said in lost.stdout, lost.stdout


def test_what_is_saved_can_go_to_a_pipe() -> None:
    done = command_line("--levels", "process", "--repeat", "1", "--save", "/dev/stderr", "--", "true")
    assert done.returncode == 0
    assert json.loads(done.stderr)["argv"] == ["true"]


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    saved, foreign = tmp_path / "saved.json", tmp_path / "foreign.json"
    save(a_document(), str(saved))
    foreign.write_text(json.dumps({**a_document(), "schema": 99}))
    for words, said in (
        (("--load", str(saved), "--", "true"), b"there can be no command"),
        (("--load", str(saved), "--repeat", "3"), b"no --repeat"),
        (("--load", str(saved), "--tolerance", "10%"), b"--tolerance is for --against"),
        (("--load", str(saved), "--against", str(saved), "--tolerance", "10"), b"PERCENT%"),
        (("--load", str(foreign)), b"a comparison of version 99; this ringfence reads version 1"),
        (("--against", str(tmp_path / "none"), "--", "true"), b"No such file"),
        (("--save", str(tmp_path / "none" / "file"), "--", "true"), b"can't be written"),
        (("--save", str(tmp_path), "--", "true"), b"can't be written"),
    ):
        done = command_line(*words)
        assert done.returncode == 125, done
        assert said in done.stderr, done.stderr
        assert done.stderr.count(b"\n") == 1
        assert done.stdout == b""
