"""`bench round --seats N`: how long a commit takes where N coordinators seal it, by link and payload.

All peers offer as soon as they have the last commit; the time from commit to commit is that of an offer's way
to the coordinator that leads, of the seal, and of the commit's way back. Every coordinator is reached through
a link of its own delay, by peers and by the others. Peers are threads of this process, coordinators and links
processes of their own, and each of both has a libp2p daemon. Compare `--seats 3` with `--seats 1` of the same
machine and minute.
"""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

from ....compression.errors import ConfigError
from ....coordinator.protocol.messages import MAX_SEATS, NodeState
from ....coordinator.protocol.ticket import Ticket
from ...links.base import Link
from ...links.hivemind import HivemindLink
from ..round import PAYLOAD_BYTES, figures, offer_of
from .delayed import Delays
from .seat import SeatProcess

ROUND_TRIPS_S: Final = (0.0, 0.05, 0.15)
PAYLOADS: Final = {"inline": PAYLOAD_BYTES, "1 MB": 1_000_000}
N_PEERS: Final = 3
ROUNDS_PER_REPEAT: Final = {"inline": 8, "1 MB": 3}
WARM_UP_ROUNDS: Final = 5
COMMITTEE_S: Final = 60.0
LOOK_EVERY_S: Final = 0.05


def bench_seats(n_seats: int, n_repeats: int) -> dict[str, Any]:
    """A row for each payload and link. Raises ConfigError."""
    if not 1 <= n_seats <= MAX_SEATS:
        raise ConfigError(f"--seats {n_seats}: between 1 and {MAX_SEATS}")
    rows = {}
    for payload, n_bytes in PAYLOADS.items():
        for round_trip_s in ROUND_TRIPS_S:
            n_rounds = ROUNDS_PER_REPEAT[payload] * n_repeats
            name = f"{payload}, {round_trip_s * 1000:.0f} ms"
            rows[name] = measure_seats(n_seats, round_trip_s, n_bytes, N_PEERS, n_rounds)
    return {"seats": n_seats, "peers": N_PEERS, "rows": rows}


def measure_seats(
    n_seats: int, round_trip_s: float, payload_bytes: int, n_peers: int, n_rounds: int
) -> dict[str, Any]:
    """`n_rounds`, at least 2: that are measured. `ledger_bytes_per_commit`: as a node receives them."""
    total = WARM_UP_ROUNDS + n_rounds
    with tempfile.TemporaryDirectory(prefix="thinwire-bench-") as folder, ExitStack() as stack:
        delays = stack.enter_context(Delays(round_trip_s / 2))
        # One round names the committee.
        ticket = served_behind(delays, Path(folder), stack, n_peers, total + (n_seats > 1), n_seats)
        links = [HivemindLink(ticket, host="127.0.0.1") for _ in range(n_peers)]
        for link in links:
            stack.callback(link.close)
            link.open()
        peers = [_Peer(link, total + (n_seats > 1), i, payload_bytes) for i, link in enumerate(links)]
        threads = [threading.Thread(target=peer.take_part) for peer in peers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sent = sum(sum(link.traffic().sent.values()) for link in links)
    first = peers[0]
    seen = figures(first.seen_s, n_peers, n_rounds, sent)
    return {
        "round_trip_s": round_trip_s,
        "payload_bytes": payload_bytes,
        "rounds": n_rounds,
        "commit_p50_s": seen["round_p50_s"],
        "commit_p99_s": seen["round_p99_s"],
        "sent_bytes_per_peer_and_round": sent / (n_peers * total),
        "ledger_bytes_per_commit": round(sum(first.commit_bytes[-n_rounds:]) / n_rounds, 1),
    }


def served_behind(
    delays: Delays, folder: Path, stack: ExitStack, n_peers: int, n_rounds: int, n_seats: int = 1
) -> Ticket:
    """Of nodes, for so many coordinators that end with `stack`. Raises ConfigError."""
    return _Seats(folder, delays, stack).start(n_seats, n_peers, n_rounds)


class _Seats:
    """Coordinators, that end with `stack`."""

    def __init__(self, folder: Path, delays: Delays, stack: ExitStack) -> None:
        self._folder, self._delays, self._stack = folder, delays, stack

    def start(self, n_seats: int, n_peers: int, n_rounds: int) -> Ticket:
        """Of nodes, when the committee is named. Raises ConfigError: it is not, in time."""
        serve = partial(self._serve, n_seats=n_seats, n_peers=n_peers, n_rounds=n_rounds)
        first = serve(0, seat_ticket=None)
        for i in range(1, n_seats):
            serve(i, seat_ticket=first.seat_ticket)
        deadline_s = time.monotonic() + COMMITTEE_S
        while len((ticket := first.ticket()).seats) < n_seats:
            if time.monotonic() > deadline_s:
                raise ConfigError(f"no committee of {n_seats} within {COMMITTEE_S:g} s")
            time.sleep(LOOK_EVERY_S)
        return ticket

    def _serve(self, i: int, **told: Any) -> SeatProcess:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        seat = SeatProcess(self._folder / str(i), port=port, door=self._delays.door(port), **told)
        return self._stack.enter_context(seat)


class _Peer:
    """`seen_s`: when it had each commit; `commit_bytes`: record and seal of each."""

    def __init__(self, link: Link, last_round: int, number: int, payload_bytes: int) -> None:
        self._link, self._last_round = link, last_round
        self._number, self._payload_bytes = number, payload_bytes
        self.seen_s: list[float] = []
        self.commit_bytes: list[int] = []

    def take_part(self) -> None:
        """Offers as soon as the last commit is there."""
        link, head = self._link, self._link.head
        link.state(NodeState.TRAINING)
        link.offer(offer_of(head + 1, self._number, self._payload_bytes))
        for commit in link.commits(head):
            self.seen_s.append(time.monotonic())
            self.commit_bytes.append(len(commit.record) + len(commit.signature))
            if commit.body.round == self._last_round:
                break
            link.offer(offer_of(commit.body.round + 1, self._number, self._payload_bytes))
