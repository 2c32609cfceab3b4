"""`bench upload`: how many payloads leave a node in a round, over real libp2p on loopback.

Every peer offers a payload of random bytes as soon as it has those of the last commit: with a coordinator
that says that its line is wide, and with one that says that it has next to none, so that nodes give payloads
to each other. Peers are threads of this process, each with a daemon of its own.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

from ...coordinator.protocol.identity import load_or_create, peer_id_of
from ...coordinator.protocol.messages import NodeState, Report
from ...coordinator.server import CoordinatorServer
from ...coordinator.server_thread import ServerThread
from ..links.base import Link
from ..links.hivemind import HivemindLink
from .genesis import genesis_of
from .round import offer_with

PEERS: Final = (4, 8)
PAYLOAD_BYTES: Final = 128 * 1024
WIDE, NARROW = 1e9, 1e3
"""Bytes per second that the coordinator is told that its line sends."""

WARM_UP: Final = 3
ROUNDS_PER_REPEAT: Final = 4
WAIT_S: Final = 120.0
"""For the others; longer, and one of them has failed."""


def bench_upload(n_params: int, n_repeats: int, device: str) -> dict[str, Any]:
    """A row of `command.BENCHES`."""
    del n_params, device
    return {
        f"peers_{n}": {
            "wide": measure_upload(n, ROUNDS_PER_REPEAT * n_repeats, WIDE),
            "narrow": measure_upload(n, ROUNDS_PER_REPEAT * n_repeats, NARROW),
        }
        for n in PEERS
    }


def measure_upload(n_peers: int, n_rounds: int, upload_bytes_per_s: float) -> dict[str, Any]:
    """Bytes that nodes send in a round over those of one payload, whatever they are for: the mean, and the
    most of a node; what the coordinator sends; and the median time of a round."""
    total = WARM_UP + n_rounds
    with tempfile.TemporaryDirectory(prefix="thinwire-bench-") as folder, ExitStack() as stack:
        path = Path(folder)
        genesis = genesis_of(peer_id_of(load_or_create(path / "key").public_key()), n_peers, total)
        make = partial(
            CoordinatorServer, genesis=genesis, host="127.0.0.1", upload_bytes_per_s=upload_bytes_per_s
        )
        server = stack.enter_context(ServerThread(path, make=make))
        links = [HivemindLink(server.ticket, host="127.0.0.1") for _ in range(n_peers)]
        for link in links:
            stack.callback(link.close)
            link.open()
        seen: list[list[tuple[float, int]]] = [[] for _ in links]
        peers = list(zip(links, seen, range(n_peers), strict=True))
        together = threading.Barrier(n_peers)
        threads = [threading.Thread(target=_take_part, args=(*peer, total, together)) for peer in peers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sent, _ = server.server.meter.totals()
    each = [(of[-1][1] - of[WARM_UP - 1][1]) / (n_rounds * PAYLOAD_BYTES) for of in seen]
    times_s = [b - a for (a, _), (b, _) in pairwise(seen[0][WARM_UP:])]
    return {
        "rounds": n_rounds,
        "payload_n_bytes": PAYLOAD_BYTES,
        "payloads_up": sum(each) / n_peers,
        "payloads_up_at_most": max(each),
        "payloads_of_coordinator": sent / (total * PAYLOAD_BYTES),
        "round": {"median_s": median(times_s), "min_s": min(times_s), "max_s": max(times_s)},
    }


def _take_part(
    link: Link, seen: list[tuple[float, int]], number: int, n_rounds: int, together: threading.Barrier
) -> None:
    """`seen` gets the time at which a round's payloads were all here, and what was sent until then. Where
    counting begins and ends everybody has all payloads, and nobody has made the next one: no copy is on its
    way."""
    made = random.Random(number)
    link.state(NodeState.TRAINING)
    link.offer(offer_with(1, made.randbytes(PAYLOAD_BYTES)))
    for commit in link.commits(0):
        for entry in commit.body.offers:
            link.payload(entry)
        here_s, is_edge = time.monotonic(), commit.body.round in (WARM_UP, n_rounds)
        if is_edge:
            together.wait(WAIT_S)
        seen.append((here_s, sum(link.traffic().sent.values())))
        if is_edge:
            together.wait(WAIT_S)
        if commit.body.round == n_rounds:
            break
        link.offer(offer_with(commit.body.round + 1, made.randbytes(PAYLOAD_BYTES)))
    link.report(Report(round=n_rounds, fingerprint=bytes(8)))
