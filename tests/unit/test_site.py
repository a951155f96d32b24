"""The site of docs/: it is built without a warning, every link leads somewhere, and it asks no other host."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import ringfence as rf
from ringfence.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """Of an HTML file: its anchors, what it links to, and what a browser loads with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and "href" in given and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(given["href"])
        elif "src" in given:
            self.loaded.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def read(site: Path) -> dict[Path, Page]:
    found = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(found) > 20
    return found


def broken(read: dict[Path, Page], site: Path) -> list[str]:
    found = []
    for path, page in read.items():
        for link in (*page.links, *page.loaded):
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "data", "mailto"):
                continue
            # The page for what isn't there is served from anywhere, so its paths begin at the top.
            top = site if parts.path.startswith("/") else path.parent
            there = (top / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            if not there.exists() or (parts.fragment and there in read and parts.fragment not in read[there].anchors):
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def test_every_link_leads_somewhere(read: dict[Path, Page], site: Path) -> None:
    assert sum(len(page.links) for page in read.values()) > 500
    assert broken(read, site) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    text = (
        '<h1 id="a"></h1><a href="#a"></a><a href="#b"></a><a href="c.html"></a><img src="d.svg"><a href="https://x">'
    )
    (tmp_path / "one.html").write_text(text)
    pages = {tmp_path / "one.html": Page(text)}
    assert broken(pages, tmp_path) == ["one.html: #b", "one.html: c.html", "one.html: d.svg"]


def test_no_other_host_is_asked_for_anything(read: dict[Path, Page], site: Path) -> None:
    assert [one for page in read.values() for one in page.loaded if urlsplit(one).netloc] == []
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", text), sheet.name


def test_the_reference_has_every_command_and_every_public_name(read: dict[Path, Page], site: Path) -> None:
    commands = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f'id="ringfence-{name}"' not in commands] == []
    anchors = read[site / "reference" / "api.html"].anchors
    assert [name for name in rf.__all__ if name.lower() not in anchors] == []
    text = re.sub(r"<[^>]+>", "", (site / "reference" / "api.html").read_text(encoding="utf-8"))
    assert "run(argv, isolation=..." in re.sub(r"\s+", " ", text).replace("( ", "(")


def test_links_are_turned_to_where_their_files_are_on_the_site() -> None:
    specification = importlib.util.spec_from_file_location("docs_site", ROOT / "tools" / "docs_site.py")
    assert specification is not None
    assert specification.loader is not None
    docs_site = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(docs_site)
    text = "[a](../../SECURITY.md#vm) [b](vm.md) [c](../../src/ringfence/api.py) [d](https://x.example) [e](#f)"
    found = docs_site.relinked(text, "learn/process.md")
    assert found == "[a](../project/SECURITY.md#vm) [b](vm.md) c [d](https://x.example) [e](#f)"
    assert docs_site.relinked("[a](docs/design/vmm.md) [b](README.md)", "project/SECURITY.md") == (
        "[a](../design/vmm.md) [b](../index.md)"
    )
