"""`ringfence doctor`: what this host can enforce, level by level and rule by rule, and what would help.

It doesn't only ask: unless --quick, it runs a command at each level and says whether that came back.
"""

from __future__ import annotations

import os
import sys

from ringfence import api
from ringfence._value import Value
from ringfence.cli import output
from ringfence.cli._options import Option, Options
from ringfence.errors import CannotEnforce, RingfenceError
from ringfence.levels.host import host
from ringfence.spec import ISOLATIONS, File, Limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from ringfence.levels.base import Ability, Level
    from ringfence.levels.host import Host
    from ringfence.result import Result

__all__ = ["Fact", "LevelReport", "Report", "examine", "main"]

OPTIONS = Options(
    "ringfence doctor",
    "",
    "Shows what this host can enforce, level by level, and what would help. A command is run at each level to see it"
    " work; a virtual machine boots for that in a few seconds.",
    [
        Option("quick", "run nothing: only look"),
        Option("json", "print one line of JSON"),
    ],
    """
Exit status:
  0     all three levels work here (with --quick: nothing is seen that stands in their way)
  1     one doesn't; the report says which, why, and what would help
""",
)

# A first boot by emulation, on a busy machine.
_TRIAL_LIMITS = Limits(wall_time="60s")


class Fact(Value):
    """One thing about this host. ok: whether it serves; None where it is neither good nor bad. help: or ""."""

    __slots__ = ("detail", "help", "name", "ok")
    name: str
    ok: bool | None
    detail: str
    help: str

    def __init__(self, name: str, ok: bool | None, detail: str, help: str = "") -> None:
        self._set(name=name, ok=ok, detail=detail, help=help)


class LevelReport(Value):
    """One level. works: whether it can be used. detail: how a trial run went, or why not. help: or "".
    abilities: rule by rule; empty where the level can't run at all.
    """

    __slots__ = ("abilities", "detail", "help", "name", "works")
    name: str
    works: bool
    detail: str
    help: str
    abilities: tuple[Ability, ...]

    def __init__(
        self, *, name: str, works: bool, detail: str, help: str = "", abilities: Sequence[Ability] = ()
    ) -> None:
        self._set(name=name, works=works, detail=detail, help=help, abilities=tuple(abilities))


class Report(Value):
    """What `examine` found. tried: whether a command was run at each level, or they were only looked at."""

    __slots__ = ("facts", "levels", "tried")
    levels: tuple[LevelReport, ...]
    facts: tuple[Fact, ...]
    tried: bool

    def __init__(self, *, levels: Sequence[LevelReport], facts: Sequence[Fact], tried: bool) -> None:
        self._set(levels=tuple(levels), facts=tuple(facts), tried=tried)

    @property
    def ok(self) -> bool:
        return all(one.works for one in self.levels)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            "ok": self.ok,
            "tried": self.tried,
            "levels": {
                one.name: {
                    "works": one.works,
                    "detail": one.detail,
                    "help": one.help,
                    "rules": {rule.rule: _plain(rule, "rule") for rule in one.abilities},
                }
                for one in self.levels
            },
            "facts": {one.name: _plain(one, "name") for one in self.facts},
        }


def main(argv: Sequence[str]) -> int:
    """Runs `ringfence doctor` and returns its exit status."""
    given = OPTIONS.parse(argv)
    report = examine(host(), quick=given["quick"], progress=output.progress())
    if given["json"]:
        output.write_json(report.to_json())
    elif os.isatty(output.STDOUT):
        _show_in_colour(report)
    else:
        output.write_line(output.STDOUT, as_text(report))
    return 0 if report.ok else 1


def examine(
    machine: Host,
    *,
    quick: bool,
    progress: Callable[[str], None] | None = None,
    level: Callable[[str], Level] = api.level,
    run: Callable[..., Result] = api.run,
) -> Report:
    """Looks at every level on this host and, unless `quick`, runs a command at each."""
    levels = []
    for name in ISOLATIONS:
        if progress is not None and not quick:
            progress(f"trying the {name} level")
        levels.append(_look(level(name), machine, None if quick else run))
    return Report(levels=levels, facts=_facts(machine), tried=not quick)


def _look(boundary: Level, machine: Host, run: Callable[..., Result] | None) -> LevelReport:
    try:
        missing = boundary.unavailable(machine)
        if missing is not None:
            return LevelReport(name=boundary.name, works=False, detail=missing[0], help=missing[1])
        abilities = tuple(boundary.abilities(machine).values())
        works, detail = (True, "not tried") if run is None else _try(boundary.name, run)
        if works and run is not None:
            abilities = _try_nat(boundary.name, abilities, run)
    except RingfenceError as error:
        # What a doctor is for: whatever is wrong with one level is told, and the next is looked at.
        reason, help = getattr(error, "reason", str(error)), getattr(error, "help", None)
        return LevelReport(name=boundary.name, works=False, detail=reason, help=help or "")
    return LevelReport(name=boundary.name, works=works, detail=detail, abilities=abilities)


