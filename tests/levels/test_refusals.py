"""What is refused is refused before anything starts: bad input, and rules that can't be enforced.

All of it happens in one other process that has started nothing before; it tells what was raised, and at its end
that there is still no launcher, no child, no folder, no cgroup of it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from support.sandboxes import LEVELS, host_without, python_json, run_probe

REFUSED = r"""
import json, os, sys
import ringfence as rf
from support import leaks

FOLDER = sys.argv[1]
open(FOLDER + "/file", "w").close()
ARGUMENTS = {
    "a str argv": lambda: dict(argv="echo hi"),
    "a bytes argv": lambda: dict(argv=b"echo hi"),
    "an empty argv": lambda: dict(argv=[]),
    "an empty command": lambda: dict(argv=[""]),
    "an int in argv": lambda: dict(argv=["sleep", 1]),
    "NUL in argv": lambda: dict(argv=["echo", "a\0b"]),
    "NUL in env": lambda: dict(env={"A": "x\0"}),
    "NUL in an env name": lambda: dict(env={"A\0": "x"}),
    "= in an env name": lambda: dict(env={"A=B": "x"}),
    "an unknown level": lambda: dict(isolation="jail"),
    "a level of another type": lambda: dict(isolation=None),
    "negative memory": lambda: dict(limits=rf.Limits(memory=-1)),
    "zero memory": lambda: dict(limits=rf.Limits(memory=0)),
    "12Q": lambda: dict(limits=rf.Limits(memory="12Q")),
    "zero pids": lambda: dict(limits=rf.Limits(pids=0)),
    "negative pids": lambda: dict(limits=rf.Limits(pids=-5)),
    "zero cpus": lambda: dict(limits=rf.Limits(cpus=0)),
    "zero wall_time": lambda: dict(limits=rf.Limits(wall_time=0)),
    "negative wall_time": lambda: dict(limits=rf.Limits(wall_time=-1)),
    "nan cpu_time": lambda: dict(limits=rf.Limits(cpu_time=float("nan"))),
    "zero output": lambda: dict(limits=rf.Limits(output=0)),
    "a dict as limits": lambda: dict(limits={"memory": "64M"}),
    "a missing mount source": lambda: dict(mounts=[rf.Mount(FOLDER + "/no-such", "/data")]),
    "a relative mount target": lambda: dict(mounts=[rf.Mount(FOLDER, "data")]),
    "a mount over /proc": lambda: dict(mounts=[rf.Mount(FOLDER, "/proc/x")]),
    "a mount over /": lambda: dict(mounts=[rf.Mount(FOLDER, "/")]),
    "two mounts on one target": lambda: dict(mounts=[rf.Mount(FOLDER, "/a"), rf.Mount("/usr", "/a/")]),
    "files above": lambda: dict(files={"../x": b""}),
    "files above, hidden": lambda: dict(files={"a/../../x": b""}),
    "absolute files": lambda: dict(files={"/x": b""}),
    "files in files": lambda: dict(files={"a": b"", "a/b": b""}),
    "a mode with setuid": lambda: dict(files={"a": (b"", 0o4755)}),
    "a number as a file": lambda: dict(files={"a": 7}),
    "collect above": lambda: dict(collect=["../x"]),
    "collect absolute": lambda: dict(collect=["/etc/passwd"]),
    "collect as a str": lambda: dict(collect="*.csv"),
    "an image that is missing": lambda: dict(image=FOLDER + "/no-such"),
    "/ as an image": lambda: dict(image="/"),
    "a user with a space": lambda: dict(user="a b"),
    "a negative user": lambda: dict(user=-1),
    "a host name with _": lambda: dict(hostname="a_b"),
    "an unknown network": lambda: dict(network="internet"),
    "a number as input": lambda: dict(input=5),
}
found = {}
for name, make in ARGUMENTS.items():
    for isolation in ("process", "container", "vm"):
        try:
            arguments = {"argv": ["true"], "isolation": isolation, **make()}
            rf.run(arguments.pop("argv"), **arguments)
            raised = ["nothing", ""]
        except Exception as error:
            raised = [type(error).__name__, str(error)]
        found[f"{name}, {isolation}"] = raised

