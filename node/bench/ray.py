"""`bench ray`: how long a round takes without compute when actors make it, on a Ray cluster of this machine.

As `bench round`, but every peer is an actor in a process of its own, as is the coordinator: what is measured
is Ray's part. Times are those of one peer, from commit to commit.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from ...coordinator.ledger import Ledger
from ...coordinator.protocol.identity import load_or_create, peer_id_of
from ...coordinator.protocol.ticket import Ticket
from ...coordinator.state import StateDir
from ..on_ray.cluster import connected, give_back, quiet_stdout
from ..on_ray.coordinator import CoordinatorActor
from ..on_ray.link import RayLink
from ..on_ray.transport import COORDINATOR
from .genesis import genesis_of
from .round import WARM_UP_ROUNDS, figures, take_part

N_PEERS: Final = 4
ROUNDS_PER_REPEAT: Final = 40
NAMESPACE: Final = "thinwire-bench"


class BenchPeer:
    """A peer that has nothing to compute."""

    def __init__(self, ticket: str, name: str) -> None:
        self._link = RayLink(Ticket.parse(ticket), name)
        self._link.open()

    def run(self, n_rounds: int) -> tuple[list[float], int]:
        """When it saw each commit, and the bytes that it has sent."""
        seen_s: list[float] = []
        take_part(self._link, n_rounds, seen_s)
        sent = sum(self._link.traffic().sent.values())
        self._link.close()
        return seen_s, sent


def bench_ray(_n_params: int, n_repeats: int, _device: str) -> dict[str, Any]:
    """Raises ConfigError where Ray is not installed. Neither size nor device has an influence."""
    with quiet_stdout(), connected("local") as ray:
        return measure_rounds(ray, N_PEERS, ROUNDS_PER_REPEAT * n_repeats)


def measure_rounds(ray: Any, n_peers: int, n_rounds: int) -> dict[str, Any]:
    """In the cluster that this process is connected to."""
    total = WARM_UP_ROUNDS + n_rounds
    actors: list[Any] = []
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thinwire-bench-")))
        stack.callback(lambda: give_back(actors, []))
        with StateDir(path) as state:
            key = load_or_create(state.key_path)
            genesis = genesis_of(peer_id_of(key.public_key()), n_peers, total)
            Ledger.create(state.ledger_path, genesis, key).close()
        coordinator = ray.remote(CoordinatorActor).options(
            name=COORDINATOR, namespace=NAMESPACE, num_cpus=0, max_concurrency=1000
        )
        actors.append(coordinator.remote(str(path), NAMESPACE))
        ticket = ray.get(actors[0].ticket.remote())
        peer = ray.remote(BenchPeer).options(num_cpus=0)
        peers = [peer.remote(ticket, f"peer-{i}") for i in range(n_peers)]
        actors += peers
        results = ray.get([p.run.remote(total) for p in peers])
        ray.get(actors[0].stop.remote())
    seen_s, _ = results[0]
    return figures(seen_s, n_peers, n_rounds, sum(sent for _, sent in results))
