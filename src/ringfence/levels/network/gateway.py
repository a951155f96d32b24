"""The gateway of one sandbox: judges each flow, opens it outside, and moves its bytes. One thread, which ends with it.

A TCP connection begins with a SYN that the sandbox's own nftables rules hold back and show us (NFLOG).
We judge the destination and connect to it from outside. When that has succeeded the SYN is sent once more, marked, and
the kernel hands it to our listener; when it has failed the workload gets what the network said: a reset, or an ICMP
error. So connect(2) tells a workload the truth, as it would without a gateway. A connection that comes to the listener
without having been judged, however a workload managed that, has nothing outside and is broken off.
"""

from __future__ import annotations

import errno
import ipaddress
import resource
import select
import socket
import struct
import threading
import time

from ringfence.levels.network import packets
from ringfence.levels.network.flows import BACK, OUT, Connection, abort
from ringfence.levels.network.inside import GATEWAY4, GATEWAY6
from ringfence.levels.network.loop import Loop
from ringfence.levels.network.policy import HOST_LOOPBACK
from ringfence.levels.network.resolver import Resolver, servers
from ringfence.linux import netlink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ringfence.levels.network.inside import Inside
    from ringfence.levels.network.policy import Policy

__all__ = ["Gateway"]

_DNS = 53
# The gateway's own addresses. The sandbox's loopback is among them for its DNS where programs ask there.
_OWN = (GATEWAY4, GATEWAY6, HOST_LOOPBACK)
_PACKET_BYTES = 1 << 16
_PACKETS = 64  # of one socket in one turn
_CONNECT_S = 130.0  # a little more than Linux itself tries (tcp_syn_retries)
_ACCEPT_S = 10.0
_DATAGRAM_IDLE_S = 120.0
_SWEEP_S = 5.0
_JOIN_S = 5.0
# What each sandbox may have whatever the others take.
_LEAST_FLOWS = 8
_PAUSE_S = 0.01
_NONBLOCKING = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC

# Which error a workload gets for ours.
_ERRORS = {
    errno.ENETUNREACH: "network",
    errno.EHOSTUNREACH: "host",
    errno.ETIMEDOUT: "host",
    errno.EACCES: "prohibited",
    errno.EPERM: "prohibited",
    errno.EADDRNOTAVAIL: "network",
    errno.EINVAL: "network",
}

# (address and port inside, address and port of the destination as the workload sees it).
_Key = tuple[bytes, int, bytes, int]


class _Pending:
    """A TCP connection that the workload has asked for."""

    __slots__ = ("deadline", "outside", "ready", "syn")

    def __init__(self, syn: packets.Segment, outside: socket.socket, deadline: float) -> None:
        self.syn, self.outside = syn, outside
        self.deadline = deadline
        self.ready = False


class _Datagrams:
    """A UDP flow: its socket outside, and when something last moved."""

    __slots__ = ("key", "outside", "used")

    def __init__(self, key: _Key, outside: socket.socket, used: float) -> None:
        self.key, self.outside, self.used = key, outside, used


# Of this process. They share its descriptors.
_gateways: list[Gateway] = []


