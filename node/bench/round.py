"""`bench round`: how long a round takes without compute, over real libp2p on loopback.

Every peer offers 16 bytes (SPSA with 16 probes) as soon as it has the last commit, and the coordinator closes
a round when all offers are here. Includes the commit's way to the disk. Peers are threads of this process,
each with a daemon of its own.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from ...coordinator.protocol.figures import ddp_bytes
from ...coordinator.protocol.identity import load_or_create, peer_id_of
from ...coordinator.protocol.messages import NodeState, Offer, Report
from ...coordinator.server_thread import ServerThread
from ..links.base import Link
from ..links.hivemind import HivemindLink
from .genesis import genesis_of

PAYLOAD_BYTES = 16
N_PEERS = 8
ROUNDS_PER_REPEAT = 40
WARM_UP_ROUNDS = 10


def bench_round(n_params: int, n_repeats: int, device: str) -> dict[str, Any]:
    """Baseline: what a peer of data-parallel training sends in a step for so many parameters, in a ring of as
    many peers. They have no other influence."""
    result = measure_rounds(N_PEERS, ROUNDS_PER_REPEAT * n_repeats)
    ddp = ddp_bytes(N_PEERS, n_params)
    return {
        **result,
        "least_n_bytes": PAYLOAD_BYTES,
        "ddp_n_params": n_params,
        "ddp_n_bytes_per_step": round(ddp),
        "ratio_to_ddp_bytes": ddp / result["sent_bytes_per_peer_and_round"],
    }


def measure_rounds(n_peers: int, n_rounds: int) -> dict[str, Any]:
    """Times of `n_rounds` rounds (at least 2) from commit to commit, and bytes per peer and round."""
    total = WARM_UP_ROUNDS + n_rounds
    with tempfile.TemporaryDirectory(prefix="thinwire-bench-") as folder, ExitStack() as stack:
        path = Path(folder)
        key = load_or_create(path / "key")
        server = stack.enter_context(
            ServerThread(path, genesis_of(peer_id_of(key.public_key()), n_peers, total))
        )
        links = [HivemindLink(server.ticket, host="127.0.0.1") for _ in range(n_peers)]
        for link in links:
            stack.callback(link.close)
            link.open()
        seen_s: list[float] = []
        threads = [threading.Thread(target=take_part, args=(link, total)) for link in links[1:]]
        for thread in threads:
            thread.start()
        take_part(links[0], total, seen_s)
        for thread in threads:
            thread.join()
        sent = sum(sum(link.traffic().sent.values()) for link in links)
    return figures(seen_s, n_peers, n_rounds, sent)


def figures(seen_s: Sequence[float], n_peers: int, n_rounds: int, sent_bytes: int) -> dict[str, Any]:
    """`seen_s`: when a peer had each commit; the first ones are for warming up."""
    times_s = [b - a for a, b in pairwise(seen_s)][-n_rounds:]
    return {
        "peers": n_peers,
        "rounds": n_rounds,
        "payload_bytes": PAYLOAD_BYTES,
        "round": {"median_s": median(times_s), "min_s": min(times_s), "max_s": max(times_s)},
        "round_p50_s": median(times_s),
        "round_p99_s": quantiles(times_s, n=100, method="inclusive")[98],
        "round_max_s": max(times_s),
        "sent_bytes_per_peer_and_round": sent_bytes / (n_peers * (WARM_UP_ROUNDS + n_rounds)),
    }


def take_part(link: Link, n_rounds: int, seen_s: list[float] | None = None) -> None:
    """Offers as soon as the last commit is there; `seen_s` gets the time of each."""
    link.state(NodeState.TRAINING)
    link.offer(offer_with(1, bytes(PAYLOAD_BYTES)))
    for commit in link.commits(0):
        if seen_s is not None:
            seen_s.append(time.monotonic())
        if commit.body.round == n_rounds:
            break
        link.offer(offer_with(commit.body.round + 1, bytes(PAYLOAD_BYTES)))
    link.report(Report(round=n_rounds, fingerprint=bytes(8)))


def offer_with(round_: int, payload: bytes) -> Offer:
    return Offer(
        round=round_,
        n_samples=1,
        n_tokens=1,
        loss=1.0,
        n_bytes=len(payload),
        payload=payload,
        digest=None,
    )


def offer_of(round_: int, number: int, payload_bytes: int) -> Offer:
    """Of bytes that no other one has."""
    head = round_.to_bytes(4, "big") + number.to_bytes(4, "big")
    return offer_with(round_, (head * (payload_bytes // len(head) + 1))[:payload_bytes])
