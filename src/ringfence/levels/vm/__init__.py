"""The vm level: a whole operating system, its own kernel included, on virtual hardware.

The VMM, QEMU, is itself the workload of a container sandbox: it has no network, no capabilities, an id that owns
nothing, and of the host's files it sees its own programs and what the guest is to see.
"""

from __future__ import annotations

import os

from ringfence.errors import SpecError, Unavailable, Unmet
from ringfence.levels import filter
from ringfence.levels.base import Ability, Level, requested
from ringfence.levels.limit_rules import cpuset_unmet, limit_abilities
from ringfence.levels.root import no_host_files
from ringfence.levels.users import resolve
from ringfence.levels.vm import card
from ringfence.levels.vm.sandbox import VmSandbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringfence.levels.host import Host
    from ringfence.levels.vm.kernel import GuestKernel
    from ringfence.spec import Spec

__all__ = ["VmLevel", "VmSandbox"]

_MOST_CPUS = 64
# Each takes descriptors of the frame that plans QEMU's jail, of which there are 64, and up to two of these steps.
_MOST_MOUNTS = 32


class VmLevel(Level):
    name = "vm"
    warms_up = True

    def unavailable(
        self, host: Host, spec: Spec | None = None, *, kernel_needed: bool = True
    ) -> tuple[str, str] | None:
        """As every level's. kernel_needed: False where the guest brings its own in any case."""
        from ringfence.levels.vm import emulator, kernel

        if host.machine != "x86_64":
            return f"the guest's machine is x86_64, this one is {host.machine}", "use isolation='container'"
        try:
            board = emulator.look().machine()
        except Unavailable as error:
            return error.reason, error.help
        if host.user_namespaces:
            return f"QEMU is jailed in a container, and {host.user_namespaces}", "see 'ringfence doctor'"
        if not kernel_needed or (spec is not None and spec.kernel is not None):
            return host.ids  # what a spec's own kernel can't do is unmet
        found = kernel.find()
        if found is None:
            return "the guest's kernel isn't prepared", "run 'ringfence setup'"
        if board == "q35" and "pci" not in found.sets:
            return f"kernel {found.release} has no virtio_pci, which QEMU's machine q35 needs", "unset RINGFENCE_KERNEL"
        return host.ids

    def abilities(self, host: Host) -> Mapping[str, Ability]:
        from ringfence.levels.vm import kernel

        return self._abilities_with(kernel.find(), host)

    def abilities_for(self, spec: Spec, host: Host) -> Mapping[str, Ability]:
        # What a kernel of its own hasn't is told by `unmet`, of that kernel.
        return self.abilities(host) if spec.kernel is None else self._abilities_with(None, host)

    def _abilities_with(self, guest: GuestKernel | None, host: Host) -> Mapping[str, Ability]:
        cgroup = "the guest's cgroup v2"
        found = {
            "memory": f"the guest's memory, and {cgroup} memory.max",
            "cpus": f"virtual CPUs, and {cgroup} cpu.max",
            "pids": f"{cgroup} pids.max",
            "cpu_time": f"the guest's init, by {cgroup} cpu.stat",
            "wall_time": "the caller's clock",
            "output": "the channel",
            "hostname": "the guest's own kernel",
            "kernel": "the guest's own kernel, read back by uname",
            "image": "9p share of the host's userland, an erofs disk of a folder, or a raw or qcow2 disk",
            "user": "the guest's own kernel",
            "mounts": "9p shares",
            "capabilities": "the guest's own kernel",
            "network=none": "no network card",
            "disk": "a tmpfs with a size in the guest, for the work directory and the overlay",
            "tmpfs": "tmpfs with a size in the guest",
        }
        abilities = {rule: Ability(rule=rule, mechanism=mechanism) for rule, mechanism in found.items()}
        local = limit_abilities(host)
        for rule in ("cpu_weight", "cpuset"):
            one = local[rule]
            mechanism = f"of QEMU: {one.mechanism}"
            abilities[rule] = Ability(rule=rule, mechanism=mechanism) if one.available else one
        abilities["swap"] = Ability(
            rule="swap", reason="a guest's kernel has no swap", help="leave it out: memory alone allows none"
        )
        for rule in ("io_read", "io_write", "io_read_ops", "io_write_ops"):
            abilities[rule] = Ability(
                rule=rule, reason="a guest's work directory is in its memory", help="use isolation='container'"
            )
        abilities["seccomp"] = filter.ability(host)
        abilities.update(no_host_files())
        abilities["overlay"] = _overlay_ability(guest)
        abilities["devices"] = Ability(
            rule="devices",
            reason="a guest has devices of its own, and none of the host's",
            help="use isolation='container'",
        )
        abilities["namespaces"] = Ability(
            rule="namespaces",
            reason="a guest's kernel has namespaces of its own, and shares none with the host's",
            help="use isolation='container'",
        )
        abilities["network=host"] = Ability(
            rule="network=host",
            reason="a virtual machine has a network stack of its own",
            help="use isolation='container'",
        )
        abilities.update(card.abilities(guest.sets if guest is not None else ("net",)))
        return abilities

    def unmet(self, spec: Spec, host: Host) -> list[Unmet]:
        guest, unmet = _guest_kernel(spec)
        unmet += cpuset_unmet(spec, host)
        if isinstance(spec.user, str):
            try:
                resolve(spec.user, spec.image)
            except SpecError as error:
                unmet.append(Unmet("user", spec.user, str(error), "give a uid, or a user of the image"))
        if spec.image_is_disk:
            from ringfence.images import disk

            try:
                disk.inspect(spec.image)
            except SpecError as error:
                unmet.append(Unmet("image", spec.image, str(error), "give a raw or qcow2 image that is one file"))
        if spec.limits.cpus is not None and spec.limits.cpus > _MOST_CPUS:
            unmet.append(Unmet("cpus", spec.limits.cpus, f"a guest has at most {_MOST_CPUS} CPUs", "ask for fewer"))
        if not host.privileged:
            unmet += _unjailed(spec, host)
        if "seccomp" in spec.asked:
            unmet += filter.unmet(spec, host, kernel=guest.release if guest is not None else "")
        if spec.overlay and spec.image == "host":
            from ringfence.levels.vm import userland

            unmet += userland.overlay_unmet(spec, host)
        unmet += card.unmet(spec)
        if len(spec.mounts) > _MOST_MOUNTS:
            reason = f"a guest takes at most {_MOST_MOUNTS} mounts"
            unmet.append(Unmet("mounts", requested(spec, "mounts"), reason, "mount their parent"))
        return unmet

    def open(self, spec: Spec, host: Host, *, stays: bool = False) -> VmSandbox:
        return VmSandbox(spec, host, stays=stays)


