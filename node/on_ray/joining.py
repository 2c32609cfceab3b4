"""Peers on a Ray cluster that join a swarm beside others: `thinwire ray --join TICKET`.

Ray places them, starts them again and gives them their GPUs. To the swarm they are nodes like any
volunteer's, over libp2p: each with an identity, a port and a folder of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...compression.errors import ThinwireError
from ...coordinator.protocol.ticket import Ticket
from ..links.upload_limit import parse_rate
from ..system.folder import folder_of_run
from .cluster import PeerGroup, connected, find_room, give_back
from .peer import PeerSpec
from .peers import LATE_S, Peers

if TYPE_CHECKING:
    from ..precision import Precision

log = logging.getLogger("thinwire.ray")

POLL_S: Final = 0.5


def join_swarm(
    ticket: str,
    groups: Sequence[PeerGroup],
    *,
    address: str | None = None,
    node_state: str | Path | None = None,
    output: str | Path | None = None,
    task: str | None = None,
    precision: Precision = "auto",
    wait_s: float | None = None,
    restarts: int = 10,
    patience_s: float = 600.0,
    host: str = "0.0.0.0",
    max_upload: str | None = None,
    verbose: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Trains until the run's last round; None: `stopped` before. Nothing is left in the cluster.

    Returns `weights`, the folder with them, and `peers`: by name the fields of `Result`, None for one that
    was not back in time. `host`: of each peer's machine, where it listens; `max_upload`: of each. For the
    other arguments see `train`. Raises ConfigError, NoRoom, and what ends a node everywhere else.
    """
    if max_upload is not None:
        parse_rate(max_upload)
    run = f"run-{Ticket.parse(ticket).run_id.hex()[:12]}"
    weights = Path(output) if output is not None else folder_of_run(run, "ray") / "weights"
    folder = None if node_state is None else str(Path(node_state).absolute())

    def spec(name: str, group: PeerGroup) -> PeerSpec:
        return PeerSpec(
            name=name,
            namespace=f"thinwire-join-{run}",
            ticket=ticket,
            ranks=group.ranks,
            cpus=group.cpus,
            gpus=group.gpus,
            folder=folder,
            import_path=task,
            precision=precision,
            patience_s=patience_s,
            over_libp2p=True,
            host=host,
            max_upload=max_upload,
        )

    with connected(address, verbose=verbose):
        placements = find_room(groups, f"thinwire-{run}", wait_s, stopped)
        with _given_back(placements), _started(groups, placements, spec, restarts) as peers:
            if not placements or not _until_the_end(peers, stopped):
                return None
            peers.fetch(weights)
            peers.clean()
            return {"weights": str(weights), "peers": {peer.name: peer.result for peer in peers.all}}


@contextmanager
def _given_back(placements: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        give_back([], placements)


@contextmanager
def _started(
    groups: Sequence[PeerGroup],
    placements: Sequence[Any],
    spec: Callable[[str, PeerGroup], PeerSpec],
    restarts: int,
) -> Iterator[Peers]:
    """All actors are there meanwhile, and none of them afterwards."""
    peers = Peers(restarts)
    try:
        if placements:
            peers.start(groups, placements, spec)
            log.info("the peers join; what follows is what the first one says, with --verbose all of them")
        yield peers
    finally:
        peers.end()


def _until_the_end(peers: Peers, stopped: Callable[[], bool]) -> bool:
    """False: `stopped`. Raises what the peers have met if none of them goes on."""
    end_s: float | None = None
    while True:
        if stopped():
            peers.leave()
            log.info("the peers have left the run; the same command joins again")
            return False
        peers.tell()
        peers.collect()
        if not peers.n_left and not peers.done:
            raise peers.first_error or ThinwireError("the peers have left the run before its last round")
        if end_s is None and peers.done:
            end_s = time.monotonic() + LATE_S
        if end_s is not None and peers.are_done(time.monotonic() > end_s):
            return True
        time.sleep(POLL_S)
