"""Profiles in JSON: what is read, what is refused, and that the compiled program answers as the profile says."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import Any

import pyseccomp  # type: ignore[import-untyped]
import pytest

from ringfence.errors import SpecError, Unmet
from ringfence.linux import seccomp_bpf as bpf
from ringfence.linux import seccomp_compiler, seccomp_profile, seccomp_program
from ringfence.linux._syscall_lists import ALLOWED, DENIED, NEWER
from ringfence.spec import Seccomp, Spec

NATIVE = pyseccomp.system_arch()
NAMES = sorted({*ALLOWED, *DENIED, "clone", "socket", "ioctl", "openat", "personality", "clone3"})
NAMES = [name for name in NAMES if pyseccomp.resolve_syscall(NATIVE, name) != -1 or name in NEWER]
ACTIONS = {
    "SCMP_ACT_KILL": 0,
    "SCMP_ACT_KILL_THREAD": 0,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x30000,
    "SCMP_ACT_ERRNO": 0x50001,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_CACHE", str(tmp_path / "cache"))


def number(name: str) -> int:
    found: int = pyseccomp.resolve_syscall(NATIVE, name)
    return found if found >= 0 else NEWER.get(name, -1)


def parsed(profile: dict[str, Any], **options: Any) -> seccomp_profile.Profile:
    return seccomp_profile.parse(json.dumps(profile).encode(), **options)


def compiled(profile: dict[str, Any], **options: Any) -> bytes:
    return seccomp_compiler.compile(parsed(profile, **options))


def rule(*names: str, action: str = "SCMP_ACT_ALLOW", **more: Any) -> dict[str, Any]:
    return {"names": list(names), "action": action, **more}


def denying(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": list(rules), **more}


# ---- a simple interpreter of a profile, by nothing but its JSON ----


def says(profile: dict[str, Any], name: str, arguments: tuple[int, ...]) -> set[int]:
    """The answers of the rules that hold; the default's where none does, or says something else."""

    def answer(action: str, code: int | None) -> int:
        return ACTIONS[action] if action != "SCMP_ACT_ERRNO" or code is None else 0x50000 | code

    def holds(one: dict[str, Any]) -> bool:
        given, value = arguments[one["index"]], one["value"]
        return {  # type: ignore[no-any-return]
            "SCMP_CMP_NE": given != value,
            "SCMP_CMP_LT": given < value,
            "SCMP_CMP_LE": given <= value,
            "SCMP_CMP_EQ": given == value,
            "SCMP_CMP_GE": given >= value,
            "SCMP_CMP_GT": given > value,
            "SCMP_CMP_MASKED_EQ": given & value == one.get("valueTwo", 0),
        }[one["op"]]

    default = answer(profile["defaultAction"], profile.get("defaultErrnoRet"))
    found = set()
    for one in profile["syscalls"]:
        conditions = one.get("args", [])
        indexes = [each["index"] for each in conditions]
        # runc: two conditions on one argument are alternatives.
        met = any if len(set(indexes)) < len(indexes) else all
        if name in one["names"] and met(map(holds, conditions)):
            found.add(answer(one["action"], one.get("errnoRet")))
    return found - {default} or {default}


def random_profile(chance: random.Random) -> dict[str, Any]:
    values = [0, 1, 2, 7, 40, 0x7E020000, 0xFFFFFFFF, 2**32, 2**32 + 1, 2**63, 2**64 - 1]

    def action(where: str) -> dict[str, Any]:
        name = chance.choice(list(ACTIONS))
        found: dict[str, Any] = {"action" if where == "rule" else "defaultAction": name}
        if name == "SCMP_ACT_ERRNO" and chance.random() < 0.5:
            found["errnoRet" if where == "rule" else "defaultErrnoRet"] = chance.choice([0, 1, 13, 38, 4094])
        return found

    def condition() -> dict[str, Any]:
        operator = chance.choice(["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"])
        value = chance.choice([*values, chance.getrandbits(64), chance.getrandbits(16)])
        found = {"index": chance.randrange(6), "value": value, "op": f"SCMP_CMP_{operator}"}
        if operator == "MASKED_EQ":
            found["valueTwo"] = value & chance.choice([0, value, chance.getrandbits(64)])
        return found

    names = chance.sample(NAMES, chance.randint(1, 80))
    rules = []
    while names:
        some, names = names[: chance.randint(1, 9)], names[9:]
        about = action("rule")
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            conditions = [condition() for _ in range(chance.choice([0, 0, 1, 1, 2, 3]))]
            # Of one call all rules say the same, so none contradicts another.
            rules.append({"names": some, **about, **({"args": conditions} if conditions else {})})
    return {**action("default"), "syscalls": rules}


