"""What `inspect` and `ps` say of what others made: real Docker, Podman, LXC, bubblewrap, systemd-nspawn and systemd, of
Debian's packages, each on a host of its own in namespaces (support/foreign.py).

Of each tool one with its defaults, one that was hardened, and one that was opened wide.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

import ringfence as rf
from ringfence.spec.boundary import CAPABILITIES
from support import foreign
from support.foreign import IDLE, SUBORDINATE, UID, Host, Looked, own, weak
from support.sandboxes import need

pytestmark = pytest.mark.long

# What they grant by default: Docker's set, and that of Podman 4, which is without CAP_NET_RAW and two more.
DOCKERS, PODMANS = 14, 11
# Of Linux 5.8 and 5.9; Docker 20.10 doesn't know them.
NEW = {"CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE"}
SPACES = {"mnt", "pid", "net", "ipc", "uts"}
NO_LIMIT = "nothing limits its memory, processes, CPU"
NO_FILTER = "no seccomp filter: every system call of the host's kernel is open"
SETUID = "may gain privileges by set-user-ID programs (no_new_privs is off)"
ROOT = "is root on the host too: no user namespace"
ALL_POWERS = [
    "can load kernel modules (CAP_SYS_MODULE)",
    "can reach the hardware (CAP_SYS_RAWIO)",
    "can mount and administer the system (CAP_SYS_ADMIN)",
]
LIMITS = ["--memory", "64m", "--pids-limit", "20", "--cpus", "0.5"]
HARDENED = [*LIMITS, "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "1000"]


def limits(one: dict[str, Any]) -> tuple[int | None, int | None, float | None]:
    bounds = one["bounds"]
    return bounds["memory_bytes"], bounds["pids"], bounds["cpus"]


def held() -> set[str]:
    """The capabilities that this machine's root has to give."""
    return set(rf.inspect(os.getpid()).capabilities["bounding"])


def image(there: Host) -> None:
    """A tar with nothing in it but the program."""
    there.shell("mkdir -p /tmp/image/srv && cp /srv/idle /tmp/image/srv && tar -C /tmp/image -cf /tmp/image.tar srv")


# ---- Docker ----


@pytest.fixture(scope="module")
def docker() -> Iterator[tuple[Host, Looked]]:
    foreign.need_tool("docker.io")
    with foreign.host() as there:
        image(there)
        daemon = ["dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs"]
        there.start(daemon)
        client = "/usr/bin/docker"  # there may be another one in /usr/local/bin
        there.until(client, "version")
        there.run(client, "import", "/tmp/image.tar", "idle:1")
        run = [client, "run", "--detach", "--name"]
        there.run(*run, "plain", "idle:1", *IDLE)
        there.run(*run, "hardened", "--init", "--network", "none", *HARDENED, "idle:1", *IDLE)
        wide = ["--network", "host", "--pid", "host", "--security-opt", "seccomp=unconfined", "--cap-add", "SYS_ADMIN"]
        mounts = ["-v", "/var/run/docker.sock:/var/run/docker.sock", "-v", "/:/host", "-v", "/etc:/given:ro"]
        there.run(*run, "wide", *wide, *mounts, "idle:1", *IDLE)
        there.run(*run, "beside", "--pid", "container:plain", "--network", "none", "-v", "/run:/there", "idle:1", *IDLE)
        there.run(*run, "privileged", "--network", "none", *privileged(), "idle:1", *IDLE)
        there.run(client, "exec", "--detach", "plain", *IDLE)
        yield there, there.look("idle", "docker-init", "dockerd")


def privileged() -> list[str]:
    """Docker's option wants every capability there is. Where root itself lacks one, what else it comes to."""
    given = held()
    if given == set(CAPABILITIES):
        return ["--privileged"]
    words = ["--device-cgroup-rule", "a *:* rwm"]
    for option in ("seccomp", "systempaths", "apparmor"):
        words += ["--security-opt", f"{option}=unconfined"]
    return [*words, *(f"--cap-add={name}" for name in sorted(given - NEW))]


def spaces(there: Host, *more: str) -> set[str]:
    """Of a container by Docker's or Podman's defaults: on cgroup v2 one of cgroups, too."""
    return SPACES | set(more) | ({"cgroup"} if there.version == 2 else set())


