"""Mounts of the caller's: read-only down to what is mounted below, and never anywhere but inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.api import level
from ringfence.spec import Spec
from support.sandboxes import LEVELS, PROBE, SOURCES, ended, need_level, need_root, output
from support.unprivileged import home, python_json

NESTED = """
import json, os, sys, ringfence as rf
from ringfence.wire.launcher import probe_path
source, writable = sys.argv[1], sys.argv[2] == "writable"
files = {"probe": rf.File(open(probe_path(), "rb").read(), 0o755)}
script = '''
for at in /data /data/below /data/below/deeper; do ./probe try-create $at/new; done
./probe read /data/below/deeper/f
grep -c " /data" /proc/self/mountinfo
'''
result = rf.run(["sh", "-c", script], mounts=[rf.Mount(source, "/data", writable=writable)], files=files, user=0)
flags = rf.run(["cat", "/proc/self/mountinfo"], mounts=[rf.Mount(source, "/data", writable=writable)]).stdout.decode()
found = [line.split() for line in flags.splitlines() if " /data" in line]
print(json.dumps([result.stdout.decode().splitlines(), [[one[4], one[5].split(","), one[6]] for one in found]]))
"""


def after(set_up: str, *args: str) -> str:
    """What a shell prints that mounts first, in a mount namespace of its own. It must end well."""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", set_up, "sh", *args]
    env = {**os.environ, "PYTHONPATH": str(SOURCES)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def nested(tmp_path: Path, how: str) -> tuple[list[str], list[list[Any]]]:
    """The probe's answers under a mount of a folder below which two tmpfs are mounted, shared, and those mounts."""
    (tmp_path / "below").mkdir()
    set_up = (
        'mount --make-rshared / && mount -t tmpfs -o mode=777 t "$1/below" && mkdir -m 777 "$1/below/deeper" &&'
        ' mount -t tmpfs -o mode=777,exec,suid,dev t "$1/below/deeper" && echo in > "$1/below/deeper/f" &&'
        ' exec "$2" -c "$3" "$1" "$4"'
    )
    answers, found = json.loads(after(set_up, str(tmp_path), sys.executable, NESTED, how))
    return answers, found


def test_what_is_mounted_below_a_mount_is_read_only_too(tmp_path: Path) -> None:
    need_root()
    answers, found = nested(tmp_path, "read-only")
    assert answers == ["EROFS open"] * 3 + ["in", "3"]
    assert [one[0] for one in found] == ["/data", "/data/below", "/data/below/deeper"]
    for _, flags, propagation in found:
        assert {"ro", "nosuid", "nodev"} <= set(flags)
        assert not propagation.startswith(("shared:", "master:"))


def test_what_is_mounted_below_a_writable_mount_is_writable_and_private(tmp_path: Path) -> None:
    """The control: it is the mount's flag that said no."""
    need_root()
    tmp_path.chmod(0o777)
    answers, found = nested(tmp_path, "writable")
    assert answers == ["ok"] * 3 + ["in", "3"]
    for _, flags, propagation in found:
        assert {"rw", "nosuid", "nodev"} <= set(flags)
        assert not propagation.startswith(("shared:", "master:"))


def test_a_file_over_a_file_and_a_target_that_the_image_lacks(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "probe").write_bytes(Path(PROBE).read_bytes())
    (root / "bin" / "probe").chmod(0o755)
    (root / "etc").mkdir()
    (root / "etc" / "conf").write_text("of the image")
    (root / "etc" / "link").symlink_to("conf")
    (root / "etc" / "away").symlink_to("/../../../../etc/conf")
    (tmp_path / "mine").write_text("of the mount")
    for target in ("/etc/conf", "/etc/link", "/etc/away"):
        result = rf.run(["probe", "read", "/etc/conf"], image=root, mounts=[rf.Mount(tmp_path / "mine", target)])
        assert output(result) == b"of the mount", target
    # At the top there is room for a new name; below it the image is as it is.
    mount = rf.Mount(tmp_path, "/new/deep/at")
    assert output(rf.run(["probe", "read", "/new/deep/at/mine"], image=root, mounts=[mount])) == b"of the mount"
    with pytest.raises(rf.StartError) as caught:
        rf.run(["probe", "exit", "0"], image=root, mounts=[rf.Mount(tmp_path, "/etc/new")])
    assert (caught.value.step, caught.value.errno) == ("mounts", 30)
    # A folder on a file, and a file on a folder, are errors too.
    for source, target in ((tmp_path, "/etc/conf"), (tmp_path / "mine", "/etc")):
        with pytest.raises(rf.StartError):
            rf.run(["probe", "exit", "0"], image=root, mounts=[rf.Mount(source, target)])


