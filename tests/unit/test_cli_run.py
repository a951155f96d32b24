"""`ringfence run` as a user has it: a process with streams, an exit status, and files."""

from __future__ import annotations

import base64
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli import _collected, output
from ringfence.errors import SpecError
from support import leaks
from support.sandboxes import LEVELS, LOCAL_LEVELS, PROBE, need_level

RINGFENCE = [sys.executable, "-m", "ringfence"]
ALL_BYTES = bytes(range(256))


def run(*words: str | bytes, input: bytes = b"", **more: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*RINGFENCE, "run", *words], input=input, capture_output=True, timeout=60, check=False, **more
    )


def probe(isolation: str, *words: str | bytes, options: tuple[str, ...] = (), **more: Any) -> Any:
    return run("-i", isolation, "--file", f"probe={PROBE}", *options, "--", "./probe", *words, **more)


# ---- exit status ----


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("exit", "0"), 0),
        (("exit", "1"), 1),
        (("exit", "124"), 124),
        (("exit", "255"), 255),
        (("signal", str(signal.SIGTERM)), 143),
        (("signal", str(signal.SIGKILL)), 137),
        (("signal", str(signal.SIGSEGV)), 139),
        (("signal", str(signal.SIGPIPE)), 141),
    ],
)
def test_the_workloads_own_end_is_ours(isolation: str, words: tuple[str, ...], status: int) -> None:
    done = probe(isolation, *words)
    assert (done.returncode, done.stdout, done.stderr) == (status, b"", b"")


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
@pytest.mark.parametrize(
    ("options", "words", "status", "limit"),
    [
        (("--timeout", "300ms"), ("stubborn", "30"), 124, "wall_time"),
        (("--cpu-time", "300ms"), ("spin", "30"), 124, "cpu_time"),
        (("--memory", "16M"), ("hog", "64M"), 137, "memory"),
        (("--output-limit", "10K"), ("emit", "1M"), 137, "output"),
    ],
)
def test_a_limit_is_told_in_one_line(
    isolation: str, options: tuple[str, ...], words: tuple[str, ...], status: int, limit: str
) -> None:
    done = probe(isolation, *words, options=options)
    assert done.returncode == status
    assert done.stderr == f"ringfence: the workload was stopped: it reached its {limit} limit\n".encode()
    if limit == "output":
        assert done.stdout == b"x" * 10240
    if limit == "wall_time":
        assert done.stdout == b"ready\n"  # what it had printed until then


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
@pytest.mark.parametrize(
    ("command", "status", "why"),
    [
        ("no-such-command", 127, "No such file or directory"),
        ("./no-such-file", 127, "No such file or directory"),
        ("./no-interpreter", 127, "No such file or directory"),
        ("/etc", 126, "Permission denied"),
        ("./plain", 126, "Permission denied"),
        ("./not-a-program", 126, "Exec format error"),
    ],
)
def test_not_found_and_not_executable(isolation: str, command: str, status: int, why: str, tmp_path: Path) -> None:
    for name, content, mode in (
        ("no-interpreter", b"#!/no/such\n", 0o755),
        ("plain", b"#!/bin/sh\nexit 0\n", 0o644),
        ("not-a-program", b"\x00\x01\x02", 0o755),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        path.chmod(mode)
    files = [f"--file={path.name}={path}" for path in tmp_path.iterdir()]
    done = run("-i", isolation, *files, "--", command)
    assert (done.returncode, done.stdout) == (status, b"")
    assert done.stderr == f"ringfence: {command}: {why}\n".encode()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--memory", "12Q", "true"], "ringfence: memory: '12Q' has no known unit"),
        (["--memory", "0", "true"], "ringfence: memory must be positive, not 0"),
        (["--timeout", "-1s", "true"], "ringfence: wall_time must be positive, not -1s"),
        (["-i", "vmm", "true"], "ringfence run: --isolation must be one of process, container, vm, auto, not 'vmm'"),
        (["--env", "RINGFENCE_NO_SUCH", "true"], "ringfence run: --env: RINGFENCE_NO_SUCH is not set here"),
        (["--env", "=x", "true"], "ringfence run: --env: must be NAME=VALUE or NAME, not '=x'"),
        (["--file", "x", "true"], "ringfence run: --file: must be NAME=PATH, not 'x'"),
        (["--file", "x=/no/such", "true"], "ringfence run: --file: /no/such: No such file or directory"),
        (["--file", "x=/etc", "true"], "ringfence run: --file: /etc: Is a directory"),
        (["--file", "../x=/etc/hosts", "true"], "ringfence: files: '../x' must not contain '..'"),
        (["--file=x=/etc/hosts", "--file=x=/etc/hosts", "true"], "ringfence run: --file: 'x' is given twice"),
        (["--mount", "/etc", "true"], "ringfence run: --mount: must be SOURCE:TARGET"),
        (["--mount", "/etc:/x:rx", "true"], "ringfence run: --mount: must be SOURCE:TARGET"),
        (["--mount", "/etc:/x:", "true"], "ringfence run: --mount: must be SOURCE:TARGET"),
        (["--mount", "/etc:/proc/x", "true"], "ringfence run: --mount: a mount's target can't be in /proc"),
        (["--mount", "/no/such:/x", "true"], "ringfence: mounts: the source '/no/such' doesn't exist"),
        (["--collect", "../x", "true"], "ringfence: collect: '../x' must not contain '..'"),
        (["--collect-to", "/tmp", "true"], "ringfence run: --collect-to and --force need --collect"),
        (
            ["--collect=x", "--collect-to=/etc/hosts", "true"],
            "ringfence run: --collect-to: '/etc/hosts' is no directory",
        ),
        (["--image", "/no/such", "true"], "ringfence: image: '/no/such' is neither 'host' nor a folder"),
        ([""], "ringfence: argv[0] must not be empty"),
    ],
)
def test_a_refusal_is_one_line_and_125(words: list[str], sentence: str) -> None:
    # Its stdin never ends: all of this is said before it is read.
    reader, writer = os.pipe()
    try:
        done = subprocess.run([*RINGFENCE, "run", *words], stdin=reader, capture_output=True, timeout=20, check=False)
    finally:
        os.close(reader)
        os.close(writer)
    assert (done.returncode, done.stdout) == (125, b"")
    assert done.stderr.decode().startswith(sentence)
    assert done.stderr.count(b"\n") == 1


