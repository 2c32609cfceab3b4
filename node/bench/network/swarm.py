"""Rounds of many volunteers in modelled time: the real `Rounds` with the policy `all`, and the real `Fanout`;
lines are modelled, see `copies`.

A peer that is late does what a node does. It works for a round only if its replica is at the newest commit of
which it has heard (`LedgerFollower._follow` asks `is_at_head` before it proposes): who still fetches payloads
when the next commit comes goes on with that one's, and offers nothing for its round. Who works already makes
its offer, which is late (`OfferSender.make` sends the payload, too, as long as there is no second commit).
Whom `Rounds` gave up it does not wait for until an offer comes; and the payloads of every commit are fetched,
however many there are, before the replica is at the head.
"""

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
from ....coordinator.protocol.streams import CHUNK_BYTES
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
from .copies import COORDINATOR, NOBODY, OWN, Array, Copies, Free, Holders, Lines, give
from .lines import ROUND_SIGMA, Kind, Machine, draw, rest_of_session_s, session_s

Topology = Literal["coordinator", "maker", "dealt"]
"""All copies from the coordinator; from whom has made the payload, if it can be reached; as `Fanout` says."""

SILENCE_S: Final = 10.0
"""So long after it has gone a peer counts as gone."""

ENTRY_BYTES, OFFERED_BYTES = 19, 100
"""Of a commit for each offer, beside payload or digest; of the message that names a holder."""

WARM_UP_ROUNDS: Final = 8
"""Of which deadlines and lines are learnt: a round that takes ten times as long as those before is closed by
its first offer, so that the next one is short again."""

FOLLOWED: Final = 128
"""Payloads whose copies are followed; of more, each stands for several."""