def devices(there: Host, which: str) -> str | None:
    """On v2 a BPF program says which, and the kernel doesn't tell."""
    return which if there.version == 1 else None


def test_docker_with_its_defaults(docker: tuple[Host, Looked]) -> None:
    there, looked = docker
    one, *_ = [one for one in looked.processes if one["container"] and one["container"]["name"] == "plain"]
    assert one["kind"] == "container"
    assert one["container"].items() >= {"name": "plain", "image": "idle:1"}.items()
    assert there.run("/usr/bin/docker", "inspect", "--format={{.Id}}", "plain").strip() == one["container"]["id"]
    assert own(one) == spaces(there)
    assert len(one["capabilities"]["effective"]) == DOCKERS
    assert one["seccomp"] == "filter"
    assert one["bounds"]["devices"] == devices(there, "listed")
    # What Docker itself puts there, /etc/hosts and the like, is no news.
    assert one["mounts"] == []
    assert one["weak"] == [ROOT, f"has {DOCKERS} capabilities that count on the host", SETUID, NO_LIMIT]
    spaced = (
        ["IPC and UTS", "user, cgroup and time"] if there.version == 1 else ["IPC, UTS and cgroup", "user and time"]
    )
    assert one["verdict"] == (
        f"a container, made by Docker (plain, image idle:1): its own mount, PID, network, {spaced[0]} namespaces;"
        f" shares the {spaced[1]} ones; {'; '.join(one['weak'][:3])}"
    )


def test_docker_hardened(docker: tuple[Host, Looked]) -> None:
    _, looked = docker
    [init, command] = looked.group("hardened")["pids"]
    one = next(one for one in looked.processes if one["pid"] == command)
    assert looked.group("hardened")["first"]["name"] == "docker-init"
    assert next(one for one in looked.processes if one["pid"] == init)["name"] == "docker-init"
    assert limits(one) == (64 << 20, 20, 0.5)
    assert one["no_new_privs"] is True
    assert not any(one["capabilities"].values())
    assert "read-only" in one["root"]
    assert one["weak"] == ["is uid 1000 on the host too: no user namespace"]


def test_docker_opened_wide(docker: tuple[Host, Looked]) -> None:
    """With the host's PIDs, too, it is a container: by its cgroup and by what it sees of files."""
    there, looked = docker
    one = looked.named("wide")
    assert one["kind"] == "container"
    assert own(one) == spaces(there) - {"pid", "net"}
    first, second, third, *others = one["weak"]
    assert first.startswith("the socket of an engine, which starts what it is told to, is there: /var/run/docker.sock")
    assert second == "may write to the host's / at /host"
    assert third == "can mount and administer the system (CAP_SYS_ADMIN)"
    assert {ROOT, SETUID, NO_FILTER, NO_LIMIT} <= set(others)
    assert "shares the host's network, abstract sockets too" in others
    assert "sees and may signal the host's processes" in others
    if there.run("stat", "--file-system", "--format=%T", "/dev").strip() != "tmpfs":  # as a guest of ours has it
        assert "all device nodes of the host are in /host/dev" in others
    assert any(note.startswith("the kernel's settings may be written to: /host/proc, /host/sys") for note in others)
    assert "sees the host's /etc at /given, read-only" in one["mounts"]
    # What lies below a folder that was told isn't told again.
    assert [note for note in one["mounts"] if " at /host/" in note] == []


def test_docker_privileged(docker: tuple[Host, Looked]) -> None:
    there, looked = docker
    one = looked.named("privileged")
    assert held() - NEW <= set(one["capabilities"]["effective"]) <= held()
    assert one["bounds"]["devices"] == devices(there, "all")
    assert one["weak"][:3] == ALL_POWERS
    assert {ROOT, NO_FILTER, SETUID, NO_LIMIT} <= set(one["weak"])
    assert "the kernel's settings may be written to: /proc" in weak(one)


def test_a_docker_socket_in_a_folder_that_is_mounted(docker: tuple[Host, Looked]) -> None:
    _, looked = docker
    one = looked.named("beside")
    assert one["weak"][0].startswith("the socket of an engine, which starts what it is told to, is there: /there/")
    assert "/there/docker.sock" in one["weak"][0]


