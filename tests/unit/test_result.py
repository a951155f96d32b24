"""The result: its own sentence, its exit status for a shell, its JSON, and check()."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from ringfence.errors import WorkloadFailed
from ringfence.result import Applied, Result, TerminationReason, Usage


def ended(reason: str, **fields: Any) -> Result:
    return Result(isolation="container", termination_reason=reason, **fields)


@pytest.mark.parametrize(
    ("result", "status", "sentence"),
    [
        (ended("exited", exit_code=0), 0, "the workload exited with status 0"),
        (ended("exited", exit_code=255), 255, "the workload exited with status 255"),
        (ended("signaled", signal=11), 139, "the workload was killed by SIGSEGV (signal 11)"),
        (ended("signaled", signal=40), 168, "the workload was killed by signal 40"),
        (ended("wall_time"), 124, "the workload was stopped: it reached its wall_time limit"),
        (ended("cpu_time", signal=9), 124, "the workload was stopped: it reached its cpu_time limit"),
        (ended("memory", exit_code=1), 137, "the workload was stopped: it reached its memory limit"),
        (ended("output"), 137, "the workload was stopped: it reached its output limit"),
        (ended("disk"), 137, "the workload was stopped: it reached its disk limit"),
        (ended("killed"), 137, "the workload was killed by the caller"),
    ],
)
def test_shell_status_and_sentence(result: Result, status: int, sentence: str) -> None:
    assert result.shell_status == status
    assert result.describe() == sentence


def test_every_reason_has_a_status_and_is_a_plain_str() -> None:
    for reason in TerminationReason:
        result = ended(reason, exit_code=1, signal=9)
        assert 0 < result.shell_status < 256
        assert result.termination_reason == str(reason)
    with pytest.raises(ValueError, match="melted"):
        ended("melted")


def test_check_passes_only_exit_status_0() -> None:
    good = ended("exited", exit_code=0)
    assert good.check() is good
    assert good.ok
    for bad in (ended("exited", exit_code=1), ended("signaled", signal=9), ended("memory", exit_code=0)):
        with pytest.raises(WorkloadFailed) as caught:
            bad.check()
        assert caught.value.result is bad
        assert not bad.ok


def test_json_has_every_field_and_keeps_binary_data() -> None:
    result = Result(
        isolation="vm",
        accelerator="tcg",
        termination_reason="exited",
        exit_code=0,
        stdout="grüße\n".encode(),
        stderr=b"\xff\x00",
        files={"a.txt": b"x", "b.bin": b"\x80"},
        usage=Usage(wall_ns=5, source="cgroup v2"),
        applied=[
            Applied(rule="memory", requested=2**28, effective=2**28, mechanism="cgroup v2 memory.max"),
            Applied(rule="network", requested=None, effective=(b"lo",), mechanism="network namespace"),
        ],
    )
    plain = json.loads(json.dumps(result.to_json()))
    assert plain == {
        "isolation": "vm",
        "accelerator": "tcg",
        "exit_code": 0,
        "signal": None,
        "termination_reason": "exited",
        "stdout": "grüße\n",
        "stderr": {"base64": "/wA="},
        "truncated": False,
        "files": {"a.txt": "x", "b.bin": {"base64": "gA=="}},
        "usage": {
            "wall_ns": 5,
            "cpu_ns": None,
            "cpu_user_ns": None,
            "cpu_system_ns": None,
            "memory_peak_bytes": None,
            "io_read_bytes": None,
            "io_write_bytes": None,
            "pids_peak": None,
            "throttled_ns": None,
            "oom_kills": None,
            "memory_pressure_ns": None,
            "cpu_pressure_ns": None,
            "io_pressure_ns": None,
            "vmm_cpu_ns": None,
            "vmm_memory_peak_bytes": None,
            "startup_ns": None,
            "teardown_ns": None,
            "source": "cgroup v2",
        },
        "applied": [
            {
                "rule": "memory",
                "requested": 2**28,
                "effective": 2**28,
                "mechanism": "cgroup v2 memory.max",
            },
            {"rule": "network", "requested": None, "effective": ["lo"], "mechanism": "network namespace"},
        ],
        "denials": None,
        "changes": None,
        "choice": None,
    }


def test_json_of_undecodable_text_is_base64_too() -> None:
    text = b"a\xff".decode("utf-8", "surrogateescape")
    assert ended("exited", exit_code=0, stdout=text).to_json()["stdout"] == {"base64": "Yf8="}
    assert ended("exited", exit_code=0, stdout="é").to_json()["stdout"] == "é"


def test_unknown_is_none_never_0() -> None:
    usage = Usage()
    assert {usage.wall_ns, usage.cpu_ns, usage.memory_peak_bytes, usage.startup_ns} == {None}


def test_results_are_frozen_and_pickle() -> None:
    result = ended("exited", exit_code=0, stdout=b"x", files={"a": b"b"})
    assert pickle.loads(pickle.dumps(result)) == result
    assert result.replace(stdout=b"y").stdout == b"y"
    with pytest.raises(AttributeError, match="frozen"):
        result.exit_code = 1


def test_rules_may_be_put_into_words_when_they_are_asked_for() -> None:
    asked = []

    def tell() -> list[Applied]:
        asked.append(1)
        return [Applied(rule="memory", requested=1, effective=1, mechanism="m")]

    result = Result(isolation="process", termination_reason="exited", exit_code=0, applied=tell)
    assert not asked
    assert result.applied[0].rule == "memory"
    assert result.applied is result.applied
    assert asked == [1]
    same = Result(isolation="process", termination_reason="exited", exit_code=0, applied=tell())
    assert result == same
    assert pickle.loads(pickle.dumps(result)) == result.replace() == same
    assert "applied=(Applied(rule='memory'" in repr(result)
    with pytest.raises(AttributeError):
        result.applied = ()


def test_what_it_cost_may_be_worked_out_when_it_is_asked_for() -> None:
    asked = []

    def usage() -> Usage:
        asked.append(1)
        return Usage(cpu_ns=7)

    found, same = ended("exited", exit_code=0, usage=usage), ended("exited", exit_code=0, usage=Usage(cpu_ns=7))
    assert not asked
    assert found == same
    assert found.usage is found.usage
    assert len(asked) == 1
    assert pickle.loads(pickle.dumps(found)) == found
    assert "usage=Usage(" in repr(found)
