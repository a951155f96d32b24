"""The names that a sandbox may resolve. Asks the host's own servers, with an allow-list only for names on it; what it
tells the workload then it makes anew, of addresses only, and exactly those are open from then on.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time

from ringfence.levels.network import dns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.levels.network.policy import Policy

    Watch = Callable[[socket.socket, Callable[[], None]], None]
    Forget = Callable[[socket.socket], None]
    Reply = Callable[[bytes], None]

__all__ = ["Resolver", "servers"]

_PORT = 53
_MOST_SERVERS = 3  # MAXNS of resolv.conf(5)
_MOST_FILE_BYTES = 1 << 20
_FILE_AGE_S = 1.0
_MOST_QUERY_BYTES = 4096
_MOST_WAITING = 64
_TRIES = 4
_TRY_S = 1.5
# What the workload's own resolver may keep: not longer than the address stays open, by far.
_MOST_TTL_S = 300


def servers(path: str = "/etc/resolv.conf") -> list[str]:
    """The host's name servers, as resolv.conf(5) has them."""
    found = []
    for line in _lines(path):
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            try:
                address = ipaddress.ip_address(words[1].partition("%")[0])
            except ValueError:
                continue
            # The zone of a link-local address stays.
            found.append(words[1] if address.version == 6 else str(address))
    return found[:_MOST_SERVERS] or ["127.0.0.1"]


_read: dict[str, tuple[float, list[str]]] = {}


