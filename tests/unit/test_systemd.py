"""A scope from systemd, over D-Bus: against a peer that speaks the wire format on a real socket and fails on demand.

The real one is in tests/levels/test_cgroup_v2_resources.py.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cgroup_parts import FakeKernel
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import KernelError
from ringfence.linux import cgroups
from ringfence.linux.cgroups import Limits, base, home, systemd, v2
from ringfence.linux.dbus import Bus, BusError, Variant, marshal, unmarshal
from support.sandboxes import SOURCES, need_root

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4


def message(
    kind: int, fields: list[tuple[int, Variant]], signature: str = "", values: Any = (), order: str = "<"
) -> bytes:
    """A whole message, as the specification has it. Only little-endian ones can have values."""
    body = bytes(marshal(signature, values))
    if signature:
        fields = [*fields, (8, Variant("g", signature))]
    head = bytes(marshal("yyyyuua(yv)", [ord("l" if order == "<" else "B"), kind, 0, 1, len(body), 7, fields]))
    if order == ">":
        assert not signature
        assert all(one.signature == "u" for _, one in fields)
        head = struct.pack(">cBBBIII", b"B", kind, 0, 1, 0, 7, 8 * len(fields))
        head += b"".join(struct.pack(">BB2sI", code, 1, b"u\0", one.value) for code, one in fields)
    return head + bytes(-len(head) % 8) + body


class Peer:
    """One connection at a time, as systemd's own socket takes it. answers: by member, what to say, or bytes to send."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.greeting = b"OK 0123456789abcdef0123456789abcdef\r\n"
        self.answers: dict[str, Any] = {"Get": ("v", [Variant("s", "/manager")])}
        self.calls: list[tuple[str, str, tuple[Any, ...]]] = []
        self.auth = b""
        self.first = b""  # sent before an answer
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as file:
                try:
                    self._talk(connection, file)
                except OSError:
                    continue

    def _talk(self, connection: socket.socket, file: Any) -> None:
        self.auth = file.readline()
        connection.sendall(self.greeting)
        if file.readline() != b"BEGIN\r\n":
            return
        while head := file.read(16):
            _, _, _, _, body_length, serial, fields_length = struct.unpack("<BBBBIII", head)
            rest = file.read(fields_length + -fields_length % 8)
            *_, fields = unmarshal("yyyyuua(yv)", head + rest)
            found = dict(fields)
            signature = found.get(8, "")
            body = unmarshal(signature, file.read(body_length))
            self.calls.append((found[3], signature, body))
            answer = self.answers.get(found[3])
            if isinstance(answer, bytes):
                connection.sendall(answer)
                return
            reply = (5, Variant("u", serial))
            if isinstance(answer, Exception):
                fields = [reply, (4, Variant("s", "org.freedesktop.DBus.Error.AccessDenied"))]
                connection.sendall(self.first + message(ERROR, fields, "s", [str(answer)]))
            elif answer is not None:
                connection.sendall(self.first + message(RETURN, [reply], *answer))


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    found = Peer(str(tmp_path / "private"))
    monkeypatch.setattr(systemd, "_sockets", lambda: [(found.path, False)])
    yield found
    found.close()


