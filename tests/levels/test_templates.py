"""Guests restored from templates: as new as one that booted, and never from what was tampered with.

One cache of its own for the module, and one small shape of machine, so that a template is made once.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ringfence as rf
from ringfence import _cache
from ringfence.levels.state import state
from ringfence.levels.vm import kernel, start, template
from ringfence.levels.vm import sandbox as vm_sandbox
from support import unprivileged
from support.sandboxes import EXITED_0, PROBE, applied, ended, need_level, need_root, python_json

pytestmark = pytest.mark.usefixtures("own_templates")

# What no two guests may have alike, and what time each has. Two reads of the pool: one may be a buffer from before.
FACTS = r"""
import ctypes, json, os, time
auxval = ctypes.CDLL(None).getauxval
auxval.restype = ctypes.c_ulong
read = lambda path: open(path).read().strip()
print(json.dumps({
    "now": time.time_ns(),
    "unique": {
        "urandom": open("/dev/urandom", "rb").read(32).hex(),
        "getrandom": os.getrandom(32).hex(),
        "uuid": read("/proc/sys/kernel/random/uuid"),
        "boot_id": read("/proc/sys/kernel/random/boot_id"),
        "stack": [line for line in open("/proc/self/maps") if "[stack]" in line][0].split()[0],
        "libc": [line for line in open("/proc/self/maps") if "libc" in line][0].split()[0],
        "at_random": ctypes.string_at(auxval(25), 16).hex(),  # of which libc makes its stack canary
    },
    "uptime": float(read("/proc/uptime").split()[0]),
    "monotonic": time.monotonic(),
}))
"""


@pytest.fixture(scope="module", autouse=True)
def own_templates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The caller's cache, but for templates."""
    need_level("vm")
    usual = Path(_cache.root())
    own = tmp_path_factory.mktemp("cache")
    own.chmod(0o755)
    for name in os.listdir(usual):
        if name != template.KIND and not name.startswith("."):
            (own / name).symlink_to(usual / name)
    patch = pytest.MonkeyPatch()
    patch.setenv("RINGFENCE_CACHE", str(own))
    _forget()
    yield own
    _forget()
    patch.undo()


def _forget() -> None:
    """As a new process would begin."""
    state().ready.clear()
    template._loaded.clear()
    start._failed.clear()


@pytest.fixture(autouse=True)
def _none_waits() -> Iterator[None]:
    state().ready.clear()
    yield
    state().ready.clear()


def run(argv: list[str], **options: Any) -> rf.Result:
    limits = rf.Limits(wall_time=60, memory="64M", **options.pop("limits", {}))
    return rf.run(argv, isolation="vm", limits=limits, **options)


def how(result: rf.Result) -> tuple[Any, str]:
    row = applied(result)["start"]
    return row.effective, row.mechanism


def entry() -> Path:
    """The template of what `run` starts."""
    found = []
    for one in (Path(_cache.root()) / template.KIND).glob("*/manifest.json"):
        about = json.loads(one.read_text())
        if (about["memory_bytes"], about["cpus"], about["shares"]) == (192 << 20, 1, 1):
            found.append(one.parent)
    # Those of older kernels may be there too; the one that was used last is the one in use.
    return max(found, key=lambda one: one.stat().st_mtime_ns)


def facts(**options: Any) -> dict[str, Any]:
    before = time.time_ns()
    result = run(["/usr/bin/python3", "-I", "-S", "-c", FACTS], **options)
    assert ended(result) == EXITED_0, result
    found: dict[str, Any] = json.loads(result.stdout)
    found["how"] = how(result)
    found["between"] = before, time.time_ns()
    return found


def test_the_first_run_makes_it_and_the_next_ones_are_restored() -> None:
    _forget()
    for key, _, _ in _cache.entries(template.KIND):
        _cache.remove(template.KIND, key)
    first = run(["true"])
    assert how(first) == ("restored", "a template, made by this run")
    second = run(["true"])
    assert how(second) == ("restored", "a template")
    assert first.usage.startup_ns is not None and second.usage.startup_ns is not None
    assert second.usage.startup_ns < first.usage.startup_ns / 2
    third = run(["true"])
    assert how(third) == ("restored", "a template, by a QEMU that waited")