def test_dockers_containers_are_groups(docker: tuple[Host, Looked]) -> None:
    """By container, though two share a PID namespace; with what was started in it later."""
    there, looked = docker
    kinds = {name: looked.group(name)["kind"] for name in ("plain", "hardened", "wide", "beside", "privileged")}
    assert kinds == dict.fromkeys(kinds, "container")
    assert {name: len(looked.group(name)["pids"]) for name in kinds} == {
        **dict.fromkeys(kinds, 1),
        "plain": 2,
        "hardened": 2,
    }
    daemon = next(one for one in looked.groups if one["first"]["name"] == "dockerd")
    assert daemon["kind"] == "process"
    listed = there.ringfence("ps")
    assert "containers: 5," in listed
    for name in ("plain (idle)", "hardened (docker-init)", "wide (idle)", "beside (idle)"):
        assert name in listed


def test_another_user_is_told_that_it_is_a_container(docker: tuple[Host, Looked]) -> None:
    """By its mounts and its PIDs inside, which all may read, though the namespaces may not be seen."""
    there, looked = docker
    wanted = looked.named("privileged")
    [one] = [one for one in there.look("idle", uid=UID).processes if one["pid"] == wanted["pid"]]
    assert "namespaces" in one["partial"]
    assert one["container"] == {**wanted["container"], "name": "", "image": ""}
    assert one["verdict"].startswith(
        f"a container, made by Docker ({wanted['container']['id'][:12]}): its own mount and PID namespaces;"
        " its other namespaces may not be seen by this user; can load kernel modules (CAP_SYS_MODULE)"
    )


def test_the_command_line_tells_the_container(docker: tuple[Host, Looked]) -> None:
    there, looked = docker
    one = looked.named("wide")
    told = there.ringfence("inspect", str(one["pid"]))
    assert told.startswith(f"{one['pid']}: a container, made by Docker (wide, image idle:1): ")
    assert f"container       id {one['container']['id']}, name wide, image idle:1\n" in told
    assert json.loads(there.ringfence("inspect", "--json", str(one["pid"])))["container"] == one["container"]


# ---- Podman ----


@pytest.fixture(scope="module")
def podman() -> Iterator[tuple[Host, Looked]]:
    foreign.need_tool("podman")
    with foreign.host() as there:
        image(there)
        run = PODMAN
        there.shell(f"{run} import /tmp/image.tar localhost/idle:1")
        idle = f"localhost/idle:1 {' '.join(IDLE)}"
        there.shell(f"{run} run --detach --name plain --network none {idle}")
        there.shell(f"{run} run --detach --name hardened --network none {' '.join(HARDENED)} {idle}")
        there.shell(f"{run} run --detach --name wide --privileged --network host -v /:/host {idle}")
        ids = f"--uidmap 0:{SUBORDINATE}:1000 --gidmap 0:{SUBORDINATE}:1000"
        there.shell(f"{run} run --detach --name mapped --network none {ids} {idle}")
        yield there, there.look("idle", "conmon")


# cgroupfs, as no systemd runs there; the default of events is its journal.
PODMAN = "podman --cgroup-manager cgroupfs --events-backend file --storage-driver vfs"


def test_podman_with_its_defaults(podman: tuple[Host, Looked]) -> None:
    there, looked = podman
    one = looked.named("plain")
    assert one["kind"] == "container"
    identity = there.shell(f"{PODMAN} inspect --format='{{{{.Id}}}}' plain").strip()
    assert one["container"] == {"id": identity, "name": "plain", "image": "localhost/idle:1"}
    assert own(one) == spaces(there)
    assert one["mounts"] == []
    assert one["bounds"]["pids"] == 2048
    assert one["weak"] == [
        ROOT,
        f"has {PODMANS} capabilities that count on the host",
        SETUID,
        "nothing limits its memory and CPU",
    ]


def test_podman_hardened(podman: tuple[Host, Looked]) -> None:
    _, looked = podman
    one = looked.named("hardened")
    assert limits(one) == (64 << 20, 20, 0.5)
    assert one["weak"] == ["is uid 1000 on the host too: no user namespace"]


def test_podman_privileged(podman: tuple[Host, Looked]) -> None:
    there, looked = podman
    one = looked.named("wide")
    assert set(one["capabilities"]["effective"]) == held()
    assert one["bounds"]["devices"] == devices(there, "all")
    assert one["weak"][:4] == ["may write to the host's / at /host", *ALL_POWERS]
    assert {ROOT, NO_FILTER, SETUID, "shares the host's network, abstract sockets too"} <= set(one["weak"])
    assert "the kernel's settings may be written to: " in weak(one)


