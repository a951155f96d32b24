"""A small world for tests of networks: a network namespace that stands for the host, in which a test's function runs,
and behind it another one that stands for the internet (`support.internet`). Nothing touches the machine's own network.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ringfence as rf
from support import leaks

HOST_ADDRESS, HOST_ADDRESS6 = "203.0.113.2", "2001:db8::2"
UNPRIVILEGED = 1000
# On the host's loopback, and on its address in the network.
HOST_PORTS = {"loopback": 5000, "address": 5001}

# What runs inside. Each argument is a function with its arguments, such as "tcp ADDRESS PORT" or "page NAME PORT"; each
# line of output is what came, or the errno's name.
CLIENT = r"""
import errno, socket, struct, sys
def family(address): return socket.AF_INET6 if ":" in address else socket.AF_INET
def tcp(address, port, kind=None):
    with socket.socket(kind or family(address)) as one:
        one.settimeout(5)
        one.connect((address, int(port)))
        said = one.recv(100).decode().strip()
        one.sendall(b"ping")
        assert one.recv(100) == b"ping"
        return said
def tcp6(address, port): return tcp(address, port, socket.AF_INET6)
def udp(address, port):
    with socket.socket(family(address), socket.SOCK_DGRAM) as one:
        one.settimeout(2)
        one.connect((address, int(port)))
        one.send(b"ping")
        return one.recv(100).decode()
def name(name):
    return " ".join(sorted({one[4][0] for one in socket.getaddrinfo(name, 1, type=socket.SOCK_STREAM)}))
def page(name, port):
    with socket.create_connection((name, int(port)), timeout=5) as one:
        return one.recv(100).decode().strip()
def dns(server, name, kind="1"):
    wire = b"".join(bytes([len(one)]) + one.encode() for one in name.split(".")) + b"\0"
    query = struct.pack("!HHHHHH", 7, 0x100, 1, 0, 0, 0) + wire + struct.pack("!HH", int(kind), 1)
    with socket.socket(family(server), socket.SOCK_DGRAM) as one:
        one.settimeout(2)
        one.connect((server, 53))
        one.send(query)
        reply = one.recv(4096)
    return f"rcode {reply[3] & 15} answers {struct.unpack_from('!H', reply, 6)[0]} bytes {len(reply)}"
def raw(protocol):
    socket.socket(socket.AF_INET, socket.SOCK_RAW, int(protocol)).close()
    return "made"
for step in sys.argv[1:]:
    what, *args = step.split()
    try:
        print(globals()[what](*args), flush=True)
    except socket.gaierror as error:
        names = {socket.EAI_AGAIN: "EAI_AGAIN", socket.EAI_NONAME: "EAI_NONAME"}
        print(names.get(error.errno, error), flush=True)
    except TimeoutError:
        print("timeout", flush=True)
    except OSError as error:
        print(errno.errorcode.get(error.errno, error), flush=True)
"""


def equal(found: object, wanted: object) -> None:
    """An assertion that shows both sides, where pytest doesn't rewrite any."""
    assert found == wanted, f"\n   found {found!r}\n  wanted {wanted!r}"


class World:
    """What a test's function gets. isolation: the level that it is about."""

    def __init__(self, log: Path, isolation: str = "container") -> None:
        self._log = log
        self.isolation = isolation
        # A guest for each user: to boot one for each call would take minutes.
        self._guests: dict[int | None, rf.Sandbox] = {}

    def client(self, *steps: str, **options: Any) -> list[str]:
        """The lines that CLIENT prints for these steps inside."""
        if self.isolation == "vm" and options.keys() <= {"network", "user"}:
            return self._ask_guest(steps, **options)
        return self.run(*steps, **options)[0]

    def run(self, *steps: str, **options: Any) -> tuple[list[str], rf.Result]:
        return _lines(self.start(["python3", "-I", "-c", CLIENT, *steps], **options))

    def start(self, argv: list[str], **options: Any) -> rf.Result:
        options.setdefault("limits", rf.Limits(wall_time=60) if os.geteuid() == 0 else None)
        return rf.run(argv, isolation=self.isolation, text=True, **options)

    def _ask_guest(self, steps: tuple[str, ...], *, network: rf.Network | str, user: int | None = None) -> list[str]:
        if user not in self._guests:
            self._guests[user] = rf.Sandbox(isolation="vm", network=rf.Network(), user=user)
        guest = self._guests[user]
        _change_policy(guest, network if isinstance(network, rf.Network) else rf.Network(network))
        return _lines(guest.run(["python3", "-I", "-c", CLIENT, *steps], text=True))[0]

    def close(self) -> None:
        for guest in self._guests.values():
            guest.close()

    def unconfined(self, *steps: str) -> list[str]:
        """The same from the host: the positive control."""
        done = subprocess.run(
            [sys.executable, "-I", "-c", CLIENT, *steps], capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.splitlines()

    def asked(self) -> list[str]:
        """The names that the internet's servers were asked for, so far; forgets them."""
        names = self._log.read_text().split()
        self._log.write_text("")
        return names


def _lines(result: rf.Result) -> tuple[list[str], rf.Result]:
    assert result.ok and not result.stderr, (result.describe(), result.stdout, result.stderr)
    return result.stdout.splitlines(), result


def _change_policy(guest: rf.Sandbox, network: rf.Network) -> None:
    """Has the gateway of a guest that is there already judge by another list, as one of a new guest would."""
    from ringfence.levels.network.policy import Policy

    assert not network.publish and network.bandwidth_bytes_per_second is None
    gateway: Any = guest._open._vmm.jail.network._gateway  # type: ignore[union-attr]
    gateway._policy = gateway._resolver._policy = Policy(network.allow)
    for flow in list(gateway._datagrams.values()):
        flow.used = 0.0  # what is idle for long ends


def _serve_host() -> None:
    """Services of the host's own."""

    def serve(listener: socket.socket) -> None:
        while True:
            one, _ = listener.accept()
            one.sendall(b"the host\n")
            threading.Thread(target=_echo, args=(one,), daemon=True).start()

    for address, port in (("127.0.0.1", HOST_PORTS["loopback"]), (HOST_ADDRESS, HOST_PORTS["address"])):
        threading.Thread(target=serve, args=(socket.create_server((address, port)),), daemon=True).start()


def _echo(one: socket.socket) -> None:
    while data := one.recv(100):
        one.sendall(data)


def _connect(internet: subprocess.Popen[bytes]) -> None:
    commands = [
        "link set lo up",
        "link add h0 type veth peer name i0",
        f"link set i0 netns {internet.pid}",
        f"addr add {HOST_ADDRESS}/24 dev h0",
        f"addr add {HOST_ADDRESS6}/64 dev h0 nodad",
        "link set h0 up",
        "route add default via 203.0.113.1",
        "-6 route add default via 2001:db8::1",
    ]
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)
    assert internet.stdout is not None
    assert internet.stdout.readline() == b"serving\n"


