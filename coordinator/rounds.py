"""Which offers count: a pure state machine. Events in, actions out, time is an argument.

Peers are named by their index. `Rounds` opens a round, keeps its offers by peer, and closes it when the
policy says so; it knows neither payloads nor sessions nor the disk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from .entry.attendance import Attendance
from .membership import TimePassed
from .policy import KEPT_ROUNDS, LEAST_PATIENCE_S, MEASURED_ROUNDS, Limit, OfferTimes, PolicyName, limit


@dataclass(frozen=True, slots=True)
class PeerTrains:
    """The peer is awaited from the next round on."""

    peer: int


@dataclass(frozen=True, slots=True)
class PeerStops:
    """The peer is joining again or gone: not awaited any more. An offer of its that is here still counts."""

    peer: int


@dataclass(frozen=True, slots=True)
class OfferMade:
    """`has_bytes`: the payload is here already, else `BytesArrived` tells when."""

    peer: int
    round: int
    digest: bytes
    has_bytes: bool
    n_samples: int = 1
    """0: it is here so that nobody waits for the peer, and is no work."""


@dataclass(frozen=True, slots=True)
class BytesArrived:
    """The payload with this digest is here: offers that name it can count."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class Excused:
    """No offer of the peer's will come in this round: nobody waits for it; one without bytes is dropped."""

    peer: int
    round: int


RoundEvent = PeerTrains | PeerStops | OfferMade | BytesArrived | Excused | TimePassed


@dataclass(frozen=True, slots=True)
class RoundOpened:
    """`expected`: who is awaited, sorted."""

    round: int
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OfferKept:
    """The offer is the peer's for this round; `is_new` is False for one that was sent again."""

    peer: int
    is_new: bool


@dataclass(frozen=True, slots=True)
class OfferRefused:
    """It will not count in any round."""

    peer: int
    reason: Literal["late_offer", "wrong_round", "changed_offer", "too_many_offers", "condemned"]


Why = Literal["complete", "enough", "deadline", "hung"]
"""Everybody awaited was there; as many as are worth it; time was up; those who were missing count as hung."""


@dataclass(frozen=True, slots=True)
class RoundClosed:
    """To be committed. `peers` counted, sorted; `missing` were still awaited."""

    round: int
    peers: tuple[int, ...]
    missing: tuple[int, ...]
    evaluator: int | None
    duration_s: float
    why: Why


Action = RoundOpened | OfferKept | OfferRefused | RoundClosed


@dataclass(slots=True)
class _Kept:
    digest: bytes
    has_bytes: bool
    n_samples: int


@dataclass(slots=True)
class _Past:
    """What is remembered of a closed round, to tell a resent offer from a late one."""

    opened_s: float
    expected: frozenset[int]
    counted: frozenset[int]
    late: dict[int, _Kept]
    begins_late: int | None = None
    by_digest: dict[bytes, list[int]] = field(default_factory=dict)
    """Peers of those late offers whose bytes are not here."""

    def __post_init__(self) -> None:
        for peer, kept in self.late.items():
            self.comes(peer, kept)

    def comes(self, peer: int, kept: _Kept) -> None:
        """The late offer is this one."""
        self.late[peer] = kept
        if not kept.has_bytes:
            self.by_digest.setdefault(kept.digest, []).append(peer)


@dataclass(frozen=True, slots=True)
class _Closing:
    """`evaluator`: as the record names it; `since_s`: when the round closed."""

    evaluator: int | None
    since_s: float
    is_skipped: bool = False


