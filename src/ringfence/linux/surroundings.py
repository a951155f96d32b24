"""What stands in a sandbox's way on this host: switches that are off, and the container or chroot that we are in.

Each obstacle comes with its remedy in one line. Sources: user_namespaces(7), clone(2), unshare(2), the kernel's
mount_too_revealing, Docker's default seccomp profile, Ubuntu's AppArmor documentation ("Restricted unprivileged user
namespaces").
"""

from __future__ import annotations

import os

from ringfence._value import Value
from ringfence.linux import read_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Surroundings", "find", "number", "text"]

_SYS_ADMIN, _SETFCAP = 21, 31
_FOLDER_OF_PROFILES = "etc/apparmor.d"
# How each engine shows that a process is in one of its containers: a file, or a part of a cgroup's path.
_FILES = (
    (".dockerenv", "Docker"),
    ("run/.containerenv", "Podman"),
    ("var/run/secrets/kubernetes.io/serviceaccount", "Kubernetes"),
    ("dev/.lxd-mounts", "LXD"),
)
_CGROUPS = (
    ("/kubepods", "Kubernetes"),
    ("/docker", "Docker"),
    ("/libpod", "Podman"),
    ("/lxc", "LXC"),
    ("/machine.slice/machine-", "systemd-nspawn"),
)
# What Docker takes away, and the option that gives it back.
_DOCKER = {
    "filter": "--security-opt seccomp=unconfined",
    "capability": "--cap-add SYS_ADMIN",
    "masks": "--security-opt systempaths=unconfined",
}


# The kernel's own mount points below /proc, which are empty: what is mounted there hides nothing.
_EMPTY_POINTS = ("/sys/fs/binfmt_misc", "/fs/nfsd")


class Surroundings(Value):
    """As found. engine: whose container this process is in, or "". filtered: a seccomp filter is on us already.
    sys_admin: CAP_SYS_ADMIN is effective. lone_root: uid 0 without CAP_SETFCAP. masked: how many mounts hide parts of
    /proc. chroot: our root is none of the mount namespace's. profiled: whether AppArmor's restriction names our helper
    as an exception; None without it. has_user, most_user, clone_switch: of user namespaces: the kernel's, the sysctls',
    None where there is no such.
    """

    __slots__ = (
        "chroot",
        "clone_switch",
        "engine",
        "filtered",
        "has_user",
        "lone_root",
        "masked",
        "most_user",
        "profiled",
        "sys_admin",
    )
    engine: str
    filtered: bool
    sys_admin: bool
    masked: int
    chroot: bool
    lone_root: bool
    profiled: bool | None
    has_user: bool
    most_user: int | None
    clone_switch: int | None

    def __init__(
        self,
        *,
        engine: str = "",
        filtered: bool = False,
        sys_admin: bool = False,
        masked: int = 0,
        chroot: bool = False,
        lone_root: bool = False,
        profiled: bool | None = None,
        has_user: bool = True,
        most_user: int | None = None,
        clone_switch: int | None = None,
    ) -> None:
        self._set(
            engine=engine,
            filtered=filtered,
            sys_admin=sys_admin,
            masked=masked,
            chroot=chroot,
            lone_root=lone_root,
            profiled=profiled,
            has_user=has_user,
            most_user=most_user,
            clone_switch=clone_switch,
        )

    def no_user_namespaces(self, *, privileged: bool, helper: str = "") -> tuple[str, str] | None:
        """Why no user namespace serves here, and the remedy; None where nothing is seen that stands in the way.

        helper: the program that makes them.
        """
        where = f" on the host, from outside {self.engine}" if self.engine else ""
        if not self.has_user:
            return "this kernel has no user namespaces (CONFIG_USER_NS)", "use another kernel"
        if self.most_user == 0:
            reason = "user namespaces are switched off (sysctl user.max_user_namespaces is 0)"
            return reason, f"as root{where}: sysctl -w user.max_user_namespaces=10000"
        if self.chroot:
            reason = "this process is in a chroot, where the kernel makes no user namespace"
            return reason, "start it outside, or let its root be a mount of its own (pivot_root)"
        if privileged:
            return None
        if self.clone_switch == 0:
            reason = "user namespaces are for root only (sysctl kernel.unprivileged_userns_clone is 0)"
            return reason, f"as root{where}: sysctl -w kernel.unprivileged_userns_clone=1"
        if self.profiled is False:
            reason = "AppArmor restricts user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns is 1)"
            profile = f"abi <abi/4.0>, profile ringfence {helper} flags=(unconfined) {{ userns, }}"
            return (
                reason,
                f"as root: echo '{profile}' > /etc/apparmor.d/ringfence; apparmor_parser -r /etc/apparmor.d/ringfence",
            )
        if self.lone_root:
            reason = "uid 0 can only be mapped with CAP_SETFCAP (Linux 5.12), which this process lacks"
            return reason, "run as another user, or docker run --cap-add SETFCAP"
        if self.masked:
            reason = "parts of /proc are hidden here, so the kernel lets no user namespace mount a /proc of its own"
            remedy = "docker run " + _DOCKER["masks"] if self.engine else "unmount what lies below /proc"
            return reason, f"{remedy}; or use isolation='process'"
        return None

    def told(self) -> tuple[str, str]:
        """Where we are and what is missing, for a reader; and how that engine gives it. ("", "") where in none."""
        lacking = []
        remedies = []
        if self.filtered:
            lacking.append("its seccomp filter denies namespaces and mounts")
            remedies.append(_DOCKER["filter"])
        if not self.sys_admin:
            lacking.append("CAP_SYS_ADMIN is missing")
            remedies.append(_DOCKER["capability"])
        if self.masked:
            lacking.append("parts of /proc are hidden")
            remedies.append(_DOCKER["masks"])
        if not self.engine:
            return "", ""
        if not lacking:
            return f"inside {self.engine}, and nothing of what sandboxes take is missing", ""
        detail = f"inside {self.engine}: {', '.join(lacking)}. The process level works; the others may not"
        return detail, f"docker run {' '.join(remedies)} (or what {self.engine} calls these)"