def _unjailed(spec: Spec, host: Host) -> list[Unmet]:
    """The limits that an unprivileged caller's QEMU could lift, were it taken over: its user owns the jail's cgroup."""
    from ringfence.levels import owned

    # The others are the guest's own kernel's.
    limits = sorted(spec.asked & (owned.CGROUP_LIMITS - {"pids", "cpu_time"}))
    help = "install libseccomp: 'ringfence setup', or run as root"
    reason = f"QEMU's jail would have no filter, and its user owns its cgroup: {host.seccomp}"
    found = [Unmet(rule, requested(spec, rule), reason, help) for rule in limits if host.seccomp]
    for mount in spec.mounts:
        if mount.writable and owned.shows_cgroups(mount.source):
            reason = owned.why_not_writable(mount.source)
            found.append(Unmet("mounts", os.fsdecode(mount.source), reason, "leave cgroups out of what is writable"))
    return found


def _guest_kernel(spec: Spec) -> tuple[GuestKernel | None, list[Unmet]]:
    """The kernel for a spec, made ready where it is the spec's own, and what of the spec that one can't do."""
    if spec.kernel is None:
        from ringfence.levels.vm import kernel

        return (kernel.find() if "seccomp" in spec.asked else None), []
    from ringfence.levels.vm import emulator, own_kernel, start

    path = os.fsdecode(spec.kernel.path)
    try:
        found = own_kernel.prepare(spec.kernel, progress=start.progress)
    except Unavailable as error:
        help = error.help or "name another kernel, such as Debian's generic one"
        return None, [Unmet("kernel", path, error.reason, help)]
    except SpecError as error:
        return None, [Unmet("kernel", path, str(error), "give a kernel that stays as it is")]
    return found, own_kernel.unmet(spec, found, emulator.look().machine())


def _overlay_ability(found: GuestKernel | None) -> Ability:
    if found is None or "overlay" in found.sets:
        return Ability(rule="overlay", mechanism="overlayfs in the guest")
    return Ability(rule="overlay", reason="the guest's kernel has no overlayfs", help="use isolation='container'")
