"""The container level: namespaces decide what the workload sees, cgroups what it may use, capabilities and seccomp what
it may ask of the kernel.
"""

from __future__ import annotations

import os

from ringfence.errors import RingfenceError
from ringfence.levels import namespaces
from ringfence.levels.base import PLAIN_RULES, Level
from ringfence.levels.local import LocalSandbox, open_local
from ringfence.levels.root import HOST_TEMPLATE, directories_above, host_template, private_steps
from ringfence.levels.state import State, state
from ringfence.linux import ids, landlock_abi, privileges, seccomp
from ringfence.wire import messages
from ringfence.wire.messages import NODEV, NOEXEC, NOSUID, RDONLY, RECURSIVE, MountStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ringfence.errors import Unmet
    from ringfence.levels.base import Ability, Outcome
    from ringfence.levels.host import Host
    from ringfence.levels.workdir import WorkDirectory
    from ringfence.result import Applied
    from ringfence.spec import Spec

__all__ = ["ContainerLevel", "ContainerSandbox"]

_HOME = b"/work"
_HOSTNAME = "ringfence"
_USER = (1000, 1000)


class ContainerLevel(Level):
    name = "container"
    lasting = PLAIN_RULES - {"user"}

    def unavailable(self, host: Host, spec: Spec | None = None) -> tuple[str, str] | None:
        if host.user_namespaces:
            return host.user_namespaces, host.user_namespaces_help or "see 'ringfence doctor'"
        return host.ids

    def begin(self, spec: Spec) -> None:
        if spec.image == "host" and privileges.privileged():
            try:
                _make_template(state())
            except (RingfenceError, OSError):
                return

    def abilities(self, host: Host) -> Mapping[str, Ability]:
        from ringfence.levels import container_rules

        return container_rules.abilities(host)

    def unmet(self, spec: Spec, host: Host) -> list[Unmet]:
        if not spec.asked:
            return []
        from ringfence.levels import container_rules

        return container_rules.unmet(spec, host)

    def open(self, spec: Spec, host: Host, *, stays: bool = False) -> ContainerSandbox:
        return open_local(ContainerSandbox, spec, host, state(), stays=stays)


def _make_template(state: State) -> None:
    state.template(HOST_TEMPLATE, lambda: host_template(state.launcher.mountinfo))


