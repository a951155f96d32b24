"""Everything that an unprivileged caller has, on this host: the process and the container level, with and without
subordinate ids.
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.linux import rootless, surroundings
from support import leaks
from support.rootless import COUNT, SUBORDINATE, UID, Caller, caller
from support.sandboxes import LOCAL_LEVELS, need, need_root

# These trees are deep, and a machine may be busy: that all goes is asserted here, how soon in test_killed_caller.py.
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def alone() -> Iterator[Caller]:
    """A caller with nothing but its own id."""
    need_root()
    need("user namespaces", surroundings.find().no_user_namespaces(privileged=False) is None)
    with caller(subordinate=False) as found:
        yield found


@pytest.fixture(scope="module")
def ranged() -> Iterator[Caller]:
    """A caller with subordinate ids."""
    need_root()
    need("user namespaces", surroundings.find().no_user_namespaces(privileged=False) is None)
    need("newuidmap", all(map(os.path.exists, (*rootless.HELPERS, "/etc/subuid", "/etc/subgid"))))
    with caller(subordinate=True) as found:
        yield found


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_ends(alone: Caller, isolation: str) -> None:
    found = alone.run(
        """
isolation = sys.argv[1]
scripts = ("exit 0", "exit 7", "exit 255", "kill -9 $$")
found = [show(rf.run(["sh", "-c", one], isolation=isolation))["ended"] for one in scripts]
for argv in (["/no/such"], ["/etc/passwd"]):
    try:
        rf.run(argv, isolation=isolation)
    except rf.StartError as error:
        found.append([error.step, error.errno])
limits = rf.Limits(wall_time=0.3)
try:
    found.append(show(rf.run(["sleep", "60"], isolation=isolation, limits=limits))["ended"][0])
except rf.CannotEnforce as error:
    found.append("wall_time" if rf.host().landlock_abi < 6 and isolation == "process" else str(error))
print(json.dumps(found))
""",
        isolation,
    )
    assert found == [
        *(["exited", status, None] for status in (0, 7, 255)),
        ["signaled", None, 9],
        ["exec", 2],
        ["exec", 13],
        "wall_time",
    ]


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_files_and_their_owners(alone: Caller, isolation: str) -> None:
    found = alone.run(
        """
script = "cat in && stat -c %u:%g in && mkdir -p out/a && echo done > out/a/f && chmod 0 out && id -u && touch /etc/x"
r = rf.run(["sh", "-c", script], isolation=sys.argv[1], files={"in": b"hello "}, collect=["in", "out/**"], input=b"x")
again = rf.run(["sh", "-c", "ls -A"], isolation=sys.argv[1])
print(json.dumps([show(r), show(again), rf.host().privileged]))
""",
        isolation,
    )
    inside = {"process": UID, "container": 1000}[isolation]
    first, again, privileged = found
    assert not privileged
    assert first["stdout"] == f"hello {inside}:{inside}\n{inside}\n"
    assert first["ended"] == ["exited", 1, None]  # touch
    assert first["files"] == {"in": "hello "}  # out can't be entered: the workload made it so
    assert again["stdout"] == ""


def test_any_single_user(alone: Caller) -> None:
    """It is the caller outside, whoever it is inside."""
    found = alone.run(
        """
users = (None, 0, 33, "33:44", 70000, "root")
runs = [rf.run(["sh", "-c", "echo $(id -u):$(id -g); echo x > f"], user=u, collect=["f"]) for u in users]
print(json.dumps([[r.stdout.decode().strip(), list(r.files), show(r)["applied"]["user"][2]] for r in runs]))
"""
    )
    ids = ["1000:1000", "0:0", "33:33", "33:44", "70000:70000", "0:0"]
    how = [f"user namespace: id {one.split(':')[0]} is {UID} outside, no other is mapped" for one in ids]
    assert found == [[one, ["f"], said] for one, said in zip(ids, how, strict=True)]


def test_mounts(alone: Caller) -> None:
    folder = alone.home / "data"
    folder.mkdir()
    os.chown(folder, UID, UID)
    (folder / "f").write_text("theirs")
    os.chown(folder / "f", UID, UID)
    found = alone.run(
        """
home = sys.argv[1]
def go(isolation, target, writable):
    mount = rf.Mount(home, target, writable=writable)
    script = f"cat {target}/f; stat -c %u {target}/f; echo new > {target}/g; stat -c %u {target}/g; id -u"
    return show(rf.run(["sh", "-c", script], isolation=isolation, mounts=[mount]))["stdout"].split()
print(json.dumps([go("container", "/data", True), go("container", "/data", False), go("process", home, True),
                  refused(["true"], isolation="process", mounts=[rf.Mount(home, "/data")])]))
