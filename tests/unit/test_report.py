"""`make report`: what is in the documents is what was measured, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import report  # noqa: E402
import report_plots  # noqa: E402

MEASURED = [report.FOLDER / name for name in (report.COMPARED, report.STARTS, report.ABLATION)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of what was measured, to be changed."""
    for path in MEASURED:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def changed(folder: Path, name: str, change: Any) -> None:
    found = json.loads((folder / name).read_text())
    change(found)
    (folder / name).write_text(json.dumps(found))


def test_the_documents_have_what_was_measured() -> None:
    """Whoever edits a table by hand, or measures without `make report`, or changes how it is shown: run it again, or
    `make report REPORT_ARGS=--render`.
    """
    made = report.made(report.FOLDER)
    assert {path.name for path in made} >= {"README.md", "SPECIFICATION.md", "compare.md", "compare-starts.svg"}
    assert [path.name for path, text in made.items() if path.read_text(encoding="utf-8") != text] == []


def test_the_page_is_of_the_same_comparison() -> None:
    document = json.loads((report.FOLDER / report.COMPARED).read_text())
    assert document["machine"]["date"] in (report.FOLDER / "compare.html").read_text(encoding="utf-8")


def test_another_figure_gives_another_document(folder: Path) -> None:
    def slower(found: Any) -> None:
        found["levels"][2]["costs"]["total_ns"]["p50"] *= 3
        found["levels"][2]["isolation"]["network"]["verdict"] = "shared"

    before = report.made(folder)
    changed(folder, report.COMPARED, slower)
    after = report.made(folder)
    assert {path.name for path in before if before[path] != after[path]} == {
        *("README.md", "SPECIFICATION.md", "compare.md", "compare-isolation.svg"),
    }


def test_a_target_that_is_missed_is_told(folder: Path) -> None:
    def missed(found: Any) -> None:
        found["targets"][0]["found"] = found["targets"][0]["most"] * 2
        found["targets"][1]["found"] = None

    changed(folder, report.STARTS, missed)
    starts = json.loads((folder / report.STARTS).read_text())
    lines = report.target_table(starts).splitlines()
    assert lines[2].endswith("| missed |")
    assert lines[3].endswith("| - | not measured |")


def test_a_section_goes_between_its_marks_and_nowhere_else() -> None:
    text = f"a\n{report.START}\nold\n{report.END}\nb\n"
    new = report.between(text, "new\n", "x")
    assert new == f"a\n{report.START}\n{report.MAKE}\n\nnew\n\n{report.END}\nb\n"
    assert report.between(new, "new", "x") == new
    for wrong in ("", f"{report.START}\n", f"{report.END}\n{report.START}\n", text + text):
        with pytest.raises(SystemExit, match="once each"):
            report.between(wrong, "new", "x")


def test_a_level_that_did_not_run_gives_no_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(found: Any) -> None:
        found["levels"][-1 if found["levels"][-1]["name"] == "vm" else 3]["unavailable"] = "no QEMU"

    changed(folder, report.COMPARED, broken)
    ran: list[str] = []

    def ringfence(*words: str, fine: tuple[int, ...]) -> bytes:
        ran.append(words[0])
        return b'{"samples": [1], "kept": 2}'

    monkeypatch.setattr(report, "_ringfence", ringfence)
    with pytest.raises(SystemExit, match="no report: vm: no QEMU"):
        report.measure(folder, rounds=1, measures=False)
    assert ran == ["compare"]


def test_what_is_published_has_no_facts_of_the_machine_and_no_samples_of_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(found: Any) -> None:
        for one in found["levels"]:
            one["facts"] = {"cmdline": "secret=1"}

    changed(folder, report.COMPARED, full)
    monkeypatch.setattr(report, "_ringfence", lambda *words, fine: b'{"samples": [1], "kept": 2}')
    report.measure(folder, rounds=1, measures=False)
    assert "secret=1" not in (folder / report.COMPARED).read_text()
    assert json.loads((folder / report.STARTS).read_text()) == {"kept": 2}
    assert all(one["facts"] == {} for one in json.loads((report.FOLDER / report.COMPARED).read_text())["levels"])


def test_a_command_that_fails_gives_no_report() -> None:
    with pytest.raises(SystemExit, match="ringfence compare ended with 125"):
        report._ringfence("compare", "--no-such-option", fine=(0, 1))


def test_plots_are_pictures_with_every_row_in_them() -> None:
    rows = [report_plots.Bar("a <b>", 1.0, "1 us", "#111"), report_plots.Bar("c", 1000.0, "1 ms", "#222")]
    for logarithmic in (False, True):
        picture = report_plots.bars("t", [*rows, report_plots.Bar("zero", 0.0, "0", "#333")], logarithmic=logarithmic)
        lengths = [float(one) for one in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)"', picture)]
        assert lengths[0] < lengths[1]
        assert {"a <b>", "c", "zero", "1 ms"} <= {one.text for one in ElementTree.fromstring(picture).iter()}
    picture = report_plots.matrix("t", ["x", "y"], {"kernel": ["own", "odd"]}, {"own": "#0f0"})
    assert picture.count('fill="#0f0"') == 1
    ElementTree.fromstring(picture)


def test_it_can_be_made_again_without_measuring() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "report.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--render" in done.stdout
