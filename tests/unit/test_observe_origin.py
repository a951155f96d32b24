"""Who is said to have made a process, from cgroups, command lines and files as they are in the field.

The real ones are in tests/levels/test_foreign.py. Here is what Debian has no packages of, or what takes cgroup v2.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from ringfence.observe.inspection import examine, reference
from ringfence.observe.origin import Container, origin
from ringfence.observe.proc import Proc

ID, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4


class Table:
    """A made-up /proc, whose processes are all in mount namespaces of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, pid: int, parent: int, argv: str, exe: str, *, namespace: int | None = None) -> None:
        one = self.folder / str(pid)
        (one / "ns").mkdir(parents=True)
        (one / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in argv.split()))
        (one / "status").write_text(f"PPid:\t{parent}\n")
        (one / "exe").symlink_to(exe)
        (one / "ns" / "mnt").symlink_to(f"mnt:[{namespace or pid}]")

    def origin(
        self, pid: int, parent: int, cgroup: str = "/", hostname_file: str = "", *, confined: bool = True
    ) -> object:
        with Proc(pid, str(self.folder)) as process:
            found = origin(process, parent, {"": cgroup}, hostname_file, confined=confined)
        return found.maker, found.container, found.unit


@pytest.fixture
def table(tmp_path: Path) -> Table:
    found = Table(tmp_path / "proc")
    found.add(9, 1, "sleep 60", "/usr/bin/sleep")
    return found


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        (f"/system.slice/docker-{ID}.scope", ("Docker", Container(id=ID), f"docker-{ID}.scope")),
        (f"/docker/{ID}", ("Docker", Container(id=ID), "")),
        (f"/docker/{OTHER}/docker/{ID}", ("Docker", Container(id=ID), "")),  # the one that is inside
        ("/system.slice/docker.service", ("", None, "docker.service")),
        (f"/machine.slice/libpod-{ID}.scope/container", ("Podman", Container(id=ID), f"libpod-{ID}.scope")),
        (f"/machine.slice/libpod-conmon-{ID}.scope", ("Podman", None, f"libpod-conmon-{ID}.scope")),
        (f"/kubepods/burstable/pod5/{ID}", ("Kubernetes", Container(id=ID), "")),
        (
            f"/kubepods.slice/kubepods-pod5.slice/cri-containerd-{ID}.scope",
            ("Kubernetes", Container(id=ID), f"cri-containerd-{ID}.scope"),
        ),
        ("/lxc.payload.web/system.slice/ssh.service", ("LXC", Container(name="web"), "ssh.service")),
        ("/lxc/web", ("LXC", Container(name="web"), "")),
        ("/lxc.monitor.web", ("LXC", None, "")),
        (
            r"/machine.slice/machine-a\x2db.scope/payload",
            ("systemd-nspawn", Container(name="a-b"), r"machine-a\x2db.scope"),
        ),
        (
            "/machine.slice/systemd-nspawn@web.service/payload",
            ("systemd-nspawn", Container(name="web"), "systemd-nspawn@web.service"),
        ),
        (
            r"/machine.slice/machine-qemu\x2d3\x2dguest.scope/libvirt/emulator",
            ("libvirt", Container(name="guest"), r"machine-qemu\x2d3\x2dguest.scope"),
        ),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/app.service", ("", None, "app.service")),
        ("/user.slice/user-1000.slice/session-3.scope", ("", None, "session-3.scope")),
        ("/ringfence-17-0123456789abcdef/c1", ("ringfence", None, "")),
        ("/", ("", None, "")),
    ],
)
def test_by_its_cgroup(table: Table, cgroup: str, expected: object) -> None:
    assert table.origin(9, 1, cgroup) == expected


@pytest.mark.parametrize(
    ("argv", "exe", "expected"),
    [
        (
            f"containerd-shim-runc-v2 -namespace moby -id {ID} -address /x",
            "containerd-shim-runc-v2",
            ("Docker", ID, ""),
        ),
        (f"containerd-shim-runc-v2 -namespace k8s.io -id {ID}", "containerd-shim-runc-v2", ("Kubernetes", ID, "")),
        (
            "containerd-shim-runc-v2 -namespace default -id redis",
            "containerd-shim-runc-v2",
            ("containerd", "redis", ""),
        ),
        (f"conmon -c {ID} -n web --exit-command /usr/bin/podman", "conmon", ("Podman", ID, "web")),
        (f"conmon -c {ID} -n k8s_web --exit-dir /run/crio/exits", "conmon", ("CRI-O", ID, "k8s_web")),
        ("lxc-start -n web -F", "lxc-start", ("LXC", "", "web")),
        ("systemd-nspawn --machine=web -D /srv/other", "systemd-nspawn", ("systemd-nspawn", "", "web")),
        ("systemd-nspawn -D /srv/web/", "systemd-nspawn", ("systemd-nspawn", "", "web")),
        ("runc run --bundle /b web", "runc", ("runc", "web", "")),
    ],
)
def test_by_the_program_above_it(table: Table, argv: str, exe: str, expected: tuple[str, str, str]) -> None:
    table.add(8, 1, argv, f"/usr/bin/{exe}")
    table.add(10, 8, "sleep 60", "/usr/bin/sleep")
    maker, identity, name = expected
    assert table.origin(10, 8) == (maker, Container(id=identity, name=name), "")
    # What shares the host's files is nobody's container, whoever started it.
    assert table.origin(10, 8, confined=False) == ("", None, "")