class Swapper:
    """Makes `place` a folder, and a link to `outside`, in turn, as fast as it can."""

    def __init__(self, place: Path, outside: str) -> None:
        self.place, self.link, self.away = place, place.with_name("link"), place.with_name("away")
        self.link.symlink_to(outside)
        self.turns = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            os.rename(self.place, self.away)
            os.rename(self.link, self.place)
            os.rename(self.place, self.link)
            os.rename(self.away, self.place)
            self.turns += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that is mounted writable, and in it one that is a mount's target, or a link to the host's root."""
    (tmp_path / "writable" / "target").mkdir(parents=True)
    (tmp_path / "writable").chmod(0o777)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "f").write_text("of the mount")
    swapper = Swapper(tmp_path / "writable" / "target", str(tmp_path / "outside"))
    (tmp_path / "outside").mkdir()
    yield tmp_path
    swapper.stop()
    assert swapper.turns > 100


def mounted_there() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def test_a_target_that_is_swapped_for_a_link_a_thousand_times(place: Path) -> None:
    """In a writable mount, as another sandbox of the same folder could. It is mounted in its place, or inside where the
    link leads to, which is nowhere, and then nothing runs; never outside.
    """
    before = mounted_there()
    mounts = [rf.Mount(place / "writable", "/w", writable=True), rf.Mount(place / "mine", "/w/target")]
    ran, failed = 0, set[str]()
    for _ in range(1000):
        try:
            result = rf.run(["cat", "/w/target/f"], mounts=mounts)
        except rf.StartError as error:
            failed.add(f"{error.step}: {error.call}: {error.errno}")
            continue
        ran += 1
        # The name may be the link by now; what it is mounted on then is away.
        assert result.stdout in (b"of the mount", b"")
    assert ran > 0
    assert {one.partition(":")[0] for one in failed} <= {"mounts"}, failed
    assert os.listdir(place / "outside") == []
    assert mounted_there() == before


UNPRIVILEGED = """
import json, os, sys, threading, ringfence as rf
folder = sys.argv[1]
stop = threading.Event()
def swap():
    while not stop.is_set():
        os.rename(folder + "/writable/target", folder + "/writable/away")
        os.rename(folder + "/writable/link", folder + "/writable/target")
        os.rename(folder + "/writable/target", folder + "/writable/link")
        os.rename(folder + "/writable/away", folder + "/writable/target")
thread = threading.Thread(target=swap)
thread.start()
mounts = [rf.Mount(folder + "/writable", "/w", writable=True), rf.Mount(folder + "/mine", "/w/target")]
found = {}
try:
    for _ in range(200):
        try:
            key = rf.run(["cat", "/w/target/f"], mounts=mounts).stdout.decode()
        except rf.StartError as error:
            key = error.step
        found[key] = found.get(key, 0) + 1
finally:
    stop.set()
    thread.join()
print(json.dumps([found, os.listdir(folder + "/outside")]))
"""


def test_the_same_of_an_unprivileged_caller(tmp_path: Path) -> None:
    need_root()
    folder = home() / "race"
    for name in ("writable/target", "mine", "outside"):
        (folder / name).mkdir(parents=True)
    (folder / "mine" / "f").write_text("of the mount")
    (folder / "writable" / "link").symlink_to(folder / "outside")
    for one in (folder, *folder.rglob("*")):
        os.chown(one, home().stat().st_uid, -1, follow_symlinks=False)
    found, outside = python_json(UNPRIVILEGED, str(folder))
    assert set(found) <= {"of the mount", "", "mounts"}
    assert found.get("of the mount", 0) + found.get("", 0) > 0
    assert outside == []


@pytest.mark.parametrize("isolation", [one for one in LEVELS if one != "process"])
def test_a_source_that_has_become_a_secret_is_not_shown(isolation: str, tmp_path: Path) -> None:
    """Judged when the spec was made, and once more as what was opened."""
    need_level(isolation)
    for name in ("plain", "home/.ssh"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "home/.ssh/id_rsa").write_text("secret")
    (tmp_path / "link").symlink_to("plain")
    for secret in (False, True):
        mount = rf.Mount(tmp_path / "link", "/m", secret=secret)
        spec = Spec.make(["true"], isolation=isolation, mounts=[mount])
        level(isolation).check(spec, rf.host())
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to("home/.ssh")
        if secret:
            level(isolation).open(spec, rf.host()).close()
        else:
            with pytest.raises(rf.SpecError, match="has become what would show a secret"):
                level(isolation).open(spec, rf.host())
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to("plain")


def test_the_probe_of_the_image_still_runs(place: Path) -> None:
    """The control: without the second mount the same runs all end well."""
    result = rf.run(["ls", "/w"], mounts=[rf.Mount(place / "writable", "/w", writable=True)])
    assert ended(result)[:2] == ("exited", 0)


MOUNTED_IN_THE_IMAGE = """
import json, sys, ringfence as rf
script = "cat /opt/there/open; cat /opt/there/secret; cat /opt/there/sub/beneath; ls /opt/there/sub"
found = []
for isolation, overlay in json.loads(sys.argv[1]):
    done = rf.run(["sh", "-c", script], isolation=isolation, user=0, overlay=overlay, text=True)
    found.append([done.stdout, done.stderr])
print(json.dumps(found))
"""


def test_what_is_mounted_in_the_hosts_userland_keeps_its_owner_and_hides_what_is_beneath() -> None:
    """Also under an overlay, whose lower layers show root's files as root's."""
    need_root()
    runs = [("container", False), ("container", True)]
    if "vm" in LEVELS:
        need_level("vm")
        runs += [("vm", False), ("vm", True)]
    set_up = (
        "mount -t tmpfs t /opt && mkdir /opt/there && mount -t tmpfs t /opt/there && echo open > /opt/there/open &&"
        " echo secret > /opt/there/secret && chmod 600 /opt/there/secret && mkdir /opt/there/sub &&"
        " echo beneath > /opt/there/sub/beneath && mount -t tmpfs t /opt/there/sub &&"
        " echo above > /opt/there/sub/above &&"
        ' cat /opt/there/secret && exec "$1" -c "$2" "$3"'
    )
    told = after(set_up, sys.executable, MOUNTED_IN_THE_IMAGE, json.dumps(runs))
    control, _, printed = told.partition("\n")
    assert control == "secret"
    for stdout, stderr in json.loads(printed):
        assert stdout.split() == ["open", "above"]
        assert "secret: Permission denied" in stderr and "beneath: No such file or directory" in stderr
