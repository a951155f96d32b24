"""The system that a workload sees: mounts, images, host name, network, user."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import ringfence as rf
from support.sandboxes import (
    LEVELS,
    PROBE,
    PROBE_FILE,
    applied,
    ended,
    host_facts,
    need_root,
    output,
    run_probe,
    sandbox_facts,
)

ISOLATED = ("container", "vm")  # a system of their own


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that everybody may look into."""
    folder = tmp_path / "shared, with comma"
    (folder / "sub").mkdir(parents=True)
    (folder / "file").write_bytes(b"of the host\n")
    (folder / "sub" / "below").write_bytes(b"deeper\n")
    for path in (tmp_path, folder, folder / "sub"):
        path.chmod(0o755)
    for above in tmp_path.parents:
        if above != Path("/") and above.stat().st_uid == os.geteuid() and above.name.startswith("pytest-"):
            above.chmod(0o711)
    return folder


def at(isolation: str, folder: Path) -> str:
    """Where a mount of `folder` is shown: a process sees the host's paths."""
    return str(folder) if isolation == "process" else "/data/here"


# Landlock takes rights away and says EACCES; a read-only mount says EROFS.
READ_ONLY_ERRNO = {"process": errno.EACCES, "container": errno.EROFS, "vm": errno.EROFS}


@pytest.mark.parametrize("isolation", LEVELS)
def test_a_mount_is_read_only_by_default(isolation: str, shared: Path) -> None:
    shared.chmod(0o777)  # so that it isn't the mode that keeps the workload out
    (shared / "file").chmod(0o666)
    target = at(isolation, shared)
    script = f"""
    cat '{target}/file' '{target}/sub/below'
    ./probe try-open-write '{target}/file'
    ./probe try-create '{target}/new'
    """
    result = rf.run(["sh", "-c", script], isolation=isolation, mounts=[rf.Mount(shared, target)], files=PROBE_FILE)
    name = errno.errorcode[READ_ONLY_ERRNO[isolation]]
    assert result.stdout.decode() == f"of the host\ndeeper\n{name} open\n{name} open\n"
    assert (shared / "file").read_bytes() == b"of the host\n"
    assert sorted(os.listdir(shared)) == ["file", "sub"]
    assert applied(result)[f"mount {target}"].effective == "read-only"


@pytest.mark.parametrize("isolation", LEVELS)
def test_a_writable_mount(isolation: str, shared: Path) -> None:
    """What the workload writes belongs to the folder's owner outside, at the levels that map ids."""
    if isolation == "process":
        shared.chmod(0o777)
        (shared / "file").chmod(0o666)
    target = at(isolation, shared)
    script = (
        f"cd '{target}' && echo more >> file && echo new > made && mkdir folder && echo x > folder/in && mv made moved"
    )
    result = rf.run(["sh", "-c", script], isolation=isolation, mounts=[rf.Mount(shared, target, writable=True)])
    assert output(result) == b""
    assert (shared / "file").read_bytes() == b"of the host\nmore\n"
    assert (shared / "moved").read_bytes() == b"new\n"
    assert (shared / "folder" / "in").read_bytes() == b"x\n"
    assert not (shared / "made").exists()
    if isolation != "process":
        assert {path.stat().st_uid for path in shared.rglob("*")} == {os.geteuid()}
    assert applied(result)[f"mount {target}"].effective == "writable"


@pytest.mark.parametrize("isolation", LEVELS)
def test_a_single_file_as_a_mount(isolation: str, shared: Path) -> None:
    target = str(shared / "file") if isolation == "process" else "/data/one.txt"
    result = rf.run(["cat", target], isolation=isolation, mounts=[rf.Mount(shared / "file", target)])
    assert output(result) == b"of the host\n"


@pytest.mark.parametrize("isolation", ISOLATED)
def test_without_a_mount_it_is_not_there(isolation: str, shared: Path) -> None:
    result = run_probe(isolation, "try-open-read", str(shared / "file"))
    assert (result.exit_code, result.stdout) == (1, b"ENOENT open\n")