def test_podman_with_ids_of_its_own(podman: tuple[Host, Looked]) -> None:
    there, looked = podman
    one = looked.named("mapped")
    assert own(one) == spaces(there, "user")
    assert one["uids"][1] == SUBORDINATE
    assert one["uid_map"] == [[0, SUBORDINATE, 1000]]
    assert one["capabilities_on_host"] is False
    assert one["weak"] == [SETUID, "nothing limits its memory and CPU"]


def test_podmans_monitors_are_processes(podman: tuple[Host, Looked]) -> None:
    there, looked = podman
    monitors = [one for one in looked.processes if one["name"] == "conmon"]
    shares = [one["verdict"] for one in monitors if not own(one)]
    of = " of Podman" if there.version == 1 else ""  # by a cgroup of its own
    assert shares == [f"a process (conmon){of} that shares all with the host; runs as root"] * 3
    # That of a container with ids of its own has a view of the storage that these may enter.
    [other] = [one for one in monitors if own(one)]
    assert other["verdict"].startswith("a process, confined in part")
    assert own(other) == {"mnt"}
    assert "containers: 4," in there.ringfence("ps")


@pytest.fixture(scope="module")
def rootless() -> Iterator[tuple[Host, Looked]]:
    foreign.need_tool("podman")
    need("newuidmap", shutil.which("newuidmap") is not None)
    with foreign.host() as there:
        image(there)
        idle = f"localhost/idle:1 {' '.join(IDLE)}"
        script = f"""
            cd; {PODMAN} import /tmp/image.tar localhost/idle:1
            {PODMAN} run --detach --name plain --network none {idle}
            {PODMAN} run --detach --name wide --network host -v $HOME:/mine {idle}
        """
        user = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", "bash", "-euc", script]
        there.run(*user, env={"HOME": f"/home/{foreign.NAME}", "XDG_RUNTIME_DIR": f"/run/user/{UID}"})
        yield there, there.look("idle")


def test_podman_without_root(rootless: tuple[Host, Looked]) -> None:
    """No cgroup tells of it where none is delegated: its monitor does."""
    there, looked = rootless
    one = looked.named("plain")
    assert set(one["bounds"]["paths"].values()) == {"/"}
    assert one["maker"] == "Podman"
    assert one["container"]["image"] == "localhost/idle:1"
    assert own(one) == spaces(there, "user")
    assert one["uids"][1] == UID
    assert one["uid_map"] == [[0, UID, 1], [1, SUBORDINATE, 65536]]
    assert one["capabilities_on_host"] is False
    assert one["mounts"] == []
    assert one["weak"] == [SETUID, NO_LIMIT]
    one = looked.named("wide")
    assert one["weak"][0] == f"may write to the host's /home/{foreign.NAME} at /mine"
    assert "shares the host's network, abstract sockets too" in one["weak"]
    assert looked.group("wide")["pids"] == [one["pid"]]


# ---- LXC ----

_LXC = """
mkdir -p /var/lib/lxc/{name}/rootfs/proc /var/lib/lxc/{name}/rootfs/sys /var/lib/lxc/{name}/rootfs/dev
mkdir -p /var/lib/lxc/{name}/rootfs/srv
cp /srv/idle /var/lib/lxc/{name}/rootfs/srv
chown -R {owner}:{owner} /var/lib/lxc/{name}/rootfs
chmod 755 /var/lib/lxc /var/lib/lxc/{name}
cat >/var/lib/lxc/{name}/config <<END
lxc.rootfs.path = dir:/var/lib/lxc/{name}/rootfs
lxc.uts.name = {name}
lxc.init.cmd = {command}
{config}
END
lxc-start --name {name} --logfile /var/lib/lxc/{name}.log || {{ cat /var/lib/lxc/{name}.log; exit 1; }}
"""


def lxc_container(there: Host, name: str, config: list[str], owner: int = 0) -> None:
    values = {"name": name, "owner": owner, "config": "\n".join(config), "command": " ".join(IDLE)}
    there.shell(_LXC.format(**values))


