"""The vm level on QEMU's other machine, q35: PCI in place of virtio-mmio, on any QEMU for x86."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.levels.vm import emulator, machine
from support.sandboxes import PROBE_FILE, SOURCES, applied, ended, need, need_level


@pytest.fixture
def q35(monkeypatch: pytest.MonkeyPatch) -> None:
    need_level("vm")
    monkeypatch.setenv("RINGFENCE_MACHINE", "q35")


def test_all_of_a_run(q35: None, tmp_path: Path) -> None:
    """Both shares, files both ways, stdin, a user, limits, two CPUs: what goes through every device of it."""
    (tmp_path / "shared").write_text("from the host\n")
    tmp_path.chmod(0o755)
    tmp_path.parent.chmod(0o755)
    script = "cat; cat /data/shared; id -u; nproc; ./probe exit 0 && echo probed; mkdir out; echo made >out/file"
    result = rf.run(
        ["sh", "-c", script],
        isolation="vm",
        input="from stdin\n",
        files=PROBE_FILE,
        mounts=[rf.Mount(tmp_path, "/data")],
        collect=["out/*"],
        user=1234,
        limits=rf.Limits(cpus=2, memory="128M", pids=50, disk="16M"),
    )
    assert ended(result) == ("exited", 0, None), result
    assert result.stdout == b"from stdin\nfrom the host\n1234\n2\nprobed\n"
    assert result.files == {"out/file": b"made\n"}
    found = applied(result)
    assert found["machine"].mechanism == "QEMU q35"
    assert (found["memory"].effective, found["pids"].effective) == (128 << 20, 50)


def test_a_disk_with_an_overlay_and_a_network_card(q35: None, tmp_path: Path) -> None:
    for folder in ("root/bin", "root/etc"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "root/etc/resolv.conf").touch()
    (tmp_path / "root/bin/probe").write_bytes(PROBE_FILE["probe"].data)
    (tmp_path / "root/bin/probe").chmod(0o755)
    need("/dev/net/tun", os.path.exists("/dev/net/tun"))
    options: dict[str, Any] = {"image": tmp_path / "root", "overlay": True, "user": 0, "network": "nat"}
    with rf.Sandbox(isolation="vm", **options) as sandbox:
        result = sandbox.run(["/bin/probe", "write", "/bin/new", "x"])
        assert ended(result) == ("exited", 0, None), result
        assert [(one.path, one.kind) for one in result.changes or ()] == [("/bin/new", "created")]
        facts = json.loads(sandbox.run(["/bin/probe", "facts"]).stdout)
        assert {"lo", "eth0"} == set(facts["interfaces"])


def test_its_network_card_takes_no_rom() -> None:
    """Of a package that need not be there; on microvm there is none to leave out."""
    for board, options in (("q35", 1), ("microvm", 0)):
        argv = machine.arguments(
            kernel="k", initramfs="i", memory_bytes=1 << 28, cpus=1, accel="tcg", channel_fd=3, card_fd=4, board=board
        )
        [card] = [one for one in argv if one.startswith(b"virtio-net")]
        assert card.split(b",").count(b"romfile=") == options


def test_a_qemu_without_microvm_takes_q35_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_level("vm")
    real = emulator.look().path
    script = tmp_path / "qemu"
    script.write_text(
        f'#!/bin/sh\n[ "$2" != help ] || {{ {real} -machine help | grep -v microvm; exit; }}\nexec {real} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("RINGFENCE_QEMU", str(script))
    assert (emulator.look().machines, emulator.look().machine()) == (("q35",), "q35")
    result = rf.run(["true"], isolation="vm")
    assert ended(result) == ("exited", 0, None)
    assert applied(result)["machine"].mechanism == "QEMU q35"


def test_which_qemu_is_remembered_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked once: a program that counts how often it is."""
    monkeypatch.setenv("RINGFENCE_CACHE", str(tmp_path / "cache"))
    script = tmp_path / "qemu"
    text = (
        f"#!/bin/sh\necho >>{tmp_path}/asked\n"
        '[ "$1" = --version ] && echo "QEMU emulator version 8.1.2" || echo "q35  a machine"\n'
    )
    script.write_text(text)
    script.chmod(0o755)
    monkeypatch.setenv("RINGFENCE_QEMU", str(script))

    def asked() -> int:
        return len((tmp_path / "asked").read_text().splitlines())

    assert emulator.look().version == (8, 1, 2)
    emulator.look()
    monkeypatch.setattr(emulator, "_known", {})  # another process, with the same cache
    assert emulator.look().machines == ("q35",)
    assert asked() == 2
    script.write_text(text.replace("8.1.2", "9.0.1"))
    assert emulator.look().version == (9, 0, 1)
    assert asked() == 4
    for number in range(20):
        (tmp_path / f"cache/qemu-{number}").write_text("of one that was replaced\n")
        os.utime(tmp_path / f"cache/qemu-{number}", (number, number))
    script.write_text(text.replace("8.1.2", "9.0.12"))
    assert emulator.look().version == (9, 0, 12)
    kept = [one.name for one in (tmp_path / "cache").glob("qemu-*")]
    assert len(kept) == 16 and "qemu-4" not in kept and "qemu-19" in kept


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_all_that_is_tested_of_a_vm_holds_on_q35(q35: None) -> None:
    """But for what a guest hosts in test_inside_a_vm: the other levels' tests, which take longer than all of these."""
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "vm and not inside_a_vm",
            tests / "levels",
            tests / "security",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(SOURCES), str(tests)))},
        cwd=tests.parent,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()[-8000:]
