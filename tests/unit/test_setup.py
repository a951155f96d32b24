from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from ringfence import _cache, _setup
from ringfence.errors import Unavailable
from ringfence.levels.vm import initramfs, kernel
from ringfence.linux import kvm

KERNEL = kernel.GuestKernel(
    release="6.1",
    vmlinux="/v",
    modules="/m",
    sets=("boot",),
    builtin=frozenset(),
    digest="d",
    source="test",
)


class Host:
    """A host of a test's making: its tools are shell scripts, each call of which is a line in `log`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin, self.log, self.cache = folder / "bin", folder / "log", folder / "cache"
        self.bin.mkdir()
        self.log.touch()
        self.monkeypatch = monkeypatch
        # What the scripts need, and nothing else of the real host's.
        for tool in ("sh", "touch", "chmod", "rm"):
            found = shutil.which(tool)
            assert found
            os.symlink(found, self.bin / tool)
        monkeypatch.setenv("PATH", str(self.bin))
        self.user(0)

    def user(self, uid: int) -> None:
        self.monkeypatch.setattr(os, "geteuid", lambda: uid)

    def tool(self, name: str, text: str = "exit 0") -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.log}\n{text}\n')
        path.chmod(0o755)

    def apt(self, *, known: bool = True, install: str = "") -> None:
        """known: whether the lists know the packages before an update."""
        lists = self.bin.parent / "lists"
        if known:
            lists.touch()
        self.tool("apt-cache", f"if [ -e {lists} ]; then echo Version: 1; else exit 100; fi")
        tools = " ".join(str(self.bin / name) for name in ("qemu-system-x86_64", "mkfs.erofs"))
        install = install or f"touch {tools}; chmod 755 {tools}"
        self.tool("apt-get", f'case "$*" in *update) touch {lists};; *install*) {install};; esac')

    def said(self) -> list[str]:
        lines = self.log.read_text().splitlines()
        return [line.replace(" -q -o DPkg::Lock::Timeout=120", "") for line in lines]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """libseccomp, filters, kernel and initramfs are at hand; QEMU and erofs-utils are not."""
    made = Host(tmp_path, monkeypatch)
    present = _setup.Step(name="seccomp filters", state="present", detail="2")
    monkeypatch.setattr(_setup, "_seccomp", lambda: present)
    monkeypatch.setattr(kernel, "find", lambda cache: KERNEL)
    monkeypatch.setattr(initramfs, "build", lambda *args, **named: str(tmp_path / "initramfs/1/file"))
    (tmp_path / "cache/initramfs/1").mkdir(parents=True)
    monkeypatch.setattr(
        kvm, "probe", lambda cache: kvm.KvmState(usable=False, reason="too slow", ns_per_instruction=773.0)
    )
    needs = tuple(need for need in _setup.NEEDS if need.name != "libseccomp")
    monkeypatch.setattr(_setup, "NEEDS", needs)
    return made


def steps(host: Host, levels: tuple[str, ...] = ("vm",)) -> dict[str, _setup.Step]:
    core = host.bin / "sh"
    found = _setup.steps(levels, cache_dir=str(host.cache), core=str(core))
    return {step.name: step for step in found}


def states(found: dict[str, _setup.Step]) -> dict[str, str]:
    return {name: step.state for name, step in found.items()}


def test_root_on_debian_installs_what_is_missing_once(host: Host) -> None:
    host.apt()
    found = steps(host)
    assert states(found) == {
        "qemu": "done",
        "erofs-utils": "done",
        "seccomp filters": "present",
        "guest kernel": "present",
        "guest initramfs": "present",
        "kvm": "present",
    }
    assert found["qemu"].detail == str(host.bin / "qemu-system-x86_64")
    assert found["kvm"].detail == "guests run by software emulation (TCG): too slow"
    assert [line for line in host.said() if line.startswith("apt-get")] == [
        "apt-get install -y --no-install-recommends qemu-system-x86 erofs-utils"
    ]
    host.log.write_text("")
    start = time.monotonic()
    again = steps(host)
    assert time.monotonic() - start < 1
    assert set(states(again).values()) == {"present"}
    assert host.said() == []


def test_lists_are_fetched_only_where_they_are_missing(host: Host) -> None:
    host.apt(known=False)
    assert states(steps(host))["qemu"] == "done"
    assert [line for line in host.said() if line.startswith("apt-get")] == [
        "apt-get update",
        "apt-get install -y --no-install-recommends qemu-system-x86 erofs-utils",
    ]


def test_an_installation_that_fails_is_tried_again_with_new_lists(host: Host) -> None:
    host.apt(install="echo 'E: 404 Not Found' >&2; exit 100")
    found = steps(host)
    for name in ("qemu", "erofs-utils"):
        assert found[name].state == "failed"
        assert "404 Not Found" in found[name].detail
        assert found[name].command is not None
    assert found["qemu"].command == "apt-get install -y --no-install-recommends qemu-system-x86"
    assert not found["qemu"].ok
    # What doesn't depend on it is still done.
    assert found["guest kernel"].ok
    assert [line.split()[1] for line in host.said() if line.startswith("apt-get")] == [
        "install",
        "update",
        "install",
    ]


@pytest.mark.parametrize(
    ("manager", "command"),
    [
        ("apt-get", "sudo apt-get install -y --no-install-recommends qemu-system-x86"),
        ("dnf", "sudo dnf install -y --setopt=install_weak_deps=False qemu-system-x86-core"),
        ("pacman", "sudo pacman -S --needed --noconfirm qemu-system-x86"),
        ("apk", "sudo apk add qemu-system-x86_64"),
    ],
)
def test_without_privilege_the_command_is_said(host: Host, manager: str, command: str) -> None:
    host.user(1000)
    host.monkeypatch.setattr(_cache, "root", lambda cache: str(cache))
    host.tool(manager)
    found = steps(host)
    assert (found["qemu"].state, found["qemu"].command) == ("needs", command)
    assert host.said() == []


@pytest.mark.parametrize("manager", ["dnf", "pacman", "apk"])
def test_elsewhere_the_command_is_said_to_root_too(host: Host, manager: str) -> None:
    host.tool(manager)
    found = steps(host)
    assert found["qemu"].state == "needs"
    assert found["qemu"].command is not None
    assert found["qemu"].command.startswith(manager)
    assert host.said() == []


def test_no_manager_at_all(host: Host) -> None:
    found = steps(host)
    assert found["erofs-utils"].command == "install erofs-utils (names as in Debian)"


def test_only_what_the_levels_need(host: Host) -> None:
    assert list(steps(host, ("process", "container"))) == ["seccomp filters"]


class Source:
    """A kernel that can be had from the second try on, or never."""

    def __init__(self, host: Host, works_at: int) -> None:
        self.tries, self.works_at = 0, works_at
        host.monkeypatch.setattr(kernel, "find", lambda cache: None)
        host.monkeypatch.setattr(kernel, "prepare", self.prepare)

    def prepare(self, cache: str, *, progress: object) -> kernel.GuestKernel:
        self.tries += 1
        if self.tries < self.works_at:
            raise Unavailable("vm", "apt's package lists know no kernel", "do this")
        return KERNEL


def test_a_kernel_that_old_lists_do_not_know(host: Host) -> None:
    host.apt()
    source = Source(host, works_at=2)
    assert states(steps(host))["guest kernel"] == "done"
    assert source.tries == 2
    assert "apt-get update" in host.said()


def test_a_kernel_that_cannot_be_had(host: Host) -> None:
    host.apt()
    Source(host, works_at=99)
    found = steps(host)
    assert (found["guest kernel"].state, found["guest kernel"].command) == ("failed", "do this")
    assert found["guest initramfs"].state == "failed"
    assert found["kvm"].ok

    host.user(1000)
    host.monkeypatch.setattr(_cache, "root", lambda cache: str(cache))
    found = steps(host)
    assert (found["guest kernel"].state, found["guest kernel"].command) == ("needs", "sudo apt-get update")


def test_nothing_raises(host: Host) -> None:
    def broken(cache: str) -> kernel.GuestKernel:
        raise OSError(28, "No space left on device")

    host.monkeypatch.setattr(kernel, "find", broken)
    found = steps(host)
    assert found["guest kernel"].state == "failed"
    assert "No space left" in found["guest kernel"].detail


def test_a_core_that_is_not_built(host: Host) -> None:
    found = _setup.steps(("vm",), cache_dir=str(host.cache), core=str(host.bin / "missing"))
    step = next(step for step in found if step.name == "guest initramfs")
    assert step.state == "failed"
    assert "missing" in step.detail


def test_progress_is_told(host: Host) -> None:
    host.apt(known=False)
    said: list[str] = []
    _setup.steps(("vm",), cache_dir=str(host.cache), core=str(host.bin / "sh"), progress=said.append)
    assert said == ["fetching package lists (apt-get update)", "installing qemu-system-x86 erofs-utils"]


def test_every_need_has_a_name_with_every_manager() -> None:
    for need in _setup.NEEDS:
        assert set(need.packages) == set(_setup._INSTALL)
        assert set(need.levels) <= set(_setup.LEVELS)
