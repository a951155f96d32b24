"""The container level: namespaces decide what the workload sees, cgroups what it may use, capabilities and seccomp what
it may ask of the kernel.
"""

from __future__ import annotations

import os
import stat

from ringfence.errors import SpecError, Unmet
from ringfence.images import held, tree
from ringfence.levels import capabilities, filter, namespaces
from ringfence.levels.base import PLAIN_RULES, Ability, Level, Outcome
from ringfence.levels.limits import limit_abilities, limit_unmet
from ringfence.levels.local import LocalSandbox, open_local
from ringfence.levels.root import (
    device_steps,
    directories_above,
    host_template,
    no_host_files,
    own_directories,
    private_steps,
)
from ringfence.levels.state import State, state
from ringfence.levels.users import resolve
from ringfence.linux import ids, landlock, mounts, seccomp
from ringfence.result import Applied
from ringfence.spec.rules import Tmpfs
from ringfence.wire import messages
from ringfence.wire.messages import NODEV, NOEXEC, NOFOLLOW, NOSUID, RDONLY, RECURSIVE, MountStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ringfence.levels.host import Host
    from ringfence.levels.workdir import WorkDirectory
    from ringfence.spec import Mount, Spec

__all__ = ["ContainerLevel", "ContainerSandbox"]

_HOME = b"/work"
_HOSTNAME = "ringfence"
_USER = (1000, 1000)
_TEMPLATE = b"host"


class ContainerLevel(Level):
    name = "container"
    lasting = PLAIN_RULES - {"user"}

    def unavailable(self, host: Host, spec: Spec | None = None) -> tuple[str, str] | None:
        if host.user_namespaces:
            return host.user_namespaces, host.user_namespaces_help or "see 'ringfence doctor'"
        return host.ids

    def abilities(self, host: Host) -> Mapping[str, Ability]:
        from ringfence.levels.layer import why_no_overlay

        found = limit_abilities(host)
        found.update(no_host_files())
        found["hostname"] = Ability(rule="hostname", mechanism="UTS namespace")
        found["image"] = Ability(rule="image", mechanism="mount namespace, pivot_root")
        found["user"] = Ability(rule="user", mechanism="user namespace")
        found["mounts"] = Ability(rule="mounts", mechanism="mount namespace, mount_setattr")
        found["seccomp"] = filter.ability(host)
        found["capabilities"] = capabilities.ability("user namespace, ambient set")
        found["tmpfs"] = Ability(rule="tmpfs", mechanism="tmpfs with a size")
        found["disk"] = Ability(rule="disk", mechanism="a tmpfs with a size for the work directory and the overlay")
        missing = why_no_overlay(host)
        found["overlay"] = (
            Ability(rule="overlay", mechanism="overlayfs in the user namespace")
            if missing is None
            else Ability(rule="overlay", reason=missing[0], help=missing[1])
        )
        found["kernel"] = Ability(
            rule="kernel", reason="a container runs on the host's kernel", help="use isolation='vm'"
        )
        found["devices"] = Ability(
            rule="devices",
            mechanism="nodes of its own" if host.privileged else "the host's nodes, as the caller may use them",
        )
        found["namespaces"] = Ability(rule="namespaces", mechanism="clone3, setns, /proc/PID/timens_offsets")
        found["network=none"] = Ability(rule="network=none", mechanism="network namespace with only lo")
        found["network=host"] = Ability(rule="network=host", mechanism="the host's network namespace")
        nat = "a gateway outside, the only way out of a network namespace"
        found["network=nat"] = Ability(rule="network=nat", mechanism=nat)
        for rule in ("allow", "publish", "bandwidth"):
            found[rule] = Ability(rule=rule, mechanism=nat)
        return found

    def unmet(self, spec: Spec, host: Host) -> list[Unmet]:
        unmet = [*namespaces.unmet(spec, host), *limit_unmet(spec, host)]
        if spec.network.mode != "none":
            from ringfence.levels.network.rules import network_unmet

            unmet += network_unmet(spec)
        if spec.capabilities:
            unmet += capabilities.unmet(spec, host)
        if "seccomp" in spec.asked:
            unmet += filter.unmet(spec, host)
        elif not host.privileged:
            unmet += filter.cgroup_unmet(spec, host)
        if spec.overlay:
            from ringfence.levels.layer import overlay_unmet

            unmet += overlay_unmet(spec, host)
        if spec.devices:
            from ringfence.levels import devices

            unmet += devices.container_unmet(spec, privileged=host.privileged)
        if spec.image_is_disk:
            reason = "a disk image takes a kernel of its own: the host's is not to read what somebody made up"
            unmet.append(Unmet("image", spec.image, reason, "use isolation='vm', or unpack it into a folder"))
        elif spec.image != "host":
            tree.entries(spec.image)  # raises SpecError where it can't be shown
        if spec.user is not None and spec.namespaces.user == "own":
            try:
                uid, gid = resolve(spec.user, spec.image)
            except SpecError as error:
                unmet.append(Unmet("user", spec.user, str(error), "give a uid, or a user of the image"))
            else:
                if host.privileged and max(uid, gid) >= ids.CONTAINER_IDS:
                    unmet.append(
                        Unmet(
                            "user",
                            spec.user,
                            f"a container has the ids 0 to {ids.CONTAINER_IDS - 1}",
                            "choose one of them",
                        )
                    )
        return unmet

    def open(self, spec: Spec, host: Host, *, stays: bool = False) -> ContainerSandbox:
        return open_local(ContainerSandbox, spec, host, state(), stays=stays)


