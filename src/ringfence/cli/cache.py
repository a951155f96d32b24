"""`ringfence cache`: what was made once and is kept, to list, to check and to remove."""

from __future__ import annotations

import time

from ringfence import _cache
from ringfence.cli import output
from ringfence.cli._options import Option, Options
from ringfence.spec.parse import duration, size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["OPTIONS", "main"]

_ACTIONS = ("list", "verify", "prune", "clear")
_MOST_BYTES = 2 << 30
_KERNELS = "kernels"


def _bytes(word: str) -> int:
    return size(word, "max-size")


def _age(word: str) -> int:
    return duration(word, "unused-for")


OPTIONS = Options(
    "ringfence cache",
    "list|verify|prune|clear",
    "Shows, checks and removes what ringfence has made once and keeps: guests' kernels, initramfs, disks of rootfs"
    " folders, and templates that guests are restored from. All is made again when it is needed, but kernels by"
    " 'ringfence setup'.",
    [
        Option("kind", "only what is of that kind, as list names them", metavar="NAME", repeatable=True),
        Option("max-size", 'prune: what may stay in all, the last used first: "500M" (2G)', metavar="SIZE",
               convert=_bytes),
        Option("unused-for", 'prune: remove what nobody has used for so long as well: "30d"', metavar="TIME",
               convert=_age),
        Option("json", "print one line of JSON"),
    ],
    """\
list     kind, key, size on disk, and when it was made or last used
verify   reads all files and compares them with what was made; what is damaged is removed
prune    removes what was used longest ago, until the rest has at most --max-size; no kernel unless --kind says so
clear    removes all

Kernels and disks tell when they were made, templates when they were last used. Whoever has something open can go on
using it.

Exit status:
  0    it is done; verify: nothing was damaged
  1    verify: something was, and is removed
  125  ringfence refused or failed; one line on stderr says why
""",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Runs `ringfence cache` and returns its exit status."""
    given = OPTIONS.parse(argv)
    words = given.operands or ["list"]
    # Options may come after the word too, as they do with `ringfence cache list --json`.
    if len(words) > 1:
        given = OPTIONS.parse([*argv[: len(argv) - len(words)], *words[1:]])
        if given.operands:
            raise OPTIONS.error(f"what to do is one word, not also {given.operands[0]!r}")
    action = words[0]
    if action not in _ACTIONS:
        raise OPTIONS.error(f"what to do is one of {', '.join(_ACTIONS)}, not {action!r}")
    if action != "prune" and (given["max-size"] is not None or given["unused-for"] is not None):
        raise OPTIONS.error("--max-size and --unused-for are for prune")
    _cache.sweep()
    found = [one for one in _entries() if not given["kind"] or one["kind"] in given["kind"]]
    gone = _choose(action, found, given["kind"], given["max-size"], given["unused-for"])
    for one in gone:
        _cache.remove(one["kind"], one["key"])
    _print(action, found if action in ("list", "verify") else gone, gone, as_json=given["json"])
    return 1 if action == "verify" and gone else 0


def _entries() -> list[dict[str, Any]]:
    """All that is kept, the last used first."""
    found = [
        {"kind": kind, "key": key, "bytes": size_bytes, "used_ns": used_ns}
        for kind in _cache.kinds()
        for key, size_bytes, used_ns in _cache.entries(kind)
    ]
    return sorted(found, key=lambda one: -int(one["used_ns"]))


def _choose(
    action: str, found: list[dict[str, Any]], kinds: list[str], most_bytes: int | None, unused_ns: int | None
) -> list[dict[str, Any]]:
    """What has to go."""
    if action == "list":
        return []
    if action == "clear":
        return found
    if action == "verify":
        return [one for one in found if not _cache.intact(_cache.path_of(one["kind"], one["key"]), thorough=True)]
    if most_bytes is None and unused_ns is None:
        most_bytes = _MOST_BYTES
    gone = []
    total = 0
    for one in found:
        if one["kind"] == _KERNELS and _KERNELS not in kinds:
            continue  # the one thing that no run makes anew by itself
        total += one["bytes"]
        too_old = unused_ns is not None and time.time_ns() - one["used_ns"] > unused_ns
        if too_old or (most_bytes is not None and total > most_bytes):
            gone.append(one)
    return gone


def _print(action: str, shown: list[dict[str, Any]], gone: list[dict[str, Any]], *, as_json: bool) -> None:
    removed = {(one["kind"], one["key"]) for one in gone}
    if as_json:
        output.write_json([{**one, "removed": (one["kind"], one["key"]) in removed} for one in shown])
        return
    rows = [("kind", "key", "size", "used")]
    for one in shown:
        word = f"{one['bytes'] / 1e6:.1f} MB"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["used_ns"] / 1e9))
        damaged = action == "verify" and (one["kind"], one["key"]) in removed
        rows.append((one["kind"], one["key"], word, "damaged, removed" if damaged else when))
    total = sum(one["bytes"] for one in (shown if action in ("list", "verify") else gone))
    what = {"list": "in all", "verify": "in all", "prune": "removed", "clear": "removed"}[action]
    output.write_line(output.STDOUT, output.columns([*rows, ("", what, f"{total / 1e6:.1f} MB", "")]))