def test_every_unmet_rule_is_in_the_line_with_its_help() -> None:
    done = run("-i", "process", "--hostname", "x", "--image", "/usr", "true")
    assert done.returncode == 125
    assert done.stderr == (
        b"ringfence: process isolation can't enforce here: hostname: a process has the host's name"
        b" (use isolation='container' or 'vm'); image: a process sees the host's files"
        b" (use isolation='container' or 'vm')\n"
    )


# ---- streams ----


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_streams_are_bytes_and_kept_apart(isolation: str) -> None:
    done = probe(isolation, "cat", input=ALL_BYTES * 1000)
    assert (done.returncode, done.stdout, done.stderr) == (0, ALL_BYTES * 1000, b"")
    done = probe(isolation, "both", "2")
    assert (done.stdout, done.stderr) == (b"out 0\nout 1\n", b"err 0\nerr 1\n")


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_words_reach_the_command_as_they_are(isolation: str) -> None:
    words = [b"", b"a b", b"--json", b"--", b"\xff\xfe", b"new\nline", "ü".encode()]
    assert probe(isolation, "argv", *words).stdout == b"".join(word + b"\0" for word in words)


def test_without_no_stdin_a_pipe_is_read_to_its_end_and_with_it_not_at_all() -> None:
    reader, writer = os.pipe()  # never closed while the command runs
    try:
        done = subprocess.run(
            [*RINGFENCE, "run", "-i", "process", "--no-stdin", "--", "cat"],
            stdin=reader,
            capture_output=True,
            timeout=20,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, b"")
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run([*RINGFENCE, "run", "-i", "process", "--", "cat"], stdin=reader, timeout=2, check=False)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_terminal_is_no_stdin() -> None:
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [*RINGFENCE, "run", "-i", "process", "--", "cat"],
            stdin=theirs,
            capture_output=True,
            timeout=20,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def shell(script: str) -> subprocess.CompletedProcess[bytes]:
    """A script in which $RUN is `ringfence run`."""
    return subprocess.run(
        ["sh", "-c", f'RUN="{sys.executable} -m ringfence run -i process"; {script}'],
        capture_output=True,
        timeout=30,
        check=False,
    )


def test_streams_that_the_caller_closed() -> None:
    done = shell("$RUN -- cat <&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = shell("$RUN -- sh -c 'echo out; exit 3' >&-")
    assert (done.returncode, done.stderr) == (125, b"ringfence: stdout: Bad file descriptor\n")
    done = shell("$RUN -- sh -c 'exit 3' >&-")
    assert (done.returncode, done.stderr) == (3, b"")
    done = shell("$RUN -- sh -c 'echo out; echo err >&2; exit 3' 2>&-")
    assert (done.returncode, done.stdout) == (3, b"out\n")
    done = shell("$RUN -- sh -c 'ls -l /proc/self/fd; exit 3' <&- 2>&-")
    assert done.returncode == 3


def test_a_stdout_that_nobody_reads_or_that_is_full() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*RINGFENCE, "run", "-i", "process", "--", "echo", "x"],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=20,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
    done = shell("$RUN -- echo x > /dev/full")
    assert (done.returncode, done.stderr) == (125, b"ringfence: stdout: No space left on device\n")


