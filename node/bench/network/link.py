"""`bench link`: how many round trips an exchange takes on a thin link, by payload.

Two peers offer as soon as they have the last commit and its payloads, and have the next one with all of its
payloads an exchange later. All connections go through pipes in user space, of the rate and delay that are
asked for: those of the peers to the coordinator, and to each other.
"""

from __future__ import annotations

import re
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

from ....compression.errors import ConfigError
from ....coordinator.protocol.identity import new_key, peer_id_of
from ....coordinator.protocol.messages import NodeState
from ....coordinator.protocol.p2p import start_p2p
from ....coordinator.protocol.ticket import Ticket
from ....coordinator.protocol.transport import Transport
from ...links.base import Link
from ...links.remote import RemoteLink
from ..round import offer_of
from .committee import served_behind
from .delayed import Delays

PAYLOADS: Final = {"inline": 16, "blob": 8_900}
"""A round of SPSA with 16 probes; one of `decoupled` with 0.67 million parameters."""

N_PEERS: Final = 2
ROUNDS_PER_REPEAT: Final = 8
WARM_UP_ROUNDS: Final = 5


def parse_rtt(text: str) -> float:
    """Seconds of 50ms. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*ms\s*", text)
    if found is None:
        raise ConfigError(f"--rtt {text}: write it as 50ms")
    return float(found[1]) / 1000


def bench_link(bytes_per_s: float, round_trip_s: float, n_repeats: int) -> dict[str, Any]:
    """A row for each payload."""
    rows = {
        name: measure_link(bytes_per_s, round_trip_s, n_bytes, N_PEERS, ROUNDS_PER_REPEAT * n_repeats)
        for name, n_bytes in PAYLOADS.items()
    }
    return {"bytes_per_s": bytes_per_s, "round_trip_s": round_trip_s, "peers": N_PEERS, "rows": rows}


def measure_link(
    bytes_per_s: float, round_trip_s: float, payload_bytes: int, n_peers: int, n_rounds: int
) -> dict[str, Any]:
    """`n_rounds`, at least 2: that are measured. `round_trips`: of the median exchange; None: without any."""
    total = WARM_UP_ROUNDS + n_rounds
    with tempfile.TemporaryDirectory(prefix="thinwire-bench-") as folder, ExitStack() as stack:
        delays = stack.enter_context(Delays(round_trip_s / 2, bytes_per_s))
        ticket = served_behind(delays, Path(folder), stack, n_peers, total)
        links = [_link(ticket, delays, stack) for _ in range(n_peers)]
        peers = [_Peer(link, total, i, payload_bytes) for i, link in enumerate(links)]
        threads = [threading.Thread(target=peer.take_part) for peer in peers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sent = sum(sum(link.traffic().sent.values()) for link in links)
    took_s = [each for peer in peers for each in peer.took_s[-n_rounds:]]
    p50_s = median(took_s)
    return {
        "payload_bytes": payload_bytes,
        "rounds": n_rounds,
        "exchange_p50_s": p50_s,
        "exchange_p99_s": quantiles(took_s, n=100, method="inclusive")[98],
        "round_trips": round(p50_s / round_trip_s, 2) if round_trip_s else None,
        "sent_bytes_per_peer_and_round": sent / (n_peers * total),
    }


def _link(ticket: Ticket, delays: Delays, stack: ExitStack) -> Link:
    """One that others reach through a door of its own."""
    key = new_key()

    async def open_transport() -> Transport:
        transport = await start_p2p(key, host="127.0.0.1")
        transport.addresses = (f"/ip4/127.0.0.1/tcp/{delays.door(transport.port)}",)
        return transport

    link = RemoteLink(ticket, peer_id_of(key.public_key()), open_transport, key=key)
    stack.callback(link.close)
    link.open()
    return link


class _Peer:
    """`took_s`: from an offer until the round's commit and all of its payloads were here."""

    def __init__(self, link: Link, last_round: int, number: int, payload_bytes: int) -> None:
        self._link, self._last_round = link, last_round
        self._number, self._payload_bytes = number, payload_bytes
        self.took_s: list[float] = []

    def take_part(self) -> None:
        """Offers as soon as the last commit's payloads are there."""
        link, head = self._link, self._link.head
        link.state(NodeState.TRAINING)
        began_s = self._offer(head + 1)
        for commit in link.commits(head):
            for entry in commit.body.offers:
                link.payload(entry)
            self.took_s.append(time.monotonic() - began_s)
            if commit.body.round == self._last_round:
                break
            began_s = self._offer(commit.body.round + 1)

    def _offer(self, round_: int) -> float:
        """When it was made."""
        began_s, offer = time.monotonic(), offer_of(round_, self._number, self._payload_bytes)
        self._link.offer(offer)
        return began_s
