"""The pages that teach: each command in them is run, and prints what the page says."""

from __future__ import annotations

import os
import shutil

import pytest

from support import pages
from support.pages import Step, matches, run, steps
from support.sandboxes import need, need_level, need_root

PAGES = pages.pages()


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    """All pages in one go: what is measured for one serves the next."""
    need_root()
    for one in ("process", "container", "vm"):
        need_level(one)
    need("cgroup v1", os.path.exists("/sys/fs/cgroup/pids/cgroup.procs"))
    for program in ("unshare", "nsenter", "setpriv", "pivot_root", "ip", "ps", "pgrep"):
        assert shutil.which(program), f"{program} isn't here: make test-tools"
    return dict(zip((one.name for one in PAGES), run([steps(one) for one in PAGES]), strict=True))


def test_there_are_pages_and_most_of_what_they_print_is_told() -> None:
    found = [step for page in PAGES for step in steps(page)]
    assert len(PAGES) >= 8
    assert len(found) > 90
    # "…" is for what is another each time, and no way out.
    lines = [line for step in found for line in step.printed.splitlines()]
    assert len([line for line in lines if "…" in line]) < len(lines) / 10


@pytest.mark.parametrize("page", PAGES, ids=[one.name for one in PAGES])
def test_a_page_shows_what_happens(printed: dict[str, list[str]], page: object) -> None:
    name = getattr(page, "name", "")
    path = next(one for one in PAGES if one.name == name)
    wanted, got = steps(path), printed[name]
    wrong = [
        f"{name}:{step.line}: # {step.command}\n--- the page says\n{step.printed}--- it prints\n{one}"
        for step, one in zip(wanted, [*got, *[""] * (len(wanted) - len(got))], strict=True)
        if not matches(step.printed, one)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("hello\n", "hello\n", True),
        ("hello\n", "hello\nmore\n", False),
        ("hello\n", "hullo\n", False),
        ("uid 0\n", "uid 7\n", False),
        ("net:[4026531840], own\n", "net:[4026532999], own\n", True),
        ("6.1.0-56-amd64\n", "6.18.44-fc-v657\n", True),
        ("start 9.28ms\n", "start 1.51s\n", True),
        ("3: a process\n", "1234: a process\n", True),
        ("3: a process\n", "3: a container\n", False),
        ("a  b\n", "a        b\n", True),
        ("first\n…\nlast\n", "first\none\ntwo\nlast\n", True),
        ("first\n…\nlast\n", "first\nlast\n", True),
        ("first\n…\nlast\n", "first\none\n", False),
        ("at most 20, … used\n", "at most 20, 4 used\n", True),
        ("at most 20, … used\n", "at most 21, 4 used\n", False),
        ("exit status 124\n", "exit status 125\n", False),
        ("", "anything\n", False),
    ],
)
def test_what_counts_as_the_same(expected: str, got: str, same: bool) -> None:
    assert matches(expected, got) is same


def test_a_page_that_is_wrong_is_found() -> None:
    need_root()
    script = [Step("word=here", "", 1), Step("echo $word\necho $0", "", 2), Step("cat; sleep 1000 &", "", 3)]
    assert run([script, [Step("echo ${word:-gone}; hostname other; ls", "", 1)]]) == [
        ["", "here\n.session\n", ""],
        ["gone\n"],
    ]