class Rounds:
    """A round that has closed waits for `sealed`: nobody's offer counts until then.

    `head`: the newest committed round. `training` and `evaluator` are what a restart recalls. `eval_every`
    0: nobody evaluates. `every_s`: of the policy `async`.

    `times`, `attendance`: of rounds before, as another coordinator saw them. `n_rounds` and `is_paused` are
    the ledger's; `has_begun`: whether a round has been trained, None: any.
    """

    def __init__(
        self,
        *,
        n_rounds: int,
        min_peers: int,
        eval_every: int,
        policy: PolicyName,
        every_s: float | None = None,
        max_offers: int,
        head: int,
        is_paused: bool = False,
        has_begun: bool | None = None,
        training: Iterable[int] = (),
        evaluator: int | None = None,
        evaluates: int | None = None,
        times: OfferTimes | None = None,
        attendance: Attendance | None = None,
        now_s: float,
    ) -> None:
        self._min_peers, self._eval_every = min_peers, eval_every
        self.n_rounds, self.is_paused = n_rounds, is_paused
        self._next: tuple[int, bool] | None = None
        """What the record that closes the open round makes of the two."""
        self._has_begun = head > 0 if has_begun is None else has_begun
        self._policy: PolicyName = policy
        self._every_s = every_s
        self._max_offers = max_offers
        self.head = head
        self.training = set(training)
        self.expected: set[int] = set()
        self.opened_s: float | None = None
        self.times = times or OfferTimes()
        self.is_held = False
        """While it is set no round closes, whatever comes in."""
        self._closing: _Closing | None = None
        """The open round's record is being ordered: nothing counts for it any more."""
        self._condemned: frozenset[int] = frozenset()
        self._opening: frozenset[int] = frozenset()
        self._offers: dict[int, _Kept] = {}
        self._by_digest: dict[bytes, set[int]] = {}
        """Their peers."""
        self._eligible: set[int] = set()
        """Of them, those with bytes."""
        self._n_worked = 0
        """Of these, those that are work."""
        self._known_limit: tuple[tuple[int, int], Limit] | None = None
        """By the round, and what was measured of others."""
        self._now_s = now_s
        self._excused: set[int] = set()
        """Of the round that is open or opens next."""
        self._hung: set[int] = set()
        self.attendance = attendance or Attendance()
        self._pasts: dict[int, _Past] = {}
        self._goal: Limit | None = None
        """What `fastest` has chosen for the open round."""
        self._last_evaluator = evaluator
        self._evaluates: int | None = None
        """Of the open round's peers: evaluates as soon as its offer is under way."""
        self._begins_late: int | None = None
        """Has evaluated in the round before."""
        if self._may_open:
            self._open(evaluates, now_s)

    @property
    def round(self) -> int:
        """The round that offers are taken for."""
        return self.head + 1

    @property
    def is_over(self) -> bool:
        """The last round is committed."""
        return self.head >= self.n_rounds

    @property
    def is_closing(self) -> bool:
        """The open round has closed, and its record is not sealed yet: see `sealed`."""
        return self._closing is not None

    @property
    def closing_s(self) -> float | None:
        """When the open round closed; None: it has not."""
        return None if self._closing is None else self._closing.since_s

    @property
    def is_awaited(self) -> bool:
        """Whether a round is open that somebody works on: its record comes, sooner or later."""
        return self.opened_s is not None and bool(self.expected or self.training & self._offers.keys())

    @property
    def _may_open(self) -> bool:
        return self._has_begun and self._goes_on

    @property
    def _goes_on(self) -> bool:
        return not self.is_over and not self.is_paused

    def plan(self, n_rounds: int, is_paused: bool) -> None:
        """The record that closes the open round changes these."""
        self._next = (n_rounds, is_paused)

    def condemn(self, peers: Collection[int]) -> None:
        """Offers of these peers are not taken, and nobody waits for them, until this is said again; of the
        open round and of those to come. If nobody else is awaited, it closes with the next event."""
        self._condemned = frozenset(peers)
        self.expected -= self._condemned
        self._opening -= self._condemned
        for peer in self._condemned & self._offers.keys():
            self._drop_offer(peer)

    def skip(self, n_rounds: int, is_paused: bool, now_s: float) -> None:
        """The open round closes without an offer, by a record that changes these. Offers that are here came
        too late. Once that is sealed the next round opens, with the next event."""
        opened_s = self.opened_s or 0.0
        self._pasts[self.round] = _Past(opened_s, frozenset(), frozenset(), self._offers)
        self._pasts.pop(self.round - KEPT_ROUNDS, None)
        self._excused, self.expected = set(), set()
        self._forget_offers()
        self._next, self._closing = (n_rounds, is_paused), _Closing(None, now_s, is_skipped=True)

    def sealed(self, now_s: float) -> list[Action]:
        """The record of the round that has closed is a part of the ledger: the next round may open."""
        closing, self._closing = self._closing, None
        if closing is None:
            raise ValueError(f"round {self.round} has not closed")
        self.head += 1
        self.opened_s, self.expected = None, set()
        if self._next is not None:
            (self.n_rounds, self.is_paused), self._next = self._next, None
        return [] if closing.is_skipped or not self._may_open else [self._open(closing.evaluator, now_s)]

    def missing(self) -> list[int]:
        """Who is awaited right now."""
        return sorted(self.expected - self._eligible)

    def handle(self, event: RoundEvent, now_s: float) -> list[Action]:
        """What follows from the event, in order, and from the time until now. `now_s`: monotonic."""
        actions: list[Action] = []
        self._now_s = now_s
        match event:
            case PeerTrains(peer):
                self.training.add(peer)
                self._hung.discard(peer)
            case PeerStops(peer):
                self.training.discard(peer)
                self.expected.discard(peer)
            case OfferMade():
                actions.append(self._offered(event, now_s))
            case BytesArrived(digest):
                self._arrived(digest, now_s)
            case Excused(peer, round_):
                if round_ == self.round and not self.is_closing:
                    self._excuse(peer)
            case TimePassed():
                pass
        is_ready = self._has_begun or len(self.training) >= self._min_peers
        if self.opened_s is None and is_ready and self._goes_on and not self.is_closing:
            actions.append(self._open(None, now_s))
        actions += self._close_if_due(now_s)
        return actions

    def wake_s(self) -> float | None:
        """When the open round's limit is reached; None: only an event can change anything."""
        if self.is_held or self.is_closing or self.opened_s is None or not self._n_worked:
            return None
        return self.opened_s + self._limit(self._now_s - self.opened_s).after_s

    def _limit(self, open_s: float) -> Limit:
        """`open_s`: for how long the round has been open. A limit that is not reached by then may be less
        than the exact one, which is worked out when it is."""
        found = self._goal or self._policy_limit(open_s)
        if self._begins_late is None or self._begins_late in self._eligible or self._is_async:
            return found
        return replace(found, after_s=found.after_s + self.times.allowance_s(self.round))

    def _policy_limit(self, open_s: float) -> Limit:
        """A deadline follows from the rounds before; patience from every offer of this one, too: it is worked
        out once its least is over."""
        key = self.round, self.times.n_changes(beside=self.round)
        if self._known_limit is not None and self._known_limit[0] == key:
            return self._known_limit[1]
        is_measured = self._policy != "all" and self.times.n_rounds(before=self.round) >= MEASURED_ROUNDS
        if open_s < LEAST_PATIENCE_S and not is_measured and not self._is_async:
            return Limit(LEAST_PATIENCE_S, drops=True)
        found = limit(self._policy, self.times, self.round, every_s=self._every_s)
        if not found.drops:
            self._known_limit = key, found
        return found

    @property
    def _is_async(self) -> bool:
        return self._policy == "async"

    def _drop_offer(self, peer: int) -> None:
        kept = self._offers.pop(peer)
        self._by_digest[kept.digest].discard(peer)
        if peer in self._eligible:
            self._eligible.discard(peer)
            self._n_worked -= kept.n_samples > 0

    def _forget_offers(self) -> None:
        self._offers, self._by_digest, self._eligible, self._n_worked = {}, {}, set(), 0

    def _open(self, evaluates: int | None, now_s: float) -> RoundOpened:
        """`evaluates`: the peer that the last record names for it."""
        self.opened_s = now_s
        self._evaluates, self._begins_late = evaluates, self._evaluates
        resting = None if self.times.is_worth_waiting(self.round) else self._begins_late
        out = self._hung | self._condemned | self._excused | self.attendance.absent
        self.expected = self.training - out - {resting}
        self._opening = frozenset(self.expected)
        if self._policy == "fastest":
            goal = limit(self._policy, self.times, self.round, self._opening)
            self._goal = goal if goal.enough is not None else None
        return RoundOpened(self.round, tuple(sorted(self.expected)))

    def _offered(self, offer: OfferMade, now_s: float) -> Action:
        self._hung.discard(offer.peer)
        if (past := self._pasts.get(offer.round)) is not None:
            self.attendance.offered(offer.peer)
            return self._offered_late(offer, past, now_s)
        if offer.round != self.round or not self._goes_on:
            # Of those that closed long ago, or before a restart or under another leader, nothing is kept.
            return OfferRefused(offer.peer, "late_offer" if offer.round < self.round else "wrong_round")
        if offer.peer in self._condemned:
            return OfferRefused(offer.peer, "condemned")
        kept = self._offers.get(offer.peer)
        if kept is not None and kept.digest != offer.digest:
            if kept.has_bytes:
                return OfferRefused(offer.peer, "changed_offer")
            # The node died before its bytes came, and has worked anew: they would be waited for in vain.
            self._drop_offer(offer.peer)
            kept = None
        if kept is None and len(self._offers) >= self._max_offers:
            return OfferRefused(offer.peer, "too_many_offers")
        self.attendance.offered(offer.peer)
        if kept is None:
            self._offers[offer.peer] = _Kept(offer.digest, False, offer.n_samples)
            self._by_digest.setdefault(offer.digest, set()).add(offer.peer)
        if offer.has_bytes:
            self._has_bytes(offer.peer, now_s)
        return OfferKept(offer.peer, is_new=kept is None)

    def _offered_late(self, offer: OfferMade, past: _Past, now_s: float) -> Action:
        if offer.peer in past.counted:
            return OfferKept(offer.peer, is_new=False)
        if offer.peer not in past.late:
            past.comes(offer.peer, _Kept(offer.digest, False, offer.n_samples))
            if offer.has_bytes:
                self._has_bytes_late(offer.peer, offer.round, now_s)
            elif offer.n_samples and offer.peer in past.expected and offer.peer != past.begins_late:
                self.times.only_offered(offer.round, offer.peer, now_s - past.opened_s, offer.n_samples)
        return OfferRefused(offer.peer, "late_offer")

    def _arrived(self, digest: bytes, now_s: float) -> None:
        for peer in sorted(self._by_digest.get(digest, ())):
            self._has_bytes(peer, now_s)
        for round_, past in self._pasts.items():
            for peer in past.by_digest.pop(digest, ()):
                self._has_bytes_late(peer, round_, now_s)

    def _excuse(self, peer: int) -> None:
        self._excused.add(peer)
        self.expected.discard(peer)
        kept = self._offers.get(peer)
        if kept is not None and not kept.has_bytes:
            self._drop_offer(peer)

    def _has_bytes(self, peer: int, now_s: float) -> None:
        kept = self._offers[peer]
        if self.opened_s is not None and not kept.has_bytes:
            self._measure(self.round, peer, kept, now_s - self.opened_s, self._opening, self._begins_late)
        if not kept.has_bytes:
            kept.has_bytes = True
            self._eligible.add(peer)
            self._n_worked += kept.n_samples > 0

    def _has_bytes_late(self, peer: int, round_: int, now_s: float) -> None:
        past = self._pasts[round_]
        kept = past.late[peer]
        if not kept.has_bytes:
            self._measure(round_, peer, kept, now_s - past.opened_s, past.expected, past.begins_late)
        kept.has_bytes = True

    def _measure(
        self,
        round_: int,
        peer: int,
        kept: _Kept,
        time_s: float,
        expected: frozenset[int],
        begins_late: int | None,
    ) -> None:
        """Only those who were awaited say how long a round takes: not joiners, nor who was evaluating or
        has done nothing."""
        if kept.n_samples == 0:
            return
        if peer == begins_late:
            self.times.has_evaluated(round_, time_s)
        elif peer in expected:
            self.times.record(round_, peer, time_s, kept.n_samples)

    def _close_if_due(self, now_s: float) -> list[Action]:
        if self.is_held or self.is_closing or self.opened_s is None or not self._eligible:
            return []
        why: Why = "complete"
        if len(self._eligible) < len(self.expected) or not self.expected <= self._eligible:
            if not self._n_worked:
                return []
            due = self._limit(now_s - self.opened_s)
            is_enough = due.enough is not None and self._n_worked >= due.enough
            if not is_enough and now_s < self.opened_s + due.after_s:
                return []
            if due.drops:
                self._hung.update(self.missing())
            why = "enough" if is_enough else "hung" if due.drops else "deadline"
        return self._close(sorted(self._eligible), self.missing(), why, self.opened_s, now_s)

    def _close(
        self, eligible: list[int], missing: list[int], why: Why, opened_s: float, now_s: float
    ) -> list[Action]:
        late = {peer: kept for peer, kept in self._offers.items() if not kept.has_bytes}
        self._pasts[self.round] = _Past(opened_s, self._opening, frozenset(eligible), late, self._begins_late)
        self._pasts.pop(self.round - KEPT_ROUNDS, None)
        if why != "enough" and not self._is_async:
            self.attendance.missed(set(missing) - late.keys() - {self._begins_late})
        for peer in missing:
            if peer != self._begins_late:
                self.times.is_missing(self.round, peer, now_s - opened_s)
        self._excused, self._has_begun, self.expected = set(), True, set()
        self._forget_offers()
        evaluator = self._next_evaluator()
        self._closing = _Closing(evaluator, now_s)
        return [RoundClosed(self.round, tuple(eligible), tuple(missing), evaluator, now_s - opened_s, why)]

    def _next_evaluator(self) -> int | None:
        """Rotates among the training peers, for rounds that are to be evaluated."""
        n_rounds = self.n_rounds if self._next is None else self._next[0]
        if not self._eval_every or (self.round % self._eval_every and self.round < n_rounds):
            return None
        able = sorted(self.training - self._hung - self._condemned - self.attendance.absent)
        if not able:
            return None
        last = -1 if self._last_evaluator is None else self._last_evaluator
        self._last_evaluator = next((peer for peer in able if peer > last), able[0])
        return self._last_evaluator
