"""Choosing a level: the order, what a spec takes off a verdict, the refusals, and what is kept in the cache."""

from __future__ import annotations

import functools
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence import _cache
from ringfence.comparison import choice, facts
from ringfence.comparison.choice import judged, measure
from ringfence.comparison.isolation import RESOURCES, Isolation, Verdict
from ringfence.spec import Spec
from support.sandboxes import need_root

NAMES = [one.name for one in RESOURCES]
ALL_OWN = {name: Verdict(Isolation.OWN, "seen") for name in NAMES}


def spec(**options: Any) -> Spec:
    return Spec.make(["true"], **{"isolation": "container", **options})


# ---- names ----


def test_resources_are_found_by_any_spelling() -> None:
    given = [("host-name", "own"), ("OTHERS_memory", "own"), ("ipc", "restricted"), ("CPUs", "own")]
    assert dict(judged.named(given)) == {
        "host name": "own",
        "others' memory": "own",
        "IPC": "restricted",
        "CPUs": "own",
    }


def test_a_resource_that_there_is_not_or_that_is_given_twice_is_refused() -> None:
    with pytest.raises(rf.SpecError, match="no resource 'nets'; there are kernel, memory"):
        judged.named([("nets", "own")])
    with pytest.raises(rf.SpecError, match="'IPC' is given twice"):
        judged.named([("ipc", "own"), ("IPC", "restricted")])


@pytest.mark.parametrize("require", [{"kernel": "shared"}, {"kernel": None}, ["kernel"], {"kernel": "unknown"}])
def test_what_is_no_requirement_is_refused(require: Any) -> None:
    with pytest.raises(rf.SpecError, match="require"):
        spec(require=require)


# ---- what a spec takes off ----


def off(one: Spec, *, own_kernel: bool = False) -> dict[str, str]:
    """Which verdicts a spec lowers, were all of them "own"."""
    found = judged.lowered(ALL_OWN, one, own_kernel=own_kernel)
    return {name: str(verdict.isolation) for name, verdict in found.items() if verdict.isolation is not Isolation.OWN}


def test_a_root_on_the_hosts_kernel_holds_files_of_the_host_and_a_guests_need_not() -> None:
    assert off(spec()) == {"files": "restricted"}
    assert off(spec(isolation="vm"), own_kernel=True) == {}


def test_a_mount_is_files_of_the_host_in_a_guest_too(tmp_path: Path) -> None:
    mounts = [rf.Mount(tmp_path, "/data")]
    assert off(spec(isolation="vm", mounts=mounts), own_kernel=True) == {"files": "restricted"}


@pytest.mark.parametrize("source", ["/proc", "/sys/kernel", "/", "/proc/self", "/dev"])
def test_of_a_mount_of_the_kernels_own_files_nothing_is_known(source: str) -> None:
    lost = off(spec(isolation="vm", mounts=[rf.Mount(source, "/given", secret=True)]), own_kernel=True)
    assert {lost[name] for name in ("processes", "devices", "kernel settings", "network", "others' memory")} == {
        "unknown"
    }
    assert "kernel" not in lost


def test_a_symlink_to_the_kernels_files_is_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc/sys")
    assert judged.kernel_files(os.fsencode(tmp_path / "link"))
    assert not judged.kernel_files(os.fsencode(tmp_path))


def test_an_image_that_holds_the_kernels_files_is_as_a_mount_of_them(tmp_path: Path) -> None:
    assert off(spec(image=str(tmp_path))) == {"files": "restricted"}
    lost = off(spec(image="/sys/kernel"))
    assert {lost[name] for name in ("kernel settings", "devices", "cgroups")} == {"unknown"}


