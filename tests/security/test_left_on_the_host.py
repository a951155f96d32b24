"""What a workload may leave on the host's file systems, and what it can't do to whoever removes it."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

import ringfence as rf
from support.sandboxes import IN_A_GUEST, LEVELS, LOCAL_LEVELS, PROBE_FILE, ended, need_root

PYTHON = "/usr/bin/python3"

SET_ID = """
import os, sys
folder = sys.argv[1]
path = os.path.join(folder, "file")
os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o755))
def attempt(name, call, *arguments):
    try:
        call(*arguments)
        print(name, "ok")
    except OSError as error:
        print(name, error.errno)
attempt("control", os.chmod, path, 0o711)
attempt("chmod", os.chmod, path, 0o4755)
attempt("setgid", os.chmod, path, 0o2755)
attempt("open", os.open, os.path.join(folder, "made"), os.O_CREAT | os.O_WRONLY, 0o6755)
attempt("mkdir", os.mkdir, os.path.join(folder, "folder"), 0o2755)
"""


@pytest.mark.parametrize("isolation", ["container", "vm"])
def test_no_set_id_file_is_left_in_a_writable_mount(isolation: str, tmp_path: Path) -> None:
    need_root()
    tmp_path.chmod(0o755)
    result = rf.run([PYTHON, "-c", SET_ID, "/data"], isolation=isolation, mounts=[rf.Mount(tmp_path, "/data", True)])
    assert ended(result) == ("exited", 0, None), result.stderr
    said = dict(line.split() for line in result.stdout.decode().splitlines())
    # mkdir(2) drops the bits by itself; the filter never lets it come to that.
    assert said == {"control": "ok", "chmod": "1", "setgid": "1", "open": "1", "mkdir": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o711


DEEP = """
import os, sys
# A tree that is deeper than anybody holds descriptors for, and the names that its removal would take for it.
here = os.getcwd()
for _ in range(300):
    os.mkdir("d")
    os.chdir("d")
    open(".deep-%d" % os.stat(".").st_ino, "w").close()
    inode = os.stat(".").st_ino
    top = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    for name in (".deep-%d", ".rf-%x"):
        os.close(os.open(name % inode, os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=top))
    os.close(top)
os.mkfifo("fifo")
os.symlink("/etc/passwd", "link")
"""


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_a_deep_tree_with_foreseen_names_is_removed(isolation: str) -> None:
    result = rf.run([PYTHON, "-c", DEEP], isolation=isolation)
    assert ended(result) == ("exited", 0, None), result.stderr


@pytest.mark.parametrize("isolation", LEVELS)
def test_the_links_target_stays(isolation: str, tmp_path: Path) -> None:
    """Removing a work directory removes links, never what they point to."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    script = f"import os; os.symlink({str(outside)!r}, 'l'); os.mkdir('d'); os.symlink({str(outside)!r}, 'd/l')"
    assert ended(rf.run([PYTHON, "-c", script], isolation=isolation)) == ("exited", 0, None)
    assert (outside / "kept").read_text() == "kept"


def test_killers_do_not_reach_each_other() -> None:
    """Each run leaves six processes in sessions of their own, and eight threads kill theirs at the same time."""
    script = "for i in 1 2 3 4 5 6; do setsid sleep 60 & done; exit 7"
    found: list[object] = []
    rounds = 3 if IN_A_GUEST else 25

    def work() -> None:
        for _ in range(rounds):
            try:
                found.append(ended(rf.run(["sh", "-c", script], isolation="process")))
            except rf.RingfenceError as error:
                found.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == [("exited", 7, None)] * 8 * rounds


def test_the_next_sandbox_is_not_given_what_the_last_one_changed() -> None:
    """A work directory is used again only as it was made: not with another mode, or attributes."""
    for change in ("chmod 0777 .", "touch x; rm x; chmod 0700 .", "mkdir a; chmod 000 a"):
        assert ended(rf.run(["sh", "-c", change], isolation="process")) == ("exited", 0, None)
        result = rf.run(["./probe", "stat", "."], isolation="process", files=PROBE_FILE)
        assert result.stdout.split()[1] == b"0700", change
        assert os.path.exists("/etc/passwd")