# ---- images ----


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole image in a folder: the probe, links, and traps in the places that are ringfence's own."""
    root = tmp_path_factory.mktemp("rootfs")
    for folder in ("bin", "etc", "proc", "tmp", "srv/data"):
        (root / folder).mkdir(parents=True)
    shutil.copy(PROBE, root / "bin" / "probe")
    (root / "bin" / "tool").symlink_to("probe")
    (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\napp:x:777:778::/:/bin/sh\n")
    (root / "etc" / "name").write_text("an image of its own\n")
    (root / "srv" / "data" / "file").write_bytes(b"in the image")
    (root / "tmp" / "old").write_bytes(b"not to be seen")
    (root / "work").symlink_to("/etc")
    (root / "dev").symlink_to("/srv")
    (root / "escape").symlink_to("../../../../../../etc/hostname")
    for path in [root, *root.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755)
    return root


@pytest.mark.parametrize("isolation", ISOLATED)
def test_a_rootfs_folder(isolation: str, rootfs: Path) -> None:
    result = rf.run(["probe", "facts"], isolation=isolation, image=rootfs, files={"given": b"1"})
    facts = json.loads(output(result))
    # The image's own names, and those that every sandbox has; nothing of the host's.
    assert set(facts["root_entries"]) - {".image", ".machine-id"} == {
        *("bin", "etc", "srv", "escape"),
        *("dev", "home", "mnt", "proc", "root", "run", "sys", "tmp", "var", "work"),
    }
    assert facts["cwd"] == "/work"
    assert facts["uids"]["effective"] == 1000
    assert "null" in facts["dev_entries"]
    assert "files" in applied(result)
    assert str(applied(result)["files"].effective).startswith(str(rootfs))


@pytest.mark.parametrize("isolation", ISOLATED)
def test_a_rootfs_folder_is_read_only_and_no_way_out(isolation: str, rootfs: Path) -> None:
    """As root of the sandbox, whom no mode keeps out: what refuses is the mount."""

    def look(*args: str) -> bytes:
        return bytes(rf.run(["tool", *args], isolation=isolation, image=rootfs, user=0).stdout)

    assert look("read", "/etc/name") == b"an image of its own\n"
    assert look("try-open-write", "/srv/data/file") == b"EROFS open\n"
    # The link's own target, below the image's root: there is no such file.
    assert look("try-open-read", "/escape") == b"ENOENT open\n"
    assert (rootfs / "srv" / "data" / "file").read_bytes() == b"in the image"


@pytest.mark.parametrize("isolation", ISOLATED)
def test_a_rootfs_folder_without_the_command(isolation: str, rootfs: Path) -> None:
    with pytest.raises(rf.StartError) as caught:
        rf.run(["python3", "-c", ""], isolation=isolation, image=rootfs)
    assert (caught.value.errno, caught.value.step) == (errno.ENOENT, "exec")


@pytest.mark.parametrize("isolation", ISOLATED)
def test_a_user_by_the_name_that_the_image_gives(isolation: str, rootfs: Path) -> None:
    result = rf.run(["probe", "facts"], isolation=isolation, image=rootfs, user="app")
    facts = json.loads(output(result))
    assert (facts["uids"]["real"], facts["gids"]["real"]) == (777, 778)


@pytest.mark.parametrize("isolation", ISOLATED)
def test_the_hosts_userland_is_read_only_with_a_private_rest(isolation: str) -> None:
    script = """
    for path in /usr/x /etc/x /bin/x /x /home/x /run/x /dev/x /proc/x /sys/x; do ./probe try-create $path; done
    for path in /tmp/x /dev/shm/x /work/x; do ./probe try-create $path; done
    ls -A /tmp /home /run /mnt /root
    """
    result = rf.run(["sh", "-c", script], isolation=isolation, files=PROBE_FILE)
    lines = result.stdout.decode().splitlines()
    # All of one sealed root, but /proc, a file system that has no new names.
    assert lines[:9] == ["EROFS open"] * 7 + ["ENOENT open", "EROFS open"]
    assert lines[9:12] == ["ok"] * 3
    assert [line for line in lines[12:] if line and not line.endswith(":")] == []


# ---- host name, network, user ----


@pytest.mark.parametrize("isolation", ISOLATED)
def test_hostname(isolation: str) -> None:
    before = socket.gethostname()
    result = rf.run(["cat", "/proc/sys/kernel/hostname"], isolation=isolation, hostname="worker-1.example")
    assert output(result) == b"worker-1.example\n"
    assert applied(result)["hostname"].effective == "worker-1.example"
    assert sandbox_facts(isolation)[0]["hostname"] == "ringfence"
    assert socket.gethostname() == before


def test_a_process_has_the_hosts_name() -> None:
    assert sandbox_facts("process")[0]["hostname"] == socket.gethostname()
    with pytest.raises(rf.CannotEnforce) as caught:
        run_probe("process", "exit", "0", hostname="other")
    assert [one.rule for one in caught.value.unmet] == ["hostname"]


@pytest.fixture
def listener() -> Iterator[int]:
    """A port of the host's loopback that accepts."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        yield server.getsockname()[1]


# How "none" shows: no such socket, or a loopback of its own on which nobody listens.
NO_NETWORK = {"process": b"EPERM socket\n", "container": b"ECONNREFUSED connect\n", "vm": b"ECONNREFUSED connect\n"}


@pytest.mark.parametrize("network", [None, "none"])
@pytest.mark.parametrize("isolation", LEVELS)
def test_no_network(isolation: str, network: str | None, listener: int) -> None:
    result = run_probe(isolation, "try-connect4", "127.0.0.1", str(listener), network=network)
    assert (result.exit_code, result.stdout) == (1, NO_NETWORK[isolation])
    one = applied(result)["network"]
    assert (one.requested, one.effective) == (network, "none")


@pytest.mark.parametrize("isolation", ["process", "container"])
def test_the_hosts_network(isolation: str, listener: int) -> None:
    """The positive control of the one above, too."""
    result = run_probe(isolation, "try-connect4", "127.0.0.1", str(listener), network="host")
    assert (result.exit_code, result.stdout) == (0, b"ok\n")
    assert applied(result)["network"].effective == "host"


INTERFACES = {"container": {"lo"}, "vm": {"lo"}}


@pytest.mark.parametrize("isolation", LEVELS)
def test_interfaces(isolation: str) -> None:
    here = set(host_facts()["interfaces"])
    assert set(sandbox_facts(isolation)[0]["interfaces"]) == INTERFACES.get(isolation, here)


@pytest.mark.parametrize("isolation", LEVELS)
def test_loopback_works_inside_where_there_is_one(isolation: str) -> None:
    code = (
        "import socket; s=socket.create_server(('127.0.0.1',0)); c=socket.create_connection(s.getsockname());"
        "print(s.accept()[0].send(b'x'))"
    )
    result = rf.run(["/usr/bin/python3", "-c", code], isolation=isolation)
    if isolation == "process":
        assert result.exit_code == 1
        assert b"PermissionError" in result.stderr
    else:
        assert output(result) == b"1\n"


@pytest.mark.parametrize(("user", "wanted"), [(0, (0, 0)), ("root", (0, 0)), (1234, (1234, 1234)), ("5:6", (5, 6))])
@pytest.mark.parametrize("isolation", ["process", "container"])
def test_user(isolation: str, user: int | str, wanted: tuple[int, int]) -> None:
    """Root on request is root without a capability."""
    need_root()
    result = run_probe(isolation, "facts", user=user)
    facts = json.loads(output(result))
    ids = [facts[kind][which] for which in ("real", "effective", "saved", "filesystem") for kind in ("uids", "gids")]
    assert ids == list(wanted) * 4
    assert facts["groups"] == []
    assert set(facts["capabilities"].values()) == {"0" * 16}
    assert applied(result)["user"].effective == f"{wanted[0]}:{wanted[1]}"


def test_user_in_a_guest() -> None:
    facts = json.loads(output(run_probe("vm", "facts", user="5:6")))
    assert (facts["uids"]["real"], facts["gids"]["real"]) == (5, 6)
    assert set(facts["capabilities"].values()) == {"0" * 16}


def test_a_user_that_the_image_does_not_have() -> None:
    for isolation in ISOLATED:
        with pytest.raises(rf.CannotEnforce) as caught:
            run_probe(isolation, "exit", "0", user="nobody-of-this-name")
        assert [one.rule for one in caught.value.unmet] == ["user"]


def test_who_the_default_is_on_the_host() -> None:
    """Without an account: a uid per process sandbox, a range of them per container."""
    need_root()
    for isolation, first in (("process", 0x71000000), ("container", 0x71000000)):
        facts, _ = sandbox_facts(isolation)
        outside = facts["uids"]["real"] if isolation == "process" else int(facts["uid_map"].split()[1])
        assert outside >= first
        assert ended(sandbox_facts(isolation)[1]) == ("exited", 0, None)
