"""What the probe sees inside each level, and what it is let do there.

The probe is one static program, so the same instructions look around everywhere. It runs as the workload of an ordinary
`run`, and once more without any boundary: what it finds there is both what the levels are compared with and the
positive control of every attempt.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile

from ringfence.api import run
from ringfence.errors import ProtocolError, RingfenceError
from ringfence.spec import DEFAULT_ENV, File, Limits
from ringfence.wire.launcher import launcher, namespaces_here, probe_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["ATTEMPTS", "bare_facts", "check_namespaces", "level_facts", "parse"]

_PROBE = "ringfence-probe"
# Each is bounded and changes nothing where it succeeds. VICTIM is this process; RANDOM another word each time, as a
# file that a killed one left, or that another makes just now, would be taken for a refusal.
ATTEMPTS: tuple[tuple[str, str], ...] = (
    ("kill", "try-kill VICTIM 0"),
    ("procmem", "try-procmem VICTIM"),
    ("environ", "try-environ VICTIM"),
    ("ptrace", "try-ptrace VICTIM"),
    ("write_etc", "try-open-write /etc/passwd"),
    ("write_usr", "try-create /usr/.ringfence-compare-RANDOM"),
    ("socket", "try-socket inet stream"),
    ("sethostname", "try-sethostname"),
    ("settime", "try-settime"),
    ("mount", "try-mount"),
    ("unshare_user", "try-unshare user"),
    ("shm", "try-shm"),
    ("keyctl", "try-keyctl"),
    ("bpf", "try-bpf"),
    ("perf", "try-perf"),
    ("io_uring", "try-io_uring"),
    ("userfaultfd", "try-userfaultfd"),
    ("module", "try-module"),
    ("reboot", "try-reboot"),
)


def _lines() -> bytes:
    """For the probe's verb `each`: the facts, then an attempt a line."""
    victim, random = str(os.getpid()), os.urandom(8).hex()
    attempts = (attempt.replace("VICTIM", victim).replace("RANDOM", random) for _, attempt in ATTEMPTS)
    return "".join(f"{line}\n" for line in ("facts", *attempts)).encode()


def parse(output: bytes) -> dict[str, Any]:
    """The probe's facts, with the attempts' answers under "attempts". Raises ProtocolError."""
    first, *rest = output.decode("utf-8", "replace").splitlines() or [""]
    try:
        facts = json.loads(first)
    except ValueError:
        raise ProtocolError(f"the probe printed no facts but {first[:80]!r}") from None
    if not isinstance(facts, dict) or len(rest) != len(ATTEMPTS):
        raise ProtocolError(f"the probe printed {len(rest)} lines for {len(ATTEMPTS)} attempts")
    facts["attempts"] = {name: said.strip() for (name, _), said in zip(ATTEMPTS, rest, strict=True)}
    return facts


def check_namespaces() -> None:
    """Raises RingfenceError where this thread is in other namespaces than those that sandboxes are made from: what a
    child of this thread sees is then no control of theirs, and what differs is not of their own.
    """
    then, now = launcher().namespaces, namespaces_here()
    other = [kind for kind in now if now[kind] != then[kind]]
    if other:
        kinds = f"the caller is in other namespaces ({', '.join(other)})"
        raise RingfenceError(
            f"{kinds} than when its first sandbox was made, and sandboxes are made from the former ones"
        )


def bare_facts() -> dict[str, Any]:
    """Without any boundary: as a child of this process, like any other program that it starts."""
    with tempfile.TemporaryDirectory(prefix="ringfence-bare-") as folder:
        os.symlink(probe_path(), os.path.join(folder, _PROBE))
        done = subprocess.run(
            [f"./{_PROBE}", "each"],
            cwd=folder,
            env={**dict(DEFAULT_ENV), b"HOME": os.fsencode(folder)},
            input=_lines(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    return {**parse(done.stdout), "level": "bare"}


def level_facts(isolation: str, *, limits: Limits | None = None) -> dict[str, Any]:
    """Inside a level, with these limits' memory and CPUs; what `Result.applied` read back is under "applied", by rule,
    and the level's name under "level".

    Raises what `run` raises, and ProtocolError where the probe didn't answer.
    """
    check_namespaces()
    with open(probe_path(), "rb") as file:
        probe = File(file.read(), 0o755)
    # The command's own time, processes and output say nothing of what the probe needs.
    kept = None if limits is None else Limits(memory=limits.memory_bytes, cpus=limits.cpus)
    done = run([f"./{_PROBE}", "each"], isolation=isolation, input=_lines(), files={_PROBE: probe}, limits=kept)
    if not done.ok:
        raise ProtocolError(f"the probe gave no facts at the {isolation} level: {done.describe()}")
    facts = parse(done.stdout)
    facts["applied"] = {one.rule: one.effective for one in done.applied}
    facts["accelerator"] = done.accelerator
    facts["level"] = isolation
    return facts
