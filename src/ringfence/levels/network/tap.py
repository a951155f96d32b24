"""The network of a guest: a tap in the network namespace of its VMM's jail, behind which the guest is the only host.

What the guest sends arrives in that namespace as what a container's workload sends does, and meets the same rules; here
is what else it takes: the guest's address is the tap's, and the gateway's are the namespace's own.
"""

from __future__ import annotations

import fcntl
import socket
import struct

from ringfence.linux import netlink

__all__ = ["GATEWAY_MAC", "GUEST_MAC", "MTU_BYTES", "NAME", "configure"]

NAME = "tap0"
# Locally administered (the second bit), and the same in every guest: each is alone on its wire.
GATEWAY_MAC, GUEST_MAC = b"\x02rf\0\0\1", b"\x02rf\0\0\2"
# Of a wire that has no other end. Larger packets are fewer, and each costs a guest under emulation dear.
MTU_BYTES = 16384

_SIOCGIFINDEX = 0x8933


def configure(route: socket.socket, pairs: list[tuple[bytes, bytes]]) -> None:
    """Brings the tap up, with the way to the guest. pairs: (the guest's address, the gateway's), one for each family;
    the gateway's are there already.

    The tap speaks neither ARP nor neighbour discovery: either side knows the other, and nothing that a guest says
    changes a table which the host's other networks share.
    """
    request = struct.pack("16s24x", NAME.encode())
    index = struct.unpack_from("=i", fcntl.ioctl(route.fileno(), _SIOCGIFINDEX, request), 16)[0]
    netlink.exchange(route, netlink.link_up(index, GATEWAY_MAC, MTU_BYTES, ipv6=len(pairs) > 1), 1, "RTM_NEWLINK")
    neighbours = [netlink.neighbour(index, guest, GUEST_MAC) for guest, _ in pairs]
    netlink.exchange(route, b"".join(neighbours), len(pairs), "RTM_NEWNEIGH")
    routes = [netlink.host_route(index, guest, gateway) for guest, gateway in pairs]
    netlink.exchange(route, b"".join(routes), len(pairs), "RTM_NEWROUTE")