# ---- environment, mounts, tables ----


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_the_environment_is_what_was_given(isolation: str) -> None:
    done = probe(
        isolation,
        "env",
        options=("-e", "A=1=2", "-e", "PASSED", "-e", "EMPTY="),
        env={**os.environ, "PASSED": "through \udcff", "SECRET": "kept"},
    )
    found = dict(one.split(b"=", 1) for one in done.stdout.split(b"\0") if one)
    assert found.keys() == {b"PATH", b"HOME", b"LANG", b"TERM", b"A", b"PASSED", b"EMPTY"}
    assert (found[b"A"], found[b"PASSED"], found[b"EMPTY"]) == (b"1=2", b"through \xff", b"")


def test_a_mount_is_read_only_unless_it_says_rw(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "given").write_text("here")
    for mode, expected in (("", b"EROFS open\n"), (":ro", b"EROFS open\n"), (":rw", b"ok\n")):
        mount = f"--mount={tmp_path}:/data{mode}"
        assert probe("container", "read", "/data/given", options=(mount,)).stdout == b"here"
        assert probe("container", "try-create", "/data/new", options=(mount,)).stdout == expected


def test_limits_and_names_reach_the_sandbox() -> None:
    done = run(
        *("-i", "container", "-v", "--json", "--memory=64M", "--cpus=0.5", "--pids=20", "--timeout=20s"),
        *("--cpu-time=10", "--output-limit=1M", "--hostname=inside", "--user=7:8", "--network=none", "true"),
    )
    assert done.returncode == 0, done.stderr
    asked = {
        one["rule"]: one["requested"] for one in json.loads(done.stdout)["applied"] if one["requested"] is not None
    }
    assert asked["memory"] == 64 << 20
    assert asked["cpus"] == 0.5
    assert asked["pids"] == 20
    assert asked["wall_time"] == 20 * 10**9
    assert asked["cpu_time"] == 10 * 10**9
    assert asked["output"] == 1 << 20
    assert asked["hostname"] == "inside"
    assert asked["network"] == "none"
    table = done.stderr.decode().splitlines()
    assert table[0].split() == ["rule", "asked", "for", "in", "force", "by"]
    rows = {line.split()[0]: line.split()[1:3] for line in table[1:]}
    assert rows["memory"] == ["64M", "64M"]
    assert rows["wall_time"] == ["20s", "20s"]
    assert rows["hostname"] == ["inside", "inside"]


# ---- JSON ----


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_json_is_the_whole_result_and_nothing_else(isolation: str) -> None:
    done = run("-i", isolation, "--json", "--", "sh", "-c", r"printf '\377\0'; echo err >&2; exit 5")
    assert (done.returncode, done.stderr) == (5, b"")
    assert done.stdout.count(b"\n") == 1
    found = json.loads(done.stdout)
    assert (found["isolation"], found["exit_code"], found["termination_reason"]) == (isolation, 5, "exited")
    assert base64.b64decode(found["stdout"]["base64"]) == b"\xff\0"
    assert found["stderr"] == "err\n"
    assert {one["rule"] for one in found["applied"]} >= {"user", "seccomp", "network"}


def test_json_keeps_the_exit_status_of_a_limit() -> None:
    done = run("-i", "process", "--json", "--timeout", "200ms", "--", "sleep", "30")
    assert done.returncode == 124
    found = json.loads(done.stdout)
    assert (found["termination_reason"], found["exit_code"]) == ("wall_time", None)
    assert done.stderr == b"ringfence: the workload was stopped: it reached its wall_time limit\n"


def test_json_of_what_never_started_is_nothing() -> None:
    done = run("--json", "--", "no-such-command")
    assert (done.returncode, done.stdout) == (127, b"")


# ---- collected files ----