@pytest.fixture(scope="module")
def lxc() -> Iterator[tuple[Host, Looked]]:
    foreign.need_tool("lxc")
    usual = [
        "lxc.net.0.type = empty",
        "lxc.mount.auto = proc:mixed sys:ro",
        "lxc.include = /usr/share/lxc/config/common.conf",
    ]
    ids = [f"lxc.idmap = {kind} 0 {SUBORDINATE} 65536" for kind in "ug"]
    userns = ["lxc.include = /usr/share/lxc/config/userns.conf"]
    limited = ["lxc.cgroup.memory.limit_in_bytes = 64M", "lxc.cgroup.pids.max = 20"]
    limited += ["lxc.cgroup2.memory.max = 64M", "lxc.cgroup2.pids.max = 20"]
    with foreign.host() as there:
        lxc_container(there, "plain", usual)
        lxc_container(there, "mapped", [*usual, *userns, *ids, *limited, "lxc.no_new_privs = 1"], SUBORDINATE)
        lxc_container(there, "wide", ["lxc.net.0.type = none", "lxc.mount.auto = proc:rw sys:rw"])
        lxc_container(there, "kept", ["lxc.namespace.keep = user pid net", "lxc.mount.auto = proc:mixed sys:ro"])
        lxc_container(there, "keeps", ["lxc.namespace.keep = user pid net", "lxc.mount.auto = proc:mixed sys:ro"])
        yield there, there.look("idle", "lxc-start")


def test_lxc_privileged(lxc: tuple[Host, Looked]) -> None:
    """What LXC calls privileged is one without an id map, with most capabilities and a short filter."""
    _, looked = lxc
    one = looked.named("plain")
    assert (one["kind"], one["maker"], one["seccomp"]) == ("container", "LXC", "filter")
    assert own(one) == SPACES | {"cgroup"}
    assert one["weak"][0] == "can mount and administer the system (CAP_SYS_ADMIN)"
    assert {ROOT, SETUID, NO_LIMIT} <= set(one["weak"])
    assert NO_FILTER not in one["weak"]
    # Its own network's settings are its own.
    assert not any("/proc/sys/net" in note for note in one["mounts"])
    assert one["verdict"].startswith(
        "a container, made by LXC (plain): its own mount, PID, network, IPC, UTS and cgroup"
    )


def test_lxc_with_an_id_map(lxc: tuple[Host, Looked]) -> None:
    _, looked = lxc
    one = looked.named("mapped")
    assert own(one) == SPACES | {"cgroup", "user"}
    assert one["uid_map"] == [[0, SUBORDINATE, 65536]]
    assert len(one["capabilities"]["effective"]) == len(CAPABILITIES)
    assert one["capabilities_on_host"] is False
    assert limits(one)[:2] == (64 << 20, 20)
    assert one["weak"] == ["nothing limits its CPU"]


def test_lxc_opened_wide(lxc: tuple[Host, Looked]) -> None:
    _, looked = lxc
    one = looked.named("wide")
    assert own(one) == {"mnt", "pid", "ipc", "uts", "cgroup"}
    assert one["weak"][:3] == ALL_POWERS
    assert {ROOT, NO_FILTER, SETUID, NO_LIMIT, "the kernel's settings may be written to: /proc and /sys"} <= set(
        one["weak"]
    )
    assert "shares the host's network, abstract sockets too" in one["weak"]


def test_lxcs_containers_are_groups(lxc: tuple[Host, Looked]) -> None:
    there, looked = lxc
    for name in ("plain", "mapped", "wide", "kept", "keeps"):
        assert (looked.group(name)["kind"], len(looked.group(name)["pids"])) == ("container", 1)
    # Even two that have the host's PIDs.
    assert not own(looked.named("kept")) & {"pid", "net", "user"}
    assert "sees and may signal the host's processes" in looked.named("kept")["weak"]
    assert "containers: 5," in there.ringfence("ps")
    monitors = [one for one in looked.processes if one["name"] == "lxc-start"]
    assert len(monitors) == 5
    assert {one["verdict"] for one in monitors} == {
        "a process (lxc-start) of LXC that shares all with the host; runs as root"
    }


# ---- systemd ----

