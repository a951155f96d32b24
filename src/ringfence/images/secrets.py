"""Where a host keeps what is nobody else's business: what a mount may not show unless the caller says that it is meant.

A list of known places can't be complete. It is here to catch what is mounted without a thought.
"""

from __future__ import annotations

import os
import stat

from ringfence.images.kernel_mounts import kernel_mount_of, kernel_mounts
from ringfence.images.masked import MASKED

__all__ = ["why_secret"]

# Folders and files that are secret as a whole, with all below them, wherever the host has them.
_PLACES = (
    *MASKED,
    *(b"/proc", b"/sys/kernel/security", b"/sys/kernel/debug", b"/sys/firmware/efi/efivars", b"/dev/mem"),
    *(b"/run", b"/var/run", b"/dev/tpm0", b"/dev/tpmrm0", b"/dev/kmem", b"/dev/port"),
    *(b"/var/lib/docker", b"/var/lib/containers", b"/var/lib/containerd", b"/var/lib/kubelet", b"/var/lib/rancher"),
    *(
        b"/var/lib/cloud",
        b"/var/lib/waagent",
        b"/var/lib/amazon",
        b"/var/lib/google",
        b"/var/lib/systemd/credential.secret",
    ),
    *(b"/var/lib/sss", b"/var/lib/samba/private", b"/var/lib/krb5kdc", b"/var/lib/tpm2-tss", b"/var/lib/libvirt"),
    *(b"/var/lib/NetworkManager", b"/var/lib/bluetooth", b"/var/lib/vault", b"/var/spool/cron", b"/var/backups"),
)

# In whosever folder: names that mean credentials, keys, or a door to an agent or an engine.
_NAMES = frozenset(
    (
        *(
            b".ssh",
            b".gnupg",
            b".password-store",
            b".pki",
            b".netrc",
            b".authinfo",
            b".authinfo.gpg",
            b".pgpass",
            b".my.cnf",
        ),
        *(
            b".git-credentials",
            b".npmrc",
            b".yarnrc.yml",
            b".pypirc",
            b".boto",
            b".s3cfg",
            b".htpasswd",
            b".vault-token",
        ),
        *(b".aws", b".azure", b".kube", b".docker", b".oci", b".terraform.d", b".terraformrc", b".fly", b".snowflake"),
        *(b".databrickscfg", b".cloudflared", b".mozilla", b".thunderbird", b".bash_history", b".zsh_history"),
        *(b".python_history", b".psql_history", b".mysql_history", b".Xauthority", b".ICEauthority"),
        *(b"id_rsa", b"id_ed25519", b"id_ecdsa", b"id_dsa", b"kubeconfig"),
        *(b"docker.sock", b"podman.sock", b"containerd.sock", b"crio.sock", b"buildkitd.sock", b"S.gpg-agent"),
        *(b"S.gpg-agent.ssh", b"system_bus_socket", b"kubelet.sock"),
    )
)
# The same, where only the end of a path tells.
_TAILS = (
    *(
        b".config/gcloud",
        b".config/gh",
        b".config/hub",
        b".config/doctl",
        b".config/op",
        b".config/rclone",
        b".config/sops",
    ),
    *(
        b".config/google-chrome",
        b".config/chromium",
        b".config/BraveSoftware",
        b".config/microsoft-edge",
        b".config/Bitwarden",
    ),
    *(b".config/git/credentials", b".config/containers/auth.json", b".config/pip/pip.conf", b".config/systemd/user"),
    *(
        b".cargo/credentials",
        b".cargo/credentials.toml",
        b".gem/credentials",
        b".m2/settings.xml",
        b".gradle/gradle.properties",
    ),
    *(
        b".local/share/keyrings",
        b".local/share/containers",
        b".local/share/docker",
        b".composer/auth.json",
        b".nuget/NuGet",
    ),
    *(b".cache/huggingface/token", b".huggingface/token", b".ipython/profile_default/history.sqlite"),
)
# Examples of a .env, which are meant to be shared.
_HARMLESS_ENV = (b".example", b".sample", b".template", b".dist")

# Where the caller's environment says that such a thing is.
_VARIABLES = (
    *(b"SSH_AUTH_SOCK", b"GNUPGHOME", b"XDG_RUNTIME_DIR", b"KUBECONFIG", b"DOCKER_CONFIG", b"DOCKER_HOST", b"NETRC"),
    *(b"DBUS_SESSION_BUS_ADDRESS", b"AWS_SHARED_CREDENTIALS_FILE", b"AWS_CONFIG_FILE", b"AWS_WEB_IDENTITY_TOKEN_FILE"),
    *(
        b"GOOGLE_APPLICATION_CREDENTIALS",
        b"CLOUDSDK_CONFIG",
        b"AZURE_CONFIG_DIR",
        b"REGISTRY_AUTH_FILE",
        b"CONTAINER_HOST",
    ),
    *(b"PASSWORD_STORE_DIR", b"PGPASSFILE", b"XAUTHORITY", b"NPM_CONFIG_USERCONFIG", b"CREDENTIALS_DIRECTORY"),
)

