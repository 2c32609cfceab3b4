"""The next record: what goes into it, when it is proposed, and what the run's owner orders meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...compression.errors import ConfigError
from ..control.orders import CheckStrategy, Order, Ordered, Place
from ..control.pending import PendingChanges
from ..entry.gate import Gate
from ..ledger import Ledger
from ..protocol.messages import AccessEntry, Commit, CommitBody, CommitteeEntry, digest_of
from ..protocol.schedule import lr_factor_bits
from ..protocol.settings import Course
from ..quorum.log import Log
from ..quorum.naming import check_committee
from ..rounds import RoundClosed
from .parts import Parts

log = logging.getLogger("thinwire.coordinator")


@dataclass(frozen=True, slots=True)
class _Proposed:
    """A record on its way into the ledger. `closed`: None, if it closes the open round without an offer."""

    body: CommitBody
    closed: RoundClosed | None


class Ordering:
    """Of one service. `parts`: as they are now; `committed`: takes a record that is on the disk, and what it
    has closed. One record is open at a time."""

    def __init__(
        self,
        ledger: Ledger,
        order_log: Log,
        gate: Gate,
        check: CheckStrategy,
        wall_ms: Callable[[], int],
        parts: Callable[[], Parts],
        committed: Callable[[Commit, RoundClosed | None, float], None],
    ) -> None:
        self._ledger, self._log, self._gate, self._wall_ms = ledger, order_log, gate, wall_ms
        self._now, self._committed = parts, committed
        self.pending = PendingChanges(check)
        """Waits for the next record."""
        self._proposed: _Proposed | None = None
        """Waits for its seal."""
        order_log.on_sealed = self._sealed

    @property
    def _parts(self) -> Parts:
        return self._now()

    @property
    def proposed(self) -> int | None:
        """The round whose record waits for its seal."""
        return None if self._proposed is None else self._proposed.body.round

    @property
    def course(self) -> Course:
        """What holds after the newest record."""
        return self._parts.derived.course

    @property
    def access(self) -> AccessEntry | None:
        """Who may come in, as the ledger or the next record has it; None: it is this seat's own matter."""
        proposed = None if self._proposed is None else self._proposed.body.access
        return self.pending.access or proposed or self._parts.derived.access

    # --------------------------------------------------------------------------------------- the owner

    def order(self, order: Order, now_s: float) -> Ordered:
        """See `Service.order`."""
        place, course = self._place()
        ordered = self.pending.add(order, course, place)
        self._go(place, now_s)
        log.info("round %d: %s", ordered.round, "; ".join(ordered.told))
        return ordered

    def name_committee(self, entry: CommitteeEntry, now_s: float) -> Ordered:
        """See `Service.name_committee`."""
        derived = self._parts.derived
        check_committee(entry, self._ledger.committee, derived.recovery)
        place, _ = self._place()
        self.pending.committee = entry
        if derived.access is None:
            self.pending.access = self._gate.access
        self._go(place, now_s)
        names = ", ".join(seat.peer_id for seat in entry.seats)
        told = (f"the coordinators are {names}; {entry.need} of {len(entry.seats)} must sign",)
        return Ordered(place.round, told, (), committee=entry)

    def reseat(self, seat: str, nonce: bytes, now_s: float) -> None:
        """See `Service.reseat`."""
        place, _ = self._place()
        if self._parts.derived.committee is None or seat not in self._ledger.committee.seats:
            raise ConfigError(f"{seat} is no seat of the committee")
        self.pending.reseat[seat] = nonce
        self._go(place, now_s)

    def check_place(self) -> None:
        """Raises ConfigError where nothing can be ordered now."""
        self._place()

    def share_access(self, now_s: float) -> int:
        """The next record tells who may come in; returns its round. Raises ConfigError."""
        place, _ = self._place()
        self.pending.access = self._gate.access
        self._go(place, now_s)
        return place.round

    def _place(self) -> tuple[Place, Course]:
        """Where an order goes that comes now, and what holds then. Raises ConfigError."""
        if self._log.is_over:
            raise ConfigError("this coordinator does not lead any more: say it to the one that does")
        if self._parts.rounds.is_held:
            raise ConfigError("the coordinator is getting lost rounds back from a node: try again soon")
        rounds = self._parts.rounds
        if self._proposed is not None:  # what is proposed cannot change any more
            return self._place_after(self._proposed.body)
        return Place(rounds.round, not rounds.is_awaited, rounds.is_over), self.course

    def _place_after(self, body: CommitBody) -> tuple[Place, Course]:
        """Where an order goes that comes while this record waits for its seal, and what holds then."""
        course, rounds = self.course.after(body.changes), self._parts.rounds
        is_over = course.run.is_over(body.round)
        is_alone = is_over or course.is_paused or not rounds.training
        return Place(body.round + 1, is_alone, is_over), course

    def _go(self, place: Place, now_s: float) -> None:
        """What waits goes into its record, now or when the open round closes."""
        if self._proposed is None and place.is_alone:
            self.commit_changes(now_s)
        elif self._proposed is None:
            self.plan()

    # -------------------------------------------------------------------------------------- the record

    def close(self, closed: RoundClosed, now_s: float) -> None:
        """Orders the round that has closed: until it is sealed no other one does."""
        offers = self._parts.open_round.offers
        work = offers.work(closed.peers)
        proposal = self._proposal(closed.round, closed.peers, closed.evaluator, work)
        offers.clear()
        self._propose(proposal, work, closed, now_s)

    def commit_changes(self, now_s: float) -> None:
        """A record of its own for what is to change; nobody works on the open round."""
        rounds = self._parts.rounds
        proposal = self._proposal(rounds.round, (), None)
        course = self.course.after(proposal.changes)
        rounds.skip(course.n_rounds, course.is_paused, now_s)
        self._parts.open_round.offers.clear()
        self._propose(proposal, b"", None, now_s)

    def plan(self) -> None:
        """What the record that closes the open round makes of the run."""
        course = self.pending.course(self.course)
        self._parts.rounds.plan(course.n_rounds, course.is_paused)

    def _propose(self, body: CommitBody, work: bytes, closed: RoundClosed | None, now_s: float) -> None:
        self._proposed = _Proposed(body, closed)
        self._log.propose(body, work, now_s)

    def _sealed(self, commit: Commit, now_s: float) -> None:
        proposed, self._proposed = self._proposed, None
        if proposed is None:
            raise ValueError("nothing was proposed")
        self._committed(commit, proposed.closed, now_s)

    def _proposal(
        self, round_: int, peers: Sequence[int], evaluator: int | None, work: bytes = b""
    ) -> CommitBody:
        """The next record. Takes out the reports and the changes that it carries. `work`: the signatures of
        the peers' offers."""
        derived = self._parts.derived
        taken = self.pending.take(derived.committee)
        course = self.course.after(taken.changes)
        reports, snapshots = derived.reports.take()
        offers = self._parts.open_round.offers.entries(peers)
        return CommitBody(
            round=round_,
            parent=self._ledger.head_digest,
            offers=offers,
            admitted=self._ledger.pending_admissions(),
            lr_factor_bits=lr_factor_bits(course, round_ + 1, derived.samples.after(offers)),
            reports=reports,
            snapshots=snapshots,
            evaluator=evaluator,
            time_ms=max(self._wall_ms(), derived.last_ms),
            changes=taken.changes,
            audits=derived.audits.take(),
            work=digest_of(work) if work else b"",
            committee=taken.committee,
            reseat=taken.reseat,
            access=taken.access,
        )