@pytest.mark.parametrize("seed", range(60))
def test_the_program_answers_as_the_profile_says(seed: int) -> None:
    chance = random.Random(seed)
    profile = random_profile(chance)
    program = compiled(profile)
    named = {name for one in profile["syscalls"] for name in one["names"]}
    newest = max(number(name) for name in named)
    permissive = profile["defaultAction"] in ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG")
    for name in sorted(named):
        if number(name) < 0:
            continue
        of_this = [one for rule in profile["syscalls"] if name in rule["names"] for one in rule.get("args", [])]
        edges = {(one["value"] + change) % 2**64 for one in of_this for change in (-1, 0, 1)}
        edges |= {one.get("valueTwo", 0) for one in of_this} | {0, 2**32, 2**64 - 1}
        for _ in range(60 if of_this else 2):
            arguments = tuple(chance.choice([*edges, chance.getrandbits(64)]) for _ in range(6))
            assert {bpf.answer(program, NATIVE, number(name), arguments)} == says(profile, name, arguments), name
    ((default),) = says({**profile, "syscalls": []}, "", ())
    for one in set(range(600)) - {number(name) for name in named}:
        wanted = 0x50000 | errno.ENOSYS if one > newest >= 0 and not permissive else default
        assert bpf.answer(program, NATIVE, one) == wanted, one
    assert bpf.answer(program, pyseccomp.Arch.AARCH64 if NATIVE != pyseccomp.Arch.AARCH64 else 3, 1) == bpf.KILL_PROCESS


def test_dockers_conditions() -> None:
    profile = denying(
        rule("read"),
        rule("mount", includes={"caps": ["CAP_SYS_ADMIN"]}),
        rule("chroot", excludes={"caps": ["CAP_CHOWN"]}),
        rule("ptrace", includes={"minKernel": "4.8"}),
        rule("bpf", includes={"minKernel": "99.0"}),
        rule("acct", excludes={"minKernel": "4.8"}),
        rule("iopl", includes={"arches": ["s390x"]}),
        rule("reboot", excludes={"arches": ["amd64", "arm64"]}),
        rule("kcmp", includes={"arches": ["amd64"], "caps": ["CAP_SYS_PTRACE", "CAP_SYS_ADMIN"]}),
        archMap=[{"architecture": "SCMP_ARCH_S390X", "subArchitectures": ["SCMP_ARCH_S390"]}],
    )

    def allowed(*capabilities: str) -> set[str]:
        found = parsed(profile, capabilities=capabilities, kernel="6.1.0-44-amd64", machine="x86_64")
        assert found.architectures == ()
        return {one.name for one in found.rules}

    assert allowed() == {"read", "chroot", "ptrace"}
    assert allowed("CAP_SYS_ADMIN") == {"read", "chroot", "ptrace", "mount"}
    assert allowed("CAP_SYS_ADMIN", "CAP_CHOWN") == {"read", "ptrace", "mount"}
    assert allowed("CAP_SYS_PTRACE", "CAP_SYS_ADMIN") == {"read", "chroot", "ptrace", "mount", "kcmp"}


def test_other_architectures() -> None:
    profile = denying(rule("getpid", "mseal"), architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])
    if NATIVE != pyseccomp.Arch.X86_64:
        pytest.skip("the numbers are x86's")
    program = compiled(profile)
    i386 = pyseccomp.resolve_syscall(pyseccomp.Arch.X86, "getpid")
    assert bpf.answer(program, NATIVE, 39) == bpf.ALLOW
    assert bpf.answer(program, NATIVE, 39 | bpf.X32_BIT) == bpf.ALLOW
    assert bpf.answer(program, pyseccomp.Arch.X86, i386) == bpf.ALLOW
    for arch, one in ((NATIVE, 462), (NATIVE, 462 | bpf.X32_BIT), (pyseccomp.Arch.X86, 462)):
        assert bpf.answer(program, arch, one) == bpf.ALLOW
    assert bpf.answer(program, pyseccomp.Arch.AARCH64, 172) == bpf.KILL_PROCESS
    assert bpf.answer(compiled(denying(rule("getpid"))), pyseccomp.Arch.X86, i386) == bpf.KILL_PROCESS


