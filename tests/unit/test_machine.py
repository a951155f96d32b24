from __future__ import annotations

import json
import os
import time
from itertools import pairwise

import pytest

from ringfence.errors import SpecError
from ringfence.levels.vm import machine
from ringfence.linux import tsc


def argv(**changes: object) -> list[bytes]:
    having = {
        "kernel": "/k/vmlinux",
        "initramfs": b"/k/\xff.cpio",
        "memory_bytes": 256 << 20,
        "cpus": 1,
        "accel": "tcg",
        "channel_fd": 7,
    }
    return machine.arguments(**{**having, **changes})  # type: ignore[arg-type]


def after(words: list[bytes], option: str) -> list[bytes]:
    return [value for name, value in pairwise(words) if name == option.encode()]


def test_the_least_guest() -> None:
    words = argv()
    assert after(words, "-kernel") == [b"/k/vmlinux"]
    assert after(words, "-initrd") == [b"/k/\xff.cpio"]
    assert after(words, "-m") == [b"256M"]
    assert after(words, "-smp") == [b"1"]
    assert after(words, "-chardev") == [b"socket,id=channel,fd=7"]
    assert after(words, "-accel") == [b"tcg,thread=multi,tb-size=64"]
    assert b"isa-serial=off" in after(words, "-machine")[0]
    assert b"rf.sets=boot" in after(words, "-append")[0].split()
    assert b"-no-reboot" in words
    assert b"-nodefaults" in words
    assert not after(words, "-fsdev") + after(words, "-blockdev")


def test_a_guest_on_q35() -> None:
    words = argv(board="q35", shares=[("host", "/a", False)], disks=["/d"], console_fd=9)
    assert after(words, "-machine")[0].startswith(b"q35,")
    assert {device.split(b",")[0] for device in after(words, "-device")} == {
        b"virtio-serial-pci",
        b"virtserialport",
        b"virtio-9p-pci",
        b"virtio-blk-pci",
    }
    assert b"rf.sets=boot,9p,erofs,pci" in after(words, "-append")[0].split()


def test_shares_and_disks() -> None:
    words = argv(shares=[("host", "/a,b", False), ("work", b"/w\xff", True)], disks=["/d,1.erofs", "/d2"], cpus=2)
    assert after(words, "-fsdev") == [
        b"local,id=share0,path=/a,,b,security_model=none,multidevs=remap,readonly=on",
        b"local,id=share1,path=/w\xff,security_model=none,multidevs=remap",
    ]
    drives = after(words, "-blockdev")
    assert len(drives) == 4
    assert drives[0].startswith(b"driver=file,node-name=file0,filename=/d,,1.erofs,read-only=on")
    assert all(b"read-only=on" in drive for drive in drives)
    append = after(words, "-append")[0].split()
    assert b"rf.sets=boot,9p,erofs" in append
    assert b"noreplace-smp" not in append


def test_a_qcow2_is_named_and_has_nothing_behind_it() -> None:
    node = json.loads(after(argv(disks=["/d"], disk_format="qcow2"), "-blockdev")[1])
    assert node == {"driver": "qcow2", "node-name": "disk0", "file": "file0", "read-only": True, "backing": None}


def test_the_kernel_command_line() -> None:
    tcg = machine.kernel_command_line(cpus=1, accel="tcg", sets=["boot", "9p", "boot"], append="x=1").split()
    assert tcg[-2:] == ["rf.sets=boot,9p", "x=1"]
    assert "quiet" in tcg
    assert "mitigations=off" in tcg
    if tsc.host_tsc_khz():
        assert f"tsc_early_khz={tsc.host_tsc_khz()}" in tcg
    on_kvm = machine.kernel_command_line(cpus=1, accel="kvm", sets=["boot"], console=True).split()
    # A real CPU speculates.
    assert not {"mitigations=off", "tsc=reliable", "quiet"} & set(on_kvm)
    assert "console=ttyS0" in on_kvm


def test_memory_is_rounded_up() -> None:
    assert after(argv(memory_bytes=(256 << 20) + 1), "-m") == [b"257M"]


def test_a_console_is_a_descriptor() -> None:
    words = argv(console_fd=9)
    assert after(words, "-add-fd") == [b"fd=9,set=1"]
    assert b"isa-serial=on" in after(words, "-machine")[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"accel": "hvf"}, "kvm or tcg"),
        ({"memory_bytes": 64 << 20}, "at least 96 MiB"),
        ({"cpus": 0}, "at least one CPU"),
        ({"disks": ["/d"] * 8}, "at most 7"),
        ({"disks": ["/d"] * 4, "shares": [("t", "/", False)] * 4}, "at most 7"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        argv(**changes)


def test_the_tsc_rate_agrees_with_itself() -> None:
    first = tsc._measure()
    if first is None:
        pytest.skip("needs x86-64 with a constant TSC, and executable memory")
    time.sleep(0.1)
    second = tsc._measure()
    assert second is not None
    # Two measurements of 20 ms on a busy host; the guest's clock would be wrong by as much.
    assert abs(first - second) / first < 0.001
    assert 500_000 < first < 10_000_000
    if "hypervisor" in tsc._cpuinfo("flags").split():
        assert abs(first - float(tsc._cpuinfo("cpu MHz")) * 1000) / first < 0.01
    assert tsc.host_tsc_khz() is tsc.host_tsc_khz()


def test_the_tsc_is_none_where_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsc, "_cpuinfo", lambda field: "")
    assert tsc._measure() is None
    assert tsc._from_cpuinfo() is None
    assert os.path.exists("/proc/cpuinfo")