""",
        str(folder),
    )
    me = str(UID)
    assert found[0] == ["theirs1000", "1000", "1000"]
    assert (folder / "g").stat().st_uid == UID
    assert found[1] == ["theirs1000", "1000", "1000"]  # g is there already, and stays as it is
    assert found[2] == [f"theirs{me}", me, me]
    assert [rule for rule, _ in found[3]] == ["mounts"]
    read_only = alone.run(
        """
mount = rf.Mount(sys.argv[1], "/data")
print(json.dumps(show(rf.run(["sh", "-c", "echo x > /data/new"], mounts=[mount]))["stderr"]))
""",
        str(folder),
    )
    assert "Read-only file system" in read_only
    assert not (folder / "new").exists()


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_limits_without_a_cgroup_are_refused(alone: Caller, isolation: str) -> None:
    """Nothing is delegated to that user here."""
    found = alone.run(
        """
asked = rf.Limits(memory="64M", pids=5, cpus=0.5)
usable = [one.name for one in rf.host().cgroups.controllers if one.usable]
print(json.dumps([refused(["true"], isolation=sys.argv[1], limits=asked), usable]))
""",
        isolation,
    )
    assert found[1] == []
    assert sorted(rule for rule, _ in found[0]) == ["cpus", "memory", "pids"]


def test_no_network(alone: Caller) -> None:
    found = alone.run(
        """
levels = ("process", "container")
ask = ["python3", "-c", "import socket; socket.socket()"]
said = [show(rf.run(ask, isolation=one, network="none"))["stderr"][-200:] for one in levels]
print(json.dumps([*said, show(rf.run(["cat", "/proc/self/net/dev"]))["stdout"]]))
"""
    )
    assert "Operation not permitted" in found[0] or "Permission denied" in found[0]
    assert found[1] == ""
    assert [line.split(":")[0].strip() for line in found[2].splitlines()[2:]] == ["lo"]


def test_what_a_container_is_of_an_unprivileged_caller(alone: Caller) -> None:
    found = alone.run(
        """
r = show(rf.run(["sh", "-c", "cat /proc/self/status; ls /proc | grep -c '^[0-9]'"]))
print(json.dumps([r["stdout"], r["applied"]]))
"""
    )
    status, rules = found
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    assert {lines[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert lines["NoNewPrivs"].strip() == "1"
    assert lines["Seccomp"].strip() == "2"
    for name in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"):
        assert rules[f"namespace {name}"][2] == "its own, by /proc/self/ns"


def test_namespaces_of_an_unprivileged_caller(alone: Caller) -> None:
    found = alone.run(
        """
code = "import time; print(time.clock_gettime_ns(time.CLOCK_MONOTONIC))"
before = time.monotonic_ns()
ahead = int(rf.run(["python3", "-c", code], namespaces={"monotonic_offset": "1h"}).stdout) - 3600 * 10**9
import subprocess
command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo; exec sleep 60"]
other = subprocess.Popen(command, stdout=subprocess.PIPE)
other.stdout.readline()
theirs = {"user": other.pid, "net": other.pid}
joined = show(rf.run(["sh", "-c", "id -u; echo x > f"], namespaces=theirs, collect=["f"]))
same = [os.stat(f"/proc/{other.pid}/ns/{n}").st_ino for n in ("user", "net")]
def how(n):
    return show(rf.run(["true"], namespaces={n: "host"}))["applied"]["namespace " + n][2]
shared = {n: how(n) for n in ("net", "ipc", "uts", "cgroup", "time")}
wanted = ({"user": "host"}, {"pid": "host"}, {"net": other.pid}, {"mnt": "host"})
no = [refused(["true"], namespaces=n) for n in wanted]
other.kill(); other.wait(); other.stdout.close()
print(json.dumps([before <= ahead <= time.monotonic_ns(), joined, same, shared, no]))
"""
    )
    ahead, joined, inodes, shared, refusals = found
    assert ahead
    assert joined["stdout"] == "0\n"
    assert joined["files"] == {"f": "x\n"}
    assert [joined["applied"][f"namespace {name}"][1] for name in ("user", "net")] == list(map(str, inodes))
    assert set(shared.values()) == {"the host's"}
    assert [[rule for rule, _ in one] for one in refusals] == [["namespaces"]] * 4


# ---- subordinate ids ----

# With these capabilities it gives what it made to others.
GIVES_AWAY = """
keeps = ["chown", "dac_override", "fowner"]
script = ("mkdir -p a/b && echo secret > a/b/f && echo top > t && chown -R 1234:1234 . && chown 77:77 t && chmod 700 a"
          " && stat -c %u:%g a t .")
