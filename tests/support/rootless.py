"""A caller of ringfence without privileges, on this very host: another Python, as a user that only a private view of
/etc knows.

Nothing of the machine's own files is changed: the view is a mount namespace of the caller's. It runs the system's
Python with copies of what it imports, as a checkout may lie where nobody else may look.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ringfence as rf
from support import leaks

UID = 54321
NAME = "rf-caller"
SUBORDINATE = 1_700_000_000
COUNT = 65536

_VIEW = """
set -e
chroot=
for file in passwd group subuid subgid; do
    # What isn't there can't be mounted over: the test says what is missing.
    if [ -e "/etc/$file" ]; then mount --bind "$0/etc/$file" "/etc/$file"; fi
done
{before}
exec $chroot setpriv --reuid {uid} --regid {uid} --clear-groups \
    env -i PATH=/usr/bin:/bin HOME="$0/home" TMPDIR="$0/tmp" RINGFENCE_CACHE="$0/home/cache" PYTHONPATH="$0/lib" "$@"
"""


class Caller:
    """folder: what it has on this machine. tmp: its $TMPDIR. home: its own, where its mounts may come from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tmp, self.home = folder / "tmp", folder / "home"

    def command(self, code: str, *args: str, before: str = "") -> list[str]:
        """before: shell commands that root runs in the caller's mount namespace first."""
        view = _VIEW.format(uid=UID, before=before)
        python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        isolate = ["unshare", "--mount", "--propagation", "private", "sh", "-c", view, str(self.folder)]
        return [*isolate, python, "-c", code, *args]

    def start(self, code: str, *args: str, before: str = "") -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command(code, *args, before=before), stdout=subprocess.PIPE, cwd="/")

    def run(self, code: str, *args: str, before: str = "") -> Any:
        """What the code prints, as JSON. It must end well, and leave nothing."""
        with self.start(_PRELUDE + code, *args, before=before) as process:
            try:
                printed, _ = process.communicate(timeout=120)
            except BaseException:
                process.kill()
                raise
        assert process.returncode == 0, printed
        assert leaks.settled(self.left, leaks.GRACE_S) == []
        return json.loads(printed)

    def left(self) -> list[str]:
        """Its processes, those of its subordinate ids, and what is in its $TMPDIR."""
        mine = {UID, *range(SUBORDINATE, SUBORDINATE + 2 * COUNT)}
        running = [f"{one.name} {one.pid} of {one.uid}" for one in leaks.processes().values() if one.uid in mine]
        return running + list(self.files())

    def files(self) -> dict[str, int]:
        """What is in its $TMPDIR: path to owner."""
        found = {}
        for top, folders, names in os.walk(self.tmp):
            for name in (*folders, *names):
                path = os.path.join(top, name)
                try:
                    found[path] = os.lstat(path).st_uid
                except FileNotFoundError:
                    continue  # it is being removed
        return found


_PRELUDE = """
import json, os, sys, time
import ringfence as rf
def show(r):
    return {"ended": [str(r.termination_reason), r.exit_code, r.signal],
            "stdout": r.stdout.decode(), "stderr": r.stderr.decode(),
            "files": {k: v.decode() for k, v in (r.files or {}).items()},
            "applied": {a.rule: [repr(a.requested), repr(a.effective), a.mechanism] for a in r.applied}}
def refused(argv, **options):
    try:
        rf.run(argv, **options)
    except rf.CannotEnforce as error:
        return [[one.rule, one.reason] for one in error.unmet]
"""


@contextmanager
def caller(*, subordinate: bool) -> Iterator[Caller]:
    """subordinate: whether /etc/subuid and /etc/subgid give it ids."""
    folder = Path(tempfile.mkdtemp(prefix="rf-unprivileged-", dir="/tmp"))
    try:
        folder.chmod(0o755)
        found = Caller(folder)
        for name in ("etc", "lib"):
            (folder / name).mkdir(mode=0o755)
        for one in (found.tmp, found.home):
            one.mkdir(mode=0o700)
            os.chown(one, UID, UID)
        etc = {
            "passwd": f"root:x:0:0::/root:/bin/sh\n{NAME}:x:{UID}:{UID}::{found.home}:/bin/sh\n",
            "group": f"root:x:0:\nnogroup:x:65534:\n{NAME}:x:{UID}:\n",
            "subuid": f"{NAME}:{SUBORDINATE}:{COUNT}\n" if subordinate else "",
            "subgid": f"{NAME}:{SUBORDINATE + COUNT}:{COUNT}\n" if subordinate else "",
        }
        for name, text in etc.items():
            (folder / "etc" / name).write_text(text)
            (folder / "etc" / name).chmod(0o644)
        package = Path(rf.__file__).parent
        shutil.copytree(package, folder / "lib/ringfence", ignore=shutil.ignore_patterns("__pycache__"))
        _copy_pyseccomp(folder / "lib")
        for top, folders, files in os.walk(folder / "lib"):
            for name in folders:
                os.chmod(os.path.join(top, name), 0o755)
            for name in files:
                mode = os.stat(os.path.join(top, name)).st_mode
                os.chmod(os.path.join(top, name), 0o755 if mode & 0o100 else 0o644)
        yield found
    finally:
        shutil.rmtree(folder)


def _copy_pyseccomp(to: Path) -> None:
    import pyseccomp  # type: ignore[import-untyped]

    path = Path(pyseccomp.__file__)
    if path.name == "__init__.py":
        shutil.copytree(path.parent, to / "pyseccomp", ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(path, to)
