"""The process level: the host's system, seen read-only by a user without privileges.

No namespace of its own. Landlock takes away writing, seccomp the network and the kernel's rarer calls, an id that no
account has takes away everybody's files and processes, and a subreaper catches what would outlive it.
"""

from __future__ import annotations

import os
import resource

from ringfence.levels import reach
from ringfence.levels.base import PLAIN_RULES, Level
from ringfence.levels.local import LocalSandbox, open_local
from ringfence.levels.state import Berth, state
from ringfence.linux import ids, landlock, seccomp
from ringfence.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringfence.errors import Unmet
    from ringfence.levels.base import Ability, Outcome
    from ringfence.levels.host import Host
    from ringfence.result import Applied
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
        from ringfence.levels import process_rules

        return process_rules.abilities(host)

    def unmet(self, spec: Spec, host: Host) -> list[Unmet]:
        if not spec.asked:
            return []
        from ringfence.levels import process_rules

        return process_rules.unmet(spec, host)

    def open(self, spec: Spec, host: Host, *, stays: bool = False) -> ProcessSandbox:
        return open_local(ProcessSandbox, spec, host, state(), stays=stays)


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
        spec, host = self.spec, self.host
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
        self.has_own_uid = uid is not None
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
            shared_user=not self.has_own_uid,
        )

    def _bound_processes(self, plan: messages.Plan, user: tuple[int, int] | None) -> None:
        """Without an id of its own a sandbox is killed process by process, which only ends where their number does."""
        if self._cgroup_limits.pids is not None:
            return
        # systemd isn't asked for a cgroup for this alone; and without Landlock it could change its own.
        pids, kept = self.host.cgroups.controller("pids"), self.host.landlock_abi > 0
        if kept and pids.usable and not self.host.cgroups.by_systemd:
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
        if not self.host.landlock_abi:
            return
        if reach.is_narrowed(self.spec):
            with reach.ruleset(self.spec, self.host, berth.workdir.fd) as made:
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
        from ringfence.levels import told

        return told.of_process(self, outcome)
