"""The process level: the host's system, seen read-only by a user without privileges.

No namespace of its own. Landlock takes away writing, seccomp the network and the kernel's rarer calls, an id that no
account has takes away everybody's files and processes, and a subreaper catches what would outlive it.
"""

from __future__ import annotations

import os
import resource

from ringfence.errors import Unmet
from ringfence.levels import capabilities, filter, reach
from ringfence.levels.base import PLAIN_RULES, Ability, Level, Outcome, requested
from ringfence.levels.limits import limit_abilities, limit_unmet
from ringfence.levels.local import LocalSandbox, open_local
from ringfence.levels.state import Berth, state
from ringfence.linux import ids, landlock, seccomp
from ringfence.result import Applied
from ringfence.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringfence.levels.host import Host
    from ringfence.spec import Spec

__all__ = ["ProcessLevel"]

# Processes and threads of a sandbox whose caller set no limit and that has no id of its own.
_MOST_PROCESSES = 1024


class ProcessLevel(Level):
    name = "process"
    lasting = PLAIN_RULES

    def unavailable(self, host: Host, spec: Spec | None = None) -> tuple[str, str] | None:
        return host.ids

    def abilities(self, host: Host) -> Mapping[str, Ability]:
        container = "use isolation='container' or 'vm'"
        found = limit_abilities(host)
        found["hostname"] = Ability(rule="hostname", reason="a process has the host's name", help=container)
        found["seccomp"] = filter.ability(host)
        found["capabilities"] = capabilities.REFUSED_AT_PROCESS
        found["image"] = Ability(rule="image", reason="a process sees the host's files", help=container)
        found["user"] = Ability(rule="user", mechanism="setresuid")
        found.update(reach.abilities(host))
        found["tmpfs"] = Ability(rule="tmpfs", reason="a process has no mounts of its own", help=container)
        found["overlay"] = Ability(rule="overlay", reason="a process has no mounts of its own", help=container)
        found["kernel"] = Ability(
            rule="kernel", reason="a process runs on the host's kernel", help="use isolation='vm'"
        )
        found["namespaces"] = Ability(
            rule="namespaces", reason="a process has the host's, all of them", help="use isolation='container'"
        )
        found["network=host"] = Ability(rule="network=host", mechanism="nothing is taken away")
        found["network=none"] = (
            Ability(rule="network=none", reason=host.seccomp, help="install libseccomp: 'ringfence setup'")
            if host.seccomp
            else Ability(rule="network=none", mechanism="seccomp: no socket(2)")
        )
        found["network=nat"] = Ability(
            rule="network=nat", reason="a process has no network stack of its own", help="use isolation='container'"
        )
        return found

    def unmet(self, spec: Spec, host: Host) -> list[Unmet]:
        unmet = limit_unmet(spec, host) + reach.unmet(spec, host)
        if "seccomp" in spec.asked:
            unmet += filter.unmet(spec, host)
        elif not host.privileged or spec.user is not None:
            unmet += filter.cgroup_unmet(spec, host)
        if spec.devices:
            from ringfence.levels import devices

            unmet += devices.process_unmet(spec, privileged=host.privileged)
        for mount in spec.mounts:
            asked = (mount.source, mount.target, mount.writable)
            if mount.source != mount.target:
                unmet.append(
                    Unmet(
                        "mounts",
                        asked,
                        f"a process sees the host's paths: {os.fsdecode(mount.source)} can't appear elsewhere",
                        "use the same path twice, or isolation='container'",
                    )
                )
        if not host.landlock_abi and (not host.privileged or spec.user is not None):
            unmet += _without_landlock(spec, host)
        elif not host.privileged and host.landlock_abi < landlock.SCOPES_ABI:
            # The workload is the caller's own user, who may stop ringfence's processes too.
            for rule in sorted(spec.asked & {"wall_time", "cpu_time"}):
                unmet.append(
                    Unmet(
                        rule,
                        requested(spec, rule),
                        "the workload could stop ringfence itself: signals can't be kept in here (Landlock ABI 6)",
                        "use Linux 6.12, run as root, or use isolation='container'",
                    )
                )
        if isinstance(spec.user, str):
            unmet.append(Unmet("user", spec.user, "a process takes a user by number", "give a uid or 'uid:gid'"))
        elif spec.user is not None and not host.privileged and spec.user != (os.geteuid(), os.getegid()):
            unmet.append(Unmet("user", spec.user, "only root can become another user", "run as root"))
        return unmet

    def open(self, spec: Spec, host: Host, *, stays: bool = False) -> ProcessSandbox:
        return open_local(ProcessSandbox, spec, host, state(), stays=stays)


def _without_landlock(spec: Spec, host: Host) -> list[Unmet]:
    """What was asked of a workload whose user has other processes: it could write their memory (/proc/PID/mem), and
    have them do what it may not. A filter of its own is refused by `levels.filter`.
    """
    from ringfence.levels import owned

    keeps = {"network"} if spec.network.mode == "none" else set()
    if owned.is_owner(spec, host):
        keeps |= owned.CGROUP_LIMITS  # whose files are its user's too
    if not host.privileged:
        keeps |= {"wall_time", "output"}  # which ringfence's own processes keep
    reason = "the workload's user has other processes, and files of cgroups, that only Landlock keeps from it"
    help = "use a kernel with Landlock, isolation='container', or root without user="
    return [Unmet(rule, requested(spec, rule), reason, help) for rule in sorted(spec.asked & keeps)]


def _threads_of(uid: int) -> int:
    count = 0
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                about = os.stat(f"/proc/{name}/task")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            count += about.st_nlink - 2 if about.st_uid == uid else 0
    return count


