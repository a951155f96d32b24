"""stdin, stdout and stderr: every byte, nothing and much, in both directions."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest

import ringfence as rf
from support.sandboxes import EXITED_0, LEVELS, ended, output, python_json, run_probe

ALL_BYTES = bytes(range(256))
MUCH = 50 << 20
PATTERN = bytes(range(251))


def fnv1a(data: bytes) -> str:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


@pytest.mark.parametrize("isolation", LEVELS)
def test_all_byte_values_come_back(isolation: str) -> None:
    # Longer than a pipe and no multiple of a page, so that order over several reads shows too.
    data = ALL_BYTES * 1023 + b"\n\0\r\n\xff"
    assert output(run_probe(isolation, "cat", input=data)) == data


@pytest.mark.parametrize("given", [None, b""], ids=["not given", "empty"])
@pytest.mark.parametrize("isolation", LEVELS)
def test_no_stdin_is_an_empty_one(isolation: str, given: bytes | None) -> None:
    """Also where the caller's own stdin has data and stays open: it is never inherited."""
    reader, writer = os.pipe()
    ours = os.dup(0)
    os.write(writer, b"the caller's own")
    os.dup2(reader, 0)
    try:
        printed = output(run_probe(isolation, "count", input=given))
    finally:
        os.dup2(ours, 0)
        for fd in (ours, reader, writer):
            os.close(fd)
    assert printed == f"0 {fnv1a(b'')}\n".encode()


@pytest.mark.parametrize("isolation", LEVELS)
def test_end_of_stdin_is_told(isolation: str) -> None:
    """`count` prints only once it has read the end."""
    assert output(run_probe(isolation, "count", input=ALL_BYTES)) == f"256 {fnv1a(ALL_BYTES)}\n".encode()


@pytest.mark.parametrize("isolation", LEVELS)
def test_50_megabytes_in(isolation: str) -> None:
    data = (PATTERN * (MUCH // len(PATTERN) + 1))[:MUCH]
    script = "sha256sum | cut -d' ' -f1"
    result = rf.run(["sh", "-c", script], isolation=isolation, input=data)
    assert output(result).decode().strip() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("isolation", LEVELS)
def test_50_megabytes_out(isolation: str) -> None:
    wanted = (PATTERN * (MUCH // len(PATTERN) + 1))[:MUCH]
    result = run_probe(isolation, "emit", str(MUCH), "pattern")
    assert ended(result) == EXITED_0
    assert len(result.stdout) == MUCH
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(wanted).digest()
    assert not result.truncated


@pytest.mark.parametrize("isolation", LEVELS)
def test_much_both_ways_at_once_does_not_lock_up(isolation: str) -> None:
    data = os.urandom(8 << 20)
    assert run_probe(isolation, "cat", input=data).stdout == data


@pytest.mark.parametrize("isolation", LEVELS)
def test_stdout_and_stderr_are_kept_apart(isolation: str) -> None:
    result = run_probe(isolation, "both", "500")
    assert ended(result) == EXITED_0
    assert result.stdout == b"".join(b"out %d\n" % i for i in range(500))
    assert result.stderr == b"".join(b"err %d\n" % i for i in range(500))


@pytest.mark.parametrize("isolation", LEVELS)
def test_closing_stdout_and_stderr_is_not_the_end(isolation: str) -> None:
    result = run_probe(isolation, "closeout", "0.7")
    assert ended(result) == ("exited", 7, None)
    assert result.usage.wall_ns is not None
    assert result.usage.wall_ns >= 600_000_000


@pytest.mark.parametrize("isolation", LEVELS)
def test_stdin_that_nobody_reads(isolation: str) -> None:
    assert ended(run_probe(isolation, "nostdin", input=b"x" * (4 << 20))) == EXITED_0


@pytest.mark.parametrize("isolation", LEVELS)
def test_stdin_that_is_closed_half_way(isolation: str) -> None:
    result = rf.run(["head", "-c", "10"], isolation=isolation, input=b"0123456789" * (1 << 20))
    assert output(result) == b"0123456789"


@pytest.mark.parametrize("isolation", LEVELS)
def test_text(isolation: str) -> None:
    """UTF-8 both ways; bytes that aren't come back as os.fsdecode has them."""
    script = "cat; printf '\\377' ; echo é >&2"
    result = rf.run(["sh", "-c", script], isolation=isolation, input="grüße\n", text=True)
    assert ended(result) == EXITED_0
    assert (result.stdout, result.stderr) == ("grüße\n\udcff", "é\n")


GIGABYTE = """
import json, resource, sys
import ringfence as rf
from support.sandboxes import run_probe
run_probe(sys.argv[1], "exit", "0")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = run_probe(sys.argv[1], "emit", "1G", "pattern", limits=rf.Limits(output="10M", wall_time=120))
print(json.dumps({
    "grown": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
    "reason": result.termination_reason, "exit_code": result.exit_code, "truncated": result.truncated,
    "length": len(result.stdout), "right": result.stdout == (bytes(range(251)) * 50000)[:10 << 20],
}))
"""


@pytest.mark.parametrize("isolation", LEVELS)
def test_a_gigabyte_of_output_is_stopped_at_the_limit(isolation: str) -> None:
    """In a process of its own, whose largest size shows that the caller kept no more than the limit."""
    seen: dict[str, Any] = python_json(GIGABYTE, isolation)
    grown = seen.pop("grown")
    assert seen == {
        "reason": "output",
        "exit_code": None,
        "truncated": True,
        "length": 10 << 20,
        "right": True,
    }
    # The 10 MiB kept in pieces and then as one, what was on its way, and the comparison's own 12 MB.
    assert grown < 64 << 20


@pytest.mark.parametrize("isolation", LEVELS)
def test_output_of_exactly_the_limit_is_whole(isolation: str) -> None:
    limit = 1 << 20
    result = run_probe(isolation, "emit", str(limit), limits=rf.Limits(output=limit))
    assert (ended(result), len(result.stdout), result.truncated) == (EXITED_0, limit, False)


@pytest.mark.parametrize("isolation", ["process", "container"])
def test_one_byte_over_the_limit_is_over(isolation: str) -> None:
    limit = 1 << 20
    result = run_probe(isolation, "emit", str(limit + 1), limits=rf.Limits(output=limit))
    assert result.termination_reason == "output"
    assert (len(result.stdout), result.truncated) == (limit, True)
