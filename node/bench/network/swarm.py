"""Rounds of many volunteers in modelled time: the real `Rounds` with the policy `all`, and the real `Fanout`;
lines are modelled, see `copies`."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from statistics import fmean
from typing import Any, Final, Literal

import numpy as np

from ....coordinator.membership import TimePassed
from ....coordinator.protocol.messages import INLINE_BYTES
from ....coordinator.rounds import (
    Action,
    BytesArrived,
    OfferMade,
    PeerStops,
    PeerTrains,
    RoundClosed,
    RoundEvent,
    Rounds,
)
from ....coordinator.serving.fanout import Fanout
from .copies import COORDINATOR, NOBODY, OWN, Copies, Holders, Lines, give
from .lines import ROUND_SIGMA, Kind, Machine, draw, session_s

Topology = Literal["coordinator", "maker", "dealt"]
"""All copies from the coordinator; from whom has made the payload, if it can be reached; as `Fanout` says."""

SILENCE_S: Final = 10.0
"""So long after it has gone a peer counts as gone."""

ENTRY_BYTES, OFFERED_BYTES = 19, 100
"""Of a commit for each offer, beside payload or digest; of the message that names a holder."""

FOLLOWED: Final = 128
"""Payloads whose copies are followed; of more, each stands for several."""


@dataclass(slots=True)
class Peer:
    """`name`: nobody else has or had it; `ready_s`: when it has applied the last round; `until_s`: when it
    leaves."""

    name: str
    machine: Machine
    ready_s: float
    until_s: float


@dataclass(slots=True)
class Tally:
    """Of all rounds that count. `counted`: of the peers that there are; `again`: of the `copies` of payloads
    that were sent, those by the coordinator because nobody else did."""

    times_s: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    received: list[float] = field(default_factory=list)
    most_sent: list[float] = field(default_factory=list)
    by_coordinator: list[float] = field(default_factory=list)
    counted: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    cpu_s: float = 0.0


class Swarm:
    """`own`: bytes per second of the coordinator's line; `n_bytes`: of a payload."""

    def __init__(
        self,
        n_peers: int,
        n_bytes: int,
        topology: Topology,
        own: float,
        kinds: tuple[Kind, ...],
        compute_s: float,
        seed: int,
    ) -> None:
        self._n_bytes, self._topology, self._own = n_bytes, topology, own
        self._kinds, self._compute_s, self._random = kinds, compute_s, random.Random(seed)
        self._fanout, self._names = Fanout(own), count()
        self.peers = [self._newcomer(0.0) for _ in range(n_peers)]
        self._rounds = Rounds(
            n_rounds=2**31,
            min_peers=1,
            eval_every=0,
            policy="all",
            max_offers=n_peers,
            head=1,
            training=range(n_peers),
            now_s=0.0,
        )
        self.tally = Tally()
        self._events: list[tuple[float, int, RoundEvent]] = []
        """What the coordinator will hear, by the time at which it does."""

    def _newcomer(self, now_s: float) -> Peer:
        machine = draw(self._kinds, self._compute_s, self._random)
        return Peer(f"{next(self._names):07}", machine, now_s, now_s + session_s(self._random))

    def run(self, n_rounds: int, warm_up: int) -> None:
        """The first ones, of which deadlines and lines are learnt, do not count."""
        for number in range(warm_up + n_rounds):
            if number == warm_up:
                self.tally = Tally()
            self._round()

    def _round(self) -> None:
        opened_s = self._rounds.opened_s
        assert opened_s is not None
        arrived = self._work()
        closed = self._until_closed()
        now_s = opened_s + closed.duration_s
        self.tally.times_s.append(closed.duration_s)
        self.tally.counted.append(len(closed.peers) / len(self.peers))
        self._fanout.round_took(closed.duration_s)
        began_s = time.process_time()
        self._rounds.sealed(now_s)
        self.tally.cpu_s += time.process_time() - began_s
        self._give(closed.peers, arrived, now_s)
        self._replace(now_s)

    def _work(self) -> dict[int, float]:
        """Every peer does a round's work. Returns when its payload is there; `_events` gets what is heard."""
        events, round_ = self._events, self._rounds.round
        arrived: dict[int, float] = {}
        for index, peer in enumerate(self.peers):
            machine = peer.machine
            took_s = machine.compute_s * self._random.lognormvariate(0.0, ROUND_SIGMA)
            made_s = peer.ready_s + took_s + machine.rtt_s / 2
            came_s = made_s + (self._n_bytes / machine.up if self._n_bytes > INLINE_BYTES else 0.0)
            digest = round_.to_bytes(4, "big") + index.to_bytes(4, "big")
            if made_s < peer.until_s:
                is_inline = self._n_bytes <= INLINE_BYTES
                offer = OfferMade(index, round_, digest, is_inline)
                heapq.heappush(events, (made_s, 2 * index, offer))
                if not is_inline and came_s < peer.until_s:
                    heapq.heappush(events, (came_s, 2 * index + 1, BytesArrived(digest)))
            if came_s < peer.until_s:
                arrived[index] = came_s
            if came_s >= peer.until_s:
                heapq.heappush(events, (peer.until_s + SILENCE_S, 2 * index, PeerStops(index)))
        return arrived

    def _until_closed(self) -> RoundClosed:
        """What comes later is heard in the next round."""
        events = self._events
        began_s = time.process_time()
        closed: RoundClosed | None = None
        while closed is None:
            wake_s = self._rounds.wake_s()
            if events and (wake_s is None or events[0][0] <= wake_s):
                at_s, _, event = heapq.heappop(events)
                closed = _closed(self._rounds.handle(event, at_s))
            else:
                assert wake_s is not None
                closed = _closed(self._rounds.handle(TimePassed(), wake_s))
        self.tally.cpu_s += time.process_time() - began_s
        return closed

    def _learn(self, index: int) -> None:
        """How wide a line is, as an upload has come."""
        took_s = self._n_bytes / self.peers[index].machine.up * self._random.uniform(0.8, 1.2)
        self._fanout.uploaded(self.peers[index].name, self._n_bytes, took_s)

    def _give(self, counted: Sequence[int], arrived: dict[int, float], now_s: float) -> None:
        """The commit and the payloads that it names reach every peer."""
        n_peers, machines = len(self.peers), [peer.machine for peer in self.peers]
        is_inline = self._n_bytes <= INLINE_BYTES
        entry = ENTRY_BYTES + (self._n_bytes if is_inline else 34)
        commit_bytes = len(counted) * entry + 300
        told = 0 if is_inline else OFFERED_BYTES * len(counted) * n_peers
        lines = Lines(
            up_N=np.array([machine.up for machine in machines]),
            down_N=np.array([machine.down for machine in machines]),
            rtt_N=np.array([machine.rtt_s for machine in machines]),
            until_N=np.array([peer.until_s for peer in self.peers]),
            own=self._own,
        )
        n_beside = 0.0
        ready = now_s + lines.rtt_N / 2 + n_peers * commit_bytes / self._own + commit_bytes / lines.down_N
        sent = np.full(n_peers, entry + (0 if is_inline else self._n_bytes), dtype=np.float64)
        own_bytes = float(n_peers * commit_bytes + told)
        if not is_inline:
            copies = self._copies(counted, arrived, now_s, lines)
            ready = np.maximum(ready, copies.done_N)
            sent += copies.sent_H[:-1] * self._n_bytes
            n_beside = copies.n_beside
            own_bytes += copies.sent_H[-1] * self._n_bytes
            self.tally.copies.append(float(copies.sent_H.sum()) + copies.n_beside)
            self.tally.again.append(copies.n_again)
        for index, (peer, at_s) in enumerate(zip(self.peers, ready, strict=True)):
            peer.ready_s = max(float(at_s), arrived.get(index, 0.0))
        self.tally.sent.append(float(sent.mean()) + n_beside * self._n_bytes / n_peers)
        self.tally.received.append(commit_bytes + (0 if is_inline else (len(counted) - 1) * self._n_bytes))
        self.tally.most_sent.append(float(sent.max()))
        self.tally.by_coordinator.append(own_bytes)

    def _copies(
        self, counted: Sequence[int], arrived: dict[int, float], now_s: float, lines: Lines
    ) -> Copies:
        """Of the payloads that counted; of many some are followed, and stand for the others."""
        origins = sorted(counted[:: max(1, len(counted) // FOLLOWED)], key=arrived.__getitem__)
        stands_for = len(counted) / len(origins)
        for index in arrived.keys() - set(origins):
            self._learn(index)
        holders = self._holders(origins, stands_for)
        released = np.array([arrived[origin] for origin in origins])
        return give(holders, origins, released, now_s, self._n_bytes, stands_for, lines)

    def _holders(self, origins: Sequence[int], stands_for: float) -> Holders:
        """From whom each peer gets each payload; see `copies`."""
        n_peers = len(self.peers)
        reachable = [peer.name for peer in self.peers if peer.machine.is_reachable]
        indices = {peer.name: i for i, peer in enumerate(self.peers)}
        names = list(indices)
        holders = np.full((len(origins), n_peers), n_peers + NOBODY)
        for row, origin in zip(holders, origins, strict=True):
            self._learn(origin)
            if self._topology == "dealt":
                began_s = time.process_time()
                others = [*names[:origin], *names[origin + 1 :]]
                sources = self._fanout.sources(self._n_bytes, names[origin], others, reachable)
                self.tally.cpu_s += (time.process_time() - began_s) * stands_for
                for peer, source in sources.items():
                    row[indices[peer]] = n_peers + COORDINATOR if source is None else indices[source]
            else:
                is_maker = self._topology == "maker" and self.peers[origin].machine.is_reachable
                row[:] = origin if is_maker else n_peers + COORDINATOR
            row[origin] = n_peers + OWN
            parents = np.unique(row[row < n_peers])
            has_none = parents[(parents != origin) & (row[parents] != n_peers + COORDINATOR)]
            row[np.isin(row, has_none)] = n_peers + NOBODY
        return holders

    def _replace(self, now_s: float) -> None:
        """Who has left is followed by somebody else, who trains from the next round on."""
        for index, peer in enumerate(self.peers):
            if peer.until_s <= peer.ready_s:
                self.peers[index] = self._newcomer(max(now_s, peer.ready_s))
                self._rounds.handle(PeerTrains(index), now_s)


def simulate(
    n_peers: int,
    n_bytes: int,
    topology: Topology,
    own: float,
    kinds: tuple[Kind, ...],
    *,
    compute_s: float = 10.0,
    n_rounds: int = 10,
    seed: int = 1,
) -> dict[str, Any]:
    """`all_counted_s`: for as many offers that count as there are peers; `peer_bytes`: that a peer sends in a
    round, the mean, the most, and what it receives; `coordinator_cpu_s`: of this machine, for `Rounds` and
    `Fanout` alone."""
    swarm = Swarm(n_peers, n_bytes, topology, own, kinds, compute_s, seed)
    swarm.run(n_rounds, warm_up=3)
    tally = swarm.tally
    return {
        "round_s": float(np.median(tally.times_s)),
        "round_p99_s": float(np.quantile(tally.times_s, 0.99)),
        "all_counted_s": sum(tally.times_s) / sum(tally.counted),
        "peer_bytes": fmean(tally.sent),
        "most_of_a_peer_bytes": fmean(tally.most_sent),
        "received_bytes": fmean(tally.received),
        "coordinator_bytes": fmean(tally.by_coordinator),
        "coordinator_cpu_s": tally.cpu_s / n_rounds,
        "offers_counted": fmean(tally.counted),
        "copies_again": sum(tally.again) / max(1.0, sum(tally.copies)),
    }


def _closed(actions: Iterable[Action]) -> RoundClosed | None:
    return next((action for action in actions if isinstance(action, RoundClosed)), None)
