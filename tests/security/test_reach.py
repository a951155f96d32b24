"""What of the host a process may reach: `readable`, `writable`, `allow` and `publish`, by Landlock and seccomp."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.api import check_spec, run_spec
from ringfence.levels import reach
from ringfence.linux import landlock
from ringfence.spec import Spec
from support import unprivileged
from support.sandboxes import applied, need_root, output, python_json

FILES = r"""
import errno, json, os, sys
base = sys.argv[1]
def attempt(act):
    try:
        act()
        return "ok"
    except OSError as error:
        return errno.errorcode[error.errno]
def make(path):
    with open(path, "x") as file:
        file.write("x")
    os.unlink(path)
def stay(path):
    fd = os.open(path, os.O_WRONLY)
    os.close(fd)
def rename(a, b):
    os.rename(a, b)
    os.rename(b, a)
found = {
    "read given": attempt(lambda: open(base + "/read/file").read()),
    "list given": attempt(lambda: os.listdir(base + "/read")),
    "write given": attempt(lambda: stay(base + "/read/file")),
    "truncate given": attempt(lambda: os.truncate(base + "/read/file", 1)),
    "make in given": attempt(lambda: make(base + "/read/new")),
    "read writable": attempt(lambda: open(base + "/write/file").read()),
    "write writable": attempt(lambda: stay(base + "/write/file")),
    "make in writable": attempt(lambda: make(base + "/write/new")),
    "write one file": attempt(lambda: stay(base + "/one")),
    "read other": attempt(lambda: open(base + "/other/file").read()),
    "list other": attempt(lambda: os.listdir(base + "/other")),
    "write other": attempt(lambda: stay(base + "/other/file")),
    "truncate other": attempt(lambda: os.truncate(base + "/other/file", 1)),
    "make in other": attempt(lambda: make(base + "/other/new")),
    "move to other": attempt(lambda: rename(base + "/write/file", base + "/other/moved")),
    "link to other": attempt(lambda: rename(base + "/other/file", base + "/write/moved")),
    "read through a symlink": attempt(lambda: open(base + "/write/link").read()),
    "read /etc": attempt(lambda: open("/etc/passwd").read()),
    "list /": attempt(lambda: os.listdir("/")),
    "read /proc": attempt(lambda: open("/proc/self/status").read()),
    "make at work": attempt(lambda: make("new")),
    "write null": attempt(lambda: stay("/dev/null")),
}
print(json.dumps(found))
"""
ALLOWED = {
    *("read given", "list given", "read writable", "write writable", "make in writable", "write one file"),
    *("make at work", "write null"),
}
# A rename over the edge is judged as the removal and the making that it is (EACCES), and a link's or a move's
# target as a place where nothing may be put (EXDEV would be a kernel without REFER).
CALLERS = ("root", "unprivileged")

RUN = r"""
import json, sys
import ringfence as rf
from ringfence.api import run_spec
from ringfence.spec import Spec
arguments = json.loads(sys.argv[1])
network = arguments.pop("network", None)
if network:
    arguments["network"] = rf.Network("host", **{**network, "publish": [tuple(one) for one in network["publish"]]})
abi = arguments.pop("abi", None)
host = rf.host() if abi is None else rf.host().replace(landlock_abi=abi)
try:
    result = run_spec(Spec.make(isolation="process", **arguments), on=host)
    print(json.dumps({"out": result.stdout.decode(), "err": result.stderr.decode(), "status": result.exit_code,
                      "applied": {one.rule: one.effective for one in result.applied}}))
except rf.CannotEnforce as error:
    print(json.dumps({"unmet": [[one.rule, one.reason, one.help] for one in error.unmet]}))