MAKES = ("--", "sh", "-c", "mkdir -p out/deep; echo 1 >out/a.csv; echo 2 >out/deep/b.csv; echo 3 >out/c.txt")


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_collect(isolation: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    done = run("-i", isolation, "-c", "out/**/*.csv", "--collect-to", str(target), *MAKES)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found == {"out/a.csv": "1\n", "out/deep/b.csv": "2\n"}


def test_collect_goes_to_the_current_directory_and_with_json_only_into_the_json(tmp_path: Path) -> None:
    done = run("-i", "process", "--json", "-c", "out/*.csv", *MAKES, cwd=tmp_path)
    assert json.loads(done.stdout)["files"] == {"out/a.csv": "1\n"}
    assert os.listdir(tmp_path) == []
    done = run("-i", "process", "-c", "out/*.csv", *MAKES, cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "out" / "a.csv").read_text() == "1\n"


def test_collect_replaces_nothing_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "b.csv").write_text("mine")
    options = ("-i", "process", "-c", "out/**", "--collect-to", str(tmp_path))
    done = run(*options, *MAKES)
    assert done.returncode == 125
    assert b"out/deep/b.csv is there already: nothing was collected (--force replaces it)" in done.stderr
    assert (tmp_path / "out" / "deep" / "b.csv").read_text() == "mine"
    assert not (tmp_path / "out" / "a.csv").exists()
    done = run(*options, "--force", *MAKES)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "out" / "deep" / "b.csv").read_text() == "2\n"


def test_collect_follows_no_symlink(tmp_path: Path) -> None:
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    target.mkdir()
    (outside / "file").write_text("mine")
    (target / "link").symlink_to(outside / "file")
    (target / "folder").symlink_to(outside)
    with pytest.raises(_collected.NotSaved, match="is there already"):
        _collected.save({"link": b"new"}, str(target), replace=False)
    for replace in (False, True):
        with pytest.raises(_collected.NotSaved, match="a symlink or a file is where a folder should be"):
            _collected.save({"folder/new": b"new"}, str(target), replace=replace)
    _collected.save({"link": b"new"}, str(target), replace=True)
    assert not (target / "link").is_symlink()
    assert (target / "link").read_bytes() == b"new"
    assert (outside / "file").read_text() == "mine"
    assert os.listdir(outside) == ["file"]
    assert sorted(os.listdir(target)) == ["folder", "link"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "a//b"])
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(SpecError):
        _collected.save({name: b"x"}, str(tmp_path / "in"), replace=True)
    assert os.listdir(tmp_path) == ["in"]
    assert os.listdir(tmp_path / "in") == []


def test_a_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(_collected.NotSaved, match="a is a folder"):
        _collected.save({"a": b"x"}, str(tmp_path), replace=True)


# ---- Ctrl-C ----


@pytest.mark.parametrize("isolation", LEVELS)
def test_ctrl_c_ends_the_sandbox(isolation: str) -> None:
    need_level(isolation)
    runs = {"vm": "qemu-system-x86"}.get(isolation, "sleep")
    script = "trap '' INT TERM; sleep 600; exit 1"
    process = subprocess.Popen(
        [*RINGFENCE, "run", "-i", isolation, "--no-stdin", "--", "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        wait_for(lambda: any(one.name == runs for one in leaks.descendants(process.pid)))
        running = {one.key for one in leaks.descendants(process.pid)}
        assert leaks.run_folders_of(process.pid)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=15)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, stdout, stderr) == (130, b"", b"")
    wait_for(lambda: not running & {one.key for one in leaks.processes().values()})
    assert not leaks.run_folders_of(process.pid)
    assert not leaks.cgroups_of(process.pid)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- the same at the vm level ----


def test_a_virtual_machine_ends_like_the_others() -> None:
    need_level("vm")
    done = probe("vm", "cat", input=ALL_BYTES)
    assert (done.returncode, done.stdout, done.stderr) == (0, ALL_BYTES, b"")
    # The workload's own failure, not that of the VMM, which is started by the same path.
    done = run("-i", "vm", "--", "no-such-command")
    assert (done.returncode, done.stderr) == (127, b"ringfence: no-such-command: No such file or directory\n")
    done = run("-i", "vm", "--timeout", "300ms", "--", "sleep", "60")
    assert done.returncode == 124
    assert done.stderr == b"ringfence: the workload was stopped: it reached its wall_time limit\n"


# ---- what is written ----


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (1000, "1000"),
        (1024, "1K"),
        (64 << 20, "64M"),
        (3 << 29, "1536M"),
        (2**40, "1T"),
        (2**30 + 1, "1073741825"),
    ],
)
def test_size(count: int, shown: str) -> None:
    assert output.size(count) == shown


@pytest.mark.parametrize(
    ("ns", "shown"),
    [
        (0, "0ns"),
        (999, "999ns"),
        (1500, "1.5us"),
        (81_234_567, "81.2ms"),
        (1_500_000_000, "1.5s"),
        (3600 * 10**9, "3600s"),
    ],
)
def test_duration(ns: int, shown: str) -> None:
    assert output.duration(ns) == shown


def test_columns_are_aligned_and_harmless() -> None:
    text = output.columns([("a", "bb"), ("ccc", "\x1b[2J\n", "x"), ()], indent=1)
    assert text == " a    bb\n ccc  \\x1b[2J\\n  x\n"
