"""The spec: what is normalised and what is refused, each with one clear sentence."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence.errors import SpecError
from ringfence.spec import File, FileIn, Limits, Mount, Network, Spec


def refused(sentence: str, *args: Any, **arguments: Any) -> None:
    with pytest.raises(SpecError) as caught:
        Spec.make(*(args or (["true"],)), **arguments)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_defaults() -> None:
    spec = Spec.make(["true"])
    assert spec.argv == (b"true",)
    assert spec.isolation == "container"
    assert spec.input is None
    assert spec.env == spec.files == spec.collect == spec.mounts == ()
    assert (spec.image, spec.user, spec.hostname) == ("host", None, None)
    assert spec.network == Network("none")
    assert spec.limits == Limits()
    assert (spec.check, spec.text) == (False, False)
    assert spec.asked == frozenset()


def test_everything_at_once_is_frozen_hashable_and_pickles(tmp_path: Path) -> None:
    spec = Spec.make(
        ["python3", b"\xff", tmp_path],
        isolation="vm",
        input="grüße",
        env={"A": "1", b"B": b"\xff"},
        files={"job.py": b"x", "in/run.sh": ("y", 0o755), "z": File("z", 0o600), "v": memoryview(b"v")},
        collect=["out/*.csv", b"**/x"],
        mounts=[Mount(tmp_path, "/data/b/"), Mount(tmp_path, "/data", writable=True)],
        image=tmp_path,
        user="5:6",
        hostname="worker-1.local",
        network="host",
        limits=Limits(memory="256M", cpus="1.5", pids=64, wall_time=10, cpu_time="5s", output="10M", disk="1G"),
        check=True,
        text=True,
    )
    assert spec.argv == (b"python3", b"\xff", os.fsencode(tmp_path))
    assert spec.input == "grüße".encode()
    assert spec.env == ((b"A", b"1"), (b"B", b"\xff"))
    assert spec.files == (
        FileIn(path=b"job.py", data=b"x", mode=0o644),
        FileIn(path=b"in/run.sh", data=b"y", mode=0o755),
        FileIn(path=b"z", data=b"z", mode=0o600),
        FileIn(path=b"v", data=b"v", mode=0o644),
    )
    assert spec.collect == (b"out/*.csv", b"**/x")
    # Parents first, whatever the order of the call.
    assert [mount.target for mount in spec.mounts] == [b"/data", b"/data/b"]
    assert spec.mounts[0].writable
    assert spec.mounts[1] == Mount(os.fsencode(tmp_path), b"/data/b")
    assert spec.image == str(tmp_path.resolve())
    assert spec.user == (5, 6)
    assert spec.limits.memory_bytes == 256 * 2**20
    assert spec.limits.cpus == 1.5
    assert spec.limits.pids == 64
    assert spec.limits.wall_time_ns == 10 * 10**9
    assert spec.limits.cpu_time_ns == 5 * 10**9
    assert spec.limits.output_bytes == 10 * 2**20
    assert spec.limits.disk_bytes == 2**30
    assert spec.asked == {
        *("memory", "cpus", "pids", "wall_time", "cpu_time", "output", "disk"),
        *("hostname", "user", "network", "mounts", "image"),
    }
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert {spec: 1}[spec.replace()] == 1
    with pytest.raises(AttributeError, match="frozen"):
        spec.isolation = "process"


def test_asked_tells_an_explicit_default_from_a_default() -> None:
    assert Spec.make(["true"], network="none", image="host").asked == {"network", "image"}
    assert Spec.make(["true"], limits=Limits(output="64M")).asked == {"output"}
    assert Spec.make(["true"], mounts=[], limits=Limits()).asked == frozenset()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("ls -l", "argv must be a list, not a str: ringfence never runs a shell"),
        (b"ls", "argv must be a list, not a bytes: ringfence never runs a shell"),
        ([], "argv must not be empty"),
        ([""], "argv[0] must not be empty"),
        (["ls", "a\0b"], "argv[1] contains a NUL byte"),
        ([b"\0"], "argv[0] contains a NUL byte"),
        (["ls", 7], "argv[1] must be str or bytes, not int"),
        (["ls", None], "argv[1] must be str or bytes, not NoneType"),
        (["ls", "\ud800"], "argv[1] has a character that can't be encoded"),
        (None, "argv must be a list of str or bytes, not NoneType"),
        (["ls", "x" * 131072], "argv[1] has 131072 bytes: Linux takes at most 131071 in one string"),
        (["ls", *["x" * 1000] * 1100], "argv and env together take"),
    ],
)
def test_argv_refuses(argv: Any, sentence: str) -> None:
    refused(sentence, argv)


def test_argv_takes_odd_but_legal_strings() -> None:
    argv: list[str | bytes] = [
        "cmd",
        "",
        "a b",
        "new\nline",
        "'\"",
        b"\xff\xfe",
        "é",
        "x" * 131071,
        "-",
        "--",
    ]
    assert Spec.make(argv).argv == tuple(os.fsencode(one) for one in argv)


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"": "x"}, "env: '' can't be a variable's name"),
        ({"A=B": "x"}, "env: 'A=B' can't be a variable's name"),
        ({"A\0": "x"}, "a name in env contains a NUL byte"),
        ({"A": "x\0"}, "env['A'] contains a NUL byte"),
        ({"A": 1}, "env['A'] must be str or bytes, not int"),
        ({1: "A"}, "a name in env must be str or bytes, not int"),
        ({"A": "1", b"A": "2"}, "is given twice"),
        (["A=1"], "env must be a dict, not list"),
        ({"A": "x" * 131070}, "is too long"),
        ({f"V{n}": "x" * 100_000 for n in range(11)}, "argv and env together take"),
    ],
)
def test_env_refuses(env: Any, sentence: str) -> None:
    refused(sentence, env=env)


def test_environment_is_clean_and_the_caller_wins() -> None:
    found = dict(Spec.make(["true"], env={"LANG": "de", "A": ""}).environment(b"/work"))
    assert found == {
        b"PATH": b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        b"LANG": b"de",
        b"TERM": b"dumb",
        b"HOME": b"/work",
        b"A": b"",
    }


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"../x": b""}, "files: '../x' must not contain '..'"),
        ({"/x": b""}, "must be relative to the work directory"),
        ({"a/": b""}, "has an empty component"),
        ({"": b""}, "files must not be empty"),
        ({"a": b"", "a/b": b""}, "files: 'a' is a file and a folder of 'a/b'"),
        ({"a/b/c": b"", "a": b""}, "files: 'a' is a file and a folder of 'a/b/c'"),
        ({"a": b"", "./a": b""}, "files: 'a' is given twice"),
        ({"a": 1}, "files['a'] must be bytes or str, not int"),
        ({"a": ["x"]}, "files['a'] must be bytes or str, not list"),
        ({"a": (b"", 0o644, 1)}, "files['a'] must be bytes, str, File or (data, mode)"),
        ({"a": (b"", 0o4755)}, "mode must be between 0 and 0o777, not 0o4755"),
        ({"a": (b"", -1)}, "mode must be between 0 and 0o777, not -0o1"),
        ({"a": (b"", "644")}, "mode must be between 0 and 0o777, not '644'"),
        (["a"], "files must be a dict"),
    ],
)
def test_files_refuses(files: Any, sentence: str) -> None:
    refused(sentence, files=files)


@pytest.mark.parametrize("collect", ["out/*", b"x", ["../x"], ["/x"], ["a/../b"], [""], ["a\0"], [1], 7])
def test_collect_refuses(collect: Any) -> None:
    refused("collect", collect=collect)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"memory": 0}, "memory must be positive, not 0"),
        ({"memory": -1}, "memory must be positive, not -1"),
        ({"memory": "12Q"}, "memory: '12Q' has no known unit"),
        ({"memory": "1K"}, "memory must be at least 1 MiB, not 1K"),
        ({"memory": True}, "memory must be a number or a str, not True"),
        ({"cpus": 0}, "cpus must be positive, not 0"),
        ({"pids": 0}, "pids must be positive, not 0"),
        ({"pids": 5_000_000}, "pids must be between 1 and 4194304"),
        ({"wall_time": 0}, "wall_time must be positive, not 0"),
        ({"wall_time": "10us"}, "wall_time must be at least 1 ms, not 10us"),
        ({"cpu_time": float("nan")}, "cpu_time must be a finite number, not nan"),
        ({"output": 0}, "output must be positive, not 0"),
        ({"disk": 1}, "disk must be at least 4 KiB, not 1"),
    ],
)
def test_limits_refuse(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        Limits(**arguments)
    assert sentence in str(caught.value)


def test_limits_replace_keeps_the_rest_exactly() -> None:
    limits = Limits(memory="256M", wall_time="1.000000001s", cpu_time=3, pids=9)
    changed = limits.replace(memory="1G")
    assert changed.memory_bytes == 2**30
    assert (changed.wall_time_ns, changed.cpu_time_ns) == (1_000_000_001, 3 * 10**9)
    assert changed.replace(memory="256M") == limits
    assert limits.asked == {"memory", "wall_time", "cpu_time", "pids"}
    assert Limits().output_bytes == 64 * 2**20


@pytest.mark.parametrize(
    "target",
    ["data", "", "/", "//", "/proc", "/proc/1", "/dev/x", "/sys", "/work", "/work/a", "/a/../b", "/a\0"],
)
def test_mount_target_refuses(target: str) -> None:
    with pytest.raises(SpecError, match="a mount's target"):
        Mount("/tmp", target)


def test_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Mount("x/../y", "/data").source == os.fsencode(tmp_path / "x") + b"/../y"
    assert Mount("/tmp", "/procedure").target == b"/procedure"
    refused("the source '/no/such/thing' doesn't exist", mounts=[Mount("/no/such/thing", "/data")])
    refused("two of them have the target '/data'", mounts=[Mount("/tmp", "/data"), Mount("/usr", "/data/")])
    refused("mounts must be a list of Mount(...) and Tmpfs(...), not of str", mounts=["/tmp:/data"])
    refused("mounts must be a list of Mount(...), not int", mounts=7)


def test_image(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "folder").mkdir()
    assert Spec.make(["true"], image=str(tmp_path / "link")).image == str(tmp_path.resolve() / "folder")
    refused("is neither 'host' nor a folder (No such file or directory)", image="alpine:3")
    made = Spec.make(["true"], image=tmp_path / "file")
    assert (made.image, made.image_is_disk) == (str(tmp_path.resolve() / "file"), True)
    assert not Spec.make(["true"], image=tmp_path / "folder").image_is_disk
    os.mkfifo(tmp_path / "pipe")
    refused("is neither 'host' nor a folder nor a disk image", image=tmp_path / "pipe")
    refused("image: / would show all of the host", image="/")
    refused("image must be a path, not 7", image=7)
    refused("image must not be empty", image="")


@pytest.mark.parametrize(
    ("user", "found"),
    [
        (0, (0, 0)),
        (1000, (1000, 1000)),
        ("1000", (1000, 1000)),
        ("5:6", (5, 6)),
        ("root", (0, 0)),
        ("nobody", "nobody"),
        ("www-data:adm", "www-data:adm"),
    ],
)
def test_user(user: int | str, found: object) -> None:
    assert Spec.make(["true"], user=user).user == found


@pytest.mark.parametrize(
    "user", [-1, 2**32 - 1, "4294967295", True, "", ":", "5:", ":6", "a b", "a:b:c", "a\n", 1.5, "9" * 5000]
)
def test_user_refuses(user: Any) -> None:
    refused("user", user=user)


@pytest.mark.parametrize("hostname", ["a", "A1-b", "x" * 63, "a.b.c", "1"])
def test_hostname(hostname: str) -> None:
    assert Spec.make(["true"], hostname=hostname).hostname == hostname


@pytest.mark.parametrize(
    "hostname", ["", "-a", "a-", "a..b", ".", "a_b", "a b", "é", "x" * 64, "a." * 32 + "b", "a\n", 7]
)
def test_hostname_refuses(hostname: Any) -> None:
    refused("hostname", hostname=hostname)


def test_network() -> None:
    network = Network(allow=["api.example.com:443", "[::1]:80"], publish={8080: 80, 443: 443})
    assert network.mode == "nat"
    assert [str(one) for one in network.allow or ()] == ["api.example.com:443", "[::1]:80"]
    assert network.publish == ((443, 443), (8080, 80))
    assert network.replace(allow=None).publish == network.publish
    assert Spec.make(["true"], network=network).network == network
    assert Spec.make(["true"], network="host").network == Network("host")
    refused("network must be 'none', 'nat' or 'host', not 'lan'", network="lan")
    refused("network must be 'none', 'nat', 'host' or Network(...), not bool", network=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "none", "allow": ["a:1"]},
        {"mode": "none", "publish": {1: 1}},
        {"mode": "none", "bandwidth": "1M"},
        {"publish": [(80, 1), (80, 2)]},
        {"bandwidth": 0},
        {"allow": ["::1:80"]},
        {"allow": ["[a]:80"]},
        {"allow": ["1.2.3.400:80"]},
        {"allow": ["10.0.0.1/8:80"]},
        {"allow": ["a.*.b:80"]},
        {"allow": ["a..b:80"]},
        {"allow": ["x" * 64 + ":80"]},
        {"allow": "a:1"},
        {"allow": ["a"]},
        {"allow": ["a:0"]},
        {"allow": ["a:65536"]},
        {"allow": [":80"]},
        {"allow": ["a b:80"]},
        {"allow": [7]},
        {"publish": {0: 80}},
        {"publish": {80: 70000}},
    ],
)
def test_network_refuses(arguments: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="network"):
        Network(**arguments)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("API.Example.com.:443", "api.example.com:443"),
        ("*.example.com:*", "*.example.com:*"),
        ("[2001:DB8::0:7]:443", "[2001:db8::7]:443"),
        ("192.0.2.0/24:53", "192.0.2.0/24:53"),
        ("[2001:db8::/32]:53", "[2001:db8::/32]:53"),
        ("*:443", "*:443"),
    ],
)
def test_a_destination_has_one_spelling(given: str, kept: str) -> None:
    network = Network(allow=[given])
    assert [str(one) for one in network.allow or ()] == [kept]
    assert network.replace() == network


def test_cgroup_limits() -> None:
    limits = Limits(memory="64M", swap=0, cpu_weight=50, cpuset="3,0-1", io_read="10M", io_write_ops=100)
    assert (limits.swap_bytes, limits.cpu_weight, limits.cpuset) == (0, 50, (0, 1, 3))
    assert (limits.io_read_bytes_per_second, limits.io_write_ops) == (10 * 2**20, 100)
    assert limits.replace() == limits
    assert limits.asked == {"memory", "swap", "cpu_weight", "cpuset", "io_read", "io_write_ops"}
    refusable: tuple[dict[str, Any], ...] = (
        {"swap": "1M"},
        {"cpu_weight": 0},
        {"cpuset": ""},
        {"cpuset": "2-1"},
        {"cpuset": []},
        {"io_read": -1},
    )
    for bad in refusable:
        with pytest.raises(SpecError):
            Limits(**bad)


def test_namespaces() -> None:
    found = Spec.make(["true"], namespaces={"net": "host", "ipc": 1234, "uts": "/run/x", "monotonic_offset": "-1h"})
    assert (found.namespaces.net, found.namespaces.ipc, found.namespaces.uts) == ("host", 1234, b"/run/x")
    assert (found.namespaces.user, found.namespaces.monotonic_offset_ns) == ("own", -3600 * 10**9)
    assert found.namespaces.replace() == found.namespaces
    assert "namespaces" in found.asked
    for bad in ({"net": "other"}, {"net": 0}, {"no": "own"}, {"time": "host", "boottime_offset": 1}, 7):
        refused("namespaces", namespaces=bad)


def test_capabilities_seccomp_and_devices() -> None:
    spec = Spec.make(
        ["true"],
        capabilities=["net_raw", "CAP_CHOWN"],
        seccomp={"defaultAction": "SCMP_ACT_ALLOW"},
        devices=["/dev/null"],
    )
    assert spec.capabilities == ("CAP_CHOWN", "CAP_NET_RAW")
    assert spec.seccomp.profile == '{"defaultAction": "SCMP_ACT_ALLOW"}'
    assert [(one.source, one.target, one.access) for one in spec.devices] == [(b"/dev/null", b"/dev/null", "rw")]
    assert {"capabilities", "seccomp", "devices"} <= spec.asked
    refused("capabilities: 'fly' is none", capabilities=["fly"])
    refused("capabilities must be a list", capabilities="net_raw")
    refused("is no device", devices=["/dev/fd"])
    refused("is below /dev", devices=["/etc/passwd"])


def test_tmpfs_and_paths() -> None:
    spec = Spec.make(["true"], mounts=[rf.Tmpfs("/b", "1M"), rf.Mount("/usr", "/a")], readable=["/usr", "/etc/"])
    assert [one.target for one in spec.tmpfs] == [b"/b"] and [one.target for one in spec.mounts] == [b"/a"]
    assert spec.tmpfs[0].size_bytes == 2**20 and spec.tmpfs[0].replace() == spec.tmpfs[0]
    assert (spec.readable, spec.writable) == ((b"/etc", b"/usr"), ())
    assert spec.asked == {"mounts", "tmpfs", "readable"}
    refused("two of them have the target", mounts=[rf.Tmpfs("/a"), rf.Mount("/usr", "/a")])
    refused("readable must be a list", readable="/usr")


def test_other_arguments_are_refused() -> None:
    refused("isolation must be 'process', 'container', 'vm' or 'auto', not 'chroot'", isolation="chroot")
    refused("input must be bytes or str, not int", input=7)
    refused("input has a character that UTF-8 can't encode", input="\ud800")
    refused("limits must be Limits(...), not dict", limits={"memory": 1})
    with pytest.raises(TypeError, match="timeout"):
        Spec.make(["true"], timeout=1)  # type: ignore[call-arg]


def test_one_command_after_the_other_under_the_same_rules(tmp_path: Path) -> None:
    limits = Limits(pids=9)
    first = Spec.make(["a"], isolation="process", limits=limits, text=True)
    second = Spec.make(["b", "c"], isolation="process", limits=Limits(pids=9), text=True)
    assert second == first.replace(argv=(b"b", b"c"))
    assert first.argv == (b"a",)  # nobody else's command gets into it
    with pytest.raises(SpecError):
        Spec.make([], isolation="process", limits=limits, text=True)
    # What is equal, but not the same, and what can change between two calls, is judged anew.
    assert Spec.make(["true"], hostname="a", check=False).check is False
    refused("isolation must be", ["true"], isolation=True)
    refused("limits must be", ["true"], isolation="process", limits=(9,), text=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert Spec.make(["true"], image=folder).image == str(folder)
    folder.rmdir()
    with pytest.raises(SpecError):
        Spec.make(["true"], image=folder)
    env = {"A": "1"}
    assert Spec.make(["true"], env=env).env == ((b"A", b"1"),)
    env["A"] = "2"
    assert Spec.make(["true"], env=env).env == ((b"A", b"2"),)
    shown: list[int] = []
    assert not Spec.make(["true"], check=shown).check  # type: ignore[arg-type]
    shown.append(1)
    assert Spec.make(["true"], check=shown).check  # type: ignore[arg-type]


def test_argv_is_read_once() -> None:
    assert Spec.make(iter(["a", b"b"])).argv == (b"a", b"b")  # type: ignore[arg-type]
    assert Spec.make(("a", "\udcff")).argv == (b"a", b"\xff")
    assert Spec.make(["a", "", "x" * 100_000, "y" * 100_000]).argv[1] == b""