@functools.cache
def _prepared(uid: int) -> str:
    """A cache folder of the user's own, with what the caller of these tests has prepared for guests. All worlds of this
    process share it, and so the templates that are made in the first.
    """
    from ringfence import _cache
    from ringfence.levels.vm import initramfs, kernel
    from ringfence.wire.launcher import core_path

    cache = tempfile.mkdtemp(prefix="guests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    guest = kernel.find()
    if guest is not None:
        entries = [os.path.dirname(guest.vmlinux), os.path.dirname(initramfs.build(guest, core_path()))]
        for entry in entries:
            # A copy: what is removed with the folder must not be the cache's own.
            shutil.copytree(entry, os.path.join(cache, os.path.relpath(entry, _cache.root())))
        os.symlink(os.path.basename(entries[0]), os.path.join(cache, "kernels", kernel.current()))
    for path, folders, files in os.walk(cache):
        for name in ("", *folders, *files):
            os.chown(os.path.join(path, name), uid, uid, follow_symlinks=False)
    return cache


def _open_tun() -> None:
    """Everybody may make a tap in a network namespace of his own, as on most hosts."""
    if os.path.exists("/dev/net/tun"):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", folder], check=True)
            subprocess.run(["mknod", "-m", "666", f"{folder}/tun", "c", "10", "200"], check=True)
            subprocess.run(["mount", "--move", folder, "/dev/net"], check=True)


def main(path: str, function: str, user: str, isolation: str) -> None:
    """In the namespaces that stand for the host: builds the rest, and calls the function of that file."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        log = Path(folder, "names")
        log.touch(0o666)
        log.chmod(0o666)
        resolv = Path(folder, "resolv.conf")
        resolv.write_text("nameserver 203.0.113.53\noptions timeout:1 attempts:1\n")
        resolv.chmod(0o644)
        # Folders and cgroups are named by pids, which begin at 1 in every other world too.
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(1000 + int.from_bytes(os.urandom(2)) // 3))
        subprocess.run(["mount", "--bind", str(resolv), os.path.realpath("/etc/resolv.conf")], check=True)
        code = "from support import internet; internet.main()"
        with subprocess.Popen(
            ["unshare", "--net", "--kill-child", "--fork", sys.executable, "-c", code, str(log)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ) as internet:
            try:
                _open_tun()
                _connect(internet)
                _serve_host()
                uid = int(user)
                call = "from support import world; import sys; world.call(*sys.argv[1:])"
                done = subprocess.run(
                    [sys.executable, "-c", call, path, function, str(log), isolation],
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(sys.path),
                        "HOME": folder,
                    },
                    user=uid,
                    group=uid,
                    extra_groups=[],
                    check=False,
                )
            finally:
                internet.kill()
    sys.exit(done.returncode)


def call(path: str, function: str, log: str, isolation: str) -> None:
    """As the user of the test: calls the function, and looks what it left."""
    spec = importlib.util.spec_from_file_location("scenario", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rf.run(["true"], isolation="container")  # what the first run opens stays as long as this process
    before, threads = leaks.snapshot(), threading.active_count()
    world = World(Path(log), isolation)
    try:
        getattr(module, function)(world)
    finally:
        world.close()
    assert threading.active_count() == threads, threading.enumerate()
    found = leaks.leaked(before)
    assert not found, f"left behind: {found}"
    print("it held", flush=True)


def in_world(function: Callable[[World], None], *, user: int = 0, isolation: str = "container") -> None:
    """Calls a test file's function in a world of its own. user: who it runs as there. isolation: for `World`."""
    path = function.__code__.co_filename
    code = "import sys; from support import world; world.main(*sys.argv[1:])"
    command = [
        "unshare",
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        sys.executable,
        "-c",
        code,
    ]
    done = subprocess.run(
        [*command, path, function.__name__, str(user), isolation],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(one for one in sys.path if one),
            "RINGFENCE_CACHE": _prepared(user),
        },
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "it held\n"), f"{done.stdout}\n{done.stderr}"
