"""The ids that sandboxes get: built in or configured, and never anybody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

import ringfence as rf
from ringfence import api
from ringfence.comparison import peers
from ringfence.linux import ids, subids
from ringfence.spec import Spec

BUILT_IN = (0x71000000, 0x7FFE0000 - 0x71000000)


def host(folder: Path, **files: str) -> str:
    (folder / "etc").mkdir(exist_ok=True)
    for name, text in {"passwd": "root:x:0:0::/root:/bin/sh\n", "group": "root:x:0:\n", **files}.items():
        (folder / "etc" / name).write_text(text)
    return str(folder)


def test_without_a_line_the_range_is_built_in(tmp_path: Path) -> None:
    found = ids.find_range(host(tmp_path, subuid="me:100000:65536\n", subgid="me:100000:65536\n"))
    assert (found.first, found.count, found.problem) == (*BUILT_IN, "")
    assert found.slots == 3838


def test_a_line_for_ringfence_moves_it(tmp_path: Path) -> None:
    line = "ringfence:1000000000:655400\n"
    found = ids.find_range(host(tmp_path, subuid="me:100000:65536\n" + line, subgid=line))
    assert (found.first, found.count, found.slots, found.problem) == (1000000000, 655360, 10, "")
    assert found.source == "/etc/subuid, /etc/subgid"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"passwd": "big:x:1900000000:0::/:/bin/sh\n"}, "big of /etc/passwd"),
        ({"group": "big:x:1895825408:\n"}, "big of /etc/group"),
        ({"passwd": "big:x:1000:2147352575::/:/bin/sh\n"}, "big of /etc/passwd"),
        ({"subuid": "lxd:1800000000:1000000000\n"}, "lxd of /etc/subuid"),
        ({"subgid": "lxd:2147352575:1\n"}, "lxd of /etc/subgid"),
        ({"subuid": "ringfence:1000000000:65536\n"}, "don't give the same one range"),
        ({"subuid": "ringfence:1000000000:65536\n", "subgid": "ringfence:1000000000:131072\n"}, "the same one range"),
        (dict.fromkeys(("subuid", "subgid"), "ringfence:1000:65536\n"), "too low"),
        (dict.fromkeys(("subuid", "subgid"), "ringfence:100000:65535\n"), "too small"),
        (dict.fromkeys(("subuid", "subgid"), "ringfence:2147418112:65536\n"), "too high"),
        (dict.fromkeys(("subuid", "subgid"), "ringfence:100000:65536\nme:165535:1\n"), "me of /etc/subuid"),
    ],
)
def test_what_is_refused(tmp_path: Path, files: dict[str, str], said: str) -> None:
    found = ids.find_range(host(tmp_path, **files))
    assert said in found.problem
    assert "ringfence" in found.help or "ids" in found.help


def test_neighbours_are_none_of_ours(tmp_path: Path) -> None:
    below, above = BUILT_IN[0] - 1, sum(BUILT_IN)
    text = f"a:{below}:1\nb:{above}:65536\nmalformed\nc:x:y\nd:1:\n:{'9' * 5000}:1\n"
    found = ids.find_range(host(tmp_path, subuid=text, subgid=text, passwd=f"a:x:{below}:{above}::/:\n"))
    assert found.problem == ""
    assert subids.ranges(str(tmp_path / "etc/subuid"))[:2] == [("a", below, 1), ("b", above, 65536)]


@pytest.mark.parametrize("isolation", ["process", "container"])
def test_a_collision_refuses_every_run(isolation: str) -> None:
    spec = Spec.make(["true"], isolation=isolation)
    with pytest.raises(rf.Unavailable) as caught:
        api.run_spec(spec, rf.host().replace(ids=("they are lxd's", "give sandboxes others")))
    assert (caught.value.reason, caught.value.help) == ("they are lxd's", "give sandboxes others")


def test_the_ids_that_other_tools_get_are_nobodys(tmp_path: Path) -> None:
    first, count = peers._FIRST_ID, peers._IDS
    # systemd's UIDS-GIDS.md: 524288 to 1879048191 for containers.
    assert first > 1879048191
    assert first + count <= BUILT_IN[0]
    assert ids.whose(first, count, host(tmp_path)) == ""
    assert ids.whose(first, count, host(tmp_path, passwd=f"big:x:{first + 5}:0::/:/bin/sh\n")) == "big of /etc/passwd"
    line = f"ringfence:{first - 65536}:655360\n"
    assert "ringfence of" in ids.whose(first, count, host(tmp_path, subuid=line, subgid=line))
