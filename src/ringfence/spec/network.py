"""The network rule of a spec."""

from __future__ import annotations

from ringfence._value import Later, Value
from ringfence.errors import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from ringfence.spec import parse
else:
    parse = Later("ringfence.spec.parse")  # most specs have nothing to be parsed


__all__ = ["Allowed", "Network"]


class Allowed(Value):
    """One destination that may be reached. host: a name, "*.name", an address, a network in CIDR, or "*" for any.
    port: 1 to 65535, or None for any.
    """

    __slots__ = ("host", "port")
    host: str
    port: int | None

    def __init__(self, *, host: str, port: int | None) -> None:
        self._set(host=host, port=port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{'*' if self.port is None else self.port}"


class Network(Value):
    """Which network a workload has.

    mode: "none" (a loopback of its own at most), "nat" (its own stack, connected through the host), or "host".
    allow: the only destinations that it may connect to; None is all of them. Each is "HOST:PORT", where HOST is a name
    ("example.com"), all names below one ("*.example.com"), an address ("192.0.2.7", "[2001:db8::7]"), a network
    ("192.0.2.0/24") or "*", and PORT a number or "*".
    publish: {port of the host: port inside}, at 127.0.0.1 of the host; kept as sorted pairs. A process, which has no
    stack of its own, may with `allow` bind just these, the same on both sides, at any address.
    bandwidth: with nat, bytes a second ("10M") each way -> bandwidth_bytes_per_second; None is no limit.

    Raises SpecError.
    """

    __slots__ = ("allow", "bandwidth_bytes_per_second", "mode", "publish")
    mode: str
    allow: tuple[Allowed, ...] | None
    publish: tuple[tuple[int, int], ...]
    bandwidth_bytes_per_second: int | None

    def __init__(
        self,
        mode: str = "nat",
        *,
        allow: Iterable[str] | None = None,
        publish: Mapping[int, int] | Iterable[tuple[int, int]] = (),
        bandwidth: str | int | float | None = None,
    ) -> None:
        if mode not in ("none", "nat", "host"):
            raise SpecError(f"network must be 'none', 'nat' or 'host', not {mode!r}")
        if isinstance(allow, (str, bytes)):
            raise SpecError("network allow must be a list of 'host:port', not a str")
        pairs = publish.items() if hasattr(publish, "items") else publish
        allowed = None if allow is None else tuple(_allowed(one) for one in allow)
        published = tuple(sorted((_port(outer), _port(inner)) for outer, inner in pairs))
        if len({outer for outer, _ in published}) != len(published):
            raise SpecError("network publish: a port of the host is given twice")
        if mode == "none" and (allowed is not None or published or bandwidth is not None):
            raise SpecError("network allow, publish and bandwidth need mode 'nat' or 'host', not 'none'")
        self._set(
            mode=mode,
            allow=allowed,
            publish=published,
            bandwidth_bytes_per_second=None if bandwidth is None else parse.size(bandwidth, "network: bandwidth"),
        )

    def _init_arguments(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "allow": None if self.allow is None else [str(one) for one in self.allow],
            "publish": self.publish,
            "bandwidth": self.bandwidth_bytes_per_second,
        }


def _allowed(value: str | Allowed) -> Allowed:
    if not isinstance(value, str):
        raise SpecError(f"network allow: {value!r} must be a str such as 'example.com:443'")
    host, _, port = value.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        literal = True
    else:
        literal = False
    if not host or literal != (":" in host):
        raise SpecError(f"network allow: {value!r} must be 'host:port', such as 'example.com:443' or '[::1]:443'")
    return Allowed(host=_host(host, value), port=None if port == "*" else _port(port))


def _host(host: str, shown: str) -> str:
    """Normalised, so that the same destination has one spelling."""
    if host == "*":
        return host
    if ":" in host or "/" in host or host.replace(".", "").isdecimal():
        import ipaddress

        try:
            return str(ipaddress.ip_network(host)) if "/" in host else str(ipaddress.ip_address(host))
        except ValueError as error:
            raise SpecError(f"network allow: {shown!r}: {error}") from None
    name = host.removesuffix(".").lower()
    labels = name.removeprefix("*.").split(".")
    for label in labels:
        plain = label.isascii() and label.replace("-", "").replace("_", "").isalnum()
        if not plain or label[0] == "-" or label[-1] == "-" or len(label) > 63:
            raise SpecError(f"network allow: {shown!r} must be 'host:port', such as 'example.com:443'")
    if len(name) > 253:
        raise SpecError(f"network allow: the name in {shown!r:.80} is longer than 253 characters")
    return name


def _port(value: str | int) -> int:
    return parse.count(value, "network: a port", 1, 65535)