"""


def run_as(who: str, **arguments: Any) -> Any:
    """A run by root or by a caller without privileges: its output, or its unmet rules."""
    need_root()
    start = unprivileged.python_json if who == "unprivileged" else python_json
    return start(RUN, json.dumps(arguments))


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that everybody may use, so that only Landlock stands in between."""
    need_root()
    folder = Path(unprivileged.home().parent) / f"reach-{os.urandom(4).hex()}"
    folder.mkdir()
    for name in ("read", "write", "other"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("content")
    (folder / "one").write_text("content")
    (folder / "write" / "link").symlink_to("../other/file")
    for one in (folder, *folder.rglob("*")):
        os.chown(one, unprivileged.UID, unprivileged.UID, follow_symlinks=False)
        if not one.is_symlink():
            one.chmod(0o777 if one.is_dir() else 0o666)
    return folder


def unconfined(code: str, *args: str) -> dict[str, str]:
    done = subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True, cwd="/tmp")
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("who", CALLERS)
def test_only_what_is_readable_and_writable(base: Path, who: str) -> None:
    control = unconfined(FILES, str(base))
    assert set(control.values()) == {"ok"}
    found = run_as(
        who,
        argv=["/usr/bin/python3", "-S", "-c", FILES, str(base)],
        readable=["/usr", str(base / "read")],
        writable=[str(base / "write"), str(base / "one")],
    )
    assert found["err"] == ""
    ends = json.loads(found["out"])
    assert set(ends) == set(control)
    assert {name: end for name, end in ends.items() if end != "ok"} == dict.fromkeys(set(control) - ALLOWED, "EACCES")
    assert found["applied"]["readable"] == [str(base / "read"), "/usr"]
    assert found["applied"]["writable"] == [str(base / "one"), str(base / "write")]
    assert found["applied"]["no_new_privs"] is True  # what is read back needs no path of its own


@pytest.mark.parametrize("who", CALLERS)
def test_writable_alone_leaves_the_rest_readable(base: Path, who: str) -> None:
    argv = ["/usr/bin/python3", "-S", "-c", FILES, str(base)]
    ends = json.loads(run_as(who, argv=argv, writable=[str(base / "write")])["out"])
    denied = {name for name, end in ends.items() if end == "EACCES"}
    assert denied == {
        *("write given", "truncate given", "make in given", "write one file", "write other", "truncate other"),
        *("make in other", "move to other", "link to other"),
    }
    assert {end for name, end in ends.items() if name not in denied} == {"ok"}


def test_a_script_and_a_program_of_ones_own(base: Path) -> None:
    files = {"script": rf.File(b"#!/usr/bin/python3 -S\nprint(6 * 7)\n", 0o755)}
    assert output(rf.run(["./script"], isolation="process", files=files, readable=["/usr"])) == b"42\n"
    with pytest.raises(rf.CannotEnforce) as caught:
        rf.run(["./script"], isolation="process", files=files, readable=["/opt"])
    (unmet,) = caught.value.unmet
    assert "/usr/bin/python3" in unmet.reason


@pytest.mark.parametrize(
    ("command", "readable", "needs"),
    [
        ("sh", "/opt", "/usr/bin/sh"),
        ("/bin/sh", "/usr/share", "/bin/sh"),
        ("sh", "/usr/bin", "/lib64/ld-linux"),  # its loader lies elsewhere
    ],
)
def test_a_command_that_lies_outside_is_refused(command: str, readable: str, needs: str) -> None:
    with pytest.raises(rf.CannotEnforce) as caught:
        rf.run([command, "-c", "true"], isolation="process", readable=[readable])
    (unmet,) = caught.value.unmet
    assert unmet.rule == "readable"
    assert needs in unmet.reason
    assert "/usr" in unmet.help


def test_what_its_uid_may_not_use_is_refused(tmp_path: Path) -> None:
    """Landlock only takes away: a path is worth what the workload's user may do there."""
    need_root()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    inside = closed / "open"
    inside.mkdir()
    inside.chmod(0o777)
    for path in (closed, inside):  # the second one can't be reached
        with pytest.raises(rf.CannotEnforce) as caught:
            rf.run(["true"], isolation="process", writable=[path], readable=["/usr", path])
        assert sorted(one.rule for one in caught.value.unmet) == ["readable", "writable"]
        assert "user=" in caught.value.unmet[0].help
    os.chown(closed, 4321, 4321)
    for above in (tmp_path, *tmp_path.parents):
        if above != Path("/tmp") and not above.stat().st_mode & 0o001:
            above.chmod(0o711)
    result = rf.run(["sh", "-c", f"echo x > {closed}/made"], isolation="process", user=4321, writable=[closed])
    assert (result.exit_code, result.stderr) == (0, b"")
    assert (closed / "made").stat().st_uid == 4321


def test_a_path_that_is_not_there_is_bad_input() -> None:
    for isolation in ("process", "container", "vm"):
        with pytest.raises(rf.SpecError, match="doesn't exist"):
            rf.run(["true"], isolation=isolation, readable=["/no-such-path"])