def test_what_is_in_the_container_itself_has_no_say(table: Table) -> None:
    """A workload may call itself what it likes."""
    table.add(8, 1, f"conmon -c {ID} -n mine", "/usr/bin/conmon", namespace=77)
    table.add(10, 8, "sleep 60", "/usr/bin/sleep", namespace=77)
    assert table.origin(10, 8) == ("", None, "")
    # Nor does a name that only the command line has.
    table.add(18, 1, f"conmon -c {ID} -n mine", "/tmp/other")
    table.add(20, 18, "sleep 60", "/usr/bin/sleep")
    assert table.origin(20, 18) == ("", None, "")


def test_an_engine_above_does_not_rename_what_a_cgroup_tells(table: Table) -> None:
    table.add(8, 1, "bwrap --unshare-pid sleep 60", "/usr/bin/bwrap")
    table.add(10, 8, "sleep 60", "/usr/bin/sleep")
    assert table.origin(10, 8) == ("bubblewrap", None, "")
    assert table.origin(10, 8, "/user.slice/run-5.scope") == ("bubblewrap", None, "run-5.scope")
    assert table.origin(10, 8, f"/docker/{ID}") == ("Docker", Container(id=ID), "")


def test_names_and_images_are_read_from_what_engines_keep(table: Table, tmp_path: Path) -> None:
    folder = tmp_path / "docker" / "containers" / ID
    folder.mkdir(parents=True)
    (folder / "config.v2.json").write_text(json.dumps({"Name": "/web", "Config": {"Image": "nginx:1"}}))
    expected = ("Docker", Container(id=ID, name="web", image="nginx:1"), "")
    assert table.origin(9, 1, f"/docker/{ID}", f"{folder}/hostname") == expected
    # Of another container nothing is taken.
    assert table.origin(9, 1, f"/docker/{OTHER}", f"{folder}/hostname") == ("Docker", Container(id=OTHER), "")
    bundle = tmp_path / "storage" / "overlay-containers" / ID / "userdata"
    bundle.mkdir(parents=True)
    listed = [{"id": OTHER}, {"id": ID, "metadata": json.dumps({"image-name": "localhost/a:1"})}]
    (bundle.parents[1] / "containers.json").write_text(json.dumps(listed))
    table.add(8, 1, f"conmon -c {ID} -n web -b {bundle} --exit-command podman", "/usr/bin/conmon")
    table.add(10, 8, "sleep 60", "/usr/bin/sleep")
    assert table.origin(10, 8) == ("Podman", Container(id=ID, name="web", image="localhost/a:1"), "")


@pytest.mark.parametrize("kind", ["missing", "pipe", "symlink", "large", "no JSON", "deep", "another type", "no text"])
def test_a_file_that_is_not_what_it_should_be_tells_nothing(table: Table, tmp_path: Path, kind: str) -> None:
    """It may be anybody's: a command line leads there."""
    folder = tmp_path / "docker" / "containers" / ID
    folder.mkdir(parents=True)
    file = folder / "config.v2.json"
    good = json.dumps({"Name": "/web", "Config": {"Image": "a"}})
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "symlink":
        (tmp_path / "good").write_text(good)
        file.symlink_to(tmp_path / "good")
    elif kind == "large":
        file.write_text(good + " " * (4 << 20))
    elif kind != "missing":
        texts = {"no JSON": "{", "deep": "[" * 100_000, "another type": "[]", "no text": '{"Name": 5, "Config": []}'}
        file.write_text(texts[kind])
    done: list[object] = []
    reader = threading.Thread(target=lambda: done.append(table.origin(9, 1, f"/docker/{ID}", f"{folder}/hostname")))
    reader.daemon = True
    reader.start()
    reader.join(10)
    assert done == [("Docker", Container(id=ID), "")]


def test_a_real_process_has_an_origin_too() -> None:
    found = examine(os.getpid(), reference())
    assert found.container is None
    assert isinstance(found.unit, str)