"""


def test_other_ids_are_subordinate_ones(ranged: Caller) -> None:
    found = ranged.run(
        """
r = rf.run(["sh", "-c", "id -u; cat /proc/self/uid_map /proc/self/gid_map; echo x > f"], user="33:44", collect=["f"])
print(json.dumps(show(r)))
"""
    )
    lines = found["stdout"].splitlines()
    assert lines[0] == "33"
    assert [tuple(map(int, line.split())) for line in lines[1:]] == [
        (0, SUBORDINATE, 33),
        (33, UID, 1),
        (34, SUBORDINATE + 33, COUNT - 34),
        (0, SUBORDINATE + COUNT, 44),
        (44, UID, 1),
        (45, SUBORDINATE + COUNT + 44, COUNT - 45),
    ]
    assert found["files"] == {"f": "x\n"}
    assert found["applied"]["user"][2] == f"user namespace: id 33 is {UID} outside, all others by newuidmap"


def test_what_was_given_away_is_collected_and_removed(ranged: Caller) -> None:
    found = ranged.run(
        GIVES_AWAY
        + """
r = rf.run(["sh", "-c", script], capabilities=keeps, collect=["**"])
from ringfence.levels.state import state
print(json.dumps([show(r), os.listdir(state().run_fd)]))
"""
    )
    assert found[0]["stdout"].split() == ["1234:1234", "77:77", "1234:1234"]
    assert found[0]["files"] == {"a/b/f": "secret\n", "t": "top\n"}
    assert found[1] == []


def test_a_sandbox_that_stays_gives_back_at_its_close(ranged: Caller) -> None:
    found = ranged.run(
        GIVES_AWAY
        + """
from ringfence.levels.state import state
with rf.Sandbox(isolation="container", capabilities=keeps) as box:
    first = box.run(["sh", "-c", script], collect=["**"])
    again = box.run(["sh", "-c", "stat -c %u a && cat a/b/f"])
print(json.dumps([show(first)["files"], again.stdout.decode(), os.listdir(state().run_fd)]))
"""
    )
    # Between its commands everything is as the workload left it.
    assert found == [{}, "1234\nsecret\n", []]


@pytest.mark.parametrize("who", ["caller", "init"])
def test_what_was_given_away_is_gone_after_a_sigkill(ranged: Caller, who: str) -> None:
    code = (
        """
import os, signal, sys, threading, time
import ringfence as rf
"""
        + GIVES_AWAY
        + """
print(os.getpid(), flush=True)
try:
    rf.run(["sh", "-c", script + "; sleep 60"], capabilities=keeps)
except Exception as error:
    print(type(error).__name__, flush=True)
"""
    )
    with ranged.start(code) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        wait_for(lambda: [uid for uid in ranged.files().values() if uid >= SUBORDINATE])
        wait_for(lambda: [one for one in leaks.descendants(pid) if one.name == "sleep"])
        if who == "caller":
            os.kill(pid, signal.SIGKILL)
        else:
            inits = [one for one in leaks.descendants(pid) if one.name == "ringfence-core" and not one.is_launcher]
            inits += [one for one in leaks.descendants(pid) if one.is_launcher]
            [init] = {one.pid for one in inits if one.parent in {two.pid for two in inits}}
            os.kill(init, signal.SIGKILL)
        process.wait(60)
    assert leaks.settled(ranged.left, PATIENCE_S) == []


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_nothing_is_left_after_a_sigkill(alone: Caller, isolation: str) -> None:
    code = '''
import os, sys
import ringfence as rf
print(os.getpid(), flush=True)
deep = """
import os
for _ in range(450):
    os.mkdir("d")
    os.chdir("d")
open("f", "w").close()
"""
script = 'python3 -c "$0"; mkdir -p e/f; echo x > e/f/g; chmod 0 e/f; (setsid sleep 61 &) ; sleep 62'
rf.run(["sh", "-c", script, deep], isolation=sys.argv[1])
'''
    with alone.start(code, isolation) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        wait_for(lambda: len([one for one in leaks.descendants(pid) if one.name == "sleep"]) == 2)
        os.kill(pid, signal.SIGKILL)
        process.wait(60)
    assert leaks.settled(alone.left, PATIENCE_S) == []


def wait_for(look: Any) -> None:
    deadline = time.monotonic() + 30
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_view_is_private(ranged: Caller) -> None:
    """The machine's own files are as they were."""
    assert str(SUBORDINATE) not in Path("/etc/subuid").read_text()
    with pytest.raises(KeyError):
        pwd.getpwuid(UID)
    assert (
        subprocess.run(ranged.command("import os, pwd; assert pwd.getpwuid(os.getuid())"), check=False).returncode == 0
    )
    assert rf.host().privileged
