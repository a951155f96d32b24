"""Messages of DNS (RFC 1035), as far as a resolver for addresses needs them. Both sides are hostile: queries come from
the workload, answers from whoever answers for a name. Everything is bounded, and nothing of a message is passed on.
"""

from __future__ import annotations

import struct

__all__ = ["AAAA", "A", "Answer", "Query", "build_query", "build_response", "parse_query", "parse_response"]

A, CNAME, AAAA = 1, 5, 28
NO_ERROR, FORMAT_ERROR, SERVER_FAILURE, NO_NAME, NOT_IMPLEMENTED, REFUSED = range(6)

_HEADER = struct.Struct("!HHHHHH")
_RECORD = struct.Struct("!HHIH")
_RESPONSE, _OPCODE, _TRUNCATED, _RECURSE, _RECURSES, _RCODE = 0x8000, 0x7800, 0x0200, 0x0100, 0x0080, 0x000F
_INTERNET = 1
_MOST_NAME_BYTES, _MOST_LABEL_BYTES = 255, 63
_MOST_MESSAGE_BYTES = 4096
# What a client without EDNS takes (RFC 1035, 4.2.1).
_RESPONSE_BYTES = 512
_MOST_RECORDS, _MOST_JUMPS, _MOST_ALIASES = 128, 32, 16
_CHARACTERS = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_")


class Query:
    """name: in lower case, without a dot at its end; "" where it has characters that no host name has."""

    __slots__ = ("flags", "id", "kind", "name", "opcode", "question")

    def __init__(self, id: int, flags: int, name: str, kind: int, question: bytes) -> None:
        self.id, self.flags = id, flags
        self.name, self.kind = name, kind
        self.question = question
        self.opcode = (flags & _OPCODE) >> 11


class Answer:
    """code: of the response. addresses: packed. ttl_s: the least of the records that led to them."""

    __slots__ = ("addresses", "code", "ttl_s")

    def __init__(self, code: int, addresses: list[bytes], ttl_s: int) -> None:
        self.code, self.addresses, self.ttl_s = code, addresses, ttl_s


def _read_name(data: bytes, at: int) -> tuple[str, int] | None:
    """(name, where what follows begins). Pointers lead backwards only, so there is no loop."""
    labels: list[str] = []
    end, limit, total = -1, at, 0
    for _ in range(_MOST_NAME_BYTES + _MOST_JUMPS):
        if at >= len(data):
            return None
        size = data[at]
        if size >= 0xC0:
            if at + 2 > len(data):
                return None
            to = (size & 0x3F) << 8 | data[at + 1]
            if to >= limit:
                return None
            end = at + 2 if end < 0 else end
            at = limit = to
            continue
        if size > _MOST_LABEL_BYTES:
            return None
        total += size + 1
        if total > _MOST_NAME_BYTES or at + 1 + size > len(data):
            return None
        if size == 0:
            name = ".".join(labels) if all(labels) else ""
            return name, (at + 1 if end < 0 else end)
        label = data[at + 1 : at + 1 + size].lower()
        # A label may hold any byte, a dot too, which would make it look like two.
        labels.append(label.decode("ascii") if _CHARACTERS.issuperset(label) else "")
        at += 1 + size
    return None


def parse_query(data: bytes) -> Query | None:
    """A query with its one question; None for what is none."""
    if not _HEADER.size <= len(data) <= _MOST_MESSAGE_BYTES:
        return None
    id, flags, questions, answers, authorities, _ = _HEADER.unpack_from(data)
    if flags & _RESPONSE or questions != 1 or answers or authorities:
        return None
    found = _read_name(data, _HEADER.size)
    if found is None or found[1] + 4 > len(data):
        return None
    name, at = found
    if at - _HEADER.size > _MOST_NAME_BYTES or data[at - 1] != 0:
        return None  # a question that points elsewhere
    kind, network = struct.unpack_from("!HH", data, at)
    return Query(id, flags, name if network == _INTERNET else "", kind, data[_HEADER.size : at + 4])


def is_plain(data: bytes) -> bool:
    """Whether it is one question of the kind that any resolver is asked, as far as its header says."""
    if len(data) < _HEADER.size:
        return False
    _, flags, questions, answers, authorities, _ = _HEADER.unpack_from(data)
    return not flags & (_RESPONSE | _OPCODE) and (questions, answers, authorities) == (1, 0, 0)