def test_no_two_guests_are_alike() -> None:
    found = [facts() for _ in range(4)]
    assert all(one["how"][0] == "restored" for one in found)
    for name in found[0]["unique"]:
        values = [one["unique"][name] for one in found]
        assert len(set(values)) == len(values), name
    for one in found:
        # Within the call; how exact it is, the next test tells.
        assert one["between"][0] < one["now"] < one["between"][1]
        assert 0 < one["uptime"] < 120
        assert abs(one["uptime"] - one["monotonic"]) < 1


def test_the_wall_clock_is_right_however_late_the_plan_comes() -> None:
    run(["true"])
    errors = []
    for pause in (0.0, 0.0, 0.3):
        with rf.Sandbox(isolation="vm", limits=rf.Limits(memory="64M")) as sandbox:
            opened = sandbox._open
            assert isinstance(opened, vm_sandbox.VmSandbox)
            clock = opened._guest.clock()
            time.sleep(pause)
            opened._guest.clock = lambda clock=clock: clock  # type: ignore[method-assign,misc]
            sandbox.run(["date", "+%s%N"])  # warm: the next one is printed soon after it is read
            best = None
            for _ in range(8):
                before = time.time_ns()
                now = int(sandbox.run(["date", "+%s%N"]).stdout)
                after = time.time_ns()
                if best is None or after - before < best[0]:
                    best = (after - before, now - before, now - after)
            assert best is not None
            # Off by no more than it is before the call or after its end.
            errors.append(max(-best[1], best[2], 0) / 1e6)
    assert max(errors) < 50, errors


def test_a_guest_that_waited_long_for_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    run(["true"])
    kept = entry().stat().st_ino
    monkeypatch.setattr(start, "_RESTORE_LIMIT_NS", 1_000_000_000)
    with rf.Sandbox(isolation="vm", limits=rf.Limits(memory="64M")) as sandbox:
        time.sleep(2.5)
        before = time.time_ns()
        result = sandbox.run(["date", "+%s%N"])
        assert before < int(result.stdout) < time.time_ns()
        assert how(result) == ("restored", "a template")
    # Where the host's clock was set meanwhile, what the guest's would be isn't known.
    with rf.Sandbox(isolation="vm", limits=rf.Limits(memory="64M")) as sandbox:
        opened = sandbox._open
        assert isinstance(opened, vm_sandbox.VmSandbox)
        assert opened._guest._begun is not None
        monotonic_ns, real_ns = opened._guest._begun
        opened._guest._begun = monotonic_ns, real_ns - 3600 * 10**9
        before = time.time_ns()
        result = sandbox.run(["date", "+%s%N"])
        assert before < int(result.stdout) < time.time_ns()
        assert how(result)[0] == "booted"
        assert "clock was set" in how(result)[1]
    assert entry().stat().st_ino == kept


def test_a_guest_that_ends_over_its_plan_costs_no_template(monkeypatch: pytest.MonkeyPatch) -> None:
    run(["true"])
    kept = entry().stat().st_ino
    actual = vm_sandbox.VmSandbox._run
    failed: list[vm_sandbox.VmSandbox] = []

    def fails_once(sandbox: vm_sandbox.VmSandbox, command: Any, **options: Any) -> Any:
        if not failed:
            failed.append(sandbox)
            raise rf.ProtocolError("the virtual machine ended")
        return actual(sandbox, command, **options)

    monkeypatch.setattr(vm_sandbox.VmSandbox, "_run", fails_once)
    result = run(["echo", "still"])
    assert (result.stdout, how(result)[0]) == (b"still\n", "booted")
    assert entry().stat().st_ino == kept


