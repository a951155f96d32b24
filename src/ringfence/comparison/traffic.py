"""The network between the host and a sandbox: the probe serves inside, and the probe on the host is its client.

Only the client's clock counts, which is the host's. With network="nat" the server's port is published, so what is
measured is the way through the gateway; a process has the host's own network.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import subprocess
import threading

from ringfence.comparison.document import BARE
from ringfence.comparison.inside import parse
from ringfence.comparison.places import PROBE
from ringfence.comparison.taken import in_rounds, start
from ringfence.errors import RingfenceError
from ringfence.sandbox import Sandbox
from ringfence.spec import ISOLATIONS, Network
from ringfence.wire.launcher import probe_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from ringfence.comparison.measures import Measure
    from ringfence.comparison.places import Place
    from ringfence.comparison.taken import Effort, Taken

__all__ = ["take"]

_SERVE_S = 30
_INSIDE_PORT = 8080


def take(
    measures: Iterable[Measure], places: Sequence[Place], effort: Effort, tell: Callable[[str], None]
) -> Mapping[str, Mapping[str, Taken]]:
    """By place and measure. One connection gives both measures."""
    names = [one.name for one in measures]
    found = start(names, [one.name for one in places])
    kept: dict[str, list[dict[str, list[float]]]] = {one.name: [] for one in places}
    calls: dict[str, Callable[[], None]] = {}

    def give_up(place: str, why: str) -> None:
        kept[place] = []
        for name in names:
            found[place][name].give_up(why)

    with contextlib.ExitStack() as stack:
        for place in places:
            if place.name not in (*ISOLATIONS, BARE):
                give_up(place.name, "no port of it was published")
                continue
            try:
                serve, port, source = stack.enter_context(_server(place.name))
            except (RingfenceError, OSError) as error:
                give_up(place.name, str(error).splitlines()[0])
                continue
            for name in names:
                found[place.name][name].source = source
            calls[place.name] = functools.partial(_exchange, serve, port, effort, kept[place.name])
        said = f"{', '.join(names)}: round {{}} of {effort.rounds}"
        in_rounds(calls, effort.rounds, effort.budget_s, give_up, lambda turn: tell(said.format(turn)))
    for one, rounds in kept.items():
        for figures in rounds[1:]:
            for name in names:
                found[one][name].blocks.append(figures[name])
    return found


def _exchange(serve: Callable[[], None], port: int, effort: Effort, kept: list[dict[str, list[float]]]) -> None:
    """A server, and a client that ends it. Raises OSError, and what the server's sandbox raises."""
    errors: list[BaseException] = []

    def server() -> None:
        try:
            serve()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=server)
    thread.start()
    words = [probe_path(), "bench", "client", str(effort.samples), str(effort.sample_us), "127.0.0.1", str(port)]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_SERVE_S)
    except subprocess.TimeoutExpired:
        raise OSError(f"the client did not end in {_SERVE_S} s") from None
    finally:
        thread.join()  # it ends with its client, or by its own alarm
    if errors:
        raise errors[0]
    if done.returncode:
        raise OSError(f"the client: {done.stderr.decode('utf-8', 'replace').strip()}")
    kept.append(parse(done.stdout).figures)


@contextlib.contextmanager
def _server(name: str) -> Iterator[tuple[Callable[[], None], int, str]]:
    """What serves one client, at which port of the host, and what that measures. Raises what `Sandbox` raises."""
    port = _free_port()
    if name == BARE:

        def bare() -> None:
            words = [probe_path(), "bench-serve", str(port), str(_SERVE_S)]
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
            if done.returncode:
                raise OSError(f"the server: {done.stderr.decode('utf-8', 'replace').strip()}")

        yield bare, port, "built in"
        return
    nat = name != "process"
    network = Network("nat", publish={port: _INSIDE_PORT}) if nat else Network("host")
    # A gateway connects to the sandbox's address; on the host's own network nobody but the host shall.
    words = [PROBE, "bench-serve", str(_INSIDE_PORT if nat else port), str(_SERVE_S), *(["0.0.0.0"] if nat else [])]
    with Sandbox(isolation=name, network=network) as sandbox:
        with open(probe_path(), "rb") as file:
            sandbox.write_file(PROBE, file.read(), 0o755)

        def serve() -> None:
            sandbox.run(words, check=True)

        yield serve, port, "built in, network=nat, published port" if nat else "built in, network=host"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
