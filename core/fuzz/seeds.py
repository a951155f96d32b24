#!/usr/bin/env python3
"""Writes the fuzzers' seeds, core/fuzz/corpus: real requests, as ringfence.wire encodes them.

    PYTHONPATH=src python core/fuzz/seeds.py

tests/unit/test_fuzz_seeds.py fails where they are out of date.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from ringfence.wire import frames, guest_messages, layers, messages
from ringfence.wire.frames import Type

CORPUS = Path(__file__).resolve().parent / "corpus"

_RETURN_ALLOW = struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000)


def _payload(frame: bytes) -> bytes:
    return frame[frames.HEADER_BYTES :]


def _steps() -> list[messages.MountStep]:
    return [
        messages.bind(b"/", b"/t/host", messages.RDONLY | messages.RECURSIVE),
        messages.directory(b"/work", 0o700),
        messages.symlink(b"/bin", b"usr/bin"),
        messages.file(b"/etc/hostname", b"ringfence\n"),
        messages.bind(b"/work", 5, messages.NOSUID | messages.NODEV),
        messages.filesystem(b"/tmp", b"tmpfs", data=b"mode=1777,size=64m", flags=messages.NOSUID | messages.NODEV),
        messages.mask(b"/proc/kcore"),
        messages.readonly(b"/proc/sys"),
    ]


def _layered_steps() -> list[messages.MountStep]:
    return [
        layers.memory_layer(1 << 20),
        messages.directory(b"/usr"),
        layers.overlay(b"/", None),
        layers.overlay(b"/usr", 5),
        layers.place(b"/work", 0o700),
        layers.tmpfs(b"/data", 1 << 20, 0o1777, (1000, 1000)),
    ]


def _disk_steps() -> list[messages.MountStep]:
    return [layers.disk(b"/dev/vda", [b"proc", b"work"]), layers.disk_shown(overlay=True)]


def _layered() -> messages.Plan:
    plan = messages.Plan()
    plan.mounts(_layered_steps())
    plan.ids(0, 0)
    plan.flags(enter=True)
    return plan


def _container() -> messages.Plan:
    plan = messages.Plan()
    plan.hostname(b"ringfence")
    plan.loopback()
    plan.mounts(_steps())
    plan.ids(1000, 1000)
    plan.flags(cgroup_namespace=True, enter=True)
    plan.seccomp(_RETURN_ALLOW)
    plan.rlimit(4, 0, 0)
    plan.cgroup(6)
    plan.cgroup(7)
    plan.cpu_limit(5_000_000_000, 8)
    plan.workdir(b"/work")
    plan.capabilities(1 << 13 | 1 << 21)
    plan.seccomp_flags(notify=True, foreign=True, kernel=6)
    plan.sockets(9)
    return plan


def _process() -> messages.Plan:
    plan = messages.Plan()
    plan.ids(0x71000000, 0x71000000)
    plan.flags()
    plan.workdir(b"/var/lib/ringfence/w")
    plan.give_back()
    plan.landlock(5)
    plan.seccomp(_RETURN_ALLOW * 3)
    plan.rlimit(0, 7, 7)
    return plan


def _guest() -> messages.Plan:
    plan = guest_messages.GuestPlan()
    plan.mounts([messages.filesystem(b"/", b"erofs", source=b"/dev/vda", flags=messages.RDONLY), *_disk_steps()])
    plan.guest(
        realtime_ns=10**18,
        entropy=bytes(range(32)),
        memory_bytes=1 << 27,
        pids=64,
        cpu_ns=10**8,
        realtime_at_ns=2 * 10**9,
    )
    plan.flags(enter=True)
    plan.seccomp(_RETURN_ALLOW)
    plan.seccomp_flags(notify=True, audit=True, answers=_RETURN_ALLOW * 2)
    plan.card(b"\2rf\0\0\1", [(bytes(4), bytes(4)), (bytes(16), bytes(16))])
    return plan


def _jail() -> messages.Plan:
    plan = _container()
    plan.tap(10)
    return plan


def _execute(*, streams: bool, warm: bool = False) -> bytes:
    argv = [b"python3", b"-c", b"print('a b\\n')", b"", b"\xff\xfe"]
    env = [(b"PATH", b"/usr/bin:/bin"), (b"HOME", b"/work"), (b"EMPTY", b"")]
    return messages.execute(argv, env, b"/work", id=1, once=True, streams=streams, nfds=0 if streams else 3, warm=warm)


def _pieces(stream: bytes, *, size: int, nfds: int) -> bytes:
    """A stream as the channel's harness takes it: in pieces, the first with descriptors."""
    assert size % 7 == 0 and size // 7 < 64 and nfds < 4
    cut = [stream[at : at + size] for at in range(0, len(stream), size)]
    cut[-1] = cut[-1].ljust(-(-len(cut[-1]) // 7) * 7, b"\0")
    return b"".join(bytes([len(one) // 7 | (nfds << 6 if i == 0 else 0)]) + one for i, one in enumerate(cut))


def _requests(*requests: bytes) -> bytes:
    """Frames as the harness of files takes them: type, length, payload."""
    found = b""
    for request in requests:
        type, length, _, _ = frames.parse_header(request)
        found += struct.pack("<BH", type, length) + _payload(request)
    return found


def _put(path: bytes, data: bytes, mode: int = 0o644) -> bytes:
    return _requests(*guest_messages.put(path, mode, data, id=1))


def seeds() -> dict[str, bytes]:
    """{"harness/name": input}."""
    plans = {
        "container": _container(),
        "process": _process(),
        "guest": _guest(),
        "layered": _layered(),
        "jail": _jail(),
    }
    streams = _execute(streams=True) + frames.encode(Type.STDIN, b"hello", id=1) + guest_messages.signal(15, id=1)
    found = {f"plan/{name}": bytes([len(plan.fds)]) + _payload(plan.encode()) for name, plan in plans.items()}
    found |= {
        "exec/pipes": _payload(_execute(streams=False)),
        "exec/streams": _payload(_execute(streams=True)),
        "exec/warm": _payload(_execute(streams=True, warm=True)),
        "launch/container": _payload(
            messages.launch(clone_flags=0x7E020080, uid_map=b"0 1895825408 65536\n", gid_map=b"0 1895825408 65536\n")
        ),
        "launch/process": _payload(messages.launch(clone_flags=0, kill_uid=0x71000000, host_mounts=True)),
        "launch/later": _payload(messages.launch(clone_flags=0, kill_uid=0x71000000, host_mounts=True, later=True)),
        "launch/joins": _payload(
            messages.launch(
                clone_flags=0x1C020080,
                uid_map=b"0 1895825408 65536\n",
                gid_map=b"0 1895825408 65536\n",
                kill_uid=0x71000000 + 1000,
                joins=(0x40000000, 0x20000000),
                offsets_ns=(10**9, -(10**9)),
            )
        ),
        "launch/network": _payload(
            messages.launch(clone_flags=0x7E020080, uid_map=b"0 1 1\n", gid_map=b"0 1 1\n", own_network=True)
        ),
        "launch/userns": _payload(messages.user_namespace(b"0 1 1\n", b"0 1 1\n")),
        "channel/descriptors": _pieces(_execute(streams=False), size=63, nfds=3),
        "channel/small": _pieces(streams, size=7, nfds=0),
        "channel/large": _pieces(
            streams + frames.encode(Type.KILL) + frames.encode(Type.PING, id=7) + frames.encode(Type.SHUTDOWN),
            size=434,
            nfds=0,
        ),
        "files/put": _put(b"a/b/c.txt", b"x" * 40) + _requests(frames.encode(Type.LIST)),
        "files/read": _put(b"f", b"data") + _requests(guest_messages.read(b"f", id=1)),
        "files/planted": b"".join(_put(path, b"!") for path in (b"l", b"d/secret", b"h", b"p", b"../secret", b"/x")),
        "files/planted-read": b"".join(
            _requests(guest_messages.read(path, id=1)) for path in (b"l", b"d/secret", b"p", b"..")
        ),
    }
    call = struct.pack("<iIQ6Q", 165, 0xC000003E, 0, 1, 2, 3, 4, 5, 6)
    found |= {
        "answer/all": call + _RETURN_ALLOW,
        "answer/mount": call
        + struct.pack("<HBBI", 0x20, 0, 0, 0)
        + struct.pack("<HBBI", 0x15, 1, 0, 165)
        + _RETURN_ALLOW
        + struct.pack("<HBBI", 6, 0, 0, 0x50001),
        "answer/outside": call + struct.pack("<HBBI", 0x20, 0, 0, 61) + struct.pack("<HBBI", 5, 0, 0, 2**32 - 1),
    }
    # What must be refused, where a fuzzer would take long to find it.
    unset = messages.Plan()
    unset.ids(2**32 - 1, 2**32 - 1)
    many = messages.Plan()
    many.mounts([messages.mask(b"/")] * 257)
    found |= {
        "plan/unset-ids": b"\0" + _payload(unset.encode()),
        "plan/many-mounts": b"\0" + _payload(many.encode()),
        "exec/many-arguments": frames.attribute(1, bytes(8193)),
    }
    for step in (*_layered_steps(), *_disk_steps(), *_steps()):
        encoded = step.encode(frames.NO_FD if step.fd is None else 0)
        kind = encoded[8]
        found[f"mount/{kind}-{'path' if step.fd is None else 'fd'}"] = b"\1" + encoded[8:]
    return found


def main() -> int:
    for name, data in seeds().items():
        path = CORPUS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
