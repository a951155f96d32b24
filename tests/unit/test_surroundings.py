"""What stands in a sandbox's way, by files that are made up, and for real where that can be had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.linux import surroundings
from ringfence.linux.surroundings import Surroundings
from support.rootless import Caller, caller
from support.sandboxes import need_root

PLAIN = "22 1 0:21 / / rw - ext4 /dev/vda rw\n23 22 0:22 / /proc rw - proc proc rw\n"
HELPER = "/opt/ringfence-core"


def look(folder: Path, files: dict[str, str] | None = None, environ: dict[str, str] | None = None) -> Surroundings:
    """A view of these files, by their paths."""
    given = {"proc/self/ns/user": "", "proc/self/mountinfo": PLAIN, "proc/self/status": "CapEff:\t0\nSeccomp:\t0\n"}
    for name, text in {**given, **(files or {})}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return surroundings.find(str(folder), helper=HELPER, environ=environ or {})


def why(found: Surroundings, *, privileged: bool = False) -> tuple[str, str]:
    return found.no_user_namespaces(privileged=privileged, helper=HELPER) or ("", "")


def test_nothing_in_the_way(tmp_path: Path) -> None:
    found = look(tmp_path, {"proc/sys/user/max_user_namespaces": "63000\n"})
    assert why(found) == ("", "")
    assert found.told() == ("", "")


def test_switched_off(tmp_path: Path) -> None:
    reason, help = why(look(tmp_path, {"proc/sys/user/max_user_namespaces": "0\n"}), privileged=True)
    assert "max_user_namespaces is 0" in reason
    assert help == "as root: sysctl -w user.max_user_namespaces=10000"


def test_for_root_only(tmp_path: Path) -> None:
    found = look(tmp_path, {"proc/sys/kernel/unprivileged_userns_clone": "0\n"})
    assert why(found, privileged=True) == ("", "")
    assert why(found)[1] == "as root: sysctl -w kernel.unprivileged_userns_clone=1"


def test_apparmor(tmp_path: Path) -> None:
    switch = {"proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n"}
    reason, help = why(look(tmp_path, switch))
    assert "AppArmor restricts" in reason
    assert "/etc/apparmor.d/ringfence" in help
    assert f"profile ringfence {HELPER} flags=(unconfined) {{ userns, }}" in help
    assert "\n" not in help
    # With the profile that the remedy makes, nothing is in the way any more; nor for root.
    profile = help.split("'")[1]
    assert why(look(tmp_path, {"etc/apparmor.d/ringfence": profile, **switch})) == ("", "")
    assert why(look(tmp_path / "other", switch), privileged=True) == ("", "")


def test_root_that_may_not_map_itself(tmp_path: Path) -> None:
    for capabilities, says in (("00000000a80425fb", False), ("0000000020000420", True)):
        found = look(tmp_path, {"proc/self/status": f"Uid:\t0\t0\t0\t0\nCapEff:\t{capabilities}\n"})
        assert ("CAP_SETFCAP" in why(found)[0]) is says
    found = look(tmp_path, {"proc/self/status": "Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0\n"})
    assert why(found) == ("", "")


def test_no_user_namespaces_in_the_kernel(tmp_path: Path) -> None:
    look(tmp_path)
    (tmp_path / "proc/self/ns/user").unlink()
    assert "CONFIG_USER_NS" in why(surroundings.find(str(tmp_path), environ={}), privileged=True)[0]


@pytest.mark.parametrize(
    ("engine", "environ", "files"),
    [
        ("Docker", {}, {".dockerenv": ""}),
        ("Podman", {}, {"run/.containerenv": ""}),
        ("Kubernetes", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {".dockerenv": ""}),
        ("LXC", {"container": "lxc"}, {}),
        ("systemd-nspawn", {}, {"run/systemd/container": "systemd-nspawn\n"}),
        ("Docker", {}, {"proc/self/cgroup": "4:memory:/docker/0123abc\n"}),
        ("Kubernetes", {}, {"proc/self/cgroup": "0::/kubepods.slice/kubepods-pod1.slice/x.scope\n"}),
        ("LXC", {}, {"proc/1/cgroup": "0::/lxc.payload.c1/init.scope\n"}),
    ],
)
def test_whose_container(tmp_path: Path, engine: str, environ: dict[str, str], files: dict[str, str]) -> None:
    masked = PLAIN + "30 23 0:30 / /proc/kcore rw - tmpfs tmpfs rw\n"
    found = look(tmp_path, {"proc/self/status": "CapEff:\t00000000a80425fb\nSeccomp:\t2\n", **files}, environ)
    assert found.engine == engine
    detail, help = found.told()
    assert detail.startswith(f"inside {engine}: ")
    assert "CAP_SYS_ADMIN is missing" in detail
    assert help.startswith("docker run --security-opt seccomp=unconfined --cap-add SYS_ADMIN")
    found = look(tmp_path, {"proc/self/mountinfo": masked, **files}, environ)
    assert "parts of /proc are hidden" in why(found)[0]
    assert "systempaths=unconfined" in why(found)[1]
    # As root of it with all that it takes nothing is in the way.
    full = "CapEff:\t000001ffffffffff\nSeccomp:\t0\n"
    found = look(tmp_path, {"proc/self/status": full, **files}, environ)
    assert found.told() == (f"inside {engine}, and nothing of what sandboxes take is missing", "")


@pytest.mark.parametrize(
    ("lines", "hidden"),
    [
        ("30 23 0:30 / /proc/kcore rw - tmpfs tmpfs rw\n", True),
        ("30 23 0:30 / /proc/sys/fs/binfmt_misc rw - autofs systemd-1 rw\n", False),
        ("30 23 0:30 / /proc/kcore rw - tmpfs t rw\n31 22 0:31 / /mnt/proc rw - proc proc rw\n", False),
        ("30 23 0:22 /sys /proc/sys ro - proc proc rw\n", True),
        ("30 22 0:30 / /processes rw - tmpfs tmpfs rw\n", False),
    ],
)
def test_a_proc_that_is_partly_hidden(tmp_path: Path, lines: str, hidden: bool) -> None:
    assert (why(look(tmp_path, {"proc/self/mountinfo": PLAIN + lines}))[0] != "") is hidden


def test_a_chroot(tmp_path: Path) -> None:
    found = look(tmp_path, {"proc/self/mountinfo": "23 22 0:22 / /proc rw - proc proc rw\n"})
    for privileged in (True, False):
        assert "chroot" in why(found, privileged=privileged)[0]


# ---- for real ----

DOCTOR = """
import contextlib, io
from ringfence.cli import doctor
report = doctor.examine(rf.host(), quick=False)
print(json.dumps(report.to_json()))
"""


@pytest.fixture(scope="module")
def someone() -> Any:
    need_root()
    with caller(subordinate=False) as found:
        yield found


def _levels(report: dict[str, Any]) -> dict[str, bool]:
    return {name: one["works"] for name, one in report["levels"].items()}


def test_a_masked_proc_for_real(someone: Caller) -> None:
    """The same, and a run at the level that is left."""
    report = someone.run(DOCTOR, before="mount -t tmpfs -o ro none /proc/fs")
    assert "parts of /proc are hidden" in report["levels"]["container"]["detail"]
    assert "or use isolation='process'" in report["levels"]["container"]["help"]
    assert _levels(report)["process"]
    # The control: without it both work.
    assert _levels(someone.run(DOCTOR))["container"]


def test_the_masks_are_what_stands_in_the_way(someone: Caller) -> None:
    """Without our look the kernel refuses, with the very call that the look foresees."""
    code = """