def _slot_owner(slot: int) -> tuple[int, int]:
    return ids.process_uid(slot), ids.process_uid(slot)


class ProcessSandbox(LocalSandbox):
    """A command of the host's own system."""

    def _open(self) -> None:
        spec, host = self.spec, self._host
        uid: int | None = None
        user = spec.user if isinstance(spec.user, tuple) else None
        if not host.privileged:
            self.berth = self.state.berth("process", None)
        elif user is None:
            self.berth = self.state.berth("process", _slot_owner)
            uid = ids.process_uid(self.berth.slot or 0)
            user = (uid, uid)
        else:
            given = user
            self.berth = self.state.berth(f"process {given}", lambda _: given)
        self.put_files()
        self.home = os.path.join(self.state.run_path, self.berth.name)
        plan = messages.Plan()
        self._has_own_uid = uid is not None
        if uid is None:
            self._bound_processes(plan, user)
        self.make_cgroup()
        if host.privileged and user is not None:
            plan.ids(*user)
        plan.flags(no_new_privs=True)
        plan.workdir(self.home)
        self._restrict_files(plan, self.berth)
        self.put_filter(plan, self._policy)
        self.common_plan(plan)
        self.start(messages.launch(clone_flags=0, kill_uid=uid, host_mounts=True, later=self.later), plan)

    def _policy(self) -> seccomp.Policy:
        network = self.spec.network
        return seccomp.for_process(
            network.mode,
            tcp_only=network.allow is not None,
            listen=bool(network.publish),
            shared_user=not self._has_own_uid,
        )

    def _bound_processes(self, plan: messages.Plan, user: tuple[int, int] | None) -> None:
        """Without an id of its own a sandbox is killed process by process, which only ends where their number does."""
        if self._cgroup_limits.pids is not None:
            return
        # systemd isn't asked for a cgroup for this alone; and without Landlock it could change its own.
        pids, kept = self._host.cgroups.controller("pids"), self._host.landlock_abi > 0
        if kept and pids.usable and not self._host.cgroups.by_systemd:
            self._cgroup_limits = self._cgroup_limits.replace(pids=_MOST_PROCESSES)
            return
        # The kernel counts all threads of the user, wherever they run. It doesn't count root's.
        most = _threads_of(user[0] if user is not None else os.geteuid()) + _MOST_PROCESSES
        _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        plan.rlimit(resource.RLIMIT_NPROC, most, most)

    def _restrict_files(self, plan: messages.Plan, berth: Berth) -> None:
        """The host read-only, by Landlock, and the work directory writable, unless the spec says otherwise."""
        self.landlock = ""
        if not self._host.landlock_abi:
            return
        if reach.is_narrowed(self.spec):
            with reach.ruleset(self.spec, self._host, berth.workdir.fd) as made:
                self.landlock = made.describe()
                plan.landlock(self.keep_fd(made.detach()))
            return
        no_network = self.spec.network.mode == "none"
        # A ruleset stays good for as long as its work directory.
        key = "no network" if no_network else "network"
        if key not in berth.rulesets:
            berth.rulesets[key] = landlock.host_read_only([berth.workdir.fd], deny_network=no_network).detach()
        self.landlock = landlock.describe(deny_network=no_network)
        plan.landlock(berth.rulesets[key])

    def applied(self, outcome: Outcome) -> list[Applied]:
        found = super().applied(outcome)
        started = outcome.started
        if started is None:
            return found
        found += reach.applied(self.spec, started, self.landlock)
        shown = "the host read-only" if self.spec.readable is None else "only what is `readable`"
        found.append(
            Applied(
                rule="files",
                requested=None,
                effective=f"{shown}, the work directory writable" if started.landlock else None,
                mechanism=self.landlock or "this kernel has no Landlock",
            )
        )
        for device in self.spec.devices:
            found.append(
                Applied(
                    rule=f"device {os.fsdecode(device.target)}",
                    requested=device.access,
                    effective=device.access if started.landlock else None,
                    mechanism=f"{self.landlock}, and its mode",
                )
            )
        for mount in self.spec.mounts:
            shown = "writable" if mount.writable else "read-only"
            found.append(
                Applied(
                    rule=f"mount {os.fsdecode(mount.target)}",
                    requested=shown,
                    effective=shown if started.landlock else None,
                    mechanism=self.landlock,
                )
            )
        mode = self.spec.network.mode
        narrowed = self.spec.network.allow is not None
        enforced = mode == "host" or started.seccomp == 2
        mechanism = "seccomp: no socket(2)" if mode == "none" else "nothing is taken away"
        if narrowed:
            mechanism = "only TCP, to what `allow` names"
        if mode == "none" and started.landlock and self._host.landlock_abi >= 4:
            mechanism += ", and Landlock: no TCP"
        found.append(
            Applied(
                rule="network",
                requested=mode if "network" in self.spec.asked else None,
                effective=mode if enforced else None,
                mechanism=mechanism if enforced else self._host.seccomp,
            )
        )
        if not started.landlock and not self._has_own_uid:
            found.append(
                Applied(
                    rule="other processes of its user",
                    requested=None,
                    effective=None,
                    mechanism="within reach: without Landlock their memory is open (/proc/PID/mem)",
                )
            )
        if started.ids[1] == 0:
            found.append(
                Applied(
                    rule="host files and sockets",
                    requested=None,
                    effective=None,
                    mechanism="shared: uid 0 reads what root may, and connects where the network is the host's",
                )
            )
        found += [
            Applied(rule=f"namespace {name}", requested=None, effective=inode, mechanism="the host's")
            for name, inode in started.namespaces.items()
        ]
        return found
