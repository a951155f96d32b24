"""A host in namespaces, for the daemons of others: what they start, mount, write and make of cgroups ends with it.

Its PID 1 is what `rf.inspect` takes for the host there, so an engine's `--network host` and `--pid host` are what they
are on a machine of its own. All that is written is in a tmpfs of its own; its cgroups are where ringfence makes its
own, of the version that has the memory controller.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ringfence as rf
from ringfence.linux.cgroups.home import find_home
from ringfence.observe.proc import Proc
from support import leaks
from support.sandboxes import PROBE, SOURCES, need, need_cgroup, need_root

# Of no account and nobody's subordinate: the unprivileged user there, and what its containers get.
UID, NAME = 54321, "rf-foreign"
SUBORDINATE = 1_700_000_000
# Debian's package of each tool, and a program of it.
TOOLS = {
    "docker.io": "dockerd",
    "podman": "podman",
    "lxc": "lxc-start",
    "bubblewrap": "bwrap",
    "systemd-container": "systemd-nspawn",
}
# A static program, which does nothing but sleep.
IDLE = ["/srv/idle", "stubborn", "600"]
_numbers = itertools.count()
_WRITTEN = ("etc", "home", "opt", "root", "srv", "tmp", "var")

_SET_UP = r"""
set -e
ip link set lo up
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm # Podman's locks
mount -o remount,bind,rw /
for name in WRITTEN; do
    mkdir -p "/$name"
    if ! grep -qw overlay /proc/filesystems; then # in a guest of ours, where what is in /etc takes long to read
        mount -t tmpfs -o mode=755 tmpfs /mnt
        if [ $name = etc ]; then
            cp -a /etc/passwd /etc/group /etc/login.defs /etc/nsswitch.conf /etc/ld.so.* /etc/alternatives /mnt
            cp -a /etc/containers /etc/lxc /mnt || true
        elif [ $name = var ]; then
            mkdir -p /mnt/lib /mnt/log /mnt/cache /mnt/tmp
            ln -s ../run /mnt/run
        fi
        mount --move /mnt "/$name"
        continue
    fi
    mkdir -p "/run/.written/$name/upper" "/run/.written/$name/work"
    chmod --reference="/$name" "/run/.written/$name/upper"
    chown --reference="/$name" "/run/.written/$name/upper"
    mount -t overlay -o "lowerdir=/$name,upperdir=/run/.written/$name/upper,workdir=/run/.written/$name/work" \
        overlay "/$name"