@pytest.mark.parametrize("isolation", ["container", "vm"])
def test_a_tree_of_its_own_has_mounts_instead(isolation: str) -> None:
    with pytest.raises(rf.CannotEnforce) as caught:
        rf.run(["true"], isolation=isolation, readable=["/usr"], writable=["/tmp"])
    assert {one.rule for one in caught.value.unmet} == {"readable", "writable"}
    assert all("mounts=" in one.help for one in caught.value.unmet)


# ---- what is opened is what counts ----


def test_another_folder_under_the_same_name_is_not_meant(base: Path) -> None:
    """The rule is about what was opened; a name that changes hands afterwards changes nothing."""
    script = f"""
    echo x > {base}/write/first && echo first
    mv_done() {{ [ -e go ]; }}
    echo ready > ready
    while ! mv_done; do sleep 0.01; done
    echo x > {base}/write/second || echo denied
    """
    import threading
    import time

    results: list[rf.Result] = []

    def run() -> None:
        results.append(rf.run(["sh", "-c", script], isolation="process", writable=[base / "write"]))

    def work_directories() -> list[Path]:
        return list(Path(os.environ.get("TMPDIR", "/tmp")).glob(f"ringfence-{os.getpid()}-*/w*/ready"))

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 20
    while not (ready := work_directories()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (base / "write").rename(base / "away")
    (base / "other").rename(base / "write")
    (ready[0].parent / "go").touch()
    thread.join()
    assert results[0].stdout == b"first\ndenied\n"
    assert (base / "away" / "first").exists()
    assert not (base / "write" / "second").exists()


def test_a_path_that_changes_after_it_was_judged(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapped between the judgement and the opening for one that the uid may not use: judged again, and refused."""
    need_root()
    (base / "locked").mkdir(mode=0o700)
    spec = Spec.make(["true"], isolation="process", writable=[base / "write"])
    level, host = check_spec(spec)
    (base / "write").rename(base / "away")
    (base / "write").symlink_to("locked")
    with pytest.raises(rf.CannotEnforce), level.open(spec, host):
        pass
    (base / "write").unlink()
    with pytest.raises(rf.SpecError, match="can't be opened"), level.open(spec, host):
        pass


# ---- older kernels ----


def refused_at(abi: int, **options: Any) -> list[str]:
    host = rf.host().replace(landlock_abi=abi)
    try:
        check_spec(Spec.make(["true"], isolation="process", **options), host)
    except rf.CannotEnforce as error:
        for one in error.unmet:
            assert one.reason
            assert one.help
        return sorted({one.rule for one in error.unmet})
    return []


def test_what_an_older_landlock_cannot_deny_is_refused() -> None:
    writable = {"writable": ["/tmp"]}
    network = {"network": rf.Network("host", allow=["*:443"])}
    mount = {"mounts": [rf.Mount("/usr", "/usr")]}
    device = {"readable": ["/usr", "/dev"]}
    assert refused_at(0, **writable, **network, **mount, readable=["/usr"]) == [
        "allow",
        "mounts",
        "readable",
        "writable",
    ]
    for abi in range(1, 8):
        assert refused_at(abi, readable=["/usr"]) == []
        assert refused_at(abi, **writable) == (["writable"] if abi < 3 else [])  # truncate(2)
        assert refused_at(abi, **mount) == (["mounts"] if abi < 3 else [])
        assert refused_at(abi, **network) == (["allow"] if abi < 4 else [])  # TCP
        assert refused_at(abi, **device) == (["readable"] if abi < 5 else [])  # ioctl(2)
        assert refused_at(abi, readable=["/"]) == (["readable"] if abi < 5 else [])
        assert refused_at(abi, readable=["/usr"], writable=["/dev/null"]) == (["writable"] if abi < 5 else [])


UNPRIVILEGED_LIMITS = r"""
import json
import ringfence as rf
from ringfence.api import check_spec
from ringfence.spec import Spec
found = {}
for abi in (5, 6):
    try:
        check_spec(Spec.make(["true"], isolation="process", limits=rf.Limits(wall_time=1)),
                   rf.host().replace(landlock_abi=abi))
        found[abi] = []
    except rf.CannotEnforce as error:
        found[abi] = [one.rule for one in error.unmet]
print(json.dumps(found))
"""


def test_without_scoped_signals_a_time_limit_is_refused_to_the_unprivileged() -> None:
    need_root()
    assert unprivileged.python_json(UNPRIVILEGED_LIMITS) == {"5": ["wall_time"], "6": []}


@pytest.mark.parametrize("abi", [3, 4, 5, 6])
def test_an_older_landlock_denies_what_was_not_refused(base: Path, abi: int) -> None:
    """The ruleset is made for the ABI that the host is said to have: the fields of a newer one aren't handed in."""
    if abi > landlock.abi():
        pytest.skip(f"this kernel has Landlock ABI {landlock.abi()} only")
    argv = ["/usr/bin/python3", "-S", "-c", FILES, str(base)]
    found = run_as("unprivileged", argv=argv, readable=["/usr", str(base / "read")], abi=abi)
    ends = json.loads(found["out"])
    granted = {name for name, end in ends.items() if end == "ok"}
    assert granted == {"read given", "list given", "make at work", "write null"}


# ---- the network ----

SOCKETS = r"""
import errno, json, socket, sys
open_port, closed_port, bind_port, other_port = map(int, sys.argv[1:5])
def attempt(act):
    try:
        act()
        return "ok"
    except OSError as error:
        return errno.errorcode[error.errno]
def connect(port, family=socket.AF_INET, protocol=0):
    with socket.socket(family, socket.SOCK_STREAM, protocol) as one:
        one.settimeout(5)
        one.connect(("127.0.0.1" if family == socket.AF_INET else "::ffff:127.0.0.1", port))
def bind(port, listen=False):
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", port))
        if listen:
            one.listen()
def fast_open(how, port):
    with socket.socket() as one:
        if how == "sendto":
            one.sendto(b"x", 0x20000000, ("127.0.0.1", port))
        elif how == "sendmsg":
            one.sendmsg([b"x"], [], 0x20000000, ("127.0.0.1", port))
        else:
            one.setsockopt(socket.IPPROTO_TCP, 30, 1)  # TCP_FASTOPEN_CONNECT: connect(2) is still asked
            one.connect(("127.0.0.1", port))
            one.send(b"x")
def unbound_listen():
    with socket.socket() as one:
        one.listen()
def ulp():
    with socket.socket() as one:
        one.setsockopt(socket.IPPROTO_TCP, 31, b"no-such-ulp")
def make(*what):
    return lambda: socket.socket(*what).close()
print(json.dumps({
    "connect allowed": attempt(lambda: connect(open_port)),
    "connect allowed by IPv6": attempt(lambda: connect(open_port, socket.AF_INET6)),
    "connect other": attempt(lambda: connect(closed_port)),
    "connect other by IPv6": attempt(lambda: connect(closed_port, socket.AF_INET6)),
    "connect other by MPTCP": attempt(lambda: connect(closed_port, socket.AF_INET, 262)),
    "fast open by sendto": attempt(lambda: fast_open("sendto", closed_port)),
    "fast open by sendmsg": attempt(lambda: fast_open("sendmsg", closed_port)),
    "fast open by option": attempt(lambda: fast_open("option", closed_port)),
    "bind published": attempt(lambda: bind(bind_port, listen=True)),
    "bind other": attempt(lambda: bind(other_port)),
    "bind any": attempt(lambda: bind(0)),
    "listen unbound": attempt(unbound_listen),
    "TCP_ULP": attempt(ulp),
    "udp": attempt(make(socket.AF_INET, socket.SOCK_DGRAM)),
    "udp6": attempt(make(socket.AF_INET6, socket.SOCK_DGRAM)),
    "raw": attempt(make(socket.AF_INET, socket.SOCK_RAW, 1)),
    "unix": attempt(make(socket.AF_UNIX, socket.SOCK_STREAM)),
    "unix datagrams": attempt(make(socket.AF_UNIX, socket.SOCK_DGRAM)),
    "netlink": attempt(make(socket.AF_NETLINK, socket.SOCK_RAW)),
    "pair": attempt(lambda: [one.close() for one in socket.socketpair()]),
}))
"""
# Unconfined: a ULP that isn't there. Nothing else may fail.
CONTROL_ENDS = {"TCP_ULP": "ENOENT"}
NARROWED = {
    "connect allowed": "ok",
    "connect allowed by IPv6": "ok",
    "connect other": "EACCES",
    "connect other by IPv6": "EACCES",
    "connect other by MPTCP": "EPROTONOSUPPORT",
    "fast open by sendto": "EPERM",
    "fast open by sendmsg": "EPERM",
    "fast open by option": "EACCES",
    "bind published": "EACCES",
    "bind other": "EACCES",
    "bind any": "EACCES",
    "listen unbound": "EPERM",
    "TCP_ULP": "EPERM",
    "udp": "EPERM",
    "udp6": "EPERM",
    "raw": "EPERM",
    "unix": "EPERM",
    "unix datagrams": "EPERM",
    "netlink": "EPERM",
    "pair": "ok",
}


@pytest.fixture
def ports() -> Iterator[list[str]]:
    """One that is allowed, one that isn't, one to listen at, one that nobody may."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        with socket.socket() as free, socket.socket() as other:
            free.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            spare = [str(free.getsockname()[1]), str(other.getsockname()[1])]
        yield [str(one.getsockname()[1]), str(two.getsockname()[1]), *spare]


@pytest.fixture
def control(ports: list[str]) -> set[str]:
    """The attempts that this machine's kernel would let through; each other one is told."""
    found = unconfined(SOCKETS, *ports)
    lacking = {name: end for name, end in found.items() if end != CONTROL_ENDS.get(name, "ok")}
    # A kernel without MPTCP, or a caller without CAP_NET_RAW.
    assert set(lacking) <= {"connect other by MPTCP", "raw"}
    return set(found) - set(lacking)


@pytest.mark.parametrize("who", CALLERS)
def test_only_the_ports_that_are_allowed(ports: list[str], control: set[str], who: str) -> None:
    network = {"allow": [f"*:{ports[0]}"], "publish": []}
    found = run_as(who, argv=["/usr/bin/python3", "-S", "-c", SOCKETS, *ports], network=network)
    ends = json.loads(found["out"])
    assert {name: ends[name] for name in control} == {name: NARROWED[name] for name in control}
    assert found["applied"]["allow"] == [f"*:{ports[0]}"]
    assert found["applied"]["network"] == "host"


@pytest.mark.parametrize("who", CALLERS)
def test_every_port_may_be_connected_and_one_be_bound(ports: list[str], control: set[str], who: str) -> None:
    network = {"allow": ["*:*"], "publish": [[int(ports[2]), int(ports[2])]]}
    found = run_as(who, argv=["/usr/bin/python3", "-S", "-c", SOCKETS, *ports], network=network)
    wanted = {
        **NARROWED,
        # Landlock has no rule for listen(2): told in SECURITY.md.
        **dict.fromkeys(("connect other", "connect other by IPv6", "fast open by option"), "ok"),
        **dict.fromkeys(("bind published", "listen unbound"), "ok"),
    }
    ends = json.loads(found["out"])
    assert {name: ends[name] for name in control} == {name: wanted[name] for name in control}
    assert found["applied"]["publish"] == [f"{ports[2]}:{ports[2]}"]


def test_nothing_may_be_connected_where_nothing_is_named(ports: list[str]) -> None:
    network = rf.Network("host", allow=[])
    code = f"import socket; socket.create_connection(('127.0.0.1', {ports[0]}))"
    result = rf.run(["/usr/bin/python3", "-S", "-c", code], isolation="process", network=network)
    assert b"PermissionError" in result.stderr


def test_what_ports_alone_cannot_say_is_refused() -> None:
    def refused(network: rf.Network) -> list[tuple[str, str]]:
        with pytest.raises(rf.CannotEnforce) as caught:
            rf.run(["true"], isolation="process", network=network)
        return [(one.rule, one.reason) for one in caught.value.unmet]

    for host in ("example.com", "127.0.0.1", "[::1]", "10.0.0.0/8"):
        ((rule, reason),) = refused(rf.Network("host", allow=["*:443", f"{host}:443"]))
        assert rule == "allow"
        assert "ports" in reason
    assert [rule for rule, _ in refused(rf.Network("host", bandwidth="1M"))] == ["bandwidth"]
    assert [rule for rule, _ in refused(rf.Network("host", publish={8080: 80}))] == ["publish"]
    assert "network" in [rule for rule, _ in refused(rf.Network("nat"))]
    ((rule, reason),) = refused(rf.Network("host", publish={80: 80}))
    assert rule == "publish"
    assert "CAP_NET_BIND_SERVICE" in reason


def test_the_default_makes_no_ruleset_of_its_own() -> None:
    """What nobody asked for costs nothing: the berth's ruleset serves."""
    spec = Spec.make(["true"], isolation="process")
    assert not reach.is_narrowed(spec)
    rows = applied(run_spec(spec))
    assert "readable" not in rows
    assert rows["files"].effective == "the host read-only, the work directory writable"