from ringfence.levels.base import Level
from support.sandboxes import host_without
from ringfence.api import run_spec
from ringfence.spec import Spec

lacking = host_without("memory", "pids")
unmet = {}
for isolation in ("process", "container"):
    limits = rf.Limits(memory="64M", pids=9, disk="1G", wall_time=9)
    try:
        network = rf.Network("host", publish={18999: 80})
        run_spec(Spec.make(["true"], isolation=isolation, limits=limits, network=network), on=lacking)
        unmet[isolation] = None
    except rf.CannotEnforce as error:
        unmet[isolation] = [[[one.rule, one.requested, one.reason, one.help] for one in error.unmet], str(error)]

import ringfence.wire.launcher as wire
pid = os.getpid()
print(json.dumps({
    "raised": found,
    "unmet": unmet,
    "started": {
        "launcher": wire._launcher is not None,
        "children": len(leaks.descendants(pid)),
        "folders": sorted(leaks.run_folders_of(pid)),
        "cgroups": sorted(leaks.cgroups_of(pid)),
    },
}))
"""

# A piece of the sentence that says what was wrong, for each case; the command "true" would have run.
SENTENCES = {
    "a str argv": "argv must be a list, not a str",
    "a bytes argv": "argv must be a list, not a bytes",
    "an empty argv": "argv must not be empty",
    "an empty command": "argv[0] must not be empty",
    "an int in argv": "argv[1] must be str or bytes, not int",
    "NUL in argv": "argv[1] contains a NUL byte",
    "NUL in env": "env['A'] contains a NUL byte",
    "NUL in an env name": "contains a NUL byte",
    "= in an env name": "can't be a variable's name",
    "an unknown level": "isolation must be 'process', 'container', 'vm' or 'auto', not 'jail'",
    "a level of another type": "isolation must be 'process', 'container', 'vm' or 'auto', not None",
    "negative memory": "memory must be positive, not -1",
    "zero memory": "memory must be positive, not 0",
    "12Q": "12Q",
    "zero pids": "pids must be positive, not 0",
    "negative pids": "pids must be positive, not -5",
    "zero cpus": "cpus must be positive, not 0",
    "zero wall_time": "wall_time must be positive, not 0",
    "negative wall_time": "wall_time must be positive, not -1",
    "nan cpu_time": "cpu_time must be a finite number",
    "zero output": "output must be positive, not 0",
    "a dict as limits": "limits must be Limits(...), not dict",
    "a missing mount source": "no-such",
    "a relative mount target": "must be an absolute path",
    "a mount over /proc": "can't be in /proc",
    "a mount over /": "can't be /",
    "two mounts on one target": "two of them have the target '/a'",
    "files above": "must not contain '..'",
    "files above, hidden": "must not contain '..'",
    "absolute files": "must be relative to the work directory",
    "files in files": "is a file and a folder",
    "a mode with setuid": "mode must be between 0 and 0o777",
    "a number as a file": "must be bytes or str, not int",
    "collect above": "must not contain '..'",
    "collect absolute": "must be relative to the work directory",
    "collect as a str": "collect must be a list of patterns",
    "an image that is missing": "is neither 'host' nor a folder",
    "/ as an image": "would show all of the host",
    "a user with a space": "user must be a uid",
    "a negative user": "out of range",
    "a host name with _": "letters, digits and inner hyphens",
    "an unknown network": "must be 'none', 'nat' or 'host', not 'internet'",
    "a number as input": "input must be bytes or str, not int",
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _refused(str(tmp_path_factory.mktemp("refused")))


@functools.cache
def _refused(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = python_json(REFUSED, folder)
    return found


@pytest.mark.parametrize("case", SENTENCES)
def test_bad_input_is_a_spec_error(refused: dict[str, Any], case: str) -> None:
    for isolation in LEVELS:
        kind, sentence = refused["raised"][f"{case}, {isolation}"]
        assert kind == "SpecError", (isolation, kind, sentence)
        assert SENTENCES[case] in sentence
        assert "\n" not in sentence


def test_every_case_is_asserted(refused: dict[str, Any]) -> None:
    assert {name.rpartition(", ")[0] for name in refused["raised"]} == set(SENTENCES)


def test_nothing_was_started(refused: dict[str, Any]) -> None:
    assert refused["started"] == {"launcher": False, "children": 0, "folders": [], "cgroups": []}


@pytest.mark.parametrize("isolation", ["process", "container"])
def test_every_unmet_rule_is_told_at_once(refused: dict[str, Any], isolation: str) -> None:
    rules, sentence = refused["unmet"][isolation]
    found = {rule: (requested, reason, help) for rule, requested, reason, help in rules}
    # A container has a work directory of a size.
    assert sorted(found) == ["disk"] * (isolation == "process") + ["memory", "pids", "publish"]
    assert found["memory"] == (64 << 20, "no memory controller is mounted here", "mount it")
    assert found["pids"] == (9, "no pids controller is mounted here", "mount it")
    assert found["publish"][0] == [[18999, 80]]
    for rule in found:
        assert rule in sentence
        assert found[rule][1]  # a reason
        assert found[rule][2]  # and what would help
        assert found[rule][1] in sentence


@pytest.mark.parametrize("isolation", ["process", "container"])
def test_a_host_without_the_memory_controller(isolation: str) -> None:
    """Fail closed with it asked for, and run without; also on this very host nothing is weaker than asked."""
    from ringfence.api import run_spec
    from ringfence.spec import Spec

    lacking = host_without("memory")
    limited = Spec.make(["true"], isolation=isolation, limits=rf.Limits(memory="64M"))
    with pytest.raises(rf.CannotEnforce) as caught:
        run_spec(limited, on=lacking)
    assert [(one.rule, one.requested) for one in caught.value.unmet] == [("memory", 64 << 20)]
    assert isinstance(caught.value, ExceptionGroup)
    assert run_spec(limited).ok
    assert run_spec(Spec.make(["true"], isolation=isolation), on=lacking).ok


def test_a_level_that_cannot_run_says_why() -> None:
    """Before the rules are looked at."""
    from ringfence.api import run_spec
    from ringfence.spec import Spec

    host = rf.host().replace(user_namespaces="this kernel has no user namespaces (CONFIG_USER_NS)")
    for isolation in ("container", "vm"):
        with pytest.raises(rf.Unavailable) as caught:
            run_spec(Spec.make(["true"], isolation=isolation), on=host)
        assert caught.value.isolation == isolation
        assert "CONFIG_USER_NS" in caught.value.reason
        assert caught.value.help


def test_a_process_cannot_have_what_only_a_system_of_its_own_has() -> None:
    with pytest.raises(rf.CannotEnforce) as caught:
        run_probe("process", "exit", "0", hostname="x", image="/usr", mounts=[rf.Mount("/usr", "/elsewhere")])
    assert sorted(one.rule for one in caught.value.unmet) == ["hostname", "image", "mounts"]


def test_a_guest_cannot_have_the_hosts_network() -> None:
    with pytest.raises(rf.CannotEnforce) as caught:
        run_probe("vm", "exit", "0", network="host", devices=["/dev/null"])
    assert sorted(one.rule for one in caught.value.unmet) == ["devices", "network"]


def test_more_mounts_than_a_plan_holds(tmp_path: Path) -> None:
    def mounts(count: int) -> list[rf.Mount]:
        return [rf.Mount(tmp_path, f"/m{number}") for number in range(count)]

    assert rf.run(["test", "-d", "/m39"], mounts=mounts(40)).ok
    with pytest.raises(rf.CannotEnforce) as refused:
        rf.run(["true"], mounts=mounts(80))
    [unmet] = refused.value.unmet
    assert unmet.rule == "mounts"
    assert "of which init takes 64" in unmet.reason