class TestValues:
    @pytest.mark.parametrize(
        ("signature", "values", "data"),
        [
            ("u", [1], "01000000"),
            ("yu", [1, 2], "0100000002000000"),
            ("s", ["ab"], "02000000616200"),
            ("g", ["au"], "02617500"),
            ("b", [True], "01000000"),
            ("v", [Variant("u", 5)], "0175000005000000"),
            ("au", [[1, 2]], "080000000100000002000000"),
            # Padding to an element's alignment is there even where there is none, and isn't counted.
            ("a(sv)", [[]], "0000000000000000"),
            ("a(su)", [[("a", 1)]], "0c00000000000000" + "010000006100" + "0000" + "01000000"),
        ],
    )
    def test_as_the_specification_has_them(self, signature: str, values: list[Any], data: str) -> None:
        assert marshal(signature, values).hex() == data
        expected = tuple(one.value if isinstance(one, Variant) else one for one in values)
        assert unmarshal(signature, bytes.fromhex(data)) == expected

    @given(st.binary(max_size=64), st.sampled_from(["a(yv)", "ssa(sv)a(sa(sv))", "v", "aaas", "a{sv}", "(yyy)"]))
    def test_any_bytes_are_values_or_an_error(self, data: bytes, signature: str) -> None:
        try:
            unmarshal(signature, data)
        except BusError:
            pass

    @pytest.mark.parametrize("signature", ["(", "a", "(a)", "z", "a" * 40 + "u"])
    def test_a_signature_that_is_none(self, signature: str) -> None:
        with pytest.raises(BusError):
            unmarshal(signature, bytes(64))


class TestBus:
    def test_a_call_and_its_answer(self, peer: Peer) -> None:
        peer.answers["Add"] = ("u", [5])
        # A signal that comes before it isn't the answer, nor is one in the other byte order to another call.
        peer.first = message(SIGNAL, [(3, Variant("s", "JobNew"))], "u", [1])
        peer.first += message(RETURN, [(5, Variant("u", 99))], order=">")
        with Bus(peer.path, hello=False) as bus:
            assert bus.call("a.b", "/a", "a.c", "Add", "uu", (2, 3)) == (5,)
            assert bus.call("a.b", "/a", "a.c", "Add", "s", ("x",)) == (5,)
        assert peer.calls == [("Add", "uu", (2, 3)), ("Add", "s", ("x",))]
        assert peer.auth == b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n"

    def test_a_bus_is_greeted(self, peer: Peer) -> None:
        peer.answers["Hello"] = ("s", [":1.5"])
        with Bus(peer.path, hello=True):
            pass
        assert peer.calls == [("Hello", "", ())]

    @pytest.mark.parametrize(
        ("greeting", "answer", "text"),
        [
            (b"REJECTED EXTERNAL\r\n", None, "doesn't take this user: REJECTED EXTERNAL"),
            (b"x" * 3000, None, "doesn't take|hung up|timed out"),
            (None, b"", "it hung up"),
            (None, b"GET / HTTP/1.1\r\n\r\n", "isn't D-Bus"),
            (None, struct.pack("<BBBBIII", ord("l"), RETURN, 0, 1, 1 << 30, 1, 8), "more than was asked for"),
            (None, struct.pack("<BBBBIII", ord("l"), RETURN, 0, 1, 0, 1, 8) + b"\xff" * 8, "signature|passes the end"),
            (None, ValueError("not you"), r"org\.freedesktop\.DBus\.Error\.AccessDenied: not you"),
        ],
    )
    def test_what_goes_wrong_is_told(self, peer: Peer, greeting: bytes | None, answer: Any, text: str) -> None:
        peer.greeting = greeting or peer.greeting
        peer.answers["Get"] = answer
        begin = time.monotonic()
        with pytest.raises((BusError, TimeoutError), match=text), Bus(peer.path, hello=False, timeout_s=1) as bus:
            bus.call("a.b", "/a", "a.c", "Get")
        assert time.monotonic() - begin < 10


def machine(fake: FakeKernel, root: Path, controllers: str = "cpu cpuset io memory pids") -> Path:
    """A manager's part of the tree, and this process in a cgroup that isn't delegated."""
    fake.populate(root, "cpu cpuset io memory pids", "cpu cpuset io memory pids", pids="1\n", kind="")
    fake.populate(root / "manager", controllers, controllers)
    fake.populate(root / "session", controllers, pids=f"{os.getpid()}\n1\n")
    return root / "session"


