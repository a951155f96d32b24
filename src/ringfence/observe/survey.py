"""All of this host's processes, grouped as what they are: virtual machines, containers, plain processes."""

from __future__ import annotations

from ringfence._value import Value
from ringfence.errors import KernelError
from ringfence.observe.inspection import Host, Inspection, examine, reference
from ringfence.observe.proc import Proc, pids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Group", "survey"]

# PF_KTHREAD of the flags in /proc/PID/stat.
_KERNEL_THREAD = 0x00200000


class Group(Value):
    """What belongs together: a VMM, a container with all its processes, or one plain process.

    kind: "vm", "container" or "process". first: its first process, inspected. pids: all of them. resident_bytes: their
    resident memory added up, which counts shared pages more than once.
    """

    __slots__ = ("first", "kind", "pids", "resident_bytes")
    kind: str
    first: Inspection
    pids: tuple[int, ...]
    resident_bytes: int

    def __init__(self, *, kind: str, first: Inspection, pids: tuple[int, ...], resident_bytes: int) -> None:
        self._set(kind=kind, first=first, pids=pids, resident_bytes=resident_bytes)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            "kind": self.kind,
            "pids": self.pids,
            "resident_bytes": self.resident_bytes,
            "first": self.first.to_json(),
        }


def survey(proc: str = "/proc") -> list[Group]:
    """Every group of processes that this caller sees, virtual machines first, then containers, then the others.

    Threads of the kernel are left out. A process that ends meanwhile is, too.
    """
    host = reference()
    members: dict[object, list[Inspection]] = {}
    machines: list[Inspection] = []
    plain: list[Inspection] = []
    for pid in pids(proc):
        one = _look(pid, host, proc)
        if one is None:
            continue
        if one.kind == "vm":
            machines.append(one)
        elif one.kind == "container":
            members.setdefault(_place(one), []).append(one)
        else:
            plain.append(one)
    groups = []
    for machine in machines:
        # The jail's own init, where it has one, is part of it.
        jail = members.pop(_place(machine), []) if _is_jailed(machine) else []
        groups.append(_group("vm", [machine, *jail]))
    groups += [_group("container", found) for found in members.values()]
    groups += [_group("process", [one]) for one in plain]
    return groups


def _look(pid: int, host: Host, proc: str) -> Inspection | None:
    try:
        with Proc(pid, proc) as process:
            stat = (process.text("stat") or "").rpartition(")")[2].split()
        if len(stat) < 7 or int(stat[6]) & _KERNEL_THREAD:
            return None
        return examine(pid, host, proc=proc)
    except KernelError:
        return None


def _place(one: Inspection) -> object:
    """What its group has in common: the container by its id or name, as an engine's containers may share a PID
    namespace, or have one more inside; else the PID namespace, as one may have a mount namespace beside it.
    """
    if one.container is not None and (called := one.container.id or one.container.name):
        return one.maker, called
    return one.namespace("pid").inode or ("by itself", one.pid)  # another user's


def _is_jailed(machine: Inspection) -> bool:
    return machine.namespace("mnt").shared is False and machine.namespace("pid").shared is False


def _group(kind: str, found: list[Inspection]) -> Group:
    return Group(
        kind=kind,
        first=found[0],
        pids=tuple(one.pid for one in found),
        resident_bytes=sum(one.resident_bytes or 0 for one in found),
    )