@pytest.mark.parametrize("rule", ["writable", "readable"])
def test_a_path_may_be_a_device_or_files_of_the_kernels(rule: str, tmp_path: Path) -> None:
    def lost(path: str) -> dict[str, str]:
        return off(spec(isolation="process", **{rule: [path]}))

    usual = {"files": "restricted"}
    assert lost("/dev/null") == lost(str(tmp_path)) == usual
    for path in ("/dev", "/"):
        assert lost(path)["kernel settings"] == "unknown"
    # Every process may read there, and did while it was measured.
    assert lost("/proc/sys") == usual if rule == "readable" else lost("/proc/sys")["kernel settings"] == "unknown"
    assert lost("/dev/ptmx") == dict.fromkeys(NAMES, "unknown")


def test_a_device_in_a_folder_that_may_be_written_to_is_one_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_root()  # to make a node
    (tmp_path / "deep").mkdir()
    os.mkfifo(tmp_path / "deep/fifo")
    (tmp_path / "deep/link").symlink_to("/dev/kmsg")
    os.mknod(tmp_path / "deep/zero", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    lost = functools.partial(off, spec(isolation="process", user=0, writable=[str(tmp_path)]))
    assert lost() == {"files": "restricted"}
    os.mknod(tmp_path / "deep/log", 0o600 | stat.S_IFCHR, os.makedev(1, 11))
    assert lost() == dict.fromkeys(NAMES, "unknown")
    monkeypatch.setattr(judged, "_MOST_ENTRIES", 2)
    assert lost() == {"files": "restricted", "devices": "unknown"}


@pytest.mark.parametrize(
    ("number", "harmless"), [((226, 128), True), ((226, 191), True), ((226, 0), False), ((226, 64), False)]
)
def test_of_graphics_only_a_node_that_renders_is_harmless(
    number: tuple[int, int], harmless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judged, "_node", lambda path: (stat.S_IFCHR, number))
    assert judged._opens_only_itself(b"/dev/dri/one") is harmless


def test_of_a_device_only_a_harmless_one_leaves_the_rest_as_it_is() -> None:
    assert off(spec(devices=["/dev/null"])) == {"files": "restricted", "devices": "shared"}


@pytest.mark.skipif(not os.path.exists("/dev/kmsg"), reason="there is no /dev/kmsg")
def test_a_device_of_which_is_not_known_what_it_opens_leaves_nothing() -> None:
    assert off(spec(devices=["/dev/kmsg"])) == dict.fromkeys(NAMES, "unknown")


@pytest.mark.parametrize(
    ("name", "lost"),
    [("net", {"network"}), ("pid", {"processes", "signals", "others' memory"}), ("uts", {"host name"})],
)
def test_a_joined_namespace_is_not_its_own(name: str, lost: set[str]) -> None:
    found = off(spec(namespaces={name: os.getpid()}))
    assert {one for one in found if found[one] == "shared"} == lost


def test_a_filter_that_lets_all_through_or_is_of_ones_own_gives_nothing() -> None:
    assert off(spec(seccomp=rf.Seccomp(mode="audit")))["system calls"] == "shared"
    profile = {"defaultAction": "SCMP_ACT_ALLOW"}
    assert off(spec(seccomp=profile)) == {"files": "restricted", "system calls": "unknown"}


def test_of_a_profile_that_is_named_only_what_no_filter_denies_is_left(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    lost = off(spec(seccomp=str(tmp_path / "profile.json")))
    assert {lost[name] for name in ("keyrings", "IPC", "network", "others' memory", "clock")} == {"unknown"}
    assert "kernel" not in lost


# ---- the order ----

HOST = rf.host()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Levels with these costs, verdicts and refusals; gives the list of those that are looked at."""

    def make(
        costs: Mapping[str, int | None], has: Mapping[str, Mapping[str, str]], refused: Mapping[str, str] | None = None
    ) -> list[str]:
        looked: list[str] = []

        def verdicts(one: Spec, here: object) -> dict[str, Verdict]:
            looked.append(one.isolation)
            told = has[one.isolation]
            return {name: Verdict(Isolation(told.get(name, "unknown")), f"e-{one.isolation}") for name in NAMES}

        def unmet(one: Spec, machine: object) -> tuple[rf.Unmet, ...]:
            why = (refused or {}).get(one.isolation)
            rule, _, reason = (why or "").partition(" ")
            return (rf.Unmet(rule, None, reason, "a help"),) if why else ()

        monkeypatch.setattr(choice, "verdicts", verdicts)
        monkeypatch.setattr(choice, "_unmet", unmet)
        monkeypatch.setattr(measure.Here, "start_ns", lambda self, name: costs[name])
        return looked

    return make


COSTS = {"process": 1_000_000, "container": 2_000_000, "vm": 300_000_000}
HAS = {
    "process": {"kernel": "shared", "network": "restricted"},
    "container": {"network": "own"},
    "vm": {"kernel": "own", "network": "own"},
}


@pytest.mark.parametrize(
    ("require", "chosen"),
    [
        ({}, "process"),
        ({"network": "restricted"}, "process"),
        ({"network": "own"}, "container"),
        ({"kernel": "own", "network": "own"}, "vm"),
    ],
)
def test_the_cheapest_that_meets_all_is_taken_and_no_dearer_one_is_looked_at(
    world: Any, require: dict[str, str], chosen: str
) -> None:
    looked = world(COSTS, HAS)
    found = choice.weigh(spec(isolation="auto", require=require), HOST)
    assert found.isolation == chosen
    order = ["process", "container", "vm"]
    assert looked == (order[: order.index(chosen) + 1] if require else [])
    assert [one.isolation for one in found.levels] == order


def test_the_order_is_by_what_was_measured_and_an_unknown_cost_comes_last(world: Any) -> None:
    world({"process": None, "container": 9, "vm": 5}, {name: {"network": "own"} for name in COSTS})
    found = choice.weigh(spec(isolation="auto", require={"network": "own"}), HOST)
    assert [one.isolation for one in found.levels] == ["vm", "container", "process"]
    assert found.isolation == "vm"
    assert "process is left for last" in found.why


def test_what_is_unknown_meets_nothing(world: Any) -> None:
    world(COSTS, {**HAS, "vm": {"kernel": "unknown"}})
    with pytest.raises(rf.CannotEnforce) as caught:
        choice.settled(spec(isolation="auto", require={"kernel": "restricted"}), HOST)
    assert [one.reason for one in caught.value.unmet] == [
        "process: kernel is shared (e-process)",
        "container: kernel is unknown (e-container)",
        "vm: kernel is unknown (e-vm)",
    ]
    assert caught.value.unmet[0].requested == {"kernel": "restricted"}


def test_a_level_that_can_not_do_what_the_spec_says_is_not_taken_and_says_why(world: Any) -> None:
    looked = world(COSTS, HAS, {"process": "hostname a process has the host's name", "vm": "isolation no QEMU"})
    found = choice.weigh(spec(isolation="auto", require={"network": "own"}), HOST, all_levels=True)
    assert (found.isolation, looked) == ("container", ["container"])
    assert "process does not: hostname: a process has the host's name" in found.why
    assert "vm does not: no QEMU" in found.why
    with pytest.raises(rf.CannotEnforce) as caught:
        choice.settled(spec(isolation="auto", require={"kernel": "own"}), HOST)
    assert {one.rule for one in caught.value.unmet} == {"hostname", "require", "isolation"}


def test_where_no_level_can_run_at_all_that_is_the_error(world: Any) -> None:
    world(COSTS, HAS, dict.fromkeys(COSTS, "isolation broken"))
    with pytest.raises(rf.Unavailable, match="broken") as caught:
        choice.settled(spec(isolation="auto"), HOST)
    assert (caught.value.isolation, caught.value.help) == ("auto", "a help")


def test_a_level_that_is_named_has_to_meet_the_requirements_too(world: Any) -> None:
    looked = world(COSTS, HAS)
    assert choice.settled(spec(require={"network": "own"}), HOST).isolation == "container"
    assert looked == ["container"]
    with pytest.raises(rf.CannotEnforce, match=r"process .* can't enforce here: require \(network is restricted"):
        choice.settled(spec(isolation="process", require={"network": "own"}), HOST)


def test_a_profile_is_read_once_and_what_is_measured_is_what_runs(world: Any, tmp_path: Path) -> None:
    world(COSTS, HAS)
    path = tmp_path / "profile.json"
    keys = []
    for call in ("keyctl", "swapon"):
        text = json.dumps(
            {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": [call], "action": "SCMP_ACT_KILL"}]}
        )
        path.write_text(f"\n {text}\n")
        found = choice.settled(spec(seccomp=rf.Seccomp(str(path), mode="report")), HOST)
        path.unlink()
        assert found.seccomp == rf.Seccomp(text, mode="report")
        keys.append(measure._key(measure._boundary(measure._probed(found))))
    assert keys[0] != keys[1]
    # One that can't be read is left to the levels, which refuse it.
    assert choice._with_profile(spec(seccomp=str(path))).seccomp.profile == os.fsencode(path)


def test_a_spec_without_a_level_is_never_run() -> None:
    from ringfence.api import check_spec, level

    with pytest.raises(rf.RingfenceError, match="has to be chosen"):
        check_spec(spec(isolation="auto"))
    with pytest.raises(rf.RingfenceError, match="has to be chosen"):
        check_spec(spec(require={"kernel": "own"}))
    with pytest.raises(rf.SpecError, match="no level 'auto'"):
        level("auto")


def test_a_choice_is_told_as_json_and_can_be_pickled(world: Any) -> None:
    import pickle

    world(COSTS, HAS)
    found = choice.weigh(spec(isolation="auto", require={"kernel": "own"}), HOST)
    told = json.loads(json.dumps(found.to_json()))
    assert (told["isolation"], told["require"], len(told["levels"])) == ("vm", {"kernel": "own"}, 3)
    assert told["levels"][2]["judged"][0]["met"] is True
    assert pickle.loads(pickle.dumps(found)) == found


# ---- what is kept ----


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int | None, int]]:
    """Asks for the cost of a start, as a new process would: it, and how often it was measured until now."""
    monkeypatch.setenv("RINGFENCE_CACHE", str(tmp_path / "cache"))
    taken: list[int] = []

    def starts(isolation: str) -> list[int]:
        taken.append(1)
        return [len(taken)]

    monkeypatch.setattr(measure, "_starts", starts)

    def ask() -> tuple[int | None, int]:
        measure._known.clear()
        measure._failed.clear()
        return measure.Here(HOST).start_ns("container"), len(taken)

    return ask


def entry(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "cache" / "starts").glob("[0-9a-f]*")
    return found


def test_what_was_measured_is_kept(counted: Any) -> None:
    assert [counted(), counted()] == [(1, 1), (1, 1)]


@pytest.mark.parametrize("damage", ["truncate", "other bytes", "no JSON, but sealed", "not what is written here"])
def test_what_is_damaged_is_measured_anew(counted: Any, tmp_path: Path, damage: str) -> None:
    counted()
    file = entry(tmp_path) / "measured.json"
    if damage == "truncate":
        file.write_bytes(b"")
    elif damage == "other bytes":
        file.write_bytes(b"[7]")
    else:
        file.write_bytes(b"{" if damage.startswith("no JSON") else b'["1"]')
        _cache._seal(str(entry(tmp_path)))
    assert counted() == (2, 2)


@pytest.mark.parametrize("mode", [0o666, 0o664])
def test_what_another_account_could_have_written_is_measured_anew(counted: Any, tmp_path: Path, mode: int) -> None:
    counted()
    (entry(tmp_path) / "measured.json").chmod(mode)
    assert counted() == (2, 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_belongs_to_another_account_is_measured_anew(counted: Any, tmp_path: Path) -> None:
    counted()
    os.chown(entry(tmp_path) / "measured.json", 12345, 12345)
    assert counted() == (2, 2)


def test_a_cache_folder_that_can_not_be_trusted_is_not_used(counted: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert [counted(), counted()] == [(1, 1), (2, 2)]


@pytest.mark.parametrize("what", ["boot", "version", "privileges", "namespaces", "landlock"])
def test_all_that_it_follows_from_is_in_its_key(counted: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    counted()
    machine = HOST
    if what == "boot":
        monkeypatch.setattr(measure, "_first_line", lambda path: "another")
    elif what == "version":
        monkeypatch.setattr(rf, "__version__", "99")
    elif what == "privileges":
        monkeypatch.setattr(measure, "_credentials", lambda: ["Uid: 7"])
    elif what == "namespaces":
        monkeypatch.setattr(measure, "namespaces_here", lambda: {"net": "net:[1]"})
    else:
        machine = HOST.replace(landlock_abi=99)
    measure._known.clear()
    assert measure.Here(machine).start_ns("container") == 2


def test_what_a_start_costs_is_the_lower_quartile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nine of which five were disturbed it is one that wasn't."""
    monkeypatch.setenv("RINGFENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "_starts", lambda isolation: [90, 1, 80, 2, 70, 3, 60, 4, 50])
    measure._known.clear()
    assert measure.Here(HOST).start_ns("process") == 3


def test_a_start_that_fails_has_no_cost_and_is_not_kept(
    counted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(isolation: str) -> list[int]:
        raise rf.ProtocolError("no")

    monkeypatch.setattr(measure, "_starts", fails)
    assert counted() == (None, 0)
    assert list((tmp_path / "cache" / "starts").glob("[0-9a-f]*")) == []


def test_facts_of_a_joined_namespace_are_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(facts, "bare_facts", lambda: {"attempts": {}})
    monkeypatch.setattr(measure, "_inside", lambda probed: {"attempts": {}})
    measure._known.clear()
    measure.Here(HOST).facts(spec(namespaces={"net": os.getpid()}))
    assert not (tmp_path / "cache" / "choices").exists()
    measure.Here(HOST).facts(spec())
    assert len(list((tmp_path / "cache" / "choices").glob("[0-9a-f]*"))) == 1


def test_facts_of_no_boot_that_is_known_are_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(facts, "bare_facts", lambda: {"attempts": {}})
    monkeypatch.setattr(measure, "_inside", lambda probed: {"attempts": {}})
    monkeypatch.setattr(measure, "_first_line", lambda path: None if path == measure._BOOT_ID else "1")
    measure._known.clear()
    measure.Here(HOST).facts(spec())
    assert not (tmp_path / "cache" / "choices").exists()


def test_mounts_and_amounts_do_not_make_it_another_sandbox_but_rules_of_the_boundary_do(tmp_path: Path) -> None:
    def key(**options: Any) -> str:
        return measure._key(measure._boundary(measure._probed(spec(**options))))

    usual = key()
    assert key(mounts=[rf.Mount(tmp_path, "/x")]) == key(hostname="a") == usual
    assert key(limits=rf.Limits(memory="64M", wall_time=1)) == key(limits=rf.Limits(memory="1G")) != usual
    others = [
        key(network="host"),
        key(network="nat"),
        key(user=0),
        key(capabilities=["net_raw"]),
        key(seccomp="unconfined"),
        key(namespaces={"ipc": "host"}),
        key(overlay=True),
        key(image=str(tmp_path)),
        key(limits=rf.Limits(cpuset="0")),
    ]
    assert len({usual, *others}) == 1 + len(others)


def test_a_kernel_of_ones_own_is_in_the_key_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ringfence.levels.vm import own_kernel

    class Prepared:
        def __init__(self, given: rf.Kernel) -> None:
            self.digest = Path(os.fsdecode(given.path)).read_text()

    monkeypatch.setattr(own_kernel, "prepare", Prepared)
    keys = set()
    for content in ("one", "two"):
        (tmp_path / "vmlinux").write_text(content)
        probed = measure._probed(spec(isolation="vm", kernel=str(tmp_path / "vmlinux")))
        keys.add(measure._key(measure._boundary(probed)))
    assert len(keys) == 2
