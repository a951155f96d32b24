"""The internet, for tests: servers in a network namespace of their own. Run by `support.world`.

TCP on 80, 443 and 8080 says which address it was reached at, then echoes; UDP on 80, 443 and 9999 answers the same way.
DNS on 53 of every address answers from ZONE, and writes each name that it was asked for to the file that argv names.
"""

from __future__ import annotations

import ipaddress
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable

ADDRESSES = (
    *("203.0.113.1", "203.0.113.53", "203.0.113.80", "203.0.113.81", "203.0.113.82", "198.51.100.7"),
    *("10.1.2.3", "169.254.169.254", "100.100.100.200"),
    *("2001:db8::1", "2001:db8::80", "2001:db8::81", "fd00:ec2::254"),
)
TCP_PORTS, UDP_PORTS = (80, 443, 8080), (80, 443, 9999)
ZONE = {
    "web.example": ["203.0.113.80", "2001:db8::80"],
    "other.example": ["203.0.113.81", "2001:db8::81"],
    "closed.example": ["203.0.113.1", "203.0.113.80"],
    "rebind.example": ["10.1.2.3", "127.0.0.1", "169.254.169.254", "203.0.113.2", "::1", "fe80::1", "fd00:ec2::254"],
    "rebind-to-host.example": ["203.0.113.2"],
    "many.example": [f"198.51.100.{number}" for number in range(1, 61)],
}
ALIASES = {"alias.example": "web.example"}


def _name(data: bytes, at: int) -> tuple[str, int]:
    labels = []
    while data[at]:
        labels.append(data[at + 1 : at + 1 + data[at]].decode())
        at += 1 + data[at]
    return ".".join(labels), at + 1


def _wire(name: str) -> bytes:
    return b"".join(bytes([len(one)]) + one.encode() for one in name.split(".")) + b"\0"


def answer(data: bytes, log: Callable[[str], None]) -> bytes:
    name, at = _name(data, 12)
    kind = struct.unpack_from("!H", data, at)[0]
    name = name.lower()
    log(name)
    records = b""
    count = 0
    owner = name
    if name in ALIASES:
        owner = ALIASES[name]
        records += struct.pack("!HHHIH", 0xC00C, 5, 1, 60, len(_wire(owner))) + _wire(owner)
        count += 1
    known = ZONE.get(owner, ["203.0.113.82"] if owner.endswith(".wild.example") else [])
    for one in map(ipaddress.ip_address, known):
        if {1: 4, 28: 6}.get(kind) == one.version:
            records += _wire(owner) + struct.pack("!HHIH", kind, 1, 60, len(one.packed)) + one.packed
            count += 1
    code = 0 if known else 3
    return data[:2] + struct.pack("!HHHHH", 0x8180 | code, 1, count, 0, 0) + data[12 : at + 4] + records


class Servers:
    def __init__(self, log_path: str) -> None:
        self.selector = selectors.DefaultSelector()
        self.log_path = log_path
        for address in ADDRESSES:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            for port in TCP_PORTS:
                one = socket.create_server((address, port), family=family, backlog=64)
                self.selector.register(one, selectors.EVENT_READ, self.accept)
            for port in (*UDP_PORTS, 53):
                two = socket.socket(family, socket.SOCK_DGRAM)
                two.bind((address, port))
                self.selector.register(two, selectors.EVENT_READ, self.names if port == 53 else self.datagram)

    def accept(self, listener: socket.socket) -> None:
        one, _ = listener.accept()
        one.sendall(f"{one.getsockname()[0]} {one.getsockname()[1]}\n".encode())
        self.selector.register(one, selectors.EVENT_READ, self.echo)

    def echo(self, one: socket.socket) -> None:
        try:
            data = one.recv(1 << 18)
            one.sendall(data)
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(one)
            one.close()

    def datagram(self, one: socket.socket) -> None:
        data, peer = one.recvfrom(1 << 16)
        one.sendto(f"{one.getsockname()[0]} {one.getsockname()[1]} ".encode() + data, peer)

    def names(self, one: socket.socket) -> None:
        data, peer = one.recvfrom(1 << 16)
        try:
            reply = answer(data, self.log)
        except (IndexError, UnicodeDecodeError, struct.error):
            return  # a hostile workload's, passed on as it is
        one.sendto(reply, peer)

    def log(self, name: str) -> None:
        with open(self.log_path, "a") as file:
            file.write(f"{name}\n")

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select():
                key.data(key.fileobj)


def main() -> None:
    while "i0" not in [name for _, name in socket.if_nameindex()]:  # our parent moves it here
        time.sleep(0.01)
    commands = ["link set lo up", "link set i0 up"]
    for address in ADDRESSES:
        where = "203.0.113.1/24" if address == "203.0.113.1" else "2001:db8::1/64" if address == "2001:db8::1" else None
        commands.append(
            f"addr add {where or address} dev i0 nodad" if ":" in address else f"addr add {where or address} dev i0"
        )
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands).encode(), check=True)
    servers = Servers(sys.argv[1])
    print("serving", flush=True)
    servers.run()


if __name__ == "__main__":
    main()
