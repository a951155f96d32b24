"""The gateway's resolver against a server on loopback, with the gateway's loop played by hand."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from ringfence.levels.network import dns, resolver
from ringfence.levels.network.policy import Policy
from ringfence.levels.network.resolver import Resolver
from ringfence.spec import Network


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        one.settimeout(5)
        monkeypatch.setattr(resolver, "_PORT", one.getsockname()[1])
        monkeypatch.setattr(resolver, "servers", lambda: ["127.0.0.1"])
        monkeypatch.setattr(resolver, "_hosts", lambda _: [])
        yield one


@pytest.mark.parametrize("limited", [True, False])
def test_without_room_a_question_waits_as_if_it_were_lost(server: socket.socket, limited: bool) -> None:
    """For a while: then its asker is told, with a list, or asks again."""
    watched: dict[socket.socket, Callable[[], None]] = {}
    room = False
    made = Resolver(
        Policy(Network("nat", allow=["a.example:80"]).allow if limited else None),
        lambda one, call: watched.update({one: call}),
        lambda one: watched.pop(one, None),  # type: ignore[arg-type]
        lambda: room,
    )
    ask = made.ask if limited else made.pass_on
    answers: list[bytes] = []
    ask(dns.build_query(7, "a.example", dns.A), answers.append)
    assert (made.sockets, watched, answers) == (0, {}, [])
    due = made.next_deadline()
    assert due is not None and due > time.monotonic()
    room = True
    made.tick(due)
    assert made.sockets == len(watched) == 1
    data, peer = server.recvfrom(512)
    asked = dns.parse_query(data)
    assert asked is not None and asked.name == "a.example"
    server.sendto(dns.build_response(asked, dns.NO_ERROR, [bytes([203, 0, 113, 1])], 60), peer)
    next(iter(watched.values()))()
    assert len(answers) == 1 and answers[0][3] & 15 == dns.NO_ERROR
    assert (made.sockets, made.next_deadline()) == (0, None)
    # No room at all.
    room = False
    ask(dns.build_query(8, "a.example", dns.A), answers.append)
    for _ in range(resolver._TRIES):
        due = made.next_deadline()
        assert due is not None
        made.tick(due)
    assert made.next_deadline() is None
    assert [one[3] & 15 for one in answers[1:]] == [dns.SERVER_FAILURE] * limited