done
umount -R -l /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
for options in HIERARCHIES; do
    if [ "$options" = v2 ]; then
        umount /sys/fs/cgroup
        mount -t cgroup2 cgroup /sys/fs/cgroup
        # Where there are processes nothing can be delegated. By this name LXC knows that it is systemd's leaf.
        echo 0 >/sys/fs/cgroup/init.scope/cgroup.procs
        sed 's/[a-z]*/+&/g' /sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control
    else
        name=${options#none,name=}
        mkdir "/sys/fs/cgroup/$name"
        mount -t cgroup -o "$options" cgroup "/sys/fs/cgroup/$name"
    fi
done
echo NAME:x:UID:UID::/home/NAME:/bin/sh >>/etc/passwd
echo NAME:x:UID: >>/etc/group
for file in subuid subgid; do
    printf '%s:SUBORDINATE:65536\n' root NAME >>"/etc/$file"
done
[ -s /etc/machine-id ] || echo 0123456789abcdef0123456789abcdef >/etc/machine-id
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


def need_tool(package: str) -> None:
    need(f"Debian's {package}", shutil.which(TOOLS[package]) is not None)


class Host:
    """init: its PID 1, once all is set up."""

    def __init__(self, init: Sequence[str] = _INIT) -> None:
        need_root()
        hierarchies = _hierarchies()
        self.version = 2 if "v2" in hierarchies else 1
        self._started: list[subprocess.Popen[bytes]] = []
        self.cgroups = _cgroups(hierarchies.values())
        self._joins = self.cgroups
        if self.version == 2:
            self._joins = [self.cgroups[0] / "commands"]
            for name in ("commands", "init.scope"):
                (self.cgroups[0] / name).mkdir()
        script = _SET_UP
        values = {"WRITTEN": " ".join(_WRITTEN), "HIERARCHIES": " ".join(hierarchies), "PROBE": shlex.quote(PROBE)}
        for word, value in {**values, "SUBORDINATE": str(SUBORDINATE), "UID": str(UID), "NAME": NAME}.items():
            script = script.replace(word, value)
        # As a user's shell would have it: an engine reads much from its environment.
        self.env = {"PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
        words = ["--pdeathsig=KILL"]  # else it would outlive a test that is killed
        # The root of its cgroups is where it is when these are unshared; nobody may stay there.
        words += ["unshare", "--cgroup", *_joined(self._joins, [])]
        words += ["unshare", "--mount", "--propagation", "private", "--net", "--pid", "--ipc", "--uts"]
        words += ["--fork", "--kill-child", "--mount-proc", "bash", "-c", script, "bash", *init]
        self._unshare = subprocess.Popen(
            _joined(self.cgroups, words), env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd="/"
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

    def _entered(self, words: Sequence[str]) -> list[str]:
        enter = ["nsenter", "--target", str(self.first), "-m", "-n", "-p", "-i", "-u", "-C", "--"]
        return _joined(self._joins, [*enter, *words])

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

    def look(self, *names: str, uid: int = 0) -> Looked:
        """All processes of these names inspected, and the survey, by that user."""
        if uid == 0:
            printed = self._python(_LOOK, *names)
        else:
            # A checkout may lie where nobody else may look, and so may the Python of its environment.
            self.shell(f"cp -r {shlex.quote(str(SOURCES / 'ringfence'))} /srv/ringfence; chmod -R a+rX /srv")
            user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
            python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
            printed = self.run(*user, python, "-c", _LOOK, *names, env={"PYTHONPATH": "/srv"})
        told = json.loads(printed)
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


def _joined(cgroups: Iterable[Path], words: Sequence[str]) -> list[str]:
    joins = "".join(f"echo 0 >{shlex.quote(str(one))}/cgroup.procs && " for one in cgroups)
    # A guest's command has capabilities to inherit, which no root of a machine has, and which LXC doesn't take away.
    return ["/bin/sh", "-c", joins + 'exec setpriv --inh-caps=-all --ambient-caps=-all "$@"', "sh", *words]


def _hierarchies() -> dict[str, Path]:
    """By options of their mounts, "v2" for version 2: this process's own cgroup of those that a host is to have."""
    with Proc(os.getpid()) as own:
        paths, mounts = own.cgroups(), own.mounts() or []
    found = {}
    for entry in mounts:
        options = [one for one in entry.super_options if one in paths] if entry.kind == "cgroup" else []
        words = [one if not one.startswith("name=") else f"none,{one}" for one in options]
        if entry.kind == "cgroup2":
            options, words = [""], ["v2"]
        path = paths.get(options[0]) if options else None
        if path is not None and (path + "/").startswith(entry.root.rstrip("/") + "/"):
            found[",".join(words)] = Path(entry.point + path[len(entry.root.rstrip("/")) :])
    if "memory" in ",".join(found):
        found.pop("v2", None)
        return found
    need_cgroup("memory")
    # Whatever has to move first has moved then.
    rf.run(["true"], isolation="process", limits=rf.Limits(memory="64M"))
    return {"v2": Path(os.fsdecode(find_home(os.fsencode(found["v2"])).path))}


def _cgroups(folders: Iterable[Path]) -> list[Path]:
    name = f"foreign-{os.getpid()}-{next(_numbers)}"
    found = []
    for folder in folders:
        (folder / name).mkdir()
        for file in ("cpuset.cpus", "cpuset.mems"):
            if (folder / file).exists():  # version 1 begins with none; the root of version 2 has no such file
                (folder / name / file).write_text((folder / file).read_text())
        found.append(folder / name)
    return found
