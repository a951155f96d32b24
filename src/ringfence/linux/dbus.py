"""A D-Bus client that is just large enough to ask systemd for a scope: calls and their answers, over a Unix socket.

Source: the D-Bus specification (0.41), "Message Protocol" and "Authentication Protocol". Every value that comes is
checked against the bounds of its message before it is used.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time

from ringfence.errors import RingfenceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Bus", "BusError", "Variant", "marshal", "unmarshal"]

_CALL, _RETURN, _ERROR = 1, 2, 3
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL, _DESTINATION, _SIGNATURE = 1, 2, 3, 4, 5, 6, 8
_FIELD_TYPES = {_PATH: "o", _SIGNATURE: "g", _REPLY_SERIAL: "u"}
# Answers to what is asked here have some hundred bytes; the specification allows 128 MiB.
_MOST_BYTES = 1 << 20
_MOST_DEPTH = 16
_FIXED = {"y": ("B", 1), "n": ("h", 2), "q": ("H", 2), "i": ("i", 4), "u": ("I", 4), "h": ("I", 4), "b": ("I", 4)}
_FIXED |= {"x": ("q", 8), "t": ("Q", 8), "d": ("d", 8)}


class BusError(RingfenceError):
    """The other side answered with an error (name: the error's), or with something else than D-Bus (name: "")."""

    def __init__(self, text: str, name: str = "") -> None:
        super().__init__(f"{name}: {text}" if name else text)
        self.name = name


class Variant:
    """A value that carries its type along (`v`)."""

    __slots__ = ("signature", "value")

    def __init__(self, signature: str, value: Any) -> None:
        self.signature = signature
        self.value = value


# ---- values ----


def _alignment(code: str) -> int:
    if code in _FIXED:
        return _FIXED[code][1]
    return {"s": 4, "o": 4, "a": 4, "(": 8, "{": 8}.get(code, 1)


def _first(signature: str, depth: int = 0) -> tuple[str, str]:
    """(the first complete type, the rest). Raises BusError."""
    if not signature or depth > _MOST_DEPTH:
        raise BusError("a signature that isn't one")
    code = signature[0]
    if code == "a":
        inner, rest = _first(signature[1:], depth + 1)
        return code + inner, rest
    if code in "({":
        rest = signature[1:]
        while rest and rest[0] not in ")}":
            _, rest = _first(rest, depth + 1)
        if not rest:
            raise BusError("a signature that isn't closed")
        return signature[: len(signature) - len(rest) + 1], rest[1:]
    if code not in _FIXED and code not in "sogv":
        raise BusError(f"a value of type {code!r}")
    return code, signature[1:]


def _pad(data: bytearray, alignment: int) -> None:
    data.extend(bytes(-len(data) % alignment))


def marshal(signature: str, values: tuple[Any, ...] | list[Any], data: bytearray | None = None) -> bytearray:
    """Values as little-endian D-Bus. data: what comes before, which alignment counts from."""
    data = bytearray() if data is None else data
    for value in values:
        one, signature = _first(signature)
        code = one[0]
        _pad(data, _alignment(code))
        if code in _FIXED:
            data += struct.pack("<" + _FIXED[code][0], value)
        elif code in "so":
            text = value.encode()
            data += struct.pack("<I", len(text)) + text + b"\0"
        elif code == "g":
            data += bytes([len(value)]) + value.encode() + b"\0"
        elif code == "v":
            marshal("g", [value.signature], data)
            marshal(value.signature, [value.value], data)
        elif code == "a":
            at = len(data)
            data += bytes(4)
            _pad(data, _alignment(one[1]))
            start = len(data)
            for item in value:
                marshal(one[1:], [item], data)
            struct.pack_into("<I", data, at, len(data) - start)
        else:
            marshal(one[1:-1], list(value), data)
    return data


class _Reader:
    def __init__(self, data: bytes, order: str) -> None:
        self.data = data
        self.order = order
        self.at = 0

    def align(self, alignment: int) -> None:
        self.at += -self.at % alignment

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise BusError("a value that passes the end of its message")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        letter, size = _FIXED[code]
        self.align(size)
        (found,) = struct.unpack(self.order + letter, self.take(size))
        return bool(found) if code == "b" else found

    def text(self, length: int) -> str:
        found = self.take(length)
        self.take(1)
        return found.decode("utf-8", "replace")

    def value(self, one: str, depth: int = 0) -> Any:
        if depth > _MOST_DEPTH:
            raise BusError("a value that is nested too deeply")
        code = one[0]
        if code in _FIXED:
            return self.number(code)
        if code in "so":
            return self.text(self.number("u"))
        if code == "g":
            return self.text(self.number("y"))
        if code == "v":
            inner, rest = _first(self.text(self.number("y")))
            if rest:
                raise BusError("a variant of more than one value")
            return self.value(inner, depth + 1)
        self.align(_alignment(code))
        if code == "a":
            end = self.number("u")
            self.align(_alignment(one[1]))
            end += self.at
            if end > len(self.data):
                raise BusError("an array that passes the end of its message")
            found = []
            while self.at < end:
                before = self.at
                found.append(self.value(one[1:], depth + 1))
                if self.at == before:
                    raise BusError("an array of what takes no room")
            return found
        return tuple(self.values(one[1:-1], depth + 1))

    def values(self, signature: str, depth: int = 0) -> list[Any]:
        found = []
        while signature:
            one, signature = _first(signature)
            found.append(self.value(one, depth))
        return found


def unmarshal(signature: str, data: bytes, order: str = "<") -> tuple[Any, ...]:
    """The values of a body. Variants come as what is in them. Raises BusError."""
    return tuple(_Reader(data, order).values(signature))


# ---- a connection ----


class Bus:
    """A connection to a socket on which a bus, or systemd itself, answers. A context manager.

    hello: whether it is a bus, which has to be greeted. timeout_s: for connecting, and for each call as a whole. Only a
    peer that runs as this user, or as root, in this PID namespace, is spoken to. Raises BusError, OSError.
    """

    def __init__(self, path: str, *, hello: bool, timeout_s: float = 5.0) -> None:
        self._serial = 0
        self._rest = bytearray()
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(path)
            credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, uid, _ = struct.unpack("iII", credentials)
            if pid == 0:
                # For one outside of our PID namespace the numbers of our processes are other processes'.
                raise BusError(f"{path} is of another PID namespace")
            if uid not in (0, os.geteuid()):
                raise BusError(f"{path} belongs to uid {uid}")
            self._authenticate()
            if hello:
                self.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Bus:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _authenticate(self) -> None:
        identity = str(os.geteuid()).encode().hex().encode()
        self._socket.sendall(b"\0AUTH EXTERNAL " + identity + b"\r\n")
        while b"\r\n" not in self._rest:
            self._fill(512)
        line, _, rest = bytes(self._rest).partition(b"\r\n")
        if not line.startswith(b"OK "):
            raise BusError(f"it doesn't take this user: {line.decode('ascii', 'replace')}")
        self._rest = bytearray(rest)
        self._socket.sendall(b"BEGIN\r\n")

    def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        values: tuple[Any, ...] = (),
    ) -> tuple[Any, ...]:
        """Calls a method and waits for its answer. Raises BusError, OSError (TimeoutError)."""
        self._serial += 1
        self._deadline = time.monotonic() + self._timeout_s
        body = marshal(signature, values)
        given = {_PATH: path, _INTERFACE: interface, _MEMBER: member, _DESTINATION: destination, _SIGNATURE: signature}
        fields = [(code, Variant(_FIELD_TYPES.get(code, "s"), value)) for code, value in given.items() if value]
        head = marshal("yyyyuua(yv)", [ord("l"), _CALL, 0, 1, len(body), self._serial, fields])
        _pad(head, 8)
        self._socket.sendall(bytes(head) + bytes(body))
        while True:
            kind, found, order, data = self._message()
            if found.get(_REPLY_SERIAL) != self._serial or kind not in (_RETURN, _ERROR):
                continue  # a signal
            answer = unmarshal(str(found.get(_SIGNATURE, "")), data, order)
            if kind == _RETURN:
                return answer
            text = answer[0] if answer and isinstance(answer[0], str) else f"{member} failed"
            raise BusError(text, str(found.get(_ERROR_NAME, "")))

    def _fill(self, most: int) -> None:
        # However little comes at a time.
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "it doesn't answer in time")
        self._socket.settimeout(left_s)
        data = self._socket.recv(most)
        if not data:
            raise BusError("it hung up")
        self._rest += data
        if len(self._rest) > _MOST_BYTES:
            raise BusError("it sends more than was asked for")

    def _take(self, count: int) -> bytes:
        while len(self._rest) < count:
            self._fill(65536)
        found = bytes(self._rest[:count])
        del self._rest[:count]
        return found

    def _message(self) -> tuple[int, dict[int, Any], str, bytes]:
        """(type, header fields, byte order, body) of the next message."""
        head = self._take(16)
        order = {ord("l"): "<", ord("B"): ">"}.get(head[0])
        if order is None or head[3] != 1:
            raise BusError("what it sends isn't D-Bus")
        body_length, _, fields_length = struct.unpack(order + "III", head[4:])
        padded = fields_length + -fields_length % 8
        if padded + body_length > _MOST_BYTES:
            raise BusError("it sends more than was asked for")
        reader = _Reader(head + self._take(padded), order)
        reader.at = 12
        return head[1], dict(reader.value("a(yv)")), order, self._take(body_length)