@dataclass(slots=True)
class Peer:
    """`name`: nobody else has or had it; `since_s`: when it comes; `ready_s`: when it has applied the last
    round; `until_s`: when it leaves."""

    name: str
    machine: Machine
    since_s: float
    until_s: float
    ready_s: float


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
        self.peers = [self._drawn(0.0, rest_of_session_s(self._random)) for _ in range(n_peers)]
        self._free = Free(np.zeros(n_peers + 1), np.zeros(n_peers))
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
        self._events: list[tuple[float, int, int, RoundEvent]] = []
        """What the coordinator will hear: when, in which order, of which peer."""
        self._order = count()

    @property
    def n_keys(self) -> int:
        """Of all peers that there have been."""
        return int(max(peer.name for peer in self.peers)) + 1

    def _drawn(self, since_s: float, stays_s: float) -> Peer:
        machine = draw(self._kinds, self._compute_s, self._random)
        return Peer(f"{next(self._names):07}", machine, since_s, since_s + stays_s, since_s)

    def _hears(self, at_s: float, index: int, event: RoundEvent) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), index, event))

    def run(self, n_rounds: int, warm_up: int) -> None:
        """The first ones do not count."""
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
        """Every peer does a round's work, see `_spare`. Returns when its payload is there; `_events` gets
        what is heard."""
        round_ = self._rounds.round
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
                self._hears(made_s, index, offer)
                if not is_inline and came_s < peer.until_s:
                    self._hears(came_s, index, BytesArrived(digest))
            if came_s < peer.until_s:
                arrived[index] = came_s
            else:
                self._hears(peer.until_s + SILENCE_S, index, PeerStops(index))
        return arrived

    def _until_closed(self) -> RoundClosed:
        """What comes later is heard in the next round."""
        events = self._events
        began_s = time.process_time()
        closed: RoundClosed | None = None
        while closed is None:
            wake_s = self._rounds.wake_s()
            if events and (wake_s is None or events[0][0] <= wake_s):
                at_s, _, _, event = heapq.heappop(events)
                closed = _closed(self._rounds.handle(event, at_s))
            else:
                assert wake_s is not None
                closed = _closed(self._rounds.handle(TimePassed(), wake_s))
        self.tally.cpu_s += time.process_time() - began_s
        return closed

    def _spare(self, arrived: dict[int, float], heard_N: Array) -> None:
        """Who has not begun when it hears that the round is over does none of its work. `heard_N`: when."""
        late = {i: peer.ready_s for i, peer in enumerate(self.peers) if peer.ready_s >= heard_N[i]}
        for index in late:
            arrived.pop(index, None)

        def happens(at_s: float, index: int, event: RoundEvent) -> bool:
            is_work = isinstance(event, OfferMade | BytesArrived)
            return not is_work or index not in late or at_s <= late[index]

        self._events = [heard for heard in self._events if happens(heard[0], *heard[2:])]
        heapq.heapify(self._events)

    def _learn(self, index: int) -> None:
        """How wide a line is, as an upload has come; see `stream_server._Upload`."""
        if self._n_bytes <= CHUNK_BYTES:
            return
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
            free=self._free,
        )
        n_beside = 0.0
        ready = now_s + lines.rtt_N / 2 + n_peers * commit_bytes / self._own + commit_bytes / lines.down_N
        self._spare(arrived, ready)
        sent = np.full(n_peers, entry + (0 if is_inline else self._n_bytes), dtype=np.float64)
        own_bytes = float(n_peers * commit_bytes + told)
        if not is_inline:
            copies = self._copies(counted, arrived, now_s, lines)
            self._free = copies.free
            ready = np.maximum(ready, copies.done_N)
            sent += copies.sent_H[:-1] * self._n_bytes
            n_beside = copies.n_beside
            own_bytes += copies.sent_H[-1] * self._n_bytes
            self.tally.copies.append(float(copies.sent_H.sum()) + copies.n_beside)
            self.tally.again.append(copies.n_again)
        for index, (peer, at_s) in enumerate(zip(self.peers, ready, strict=True)):
            peer.ready_s = max(float(at_s), peer.ready_s, arrived.get(index, 0.0))
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
        released = [arrived[origin] for origin in origins]
        holders = self._holders(origins, released, stands_for)
        return give(holders, origins, np.array(released), now_s, self._n_bytes, stands_for, lines)

    def _holders(self, origins: Sequence[int], released: Sequence[float], stands_for: float) -> Holders:
        """From whom each peer gets each payload, as is known when it is there; see `copies`."""
        n_peers = len(self.peers)
        reachable = [peer for peer in self.peers if peer.machine.is_reachable]
        indices = {peer.name: i for i, peer in enumerate(self.peers)}
        names = list(indices)
        holders = np.full((len(origins), n_peers), n_peers + NOBODY)
        for row, origin, at_s in zip(holders, origins, released, strict=True):
            self._learn(origin)
            there = [peer.name for peer in reachable if peer.since_s <= at_s < peer.until_s + SILENCE_S]
            if self._topology == "dealt":
                began_s = time.process_time()
                others = [*names[:origin], *names[origin + 1 :]]
                sources = self._fanout.sources(self._n_bytes, names[origin], others, there)
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
        """Who has left is followed by somebody else once that is known, who trains when it has what the other
        one was fetching."""
        for index, peer in enumerate(self.peers):
            if peer.until_s <= peer.ready_s:
                known_s = max(now_s, peer.until_s + SILENCE_S)
                newcomer = self._drawn(known_s, session_s(self._random))
                newcomer.ready_s = max(known_s, peer.ready_s)
                self._hears(known_s, index, PeerStops(index))
                self._hears(newcomer.ready_s, index, PeerTrains(index))
                self.peers[index] = newcomer
                self._free.up_H[index] = self._free.down_N[index] = 0.0


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
    `Fanout` alone; `keys`: of all peers that there were, one after the other."""
    swarm = Swarm(n_peers, n_bytes, topology, own, kinds, compute_s, seed)
    swarm.run(n_rounds, warm_up=WARM_UP_ROUNDS)
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
        "keys": swarm.n_keys,
        "copies_again": sum(tally.again) / max(1.0, sum(tally.copies)),
    }


def _closed(actions: Iterable[Action]) -> RoundClosed | None:
    return next((action for action in actions if isinstance(action, RoundClosed)), None)