class ContainerSandbox(LocalSandbox):
    """extra: makes more steps of the file tree, for a VMM. extra_gid: a group of the host's that the command is in.
    guest: its network is that of the VMM's guest, who has it by a tap.
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
        self._hostname = spec.hostname or _HOSTNAME
        self._namespaces: dict[tuple[int, int] | None, int] = {}
        self.shared = namespaces.OWN
        self._subordinate = False
        self._unmapped: set[bytes] = set()
        super().__init__(spec, host, state, later=later, stays=stays)

    def _open(self) -> None:
        spec, host = self.spec, self._host
        uid, gid = resolve(spec.user, spec.image) if spec.user is not None else _USER
        if spec.namespaces.asked:
            self.shared = namespaces.choose(spec, host, self.keep_fd)
        shared = self.shared
        if not shared.is_own("user"):
            uid, gid = self._take_ids_elsewhere((uid, gid))
        elif host.privileged:
            group = min(gid, ids.CONTAINER_IDS - 1)
            self.berth = self.state.berth(
                f"container {uid}:{group}",
                lambda slot: (ids.container_base(slot) + uid, ids.container_base(slot) + group),
            )
            self._base = ids.container_base(self.berth.slot or 0)
            self._outside = self._base + uid, self._base + group
            uid_map = gid_map = b"0 %d %d" % (self._base, ids.CONTAINER_IDS)
            if self._extra_gid is not None:
                # A group of the host's, which nothing but the command itself is in: for /dev/kvm.
                gid = ids.CONTAINER_IDS
                gid_map += b"\n%d %d 1" % (gid, self._extra_gid)
            self._maps = (uid_map, gid_map)
        else:
            # One id, which is the caller's own outside. The workload isn't root inside unless that was asked for.
            self.berth = self.state.berth("container", None)
            self._maps = (b"%d %d 1" % (uid, os.geteuid()), b"%d %d 1" % (gid, os.getegid()))
            self._outside = os.geteuid(), os.getegid()
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
            plan.hostname(self._hostname.encode())
        if self._network_kind in ("none", "nat"):
            plan.loopback()
        plan.mounts(self._tree(berth.name))
        plan.ids(uid, gid)
        plan.flags(cgroup_namespace=shared.is_own("cgroup"), enter=True, no_new_privs=True)
        plan.workdir(_HOME)
        if self._subordinate:
            plan.give_back()
        own_ipc = shared.kinds["ipc"] != "host"
        self.put_filter(plan, lambda: seccomp.policy(namespaces=own_ipc, capabilities=spec.capabilities))
        if spec.capabilities:
            plan.capabilities(capabilities.mask(spec.capabilities))
        self._scope_sockets(plan)
        self.common_plan(plan)
        nat = self._network_kind == "nat"
        if nat:
            self.open_network(plan, local_dns=self._local_dns, guest=self._guest)
        joined = shared.joined
        request = messages.launch(
            clone_flags=shared.clone_flags & ~(namespaces.FLAGS["net"] if self._network_kind == "host" else 0),
            uid_map=self._maps[0] if shared.is_own("user") else None,
            gid_map=self._maps[1] if shared.is_own("user") else None,
            kill_uid=None if shared.is_own("pid") or not host.privileged else self._outside[0],
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

    def _map_subordinate(self, uid: int, gid: int) -> None:
        """An unprivileged caller's whole range of ids, where it has one. Its helpers take some milliseconds, so only
        where ids other than the workload's can matter.
        """
        from ringfence.linux import rootless

        given = rootless.known()
        if given.usable:
            self._maps = rootless.maps(given, uid, gid)
            self._subordinate = True

    @property
    def _network_kind(self) -> str:
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
            inside, self._outside = joined.outside(maps, given, _USER, privileged=self._host.privileged)
            outer = self._outside
            kind = f"container {outer} of another user namespace"
            self.berth = self.state.berth(kind, (lambda _: outer) if self._host.privileged else None)
            self._base = maps[0][0][1]
            self._maps = (b"%d %d %d" % maps[0][0], b"%d %d %d" % maps[1][0])
            self._namespaces[None] = user.fd
            return inside
        self.berth = self.state.berth("container, the host's ids", lambda slot: (ids.process_uid(slot),) * 2)
        own = ids.process_uid(self.berth.slot or 0)
        self._base = 0
        self._maps = (b"0 0 4294967295",) * 2
        self._outside = own, own
        return own, own

    def _scope_sockets(self, plan: messages.Plan) -> None:
        """Abstract UNIX sockets belong to the network namespace. Landlock keeps the host's out of reach."""
        if self._network_kind == "host" and self._host.landlock_abi >= landlock.SCOPES_ABI:
            plan.landlock(self.keep_fd(landlock.Ruleset(files=False).detach()))

    # ---- the file tree ----

    def _tree(self, name: bytes) -> list[MountStep]:
        """The steps of the sandbox's root. Where nothing but the host's userland is asked for, the launcher has it
        ready: one clone of a tree.
        """
        spec = self.spec
        own = self._host.privileged
        if own and spec.image == "host":
            self.state.template(_TEMPLATE, host_template)
        layered = spec.overlay or spec.limits.disk_bytes is not None
        if layered or spec.tmpfs:
            from ringfence.levels.layer import Layer

            self.layer = Layer()
        steps: list[MountStep]
        if spec.overlay:
            from ringfence.levels import overlay

            steps, sealed = overlay.root_steps(self), True
        elif own and spec.image == "host" and not (spec.mounts or spec.tmpfs or spec.devices) and self._extra is None:
            steps = [messages.bind(b"/", b"/t/" + _TEMPLATE, RECURSIVE)]
            sealed = True
        else:
            steps = self._skeleton() + (self._extra(self) if self._extra is not None else [])
            sealed = False
        files = None
        if self._network_kind == "nat":
            from ringfence.levels.network.rules import NetworkFiles

            files = NetworkFiles(spec.image, self._hostname, self.user)
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
        shown = self._mounts()
        if spec.devices:
            from ringfence.levels import devices

            shown += devices.container_steps(self, directories_above)
        if spec.overlay and self.layer is not None:
            self.layer.made_by_us(shown)
        steps += shown
        if not sealed:
            steps.append(messages.readonly(b"/"))
        return steps

    def run_path(self, name: bytes) -> bytes:
        """Where init finds a directory of the run folder."""
        return b"/t/run/" + name if self._host.privileged else os.path.join(self.state.run_path, name)

    def _skeleton(self) -> list[MountStep]:
        """A root built step by step, of the image's top-level entries."""
        spec = self.spec
        own = self._host.privileged
        # What was a folder a moment ago may be a symlink to anywhere by now.
        flags = RDONLY | NOSUID | NODEV | RECURSIVE | NOFOLLOW
        image = None
        if spec.image == "host":
            entries, folder = tree.host_entries(), b"/t/" + _TEMPLATE if own else b""
        else:
            image = self.hold_image()
            entries, folder = tree.entries(spec.image, image), os.fsencode(spec.image)
        steps = own_directories()
        for entry in entries:
            at = b"/" + entry.name
            if entry.kind == "symlink":
                steps.append(messages.symlink(at, entry.target))
                continue
            steps.append(messages.directory(at) if entry.kind == "directory" else messages.file(at))
            source: bytes | int = folder + at
            if own and image is not None:
                one = held.entry(image, entry.name, entry.kind)
                try:
                    source = self._detached(folder + at, held=one)
                finally:
                    os.close(one)
            steps.append(messages.bind(at, source, flags))
        steps += device_steps(self.standard_device)
        if spec.image == "host" and not own:
            steps += [messages.mask(path) for path in tree.host_secrets()]
        return steps

    def hold_image(self) -> int:
        """A descriptor of the image's folder, by which all of it is taken."""
        try:
            return self.keep_fd(held.open_real(self.spec.image))
        except OSError as error:
            raise SpecError(f"image: {self.spec.image!r} can't be read ({error.strerror})") from None

    def userland(self, at: bytes) -> list[MountStep]:
        """The steps that show the host's userland once more, beneath `at`: what a VMM hands on to its guest."""
        flags = RDONLY | NOSUID | NODEV | NOEXEC | RECURSIVE
        prefix = b"/t/" + _TEMPLATE if self._host.privileged else b""
        steps = []
        for entry in tree.host_entries():
            if entry.kind == "symlink":
                continue  # the guest makes its own
            below = at + b"/" + entry.name
            steps.append(messages.directory(below) if entry.kind == "directory" else messages.file(below))
            steps.append(messages.bind(below, prefix + b"/" + entry.name, flags))
        if not self._host.privileged:
            steps += [messages.mask(at + path) for path in tree.host_secrets()]
        return steps

    def device(self, path: bytes) -> bytes | int:
        """A device of the host's, as the source of a mount."""
        return self.keep_fd(mounts.clone_tree(path)) if self._host.privileged else path

    @property
    def privileged(self) -> bool:
        return self._host.privileged

    def outside_gid(self) -> int:
        """The workload's group, as the host numbers it."""
        for line in self._maps[1].splitlines():
            first, outside, count = map(int, line.split())
            if first <= self.user[1] < first + count:
                return outside + self.user[1] - first
        raise AssertionError("the workload's group is in its map")

    def layer_folder(self) -> bytes:
        """An empty folder on disk for the layer, which init's root may write to; as init finds it."""
        self._folder = self.state.folder((self._base, self._base))
        return self.run_path(self._folder.name)

    def lower(self, path: bytes, image: int | None = None, entry: tree.Entry | None = None) -> bytes | int:
        """A lower layer: a mount on which the ids on disk are the same ids inside, so that a copy has an owner. image,
        entry: a descriptor of the image's folder, and what of it is meant.
        """
        if not self._host.privileged:
            return path
        if image is not None and entry is not None:
            one = held.entry(image, entry.name, entry.kind)
            try:
                fd = self.keep_fd(mounts.clone_tree(b"", recursive=False, at=one))
            finally:
                os.close(one)
        else:
            fd = self.keep_fd(mounts.clone_tree(path, recursive=False, follow=False))
        if not mounts.set_idmap(fd, self._user_namespace(None)):
            raise SpecError(f"overlay: the file system of {os.fsdecode(path)} can't map ids")
        return fd

    def roots_own(self, path: bytes) -> int:
        """A file system without what is mounted below it, on which what is the host's root's is root's inside, and all
        else nobody's.
        """
        root = b"0 %d 1" % self._base
        fd = self.keep_fd(mounts.clone_tree(path, recursive=False, follow=False))
        if not mounts.set_idmap(fd, self.keep_fd(self.state.launcher.user_namespace(root, root))):
            raise SpecError(f"overlay: the file system of {os.fsdecode(path)} can't map ids")
        return fd

    def as_it_is(self, path: bytes, image: int | None = None) -> bytes | int:
        """A file system with all that is mounted below it, where ids on disk are nobody's inside: what only its owner
        may read stays so, to root inside too. image: a descriptor of the image's folder, which the path is in.
        """
        if not self._host.privileged:
            return path
        if image is None:
            return self.keep_fd(mounts.clone_tree(path, follow=False))
        try:
            point = held.beneath(image, path[len(os.fsencode(self.spec.image)) :])
        except OSError:
            raise held.replaced(path) from None
        try:
            return self.keep_fd(mounts.clone_tree(b"", at=point))
        finally:
            os.close(point)

    def close(self) -> None:
        super().close()
        folder, self._folder = self._folder, None
        if folder is not None and self.ended:
            try:
                folder.remove()
            except OSError:
                os.close(folder.fd)  # the launcher removes what is left

    def standard_device(self, path: bytes) -> bytes | int:
        """A standard node: the template's, where there is one."""
        if self._host.privileged and self.spec.image == "host":
            return b"/t/" + _TEMPLATE + path
        return self.device(path)

    def _detached(
        self,
        path: bytes,
        owner: tuple[int, int] | None = None,
        *,
        must: bool = False,
        held: int | None = None,
    ) -> int:
        """A detached mount of a host path. owner: (uid, gid) on disk that the workload is to be; else ids on disk are
        the same ids inside. Where the file system can't map ids they are nobody's, which does for what all may read.
        held: a descriptor of what the path was found to be.
        """
        tree = mounts.clone_tree(path) if held is None else mounts.clone_tree(b"", at=held)
        fd = self.keep_fd(tree)
        if not mounts.set_idmap(fd, self._user_namespace(owner)):
            if must:
                raise SpecError(
                    f"mounts: the file system of {os.fsdecode(path)} can't map ids, so nothing could be written there"
                )
            self._unmapped.add(path)
        return fd

    def _user_namespace(self, owner: tuple[int, int] | None) -> int:
        """A user namespace to map the ids of a mount by; made once for each owner."""
        if owner not in self._namespaces:
            if owner is None:
                maps = self._maps
            else:
                maps = (
                    b"%d %d 1" % (owner[0], self._outside[0]),
                    b"%d %d 1" % (owner[1], self._outside[1]),
                )
            self._namespaces[owner] = self.keep_fd(self.state.launcher.user_namespace(*maps))
        return self._namespaces[owner]

    def host_mount(
        self,
        source: bytes,
        target: bytes,
        flags: int,
        *,
        must: bool = False,
        secret: bool = True,
        expected: tuple[int, int] | None = None,
    ) -> list[MountStep]:
        """The steps that show a host path at `target`: what its owner owns outside, the workload owns inside.

        secret: whether it may be one. expected: (st_dev, st_ino) of the regular file that it was, by a real path; None:
        whatever the path leads to. Raises SpecError.
        """
        # Opened once: whoever may write to a folder on the way could swap it between a look and another.
        if expected is None:
            found = os.open(source, os.O_PATH | os.O_CLOEXEC)
        else:
            found = held.regular(source, expected)
            flags |= NOFOLLOW  # an unprivileged caller's init opens it once more
        try:
            about = os.fstat(found)
            if not secret and (reason := _why_secret(found)):
                raise SpecError(f"mounts: {os.fsdecode(source)} has become what would show a secret: {reason}")
            if not self._host.privileged and not flags & RDONLY and _lifts_limits(self.spec, found):
                raise SpecError(f"mounts: {os.fsdecode(source)} shows cgroups, and the workload's user owns its own")
            what: bytes | int = source
            if self._host.privileged:
                what = self._detached(source, (about.st_uid, about.st_gid), must=must, held=found)
        finally:
            os.close(found)
        steps = directories_above(target)
        steps.append(messages.directory(target) if stat.S_ISDIR(about.st_mode) else messages.file(target))
        return [*steps, messages.bind(target, what, flags | RECURSIVE)]

    def _mounts(self) -> list[MountStep]:
        """The spec's own mounts, parents first."""
        steps: list[MountStep] = []
        both: list[Mount | Tmpfs] = [*self.spec.mounts, *self.spec.tmpfs]
        for one in sorted(both, key=lambda one: one.target):
            if isinstance(one, Tmpfs):
                from ringfence.wire import layers

                steps += [*directories_above(one.target), messages.directory(one.target)]
                steps.append(layers.tmpfs(one.target, one.size_bytes, one.mode, self.user))
            else:
                flags = NOSUID | NODEV | (0 if one.writable else RDONLY)
                steps += self.host_mount(one.source, one.target, flags, must=one.writable, secret=one.secret)
        return steps

    # ---- telling ----

    def user_mechanism(self) -> str:
        user = self.shared.kinds["user"]
        if user == "host":
            return "the host's user namespace: an id that no account has"
        if user != "own":
            return f"a joined user namespace: {self._outside[0]}:{self._outside[1]} outside"
        if not self._host.privileged:
            how = "all others by newuidmap" if self._subordinate else "no other is mapped"
            return f"user namespace: id {self.user[0]} is {os.geteuid()} outside, {how}"
        inside = self._maps[0].split()
        return f"user namespace: id {inside[0].decode()} is {inside[1].decode()} outside, {inside[2].decode()} mapped"

    def applied(self, outcome: Outcome) -> list[Applied]:
        found = super().applied(outcome)
        started = outcome.started
        if started is None:
            return found
        spec = self.spec
        found.append(
            Applied(rule="hostname", requested=spec.hostname, effective=started.hostname, mechanism="UTS namespace")
        )
        found += namespaces.applied(spec, self.shared, outcome, host_network=self._network_kind == "host")
        if self.network is not None:
            found += self.network.applied(spec.asked)
        mode = self._network_kind
        # What wasn't told is never a restriction.
        host_net = namespaces.own_namespaces().get("net")
        own_net = started.namespaces.get("net", host_net) != host_net
        if self.network is None:
            found.append(
                Applied(
                    rule="network",
                    requested=mode if "network" in spec.asked else None,
                    effective=mode if own_net == (mode != "host") else None,
                    mechanism="a joined network namespace"
                    if mode == "joined"
                    else _network_mechanism(own_net, started.landlock),
                )
            )
        found.append(
            Applied(
                rule="files",
                requested=spec.image if "image" in spec.asked else None,
                effective=f"{spec.image}, {'below an overlay' if spec.overlay else 'read-only'};"
                " its own /tmp, /dev and /proc; /run and /home empty",
                mechanism="mount namespace, pivot_root",
            )
        )
        if self.layer is not None:
            found += self.layer.applied(spec)
        for device in spec.devices:
            found.append(
                Applied(
                    rule=f"device {os.fsdecode(device.target)}",
                    requested=device.access,
                    effective=device.access,
                    mechanism="a node of its own, by its mode" if self.privileged else "the host's node, by its mode",
                )
            )
        for mount in spec.mounts:
            shown = "writable" if mount.writable else "read-only"
            found.append(
                Applied(
                    rule=f"mount {os.fsdecode(mount.target)}",
                    requested=shown,
                    effective=shown,
                    mechanism="bind, mount_setattr"
                    + ("; its file system can't map ids: all are nobody's" if mount.source in self._unmapped else ""),
                )
            )
        return found


def _lifts_limits(spec: Spec, held: int) -> bool:
    """Whether what a writable mount shows is where the limits of the sandbox could be changed."""
    from ringfence.levels import owned

    return not spec.asked.isdisjoint(owned.CGROUP_LIMITS) and owned.shows_cgroups(held)


def _why_secret(held: int) -> str:
    from ringfence.images.secrets import why_secret

    return why_secret(os.fsencode(os.readlink(f"/proc/self/fd/{held}")))


def _network_mechanism(own: bool, scoped: bool) -> str:
    if own:
        return "network namespace with only lo"
    return "the host's network namespace" + (", less its abstract UNIX sockets (Landlock)" if scoped else "")
