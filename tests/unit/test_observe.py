"""What is read from command lines and mount tables of others, from texts as they are in the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.observe import mounts
from ringfence.observe.groups import bounds
from ringfence.observe.proc import MountEntry, Proc, unescaped
from ringfence.observe.vmm import monitor

KVM = {7: "anon_inode:kvm-vm", 9: "anon_inode:kvm-vcpu:0", 10: "anon_inode:kvm-vcpu:1"}


@pytest.mark.parametrize(
    ("argv", "exe", "fds", "expected"),
    [
        (
            "qemu-system-x86_64 -machine q35,accel=kvm -m size=2G,slots=2 -smp cpus=4,sockets=2"
            " -device virtio-net,netdev=n -netdev user,id=n -drive file=a,if=virtio",
            "/usr/bin/qemu-system-x86_64",
            {},
            ("QEMU", "kvm", 2 << 30, 4, "q35", ("virtio-net", "netdev user", "drive")),
        ),
        ("kvm -m 512", "/usr/bin/qemu-system-x86_64", KVM, ("QEMU", "kvm", 512 << 20, 2, "", ())),
        ("qemu-system-aarch64 -M virt", "/usr/bin/qemu-system-aarch64", {}, ("QEMU", "tcg", 128 << 20, 1, "virt", ())),
        ("firecracker --api-sock /x", "/srv/firecracker-v1.7.0-x86_64", KVM, ("Firecracker", "kvm", None, 2, "", ())),
        (
            "cloud-hypervisor --memory size=1G,shared=on --cpus boot=2 --disk path=a --net tap=t",
            "/usr/bin/cloud-hypervisor",
            KVM,
            ("Cloud Hypervisor", "kvm", 1 << 30, 2, "", ("disk", "net")),
        ),
        ("crosvm run --mem 256 --block a", "/usr/bin/crosvm", KVM, ("crosvm", "kvm", 256 << 20, 2, "", ("block",))),
        ("runsc-sandbox --platform=systrap boot", "/usr/bin/runsc", {}, ("gVisor", "systrap", None, None, "", ())),
        # Nobody knows it, but it has a machine.
        ("/opt/own-vmm", "/opt/own-vmm", KVM, ("unknown", "kvm", None, 2, "", ())),
    ],
)
def test_a_monitor(argv: str, exe: str, fds: dict[int, str], expected: tuple[object, ...]) -> None:
    found = monitor(argv.split(), exe, fds, list)
    assert found is not None
    assert (found.program, found.accelerator, found.memory_bytes, found.cpus, found.machine, found.devices) == expected


@pytest.mark.parametrize(
    ("argv", "exe"),
    [
        ("runsc --root /x gofer", "/usr/bin/runsc"),
        ("sleep 60", "/usr/bin/sleep"),
        # Only its starter says that it is one.
        ("qemu-system-x86_64 -m 64", "/usr/bin/sleep"),
        ("qemu-img create a", "/usr/bin/qemu-img"),
    ],
)
def test_no_monitor(argv: str, exe: str) -> None:
    assert monitor(argv.split(), exe, {3: "socket:[1]"}, list) is None


def test_a_virtual_cpus_thread_is_counted_where_descriptors_may_not_be_read() -> None:
    threads = ["firecracker", "fc_api", "fc_vcpu 0", "fc_vcpu 1"]
    found = monitor(["firecracker"], "/usr/bin/firecracker", None, lambda: threads)
    assert found is not None
    assert (found.cpus, found.accelerator) == (2, None)


def entry(line: str) -> MountEntry:
    """ "major:minor root point options kind source super-options"."""
    device, root, point, options, kind, source, more = line.split()
    major, _, minor = device.partition(":")
    return MountEntry(
        device=(int(major), int(minor)),
        root=root,
        point=point,
        options=tuple(options.split(",")),
        kind=kind,
        source=source,
        super_options=tuple(more.split(",")),
    )


HOST = [
    entry("8:1 / / rw ext4 /dev/sda1 rw"),
    entry("0:30 / /run rw tmpfs tmpfs rw"),
    entry("8:2 / /home rw ext4 /dev/b rw"),
]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["0:9 / / rw overlay overlay rw"], ()),
        (
            ["0:30 /docker.sock /var/run/docker.sock rw tmpfs tmpfs rw"],
            ("the socket of an engine, which starts what it is told to, is there: /var/run/docker.sock",),
        ),
        (["8:1 /srv/data /data rw ext4 /dev/sda1 rw"], ("may write to the host's /srv/data at /data",)),
        (["8:2 /me /me ro ext4 /dev/b rw"], ("sees the host's /home/me at /me, read-only",)),
        (["8:1 /usr /usr ro ext4 /dev/sda1 rw"], ()),
        (["8:1 /srv /data rw ext4 /dev/sda1 ro"], ("sees the host's /srv at /data, read-only",)),
        (["0:5 / /dev rw devtmpfs udev rw"], ("all device nodes of the host are in /dev",)),
        # As OCI's runtimes guard it, and as nobody does.
        (["0:40 / /proc rw proc proc rw", "0:40 /sys /proc/sys ro proc proc rw"], ()),
        (["0:40 / /proc rw proc proc rw"], ("the kernel's settings may be written to: /proc",)),
        (
            ["0:41 / /sys rw sysfs s rw", "0:42 / /sys/fs/cgroup rw cgroup2 c rw"],
            ("the kernel's settings may be written to: /sys",),
        ),
        # What is mounted over it hides it.
        (["8:1 /srv /data rw ext4 /dev/sda1 rw", "0:50 / /data rw tmpfs t rw"], ()),
        (["0:5 /null /dev/null rw devtmpfs udev rw"], ()),
    ],
)
def test_mounts_of_note(lines: list[str], expected: tuple[str, ...]) -> None:
    assert mounts.mounts_of_note([entry(line) for line in lines], HOST) == expected


def numbered(line: str) -> MountEntry:
    """ "number parent point", of a tmpfs."""
    number, parent, point = line.split()
    found: MountEntry = entry(f"0:{number} / {point} rw tmpfs t rw").replace(number=int(number), parent=int(parent))
    return found


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["1 0 /", "2 1 /a", "3 2 /a/b"], [1, 2, 3]),
        # On top of another one: of the root, too, as pivot_root leaves it.
        (["1 0 /", "2 1 /a", "3 2 /a"], [1, 3]),
        (["1 0 /", "2 1 /", "3 2 /a", "4 1 /b"], [2, 3]),
        (["1 1 /", "2 1 /a"], [1, 2]),
        # One above it in the same mount, as systemd-nspawn has it: the later line isn't the one that is seen.
        (["1 0 /", "2 1 /run", "3 2 /run/host", "4 3 /run/host/x", "5 2 /run/host/x"], [1, 2, 3, 4]),
        # What lies on what isn't reached.
        (["1 0 /", "2 1 /a/b", "3 1 /a", "4 2 /a/b/c", "5 2 /a/b"], [1, 3]),
    ],
)
def test_which_mounts_are_seen(lines: list[str], expected: list[int]) -> None:
    found = mounts.visible([numbered(line) for line in lines])
    assert [one.number for one in found] == expected


def test_the_hosts_own_tree() -> None:
    """A unit of systemd's: what of it is read-only there and isn't on the host, in one line."""
    root, run, home = "8:1 / / {} ext4 /dev/sda1 rw", "0:30 / /run rw tmpfs tmpfs rw", "8:2 / /home ro ext4 /dev/b rw"
    own = "8:1 /var/tmp/systemd-private-{}-a.service-1/tmp /var/tmp rw ext4 /dev/sda1 rw".format("0" * 32)
    hidden = "0:30 /systemd/inaccessible/dir /root ro tmpfs tmpfs rw"
    strict = [entry(line) for line in (root.format("ro"), run, home, own, hidden)]
    assert mounts.mounts_of_note(strict, HOST) == ("sees the host's files, read-only, but for /run",)
    loose = [entry(line) for line in (root.format("rw"), run, home)]
    assert mounts.mounts_of_note(loose, HOST) == ("may write to the host's files where its user may, but for /home",)


def test_what_is_below_a_folder_that_was_told_is_not_told_again() -> None:
    lines = ["8:1 / /host rw ext4 /dev/sda1 rw", "8:2 / /host/home rw ext4 /dev/b rw", "0:30 / /host/run ro tmpfs t rw"]
    shown = [entry(line) for line in lines]
    assert mounts.mounts_of_note(shown, HOST) == ("may write to the host's / at /host",)
    # But where it may do more there.
    lines = ["8:1 / /host ro ext4 /dev/sda1 rw", "8:2 / /host/home rw ext4 /dev/b rw"]
    assert mounts.mounts_of_note([entry(line) for line in lines], HOST) == (
        "sees the host's / at /host, read-only",
        "may write to the host's /home at /host/home",
    )


def test_a_socket_in_a_folder_that_is_mounted() -> None:
    shown = [entry("0:30 / /there ro tmpfs tmpfs rw")]
    [first, _] = mounts.mounts_of_note(shown, HOST, engines=["/run/docker.sock", "/var/lib/podman.sock"])
    assert first == "the socket of an engine, which starts what it is told to, is there: /there/docker.sock"


def test_settings_of_its_own_network_are_its_own() -> None:
    shown = [entry("0:40 /sys/net /proc/sys/net rw proc proc rw")]
    assert mounts.mounts_of_note(shown, HOST, own_network=True) == ()
    assert mounts.mounts_of_note(shown, HOST) == ("the kernel's settings may be written to: /proc/sys/net",)


def test_escapes_of_the_mount_table() -> None:
    assert unescaped(r"/a\040b\134c\011") == "/a b\\c\t"


def files(folder: Path, **content: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_least_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    files(root, cgroup__controllers="memory pids cpu")
    files(root / "a", memory__max="1000\n", pids__max="max\n", cpu__max="150000 100000\n")
    files(root / "a/b", memory__max="max\n", pids__max="max\n", cpu__max="max 100000\n", memory__current="12\n")
    files(root / "a/b", cgroup__controllers="memory pids cpu", pids__current="3\n")
    files(tmp_path / "proc/5", cgroup="0::/a/b\n", status="")
    mount = entry(f"0:30 / {root} rw cgroup2 c rw")
    with Proc(5, str(tmp_path / "proc")) as process:
        found = bounds(process, [mount])
    assert (found.memory_bytes, found.memory_used_bytes, found.pids, found.pids_used) == (1000, 12, None, 3)
    assert found.cpus == 1.5
    assert found.unknown == ()
    with Proc(5, str(tmp_path / "proc")) as process:
        assert bounds(process, []).unknown == ("memory", "pids", "cpu")
