"""Hooks of mkdocs: pages that are made from the code, the documents of the repository's top folder, and links to both.

In the repository every link leads to a file. The site has the files of docs/ where they are, those of the top folder in
`project/`, and the reference, which no file has: it is made of --help and the docstrings, so it can't be out of date.
A link to anything else (a source file) is just its text.
"""

from __future__ import annotations

import inspect
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "SPECIFICATION.md")
# The comparison as one page.
WHOLE = "measurements/compare-page.html"
REFERENCE = ("reference/cli.md", "reference/api.md")

_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[([^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds what isn't in docs/."""
    for uri, text in (("reference/cli.md", command_line()), ("reference/api.md", python_api())):
        files.append(File.generated(config, uri, content=text))
    files.append(File.generated(config, WHOLE, abs_src_path=str(ROOT / "docs" / "measurements" / "compare.html")))
    for name in PROJECT:
        files.append(File.generated(config, f"project/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Its links, as the site has them."""
    uri = page.file.src_uri
    parts = _FENCED.split(markdown)
    return "".join(part if part.startswith("```") else relinked(part, uri) for part in parts)


def relinked(text: str, uri: str) -> str:
    """A page's text, with each link to a file of the repository turned to where that is on the site."""
    name = uri.removeprefix("project/")
    source = name if name in PROJECT else f"docs/{uri}"

    def turn(match: re.Match[str]) -> str:
        shown, target = match[1], match[2]
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            return match[0]
        path, _, anchor = target.partition("#")
        found = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if found is None:
            return shown
        there = posixpath.relpath(found, posixpath.dirname(uri) or ".")
        return f"[{shown}]({there}{'#' + anchor if anchor else ''})"

    return _LINK.sub(turn, text)


def site_path(path: str) -> str | None:
    """Where a file of the repository is on the site; None where it isn't."""
    if path in PROJECT:
        return f"project/{path}"
    if path == "docs/measurements/compare.html":
        return WHOLE
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        inner = path.removeprefix("docs/")
        return inner if inner in REFERENCE or (ROOT / path).is_file() else None
    return None


# ---- the reference ----


def command_line() -> str:
    """Every command's --help."""
    from ringfence.cli.main import COMMANDS, _help

    parts = ["# The command line\n", f"```text\n{_help()}```\n"]
    for name, (module, _) in COMMANDS.items():
        options = __import__(module, fromlist=["OPTIONS"]).OPTIONS
        parts.append(f"## ringfence {name}\n\n```text\n{options.help().rstrip()}\n```\n")
    return "\n".join(parts)


def python_api() -> str:
    """Every public name, with its signature and docstring."""
    import ringfence

    parts = ["# The Python API\n", f"{_paragraphs(inspect.getdoc(ringfence) or '')}\n"]
    for name in sorted(ringfence.__all__, key=lambda one: (one[0].isupper(), one.lower())):
        parts.append(_described(name, getattr(ringfence, name), "##"))
    return "\n".join(parts)


def _described(name: str, what: Any, heading: str) -> str:
    text = f"{heading} {name.rpartition('.')[2]}\n\n```python\n{_signature(name, what)}\n```\n\n"
    text += f"{_paragraphs(inspect.getdoc(what) or '')}\n"
    if inspect.isclass(what):
        for inner, member in sorted(vars(what).items()):
            # What has no docstring of its own explains itself, or isn't there to be called.
            shown = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            if (
                not inner.startswith("_")
                and getattr(shown, "__doc__", None)
                and (inspect.isfunction(shown) or isinstance(shown, property))
            ):
                text += "\n" + _described(f"{name}.{inner}", shown, heading + "#")
    return text


def _signature(name: str, what: Any) -> str:
    if isinstance(what, property):
        return name
    try:
        signature = inspect.signature(what)
    except (TypeError, ValueError):
        return name
    shown = []
    for one in signature.parameters.values():
        if one.name in ("self", "cls"):
            continue
        shown += (
            _options(str(one.annotation)) if one.kind is one.VAR_KEYWORD else [str(one.replace(annotation=one.empty))]
        )
    line = f"{name}({', '.join(shown)})"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(shown) + ",\n)"


def _options(annotation: str) -> list[str]:
    """The keywords that `**options: Unpack[...]` stands for."""
    from ringfence.spec import options

    found = re.fullmatch(r"Unpack\[(\w+)\]", annotation)
    return [f"{name}=..." for name in getattr(options, found[1]).__annotations__] if found else ["**options"]


def _paragraphs(text: str) -> str:
    """A docstring as Markdown: examples that are indented are code, and all else is text."""
    parts = []
    for block in text.split("\n\n"):
        if all(line.startswith("    ") for line in block.splitlines()):
            inner = "\n".join(line[4:] for line in block.splitlines())
            parts.append(f"```text\n{inner}\n```")
        else:
            parts.append(re.sub(r"(?<!`)<(\w+)>", r"`<\1>`", block))
    return "\n\n".join(parts)
