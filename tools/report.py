"""`make report`: measures this machine, and puts the tables and plots of it into the documents.

What is measured is kept as JSON in docs/measurements: a real job compared at every level (`ringfence compare`), starts
against other tools (`ringfence bench`), and what each part of a boundary costs (`ringfence bench --ablation`). All else
is made of these three files alone: docs/measurements/compare.md and .html, three plots, and what is between the marks
"report:start" and "report:end" in README.md and SPECIFICATION.md. So `--render` makes it again without measuring, and a
test finds out whether somebody changed one without the other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from report_plots import Bar, bars, matrix

from ringfence.comparison import document as documents
from ringfence.comparison.figures import duration, figure, times
from ringfence.comparison.report import COSTS, cost_ratio

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "measurements"
COMPARED, STARTS, ABLATION = "compare.json", "compare-starts.json", "compare-ablation.json"
START, END = "<!-- report:start -->", "<!-- report:end -->"
MAKE = "<!-- Made by `make report`, from docs/measurements; not by hand. -->"
JOB = ROOT / "examples" / "data"

# Rows of the README: what people ask for first. All are in compare.md.
FIRST = (
    "kernel",
    "memory",
    "files",
    "processes",
    "users",
    "network",
    "devices",
    "capabilities",
    "system calls",
    "clock",
)


# ---- measuring ----


def measure(folder: Path, *, rounds: int, measures: bool) -> None:
    """Takes all that is shown, some minutes. Raises SystemExit where a level didn't run, or a command failed."""
    from ringfence.cli import compare

    has = {one.name for one in compare.OPTIONS.options}
    more = ["--surface"] if "surface" in has else []
    more += ["--peers"] if "peers" in has else []
    more += ["--measures"] if measures else []
    # The first run of each isn't counted, as that of a guest may have made its template.
    job = [
        "--repeat",
        "8",
        "--input",
        str(JOB / "jargon.txt"),
        "--file",
        f"job.py={JOB / 'job.py'}",
        "--collect",
        "words.csv",
    ]
    saved = ["--save", str(folder / COMPARED)]
    _ringfence("compare", *job, *more, *saved, "--", "python3", "job.py", fine=(0, 1))
    document = documents.load(str(folder / COMPARED))
    broken = [
        f"{one['name']}: {one['unavailable'] or '; '.join(one['differences'])}"
        for one in document["levels"]
        if one["name"] in ("bare", "process", "container", "vm") and (one["unavailable"] or one["differences"])
    ]
    if broken:
        raise SystemExit("no report: " + "; ".join(broken))
    # What the probe saw of a machine (its kernel's command line, its mounts) is of that machine's owner alone.
    document["levels"] = [{**one, "facts": {}} for one in document["levels"]]
    documents.save(document, str(folder / COMPARED))
    # The verdicts of a missed target are shown, so status 1 is no failure.
    for name, words in ((STARTS, ()), (ABLATION, ("--ablation",))):
        said = _ringfence("bench", *words, "-n", str(rounds), "--json", fine=(0, 1))
        found = _without_samples(json.loads(said))
        documents.write_file(str(folder / name), json.dumps(found, indent=1).encode() + b"\n")


def _ringfence(*words: str, fine: tuple[int, ...]) -> bytes:
    print(f"ringfence {' '.join(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "ringfence", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    if done.returncode not in fine:
        raise SystemExit(f"no report: ringfence {words[0]} ended with {done.returncode}")
    return done.stdout


def _without_samples(found: dict[str, Any]) -> dict[str, Any]:
    """Of samples their median stays, for what has no summary of its own."""
    return {name: value for name, value in found.items() if name != "samples"}


# ---- what is made of it ----


def made(folder: Path) -> dict[Path, str]:
    """Every file that is made of what was measured, with its text; of the documents those with a section in them."""
    document = documents.load(str(folder / COMPARED))
    starts, ablation = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (STARTS, ABLATION))
    found = {
        FOLDER / "compare.md": page(document, starts, ablation),
        FOLDER / "compare-isolation.svg": isolation_plot(document),
        FOLDER / "compare-starts.svg": starts_plot(document, starts),
        FOLDER / "compare-ablation.svg": ablation_plot(ablation),
    }
    for name, section in (
        ("README.md", readme_section(document)),
        ("SPECIFICATION.md", specification_section(document, starts)),
    ):
        path = ROOT / name
        found[path] = between(path.read_text(encoding="utf-8"), section, name)
    return found


def between(text: str, section: str, name: str) -> str:
    """A document with that section between its two marks."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end or START in after or END in after:
        raise SystemExit(f"{name} must have {START} and {END}, once each")
    return f"{before}{START}\n{MAKE}\n\n{section.strip()}\n\n{END}{after}"


def _levels(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Bare and the three levels, without the other tools."""
    return [one for one in document["levels"] if one["name"] in ("bare", "process", "container", "vm")]


def title(level: dict[str, Any]) -> str:
    return f"{level['name']} ({level['accelerator']})" if level["accelerator"] else str(level["name"])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return _row(head) + "|" + "---|" * len(head) + "\n" + "".join(map(_row, rows))