def _try_nat(name: str, abilities: tuple[Ability, ...], run: Callable[..., Result]) -> tuple[Ability, ...]:
    """The abilities, as far as a network needs parts of the kernel that only a trial shows."""
    from ringfence.levels.base import Ability

    if not any(one.rule == "network=nat" and one.available for one in abilities):
        return abilities
    try:
        _try(name, run, network="nat")
    except CannotEnforce as error:
        lost = ("network=nat", "allow", "publish", "bandwidth")
        for unmet in error.unmet:
            if unmet.rule == "network":
                gone = {rule: Ability(rule=rule, reason=unmet.reason, help=unmet.help) for rule in lost}
                return tuple(gone.get(one.rule, one) for one in abilities)
    return abilities


def _try(name: str, run: Callable[..., Result], **options: Any) -> tuple[bool, str]:
    """Whether a command that exits with 0 does so at this level, and how that went."""
    from ringfence.wire.launcher import probe_path

    with open(probe_path(), "rb") as file:
        probe = File(file.read(), 0o755)
    result = run(["./probe", "exit", "0"], isolation=name, files={"probe": probe}, limits=_TRIAL_LIMITS, **options)
    if not result.ok:
        return False, f"a command that exits with 0 was run, but {result.describe()}"
    took = f", started in {output.duration(result.usage.startup_ns)}" if result.usage.startup_ns else ""
    how = f" by {result.accelerator}" if result.accelerator else ""
    return True, f"a command was run{how}{took}"


# ---- facts ----


def _facts(machine: Host) -> list[Fact]:
    return [
        Fact("kernel", None, f"Linux {machine.kernel}, {machine.machine}"),
        Fact("user", None, "root" if machine.privileged else f"uid {os.geteuid()}, without privileges"),
        *_cgroups(machine),
        *_surroundings(),
        Fact(
            "user namespaces",
            not machine.user_namespaces,
            machine.user_namespaces or "usable",
            machine.user_namespaces_help,
        ),
        _landlock(machine),
        Fact("seccomp", not machine.seccomp, machine.seccomp or "filters can be made"),
        *_tools(),
        _kvm(),
        _guest_kernel(),
        _templates(),
        _ids(machine),
        *_subordinate_ids(machine),
    ]


def _cgroups(machine: Host) -> list[Fact]:
    layout = machine.cgroups
    where = f", ringfence's are {layout.home}" if layout.home else ", none can be made"
    facts = [Fact("cgroups", bool(layout.home), f"layout {layout.kind}{where}")]
    for one in machine.cgroups.controllers:
        where = os.fsdecode(one.path) or f"version {one.version}"
        facts.append(
            Fact(f"cgroup {one.name}", one.usable, f"v{one.version} {where}" if one.usable else one.reason, one.help)
        )
    return facts


def _surroundings() -> list[Fact]:
    """The container that this process is in itself, if any."""
    from ringfence.linux import surroundings

    detail, help = surroundings.find().told()
    return [Fact("surroundings", not help, detail, help)] if detail else []


def _subordinate_ids(machine: Host) -> list[Fact]:
    from ringfence.linux import rootless

    if machine.privileged:
        return []
    given = rootless.known()
    if not given.usable:
        # Without them a container has one id, which does for most.
        return [Fact("subordinate ids", None, f"a container has a single id: {given.reason}", given.help)]
    count = sum(count for _, count in given.uids)
    return [Fact("subordinate ids", True, f"{count} by newuidmap and newgidmap, where more than one id is needed")]


def _landlock(machine: Host) -> Fact:
    from ringfence.linux import landlock

    version = machine.landlock_abi
    if not version:
        help = "a kernel with CONFIG_SECURITY_LANDLOCK, and landlock among lsm= on its command line"
        return Fact("Landlock", False, landlock.available()[1], help)
    gaps = landlock.gaps(version)
    missing = f"; not kept from a process: {', '.join(gaps)}" if gaps else ""
    return Fact("Landlock", True, f"ABI {version}{missing}", "a newer kernel" if gaps else "")