from ringfence import api
try:
    api.run_spec(api.Spec.make(["true"]), rf.host().replace(user_namespaces=""))
except rf.StartError as error:
    print(json.dumps([error.step, error.call, error.errno]))
"""
    assert someone.run(code, before="mount -t tmpfs -o ro none /proc/fs") == ["mounts", "fsmount", 1]


def test_no_user_namespaces_for_real(someone: Caller) -> None:
    """max_user_namespaces is each user namespace's own: in one of these it can be 0 on any machine."""
    code = """
import subprocess
script = "echo 0 > /proc/sys/user/max_user_namespaces && exec \\"$0\\" -c \\"$1\\""
doctor = "import json\\nimport ringfence as rf\\n" + sys.argv[1]
command = ["unshare", "--user", "--map-root-user", "sh", "-c", script, sys.executable, doctor]
print(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode())
"""
    report = someone.run(code, DOCTOR)
    assert "max_user_namespaces is 0" in report["levels"]["container"]["detail"]
    assert "sysctl -w user.max_user_namespaces=10000" in report["levels"]["container"]["help"]
    assert _levels(report)["process"]
    assert report["facts"]["user namespaces"]["ok"] is False


def test_inside_a_container_of_our_own(someone: Caller) -> None:
    """Which is as Docker's is by default: a filter, no capability, masks. The process level works there."""
    need_root()
    code = "import json, os, sys\nimport ringfence as rf\n" + DOCTOR
    env = {"PYTHONPATH": "/lib-of-it", "TMPDIR": "/tmp", "container": "oci"}
    mounts = [rf.Mount(someone.folder / "lib", "/lib-of-it")]
    result = rf.run(["/usr/bin/python3", "-c", code], env=env, mounts=mounts, limits=rf.Limits(wall_time=60))
    assert result.ok, result
    report = json.loads(result.stdout)
    assert _levels(report) == {"process": True, "container": False, "vm": False}
    about = report["facts"]["surroundings"]
    assert about["detail"].startswith("inside a container: its seccomp filter denies namespaces and mounts")
    assert "The process level works" in about["detail"]
    assert "seccomp=unconfined" in about["help"]
    assert report["levels"]["container"]["help"]


CHROOT = """
c="$0/c"
for each in usr bin lib lib64 sbin etc proc dev; do
    if [ -e "/$each" ]; then mkdir -p "$c/$each"; mount --rbind "/$each" "$c/$each"; fi
done
mkdir -p "$c/tmp" "$c$0"
mount --rbind "$0" "$c$0"
chroot="chroot $c"
"""


def test_in_a_chroot_for_real(someone: Caller) -> None:
    """User namespaces are refused there to anybody (clone(2)); the process level does."""
    code = """
from ringfence import api
try:
    api.run_spec(api.Spec.make(["true"]), rf.host().replace(user_namespaces=""))
except rf.StartError as error:
    said = [error.step, error.call, error.errno]
print(json.dumps([rf.host().user_namespaces, show(rf.run(["true"], isolation="process"))["ended"], said]))
"""
    why, ended, said = someone.run(code, before=CHROOT)
    assert "chroot" in why
    assert ended == ["exited", 0, None]
    assert said == ["launch", "clone3", 1]  # EPERM: what the look foresees