def machine(found: dict[str, Any]) -> str:
    nested = {True: "itself a guest", False: "not a guest itself", None: "not known to be a guest"}[found["nested"]]
    return (
        f"{found['date'][:10]}: Linux {found['kernel']}, {found['cpus']} CPUs ({found['cpu_model']}), {nested}, "
        f"{found['cgroups']} cgroups, Landlock ABI {found['landlock_abi']}, "
        f"{'as root' if found['privileged'] else 'unprivileged'}, load {found['load']}, Python {found['python']}."
    )


def isolation_table(document: dict[str, Any], names: tuple[str, ...] | None, *, evidence: bool = False) -> str:
    levels = _levels(document)
    rows = []
    for name in names or tuple(levels[0]["isolation"]):
        cells = []
        for one in levels:
            found = one["isolation"].get(name)
            word = (
                "-" if found is None else f"**{found['verdict']}**" if found["verdict"] == "own" else found["verdict"]
            )
            cells.append(f"{word}: {found['evidence']}" if evidence and found else word)
        rows.append([name, *cells])
    return _table(["", *map(title, levels)], rows)


def probe_table(document: dict[str, Any]) -> str:
    """How many attempts of each group had which verdict."""
    levels = [one for one in _levels(document) if one["probes"]]
    groups: dict[str, list[str]] = {}
    for name, one in document["probes"].items():
        groups.setdefault(one["group"], []).append(name)
    rows = []
    for group, names in groups.items():
        cells = []
        for one in levels:
            words = [one["probes"][name]["verdict"] for name in names if name in one["probes"]]
            order = ("own", "restricted", "shared", "unknown", "not testable")
            cells.append(", ".join(f"{words.count(word)} {word}" for word in order if word in words))
        rows.append([f"{group} ({len(names)})", *cells])
    return _table(["", *map(title, levels)], rows)


def surface_table(document: dict[str, Any]) -> str:
    levels = [one for one in _levels(document) if one["surface"]]
    rows = [[kind, *(str(one["surface"][kind]) for one in levels)] for kind in ("reachable", "denied", "absent")]
    return _table(["system calls", *map(title, levels)], rows)


def cost_table(document: dict[str, Any], levels: list[dict[str, Any]], only: tuple[str, ...] = ()) -> str:
    bare = document["levels"][0]
    rows = []
    for name, measure, unit in COSTS:
        if only and measure not in only:
            continue
        cells = []
        for one in levels:
            found, ratio = one["costs"].get(measure), cost_ratio(one, bare, measure)
            shown = "-" if found is None else figure(found["p50"], unit)
            cells.append(f"{shown} ({times(ratio)})" if ratio is not None else shown)
        rows.append([name, *cells])
    return _table(["the median, and its ratio to bare", *map(title, levels)], rows)


def measure_table(document: dict[str, Any]) -> str:
    """The cost suite: each measure, its median at each level, and the ratio to bare."""
    levels = [one for one in document["levels"] if one["measures"]]
    rows = []
    for name, one in document["measures"].items():
        cells = []
        for level in levels:
            found = level["measures"].get(name)
            if found is None or found["summary"] is None:
                cells.append("-")
                continue
            ratio = f" ({times(found['ratio'])})" if found["ratio"] is not None and level["name"] != "bare" else ""
            cells.append(f"{figure(found['summary']['p50'], one['unit'])}{ratio}")
        better = "less" if one["better"] == "lower" else "more"
        rows.append([f"{name}: {one['what'].rstrip('.')}; {better} is better", *cells])
    return _table(["", *map(title, levels)], rows)


def target_table(starts: dict[str, Any]) -> str:
    rows = []
    for one in starts["targets"]:
        found, most = one["found"], one["most"]
        spell = (lambda value: f"{value:.2f}") if one["against"] else duration
        word = "not measured" if found is None else "met" if found <= most else "missed"
        rows.append(
            [one["what"], one["against"] or "absolute", spell(most), "-" if found is None else spell(found), word]
        )
    return _table(["what", "against", "at most", "found", ""], rows)


def ablation_table(parts: list[dict[str, Any]]) -> str:
    rows = [[parts[0]["name"], duration(parts[0]["p50"]), "", ""]]
    for one in parts[1:]:
        span = f"{one['low_ns'] / 1000:+.0f} to {one['high_ns'] / 1000:+.0f} us"
        rows.append([one["name"], duration(one["p50"]), f"{one['cost_ns'] / 1000:+.0f} us", span])
    return _table(["a start, and without a part", "p50", "the part costs", "95 % of it"], rows)


# ---- the documents ----


def readme_section(document: dict[str, Any]) -> str:
    levels = _levels(document)
    command = " ".join(document["argv"])
    return f"""\
`{command}` of `examples/data`, bare and at every level, on {machine(document["machine"])}

{isolation_table(document, FIRST)}
{cost_table(document, levels, ("startup_ns", "total_ns", "cpu_ns", "memory_peak_bytes"))}
![What each level isolates](docs/measurements/compare-isolation.svg)

![What a start takes, by each tool](docs/measurements/compare-starts.svg)

All rows with their evidence, the probes and the costs are in [compare.md](docs/measurements/compare.md), and as one
page to open in a browser in [compare.html](docs/measurements/compare.html). `make report` measures them anew."""


