"""A host in namespaces, for the daemons of others: what they start, mount, write and make of cgroups ends with it.

Its PID 1 is what `rf.inspect` takes for the host there, so an engine's `--network host` and `--pid host` are what they
are on a machine of its own. All that is written is in a tmpfs of its own; its cgroups are below this process's.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ringfence.observe.proc import Proc
from support import leaks
from support.sandboxes import PROBE, SOURCES, need, need_root

# Of no account and nobody's subordinate: the unprivileged user there, and what its containers get.
UID, NAME = 54321, "rf-foreign"
SUBORDINATE = 1_700_000_000
# A static program, which does nothing but sleep.
IDLE = ["/srv/idle", "stubborn", "600"]
_numbers = itertools.count()
_WRITTEN = ("etc", "home", "opt", "root", "srv", "tmp", "var")

_SET_UP = r"""
set -e
ip link set lo up
mount -t tmpfs -o mode=755 tmpfs /run
for name in WRITTEN; do
    [ -d "/$name" ] || continue
    mkdir -p "/run/.written/$name/upper" "/run/.written/$name/work"
    chmod --reference="/$name" "/run/.written/$name/upper"
    chown --reference="/$name" "/run/.written/$name/upper"
    mount -t overlay -o "lowerdir=/$name,upperdir=/run/.written/$name/upper,workdir=/run/.written/$name/work" \
        overlay "/$name"