_UNITS = {
    "plain": "",
    "hardened": """
        DynamicUser=yes
        NoNewPrivileges=yes
        ProtectSystem=strict
        ProtectHome=yes
        PrivateTmp=yes
        PrivateDevices=yes
        ProtectKernelTunables=yes
        ProtectKernelModules=yes
        ProtectControlGroups=yes
        SystemCallFilter=@system-service
        PrivateNetwork=yes
        PrivateIPC=yes
        ProtectHostname=yes
        RestrictNamespaces=yes
        CapabilityBoundingSet=
        MemoryMax=64M
        TasksMax=20
        CPUQuota=50%
        """,
    "dynamic": "DynamicUser=yes",
    "partly": """
        PrivateTmp=yes
        PrivateNetwork=yes
        ReadOnlyPaths=/opt /etc
        CapabilityBoundingSet=CAP_NET_ADMIN CAP_SYS_ADMIN
        """,
    "capable": """
        User=nobody
        AmbientCapabilities=CAP_SYS_PTRACE CAP_NET_RAW
        """,
}
_UNIT = """
[Unit]
DefaultDependencies=no
[Service]
ExecStart={command}
{lines}
"""


def units() -> str:
    """A shell script that writes them, and becomes systemd."""
    script = ["mkdir /run/units"]
    for name, lines in _UNITS.items():
        text = _UNIT.format(command=" ".join(IDLE), lines="\n".join(line.strip() for line in lines.splitlines()))
        script.append(f"cat >/run/units/{name}.service <<'END'\n{text}END")
    wanted = " ".join(f"{name}.service" for name in _UNITS)
    target = f"[Unit]\nDefaultDependencies=no\nWants={wanted}\n"
    script.append(f"cat >/run/units/those.target <<'END'\n{target}END")
    # container=: it leaves alone what is the machine's, as its clock and the like.
    script.append("exec env container=other SYSTEMD_UNIT_PATH=/run/units /lib/systemd/systemd --unit=those.target")
    return "\n".join(script)


@pytest.fixture(scope="module")
def systemd() -> Iterator[tuple[Host, Looked]]:
    need("systemd, for the guest's userland", os.path.exists("/lib/systemd/systemd"))
    with foreign.host(["bash", "-euc", units()]) as there:
        for name in _UNITS:
            there.until("systemctl", "is-active", "--quiet", f"{name}.service")
        there.until("bash", "-c", f"[ $(pgrep -cx idle) = {len(_UNITS)} ]")
        yield there, there.look("idle", "systemd")


def test_a_unit_with_nothing(systemd: tuple[Host, Looked]) -> None:
    _, looked = systemd
    one = looked.named("plain.service")
    assert (one["kind"], one["maker"]) == ("process", "systemd unit plain.service")
    verdict = "a process (idle) of the systemd unit plain.service that shares all with the host; runs as root"
    assert one["verdict"] == verdict
    assert one["weak"] == ["runs as root"]


def test_a_unit_with_all_that_hardens(systemd: tuple[Host, Looked]) -> None:
    there, looked = systemd
    one = looked.named("hardened.service")
    assert one["kind"] == "process"
    assert own(one) == {"mnt", "net", "ipc", "uts"}
    assert limits(one) == (64 << 20, 20, 0.5)
    assert (one["seccomp"], one["no_new_privs"]) == ("filter", True)
    assert one["filters"] > 1
    assert not any(one["capabilities"].values())
    assert one["bounds"]["devices"] == devices(there, "listed")
    assert one["root"] == "the host's, read-only, with mounts of its own"
    # What systemd makes for it alone, PrivateTmp and the like, is no news.
    [files] = one["mounts"]
    assert files.startswith("sees the host's files, read-only")
    assert one["weak"] == []
    assert one["verdict"].startswith(
        "a process of the systemd unit hardened.service, confined in part: its own mount, network, IPC and UTS"
        " namespaces; shares the user, PID, cgroup and time ones; sees the host's files, read-only"
    )


def test_a_unit_with_a_dynamic_user(systemd: tuple[Host, Looked]) -> None:
    """The host's devices and settings are there, and are root's: no weakness of a user without capabilities."""
    _, looked = systemd
    one = looked.named("dynamic.service")
    assert own(one) == {"mnt"}
    assert 61184 <= one["uids"][1] <= 65519
    assert "all device nodes of the host are in /dev" in one["mounts"]
    assert one["weak"] == []


