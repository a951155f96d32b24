"""Other tools as columns of `compare`: those that are installed do what the bare command does, and leave nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import ringfence as rf
from ringfence.comparison import compare
from ringfence.comparison.measures import measure
from ringfence.comparison.peer_runs import open_peers, peer_run
from ringfence.comparison.peers import PEERS, Tool
from ringfence.comparison.taken import QUICK
from ringfence.spec import Spec
from support.sandboxes import need

# What CI has none of: these are heavy, and a test of ours needs none of them.
OPTIONAL = tuple(PEERS)


@contextlib.contextmanager
def opened(name: str) -> Iterator[Tool]:
    """Skips where it isn't installed, or refuses this host: it is nothing that a machine has to have."""
    need(f"Debian's {PEERS[name]}", shutil.which(name) is not None)
    with contextlib.ExitStack() as stack:
        found, refused = open_peers(stack, lambda said: None, [name])
        if name in refused:
            print(refused[name][0])
            need(f"a host that {name} takes", False)
        yield found[name]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_peer_does_what_the_bare_command_does(name: str) -> None:
    script = 'cat; cat given; echo "$MINE" >made.txt; id -u >&2; exit 7'
    spec = Spec.make(
        ["sh", "-c", script],
        isolation="process",
        input=b"in ",
        files={"given": b"file"},
        env={"MINE": "1"},
        collect=["*.txt"],
    )
    with opened(name) as tool:
        done = peer_run(spec, tool)
        assert (done.exit_code, done.stdout, done.files) == (7, b"in file", {"made.txt": b"1\n"})
        assert done.stderr != b"%d\n" % os.geteuid() or name == "bwrap"  # ids of its own
        assert done.total_ns > 0
        assert (done.startup_ns, done.cpu_ns) == (None, None)
        assert os.listdir(tool.work) == []
        assert tool.version
        assert tool.note
        # To itself it can't: in most of them the command is PID 1, which takes no such signal.
        ended = peer_run(spec.replace(argv=(b"sh", b"-c", b"sh -c 'kill -SEGV $$'; exit $?")), tool)
        assert (ended.exit_code, ended.signal, ended.ending) == (None, 11, "signal 11")
        limited = spec.replace(argv=(b"sleep", b"60"), limits=rf.Limits(wall_time="1s"))
        assert peer_run(limited, tool).ending == "wall_time"
        nothing = peer_run(spec.replace(argv=(b"/no/such/command",)), tool)
        assert nothing.ending != "exit 0"
        assert nothing.stderr
        # It measures inside as well. One that lacks a call says so.
        found = measure([], [tool], names=["system_call", "start_warm", "memory_pss_1"], effort=QUICK)[name]
        assert found["system_call"]["ratio"] > 0
        assert found["start_warm"]["ratio"] > 1
        assert "none of them idles" in found["memory_pss_1"]["unavailable"]


def test_podman_leaves_nothing_but_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps state in six places unless each is named."""
    monkeypatch.setenv("HOME", str(tmp_path))
    before = set(os.listdir("/tmp")) | set(os.listdir("/run"))
    with opened("podman") as tool:
        folder = os.path.basename(tool.folder)
        left = (set(os.listdir("/tmp")) | set(os.listdir("/run"))) - before
        # Others run tests beside this one; what podman is known to leave has its name, or its runtime's.
        assert {name for name in left if "podman" in name or "containers" in name or "crun" in name} == set()
        assert folder in left
    assert folder not in os.listdir("/tmp")
    assert os.listdir(tmp_path) == []


def test_a_peer_that_is_not_installed_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "true").symlink_to("/usr/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = compare(["/usr/bin/true"], levels=["process"], repeat=1, peers=True)
    assert [one.name for one in found.levels] == ["bare", "process", *PEERS]
    for name, package in PEERS.items():
        assert found[name].unavailable == f"{name} isn't installed"
        assert found[name].help == f"install Debian's package {package}"
        assert found[name].measures == {}
    assert found.complete  # what we don't promise isn't missing
    assert found.identical


def test_a_peer_that_refuses_is_told_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "runc"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with contextlib.ExitStack() as stack:
        found, refused = open_peers(stack, lambda said: None, ["runc"])
    assert found == {}
    assert refused == {"runc": ("runc ended with 3: no such luck", "")}