def specification_section(document: dict[str, Any], starts: dict[str, Any]) -> str:
    return f"""\
Found by the last `make report`, on {machine(starts["machine"])}

{target_table(starts)}
And of the job of the demo, {machine(document["machine"])}

{cost_table(document, document["levels"])}
[compare.md](docs/measurements/compare.md) has what was isolated, with the evidence, and what each part of a boundary
costs."""


def page(document: dict[str, Any], starts: dict[str, Any], ablation: dict[str, Any]) -> str:
    """docs/measurements/compare.md."""
    parts = [
        "# A comparison, measured\n",
        MAKE + "\n",
        f"`ringfence compare` of `{' '.join(document['argv'])}` in `examples/data`, which counts words. On"
        f" {machine(document['machine'])} The whole of it is [compare.json](compare.json).\n",
        "## What each level isolates\n",
        "![What each level isolates](compare-isolation.svg)\n",
        isolation_table(document, None, evidence=True),
    ]
    if document["probes"] and any(one["probes"] for one in document["levels"]):
        parts += [f"## {len(document['probes'])} attempts\n", probe_table(document)]
    if any(one["surface"] for one in document["levels"]):
        parts += ["## The system calls in reach\n", surface_table(document)]
    parts += ["## What the command costs\n", cost_table(document, document["levels"])]
    if document["measures"] and any(one["measures"] for one in document["levels"]):
        parts += ["## The cost suite\n", measure_table(document)]
    parts += [
        "## Starts\n",
        f"`ringfence bench`, on {machine(starts['machine'])}\n",
        "![What a start takes, by each tool](compare-starts.svg)\n",
        target_table(starts),
        "## What each part costs\n",
        f"`ringfence bench --ablation`, on {machine(ablation['machine'])}\n",
        "![What a start saves without a part](compare-ablation.svg)\n",
    ]
    for level, found in ablation["parts"].items():
        parts += [f"### {level}\n", ablation_table(found)]
    missing = [f"- {one['name']}: {one['unavailable']}" for one in document["levels"] if one["unavailable"]]
    if missing:
        parts += ["## Not here\n", "\n".join(missing) + "\n"]
    return "\n".join(parts)


# ---- plots ----

_COLOURS = {"own": "#2e8b57", "restricted": "#d9a400", "shared": "#c9463d", "unknown": "#9a9a9a"}
_OURS, _OTHERS, _BARE = "#2a7f86", "#8a8f98", "#4a4f57"


def isolation_plot(document: dict[str, Any]) -> str:
    levels = _levels(document)
    rows = {
        name: [(one["isolation"].get(name) or {"verdict": "unknown"})["verdict"] for one in levels]
        for name in levels[0]["isolation"]
    }
    return matrix("What each level isolates", [title(one) for one in levels], rows, _COLOURS)


def starts_plot(document: dict[str, Any], starts: dict[str, Any]) -> str:
    """Medians, on a logarithmic axis: a guest takes a hundred times as long as a process."""
    rows = []
    for name, found in starts["summaries"].items():
        if found is None or name.startswith(("python", "import", "container, ")):
            continue
        colour = _OURS if name.startswith(("rf.", "pool", "ringfence")) else _BARE if "subprocess" in name else _OTHERS
        rows.append(Bar(name, found["p50"], duration(found["p50"]), colour))
    return bars("What a start takes, from the call to its end: the median", rows, logarithmic=True)


def ablation_plot(ablation: dict[str, Any]) -> str:
    """What is saved by leaving a part out, as far as it can be told from none at all."""
    rows = []
    for level, parts in ablation["parts"].items():
        for one in sorted(parts[1:], key=lambda part: -part["cost_ns"]):
            if one["name"].startswith("without ") and one["low_ns"] > 0:
                name = f"{level}: {one['name'].removeprefix('without ')}"
                rows.append(Bar(name, one["cost_ns"], f"{one['cost_ns'] / 1000:+.0f} us", _OURS))
    return bars("What a start saves without a part, where it is more than noise", rows, logarithmic=False)


def write(folder: Path) -> None:
    """Everything that is made, and the page."""
    for path, text in made(folder).items():
        path.write_text(text, encoding="utf-8")
    from ringfence.comparison.html import page as html

    documents.write_file(str(FOLDER / "compare.html"), html(documents.load(str(folder / COMPARED))))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--render", action="store_true", help="measure nothing; make all from docs/measurements anew")
    parser.add_argument("--measures", action="store_true", help="take the whole cost suite too, some minutes more")
    parser.add_argument("--rounds", type=int, default=60, help="starts of each kind (60)")
    given = parser.parse_args()
    if not given.render:
        measure(FOLDER, rounds=given.rounds, measures=given.measures)
    write(FOLDER)
    print(f"written: docs/measurements/compare.*, README.md, SPECIFICATION.md (load {os.getloadavg()[0]:.1f})")


if __name__ == "__main__":
    main()