class ContainerSandbox(LocalSandbox):
    """extra: makes more steps of the file tree, for a VMM. extra_gid: a group of the host's that the command is in.
    guest: its network is that of the VMM's guest, who has it by a tap.

    maps, outside, base: of its ids. user_namespaces: to map the ids of mounts by, one for each owner on disk; unmapped:
    the paths whose file systems can't. Both are `shown`'s.
    """

    vmm_started: messages.Started | None = None
    _local_dns = False
    _folder: WorkDirectory | None = None
    pid_namespace = True

    def __init__(
        self,
        spec: Spec,
        host: Host,
        state: State,
        *,
        later: bool = False,
        extra: Callable[[ContainerSandbox], list[MountStep]] | None = None,
        extra_gid: int | None = None,
        stays: bool = False,
        guest: bool = False,
        writes: bool = True,
    ) -> None:
        self._guest = guest
        # False for a command of ours that has nothing to write in its work directory.
        self._work_flags = NOSUID | NODEV | (0 if writes else RDONLY | NOEXEC)
        self._extra = extra
        self._extra_gid = extra_gid
        self.hostname = spec.hostname or _HOSTNAME
        self.user_namespaces: dict[tuple[int, int] | None, int] = {}
        self.shared = namespaces.OWN
        self.subordinate = False
        self.unmapped: set[bytes] = set()
        super().__init__(spec, host, state, later=later, stays=stays)

    def _open(self) -> None:
        spec, host = self.spec, self.host
        uid, gid = _USER if spec.user is None else self._asked_user()
        if spec.namespaces.asked:
            from ringfence.levels import namespace_rules

            self.shared = namespace_rules.choose(spec, host, self.keep_fd)
        shared = self.shared
        if not shared.is_own("user"):
            uid, gid = self._take_ids_elsewhere((uid, gid))
        elif host.privileged:
            group = min(gid, ids.CONTAINER_IDS - 1)
            self.berth = self.state.berth(
                f"container {uid}:{group}",
                lambda slot: (ids.container_base(slot) + uid, ids.container_base(slot) + group),
            )
            self.base = ids.container_base(self.berth.slot or 0)
            self.outside = self.base + uid, self.base + group
            uid_map = gid_map = b"0 %d %d" % (self.base, ids.CONTAINER_IDS)
            if self._extra_gid is not None:
                # A group of the host's, which nothing but the command itself is in: for /dev/kvm.
                gid = ids.CONTAINER_IDS
                gid_map += b"\n%d %d 1" % (gid, self._extra_gid)
            self.maps = (uid_map, gid_map)
        else:
            # One id, which is the caller's own outside. The workload isn't root inside unless that was asked for.
            self.berth = self.state.berth("container", None)
            self.maps = (b"%d %d 1" % (uid, os.geteuid()), b"%d %d 1" % (gid, os.getegid()))
            self.outside = os.geteuid(), os.getegid()
            if spec.capabilities or (spec.user is not None and (uid, gid) not in ((0, 0), _USER)):
                self._map_subordinate(uid, gid)
        self.user = (uid, gid)
        berth = self.berth
        assert berth is not None
        if spec.limits.disk_bytes is None:
            self.put_files()
        self.home = _HOME
        self.make_cgroup()
        plan = messages.Plan()
        if shared.is_own("uts"):
            plan.hostname(self.hostname.encode())
        if self.network_kind in ("none", "nat"):
            plan.loopback()
        plan.mounts(self._tree(berth.name))
        plan.ids(uid, gid)
        plan.flags(cgroup_namespace=shared.is_own("cgroup"), enter=True, no_new_privs=True)
        plan.workdir(_HOME)
        if self.subordinate:
            plan.give_back()
        own_ipc = shared.kinds["ipc"] != "host"
        self.put_filter(plan, lambda: seccomp.policy(namespaces=own_ipc, capabilities=spec.capabilities))
        if spec.capabilities:
            from ringfence.levels import capabilities

            plan.capabilities(capabilities.mask(spec.capabilities))
        self._scope_sockets(plan)
        self.common_plan(plan)
        nat = self.network_kind == "nat"
        if nat:
            self.open_network(plan, local_dns=self._local_dns, guest=self._guest)
        joined = shared.joined
        request = messages.launch(
            clone_flags=shared.clone_flags & ~(namespaces.FLAGS["net"] if self.network_kind == "host" else 0),
            uid_map=self.maps[0] if shared.is_own("user") else None,
            gid_map=self.maps[1] if shared.is_own("user") else None,
            kill_uid=None if shared.is_own("pid") or not host.privileged else self.outside[0],
            joins=[namespaces.FLAGS[one.name] for one in joined],
            offsets_ns=shared.offsets_ns,
            later=self.later,
            own_network=nat,
        )
        self.start(request, plan, [one.fd for one in joined])
        if self.network is not None:
            self.start_network(self.network)
        if spec.limits.disk_bytes is not None:
            self.send_files(spec.files)

    def _asked_user(self) -> tuple[int, int]:
        from ringfence.levels.users import resolve

        assert self.spec.user is not None
        return resolve(self.spec.user, self.spec.image)

    def _map_subordinate(self, uid: int, gid: int) -> None:
        """An unprivileged caller's whole range of ids, where it has one. Its helpers take some milliseconds, so only
        where ids other than the workload's can matter.
        """
        from ringfence.linux import rootless

        given = rootless.known()
        if given.usable:
            self.maps = rootless.maps(given, uid, gid)
            self.subordinate = True

    @property
    def network_kind(self) -> str:
        """The mode, or "joined" where its network namespace is one that exists already."""
        kind = self.shared.kinds["net"]
        if kind == "host":
            return "host"
        return self.spec.network.mode if kind == "own" else "joined"

    def _take_ids_elsewhere(self, asked: tuple[int, int]) -> tuple[int, int]:
        """The workload's ids and its berth, where the user namespace isn't its own."""
        from ringfence.levels import joined

        user = self.shared.kinds["user"]
        if isinstance(user, namespaces.Joined):
            maps = joined.maps_of(user)
            given = asked if self.spec.user is not None else None
            inside, self.outside = joined.outside(maps, given, _USER, privileged=self.host.privileged)
            outer = self.outside
            kind = f"container {outer} of another user namespace"
            self.berth = self.state.berth(kind, (lambda _: outer) if self.host.privileged else None)
            self.base = maps[0][0][1]
            self.maps = (b"%d %d %d" % maps[0][0], b"%d %d %d" % maps[1][0])
            self.user_namespaces[None] = user.fd
            return inside
        self.berth = self.state.berth("container, the host's ids", lambda slot: (ids.process_uid(slot),) * 2)
        own = ids.process_uid(self.berth.slot or 0)
        self.base = 0
        self.maps = (b"0 0 4294967295",) * 2
        self.outside = own, own
        return own, own

    def _scope_sockets(self, plan: messages.Plan) -> None:
        """Abstract UNIX sockets belong to the network namespace. Landlock keeps the host's out of reach."""
        if self.network_kind == "host" and self.host.landlock_abi >= landlock_abi.SCOPES_ABI:
            from ringfence.linux import landlock

            plan.landlock(self.keep_fd(landlock.Ruleset(files=False).detach()))

    # ---- the file tree ----

    def _tree(self, name: bytes) -> list[MountStep]:
        """The steps of the sandbox's root. Where nothing but the host's userland is asked for, the launcher has it
        ready: one clone of a tree.
        """
        spec = self.spec
        own = self.host.privileged
        if own and spec.image == "host":
            _make_template(self.state)
        layered = spec.overlay or spec.limits.disk_bytes is not None
        if layered or spec.tmpfs:
            from ringfence.levels.layer import Layer

            self.layer = Layer()
        steps: list[MountStep]
        if spec.overlay:
            from ringfence.levels import overlay

            steps, sealed = overlay.root_steps(self), True
        elif own and spec.image == "host" and not (spec.mounts or spec.tmpfs or spec.devices) and self._extra is None:
            steps = [messages.bind(b"/", b"/t/" + HOST_TEMPLATE, RECURSIVE)]
            sealed = True
        else:
            from ringfence.levels import shown

            steps = shown.skeleton(self) + (self._extra(self) if self._extra is not None else [])
            sealed = False
        files = None
        if self.network_kind == "nat":
            from ringfence.levels.network.rules import NetworkFiles

            files = NetworkFiles(spec.image, self.hostname, self.user)
        steps += files.before if files else []
        host_proc = self.shared.is_own("user") and self.shared.kinds["pid"] == "host"
        steps += private_steps(self.user, host_proc=host_proc)
        if files:
            steps += files.after
            self._local_dns = files.missing
        if spec.limits.disk_bytes is None:
            steps.append(messages.bind(_HOME, self.run_path(name), self._work_flags))
        else:
            from ringfence.wire import layers

            steps.append(layers.place(_HOME, 0o700))
            if not spec.overlay:
                steps.insert(0, layers.memory_layer(spec.limits.disk_bytes))
        if spec.mounts or spec.tmpfs or spec.devices:
            steps += self._mounts()
        if not sealed:
            steps.append(messages.readonly(b"/"))
        return steps

    def _mounts(self) -> list[MountStep]:
        """The spec's own mounts and devices."""
        from ringfence.levels import shown

        steps = shown.mounts(self)
        if self.spec.devices:
            from ringfence.levels import devices

            steps += devices.container_steps(self, directories_above)
        if self.spec.overlay and self.layer is not None:
            self.layer.made_by_us(steps)
        return steps

    def run_path(self, name: bytes) -> bytes:
        """Where init finds a directory of the run folder."""
        return b"/t/run/" + name if self.host.privileged else os.path.join(self.state.run_path, name)

    def layer_folder(self) -> bytes:
        """An empty folder on disk for the layer, which init's root may write to; as init finds it."""
        self._folder = self.state.folder((self.base, self.base))
        return self.run_path(self._folder.name)

    @property
    def privileged(self) -> bool:
        return self.host.privileged

    def close(self) -> None:
        super().close()
        folder, self._folder = self._folder, None
        if folder is not None and self.ended:
            try:
                folder.remove()
            except OSError:
                os.close(folder.fd)  # the launcher removes what is left

    def user_mechanism(self) -> str:
        from ringfence.levels import told

        return told.container_user(self)

    def applied(self, outcome: Outcome) -> list[Applied]:
        from ringfence.levels import told

        return told.of_container(self, outcome)
