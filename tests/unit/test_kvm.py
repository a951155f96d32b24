from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from ringfence.linux import kvm

HERE = os.path.dirname(kvm.__file__)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_this_host_says_never_takes_long(tmp_path: Path) -> None:
    """A bound, whatever the host is: without KVM, with one that serves, and with one that hangs."""
    before, start = (children(), descriptors()), time.monotonic()
    state = kvm.probe(str(tmp_path / "c"))
    assert time.monotonic() - start < 4
    assert (children(), descriptors()) == before
    assert state.reason
    if state.ns_per_instruction is not None:
        assert state.usable == (state.ns_per_instruction <= kvm.MAX_NS_PER_INSTRUCTION)
        assert f"{state.ns_per_instruction:.0f} ns" in state.reason or state.usable
    elif not os.path.exists(kvm.DEVICE):
        assert not state.usable
        assert "there is no /dev/kvm" in state.reason


def test_the_measurement_is_kept_for_this_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    monkeypatch.setattr(kvm, "_opens", lambda: None)

    def run_apart(program: str) -> str:
        runs.append(program)
        return "ns 0.5"

    monkeypatch.setattr(kvm, "_run_apart", run_apart)
    cache = str(tmp_path / "c")
    first = kvm.probe(cache)
    assert first == kvm.KvmState(usable=True, reason="0.50 ns an instruction", ns_per_instruction=0.5)
    assert kvm.probe(cache) == first
    assert len(runs) == 1
    kvm.probe(cache, refresh=True)
    assert len(runs) == 2
    # Another QEMU, a damaged file, another boot: measured again.
    kvm.probe(cache, qemu="/bin/sh")
    assert len(runs) == 3
    path = Path(cache) / f"kvm-{os.geteuid()}"
    for damaged in (
        b"",
        b"\xff\xfe",
        path.read_bytes().replace(b"\n0.5\n", b"\nfast\n"),
        b"1 other-boot\n1\n\nx\n",
    ):
        path.write_bytes(damaged)
        before = len(runs)
        assert kvm.probe(cache, qemu="/bin/sh").usable
        assert len(runs) == before + 1


def test_a_hang_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    monkeypatch.setattr(kvm, "_opens", lambda: None)
    monkeypatch.setattr(kvm, "_run_apart", lambda program: runs.append(program))
    for _ in range(2):
        state = kvm.probe(str(tmp_path / "c"))
        assert not state.usable
        assert "didn't end within 2 s" in state.reason
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("said", "usable", "figure", "reason"),
    [
        ("ns 0.41\n", True, 0.41, "0.41 ns"),
        ("ns 19.9\n", True, 19.9, "19.90 ns"),
        ("ns 20.1\n", False, 20.1, "KVM emulates"),
        ("ns 773.1\n", False, 773.1, "773 ns an instruction"),
        ("failed KVM_CREATE_VM 16\n", False, None, "KVM_CREATE_VM failed: EBUSY"),
        ("failed KVM_RUN (exit reason 17) 0\n", False, None, "KVM_RUN (exit reason 17) failed"),
        ("", False, None, "without a result"),
        ("ns\n", False, None, "without a result"),
        ("ns fast\n", False, None, "without a result"),
        ("Traceback (most recent call last):\n", False, None, "without a result"),
        (None, False, None, "didn't end"),
    ],
)
def test_judge(said: str | None, usable: bool, figure: float | None, reason: str) -> None:
    state = kvm.judge(said)
    assert (state.usable, state.ns_per_instruction) == (usable, figure)
    assert reason in state.reason


def program(tmp_path: Path, text: str) -> str:
    path = tmp_path / "program.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "import time; time.sleep(60)",
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('ns 1', flush=True); time.sleep(60)",
        "import os\nwhile True: pass",
    ],
)
def test_a_program_that_hangs_is_killed(tmp_path: Path, text: str) -> None:
    before, start = (children(), descriptors()), time.monotonic()
    assert kvm._run_apart(program(tmp_path, text), seconds=0.3) is None
    assert time.monotonic() - start < 2
    assert (children(), descriptors()) == before


def test_a_program_that_ends(tmp_path: Path) -> None:
    before = children(), descriptors()
    assert kvm._run_apart(program(tmp_path, "print('ns 7')")) == "ns 7\n"
    assert kvm._run_apart(program(tmp_path, "import os; os.abort()")) == ""
    flood = kvm._run_apart(program(tmp_path, "print('x' * 10**7)"))
    assert flood is not None
    assert len(flood) < 10_000
    assert (children(), descriptors()) == before


def test_a_device_that_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "DEVICE", str(tmp_path / "missing"))
    assert "there is no" in kvm.probe(str(tmp_path / "c")).reason
    monkeypatch.setattr(kvm, "DEVICE", str(tmp_path))
    assert "EISDIR" in kvm.probe(str(tmp_path / "c")).reason

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "no")

    monkeypatch.setattr(os, "open", refuse)
    state = kvm.probe(str(tmp_path / "c"))
    assert not state.usable
    assert "usermod -aG kvm" in state.reason


def test_the_program_imports_nothing_of_ringfence() -> None:
    """It runs with -I -S, where there is no ringfence."""
    text = Path(HERE, "_kvm_timing.py").read_text()
    assert "import ringfence" not in text
    assert "from ringfence" not in text
    said = kvm._run_apart(os.path.join(HERE, "_kvm_timing.py"))
    if os.path.exists("/dev/kvm") and stat.S_ISCHR(os.stat("/dev/kvm").st_mode):
        assert said is None or said.split()[0] in ("ns", "failed")
    else:
        assert said == "failed open 2\n"
