"""When a round closes although somebody is still awaited: the policies `all`, `deadline`, `fastest`, `async`.

`fastest` are dynamic backup workers (arXiv 2102.06280): a round ends with its k-th offer, and k is chosen
when it opens, to be worth most per second. T(k), when the k-th offer comes, is the mean of that order
statistic over the last rounds, late offers included. What k offers are worth follows from their samples
alone, because the coordinator opens no payload: a batch of S samples gains S / (S + B) of what a step can
gain at most, B being the noise scale of the gradient (arXiv 1812.06162). A run is set up for the peers that
it has, so B is taken to be what all of them bring together: the last one to come is waited for if it makes
the round longer by less than half of what it adds to the batch, both as fractions.

`async` closes a round so many seconds after it has opened, with the offers that are there, and earlier only
where everybody's is: rounds go at a pace of their own, as FAVANO's (arXiv 2305.16099). Whoever needs longer
offers its work in a later round, and nobody takes it for hung or absent.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Final, Literal

PolicyName = Literal["deadline", "all", "fastest", "async"]

KEPT_ROUNDS = 16
MEASURED_ROUNDS = 3
"""No deadline until this many rounds are measured."""

EVALUATIONS = 3
"""The last ones say how much later a peer offers that has evaluated the round before."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Seconds after a round's opening at which what is there is enough.

    `drops`: who is missing then is taken for hung, and not awaited again until it makes an offer.
    `enough`: so many offers are enough at any time; None: everybody is awaited.
    """

    after_s: float
    drops: bool
    enough: int | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """One peer's offer of a round: seconds from the round's opening until it was eligible, and its samples.

    It takes longer than this if it was "offered" far too late, so that its payload was not sent, or if it was
    "missing" when the round closed.
    """

    time_s: float
    n_samples: int
    what: Literal["come", "offered", "missing"]


class OfferTimes:
    """When offers were eligible, late ones included, by round and peer; of the last rounds."""

    def __init__(self) -> None:
        self._by_round: dict[int, dict[int, Measured]] = {}
        self._late_s: deque[float] = deque(maxlen=EVALUATIONS)
        self._n_noted: dict[int, int] = {}
        self._n_changes = 0
        self._known_usual: tuple[tuple[int, int], float] | None = None
        self.in_order: list[float] = []
        """All times, the shortest first."""

    @property
    def late_s(self) -> tuple[float, ...]:
        """How much later those offered that had to evaluate, the last ones."""
        return tuple(self._late_s)

    def measured(self) -> Iterator[tuple[int, int, Measured]]:
        """All of it: round, peer and what was measured, in the order of rounds."""
        for round_, by_peer in sorted(self._by_round.items()):
            for peer, measured in by_peer.items():
                yield round_, peer, measured

    def restore(self, measured: Iterable[tuple[int, int, Measured]], late_s: Iterable[float]) -> None:
        """What `measured` and `late_s` gave, perhaps of another coordinator's rounds."""
        for round_, peer, one in measured:
            self._note(round_, peer, one)
        self._late_s.extend(late_s)

    def record(self, round_: int, peer: int, time_s: float, n_samples: int = 1) -> None:
        """The offer was eligible `time_s` seconds after its round had opened."""
        self._note(round_, peer, Measured(time_s, n_samples, "come"))

    def only_offered(self, round_: int, peer: int, time_s: float, n_samples: int = 1) -> None:
        """The payload is not here, and may never be."""
        self._note(round_, peer, Measured(time_s, n_samples, "offered"))

    def is_missing(self, round_: int, peer: int, time_s: float) -> None:
        """The round closed after this time without the peer, which was awaited."""
        self._note(round_, peer, Measured(time_s, 0, "missing"))

    def _note(self, round_: int, peer: int, measured: Measured) -> None:
        self._n_changes += 1
        self._n_noted[round_] = self._n_noted.get(round_, 0) + 1
        by_peer = self._by_round.setdefault(round_, {})
        if peer in by_peer:
            self._forget(by_peer[peer])
        by_peer[peer] = measured
        if measured.what != "missing":
            insort(self.in_order, measured.time_s)
        while len(self._by_round) > KEPT_ROUNDS:
            old = min(self._by_round)
            for one in self._by_round.pop(old).values():
                self._forget(one)
            del self._n_noted[old]
            self._n_changes += 1

    def _forget(self, measured: Measured) -> None:
        if measured.what != "missing":
            del self.in_order[bisect_left(self.in_order, measured.time_s)]

    def n_changes(self, beside: int) -> int:
        """Grows with every change of what is known of other rounds than this one."""
        return self._n_changes - self._n_noted.get(beside, 0)

    def has_evaluated(self, round_: int, time_s: float) -> None:
        """When the offer came of a peer that had to evaluate before it began, on time or not."""
        self._late_s.append(max(0.0, time_s - self._usual_s(round_)))

    def is_worth_waiting(self, round_: int) -> bool:
        """Whether one that begins late is awaited, or the round would become more than twice as long."""
        return not self._late_s or median(self._late_s) <= self._usual_s(round_)

    def allowance_s(self, round_: int) -> float:
        """What one that begins late gets in addition; a whole round until it is measured."""
        usual_s = self._usual_s(round_)
        return min(usual_s, 1.5 * median(self._late_s)) if self._late_s else usual_s

    def _usual_s(self, round_: int) -> float:
        """Asked for at every event of a round: worked out when another round has changed."""
        key = round_, self.n_changes(beside=round_)
        if self._known_usual is None or self._known_usual[0] != key:
            times = self.values(before=round_)
            self._known_usual = key, median(times) if times else 0.0
        return self._known_usual[1]

    def rounds(self, before: int) -> list[dict[int, Measured]]:
        """Rounds before this one with offers, by peer."""
        rounds = [by_peer for r, by_peer in sorted(self._by_round.items()) if r < before]
        return [by_peer for by_peer in rounds if any(m.what != "missing" for m in by_peer.values())]

    def values(self, before: int) -> list[float]:
        """All times of rounds before this one."""
        known = (m for by_peer in self.rounds(before) for m in by_peer.values())
        return [m.time_s for m in known if m.what != "missing"]

    def n_rounds(self, before: int) -> int:
        """Rounds before this one with offers, of those that are kept."""
        return len(self.rounds(before))