class TestScope:
    def find(self, root: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> cgroups.Layout:
        monkeypatch.setattr(home, "_BOOTED", str(root))
        inside = str(own).removeprefix(str(root))
        return base.read_layout(f"1 1 0:1 / {root} rw - cgroup2 cgroup2 rw\n", f"0::{inside}\n")

    def test_it_is_asked_only_when_one_is_needed(
        self, peer: Peer, fake: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = machine(fake, tmp_path)
        found = self.find(tmp_path, own, monkeypatch)
        assert found.by_systemd
        assert all(one.usable for one in found.controllers)
        assert found.home == f"in a scope that systemd is asked for by {peer.path}, when a limit is first needed"
        helper = os.getppid()
        scope = tmp_path / "manager/app.slice/x.scope"
        units = []

        def cgroup_of(pid: int) -> bytes:
            assert pid == helper
            _, _, (unit, *_) = peer.calls[-1]
            path = scope.with_name(unit)
            if not path.exists():
                fake.populate(path, "memory pids", pids=f"{helper}\n")
                units.append(unit)
            return f"/manager/app.slice/{unit}".encode()

        def move(from_fd: int, to_fd: int) -> None:
            source, target = (Path(os.readlink(f"/proc/self/fd/{fd}")) for fd in (from_fd, to_fd))
            (target / "cgroup.procs").write_text((source / "cgroup.procs").read_text())
            (source / "cgroup.procs").write_text("")

        peer.answers["StartTransientUnit"] = ("o", ["/org/freedesktop/systemd1/job/5"])
        monkeypatch.setattr(systemd, "_cgroup_of", cgroup_of)
        monkeypatch.setattr(v2, "_move", move)
        with cgroups.open_manager(found, helper=helper) as manager:
            asks = [manager.asks]
            assert {member for member, *_ in peer.calls} == {"Get"}
            cgroup = manager.create(Limits(pids=5))
            assert [*asks, manager.asks] == [True, False]
            member, signature, (unit, mode, properties, more) = peer.calls[-1]
            assert (member, signature, mode, more) == ("StartTransientUnit", "ssa(sv)a(sa(sv))", "fail", [])
            assert unit == units[0]
            asked = dict(properties)
            assert (asked["PIDs"], asked["Delegate"]) == ([helper], True)
            folder = tmp_path / "manager/app.slice" / unit
            (made,) = manager.made()
            assert Path(os.readlink(f"/proc/self/fd/{made.parent_fd}")) == folder
            assert (folder / "ringfence-self/cgroup.procs").read_text() == f"{helper}\n"
            # What the scope really has counts, not what the manager could have handed on.
            with pytest.raises(KernelError, match="the cpu controller isn't in") as caught:
                manager.create(Limits(cpus=1))
            assert caught.value.errno == errno.ENOTSUP
            manager.create(Limits(pids=6)).remove()
            assert len(units) == 1
            cgroup.remove()
        assert (own / "cgroup.procs").read_text() == f"{os.getpid()}\n1\n"

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (ValueError("interactive authentication required"), "systemd refused a scope: .*AccessDenied"),
            (b"", "systemd refused a scope: it hung up"),
            (("o", ["/job/1"]), "systemd took the scope, but .* is still in /session"),
        ],
    )
    def test_a_refusal_is_an_error(
        self, peer: Peer, fake: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, text: str
    ) -> None:
        found = self.find(tmp_path, machine(fake, tmp_path), monkeypatch)
        peer.answers["StartTransientUnit"] = answer
        monkeypatch.setattr(systemd, "_cgroup_of", lambda _: b"/session")
        monkeypatch.setattr(systemd, "_MOVE_S", 0.05)
        with (
            cgroups.open_manager(found, helper=os.getpid()) as manager,
            pytest.raises(KernelError, match=text),
        ):
            manager.create(Limits(pids=5))

    def test_without_a_helper_nothing_is_moved(
        self, peer: Peer, fake: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = self.find(tmp_path, machine(fake, tmp_path), monkeypatch)
        with cgroups.open_manager(found) as manager, pytest.raises(KernelError, match="only systemd could"):
            manager.create(Limits(pids=5))
        assert {member for member, *_ in peer.calls} == {"Get"}

    def test_no_answer_is_a_reason(
        self, peer: Peer, fake: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine(fake, tmp_path)
        # Neither its own cgroup nor the one above is delegated.
        fake.populate(tmp_path / "a", "memory", pids="1\n")
        fake.populate(tmp_path / "a/b", "memory", pids="1\n")
        peer.answers["Get"] = ValueError("no")
        found = self.find(tmp_path, tmp_path / "a/b", monkeypatch)
        assert not found.by_systemd
        reason = found.controller("memory").reason
        assert reason.startswith("this process's own cgroup holds 1 other processes, and systemd doesn't answer on ")
        assert "systemd-run" in found.controller("memory").help
        peer.answers["Get"] = ("v", [Variant("s", "/nowhere")])
        assert "can't be seen here" in self.find(tmp_path, tmp_path / "a/b", monkeypatch).controller("memory").reason
        monkeypatch.setattr(systemd, "_sockets", list)
        assert "no systemd manager" in self.find(tmp_path, tmp_path / "a/b", monkeypatch).controller("memory").reason

    def test_where_systemd_does_not_run_nobody_is_asked(
        self, peer: Peer, fake: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = machine(fake, tmp_path)
        monkeypatch.setattr(home, "_BOOTED", str(tmp_path / "no"))
        found = base.read_layout(f"1 1 0:1 / {tmp_path} rw - cgroup2 cgroup2 rw\n", f"0::/{own.name}\n")
        assert not found.by_systemd
        assert peer.calls == []


def test_whom_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert systemd._sockets() == [("/run/systemd/private", False)]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/5")
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:abstract=/x;unix:path=/tmp/bus,guid=1;tcp:host=h")
    assert systemd._sockets() == [
        ("/run/user/5/systemd/private", False),
        ("/tmp/bus", True),
        ("/run/user/5/bus", True),
    ]


class TestAPeerThatMeansNoGood:
    def test_an_array_of_what_takes_no_room(self) -> None:
        for signature in ("a()", "a(())", "a((()()))"):
            with pytest.raises(BusError, match="takes no room"):
                unmarshal(signature, struct.pack("<II", 8, 0) + bytes(8))

    def test_a_trickle_doesn_t_go_on_for_ever(self, tmp_path: Path) -> None:
        path = str(tmp_path / "bus")
        ended = threading.Event()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()

            def trickle() -> None:
                one, _ = listener.accept()
                with one:
                    try:
                        while not ended.wait(0.02):
                            one.send(b"x")
                    except OSError:
                        pass

            thread = threading.Thread(target=trickle, daemon=True)
            thread.start()
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                Bus(path, hello=False, timeout_s=0.5)
            assert time.monotonic() - began < 5
            ended.set()
            thread.join()

    def test_a_peer_of_another_pid_namespace(self, tmp_path: Path) -> None:
        """For which the numbers of our processes are those of others."""
        need_root()
        code = "import sys; from ringfence.linux.dbus import Bus; Bus(sys.argv[1], hello=False)"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "bus"))
            listener.listen()
            done = subprocess.run(
                ["unshare", "--pid", "--fork", sys.executable, "-c", code, str(tmp_path / "bus")],
                env={**os.environ, "PYTHONPATH": str(SOURCES)},
                capture_output=True,
                text=True,
                check=False,
            )
        assert "is of another PID namespace" in done.stderr


def test_a_process_that_proc_does_not_show_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With hidepid others' processes aren't there for us: they would be moved into a leaf of ours."""
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            assert home.is_ours(other.pid)

            def hidden(path: str, mode: str = "r") -> None:
                raise FileNotFoundError(errno.ENOENT, "hidden", path)

            monkeypatch.setattr(home, "open", hidden, raising=False)
            assert not home.is_ours(other.pid)
        finally:
            other.kill()
    assert home.is_ours(other.pid)