def find(
    root: str = "/",
    *,
    helper: str = "",
    environ: Mapping[str, str] | None = None,
    mounts: bool = True,
    engine: bool = True,
) -> Surroundings:
    """root: where proc, etc and run are, for tests. mounts: whether to look at the mount table, which may be long.
    engine: whether to look for whose container this is, which takes many files.
    """
    status = _status(root)
    capabilities = int(status.get("CapEff", "0"), 16)
    masked, chroot = _look_at_mounts(root) if mounts else (0, False)
    restricted = number(root, "proc/sys/kernel/apparmor_restrict_unprivileged_userns") == 1
    return Surroundings(
        engine=_engine(root, os.environ if environ is None else environ) if engine else "",
        filtered=status.get("Seccomp") == "2",
        sys_admin=bool(capabilities >> _SYS_ADMIN & 1),
        masked=masked,
        chroot=chroot,
        lone_root=status.get("Uid", "").split()[1:2] == ["0"] and not capabilities >> _SETFCAP & 1,
        profiled=_has_profile(root, helper) if restricted else None,
        has_user=os.path.lexists(os.path.join(root, "proc/self/ns/user")),
        most_user=number(root, "proc/sys/user/max_user_namespaces"),
        clone_switch=number(root, "proc/sys/kernel/unprivileged_userns_clone"),
    )


def text(root: str, name: str) -> str:
    """A file's text; "" where it can't be read."""
    try:
        return read_text(os.path.join(root, name), "replace")
    except OSError:
        return ""


def number(root: str, name: str) -> int | None:
    """The number that a file holds; None where it can't be read, or holds something else."""
    said = text(root, name).strip()
    return int(said) if said.isdecimal() else None


def _status(root: str) -> dict[str, str]:
    lines = (line.partition(":") for line in text(root, "proc/self/status").splitlines())
    return {name: value.strip() for name, _, value in lines}


def _engine(root: str, environ: Mapping[str, str]) -> str:
    # Kubernetes first: it is run by one of the others.
    if "KUBERNETES_SERVICE_HOST" in environ:
        return "Kubernetes"
    for name, engine in _FILES:
        if os.path.lexists(os.path.join(root, name)):
            return engine
    # systemd's convention (Container Interface), followed by LXC and nspawn too.
    said = text(root, "run/systemd/container").strip() or environ.get("container", "")
    if said:
        return {"docker": "Docker", "podman": "Podman", "lxc": "LXC", "oci": "a container"}.get(said, said[:40])
    paths = text(root, "proc/self/cgroup") + text(root, "proc/1/cgroup")
    return next((engine for part, engine in _CGROUPS if part in paths), "")


def _look_at_mounts(root: str) -> tuple[int, bool]:
    """(how many mounts hide parts of every /proc, whether no mount is our root)."""
    mounts = []
    for line in text(root, "proc/self/mountinfo").split("\n"):
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) > 5:
            mounts.append((fields[3], fields[4], after.split(" ")[0]))
    points = [point for _, point, _ in mounts]
    # One /proc that is whole is enough.
    hidden = [
        sum(other.startswith(f"{point}/") and other[len(point) :] not in _EMPTY_POINTS for other in points)
        for inside, point, kind in mounts
        if kind == "proc" and inside == "/"
    ]
    return min(hidden, default=0), bool(points) and "/" not in points


def _has_profile(root: str, helper: str) -> bool:
    """Whether an AppArmor profile of the folder that they are loaded from lets that program make user namespaces."""
    folder = os.path.join(root, _FOLDER_OF_PROFILES)
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    for name in names:
        said = text(folder, name) if os.path.isfile(os.path.join(folder, name)) else ""
        if helper and helper in said and "userns" in said:
            return True
    return False