def build_refusal(data: bytes) -> bytes:
    """What a server says that has no such operation; b"" to what is no request at all."""
    if len(data) < _HEADER.size or data[2] & 0x80:
        return b""
    id, flags, *_ = _HEADER.unpack_from(data)
    return _HEADER.pack(id, _RESPONSE | flags & (_OPCODE | _RECURSE) | _RECURSES | NOT_IMPLEMENTED, 0, 0, 0, 0)


def build_response(query: Query, code: int, addresses: list[bytes], ttl_s: int = 0) -> bytes:
    """An answer to a query, in as many records as a client without EDNS takes."""
    flags = _RESPONSE | query.flags & (_OPCODE | _RECURSE) | _RECURSES | code
    records, room = [], _RESPONSE_BYTES - _HEADER.size - len(query.question)
    for address in addresses:
        kind = A if len(address) == 4 else AAAA
        record = struct.pack("!HHHIH", 0xC000 | _HEADER.size, kind, _INTERNET, ttl_s, len(address)) + address
        if kind == query.kind and room >= len(record):
            room -= len(record)
            records.append(record)
    head = _HEADER.pack(query.id, flags, 1, len(records), 0, 0)
    return head + query.question + b"".join(records)


def build_query(id: int, name: str, kind: int) -> bytes:
    """A query for the addresses of a name that `parse_query` gave."""
    labels = b"".join(bytes([len(one)]) + one.encode("ascii") for one in name.split("."))
    # With room for 1232 bytes of answer, by EDNS (RFC 6891).
    option = b"\0" + struct.pack("!HHIH", 41, 1232, 0, 0)
    return _HEADER.pack(id, _RECURSE, 1, 0, 0, 1) + labels + b"\0" + struct.pack("!HH", kind, _INTERNET) + option


def parse_response(data: bytes, id: int, name: str, kind: int) -> Answer | None:
    """What a server answered to that very question; None where it isn't an answer to it."""
    if not _HEADER.size <= len(data) <= _MOST_MESSAGE_BYTES:
        return None
    got, flags, questions, answers, _, _ = _HEADER.unpack_from(data)
    if got != id or not flags & _RESPONSE or flags & _OPCODE or questions != 1:
        return None
    question = _read_name(data, _HEADER.size)
    if question is None or question[0] != name or question[1] + 4 > len(data):
        return None
    if struct.unpack_from("!HH", data, question[1]) != (kind, _INTERNET):
        return None
    aliases: dict[str, tuple[str, int]] = {}
    found: dict[str, list[tuple[bytes, int]]] = {}
    at = question[1] + 4
    for _ in range(min(answers, _MOST_RECORDS)):
        owner = _read_name(data, at)
        if owner is None or owner[1] + _RECORD.size > len(data):
            break  # cut short: what came until then is whole
        record, network, ttl_s, length = _RECORD.unpack_from(data, owner[1])
        at = owner[1] + _RECORD.size
        if length > len(data) - at:
            break
        ttl_s = 0 if ttl_s >= 1 << 31 else ttl_s  # RFC 2181, 8
        if network == _INTERNET and record == CNAME:
            target = _read_name(data, at)
            if target is not None:
                aliases.setdefault(owner[0], (target[0], ttl_s))
        elif network == _INTERNET and record == kind and length == (4 if kind == A else 16):
            found.setdefault(owner[0], []).append((data[at : at + length], ttl_s))
        at += length
    answer = _follow(name, aliases, found, flags & _RCODE)
    if flags & _TRUNCATED and answer.code == NO_ERROR and not answer.addresses:
        # What was left out may be what was asked for: it isn't that there is none.
        return Answer(SERVER_FAILURE, [], 0)
    return answer


def _follow(
    name: str, aliases: dict[str, tuple[str, int]], found: dict[str, list[tuple[bytes, int]]], code: int
) -> Answer:
    least = (1 << 31) - 1
    for _ in range(_MOST_ALIASES):
        if name not in aliases:
            break
        name, ttl_s = aliases[name]
        least = min(least, ttl_s)
    records = found.get(name, []) if name else []
    addresses = list(dict.fromkeys(address for address, _ in records))
    return Answer(code, addresses, min([least, *(ttl_s for _, ttl_s in records)]) if addresses else 0)
