"""Who gives a payload to whom: narrow lines are spared where wider ones have room.

With N nodes, N (N - 1) copies of payloads are sent in a round, whoever sends them, beside the N uploads to
the coordinator. The coordinator sends what it can in a tenth of a round, or in about the time in which all
lines together could send everything. The rest is dealt out so that the nodes' lines are full for equally
long: the narrow ones carry their own upload and no more, the others give away their own payload, and the
widest pass on others' besides. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from math import ceil, floor, inf
from statistics import median
from typing import Final

from .deliveries import Deliveries
from .referring import Referring

UPLOAD_BYTES_PER_S: Final = 100e6 / 8
"""Of a coordinator that was not told its own."""

LITTLE_S, LITTLE = 0.25, 0.1
"""What a coordinator can send in this time, or in this part of a round, it sends."""

NEARLY: Final = 1.25
"""And in this many times what all lines together need."""

CHILDREN: Final = 8
"""Nodes that get a payload from the same relay, where the coordinator has room for as many relays."""

_MEASURED: Final = 8

KNOWN_LINES: Final = 2**14
"""Those of who uploaded last are remembered."""
_UNEVEN: Final = (2**0.5, 3**0.5, (5**0.5 - 1) / 2, 7**0.5)
"""The fractions of their multiples are spread evenly."""


@dataclass(frozen=True, slots=True)
class Dealt:
    """Copies of payloads that each line sends in a round. `own`: the coordinator's; `by_peer`: nodes' that
    send any, beside their upload; `relays`: those among them of others' payloads."""

    own: float
    by_peer: Mapping[str, float]
    relays: Mapping[str, float]


def deal(n_peers: int, n_bytes: int, lines: Mapping[str, float], own: float, little_s: float) -> Dealt:
    """`lines`: bytes per second of the nodes that others can reach; `own`: of the coordinator, which has
    `little_s` at least."""
    n_copies = n_peers * (n_peers - 1)
    best_s = _time_s(n_copies, n_bytes, lines.values(), own)
    n_own = min(n_copies, own * max(little_s, NEARLY * best_s) / n_bytes)
    if n_own == n_copies:
        return Dealt(n_own, {}, {})
    time_s = _time_s(n_copies - n_own, n_bytes, lines.values())
    copies = {peer: rate * time_s / n_bytes - 1 for peer, rate in lines.items()}
    by_peer = {peer: n for peer, n in copies.items() if n > 0}
    return Dealt(n_own, by_peer, {p: n - n_peers + 1 for p, n in by_peer.items() if n > n_peers - 1})


def _time_s(n_copies: float, n_bytes: int, lines: Collection[float], own: float = 0.0) -> float:
    """Until so many are sent, by those lines that have time for more than their upload."""
    time_s = n_copies * n_bytes / own if own else inf
    width, n_used = own, 0
    for rate in sorted(lines, reverse=True):
        if rate * time_s <= n_bytes:
            break
        n_used, width = n_used + 1, width + rate
        time_s = (n_copies + n_used) * n_bytes / width
    return time_s


class Fanout:
    """`upload_bytes_per_s`: what the coordinator's own line sends. Learns how quickly nodes upload."""

    def __init__(self, upload_bytes_per_s: float = UPLOAD_BYTES_PER_S) -> None:
        self._own = upload_bytes_per_s
        self._last: dict[str, deque[float]] = {}
        """Who uploaded last comes last."""
        self._rates: dict[str, float] = {}
        """Bytes per second, the median of the last ones."""
        self._dealt: tuple[tuple[int, int, Mapping[str, float], float], Dealt] | None = None
        self._durations_s: deque[float] = deque(maxlen=_MEASURED)
        self._little_s = LITTLE_S
        self.deliveries = Deliveries()
        self.referring = Referring(self.deliveries, upload_bytes_per_s, self._rates)

    def uploaded(self, peer: str, n_bytes: int, took_s: float) -> None:
        """So many bytes came from it in this time."""
        last = self._last[peer] = self._last.pop(peer, deque(maxlen=_MEASURED))
        last.append(n_bytes / max(took_s, 1e-6))
        self._rates[peer] = median(last)
        if len(self._last) > KNOWN_LINES:
            gone = next(iter(self._last))
            del self._last[gone], self._rates[gone]

    def round_took(self, duration_s: float) -> None:
        """The last one."""
        self.deliveries.next_round()
        self._durations_s.append(duration_s)
        self._little_s = max(LITTLE_S, LITTLE * median(self._durations_s))

    def sources(
        self, n_bytes: int, origin: str, others: Sequence[str], reachable: Collection[str]
    ) -> dict[str, str | None]:
        """From whom each of the others gets the payload, None: from the coordinator; who passes it on comes
        before those who get it there. `reachable`: by others."""
        n_peers = len(others) + 1
        if n_peers * len(others) * n_bytes <= self._own * self._little_s:
            return dict.fromkeys(others)
        giving = [peer for peer in reachable if not self.deliveries.rests(peer)]
        if origin in giving and origin not in self._rates:
            return dict.fromkeys(others, origin)
        dealt = self._deal(n_peers, n_bytes, {p: self._rates[p] for p in giving if p in self._rates})
        return _sources(origin, others, dealt)

    def _deal(self, n_peers: int, n_bytes: int, lines: Mapping[str, float]) -> Dealt:
        """The payloads of a round are mostly of one size."""
        key = (n_peers, n_bytes, lines, self._little_s)
        if self._dealt is None or self._dealt[0] != key:
            self._dealt = key, deal(n_peers, n_bytes, lines, self._own, self._little_s)
        return self._dealt[1]


def _sources(origin: str, others: Sequence[str], dealt: Dealt) -> dict[str, str | None]:
    """The origin gives what it can; of the rest the coordinator some, the relays, which it has told first,
    the others. Parts of copies are rounded up for some origins: evenly among them, as they are sorted, and
    the same ones in every round, whose streams stay."""
    number = sum(peer < origin for peer in others)
    parts = [max(1e-6, number * each % 1.0) for each in _UNEVEN]
    n_origin = min(len(others), floor(dealt.by_peer.get(origin, 0.0) + parts[0]))
    n_own, relays = _relayed(len(others) - n_origin, dealt, parts[1], parts[2])
    told = dict.fromkeys(relays)
    start = floor(parts[3] * len(others))
    leaves = iter([peer for peer in (*others[start:], *others[:start]) if peer not in told])
    by_origin = dict.fromkeys(islice(leaves, n_origin), origin)
    by_coordinator = dict.fromkeys(islice(leaves, max(0, n_own - len(told))))
    return {**told, **by_origin, **by_coordinator, **dict(zip(leaves, cycle(relays), strict=False))}


def _relayed(n: int, dealt: Dealt, part: float, chance: float) -> tuple[int, list[str]]:
    """Of so many copies: how many the coordinator sends, and who passes on the others, in turn."""
    passed_on = sum(dealt.relays.values())
    n_own = min(n, floor(n * dealt.own / (dealt.own + passed_on) + part)) if passed_on else n
    if n_own == n:
        return n, []
    return n_own, _drawn(chance, dealt.relays, max(1, min(ceil((n - n_own) / CHILDREN), n_own)))


def _drawn(chance: float, weights: Mapping[str, float], n: int) -> list[str]:
    """By weight, evenly: who has much of it may be drawn more than once."""
    peers, ends = list(weights), list(accumulate(weights.values()))
    step = ends[-1] / n
    found, i = [], 0
    for k in range(n):
        while i < len(ends) - 1 and ends[i] <= (k + chance) * step:
            i += 1
        found.append(peers[i])
    return found
