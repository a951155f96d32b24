"""The network of one sandbox, from before its start to its end: what a level uses."""

from __future__ import annotations

import os
import socket
import weakref

from ringfence.errors import CannotEnforce, KernelError, ProtocolError, Unmet
from ringfence.levels.network.gateway import Gateway
from ringfence.levels.network.inside import Inside, Supply
from ringfence.levels.network.policy import Policy
from ringfence.linux import netlink
from ringfence.result import Applied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ringfence.spec.network import Network

__all__ = ["NetworkSession"]

_sessions: weakref.WeakSet[NetworkSession] = weakref.WeakSet()


class NetworkSession:
    """network: of mode "nat". isolation: the level's name, for errors. local_dns: whether names are asked for at the
    sandbox's own 127.0.0.1, too. guest: the sandbox is the jail of a guest's VMM, who has it all by a tap.

    Raises CannotEnforce where a port to publish is taken, before anything of the sandbox is started.
    """

    def __init__(self, network: Network, isolation: str, *, local_dns: bool = False, guest: bool = False) -> None:
        self._network = network
        self._isolation = isolation
        self._local_dns = local_dns
        self._guest = guest
        self._published: list[tuple[socket.socket, int]] = []
        self._gateway: Gateway | None = None
        self._inside: Inside | None = None
        # Called by the gateway's thread.
        self.on_failure: Callable[[], None] | None = None
        self.supply = Supply()
        try:
            self._publish()
        except BaseException:
            self.close()
            raise
        _sessions.add(self)

    def _publish(self) -> None:
        unmet = []
        for outer, inner in self._network.publish:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            self._published.append((listener, inner))
            # A port of a sandbox that has just ended is free again at once.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", outer))
                listener.listen(128)
            except OSError as error:
                reason = f"port {outer} of the host can't be opened: {os.strerror(error.errno or 0)}"
                unmet.append(Unmet("publish", (outer, inner), reason, "choose another port"))
        if unmet:
            raise CannotEnforce(self._isolation, unmet)

    def request(self) -> None:
        """Asks init for its sockets. It must have the plan by now."""
        ipv6 = netlink.has_ipv6()
        self._inside = Inside(self.supply, ipv6=ipv6, local_dns=self._local_dns, guest=self._guest)

    def start(self) -> None:
        """Sets up the namespace by init's sockets, once these begin to come, and starts the gateway.

        Raises CannotEnforce where this kernel can't: the command has not been started.
        """
        assert self._inside is not None
        try:
            self._inside.open()
        except KernelError as error:
            asked = ", ".join(map(str, error.arguments))
            reason = f"this kernel refuses {asked} in a network namespace ({error.errno_name})"
            help = "load nft_tproxy, nft_log, nft_reject_inet and nfnetlink_log by modprobe, or use another kernel"
            raise CannotEnforce(self._isolation, [Unmet("network", "nat", reason, help)]) from error
        policy = Policy(self._network.allow)
        published, self._published = self._published, []
        rate = self._network.bandwidth_bytes_per_second
        self._gateway = Gateway(self._inside, policy, published, rate, self.on_failure)

    def check(self) -> None:
        """Raises ProtocolError where the gateway could not go on, so that the sandbox had no network from then on."""
        if self._gateway is not None and self._gateway.failure is not None:
            failure = self._gateway.failure
            raise ProtocolError(f"the sandbox's gateway failed: {type(failure).__name__}: {failure}") from failure

    @property
    def tap(self) -> int:
        """Of a guest's network, once it was started: what its VMM gets."""
        assert self._inside is not None
        return self._inside.tap

    def tap_was_handed_on(self) -> None:
        """Without the VMM it is gone then."""
        if self._inside is not None:
            self._inside.tap_was_handed_on()

    @property
    def ipv6(self) -> bool:
        return self._inside is not None and self._inside.ipv6

    def applied(self, asked: Iterable[str]) -> list[Applied]:
        """What is in force: the namespace's side read back from the kernel, the rest by this process's gateway."""
        network, inside, gateway = self._network, self._inside, self._gateway
        if inside is None or gateway is None:
            return []
        requested = "nat" if "network" in asked else None
        how = f"a gateway outside ({gateway.most_flows} flows of all sandboxes at most); inside: {inside.applied}"
        found = [Applied(rule="network", requested=requested, effective="nat", mechanism=how)]
        v6 = "through the host, as far as it has it" if inside.ipv6 else "not there: this kernel has none"
        found.append(Applied(rule="IPv6", requested=None, effective=v6, mechanism="a gateway outside"))
        if network.allow is not None:
            rules = tuple(map(str, network.allow))
            how = "the gateway opens no other TCP connection or UDP flow, and answers DNS for no other name"
            found.append(Applied(rule="allow", requested=rules, effective=rules, mechanism=how))
        if network.publish:
            shown = gateway.published()
            found.append(
                Applied(
                    rule="publish", requested=network.publish, effective=shown, mechanism="getsockname of listeners"
                )
            )
        if network.bandwidth_bytes_per_second is not None:
            rate = network.bandwidth_bytes_per_second
            how = "the gateway's token buckets, one for each direction"
            found.append(Applied(rule="bandwidth", requested=rate, effective=rate, mechanism=how))
        return found

    def close(self) -> None:
        """Ends every flow. May be called twice."""
        gateway, self._gateway = self._gateway, None
        if gateway is None or gateway.close():
            self._release()

    def _release(self) -> None:
        if self._inside is not None:
            self._inside.close()
        for listener, _ in self._published:
            listener.close()
        self.supply.close()

    def _forget(self) -> None:
        """In a forked child, which has copies of every descriptor and no thread."""
        gateway, self._gateway = self._gateway, None
        if gateway is not None:
            gateway.forget()
        self._release()


def _after_fork_in_child() -> None:
    for one in list(_sessions):
        one._forget()
    _sessions.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
