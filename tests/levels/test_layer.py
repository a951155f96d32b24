"""What of a sandbox can be written to: tmpfs mounts, the size of the work directory, overlays, and what was changed."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.api import level
from ringfence.spec import Spec
from support import leaks
from support.sandboxes import (
    EXITED_0,
    PROBE,
    PROBE_FILE,
    applied,
    ended,
    need_cgroup,
    need_level,
    need_root,
    output,
    python,
    run_probe,
)

SIZED = ("container", "vm")  # the levels that have these rules
MIB = 1 << 20


def refused(isolation: str, **options: Any) -> list[str]:
    with pytest.raises(rf.CannotEnforce) as caught:
        run_probe(isolation, "exit", "0", **options)
    assert all(one.reason and one.help for one in caught.value.unmet)
    return [one.rule for one in caught.value.unmet]


# ---- tmpfs ----


@pytest.mark.parametrize("isolation", SIZED)
def test_a_tmpfs_has_its_size_and_mode_and_belongs_to_the_workload(isolation: str) -> None:
    script = """
    ./probe stat /data/x | cut -d' ' -f1,2
    ./probe mkfile /data/x/fits 512K; ./probe mkfile /data/x/big 2M; rm /data/x/*
    i=0; while true > /data/x/$i; do i=$((i+1)); test $i -lt 5000 || break; done; echo inodes
    """
    mount = rf.Tmpfs("/data/x", "1M", 0o700)
    result = rf.run(["sh", "-c", script], isolation=isolation, mounts=[mount], files=PROBE_FILE)
    assert result.stdout.decode().splitlines() == ["dir 0700", "ok", "ENOSPC write", "inodes"]
    assert b"No space left" in result.stderr  # of the shell: as many files as it takes, and not one of 5000
    one = applied(result)["tmpfs /data/x"]
    assert (one.requested, one.effective) == (MIB, MIB)


@pytest.mark.parametrize("isolation", SIZED)
def test_a_tmpfs_is_nosuid_and_nodev_and_gone_with_the_sandbox(isolation: str) -> None:
    mount = rf.Tmpfs("/data", "1M")
    script = "echo x > /data/f; grep ' /data ' /proc/self/mountinfo"
    found = output(rf.run(["sh", "-c", script], isolation=isolation, mounts=[mount]))
    assert {"rw", "nosuid", "nodev"} <= set(found.decode().split()[5].split(","))
    assert output(rf.run(["ls", "-A", "/data"], isolation=isolation, mounts=[mount])) == b""


@pytest.mark.parametrize("isolation", SIZED)
def test_a_tmpfs_counts_as_the_sandboxs_memory(isolation: str) -> None:
    need_cgroup("memory")
    limits = rf.Limits(memory="24M")
    result = run_probe(isolation, "mkfile", "/data/f", "40M", mounts=[rf.Tmpfs("/data", "64M")], limits=limits)
    assert result.termination_reason == "memory"
    control = run_probe(isolation, "mkfile", "/data/f", "40M", mounts=[rf.Tmpfs("/data", "64M")])
    assert ended(control) == EXITED_0


def test_a_process_has_no_tmpfs_no_size_and_no_overlay() -> None:
    assert refused("process", mounts=[rf.Tmpfs("/data")]) == ["tmpfs"]
    assert refused("process", limits=rf.Limits(disk="1M")) == ["disk"]
    assert refused("process", overlay=True) == ["overlay"]


# ---- limits.disk ----


@pytest.mark.parametrize("isolation", SIZED)
def test_disk_bounds_the_work_directory(isolation: str) -> None:
    files = {**PROBE_FILE, "sub/in": b"put in"}
    script = "cat sub/in; ./probe mkfile out/big 32M"
    result = rf.run(
        ["sh", "-c", f"mkdir out; {script}"],
        isolation=isolation,
        files=files,
        limits=rf.Limits(disk="8M"),
        collect=["out/*"],
    )
    assert ended(result) == ("disk", 1, None)
    assert result.stdout == b"put inENOSPC write\n"
    # What was written until then is kept, and is no more than the limit.
    assert 4 * MIB < len(result.files["out/big"]) <= 8 * MIB
    one = applied(result)["disk"]
    assert (one.requested, one.effective) == (8 * MIB, 8 * MIB)


@pytest.mark.parametrize("isolation", SIZED)
def test_below_the_limit_and_without_it(isolation: str) -> None:
    limits = rf.Limits(disk="8M")
    assert ended(run_probe(isolation, "mkfile", "big", "4M", limits=limits)) == EXITED_0
    assert ended(run_probe(isolation, "mkfile", "big", "32M")) == EXITED_0
    # It failed, and not for the disk.
    assert ended(rf.run(["sh", "-c", "echo x > y; exit 3"], isolation=isolation, limits=limits)) == ("exited", 3, None)


@pytest.mark.parametrize("isolation", SIZED)
def test_disk_bounds_the_number_of_files(isolation: str) -> None:
    script = "i=0; while : > $i; do i=$((i+1)); test $i -lt 20000 || exit 0; done"
    result = rf.run(["sh", "-c", script], isolation=isolation, limits=rf.Limits(disk="1M"))
    assert result.termination_reason == "disk"


@pytest.mark.parametrize("isolation", SIZED)
def test_a_command_that_copes_with_a_full_disk_is_not_ended_by_it(isolation: str) -> None:
    script = "./probe mkfile big 32M 2> /dev/null; exit 0"
    result = rf.run(["sh", "-c", script], isolation=isolation, files=PROBE_FILE, limits=rf.Limits(disk="8M"))
    assert ended(result) == EXITED_0


@pytest.mark.parametrize("isolation", SIZED)
def test_files_that_do_not_fit_are_an_error_and_nothing_runs(isolation: str) -> None:
    with pytest.raises(rf.StartError) as caught:
        rf.run(["true"], isolation=isolation, files={"big": bytes(2 * MIB)}, limits=rf.Limits(disk="1M"))
    assert (caught.value.step, os.strerror(caught.value.errno or 0)) == ("files", "No space left on device")


# ---- overlay ----

AS_OF_PACKAGES = """
set -e
echo new > /etc/foo
echo more >> /etc/hostname
mv /etc/services /etc/services.dpkg-old
echo replaced > /etc/services.dpkg-new
mv /etc/services.dpkg-new /etc/services
rm /etc/issue.net
rm -r /etc/skel; mkdir /etc/skel; echo n > /etc/skel/new
mkdir -p /usr/lib/made/deep; cp ./probe /usr/lib/made/deep/tool; chmod 755 /usr/lib/made/deep/tool
ln -s /usr/lib/made/deep/tool /usr/bin/rf-tool; ln /usr/lib/made/deep/tool /usr/lib/made/hard
rm -rf /usr/share/doc/bash
chmod 700 /opt
mkdir /newtop; touch /newtop/f; touch /root/mine; mkfifo /home/pipe
touch /tmp/not-told /dev/shm/not-told /work/not-told
rf-tool exit 0; cat /etc/services /etc/foo
"""
WANTED = {
    "/etc/foo": ("created", "file"),
    "/etc/hostname": ("changed", "file"),
    "/etc/services": ("changed", "file"),
    "/etc/services.dpkg-old": ("created", "file"),
    "/etc/issue.net": ("deleted", None),
    "/etc/skel": ("changed", "directory"),
    "/etc/skel/new": ("created", "file"),
    "/etc/skel/.bashrc": ("deleted", None),
    "/usr/lib/made": ("created", "directory"),
    "/usr/lib/made/deep": ("created", "directory"),
    "/usr/lib/made/deep/tool": ("created", "file"),
    "/usr/lib/made/hard": ("created", "file"),
    "/usr/bin/rf-tool": ("created", "symlink"),
    "/usr/share/doc/bash": ("deleted", None),
    "/opt": ("changed", "directory"),
    "/newtop": ("created", "directory"),
    "/newtop/f": ("created", "file"),
    "/root/mine": ("created", "file"),
    "/home/pipe": ("created", "other"),
}


@pytest.mark.parametrize(("isolation", "disk"), [("container", None), ("container", "64M"), ("vm", "64M")])
def test_root_inside_changes_the_hosts_userland_and_the_host_does_not_see_it(isolation: str, disk: str | None) -> None:
    need_root()
    before = {path: os.lstat(path) for path in ("/etc", "/usr/bin", "/opt", "/etc/services", "/etc/hostname")}
    limits = rf.Limits(disk=disk)
    result = rf.run(
        ["sh", "-c", AS_OF_PACKAGES], isolation=isolation, overlay=True, user=0, files=PROBE_FILE, limits=limits
    )
    assert output(result) == b"replaced\nnew\n"
    assert result.changes is not None
    found = {one.path: (one.kind, one.what) for one in result.changes}
    assert {path: found.get(path) for path in WANTED} == WANTED
    # What else was there is of /etc/skel, which was made anew.
    assert {path for path in found if path not in WANTED and not path.startswith("/etc/skel/")} == set()
    assert [one.path for one in result.changes] == sorted(one.path for one in result.changes)
    sizes = {one.path: one.size_bytes for one in result.changes}
    assert (sizes["/etc/foo"], sizes["/newtop"], sizes["/etc/issue.net"]) == (4, None, None)
    assert {path: os.lstat(path) for path in before} == before
    assert not any(os.path.lexists(path) for path in ("/etc/foo", "/usr/bin/rf-tool", "/newtop"))
    assert applied(result)["overlay"].effective is True


def test_where_a_guest_has_no_overlay_over_the_hosts_userland() -> None:
    need_root()
    need_level("vm")
    mount = rf.Mount("/usr/share", "/m")
    assert refused("vm", overlay=True, user=0, mounts=[mount]) == ["overlay"]
    spec, host = Spec.make(["true"], isolation="vm", overlay=True), rf.host()
    assert [one.rule for one in level("vm").unmet(spec, host.replace(privileged=False))] == ["overlay"]
    assert level("vm").unmet(spec, host) == []


def test_without_an_overlay_nothing_is_told() -> None:
    result = rf.run(["true"])
    assert result.changes is None
    assert rf.run(["true"], overlay=True).changes == () or os.geteuid() != 0


def test_the_default_user_is_kept_out_by_modes() -> None:
    need_root()
    result = run_probe("container", "try-create", "/etc/foo", overlay=True)
    assert (result.exit_code, result.stdout) == (1, b"EACCES open\n")


@pytest.mark.parametrize("isolation", SIZED)
def test_secrets_stay_hidden_under_an_overlay(isolation: str) -> None:
    """Root's files are root's inside here, so their modes hide nothing: masks do, of known places and private files."""
    need_root()
    private = Path(f"/etc/rf-test-{os.getpid()}")
    private.mkdir(mode=0o755)
    try:
        (private / "key").write_text("secret")
        (private / "key").chmod(0o600)
        (private / "open").write_text("open\n")
        (private / "folder").mkdir(mode=0o700)
        (private / "folder" / "f").write_text("secret")
        script = f"cat {private}/key /etc/shadow {private}/open; ls -A {private}/folder /etc/ssh /etc/ssl/private"
        result = rf.run(["sh", "-c", script], isolation=isolation, overlay=True, user=0)
        assert b"secret" not in result.stdout + result.stderr
        assert result.stdout.startswith(b"open")
        assert Path("/etc/shadow").stat().st_size > 0
        # A guest sees that the folder is there, and that nobody but root may look into it.
        hidden = [f"{private}/folder:"] if isolation == "container" else []
        assert result.stdout.decode().split()[1:] == [*hidden, "/etc/ssh:", "/etc/ssl/private:"]
    finally:
        shutil.rmtree(private)


def test_disk_bounds_overlay_and_work_directory_together() -> None:
    need_root()
    script = "./probe mkfile /usr/big 5M && ./probe mkfile /work/big 5M"
    limits = rf.Limits(disk="8M")
    result = rf.run(["sh", "-c", script], overlay=True, user=0, files=PROBE_FILE, limits=limits)
    assert result.termination_reason == "disk"
    for one in ("/usr/big", "/work/big"):
        assert ended(run_probe("container", "mkfile", one, "5M", overlay=True, user=0, limits=limits)) == EXITED_0


@pytest.mark.parametrize("isolation", SIZED)
def test_an_overlay_over_a_rootfs_folder(isolation: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "etc").mkdir()
    shutil.copy(PROBE, root / "bin" / "probe")
    (root / "etc" / "name").write_text("of the image\n")
    (root / "proc").symlink_to("/etc")
    (root / "top").write_text("a file at the top")
    image: dict[str, Any] = {"image": root, "overlay": True, "isolation": isolation}
    result = rf.run(["probe", "write", "/etc/name", "changed"], user=0, **image)
    assert ended(result) == EXITED_0
    assert [one.to_json() for one in result.changes or ()] == [
        {"path": "/etc/name", "kind": "changed", "what": "file", "size_bytes": 7}
    ]
    assert (root / "etc" / "name").read_text() == "of the image\n"
    assert output(rf.run(["probe", "read", "/top"], **image)) == b"a file at the top"
    denied = rf.run(["probe", "try-open-write", "/top"], user=0, **image)
    assert denied.stdout == b"EROFS open\n"


def test_mounts_and_tmpfs_in_places_that_the_image_lacks_are_no_changes(tmp_path: Path) -> None:
    need_root()
    (tmp_path / "f").write_text("shown\n")
    mounts: list[rf.Mount | rf.Tmpfs] = [
        rf.Mount(tmp_path, "/usr/share/rf/one"),
        rf.Tmpfs("/srv/two", "1M"),
        rf.Mount(tmp_path / "f", "/etc/rf-f"),
    ]
    result = rf.run(["cat", "/usr/share/rf/one/f", "/etc/rf-f"], overlay=True, mounts=mounts)
    assert output(result) == b"shown\nshown\n"
    assert result.changes == ()


def test_awkward_changes_are_told_and_removed() -> None:
    """Names with newlines and bytes that are no text, folders without rights, too deep and too many."""
    need_root()
    script = r"""
    mkdir /opt/a && cd /opt/a && touch "$(printf 'line\nbreak')" "$(printf 'odd\377')"
    mkdir locked && touch locked/f && chmod 000 locked
    ln -s /etc/shadow link; ln -s / loop
    """
    result = rf.run(["sh", "-c", script], overlay=True, user=0)
    names = [one.path for one in result.changes or ()]
    wanted = ["", "/line\nbreak", "/link", "/locked", "/locked/f", "/loop", os.fsdecode(b"/odd\xff")]
    assert names == [f"/opt/a{name}" for name in wanted]
    deep = "cd /opt; i=0; while [ $i -lt 80 ]; do mkdir d; cd d; i=$((i+1)); done"
    result = rf.run(["sh", "-c", deep], overlay=True, user=0)
    assert len(result.changes or ()) == 65
    assert applied(result)["changes"].effective == "incomplete"


def test_too_many_changes_are_bounded() -> None:
    need_root()
    started = time.monotonic()
    result = rf.run(["sh", "-c", "mkdir /opt/m && cd /opt/m && seq 70000 | xargs touch"], overlay=True, user=0)
    assert ended(result) == EXITED_0
    assert 65000 < len(result.changes or ()) <= 65536
    assert applied(result)["changes"].effective == "incomplete"
    assert time.monotonic() - started < 60


def test_a_sandbox_that_stays_has_one_layer_for_all_its_commands() -> None:
    need_root()
    with rf.Sandbox(overlay=True, user=0, limits=rf.Limits(disk="8M"), files={"given": b"1"}) as sandbox:
        first = sandbox.run(["sh", "-c", "cat given; echo a > /etc/first; echo out > /work/out"])
        assert output(first) == b"1"
        assert [one.path for one in first.changes or ()] == ["/etc/first"]
        sandbox.write_file("later", b"2")
        second = sandbox.run(["sh", "-c", "cat later /etc/first out; rm /etc/first; echo b > /etc/second"])
        assert output(second) == b"2a\nout\n"
        assert [one.path for one in second.changes or ()] == ["/etc/second"]
        assert sandbox.read_file("out") == b"out\n"
        third = sandbox.run(["sh", "-c", "head -c 9M /dev/zero > /usr/big"])
        assert third.termination_reason == "disk"
        with pytest.raises(rf.RingfenceError):
            sandbox.write_file("more", bytes(MIB))
        assert ended(sandbox.run(["rm", "/usr/big"])) == EXITED_0
        sandbox.write_file("more", bytes(MIB))


KILLED = """
import sys, ringfence as rf
limits = rf.Limits(disk=sys.argv[1] or None)
script = "mkdir -p /etc/x/y && echo a > /etc/x/y/z && chmod 0 /etc/x/y && echo made > /work/f && sleep 60"
print("starting", flush=True)
rf.run(["sh", "-c", script], overlay=True, user=0, limits=limits)
"""


@pytest.mark.parametrize("disk", ["", "16M"])
def test_nothing_is_left_of_a_layer_whose_caller_is_killed(disk: str) -> None:
    need_root()
    with python(KILLED, disk) as caller:
        assert caller.stdout is not None
        assert caller.stdout.readline() == b"starting\n"
        # Until it has a folder for its layer, where that is on disk, and for its files; and then some more.
        assert leaks.settled(lambda: ({"w"} if disk else {"w", "o"}) - kinds_of_folders(caller.pid), 10) == set()
        time.sleep(1)
        caller.kill()
    assert leaks.settled(lambda: leaks.run_folders_of(caller.pid), leaks.GRACE_S) == set()


def kinds_of_folders(pid: int) -> set[str]:
    return {one.name[0] for folder in leaks.run_folders_of(pid) for one in Path(folder).iterdir()}