done
umount -R -l /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
for options in HIERARCHIES; do
    name=${options#none,name=}
    mkdir "/sys/fs/cgroup/$name"
    mount -t cgroup -o "$options" cgroup "/sys/fs/cgroup/$name"
done
echo NAME:x:UID:UID::/home/NAME:/bin/sh >>/etc/passwd
echo NAME:x:UID: >>/etc/group
for file in subuid subgid; do
    printf '%s:SUBORDINATE:65536\n' root NAME >>"/etc/$file"
done
mkdir -p /home/NAME /run/user/UID
chown UID:UID /home/NAME /run/user/UID
cp PROBE /srv/idle
chmod 755 /srv /srv/idle
echo ready
exec "$@"
"""
# A PID 1 that does what one has to: it reaps.
_INIT = ["bash", "-c", "trap : TERM; while :; do sleep 1000 & wait; done"]

_LOOK = r"""
import json, os, sys
import ringfence as rf
found = []
for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
    with open(f"/proc/{pid}/comm") as file:
        if file.read().rstrip("\n") in sys.argv[1:]:
            found.append(rf.inspect(pid).to_json())
print(json.dumps({"processes": found, "groups": [one.to_json() for one in rf.survey()]}))
"""
_CLI = "import sys; from ringfence.cli import main; raise SystemExit(main(sys.argv[1:]))"


class Host:
    """init: its PID 1, once all is set up."""

    def __init__(self, init: Sequence[str] = _INIT) -> None:
        need_root()
        with Proc(os.getpid()) as own:
            paths, mounts = own.cgroups(), own.mounts() or []
        hierarchies = {}
        for entry in mounts:
            if entry.kind != "cgroup":
                continue
            options = [one for one in entry.super_options if one in paths]
            path = paths[options[0]] if options else None
            if path is not None and (path + "/").startswith(entry.root.rstrip("/") + "/"):
                words = [one if not one.startswith("name=") else f"none,{one}" for one in options]
                hierarchies[",".join(words)] = Path(entry.point + path[len(entry.root.rstrip("/")) :])
        need("cgroup v1", "memory" in ",".join(hierarchies))
        self._started: list[subprocess.Popen[bytes]] = []
        self.cgroups = _cgroups(hierarchies.values())
        script = _SET_UP
        values = {"WRITTEN": " ".join(_WRITTEN), "HIERARCHIES": " ".join(hierarchies), "PROBE": shlex.quote(PROBE)}
        for word, value in {**values, "SUBORDINATE": str(SUBORDINATE), "UID": str(UID), "NAME": NAME}.items():
            script = script.replace(word, value)
        # As a user's shell would have it: an engine reads much from its environment.
        self.env = {"PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
        words = ["unshare", "--mount", "--propagation", "private", "--net", "--pid", "--ipc", "--uts", "--cgroup"]
        words += ["--fork", "--kill-child", "--mount-proc", "bash", "-c", script, "bash", *init]
        self._unshare = subprocess.Popen(
            self._joined(words), env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd="/"
        )
        assert self._unshare.stdout is not None
        try:
            assert self._unshare.stdout.readline() == b"ready\n"
            [self.first] = [one.pid for one in leaks.descendants(self._unshare.pid) if one.parent == self._unshare.pid]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Its PID 1 takes everybody there with it."""
        self._unshare.kill()
        for one in (self._unshare, *self._started):
            one.communicate()
        deadline = time.monotonic() + 10
        for top in self.cgroups:
            while top.exists():
                try:
                    for folder, _, _ in os.walk(top, topdown=False):
                        os.rmdir(folder)
                except OSError:  # those that were killed are still in it
                    assert time.monotonic() < deadline, f"{top} isn't empty"
                    time.sleep(0.02)

    def _joined(self, words: Sequence[str]) -> list[str]:
        joins = "".join(f"echo 0 >{shlex.quote(str(one))}/cgroup.procs && " for one in self.cgroups)
        return ["/bin/sh", "-c", joins + 'exec "$@"', "sh", *words]

    def _entered(self, words: Sequence[str]) -> list[str]:
        return self._joined(["nsenter", "--target", str(self.first), "-m", "-n", "-p", "-i", "-u", "-C", "--", *words])

    def start(self, words: Sequence[str]) -> None:
        """In the background; it ends with the host at the latest."""
        null = subprocess.DEVNULL
        self._started.append(
            subprocess.Popen(self._entered(words), env=self.env, cwd="/", stdin=null, stdout=null, stderr=null)
        )

    def run(self, *words: str, env: Mapping[str, str] | None = None, timeout: float = 60) -> str:
        """What it prints. It must end well."""
        done = subprocess.run(
            self._entered(words),
            env={**self.env, **(env or {})},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def shell(self, script: str, env: Mapping[str, str] | None = None) -> str:
        return self.run("bash", "-euc", script, env=env)

    def until(self, *words: str, env: Mapping[str, str] | None = None, seconds: float = 60) -> None:
        """Waits until that command ends well."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.run(*words, env=env)
                return
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    # ---- what ringfence says there ----

    def _python(self, code: str, *args: str) -> str:
        return self.run(sys.executable, "-c", code, *args, env={"PYTHONPATH": str(SOURCES)})

    def look(self, *names: str) -> Looked:
        """All processes of these names inspected, and the survey."""
        told = json.loads(self._python(_LOOK, *names))
        return Looked(told["processes"], told["groups"])

    def ringfence(self, *words: str) -> str:
        """The command line there."""
        return self._python(_CLI, *words)


class Looked:
    """processes: of `rf.inspect`, groups: of `rf.survey`, both as JSON."""

    def __init__(self, processes: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        self.processes, self.groups = processes, groups

    def named(self, name: str) -> dict[str, Any]:
        """The one process that is in the container, or the unit, of that name."""
        [found] = [one for one in self.processes if name in (_called(one), one["unit"])]
        return found

    def group(self, name: str) -> dict[str, Any]:
        [found] = [one for one in self.groups if name in (_called(one["first"]), one["first"]["unit"])]
        return found


def _called(one: dict[str, Any]) -> str | None:
    return one["container"]["name"] if one["container"] is not None else None


def own(one: dict[str, Any]) -> set[str]:
    """The namespaces that aren't the host's."""
    return {space["name"] for space in one["namespaces"] if space["shared"] is False}


def weak(one: dict[str, Any]) -> str:
    return " | ".join(one["weak"])


@contextmanager
def host(init: Sequence[str] = _INIT) -> Iterator[Host]:
    found = Host(init)
    try:
        yield found
    finally:
        found.close()


def _cgroups(folders: Iterable[Path]) -> list[Path]:
    name = f"foreign-{os.getpid()}-{next(_numbers)}"
    found = []
    for folder in folders:
        (folder / name).mkdir()
        for file in ("cpuset.cpus", "cpuset.mems"):
            if (folder / name / file).exists():
                (folder / name / file).write_text((folder / file).read_text())
        found.append(folder / name)
    return found