def _lines(path: str) -> list[str]:
    """Of a file of the host's, as it was within the last second: a workload may ask very often."""
    now = time.monotonic()
    known = _read.get(path)
    if known is not None and now < known[0] + _FILE_AGE_S:
        return known[1]
    try:
        with open(path, "rb") as file:
            lines = file.read(_MOST_FILE_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    _read[path] = (now, lines)
    return lines


def _hosts(name: str, path: str = "/etc/hosts") -> list[bytes]:
    """What the host's own table says of a name."""
    found = []
    for line in _lines(path):
        words = line.partition("#")[0].split()
        if name in [one.lower().removesuffix(".") for one in words[1:]]:
            try:
                found.append(ipaddress.ip_address(words[0]).packed)
            except ValueError:
                continue
    return found


class _Waiting:
    """A question to the host's servers, and who waits for its answer."""

    def __init__(self, name: str, kind: int, query: bytes = b"", reply: Reply | None = None) -> None:
        self.name, self.kind = name, kind
        # A query that is passed on as it is, and who gets the answer as it is.
        self.query, self.reply = query, reply
        self.id = 0
        self.tries = 0
        self.deadline = 0.0
        self.socket: socket.socket | None = None
        self.clients: list[tuple[dns.Query, Reply]] = []


class Resolver:
    """Answers the workload's queries. `watch` and `forget` (un)register a socket with the gateway's loop; `may` says
    whether there is room for one more.
    """

    def __init__(self, policy: Policy, watch: Watch, forget: Forget, may: Callable[[], bool] = lambda: True) -> None:
        self._policy = policy
        self._may = may
        self.sockets = 0
        self._watch, self._forget = watch, forget
        self._waiting: dict[object, _Waiting] = {}

    def pass_on(self, query: bytes, reply: Reply) -> None:
        """For a sandbox without an allow-list: any query, to a server that answers, and its answer."""
        if not 2 < len(query) <= _MOST_QUERY_BYTES:
            return
        if not dns.is_plain(query):
            # The host's server sees the host's address: it isn't asked to change zones or to tell others.
            if answer := dns.build_refusal(query):
                reply(answer)
            return
        if len(self._waiting) >= _MOST_WAITING:
            # The oldest gives way: it is the least likely to get an answer yet.
            self._drop(self._waiting.pop(next(iter(self._waiting))))
        waiting = _Waiting("", 0, query, reply)
        self._waiting[waiting] = waiting
        self._try(waiting)

    def ask(self, data: bytes, reply: Reply) -> None:
        """A query as the workload sent it. `reply` gets the answer, now or later; what is no query gets none."""
        query = dns.parse_query(data)
        if query is None:
            return
        if query.opcode != 0:
            reply(dns.build_response(query, dns.NOT_IMPLEMENTED, []))
        elif not query.name or not self._policy.ports_of(query.name):
            # Not asked of anybody: a name can carry data out.
            reply(dns.build_response(query, dns.REFUSED, []))
        elif query.kind not in (dns.A, dns.AAAA):
            reply(dns.build_response(query, dns.NO_ERROR, []))
        else:
            self._resolve(query, reply)

    def _resolve(self, query: dns.Query, reply: Reply) -> None:
        known = _hosts(query.name)
        if known:
            self._tell(query, reply, dns.NO_ERROR, known, 0)
            return
        key = (query.name, query.kind)
        waiting = self._waiting.get(key)
        if waiting is None:
            if len(self._waiting) >= _MOST_WAITING:
                reply(dns.build_response(query, dns.SERVER_FAILURE, []))
                return
            waiting = self._waiting[key] = _Waiting(*key)
            waiting.clients.append((query, reply))
            self._try(waiting)
        elif len(waiting.clients) < _MOST_WAITING:
            waiting.clients.append((query, reply))

    def _tell(self, query: dns.Query, reply: Reply, code: int, addresses: list[bytes], ttl_s: int) -> None:
        size = 4 if query.kind == dns.A else 16
        told = self._policy.open(query.name, addresses, ttl_s, time.monotonic())
        told = [one for one in told if len(one) == size]
        if code not in (dns.NO_ERROR, dns.NO_NAME):
            code = dns.SERVER_FAILURE
        reply(dns.build_response(query, code, told, min(ttl_s, _MOST_TTL_S)))

    # ---- the host's servers ----

    def _try(self, waiting: _Waiting) -> None:
        """Sends the question to the next server. A socket for each try: its port is as hard to guess as the id."""
        self._drop(waiting)
        while waiting.tries < _TRIES:
            known = servers()
            server = known[waiting.tries % len(known)]
            waiting.tries += 1
            waiting.id = int.from_bytes(os.urandom(2))
            waiting.deadline = time.monotonic() + _TRY_S
            if not self._may():
                return  # as if the question were lost: there may be room by the next try
            family = socket.AF_INET6 if ":" in server else socket.AF_INET
            try:
                one = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            except OSError:
                continue
            waiting.socket = one
            self.sockets += 1
            try:
                self._watch(one, lambda: self._readable(waiting))
                one.connect(
                    socket.getaddrinfo(server, _PORT, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0][4]
                )
                one.send(waiting.query or dns.build_query(waiting.id, waiting.name, waiting.kind))
            except OSError:
                self._drop(waiting)
                continue
            return
        self._finish(waiting, dns.Answer(dns.SERVER_FAILURE, [], 0))

    def _readable(self, waiting: _Waiting) -> None:
        one = waiting.socket
        if one is None:
            return
        try:
            data = one.recv(4096)
        except BlockingIOError:
            return
        except OSError:  # nobody listens there
            self._try(waiting)
            return
        if waiting.reply is not None:
            if data[:2] == waiting.query[:2]:
                self._drop(waiting)
                del self._waiting[waiting]
                waiting.reply(data)
            return
        answer = dns.parse_response(data, waiting.id, waiting.name, waiting.kind)
        if answer is None:
            return  # not an answer to this question: wait on
        if answer.code in (dns.NO_ERROR, dns.NO_NAME) or waiting.tries >= _TRIES:
            self._finish(waiting, answer)
        else:
            self._try(waiting)

    def _finish(self, waiting: _Waiting, answer: dns.Answer) -> None:
        self._drop(waiting)
        self._waiting.pop((waiting.name, waiting.kind) if waiting.reply is None else waiting, None)
        for query, reply in waiting.clients:
            self._tell(query, reply, answer.code, answer.addresses, answer.ttl_s)

    def _drop(self, waiting: _Waiting) -> None:
        one, waiting.socket = waiting.socket, None
        if one is not None:
            self.sockets -= 1
            self._forget(one)
            one.close()

    # ---- the clock ----

    def next_deadline(self) -> float | None:
        return min((one.deadline for one in self._waiting.values()), default=None)

    def tick(self, now: float) -> None:
        """Goes on with questions that no server has answered in time."""
        for waiting in [one for one in self._waiting.values() if one.deadline <= now]:
            self._try(waiting)

    def close(self) -> None:
        for waiting in self._waiting.values():
            self._drop(waiting)
        self._waiting.clear()