# How far a folder is looked through: its entries, and theirs.
_MOST_LOOKED_AT = 4096


def why_secret(source: bytes) -> str:
    """Why a mount of this host path would show a secret; "" where nothing is known to."""
    path = os.path.realpath(source)
    if path == b"/":
        return "it is the whole host"
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return ""  # the mount itself will tell
    if stat.S_ISSOCK(mode):
        return f"{_shown(path)} is a socket: whoever may connect to it is served by what listens there"
    for place in _places():
        if path == place or path.startswith(place + b"/"):
            return f"{_shown(path)} is a place of secrets" if path == place else f"it lies in {_shown(place)}"
        if place.startswith(path + b"/") and os.path.lexists(place):
            return f"it holds {_shown(place)}"
    names = path.split(b"/")[1:]
    for number, name in enumerate(names):
        if _is_secret_name(name):
            return f"{_shown(b'/' + b'/'.join(names[: number + 1]))} holds credentials, by its name"
    for tail in _TAILS:
        if path.endswith(b"/" + tail) or b"/" + tail + b"/" in path:
            return f"{_shown(path)} holds credentials, by its name"
    if path in _homes():
        return f"{_shown(path)} is a home directory: mount what lies in it"
    return _of_the_kernel(path) or (_holds(path) if stat.S_ISDIR(mode) else "")


def _of_the_kernel(path: bytes) -> str:
    """Whoever names what lies in a sysfs or among cgroups means that; in a proc are all processes of the host."""
    if kernel_mount_of(path) == b"proc":
        return f"{_shown(path)} lies in a proc: it tells of the host's processes, and changes them"
    if path.startswith(b"/sys/"):
        return ""
    for point, kind in kernel_mounts([path]):
        if point != path:
            return f"a {_shown(kind)} of the host's is mounted below it, at {_shown(point)}"
    return ""


def _is_secret_name(name: bytes) -> bool:
    if name in _NAMES:
        return True
    return name == b".env" or (name.startswith(b".env.") and not name.endswith(_HARMLESS_ENV))


def _places() -> list[bytes]:
    """The known places, and those that the environment names, with no symlink in them."""
    found = {os.path.realpath(place) for place in (*_PLACES, *_named_by_environment())}
    return sorted(found | set(_PLACES))


def _named_by_environment() -> list[bytes]:
    found = []
    for name in _VARIABLES:
        for value in os.environb.get(name, b"").split(b":" if name == b"KUBECONFIG" else b","):
            # DBUS_SESSION_BUS_ADDRESS is "unix:path=/run/…", DOCKER_HOST "unix:///var/run/…".
            _, _, rest = value.rpartition(b"path=") if b"path=" in value else value.rpartition(b"unix://")
            # A whole system, or a place where everybody is, would make every mount a secret.
            if (
                rest.startswith(b"/")
                and rest.strip(b"/")
                and rest.rstrip(b"/") not in (b"/tmp", b"/var/tmp", b"/dev/shm")
            ):
                found.append(rest)
    return found


def _homes() -> set[bytes]:
    found = {b"/root", b"/home"}
    for value in (os.environb.get(b"HOME", b""), os.path.expanduser(b"~")):
        if value.startswith(b"/") and value.strip(b"/") and value != b"/tmp":
            found.add(os.path.realpath(value))
    try:
        found.update(os.path.realpath(entry.path) for entry in os.scandir(b"/home"))
    except OSError:
        pass  # there is none
    return found


def _holds(folder: bytes) -> str:
    """Whether a name that means secrets is among a folder's entries, or among those of its folders."""
    for tail in _TAILS:
        if os.path.lexists(folder + b"/" + tail):
            return f"it holds {_shown(folder + b'/' + tail)}"
    left = _MOST_LOOKED_AT
    waiting, next_level = [folder], []
    for depth in (0, 1):
        for one in waiting:
            try:
                with os.scandir(one) as entries:
                    for entry in entries:
                        left -= 1
                        if left < 0:
                            return ""
                        if _is_secret_name(entry.name):
                            return f"it holds {_shown(entry.path)}"
                        if depth == 0 and entry.is_dir(follow_symlinks=False):
                            next_level.append(entry.path)
            except OSError:
                continue  # not ours to look into
        waiting = next_level
    return ""


def _shown(path: bytes) -> str:
    return os.fsdecode(path)
