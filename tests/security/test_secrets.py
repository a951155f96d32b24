"""A mount that would show a secret of the host is refused, unless the caller says that it is meant."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

import ringfence as rf
from ringfence.images import secrets, tree
from ringfence.images.masked import MASKED
from support.sandboxes import LEVELS, LOCAL_LEVELS, ended, need_root


def check(isolation: str, source: Path | str, *, secret: bool = False) -> str:
    """Why that mount is refused; "" where it isn't. Nothing is started."""
    from ringfence.api import check_spec
    from ringfence.spec import Spec

    mount = rf.Mount(source, "/data", secret=secret)
    try:
        check_spec(Spec.make(["true"], isolation=isolation, mounts=[mount]))
    except rf.CannotEnforce as error:
        # A process sees the host's paths, which is another matter.
        found = [one for one in error.unmet if "can't appear elsewhere" not in one.reason]
        if not found:
            return ""
        (one,) = found
        assert (one.rule, one.requested) == ("mounts", (mount.source, mount.target, False))
        assert "secret=True" in one.help
        return one.reason
    return ""


HELD = [".ssh/id_x", ".aws/credentials", ".config/gcloud/x", ".env", "app/.env.production", ".kube/config", ".netrc"]
HELD += [".docker/config.json", ".git-credentials", ".npmrc", ".pypirc", ".cargo/credentials.toml", "app/.gnupg/x"]
HELD += [".password-store/x", ".mozilla/x", ".config/google-chrome/x", ".azure/x", ".local/share/keyrings/x"]


@pytest.mark.parametrize("name", HELD)
def test_a_folder_that_holds_a_secret_and_the_secret_itself(name: str, tmp_path: Path) -> None:
    """By the names that such things have, in whatever folder; up to two levels below what is mounted."""
    file = tmp_path / "home" / name
    (tmp_path / "home").mkdir()
    assert check("container", tmp_path / "home") == ""  # the control
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("secret")
    for source in (file, tmp_path / "home"):
        assert "secret" in check("container", source), source
        assert check("container", source, secret=True) == ""
    # By another name it is the same.
    (tmp_path / "link").symlink_to(file)
    assert "secret" in check("container", tmp_path / "link")


def test_what_is_no_secret(tmp_path: Path) -> None:
    for name in (".env.example", "src/environment.py", ".config/nvim/init.lua", ".git/config", "ssh.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert check("container", tmp_path) == ""
    for source in ("/usr", "/usr/share", "/etc/hostname", "/tmp"):
        assert check("container", source) == "", source


PLACES = ["/etc/shadow", "/etc", "/proc", "/proc/1", "/run", "/", "/var", "/etc/ssl"]


@pytest.mark.parametrize("source", PLACES)
@pytest.mark.parametrize("isolation", LEVELS)
def test_a_place_of_the_hosts_secrets(isolation: str, source: str) -> None:
    assert check(isolation, source).startswith("it would show a secret: ")
    assert check(isolation, source, secret=True) == ""


def test_sockets_and_what_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = tmp_path / "agent" / "s"
    agent.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(agent))
        assert "is a socket" in check("container", agent)
        assert check("container", agent.parent) == ""
        for variable, value in (
            ("SSH_AUTH_SOCK", f"{agent}"),
            ("DOCKER_HOST", f"unix://{agent}"),
            ("DBUS_SESSION_BUS_ADDRESS", f"unix:path={agent}"),
            ("KUBECONFIG", f"/nowhere:{agent}"),
        ):
            with monkeypatch.context() as changed:
                changed.setenv(variable, value)
                assert str(agent) in check("container", agent.parent), variable
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "home directory" in check("container", tmp_path)
    assert check("container", agent.parent) == ""


@pytest.mark.parametrize("isolation", LOCAL_LEVELS)
def test_where_it_is_meant_it_is_shown(isolation: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("KEY=1\n")
    for folder in (tmp_path, tmp_path.parent):
        folder.chmod(0o755)
    tmp_path.parent.parent.chmod(0o711)
    target = str(tmp_path) if isolation == "process" else "/data"
    result = rf.run(["cat", f"{target}/.env"], isolation=isolation, mounts=[rf.Mount(tmp_path, target, secret=True)])
    assert result.stdout == b"KEY=1\n"


def test_the_look_into_a_folder_is_bounded(tmp_path: Path) -> None:
    """A name beyond the bound may be missed; the mount must not take ages."""
    for number in range(5000):
        (tmp_path / f"f{number}").touch()
    assert secrets.why_secret(os.fsencode(tmp_path)) == ""


def test_known_places_of_the_host_are_masked() -> None:
    need_root()
    there = [os.fsdecode(path) for path in MASKED if os.path.lexists(path)]
    assert {os.fsdecode(path) for path in tree.host_secrets()} >= {"/etc/shadow"}
    result = rf.run(["sh", "-c", 'for f; do cat "$f" 2>/dev/null; ls -A "$f" | grep -v "^/"; done', "sh", *there])
    assert (ended(result)[0], result.stdout) == ("exited", b"")
