"""What a seat checks of a record before it votes: that it follows the rules, as far as they follow from the
ledger, and that its payloads are here. A record that breaks one is never sealed with this seat's vote.

What only a leader has seen, a vote says nothing about: who was there, when offers came, who came in by which
invitation, what was reported in sessions.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from ...compression.errors import ConfigError, LedgerCorrupt
from ..blobs import BlobStore
from ..derived_state import DerivedState
from ..ledger import Ledger
from ..protocol.identity import public_key_of
from ..protocol.messages import (
    INLINE_BYTES,
    AccessEntry,
    BadMessage,
    CommitBody,
    OfferEntry,
    decode_record,
    digest_of,
)
from ..protocol.schedule import lr_factor_bits
from ..protocol.settings import Course
from ..protocol.trust.audits import check_audit
from ..protocol.trust.signatures import SIGNATURE_BYTES
from ..protocol.trust.signed_offers import check_work
from .disk import Place
from .naming import check_committee, check_reseat
from .recollection import Recollection

log = logging.getLogger("thinwire.coordinator")

Reason = Literal[
    "access", "admissions", "audits", "behind", "changes", "clock", "committee", "condemned", "evaluator",
    "limits", "lr_factor", "offers", "parent", "payload", "record", "reports", "reseat", "time", "work",
]  # fmt: skip
"""Why there is no vote. "payload" is usual: it is on its way."""

MAX_AHEAD_MS: Final = 10 * 60 * 1000
"""A record's time may be so far ahead of this machine's clock: clocks are wrong by minutes. The run's time
never runs back, so that one record from a leader that lies would move it for good."""

SLOW_OFFERS: Final = 16
"""The signatures of more offers than these, 0.1 ms each, are worth a thread: see `RecordChecks.verify`."""

_KEPT: Final = 8


class _NoVote(Exception):
    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True)
class _Place:
    """`course`: after the record."""

    body: CommitBody
    course: Course


class RecordChecks:
    """The `Records` of one seat (see `quorum.disk`): `recollection` is fed with each new commit of `ledger`
    before anything is proposed to follow it.

    `wall_ms`: this machine's clock; `needs_payloads`: False: the leader alone keeps payloads, and a vote says
    nothing about them.
    """

    def __init__(
        self,
        ledger: Ledger,
        blobs: BlobStore,
        recollection: Recollection,
        wall_ms: Callable[[], int],
        *,
        needs_payloads: bool = True,
    ) -> None:
        self._ledger, self._blobs, self._recollection = ledger, blobs, recollection
        self._wall_ms, self._needs_payloads = wall_ms, needs_payloads
        self.refused: Counter[Reason] = Counter()
        """Votes that were not given, by their reason; each record counts once for each."""
        self._told: dict[tuple[bytes, Reason], int] = {}
        """How often, by record."""
        self._work: dict[bytes, str] = {}
        """What is wrong with the signatures of a record, by the digest of both; "": nothing."""

    @staticmethod
    def place(record: bytes) -> Place:
        """See `Records.place`."""
        body = decode_record(CommitBody, record)
        return Place(body.round, body.parent, body.committee is not None)

    def may_vote(self, record: bytes, work: bytes) -> bool:
        """See `Records.may_vote`."""
        try:
            self._check(record, work)
        except _NoVote as e:
            self._note(digest_of(record), e)
            return False
        return True

    # ----------------------------------------------------------------------------------- the signatures

    @staticmethod
    def is_slow(work: bytes) -> bool:
        """Whether to `verify` in a thread, before a seat in an event loop hears of the record."""
        return len(work) > SLOW_OFFERS * SIGNATURE_BYTES

    def verify(self, record: bytes, work: bytes) -> None:
        """Checks the signatures of a record's offers, so that the seat need not. From any thread, and without
        effect on anything but the time that a vote takes."""
        try:
            body = decode_record(CommitBody, record)
        except BadMessage:
            return
        self._keep(_digest(record, work), self._fault_of_work(body, work))

    def trust(self, record: bytes, work: bytes) -> None:
        """Of the leader's own record: each signature was checked when its offer came."""
        self._keep(_digest(record, work), "")

    def _keep(self, digest: bytes, fault: str) -> None:
        self._work[digest] = fault
        while len(self._work) > _KEPT:
            self._work.pop(next(iter(self._work)), None)

    def _fault_of_work(self, body: CommitBody, work: bytes) -> str:
        if (digest_of(work) if work else b"") != body.work:
            return "the signatures are not those that it names"
        peers = {**self._derived.peers, **{a.index: a.peer_id for a in body.admitted}}
        try:
            missing = check_work(self._ledger.run_id, body, work or None, peers)
        except KeyError as e:
            return f"nobody is peer {e}"
        except LedgerCorrupt as e:
            return str(e)
        return f"peer {missing[0]} has not signed its offer" if missing else ""

    # ----------------------------------------------------------------------------------------- the rules

    @property
    def _derived(self) -> DerivedState:
        return self._recollection.derived

    def _check(self, record: bytes, work: bytes) -> None:
        try:
            body = decode_record(CommitBody, record)
        except BadMessage as e:
            raise _NoVote("record", str(e)) from e
        head = self._ledger.head_round
        if self._recollection.head != head:
            raise _NoVote("behind", f"round {head} is not looked at yet")
        if (body.round, body.parent) != (head + 1, self._ledger.head_digest):
            raise _NoVote("parent", f"it does not follow round {head}")
        place = _Place(body, self._course(body))
        for check in self._rules():
            check(place)
        fault = self._work.get(_digest(record, work))
        if fault is None:
            fault = self._fault_of_work(body, work)
            self._keep(_digest(record, work), fault)
        _refuse("work", fault, fault)
        self._check_payloads(body)

    def _rules(self) -> Iterator[Callable[[_Place], None]]:
        yield self._check_schedule
        yield self._check_admissions
        yield self._check_offers
        yield self._check_evaluator
        yield self._check_reports
        yield self._check_audits
        yield self._check_committee

    def _course(self, body: CommitBody) -> Course:
        try:
            return self._derived.course.after(body.changes)
        except ConfigError as e:
            raise _NoVote("changes", str(e)) from e

    def _check_schedule(self, place: _Place) -> None:
        body, course = place.body, place.course
        is_over_before = bool(body.changes) and course.n_rounds < body.round
        _refuse("changes", is_over_before, f"the run would be over after {course.n_rounds}")
        bits = lr_factor_bits(course, body.round + 1, self._derived.samples.after(body.offers))
        _refuse("lr_factor", body.lr_factor_bits != bits, f"its learning-rate factor is not {bits:#x}")
        last_ms = self._derived.last_ms
        _refuse(
            "time", body.time_ms < last_ms, f"its time is {last_ms - body.time_ms} ms before the last one"
        )
        ahead_ms = body.time_ms - self._wall_ms()
        is_ahead = ahead_ms > MAX_AHEAD_MS and body.time_ms > last_ms  # as it is, time stands still
        text = f"its time is {ahead_ms / 1000:.0f} s ahead of this machine's clock: one of the two is wrong"
        _refuse("clock", is_ahead, text)

    def _check_admissions(self, place: _Place) -> None:
        known, first = set(self._derived.peers.values()), len(self._derived.peers)
        for n, admission in enumerate(place.body.admitted):
            _refuse("admissions", admission.index != first + n, f"peer {first + n} would be the next")
            _refuse("admissions", admission.peer_id in known, f"{admission.peer_id} is a peer already")
            known.add(admission.peer_id)

    def _is_peer(self, index: int, body: CommitBody) -> bool:
        return index < len(self._derived.peers) + len(body.admitted)

    def _check_offers(self, place: _Place) -> None:
        body, now, limits = place.body, self._derived.course, self._ledger.genesis.limits
        peers = [offer.peer for offer in body.offers]
        _refuse("offers", peers != sorted(set(peers)), "its offers are not in the order of their peers")
        is_closed = now.is_paused or now.run.is_over(body.round - 1)
        _refuse("offers", peers and is_closed, "nobody trains in this round")
        _refuse("limits", len(peers) > limits.max_peers, f"{len(peers)} offers")
        condemned = self._derived.standing.condemned_in(body.round).intersection(peers)
        _refuse("condemned", condemned, f"peers {sorted(condemned)} are condemned")
        for offer in body.offers:
            _refuse("offers", not self._is_peer(offer.peer, body), f"nobody is peer {offer.peer}")
            self._check_offer(offer)

    def _check_offer(self, offer: OfferEntry) -> None:
        limits, what = self._ledger.genesis.limits, f"the offer of peer {offer.peer}"
        is_large = offer.n_bytes > limits.max_payload_bytes or offer.n_samples > limits.max_samples
        _refuse("limits", is_large, f"{what} has {offer.n_bytes} bytes and {offer.n_samples} samples")
        says = offer.n_bytes or offer.n_tokens or offer.loss is not None
        _refuse("limits", offer.n_samples == 0 and says, f"{what} has no samples, and something to say")
        n_bytes = offer.n_bytes if offer.payload is None else len(offer.payload)
        is_odd = offer.payload is not None and n_bytes > INLINE_BYTES
        _refuse("limits", is_odd or n_bytes != offer.n_bytes, f"{what} says another size than it has")

    def _check_evaluator(self, place: _Place) -> None:
        body, run = place.body, place.course.run
        if body.evaluator is None:
            return
        is_due = run.eval_every and (body.round % run.eval_every == 0 or run.is_over(body.round))
        _refuse("evaluator", not is_due, "nobody evaluates after this round")
        is_bad = body.evaluator in self._derived.standing.condemned_in(body.round)
        is_bad |= not self._is_peer(body.evaluator, body)
        _refuse("evaluator", is_bad, f"peer {body.evaluator} is condemned, or nobody")

    def _check_reports(self, place: _Place) -> None:
        body, run = place.body, self._derived.course.run
        said = [(entry.peer, entry.round) for entry in body.reports]
        said += [(entry.peer, entry.round) for entry in body.snapshots]
        for peer, round_ in said:
            is_bad = not self._is_peer(peer, body) or round_ >= body.round
            _refuse("reports", is_bad, f"peer {peer} reports on round {round_}")
        for snapshot in body.snapshots:
            is_odd = snapshot.round == 0 or snapshot.round % run.snapshot_every
            _refuse("reports", is_odd, f"a snapshot of round {snapshot.round}")

    def _check_audits(self, place: _Place) -> None:
        standing, peers = self._derived.standing, self._derived.peers
        for entry in place.body.audits:
            is_awaited = standing.awaits(entry.round, entry.target, entry.auditor)
            claim = standing.claim(entry) if is_awaited else None
            is_bad = claim is None or not check_audit(peers.get(entry.auditor, ""), entry.signature, claim)
            text = f"the audit of peer {entry.target} in round {entry.round} was not drawn, or not signed"
            _refuse("audits", is_bad, text)

    def _check_committee(self, place: _Place) -> None:
        body, present = place.body, self._ledger.committee
        if body.committee is not None:
            try:
                check_committee(body.committee, present, self._derived.recovery)
            except ConfigError as e:
                raise _NoVote("committee", str(e)) from e
        try:
            check_reseat(body.reseat, body.committee, present)
        except ConfigError as e:
            raise _NoVote("reseat", str(e)) from e
        if body.access is not None:
            try:
                check_access(body.access)
            except ConfigError as e:
                raise _NoVote("access", str(e)) from e

    def _check_payloads(self, body: CommitBody) -> None:
        """Last of all: what is not here yet may come."""
        if not self._needs_payloads:
            return
        for offer in body.offers:
            if offer.digest is not None:
                is_here = self._blobs.size(offer.digest) == offer.n_bytes
                _refuse("payload", not is_here, f"the payload of peer {offer.peer} is not here")

    def _note(self, record: bytes, no: _NoVote) -> None:
        n = self._told[record, no.reason] = self._told.get((record, no.reason), 0) + 1
        while len(self._told) > _KEPT:
            del self._told[next(iter(self._told))]
        self.refused[no.reason] += n == 1
        # A payload is usually on its way: it is late when the leader asks for the vote once more.
        level, is_told = (logging.INFO, n == 2) if no.reason == "payload" else (logging.WARNING, n == 1)
        if is_told:
            round_ = self._ledger.head_round + 1
            log.log(level, "no vote for a record of round %d (%s): %s", round_, no.reason, no)


def check_access(entry: AccessEntry) -> None:
    """Raises ConfigError for peers that are none, or not in order."""
    for peers in (entry.banned, entry.listed):
        if list(peers) != sorted(set(peers)):
            raise ConfigError("the peers of an access record are in order, each one once")
        for peer_id in peers:
            public_key_of(peer_id)


def _refuse(reason: Reason, is_wrong: object, text: str) -> None:
    if is_wrong:
        raise _NoVote(reason, text)


def _digest(record: bytes, work: bytes) -> bytes:
    return digest_of(record) + digest_of(work)