def test_a_unit_that_is_confined_in_part(systemd: tuple[Host, Looked]) -> None:
    _, looked = systemd
    one = looked.named("partly.service")
    assert own(one) == {"mnt", "net"}
    assert one["root"] == "the host's, writable, with mounts of its own"
    assert one["weak"][:4] == [
        "can mount and administer the system (CAP_SYS_ADMIN)",
        "has 1 more capability that counts on the host",
        ROOT,
        "may write to the host's files where its user may, but for /etc and /opt",
    ]
    assert {SETUID, NO_FILTER, "all device nodes of the host are in /dev"} <= set(one["weak"])


def test_a_unit_of_a_user_with_capabilities(systemd: tuple[Host, Looked]) -> None:
    _, looked = systemd
    one = looked.named("capable.service")
    assert own(one) == set()
    assert one["weak"] == [
        "can look into every process (CAP_SYS_PTRACE)",
        "can forge packets (CAP_NET_RAW)",
    ]


def test_units_are_groups(systemd: tuple[Host, Looked]) -> None:
    there, looked = systemd
    for name in _UNITS:
        found = looked.group(f"{name}.service")
        assert (found["kind"], len(found["pids"])) == ("process", 1)
    listed = there.ringfence("ps", "--all")
    assert "containers: 0," in listed
    for name in _UNITS:
        assert f"of the systemd unit {name}.service" in listed
    one = looked.named("hardened.service")
    told = there.ringfence("inspect", str(one["pid"]))
    assert "  unit            hardened.service\n" in told
    assert looked.named("init.scope")["pid"] == 1


# ---- bubblewrap, systemd-nspawn ----


@pytest.fixture
def alone() -> Iterator[Host]:
    with foreign.host() as there:
        yield there


def test_bubblewrap(alone: Host) -> None:
    foreign.need_tool("bubblewrap")
    files = ["--ro-bind", "/srv/idle", "/srv/idle", "--proc", "/proc", "--dev", "/dev"]
    alone.start(["bwrap", "--unshare-all", "--cap-drop", "ALL", *files, *IDLE])
    alone.start(["bwrap", "--unshare-user", "--ro-bind", "/", "/", *IDLE])
    alone.until("bash", "-c", "[ $(pgrep -cx idle) = 2 ]")
    looked = alone.look("idle")
    whole = next(one for one in looked.processes if "pid" in own(one))
    assert (whole["kind"], whole["maker"]) == ("container", "bubblewrap")
    assert own(whole) >= SPACES | {"user"}
    assert whole["weak"][:3] == [
        "its user is root on the host",
        "the kernel's settings may be written to: /proc",
        NO_FILTER,
    ]
    # It is so: bubblewrap 0.8 covers /proc/sys only where that folder may be written to, not the files in it.
    settings = "/proc/sys/vm/stat_interval"
    script = f'seconds=$(cat {settings}); echo "$seconds" >{settings} && echo written'
    words = ["bwrap", "--unshare-all", "--cap-drop", "ALL", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]
    assert alone.run(*words, "sh", "-c", script) == "written\n"
    part = next(one for one in looked.processes if "pid" not in own(one))
    assert part["kind"] == "process"
    assert part["root"] == "the host's, read-only, with mounts of its own"
    assert part["verdict"].startswith("a process, confined in part by bubblewrap: its own user and mount namespaces; ")
    assert "sees the host's files, read-only" in part["verdict"]


def test_systemd_nspawn(alone: Host) -> None:
    foreign.need_tool("systemd-container")
    alone.shell("mkdir -p /srv/tree/usr/lib /srv/tree/srv && echo ID=none >/srv/tree/usr/lib/os-release")
    alone.shell("cp /srv/idle /srv/tree/srv")
    words = ["systemd-nspawn", "--directory", "/srv/tree", "--machine", "named", "--register=no", "--keep-unit"]
    alone.start([*words, "--private-network", "--as-pid2", *IDLE])
    alone.until("pgrep", "-x", "idle")
    looked = alone.look("idle")
    one = looked.named("named")
    assert (one["kind"], one["maker"], one["seccomp"]) == ("container", "systemd-nspawn", "filter")
    assert own(one) == SPACES | {"cgroup"}
    assert one["weak"][:2] == [
        "can mount and administer the system (CAP_SYS_ADMIN)",
        "can read every file (CAP_DAC_READ_SEARCH)",
    ]
    assert not any(note.startswith("may write to the host's") for note in one["mounts"])
    assert len(looked.group("named")["pids"]) == 2  # with the init of --as-pid2