def test_no_command_runs_where_the_clock_cannot_be_set() -> None:
    run(["true"])
    with rf.Sandbox(isolation="vm", limits=rf.Limits(memory="64M")) as sandbox:
        opened = sandbox._open
        assert isinstance(opened, vm_sandbox.VmSandbox)
        opened._guest.clock()
        opened._guest.clock = lambda: (2**64 - 1, 0)  # type: ignore[method-assign]
        with pytest.raises(rf.StartError, match=r"clock_settime.*Invalid argument"):
            sandbox.run(["true"])


def test_timers_and_clocks_go_on() -> None:
    code = (
        "import time; a = time.monotonic(); time.sleep(0.1); b = time.monotonic(); time.sleep(0.1);"
        "print(b - a, time.monotonic() - b)"
    )
    for cpus in (1, 2):
        result = run(["/usr/bin/python3", "-I", "-S", "-c", code], limits={"cpus": cpus})
        assert ended(result) == EXITED_0
        assert all(0.1 <= float(one) < 2 for one in result.stdout.split()), result.stdout


def test_a_guest_does_not_change_its_template() -> None:
    run(["true"])
    files = {name: _digest(entry() / name) for name in ("memory", "runs", "state", "manifest.json")}
    (loaded,) = [one for one in template._loaded.values() if one.folder == str(entry())]
    before = _memory_digest(loaded)
    code = "x = bytearray(b'changed!') * (4 << 20); print(len(x))"
    assert run(["/usr/bin/python3", "-I", "-S", "-c", code]).stdout == b"33554432\n"
    assert _memory_digest(loaded) == before
    assert {name: _digest(entry() / name) for name in files} == files
    # Nor could a QEMU that its guest has taken over: this is how it has the memory.
    fd = os.open(f"/proc/self/fd/{loaded.memory_fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"changed!", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        import mmap

        with pytest.raises(PermissionError):
            mmap.mmap(fd, 4096, flags=mmap.MAP_SHARED)
        mmap.mmap(fd, 4096, flags=mmap.MAP_PRIVATE).close()  # the control: what QEMU does
    finally:
        os.close(fd)


def test_a_qemu_cannot_close_it_to_the_next_one() -> None:
    """An unprivileged caller's could: it has the uid that owns the files."""
    run(["true"])
    (loaded,) = [one for one in template._loaded.values() if one.folder == str(entry())]
    for fd in (loaded.memory_fd, loaded.state_fd):
        os.fchmod(fd, 0)
    one, other = loaded.open_both(), loaded.open_both()
    try:
        os.lseek(one[0], 4096, os.SEEK_SET)
        assert os.lseek(other[0], 0, os.SEEK_CUR) == 0
    finally:
        for fd in (*one, *other):
            os.close(fd)
    for fd in (loaded.memory_fd, loaded.state_fd):
        os.fchmod(fd, 0)
    assert how(run(["true"]))[0:2] == ("restored", "a template")
    assert template._loaded[loaded.key] is loaded


def test_what_guests_touch_is_given_back() -> None:
    def held() -> list[str]:
        links = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
            except FileNotFoundError:
                continue
        return [one for one in links if "ringfence-memory" in one]

    code = "x = bytearray(40 << 20); x[::4096] = bytes(b'x' * len(x[::4096])); print(len(x))"
    _forget()
    run(["true"], hostname="one")  # of another kind each time: none is made ahead
    (before,) = template._loaded.values()
    run(["true"], hostname="two")
    assert list(template._loaded.values()) == [before]  # the control
    assert run(["/usr/bin/python3", "-I", "-S", "-c", code], hostname="three").stdout == b"41943040\n"
    assert before.held_bytes > before.unpacked_bytes + template.MOST_GROWN_BYTES
    assert not template._loaded
    del before
    gc.collect()
    assert held() == []
    assert how(run(["true"], hostname="four")) == ("restored", "a template")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _memory_digest(loaded: template.Template) -> str:
    fd = os.open(f"/proc/self/fd/{loaded.memory_fd}", os.O_RDONLY)
    with open(fd, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "a link", "others may write"])
