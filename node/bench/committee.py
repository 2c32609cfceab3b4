"""`bench round --seats N`: how long a commit takes where N coordinators seal it, by link and payload.

All peers offer as soon as they have the last commit; the time from commit to commit is that of an offer's way
to the coordinator that leads, of the seal, and of the commit's way back. Every coordinator is reached through
a link of its own delay, by peers and by the others. Coordinators and peers are threads of this process, each
with a libp2p daemon of its own, and the links another process. Compare `--seats 3` with `--seats 1` of the
same machine and minute.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

from ...compression.errors import ConfigError
from ...coordinator.protocol.identity import load_or_create, peer_id_of
from ...coordinator.protocol.messages import MAX_SEATS, GenesisBody, NodeState, Offer
from ...coordinator.protocol.p2p import start_p2p
from ...coordinator.protocol.transport import Transport
from ...coordinator.seats.beginning import begin
from ...coordinator.seats.naming import Wish
from ...coordinator.seats.plan import SeatPlan
from ...coordinator.seats.ticket import SeatTicket, keep_ticket
from ...coordinator.server import CoordinatorServer
from ...coordinator.server_thread import ServerThread
from ...coordinator.state import StateDir
from ..links.base import Link
from ..links.hivemind import HivemindLink
from .delayed import Delays
from .genesis import genesis_of
from .round import PAYLOAD_BYTES, figures

ROUND_TRIPS_S: Final = (0.0, 0.05, 0.15)
PAYLOADS: Final = {"inline": PAYLOAD_BYTES, "1 MB": 1_000_000}
N_PEERS: Final = 3
ROUNDS_PER_REPEAT: Final = {"inline": 8, "1 MB": 3}
WARM_UP_ROUNDS: Final = 5
COMMITTEE_S: Final = 60.0
LOOK_EVERY_S: Final = 0.05

StartTransport = Callable[..., Awaitable[Transport]]


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
        seats = _Seats(Path(folder), stack.enter_context(Delays(round_trip_s / 2)), stack)
        # One round names the committee.
        ticket = seats.start(n_seats, n_peers, total + (n_seats > 1)).ticket
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


class _Seats:
    """Coordinators as threads, that end with `stack`."""

    def __init__(self, folder: Path, delays: Delays, stack: ExitStack) -> None:
        self._folder, self._delays, self._stack = folder, delays, stack

    def start(self, n_seats: int, n_peers: int, n_rounds: int) -> CoordinatorServer:
        """Returns the first one, when the committee is named. Raises ConfigError: it is not, in time."""

        def found(state: StateDir) -> GenesisBody:
            key = load_or_create(state.key_path)
            return genesis_of(peer_id_of(key.public_key()), n_peers, n_rounds)

        first = self._serve(0, n_seats, found)
        for i in range(1, n_seats):
            ticket = SeatTicket.read(str(first.call(lambda server: server.seat_ticket)))
            self._serve(i, n_seats, partial(_begin, ticket=ticket))
        deadline_s = time.monotonic() + COMMITTEE_S
        while len(first.call(lambda server: server.ticket).seats) < n_seats:
            if time.monotonic() > deadline_s:
                raise ConfigError(f"no committee of {n_seats} within {COMMITTEE_S:g} s")
            time.sleep(LOOK_EVERY_S)
        return first.server

    def _serve(
        self, i: int, n_seats: int, founding: Callable[[StateDir], GenesisBody | None]
    ) -> ServerThread:
        folder, start = self._folder / str(i), self._behind_a_door

        def make(state: StateDir) -> CoordinatorServer:
            genesis = founding(state)
            seats = None if n_seats == 1 else SeatPlan.of(folder, Wish(n_seats))
            return CoordinatorServer(
                state, genesis=genesis, host="127.0.0.1", start_transport=start, seats=seats
            )

        return self._stack.enter_context(ServerThread(folder, make=make))

    async def _behind_a_door(self, *args: Any, **where: Any) -> Transport:
        """Nobody is told where it listens."""
        transport = await start_p2p(*args, **where)
        door = await asyncio.to_thread(self._delays.door, transport.port)
        transport.addresses = (f"/ip4/127.0.0.1/tcp/{door}",)
        return transport


def _begin(state: StateDir, ticket: SeatTicket) -> None:
    """Record 0 of the run that the ticket names, fetched in a loop of its own."""
    state.save_token(ticket.token)
    keep_ticket(state.path, ticket)
    key = load_or_create(state.key_path)
    work = begin(state.ledger_path, ticket, key, start_p2p, host="127.0.0.1", port=0, announce=())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()


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
        link.offer(self._offer(head + 1))
        for commit in link.commits(head):
            self.seen_s.append(time.monotonic())
            self.commit_bytes.append(len(commit.record) + len(commit.signature))
            if commit.body.round == self._last_round:
                break
            link.offer(self._offer(commit.body.round + 1))

    def _offer(self, round_: int) -> Offer:
        """Of bytes that no other one has."""
        head = round_.to_bytes(4, "big") + self._number.to_bytes(4, "big")
        payload = (head * (self._payload_bytes // len(head) + 1))[: self._payload_bytes]
        return Offer(
            round=round_,
            n_samples=1,
            n_tokens=1,
            loss=1.0,
            n_bytes=len(payload),
            payload=payload,
            digest=None,
        )
