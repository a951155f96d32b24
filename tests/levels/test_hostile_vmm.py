"""Guests and VMMs that lie, flood, fall silent or die: a Result or a typed error, in bounded time and memory.

The part is played by a program in QEMU's place and QEMU's jail (support/vmm.py); what of it a real guest can do is done
by real ones in test_hostile_guest.py.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.levels import drive
from ringfence.levels.vm import agent, sandbox, start
from support.sandboxes import ended, need_cgroup, need_level
from support.vmm import FakeQemu

SECOND_NS = 10**9
# What a call may take that is not waiting for a limit: Python's start in the jail, kills, a busy machine.
SOON_S = 10
GROWTH_KIB = 48 << 10


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds themselves, in a size that a test can wait for."""
    need_level("vm")
    monkeypatch.setattr(start.Guest, "_find", lambda guest: None)  # a boot, and no template of such a guest
    monkeypatch.setattr(start, "_BOOT_LIMIT_NS", 2 * SECOND_NS)
    monkeypatch.setattr(sandbox, "_START_LIMIT_NS", 2 * SECOND_NS)
    monkeypatch.setattr(sandbox, "TRANSFER_LIMIT_NS", 2 * SECOND_NS)
    monkeypatch.setattr(agent, "TRANSFER_LIMIT_NS", 2 * SECOND_NS)
    monkeypatch.setattr(agent, "_SILENCE_NS", SECOND_NS)
    monkeypatch.setattr(drive, "_SILENCE_NS", SECOND_NS // 4)
    monkeypatch.setattr(drive, "_ANSWER_NS", SECOND_NS)
    monkeypatch.setattr(drive, "_GRACE_NS", SECOND_NS // 2)
    monkeypatch.setattr(drive, "_MOST_OTHERS", 1 << 15)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    return FakeQemu(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def in_time_and_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SOON_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_KIB


def run(**options: Any) -> rf.Result:
    return rf.run(["x"], isolation="vm", **options)


def test_the_control(fake: FakeQemu) -> None:
    fake("id = start(); send(STDOUT, b'out', id); exited(id, 3); hang()")
    result = run()
    assert ended(result) == ("exited", 3, None)
    assert result.stdout == b"out"


# ---- before there is a guest ----


def test_a_qemu_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_QEMU", "/no/such/qemu")
    with pytest.raises(rf.Unavailable, match=r"there is no program /no/such/qemu .*ringfence setup"):
        run()


def test_a_path_that_is_relative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_QEMU", "qemu")
    with pytest.raises(rf.SpecError, match="absolute"):
        run()


@pytest.mark.parametrize(
    ("version", "machines", "words"),
    [
        ("4.2.1", "microvm q35", r"is QEMU 4\.2\.1, and at least 5\.2 is needed"),
        ("", "microvm q35", "doesn't tell a version"),
        ("9.0.0", "pc isapc", "without the machines microvm and q35"),
    ],
)
def test_a_qemu_that_does_not_serve(fake: FakeQemu, version: str, machines: str, words: str) -> None:
    fake("hang()", version=version, machines=machines)
    with pytest.raises(rf.Unavailable, match=words):
        run()


def test_a_qemu_that_cannot_even_tell_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "qemu"
    monkeypatch.setenv("RINGFENCE_QEMU", str(path))
    for script, words in (
        ("#!/bin/sh\necho libfoo.so.1 is missing >&2\nexit 127\n", "exited with 127: libfoo.so.1 is missing"),
        ("#!/bin/sh\nkill -SEGV $$\n", "was ended by signal 11"),
        ("#!/no/such/interpreter\n", "can't be run: No such file"),
    ):
        path.write_text(script)
        path.chmod(0o755)
        with pytest.raises(rf.Unavailable, match=words):
            run()


def test_a_machine_that_is_asked_for_by_name(fake: FakeQemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_MACHINE", "pc")
    fake("hang()")
    with pytest.raises(rf.SpecError, match="microvm or q35"):
        run()
    monkeypatch.setenv("RINGFENCE_MACHINE", "microvm")
    fake("hang()", machines="q35 pc")
    with pytest.raises(rf.Unavailable, match="has no machine microvm"):
        run()


# Each: what the program does in place of a boot, the error, its words.
BEFORE_A_GUEST: dict[str, tuple[str, type[Exception], str]] = {
    "an option that it doesn't know": (
        "sys.exit('qemu: -foo: invalid option')",
        rf.Unavailable,
        r"exited with status 1: qemu: -foo: invalid option",
    ),
    "a crash": ("os.kill(os.getpid(), signal.SIGSEGV)", rf.Unavailable, "was ended by signal 11"),
    "an end that looks well": ("pass", rf.ProtocolError, "did not boot.*exited with status 0"),
    "a crash that closes the channel first": ("channel.close(); time.sleep(0.2); sys.exit('oh')", rf.Unavailable, "oh"),
    "terminal codes in its words": (r"sys.exit('\x1b[2J\x07bell')", rf.Unavailable, r"status 1: \[2J bell"),
    "no boot": ("hang()", rf.ProtocolError, "did not boot"),
    "no boot, and the channel closed": ("channel.close(); hang()", rf.ProtocolError, "did not boot.*runs on"),
    "words that are no frame": ("channel.sendall(b'x' * 16); hang()", rf.ProtocolError, "no ringfence frame"),
    "another version": ("channel.sendall(header(READY, 0, version=2)); hang()", rf.ProtocolError, "version 2"),
    "a frame of 4 GiB": ("channel.sendall(header(READY, 2**32 - 1)); hang()", rf.ProtocolError, "bounds"),
    "descriptors": ("channel.sendall(header(READY, 0, nfds=1)); hang()", rf.ProtocolError, "did not come"),
    "half a frame": ("channel.sendall(header(READY, 1 << 20) + b'x' * 100); hang()", rf.ProtocolError, "did not boot"),
    "a frame in single bytes": (
        "channel.sendall(header(READY, 1 << 20))\nwhile True: channel.sendall(b'x'); time.sleep(0.01)",
        rf.ProtocolError,
        "did not boot",
    ),
    "another frame first": ("send(STDOUT, b'x'); hang()", rf.ProtocolError, "did not boot: it sent a frame of type 36"),
    "a frame of no known type": ("send(99); hang()", rf.ProtocolError, "frame of type 99"),
    "an error": (
        "send(ERROR, attribute(1, struct.pack('<I', 2)) + attribute(2, b'guest\\0')); hang()",
        rf.StartError,
        "ENOENT",
    ),
    "READY, and nothing more": ("send(READY); hang()", rf.ProtocolError, "did not start in time"),
    "READY for ever": ("while True: send(READY)", rf.ProtocolError, "frame of type 33"),
    "READY with what nobody knows": (
        "send(READY); until(PLAN); send(READY, attribute(9, b'x')); hang()",
        rf.ProtocolError,
        "unknown attribute",
    ),
    "a plan that fails": (
        "send(READY); until(PLAN)\n"
        "send(ERROR, attribute(1, struct.pack('<I', 28)) + attribute(2, b'mount\\0')); hang()",
        rf.StartError,
        "ENOSPC",
    ),
    "an end between plan and start": (
        "boot(); until(EXEC); sys.exit('gone')",
        rf.ProtocolError,
        "exited with status 1: gone",
    ),
}


@pytest.mark.parametrize("case", BEFORE_A_GUEST)
def test_before_a_command_runs(case: str, fake: FakeQemu) -> None:
    part, error, words = BEFORE_A_GUEST[case]
    fake(part)
    with pytest.raises(error, match=words):
        run()


# ---- while a command runs ----

WHILE_IT_RUNS: dict[str, tuple[str, str]] = {
    "STARTED twice": ("id = start(); send(STARTED, b'', id); hang()", "started twice"),
    "STARTED of another": ("start(); send(STARTED, b'', 77); hang()", "frame of type 34"),
    "EXITED of another": ("id = start(); exited(id + 1); hang()", "frame of type 38"),
    "EXITED that says nothing": ("id = start(); send(EXITED, b'', id); hang()", "neither an exit status"),
    "EXITED with a status of 4 billion": ("id = start(); exited(id, 2**32 - 1); hang()", "neither an exit status"),
    "an error": ("start(); send(ERROR, b''); hang()", "an error came while"),
    "READY for ever": ("start()\nwhile True: send(READY)", "frame of type 33"),
    "DONE of nothing": ("start(); send(DONE); hang()", "wasn't sent"),
    "answers that nobody asked for": ("id = start()\nwhile True: send(PONG, b'', id)", "more frames|of type 48"),
    "credit beyond all bounds": ("id = start(); send(CREDIT, b'\\xff' * 4, id); hang()", "more credit"),
    "credit of nothing": ("id = start(); send(CREDIT, bytes(4), id); hang()", "no number"),
    "output of another": ("id = start(); send(STDOUT, b'x', id + 1); hang()", "output of no command"),
    "output with nothing in it": ("id = start()\nwhile True: send(STDOUT, b'', id)", "after its end"),
    "output after its end": ("id = start(); send(STDERR, b'', id); send(STDERR, b'x', id); hang()", "after its end"),
    "a list of denials": ("start(); send(LISTENER, b'x' * 999); hang()", "frame of type 42"),
    "sizes without end": (
        "start(); send(SIZES, b''.join(attribute(1, bytes(16) + b'%d\\0' % n) for n in range(9999))); hang()",
        "more file systems",
    ),
    "changes without end": (
        "start(); one = struct.pack('<BBQ', 1, 102, 1) + b'/x\\0'\n"
        "while True: send(LAYER_END, b''.join(attribute(2, one) for _ in range(9999)))",
        "more changes",
    ),
    "a change of a path of 8 KiB": (
        "start(); send(LAYER_END, attribute(2, struct.pack('<BBQ', 1, 102, 1) + b'/x' * 4096 + b'\\0')); hang()",
        "a path that is none",
    ),
    "a length that is a lie": ("channel.sendall(frame(READY)[:12] + b'\\1\\0\\1\\0'); hang()", "no ringfence frame"),
    "silence": ("start(); hang()", "stopped answering"),
    "silence, and the channel closed": ("start(); channel.close(); hang()", "while it ran: QEMU runs on"),
    "an end": ("start(); sys.exit('out of order')", "exited with status 1: out of order"),
    "a crash": ("start(); os.kill(os.getpid(), signal.SIGKILL)", "was ended by signal 9"),
}


@pytest.mark.parametrize("case", WHILE_IT_RUNS)
def test_while_a_command_runs(case: str, fake: FakeQemu) -> None:
    part, words = WHILE_IT_RUNS[case]
    fake(part)
    with pytest.raises(rf.ProtocolError, match=words):
        run(limits=rf.Limits(wall_time=8))


def test_a_guest_that_does_not_read(fake: FakeQemu) -> None:
    """Neither its stdin nor whether it lives: what waits for it is bounded, and so is the wait."""
    fake("start(); hang()")
    with pytest.raises(rf.ProtocolError, match="stopped answering"):
        run(input=bytes(32 << 20))


def test_a_guest_that_does_not_read_its_files(fake: FakeQemu) -> None:
    fake("boot(); hang()")
    with pytest.raises(rf.ProtocolError, match="did not start in time"):
        run(files={"big": bytes(8 << 20)})


def test_one_that_answers_lives(fake: FakeQemu) -> None:
    """The control of the silence above: a command that says nothing for longer than that."""
    fake("""
id = start()
for _ in range(8):
    ping, _ = until(PING)
    send(PONG, b"", ping)
exited(id)
""")
    result = run()
    assert ended(result) == ("exited", 0, None)
    assert (result.usage.wall_ns or 0) > 1.5 * SECOND_NS


def test_a_flood_of_output(fake: FakeQemu) -> None:
    fake("id = start(); chunk = frame(STDOUT, b'x' * (1 << 20), id)\nwhile True: channel.sendall(chunk)")
    result = run(limits=rf.Limits(output="4M"))
    assert ended(result)[0] == "output"
    assert len(result.stdout) == 4 << 20


def test_a_flood_of_complaints_on_stderr_holds_nobody_up(fake: FakeQemu) -> None:
    fake("id = start(); os.write(2, b'a complaint\\n' * 100000); exited(id, 4); hang()")
    assert ended(run(limits=rf.Limits(wall_time=8))) == ("exited", 4, None)


def test_one_that_ignores_its_kill(fake: FakeQemu) -> None:
    fake("id = start(); send(STDOUT, b'until then', id)\nwhile True: receive()")
    result = run(limits=rf.Limits(wall_time=0.3))
    assert ended(result) == ("wall_time", None, None)
    assert result.stdout == b"until then"


def test_one_that_talks_on(fake: FakeQemu) -> None:
    fake("id = start()\nwhile True: send(CREDIT, b'x', id + 1); time.sleep(0.001)")
    assert ended(run(limits=rf.Limits(wall_time=0.5)))[0] == "wall_time"


def test_a_vmm_that_takes_all_memory(fake: FakeQemu, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit of its own cgroup, around the guest's: the reason is memory, and what it printed is kept."""
    need_cgroup("memory")
    monkeypatch.setattr(drive, "_ANSWER_NS", 60 * SECOND_NS)
    fake(
        "id = start(); send(STDOUT, b'so far', id); time.sleep(0.1); hog = []\nwhile True: hog.append(b'x' * (8 << 20))"
    )
    result = run(limits=rf.Limits(memory="16M", wall_time=9))
    assert ended(result) == ("memory", None, None)
    assert result.stdout == b"so far"


# ---- afterwards ----

AFTERWARDS: dict[str, tuple[str, type[Exception], str]] = {
    "no answer": ("hang()", rf.ProtocolError, "did not hand over"),
    "an end": ("sys.exit('bye')", rf.ProtocolError, "exited with status 1: bye"),
    "a list without end": (
        "entry = b'f' + struct.pack('<IQ', 0o644, 1) + b'a\\0'\nwhile True: send(ENTRIES, entry * 60000, id)",
        rf.ProtocolError,
        "more files",
    ),
    "names of a megabyte": (
        "send(ENTRIES, b'f' + struct.pack('<IQ', 0o644, 1) + b'a' * 999999 + b'\\0', id); hang()",
        rf.ProtocolError,
        "outside",
    ),
    "a list that ends within an entry": (
        "send(ENTRIES, b'f' + bytes(20) + b'a', id); hang()",
        rf.ProtocolError,
        "entry",
    ),
    "an entry of no kind": (
        "send(ENTRIES, b'?' + struct.pack('<IQ', 0o644, 1) + b'a\\0', id); hang()",
        rf.ProtocolError,
        "no kind",
    ),
    "nothing, again and again": ("while True: send(ENTRIES, b'', id)", rf.ProtocolError, "nothing in them"),
    "answers that nobody asked for": ("while True: send(PONG)", rf.ProtocolError, "did not hand over"),
    "an entry now and then": (
        "while True: send(ENTRIES, b'f' + struct.pack('<IQ', 0o644, 1) + b'a\\0', id); time.sleep(0.05)",
        rf.ProtocolError,
        "did not hand over",
    ),
    "a file without end": (
        "send(ENTRIES, b'f' + struct.pack('<IQ', 0o644, 1) + b'a\\0', id); send(DONE, b'', id); id, _ = until(READ)\n"
        "chunk = frame(DATA, bytes(1 << 20), id)\nwhile True: channel.sendall(chunk)",
        rf.SpecError,
        "are more than",
    ),
    "a file of 16 EiB": (
        "send(ENTRIES, b'f' + struct.pack('<IQ', 0o644, 2**64 - 1) + b'a\\0', id); send(DONE, b'', id); hang()",
        rf.SpecError,
        "are more than",
    ),
    **{
        f"the name {name}": (
            f"send(ENTRIES, b'f' + struct.pack('<IQ', 0o644, 1) + b'{name}\\0', id); hang()",
            rf.ProtocolError,
            "outside",
        )
        for name in ("/etc/passwd", "../x", "a/../../x", "", "./a", "a//b", "a/")
    },
}


@pytest.mark.parametrize("case", AFTERWARDS)
def test_when_files_are_collected(case: str, fake: FakeQemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringfence.api._COLLECT_BYTES", 8 << 20)
    part, error, words = AFTERWARDS[case]
    fake("id = start(); exited(id); id, _ = until(LIST)\n" + part)
    with pytest.raises(error, match=words):
        run(collect=["*"])


def test_files_of_an_honest_one(fake: FakeQemu) -> None:
    fake("""
id = start(); exited(id); id, _ = until(LIST)
send(ENTRIES, b"f" + struct.pack("<IQ", 0o644, 3) + b"a\\0", id); send(DONE, b"", id)
id, _ = until(READ); send(DATA, b"abc", id); send(DONE, b"", id); hang()
""")
    assert run(collect=["*"]).files == {"a": b"abc"}