class Gateway:
    """published: [(a listening socket of the host's, the port inside)]. All that is handed in is closed at the end.
    on_failure: called where the gateway can't go on, which is then over; failure: why, or None.
    """

    def __init__(
        self,
        inside: Inside,
        policy: Policy,
        published: Sequence[tuple[socket.socket, int]],
        bytes_per_second: int | None,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self.failure: BaseException | None = None
        self._on_failure = on_failure
        self._inside = inside
        self._policy = policy
        self._published = published
        self._where = tuple((listener.getsockname()[1], port) for listener, port in published)
        self._loop = Loop(bytes_per_second)
        self._routes = netlink.open_route()
        self._routes.settimeout(1.0)
        self._wake, self._waker = socket.socketpair()
        self._ending = False
        self._pending: dict[_Key, _Pending] = {}
        # Connections to a published port that the sandbox hasn't taken yet: inside -> (outside, until when).
        self._joining: dict[socket.socket, tuple[socket.socket, float]] = {}
        self._connections: set[Connection] = set()
        self._datagrams: dict[_Key, _Datagrams] = {}
        # A flow takes two descriptors of the caller's process: all of them at most a quarter of what it may have.
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most_flows = max(16, min(1024, soft // 8 if soft > 0 else 1024))
        self._resolver = Resolver(
            policy,
            lambda one, call: self._loop.watch(one, lambda _: call()),
            self._loop.forget,
            lambda: not self._full(),
        )
        self._thread = threading.Thread(target=self._run, name="ringfence-network", daemon=True)
        _gateways.append(self)
        try:
            self._watch_all()
            self._thread.start()
        except BaseException:
            self._end()
            raise

    def _watch_all(self) -> None:
        watch = self._loop.watch
        watch(self._wake, lambda _: None)
        watch(self._inside.syn, lambda _: self._syns())
        for one in self._inside.tcp:
            watch(one, lambda _, one=one: self._accept(one))  # type: ignore[misc]
        for one in self._inside.udp:
            watch(one, lambda _, one=one: self._from_inside(one))  # type: ignore[misc]
        for listener, port in self._published:
            watch(listener, lambda _, listener=listener, port=port: self._publish(listener, port))  # type: ignore[misc]

    # ---- the thread ----

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self.failure = error
        finally:
            # By the thread itself: whoever closed its sockets while it runs would have it use others' numbers.
            self._end()
        if self.failure is not None and self._on_failure is not None:
            self._on_failure()

    def _serve(self) -> None:
        sweep = time.monotonic() + _SWEEP_S
        while not self._ending:
            deadline = self._resolver.next_deadline()
            if self._pending or self._joining or self._datagrams:
                deadline = sweep if deadline is None else min(deadline, sweep)
            now = time.monotonic()
            self._loop.turn(None if deadline is None else max(0.0, deadline - now))
            now = time.monotonic()
            try:
                self._resolver.tick(now)
                if now >= sweep:
                    sweep = now + _SWEEP_S
                    self._sweep(now)
            except OSError:
                time.sleep(_PAUSE_S)  # as with any flow (`Loop`): what is left is looked at the next time

    def _sweep(self, now: float) -> None:
        for key, pending in list(self._pending.items()):
            if pending.deadline <= now:
                self._give_up(key, None)
        for inside, (_, deadline) in list(self._joining.items()):
            if deadline <= now:
                self._end_joining(inside)
        for flow in [one for one in self._datagrams.values() if one.used + _DATAGRAM_IDLE_S <= now]:
            self._end_datagrams(flow)

    def close(self) -> bool:
        """Ends the thread, and every flow with it. Whether it did: one that hangs does so once it goes on."""
        self._ending = True
        try:
            self._waker.send(b"x")
        except OSError:
            pass  # closed before
        self._thread.join(_JOIN_S)
        return not self._thread.is_alive()

    def _end(self) -> None:
        self._resolver.close()
        for pending in self._pending.values():
            pending.outside.close()
        for connection in list(self._connections):
            connection.close(broken=True)
        for flow in self._datagrams.values():
            flow.outside.close()
        for inside, (outside, _) in self._joining.items():
            inside.close()
            outside.close()
        self._joining.clear()
        self._datagrams.clear()
        self._pending.clear()
        for listener, _ in self._published:
            listener.close()
        self._release()

    def forget(self) -> None:
        """In a forked child: closes its copies of the descriptors, and changes nothing of what they share."""
        for connection in self._connections:
            connection.inside.close()
            connection.outside.close()
        for inside, (outside, _) in self._joining.items():
            inside.close()
            outside.close()
        for pending in self._pending.values():
            pending.outside.close()
        for flow in self._datagrams.values():
            flow.outside.close()
        for listener, _ in self._published:
            listener.close()
        self._release()

    def _release(self) -> None:
        if self in _gateways:
            _gateways.remove(self)
        for one in (self._routes, self._wake, self._waker):
            one.close()
        self._loop.close()
        self._inside.close()
        self._inside.supply.close()

    def published(self) -> tuple[tuple[int, int], ...]:
        """(port of the host, port inside), the first as the kernel has it."""
        return self._where

    # ---- judging ----

    def _target(self, address: bytes, port: int) -> tuple[bytes, int] | None:
        """Where a destination of the workload's is outside; None where it isn't open."""
        policy = self._policy
        if address in _OWN:
            if port == _DNS and policy.unlimited:
                return _packed(servers()[0]), _DNS
            # The gateway's own address is the host's loopback, for the ports that a rule names there.
            return (HOST_LOOPBACK, port) if policy.names(HOST_LOOPBACK, port) else None
        if not policy.permits(address, port, time.monotonic()):
            return None
        if policy.names(address, port):
            return address, port
        # What the host itself would answer, whatever the address: its own services, not the network's.
        try:
            kind = netlink.route_type(self._routes, address)
        except OSError:
            return None
        return (address, port) if kind in (None, netlink.RTN_UNICAST) else None

    def _flows(self) -> int:
        own = (self._pending, self._joining, self._connections, self._datagrams)
        return sum(len(one) for one in own) + self._resolver.sockets

    def _full(self) -> bool:
        """Whether there is no room for another flow among those of all gateways, of which each may have a few."""
        return self._flows() >= _LEAST_FLOWS and sum(one._flows() for one in tuple(_gateways)) >= self.most_flows

    # ---- TCP, from the sandbox ----

    def _syns(self) -> None:
        for _ in range(_PACKETS):
            try:
                data = self._inside.syn.recv(2 * _PACKET_BYTES)
            except OSError as error:
                if error.errno == errno.ENOBUFS:  # some were lost; the workload's kernel sends them again
                    continue
                return
            for packet in netlink.logged(data):
                syn = packets.parse_syn(packet)
                if syn is not None:
                    self._syn(syn)

    def _syn(self, syn: packets.Segment) -> None:
        key = (syn.source, syn.source_port, syn.destination, syn.port)
        pending = self._pending.get(key)
        if pending is not None and pending.syn.sequence == syn.sequence:
            if pending.ready:  # sent again before the kernel had ours
                self._inside.inject(syn.destination, packets.with_checksum(syn.data))
            return
        if pending is not None:
            self._give_up(key, None)
        if self._full():
            return  # the workload's kernel sends it again, and again
        target = self._target(syn.destination, syn.port)
        if target is None:
            self._refuse(syn, "prohibited")
            return
        family = socket.AF_INET if len(target[0]) == 4 else socket.AF_INET6
        try:
            outside = socket.socket(family, socket.SOCK_STREAM | _NONBLOCKING)
        except OSError:
            return
        self._pending[key] = _Pending(syn, outside, time.monotonic() + _CONNECT_S)
        try:
            self._loop.watch(outside, lambda _: self._connected(key, outside), select.EPOLLOUT)
        except OSError:
            self._give_up(key, None)
            raise
        code = outside.connect_ex((_shown(target[0]), target[1]))
        if code not in (0, errno.EINPROGRESS):
            self._give_up(key, code)

    def _connected(self, key: _Key, outside: socket.socket) -> None:
        pending = self._pending.get(key)
        if pending is None or pending.outside is not outside or pending.ready:
            return
        code = outside.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._give_up(key, code)
            return
        if not _is_connected(outside):
            return  # an event of a socket that had this descriptor before
        pending.ready = True
        pending.deadline = time.monotonic() + _ACCEPT_S
        self._loop.want(outside, 0)
        self._inside.inject(pending.syn.destination, packets.with_checksum(pending.syn.data))

    def _give_up(self, key: _Key, code: int | None) -> None:
        pending = self._pending.pop(key)
        self._loop.forget(pending.outside)
        abort(pending.outside)
        if code is not None:
            self._refuse(pending.syn, _ERRORS.get(code, "port"))

    def _refuse(self, syn: packets.Segment, kind: str) -> None:
        if kind == "port":
            answer = packets.reset(syn)
        else:
            answer = packets.icmp_error(kind, syn.destination, syn.source, syn.data)
        self._inside.inject(syn.source, answer)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_PACKETS):
            try:
                inside, peer = listener.accept()
            except BlockingIOError:
                return
            inside.setblocking(False)
            here = inside.getsockname()
            key = (_packed(peer[0]), peer[1], _packed(here[0]), here[1])
            pending = self._pending.pop(key, None)
            if pending is None or not pending.ready:
                abort(inside)
                if pending is not None:
                    self._loop.forget(pending.outside)
                    abort(pending.outside)
                continue
            self._loop.forget(pending.outside)
            self._connect(inside, pending.outside)

    def _connect(self, inside: socket.socket, outside: socket.socket) -> None:
        made = Connection(self._loop, inside, outside, self._connections.discard)
        if inside.fileno() >= 0:
            self._connections.add(made)

    # ---- TCP, to the sandbox ----

    def _publish(self, listener: socket.socket, port: int) -> None:
        for _ in range(_PACKETS):
            try:
                outside, _ = listener.accept()
            except BlockingIOError:
                return
            outside.setblocking(False)
            if self._full():
                abort(outside)
                continue
            try:
                inside = self._inside.supply.make(socket.AF_INET, socket.SOCK_STREAM)
            except Exception:
                abort(outside)  # the sandbox is ending
                return
            inside.setblocking(False)
            self._joining[inside] = (outside, time.monotonic() + _ACCEPT_S)
            try:
                self._loop.watch(inside, lambda _, inside=inside: self._joined(inside), select.EPOLLOUT)  # type: ignore[misc]
                code = self._inside.connect(inside, port)
            except OSError as error:
                code = error.errno or errno.EIO
            if code not in (0, errno.EINPROGRESS):
                # A socket that isn't connecting is ready for ever, and never connected.
                self._end_joining(inside)

    def _end_joining(self, inside: socket.socket) -> None:
        outside, _ = self._joining.pop(inside)
        self._loop.forget(inside)
        inside.close()
        abort(outside)

    def _joined(self, inside: socket.socket) -> None:
        """A published port's connection has arrived, or nobody listens there."""
        code = inside.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code and not _is_connected(inside):
            return
        if code:
            self._end_joining(inside)
            return
        outside, _ = self._joining.pop(inside)
        self._loop.forget(inside)
        self._connect(inside, outside)

    # ---- UDP ----

    def _from_inside(self, sock: socket.socket) -> None:
        for _ in range(_PACKETS):
            if self._loop.room(OUT) <= 0:
                # What comes meanwhile stays in the socket's buffer, as far as it fits in.
                self._loop.want(sock, 0)
                self._loop.paused(OUT, lambda: self._loop.want(sock, select.EPOLLIN))
                return
            try:
                data, control, _, peer = sock.recvmsg(_PACKET_BYTES, 64)
            except OSError:
                return
            destination = _original(control)
            if destination is not None and peer[1] != 0:
                self._loop.moved(OUT, len(data))
                self._datagram((_packed(peer[0]), peer[1], *destination), data)

    def _datagram(self, key: _Key, data: bytes) -> None:
        if key[2] in _OWN and key[3] == _DNS:
            ask = self._resolver.pass_on if self._policy.unlimited else self._resolver.ask
            ask(data, lambda answer: self._to_inside(key, answer))
            return
        flow = self._datagrams.get(key)
        if flow is None:
            flow = self._open_datagrams(key, data)
            if flow is None:
                return
        flow.used = time.monotonic()
        try:
            flow.outside.send(data)
        except BlockingIOError:
            return
        except OSError as error:
            self._unreachable(flow, _ERRORS.get(error.errno or 0, "port"), data)

    def _open_datagrams(self, key: _Key, data: bytes) -> _Datagrams | None:
        target = self._target(key[2], key[3])
        if target is None:
            self._refuse_datagram(key, "prohibited", data)
            return None
        if self._full() and not self._make_room():
            return None
        try:
            family = socket.AF_INET if len(target[0]) == 4 else socket.AF_INET6
            outside = socket.socket(family, socket.SOCK_DGRAM | _NONBLOCKING)
        except OSError:
            return None
        code = outside.connect_ex((_shown(target[0]), target[1]))
        if code:
            outside.close()
            self._refuse_datagram(key, _ERRORS.get(code, "network"), data)
            return None
        flow = self._datagrams[key] = _Datagrams(key, outside, time.monotonic())
        try:
            self._loop.watch(outside, lambda _: self._from_outside(flow))
        except OSError:
            self._end_datagrams(flow)
            raise
        return flow

    def _make_room(self) -> bool:
        """Ends the UDP flow that has been idle for longest."""
        if not self._datagrams:
            return False
        self._end_datagrams(min(self._datagrams.values(), key=lambda one: one.used))
        return True

    def _from_outside(self, flow: _Datagrams) -> None:
        for _ in range(_PACKETS):
            try:
                data = flow.outside.recv(_PACKET_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._unreachable(flow, _ERRORS.get(error.errno or 0, "port"), b"")
                return
            flow.used = time.monotonic()
            if self._loop.room(BACK) > 0:  # else it is lost, as on a link that is full
                self._loop.moved(BACK, len(data))
                self._to_inside(flow.key, data)

    def _to_inside(self, key: _Key, data: bytes) -> None:
        source, source_port, destination, port = key
        self._inside.inject(source, packets.udp(destination, port, source, source_port, data))

    def _unreachable(self, flow: _Datagrams, kind: str, data: bytes) -> None:
        self._end_datagrams(flow)
        self._refuse_datagram(flow.key, kind, data)

    def _refuse_datagram(self, key: _Key, kind: str, data: bytes) -> None:
        source, source_port, destination, port = key
        original = packets.udp(source, source_port, destination, port, data[:64])
        self._inside.inject(source, packets.icmp_error(kind, destination, source, original))

    def _end_datagrams(self, flow: _Datagrams) -> None:
        if self._datagrams.pop(flow.key, None) is not None:
            self._loop.forget(flow.outside)
            flow.outside.close()


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _packed(shown: str) -> bytes:
    return ipaddress.ip_address(shown.partition("%")[0]).packed


def _shown(packed: bytes) -> str:
    return str(ipaddress.ip_address(packed))


def _original(control: list[tuple[int, int, bytes]]) -> tuple[bytes, int] | None:
    """Where a datagram was sent to: a struct sockaddr, by IP_RECVORIGDSTADDR."""
    for _, _, data in control:
        family = struct.unpack_from("=H", data)[0] if len(data) >= 16 else 0
        if family == socket.AF_INET:
            return data[4:8], struct.unpack_from("!H", data, 2)[0]
        if family == socket.AF_INET6 and len(data) >= 24:
            return data[8:24], struct.unpack_from("!H", data, 2)[0]
    return None