def _tools() -> list[Fact]:
    from ringfence import _setup

    facts = []
    for need in _setup.NEEDS:
        found = need.found()
        if found is None:
            facts.append(Fact(need.name, False, "not installed", "ringfence setup"))
        else:
            version = _version(found) if need.name == "qemu" else ""
            facts.append(Fact(need.name, True, f"{found}{version}"))
    return facts


def _version(program: str) -> str:
    """What to show as well, such as ", version 7.2.13" of a program of QEMU's; "" where it doesn't say."""
    import subprocess

    try:
        said = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False
        ).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    _, found, rest = said.partition("version ")
    return f", version {rest.split()[0]}" if found and rest.split() else ""


def _kvm() -> Fact:
    from ringfence.linux import kvm

    state = kvm.probe()
    if state.usable:
        return Fact("KVM", True, f"usable: {state.reason}")
    # No KVM is no failure: guests run all the same, only slower.
    return Fact("KVM", None, f"not used, guests run by software emulation (TCG): {state.reason}")


def _guest_kernel() -> Fact:
    from ringfence.levels.vm import kernel

    try:
        found = kernel.find()
    except RingfenceError as error:
        return Fact("guest kernel", False, str(error))
    if found is None:
        return Fact("guest kernel", False, "not prepared", "ringfence setup")
    return Fact("guest kernel", True, f"{found.release} ({found.source})")


def _templates() -> Fact:
    """Guests that are kept to be restored: how many, and what they take on disk."""
    from ringfence import _cache

    try:
        found = _cache.entries("templates")
    except RingfenceError as error:
        return Fact("guest templates", False, str(error))
    if not found:
        return Fact("guest templates", None, "none yet: the first run of each kind of machine makes one")
    return Fact("guest templates", None, f"{len(found)}, {sum(size for _, size, _ in found) >> 20} MB on disk")


def _ids(machine: Host) -> Fact:
    from ringfence.linux import ids

    if not machine.privileged:
        return Fact("ids", None, "sandboxes run under your own uid; as root each gets one that no account has")
    try:
        ids.slots()
    except OSError as error:
        return Fact("ids", False, f"{error.filename}: {error.strerror}")
    found = ids.range_()
    if found.problem:
        return Fact("ids", False, found.problem, found.help)
    return Fact(
        "ids", True, f"each sandbox gets its own, from {found.first} on; {found.slots} at once ({found.source})"
    )


# ---- showing it ----

_MARKS = {True: "ok", False: "no", None: "-"}


def _level_rows(report: Report) -> list[tuple[bool | None, str, str, str]]:
    """(mark, what, detail, help) of every level with its rules below it."""
    rows: list[tuple[bool | None, str, str, str]] = []
    for level in report.levels:
        rows.append((level.works, level.name, level.detail, level.help))
        rows += [
            (one.available, f"  {one.rule}", one.mechanism if one.available else one.reason, one.help)
            for one in level.abilities
        ]
    return rows


def _fact_rows(report: Report) -> list[tuple[bool | None, str, str, str]]:
    return [(one.ok, one.name, one.detail, one.help) for one in report.facts]


def _summary(report: Report) -> str:
    broken = [one.name for one in report.levels if not one.works]
    if broken:
        return f"Not usable here: {', '.join(broken)}."
    return "All three levels work here." if report.tried else "Nothing is in the way of any level; none was tried."


def as_text(report: Report) -> str:
    """The report as aligned text, for a file or a pipe."""
    blocks = []
    for title, rows in (("Levels and their rules", _level_rows(report)), ("This host", _fact_rows(report))):
        lines = [
            (_MARKS[mark], what, f"{detail} [help: {help}]" if help else detail) for mark, what, detail, help in rows
        ]
        blocks.append(f"{title}\n{output.columns(lines, indent=2)}")
    return "\n\n".join([*blocks, _summary(report)])


def _show_in_colour(report: Report) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {True: "green", False: "red", None: "dim"}
    console = Console(file=sys.stdout)
    for title, rows in (("Levels and their rules", _level_rows(report)), ("This host", _fact_rows(report))):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("")
        table.add_column("what", no_wrap=True)
        table.add_column("by what, or why not", overflow="fold")
        table.add_column("what would help", overflow="fold")
        for mark, what, detail, help in rows:
            # Text, not str: rich would take brackets in it for markup.
            bold = "bold" if title.startswith("Levels") and not what.startswith(" ") else ""
            table.add_row(
                Text(_MARKS[mark], styles[mark]),
                Text(what, bold),
                Text(output.printable(detail)),
                Text(output.printable(help), "dim"),
            )
        console.print(table)
    console.print(Text(_summary(report), "green" if report.ok else "red"))
    sys.stdout.flush()


def _plain(value: Value, without: str) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value._fields if name != without}