REFUSED: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "no JSON": (b"{", "no JSON"),
    "no object": (b"[]", "must be an object"),
    "deep": (b"[" * 100000, "no JSON"),
    "a key twice": (b'{"defaultAction": "SCMP_ACT_ALLOW", "defaultAction": "SCMP_ACT_ERRNO"}', "given twice"),
    "no default": ({"syscalls": []}, "no defaultAction"),
    "an unknown key": (denying(sycalls=[]), "'sycalls', which is not known"),
    "an unknown key of a rule": (denying(rule("read", arg=[])), "'arg', which is not known"),
    "an unknown key of a condition": (denying(rule("read", args=[{"index": 0, "value": 1, "Op": "x"}])), "'Op'"),
    "an unknown action": (denying(rule("read", action="SCMP_ACT_PERMIT")), "'SCMP_ACT_PERMIT', which is none"),
    "no action": (denying({"names": ["read"]}), "the action None"),
    "an unknown operator": (denying(rule("read", args=[{"index": 0, "value": 1, "op": "="}])), "'=', which is none"),
    "an index of 6": (denying(rule("read", args=[{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}])), "from 0 to 5"),
    "a value below 0": (denying(rule("read", args=[{"index": 0, "value": -1, "op": "SCMP_CMP_EQ"}])), "from 0 to"),
    "a value of 65 bits": (denying(rule("read", args=[{"index": 0, "value": 2**64, "op": "SCMP_CMP_EQ"}])), "from 0"),
    "a value with a point": (denying(rule("read", args=[{"index": 0, "value": 1.0, "op": "SCMP_CMP_EQ"}])), "from 0"),
    "an errno of 4095": (denying(rule("read", action="SCMP_ACT_ERRNO", errnoRet=4095)), "from 0 to 4094"),
    "an errno to allow": (denying(rule("read", errnoRet=1)), "takes none"),
    "an errno by no name": (denying(rule("read", action="SCMP_ACT_ERRNO", errno="EWHAT")), "'EWHAT'"),
    "two errnos": (denying(rule("read", action="SCMP_ACT_ERRNO", errno="EPERM", errnoRet=2)), "not that of errnoRet"),
    "no names": (denying({"names": [], "action": "SCMP_ACT_ALLOW"}), "between 1 and"),
    "name and names": (denying(rule("read", name="write")), "either 'names' or 'name'"),
    "an empty name": (denying(rule("")), "a list of strings"),
    "an unknown architecture": (denying(architectures=["SCMP_ARCH_VAX"]), "'SCMP_ARCH_VAX'"),
    "two kinds of architectures": (
        denying(architectures=["SCMP_ARCH_X86"], archMap=[{"architecture": "SCMP_ARCH_X86_64"}]),
        "both 'architectures' and 'archMap'",
    ),
    "an unknown flag": (denying(flags=["SECCOMP_FILTER_FLAG_FAST"]), "is no flag"),
    "an unknown condition of Docker's": (denying(rule("read", includes={"cap": ["CAP_CHOWN"]})), "'cap'"),
    "a kernel that is none": (denying(rule("read", includes={"minKernel": "new"})), "like '4.8'"),
    "a contradiction": (
        denying(
            rule("read"), rule("read", action="SCMP_ACT_KILL", args=[{"index": 1, "value": 1, "op": "SCMP_CMP_EQ"}])
        ),
        "contradict each other",
    ),
    "an overlap": (
        denying(
            rule("ioctl", args=[{"index": 1, "value": 5, "op": "SCMP_CMP_GE"}]),
            rule("ioctl", action="SCMP_ACT_KILL", args=[{"index": 1, "value": 7, "op": "SCMP_CMP_EQ"}]),
        ),
        "contradict each other",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused(what: str) -> None:
    profile, sentence = REFUSED[what]
    data = profile if isinstance(profile, bytes) else json.dumps(profile).encode()
    with pytest.raises(SpecError) as caught:
        seccomp_compiler.compile(seccomp_profile.parse(data))
    assert sentence in str(caught.value)


UNKEPT: dict[str, tuple[dict[str, Any], str]] = {
    "a listener": (denying(listenerPath="/run/agent.sock"), "nobody would connect"),
    "NOTIFY": (denying(rule("mount", action="SCMP_ACT_NOTIFY")), "nobody here would answer"),
    "TRACE": (denying(rule("mount", action="SCMP_ACT_TRACE")), "no tracer"),
    "TRACE by default": ({"defaultAction": "SCMP_ACT_TRACE"}, "no tracer"),
    "a flag for a listener": (denying(flags=["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]), "about a listener"),
    "another byte order": (denying(rule("read"), architectures=["SCMP_ARCH_S390X"]), "can't filter for it"),
    "a call that nobody knows, denied": (
        {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule("mounnt", action="SCMP_ACT_ERRNO")]},
        "knows its number",
    ),
}


@pytest.mark.parametrize("what", UNKEPT)
def test_what_cannot_be_kept_is_refused(what: str) -> None:
    profile, sentence = UNKEPT[what]
    with pytest.raises(Unmet) as caught:
        compiled(profile)
    assert caught.value.rule == "seccomp"
    assert sentence in caught.value.reason


def test_a_call_that_nobody_knows_is_denied_by_default() -> None:
    program = compiled(denying(rule("write", "mounnt", "s390_pci_mmio_read")))
    assert bpf.answer(program, NATIVE, number("write")) == bpf.ALLOW
    assert bpf.answer(program, NATIVE, number("mount")) == bpf.ERRNO | errno.ENOSYS  # newer than all that it names


def test_flags_and_podmans_errno() -> None:
    flags = ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]
    found = parsed({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrno": "ENOSYS", "defaultErrnoRet": 38, "flags": flags})
    assert (found.flags, found.default) == (6, bpf.ERRNO | errno.ENOSYS)
    assert parsed(denying(rule("read", errno="EPERM"))).rules[0].answer == bpf.ALLOW


def test_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = parsed(denying(rule("read")))
    first = seccomp_compiler.cached(profile)

    def never(_: seccomp_profile.Profile) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(seccomp_compiler, "compile", never)
    assert seccomp_compiler.cached(profile) == first
    with pytest.raises(AssertionError, match="compiled again"):
        seccomp_compiler.cached(parsed(denying(rule("write"))))


def test_a_wrong_program_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever a libseccomp may get wrong, nothing reaches the kernel."""
    real = seccomp_program.exported

    def wrong(filter: Any) -> bytes:
        program = bytearray(real(filter))
        for at in range(0, len(program), 8):
            if program[at] == 6 and program[at + 4 : at + 8] == bpf.ALLOW.to_bytes(4, "little"):
                program[at + 4 : at + 8] = bpf.LOG.to_bytes(4, "little")
        return bytes(program)

    monkeypatch.setattr(seccomp_program, "exported", wrong)
    with pytest.raises(Unmet, match="answers otherwise"):
        compiled(denying(rule("read")))


def test_from_a_file_and_a_dict(tmp_path: Path) -> None:
    profile = denying(rule("read"))
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile))
    for given in (Seccomp(path), str(path), profile, json.dumps(profile)):
        spec = Spec.make(["true"], seccomp=given)
        assert json.loads(seccomp_profile.load(spec.seccomp.profile)) == profile
    (tmp_path / "large").write_bytes(b" " * (2**20 + 1))
    for missing in (tmp_path / "none", tmp_path / "large"):
        with pytest.raises(SpecError):
            seccomp_profile.load(str(missing).encode())


def test_reporting_and_auditing() -> None:
    profile = denying(
        rule("read", "seccomp"), rule("write", action="SCMP_ACT_KILL_PROCESS"), rule("open", action="SCMP_ACT_TRAP")
    )
    program, call = compiled(profile), number("seccomp")
    for made, killed, trapped in (
        (bpf.reporting(program, call, NATIVE), bpf.KILL_PROCESS, bpf.TRAP),
        (bpf.auditing(program, call, NATIVE), bpf.USER_NOTIF, bpf.USER_NOTIF),
    ):
        assert bpf.answer(made, NATIVE, number("read")) == bpf.ALLOW
        assert bpf.answer(made, NATIVE, number("close")) == bpf.USER_NOTIF
        assert bpf.answer(made, NATIVE, number("write")) == killed
        assert bpf.answer(made, NATIVE, number("open")) == trapped
        for flags in range(64):
            expected = bpf.ERRNO | errno.EBUSY if flags & 8 else bpf.ALLOW
            assert bpf.answer(made, NATIVE, call, (1, flags)) == expected
            assert bpf.answer(made, NATIVE, call, (0, flags)) == bpf.ALLOW  # strict mode takes no flags
        assert bpf.answer(made, NATIVE, call, (1 | 1 << 32, 8 | 1 << 40)) == bpf.ERRNO | errno.EBUSY


def test_no_network_in_front_of_any_profile() -> None:
    program = seccomp_program.without_network(compiled({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}))
    denied = bpf.ERRNO | errno.EPERM
    assert bpf.answer(program, NATIVE, number("socket"), (2, 1)) == denied
    assert bpf.answer(program, NATIVE, number("io_uring_setup")) == denied
    assert bpf.answer(program, NATIVE, number("socketpair"), (1, 1)) == bpf.ALLOW
    assert bpf.answer(program, NATIVE, number("socketpair"), (1, 2)) == denied
    assert bpf.answer(program, NATIVE, number("mount")) == bpf.ALLOW
    for arch, one in ((pyseccomp.Arch.X86, 102), (NATIVE, bpf.X32_BIT | 41)):
        assert bpf.answer(program, arch, one) == bpf.KILL_PROCESS


def test_conditions_on_more_calls_than_a_search_reaches() -> None:
    """A conditional jump reaches 255 instructions: a profile that needs more is refused, and not with a traceback."""
    each = [rule(name, args=[{"index": 0, "value": 5, "op": "SCMP_CMP_EQ"}]) for name in NAMES]
    assert len(each) > 250
    with pytest.raises(Unmet, match="calls have conditions"):
        compiled(denying(*each))
    assert compiled(denying(*each[:100]))