def test_what_was_tampered_with_is_made_anew(damage: str, tmp_path: Path) -> None:
    run(["true"])
    _forget()
    memory = entry() / "memory"
    if damage == "truncated":
        os.truncate(memory, memory.stat().st_size // 2)
    elif damage == "changed":
        with memory.open("r+b") as file:
            file.seek(1 << 20)
            file.write(b"not what was sealed")
    elif damage == "missing":
        (entry() / "state").unlink()
    elif damage == "others may write":
        memory.chmod(0o666)
    else:
        # The same bytes, but where another account might change them later.
        copy = tmp_path / "memory"
        memory.rename(copy)
        memory.symlink_to(copy)
    result = run(["echo", "still"])
    assert (result.stdout, how(result)) == (b"still\n", ("restored", "a template, made by this run"))
    assert memory.lstat().st_mode == 0o100644


def test_one_that_qemu_refuses_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    run(["true"])
    folder = entry()
    _forget()
    # Whole by its seal, and nonsense to QEMU.
    (folder / "state").write_bytes(b"no state at all")
    _cache._seal(str(folder))
    result = run(["echo", "still"])
    assert (result.stdout, how(result)) == (b"still\n", ("restored", "a template, made by this run"))


def test_where_none_can_be_made_the_guest_boots(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run(["true"])  # whatever ran before, there is one
    _forget()
    _cache.remove(template.KIND, entry().name)
    monkeypatch.setattr(template, "_make", cannot)
    for _ in range(2):
        result = run(["echo", "booted"])
        assert result.stdout == b"booted\n"
        assert how(result)[0] == "booted"
        assert "No space left on device" in how(result)[1]
    # The reason holds for this process; another one tries again.
    monkeypatch.undo()
    assert how(run(["true"]))[0] == "booted"
    _forget()
    assert how(run(["true"]))[0] == "restored"


def test_another_kernel_or_machine_is_another_template() -> None:
    found = kernel.find()
    assert found is not None
    seen: list[Any] = []

    def note(machine: Any, *_: object, **__: object) -> None:
        seen.append(machine)
        raise OSError("no more is needed")

    patch = pytest.MonkeyPatch()
    with patch.context() as changed:
        changed.setattr(vm_sandbox, "Guest", note)
        with pytest.raises(OSError, match="no more"):
            run(["true"])
    (machine,) = seen
    key = template.key_of(machine)
    assert template.key_of(machine.replace(user=(1, 1), cpu_weight=7, cpuset=(0,))) == key
    others = [
        machine.replace(cpus=2),
        machine.replace(memory_bytes=machine.memory_bytes * 2),
        machine.replace(shares=()),
        machine.replace(kernel=machine.initramfs),
        machine.replace(sets=("overlay",)),
        machine.replace(accelerator="kvm"),
    ]
    assert len({key, *map(template.key_of, others)}) == len(others) + 1


def test_sizes_of_machines() -> None:
    mib = 1 << 20
    for wanted in (1, 64 * mib, 64 * mib + 1, 500 * mib, 512 * mib, 640 * mib, 3000 * mib, 100_000 * mib):
        found = template.machine_memory(wanted)
        assert wanted <= found < wanted + max(64 * mib, wanted // 4 + 1)
    assert template.machine_memory(512 * mib) == 512 * mib
    # Few: what a thousand different limits ask for is a handful of templates.
    assert len({template.machine_memory(number * 4 * mib) for number in range(32, 1024)}) < 20


def test_a_rootfs_folder_is_restored_with_a_disk_of_its_own(tmp_path: Path) -> None:
    """Two folders of the same size share a template, in which neither of them ever was."""
    tmp_path.chmod(0o755)
    for number in range(2):
        root = tmp_path / f"root{number}"
        for name in ("usr", "bin", "lib", "lib64", "etc"):
            (root / name).mkdir(parents=True)
        (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
        (root / "etc/which").write_text(str(number))
        (root / "bin/probe").write_bytes(Path(PROBE).read_bytes())
        (root / "bin/probe").chmod(0o755)
    said = []
    for number in (0, 1, 0):
        image = str(tmp_path / f"root{number}")
        with rf.Sandbox(isolation="vm", image=image, limits=rf.Limits(memory="64M")) as sandbox:
            which, own_id = (sandbox.run(["/bin/probe", "read", f"/etc/{name}"]) for name in ("which", "machine-id"))
        assert ended(which) == ended(own_id) == EXITED_0, (which, own_id)
        said.append((which.stdout, own_id.stdout, how(which)[1]))
    assert [one[0] for one in said] == [b"0", b"1", b"0"]
    ids = {one[1] for one in said}
    assert len(ids) == 3
    assert all(len(one) == 33 and one != b"0123456789abcdef0123456789abcdef\n" for one in ids)
    assert said[1][2] == said[2][2] == "a template"


def test_several_processes_make_one_at_once() -> None:
    _forget()
    _cache.remove(template.KIND, entry().name)
    code = """
import json, ringfence as rf
r = rf.run(["echo", "here"], isolation="vm", limits=rf.Limits(memory="64M"))
print(json.dumps([r.stdout.decode(), [one.mechanism for one in r.applied if one.rule == "start"][0]]))
"""
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(python_json(code))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one[0] for one in found] == ["here\n"] * 3
    assert sorted(one[1] for one in found) == ["a template", "a template", "a template, made by this run"]


def test_20_at_once() -> None:
    run(["true"])
    results: list[Any] = []
    code = "import os, time; print(os.getrandom(16).hex(), time.time())"

    def one() -> None:
        before = time.time()
        result = run(["/usr/bin/python3", "-I", "-S", "-c", code], limits={"pids": 16})
        results.append((before, result, time.time()))

    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    assert {ended(result) for _, result, _ in results} == {EXITED_0}
    assert all(how(result)[0] == "restored" for _, result, _ in results)
    assert len({result.stdout.split()[0] for _, result, _ in results}) == 20
    assert all(before < float(result.stdout.split()[1]) < after for before, result, after in results)


def test_usage_tells_the_guests_own_and_the_hosts_apart() -> None:
    run(["true"])
    code = "x = bytearray(16 << 20); sum(range(200_000))"
    used = run(["/usr/bin/python3", "-I", "-S", "-c", code]).usage
    assert used.source == "the guest's cgroup v2"
    # A guest takes the time in which its host lets it wait for its own, so neither is always the larger one.
    assert used.vmm_cpu_ns is not None and used.vmm_cpu_ns > 10_000_000
    assert used.cpu_ns is not None and used.cpu_ns > 10_000_000
    assert used.vmm_memory_peak_bytes is not None and used.vmm_memory_peak_bytes > 16 << 20
    assert used.memory_peak_bytes is not None and 16 << 20 < used.memory_peak_bytes < 64 << 20


UNPRIVILEGED = """
import json, os, ringfence as rf
found = []
for _ in range(3):
    result = rf.run(["sh", "-c", "id -u; cat /proc/sys/kernel/random/boot_id"], isolation="vm")
    found.append([result.stdout.decode(), [one.mechanism for one in result.applied if one.rule == "start"][0]])
print(json.dumps(found))
"""


def test_an_unprivileged_callers_guests_are_restored_from_its_own_template() -> None:
    need_root()
    kept = unprivileged.home() / ".cache/ringfence"
    if not (kept / "kernels").exists():
        shutil.copytree(Path(_cache.root()) / "kernels", kept / "kernels", symlinks=True)
    for one in (kept.parent, kept, *kept.rglob("*")):
        os.chown(one, unprivileged.UID, unprivileged.UID, follow_symlinks=False)
    found = unprivileged.python_json(UNPRIVILEGED, timeout=280)
    assert [one[1] for one in found] == [
        "a template, made by this run",
        "a template",
        "a template, by a QEMU that waited",
    ]
    assert len({one[0] for one in found}) == 3
    assert all(one[0].startswith("1000\n") for one in found)
    (made,) = (one for one in (kept / template.KIND).iterdir() if not one.name.startswith("."))
    assert made.stat().st_uid == unprivileged.UID