def limit(
    policy: PolicyName,
    times: OfferTimes,
    round_: int,
    expected: Collection[int] = (),
    every_s: float | None = None,
) -> Limit:
    """The limit of the open round. `expected`: who was awaited when it opened; only `fastest` asks.
    `every_s`: of `async`, which has no use for what was measured.

    `deadline` and `fastest` follow the rounds before this one; until enough are measured they are as patient
    as `all`, which gives up a peer whose trainer hangs while its heartbeat lives.
    """
    if policy == "async":
        assert every_s is not None, "checked by the run's config"
        return Limit(every_s, drops=False)
    if policy != "all" and times.n_rounds(before=round_) >= MEASURED_ROUNDS:
        if policy == "deadline":
            return Limit(deadline_s(times.values(before=round_)), drops=False)
        found = fastest(times.rounds(before=round_), expected)
        if found is not None:
            return found
    return Limit(patience_s(times.in_order), drops=True)


def deadline_s(times: Sequence[float]) -> float:
    """median + max(4 MAD, 0.5 median, 0.5 s)."""
    middle = median(times)
    mad = median(abs(t - middle) for t in times)
    return middle + max(4 * mad, 0.5 * middle, 0.5)


LEAST_PATIENCE_S: Final = 60.0


def patience_s(in_order: Sequence[float]) -> float:
    """max(10 medians, 60 s); the offers of the open round count too, so that slow models are not cut off.
    Asked for at every event of a long round: the times are sorted."""
    if not in_order:
        return LEAST_PATIENCE_S
    n = len(in_order)
    return max(10 * (in_order[(n - 1) // 2] + in_order[n // 2]) / 2, LEAST_PATIENCE_S)


# ------------------------------------------------------------------------------------------ backup workers


def fastest(rounds: Sequence[dict[int, Measured]], expected: Collection[int]) -> Limit | None:
    """The k whose offers are worth most per second, and when to give up waiting for the k-th.

    Nobody waits for a peer of which no offer has ever come. None: no expected peer is measured.
    """
    known = _typical(rounds, expected)
    if not known:
        return None
    by_round = [sorted(row, key=lambda m: m.time_s) for row in _filled(rounds, known)]
    all_samples = fmean(sum(m.n_samples for m in by_time) for by_time in by_round)
    best, best_rate = 1, -math.inf
    for k in range(1, len(known) + 1):
        gained = fmean(gain(sum(m.n_samples for m in by_time[:k]), all_samples) for by_time in by_round)
        rate = gained / max(fmean(by_time[k - 1].time_s for by_time in by_round), 1e-9)
        if rate >= best_rate:
            best, best_rate = k, rate
    return Limit(deadline_s([by_time[best - 1].time_s for by_time in by_round]), drops=False, enough=best)


def gain(n_samples: float, noise_scale: float) -> float:
    """The share of the largest possible gain of a step that a batch of so many samples brings."""
    return n_samples / (n_samples + noise_scale)


def _typical(rounds: Sequence[dict[int, Measured]], expected: Collection[int]) -> dict[int, Measured]:
    """The median time and the newest samples of those expected peers whose offers have come."""
    typical = {}
    for peer in sorted(expected):
        come = [by_peer[peer] for by_peer in rounds if peer in by_peer and by_peer[peer].what == "come"]
        if come:
            typical[peer] = Measured(median(m.time_s for m in come), come[-1].n_samples, "come")
    return typical


def _filled(rounds: Sequence[dict[int, Measured]], typical: dict[int, Measured]) -> list[list[Measured]]:
    """Every round with every known peer. One that is missing is taken to come when it usually does, but not
    before the round was over."""
    filled = []
    for by_peer in rounds:
        row = []
        for peer, usual in typical.items():
            found = by_peer.get(peer)
            if found is None:
                row.append(usual)
            elif found.what == "come":
                row.append(found)
            else:
                row.append(replace(usual, time_s=max(found.time_s, usual.time_s)))
        filled.append(row)
    return filled
