"""What a container can enforce on a host, and what of a spec it can't."""

from __future__ import annotations

from ringfence.errors import SpecError, Unmet
from ringfence.images import tree
from ringfence.levels import capabilities, filter, namespace_rules
from ringfence.levels.base import Ability
from ringfence.levels.limit_rules import limit_abilities, limit_unmet
from ringfence.levels.root import no_host_files
from ringfence.levels.users import resolve
from ringfence.linux import ids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.levels.host import Host
    from ringfence.spec import Spec

__all__ = ["abilities", "unmet"]


def abilities(host: Host) -> dict[str, Ability]:
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
    found["kernel"] = Ability(rule="kernel", reason="a container runs on the host's kernel", help="use isolation='vm'")
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


def unmet(spec: Spec, host: Host) -> list[Unmet]:
    unmet = [*namespace_rules.unmet(spec, host), *limit_unmet(spec, host)]
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
