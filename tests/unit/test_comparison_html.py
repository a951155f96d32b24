"""The page of a comparison: by itself, in a real browser, and with everything in it hostile."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from comparison_parts import a_document, a_level, gone, measured, starts, surface, tried, verdict

import ringfence as rf
from ringfence.comparison.changes import changes_between
from ringfence.comparison.document import check
from ringfence.comparison.html import page
from ringfence.comparison.probes_table import print_probes
from ringfence.comparison.report import console, print_changes, print_comparison
from support.browser import Browser, browser_path
from support.sandboxes import need

SOURCE = Path(rf.__file__).parent.parent
PHONE, DESKTOP = 360, 1200
# What a workload, a file or a command line could bring.
EVIL = (
    "<script>document.title='owned'</script>\"'><img src=x onerror=document.title='owned'>{{7*7}}&lt;\x1b[2J\x00$x_1$"
    "]]>--></style></svg>\u202e\nNothing is worse [red]"
)
ELEMENTS = {
    *("html", "head", "meta", "link", "title", "style", "body", "header", "p", "h1", "h2", "h3", "pre", "code", "a"),
    *("main", "section", "b", "ul", "li", "span", "div", "article", "dl", "dt", "dd", "details", "summary", "i"),
    *("figure", "figcaption", "table", "thead", "tbody", "tr", "th", "td", "small", "footer"),
    *("svg", "g", "path", "defs", "clippath", "rect", "use", "text", "tspan"),
}


class Elements(HTMLParser):
    """Which elements and attributes a page has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def hostile(value: Any) -> Any:
    """The same with every text replaced that is nobody's fixed word."""
    if isinstance(value, dict):
        return {
            name if name in WORDS else f"{name}{EVIL}": inner
            if name in ("verdict", "better") or (name == "name" and inner == "bare")
            else hostile(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [hostile(one) for one in value]
    return f"{EVIL}\ud800{value}" if isinstance(value, str) else value


def _keys(rule: Any) -> set[str]:
    if isinstance(rule, list):
        return set().union(*map(_keys, rule)) if rule else set()
    if not isinstance(rule, dict):
        return set()
    return set(rule.get("properties", ())) | set().union(*map(_keys, rule.values()))


WORDS = _keys(__import__("ringfence.comparison.document", fromlist=["schema"]).schema())


def everything() -> dict[str, Any]:
    """All that a document can have, and long texts."""
    document = a_document()
    document["levels"].append(gone("runsc", "there is no runsc in PATH"))
    document["levels"][2]["isolation"]["kernel"]["evidence"] = "a-long-word-without-a-break" * 12
    document["levels"][2]["differences"] = ["stdout differs in line 1: 'a', not 'b' (1 bytes, not 1)"]
    document["argv"] = ["python3", "-c", "print('x')" * 60]
    return document


def crowded() -> dict[str, Any]:
    """Ten columns."""
    document = a_document()
    for at in range(6):
        document["levels"].append(
            a_level(
                f"another-tool-{at}",
                starts(5e6 * (at + 1)),
                isolation={"kernel": verdict("shared"), "signals": verdict("own")},
                probes={"kill-host": tried("own"), "ptrace-host": tried("restricted")},
                measures={"getpid": measured(starts(100.0), 40.0)},
            )
        )
    return document


# ---- the text of it ----


def test_a_page_is_one_file_that_names_no_other() -> None:
    document = everything()
    text = page(document, changes_between(document, document)).decode()
    found = Elements(text)
    assert not re.search(r"https?:|//|@import", text)
    assert found.elements <= ELEMENTS, found.elements - ELEMENTS
    assert "svg" in found.elements
    for name, value in found.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#") or value == "data:,", (name, value)
    assert set(re.findall(r"url\(([^)]{0,2})", text)) <= {"#p"}
    assert "script" not in found.elements
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in found.attributes


def test_what_is_hostile_is_only_text() -> None:
    document = hostile(everything())
    check(document)
    text = page(document, changes_between(hostile(a_document(a_level("vm", starts(1e9)))), document)).decode()
    found = Elements(text)
    assert found.elements <= ELEMENTS, found.elements - ELEMENTS
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "src"]
    assert "49&" not in text  # {{7*7}} is no template
    assert "&lt;script&gt;" in text
    assert "\x1b" not in text
    assert "\x00" not in text
    assert "\\x1b[2J\\x00" in text


def test_what_is_hostile_is_only_text_in_a_terminal() -> None:
    document = hostile(everything())
    changes = changes_between(hostile(a_document(a_level("vm", starts(1e9)))), document)
    for print_it in (
        functools.partial(print_comparison, document),
        functools.partial(print_probes, document),
        functools.partial(print_changes, changes),
    ):
        written = io.StringIO()
        print_it(console(written))
        text = written.getvalue()
        assert all(one.isprintable() or one == "\n" for one in text)
        assert "[red]" in "".join(text.split())
        if print_it.func is print_changes:
            # Ours, which is the last one, and none that a sentence has brought.
            assert [line for line in text.splitlines() if line.startswith("Nothing is worse")] == text.splitlines()[-1:]


def test_a_page_says_what_the_document_says() -> None:
    document = everything()
    weaker = copy.deepcopy(document)
    weaker["levels"][3]["isolation"]["kernel"]["verdict"] = "shared"
    text = page(weaker, changes_between(document, weaker)).decode()
    for words in (
        *("1 worse", "kernel was own, is shared", "runsc: did not run: there is no runsc in PATH (get it)"),
        *("Signals the caller.", "It could end it.", "kill EPERM", "kill ok", "not testable", "io_uring_setup"),
        *("89.8 ms", "x90", "951 MiB/s", "A CPU of the Test", "8.00 GiB", "stdout differ"),
    ):
        assert words in text, words


def test_what_is_little_known_of_another_tool_is_told_as_that() -> None:
    document = a_document()
    tool = a_level("bwrap", starts(5e6), facts={"tool": "bwrap 0.8", "note": "with the same namespaces"})
    for run in tool["runs"]:
        run["startup_ns"] = None
    tool["costs"]["startup_ns"] = None
    document["levels"].append(tool)
    document["levels"][3]["surface"].update(
        by="QEMU, in its jail", guest=surface(getpid="reachable", bpf="denied EPERM")
    )
    text = page(document).decode()
    for words in (
        *("<dt>whole call</dt><dd>6.", "Every whole call", "1 remark:", "bwrap: bwrap 0.8: with the same namespaces"),
        *("QEMU, in its jail", "the workload itself: 1 reachable, 1 denied, 0 absent"),
    ):
        assert words in text, words
    # Where nothing is known of it, it has no column.
    assert re.findall(r'class="level l-(\d)', text) == ["1", "2", "3"] * 2
    assert 'class="dot b-4"' in text


def test_what_was_not_measured_leaves_no_empty_parts() -> None:
    text = page(
        a_document(a_level("process", isolation={"kernel": verdict("shared")}), probes={}, measures={})
    ).decode()
    for name in ("probes", "surface", "measures", "changes"):
        assert f'id="{name}"' not in text
    lonely = page(a_document(gone("process"))).decode()
    assert "process: did not run" in lonely


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = browser_path()
    need("a browser without a window", path is not None)
    assert path is not None
    with Browser(path) as one:
        yield one


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, document in (("all", everything()), ("crowded", crowded()), ("hostile", hostile(everything()))):
        (folder / name).with_suffix(".html").write_bytes(page(document, changes_between(document, document)))
    return {path.stem: path for path in folder.iterdir()}


OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# What stands out of the window and in nothing that scrolls.
OUTSIDE = """[...document.querySelectorAll('main *, header *')].filter(one => !one.closest('.scroll, .matrix, .sr')
    && one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map(one => one.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("name", ["all", "crowded", "hostile"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_it_fits_and_asks_for_nothing(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    browser.open(pages[name], width=width)
    assert browser.complaints == []
    assert [one for one in browser.requests if not one.startswith(("file:", "data:,"))] == []
    assert len([one for one in browser.requests if one.startswith("file:")]) == 1
    browser.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.ask(OVERFLOW) <= 0
    assert browser.ask(OUTSIDE) == []
    assert browser.ask("document.title") != "owned"
    assert browser.ask("document.querySelectorAll('script, img, iframe, object').length") == 0


def test_a_click_on_a_cell_shows_its_evidence_and_another_hides_it(browser: Browser, pages: dict[str, Path]) -> None:
    cell = "#isolation details.line .cell:nth-of-type(3)"
    evidence = "document.querySelector('#isolation details.line .evidence').checkVisibility()"
    for width in (PHONE, DESKTOP):
        browser.open(pages["all"], width=width)
        assert browser.ask(evidence) is False
        browser.click(cell)
        assert browser.ask(evidence) is True
        assert "as it was seen" in browser.ask("document.querySelector('#isolation details.line .evidence').innerText")
        browser.click(cell)
        assert browser.ask(evidence) is False


def test_the_keyboard_does_the_same(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["all"], width=DESKTOP)
    group = "document.querySelector('#probes details.group')"
    browser.ask(f"{group}.querySelector('summary').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.ask(f"{group}.open") is True
    browser.press("Tab", 9)
    assert browser.ask("document.activeElement.innerText").startswith("kill-host")
    browser.press(" ", 32, " ")
    said = browser.ask(f"{group}.querySelector('.evidence').innerText")
    for words in ("Signals the caller.", "It could end it.", "kill ok", "kill EPERM"):
        assert words in said


def test_evidence_stays_in_view_where_the_matrix_scrolls(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["crowded"], width=PHONE)
    matrix = "document.querySelector('#isolation .matrix')"
    assert browser.ask(f"{matrix}.scrollWidth - {matrix}.clientWidth") > 100
    browser.ask(f"{matrix}.querySelector('details').open = true; {matrix}.scrollLeft = 200")
    left, right = browser.ask(
        f"(r => [r.left, r.right])({matrix}.querySelector('.evidence dd').getBoundingClientRect())"
    )
    assert 0 <= left < right <= PHONE


TEXTS = "[...document.querySelectorAll('figure svg text')]"


def test_the_plots_are_there(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["all"], width=PHONE)
    sizes = browser.ask("[...document.querySelectorAll('figure svg')].map(one => [one.clientWidth, one.clientHeight])")
    assert len(sizes) == 4  # starts, costs, and two groups of measures
    assert all(width > 250 and height > 40 for width, height in sizes)
    words = browser.ask(f"{TEXTS}.map(one => one.textContent)")
    for word in ("container", "vm (tcg)", "89.8 ms", "x1", "peak memory", "getpid"):
        assert word in words
    # A dot for each of 20 starts at each of four levels, and their text no smaller than can be read.
    assert browser.ask("document.querySelector('figure svg').querySelectorAll('use').length") >= 80
    heights = browser.ask(f"{TEXTS}.map(one => one.getBoundingClientRect().height)")
    assert min(heights) > 10


CONTRAST = """(() => {
    const rgb = text => text.match(/[\\d.]+/g).map(Number)
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0)
    const ground = one => { for (; one; one = one.parentElement) {
        const found = rgb(getComputedStyle(one).backgroundColor); if (found.length < 4 || found[3] > 0) return found } }
    const words = '.chip, .bar i, .quiet, small, h2, dd, dt, .ratio, .name, .kind'
    return Math.min(...[...document.querySelectorAll(words)].map(one => {
        const [a, b] = [light(rgb(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x)
        return (a + .05) / (b + .05) }))
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_by_day_and_by_night(browser: Browser, pages: dict[str, Path], dark: bool) -> None:
    """WCAG 2.1, 1.4.3: a contrast of 4.5 to 1 at least."""
    browser.open(pages["all"], width=DESKTOP, dark=dark)
    lightness = sum(map(int, re.findall(r"\d+", browser.ask("getComputedStyle(document.body).backgroundColor"))[:3]))
    assert (lightness < 200) == dark
    assert browser.ask(CONTRAST) >= 4.5
    ink = browser.ask("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 400) == dark


# ---- the command line ----


def command_line(*words: str, without: str = "") -> subprocess.CompletedProcess[bytes]:
    program = f"""import sys
if {without!r}: sys.modules[{without!r}] = None
from ringfence.cli.main import main
sys.exit(main(sys.argv[1:]))"""
    return subprocess.run(
        [sys.executable, "-c", program, "compare", *words],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        check=False,
    )


def test_a_page_of_a_real_comparison(tmp_path: Path, browser: Browser) -> None:
    path, saved = tmp_path / "page.html", tmp_path / "saved.json"
    path.write_text("old")
    done = command_line(
        *("--levels", "process,container", "--repeat", "3", "--html", str(path), "--save", str(saved)),
        *("--", "echo", EVIL.replace("\x00", "")),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["page.html", "saved.json"]
    browser.open(path, width=PHONE)
    assert browser.complaints == []
    assert "owned" in browser.ask("document.querySelector('.command').innerText")
    assert browser.ask("document.title.startsWith('echo <script>')")
    document = json.loads(saved.read_text())
    assert browser.ask("document.querySelectorAll('#isolation details.line').length") == len(
        document["levels"][1]["isolation"]
    )
    again = command_line("--load", str(saved), "--html", str(tmp_path / "again.html"), "--against", str(saved))
    assert again.returncode == 0, again.stderr
    assert b"nothing is worse" in (tmp_path / "again.html").read_bytes()


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_package_is_told_before_anything_is_run(missing: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    done = command_line("--html", str(tmp_path / "x.html"), "--", "touch", str(ran), without=missing)
    assert done.returncode == 125
    assert done.stderr == f"ringfence: --html needs {missing}; run: pip install 'ringfence[report]'\n".encode()
    assert os.listdir(tmp_path) == []


def test_a_page_that_cannot_be_written_is_told_before_anything_is_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    done = command_line("--html", str(tmp_path / "none" / "x.html"), "--", "touch", str(ran))
    assert done.returncode == 125
    assert b"--html: " in done.stderr
    assert os.listdir(tmp_path) == []


def test_what_a_plot_says_stays_as_it_is() -> None:
    """A name that looks like a part of the drawing: only the tags are made the page's."""
    from ringfence.comparison import plots

    label = 'id="x" font: 9px y; #010101 url(#z) xmlns="u"'
    picture = (
        '<?xml?><svg xmlns="http://www.w3.org/2000/svg" width="1pt" height="2pt" viewBox="0 0 1 2">\n   <metadata>m'
        f'</metadata><g id="z">\n  <text id="t" style="font: 9px serif; fill: #010101">{label}</text>\n </g></svg>'
    )
    assert plots._for_a_page(picture) == (
        '<svg  viewBox="0 0 1 2">\n<g>\n<text style="font-size: 9px; fill: var(--fg)">' + label + "</text>\n</g></svg>"
    )
