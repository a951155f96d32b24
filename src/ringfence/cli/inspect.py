"""`ringfence inspect PID`: what a live process is, whoever made it."""

from __future__ import annotations

from ringfence.cli import output
from ringfence.cli._options import Option, Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ringfence.observe import Inspection

__all__ = ["OPTIONS", "main"]

OPTIONS = Options(
    "ringfence inspect",
    "PID",
    "Shows what a live process is: a plain process, one in a container, a virtual machine's monitor; what it shares"
    " with the host, what it may do, what limits it, and what is weak about that. It needn't be ringfence's own.",
    [Option("json", "print one line of JSON")],
    """
As root all is seen; as another user all of one's own processes, and part of others'. "The host" is the first process
that /proc shows here.

Exit status:
  0    it was looked at
  125  there is no such process, or it ended meanwhile
""",
)


def main(argv: Sequence[str]) -> int:
    given = OPTIONS.parse(sorted(argv, key=lambda word: not word.startswith("-")))  # options may follow the number
    if len(given.operands) != 1 or not given.operands[0].isdecimal():
        raise OPTIONS.error("give the number of one process; see ringfence inspect --help")
    from ringfence.observe import inspect

    found = inspect(int(given.operands[0]))
    if given["json"]:
        output.write_json(found.to_json())
    else:
        output.write_line(output.STDOUT, output.printable(f"{found.pid}: {found.verdict}"))
        output.write_line(output.STDOUT, "")
        output.write_line(output.STDOUT, output.columns(list(_rows(found)), indent=2))
    return 0


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "program", found.exe or found.name
    yield "command", " ".join(found.argv)[:200] or "-"
    if found.container is not None:
        told = found.container.to_json().items()
        yield "container", ", ".join(f"{name} {value}" for name, value in told if value) or "unknown"
    if found.unit:
        yield "unit", found.unit
    for number, weak in enumerate(found.weak):
        yield "weak" if number == 0 else "", weak
    for number, note in enumerate(found.mounts):
        yield "mounts" if number == 0 else "", note
    yield "root", _known(found.root)
    for number, one in enumerate(found.namespaces):
        if one.shared is False:
            whom = f", with {one.others} more ({one.first_other} is one)" if one.others else ""
            how = f"its own, {one.inode}{whom}" if one.inode is not None else "its own"
        elif one.shared:
            how = "the host's"
        else:
            how = "not to be seen by this user" if one.inode is None else str(one.inode)
        yield "namespaces" if number == 0 else "", f"{one.name:<7} {how}"
    yield "ids", f"uid {found.uids[1] if found.uids else '?'} outside; {_mapped(found.uid_map)}"
    if found.groups:
        yield "groups of note", " ".join(found.groups)
    for number, (name, held) in enumerate(found.capabilities.items()):
        yield "capabilities" if number == 0 else "", f"{name:<11} {_shown(held)}"
    counts = {True: "on the host", False: "in its own user namespace only", None: "where this user can't see"}
    yield "", f"they count {counts[found.capabilities_on_host]}"
    yield "seccomp", _known(found.seccomp) + (f", {found.filters} of them" if (found.filters or 0) > 1 else "")
    yield "no_new_privs", {True: "on", False: "off", None: "unknown"}[found.no_new_privs]
    yield "security label", _known(found.label)
    yield "Landlock", "unknown: the kernel tells it to nobody"
    yield from _limits(found)
    if found.sockets:
        yield "sockets", f"{found.sockets} of the host's network"
    if found.monitor is not None:
        yield from _machine(found)
    if found.partial:
        yield "not seen", f"this user may not read its {', '.join(found.partial)}"


def _limits(found: Inspection) -> Iterator[tuple[str, str]]:
    bounds = found.bounds
    rows = (
        ("memory", bounds.memory_bytes, bounds.memory_used_bytes, "memory", output.size),
        ("processes", bounds.pids, bounds.pids_used, "pids", str),
    )
    for name, limit, used, controller, show in rows:
        if controller in bounds.unknown:
            yield name, "its limit can't be seen from here"
        else:
            said = "no limit" if limit is None else f"at most {show(limit)}"
            yield name, said + (f", {show(used)} used" if used is not None else "")
    yield "cpus", "unknown" if "cpu" in bounds.unknown else "no limit" if bounds.cpus is None else f"{bounds.cpus:g}"
    if bounds.devices is not None:
        yield "devices", "every node" if bounds.devices == "all" else "the nodes that its cgroup lists"
    yield "cgroup", ", ".join(dict.fromkeys(bounds.paths.values())) or "unknown"


def _machine(found: Inspection) -> Iterator[tuple[str, str]]:
    monitor = found.monitor
    assert monitor is not None
    machine = f", machine {monitor.machine}" if monitor.machine else ""
    yield "monitor", f"{monitor.program}{machine}; accelerator {monitor.accelerator or 'unknown'}"
    memory = "unknown" if monitor.memory_bytes is None else output.size(monitor.memory_bytes)
    yield "guest", f"memory {memory}, virtual CPUs {monitor.cpus or 'unknown'}"
    if monitor.devices:
        yield "devices", ", ".join(monitor.devices)


def _known(text: str | None) -> str:
    return "unknown" if text is None else text


def _mapped(maps: tuple[tuple[int, int, int], ...]) -> str:
    if not maps:
        return "its id map can't be seen"
    if maps == ((0, 0, 2**32 - 1),):
        return "ids are the host's"
    return "maps " + ", ".join(f"{inside}-{inside + count - 1} to {outside}" for inside, outside, count in maps)


def _shown(held: tuple[str, ...]) -> str:
    from ringfence.spec.boundary import CAPABILITIES

    if not held:
        return "none"
    missing = [name for name in CAPABILITIES if name not in held]
    if not missing:
        return "all"
    return f"all but {' '.join(missing)}" if len(missing) < 6 else " ".join(held)
