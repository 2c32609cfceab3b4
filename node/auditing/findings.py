"""What a node finds of the offers that one commit counted when it does their work again.

An offer is compared with what its peer's own batches ask for. Of one that was made from data that others
do not have nobody knows the batches: it is compared with what batches of the run's text ask for, drawn from
the digest of the commit, so that all its auditors have the same ones and nobody could prepare for them; and
so are the offers of its auditors, to see how far honest ones get there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from ...compression.base import Payload
from ...compression.errors import BadPayload
from ...coordinator.protocol.messages import Commit, OfferEntry, Verdict
from ...coordinator.protocol.trust.audits import payload_digest
from ...coordinator.protocol.trust.drawing import Draw
from ...coordinator.protocol.trust.judging import MIN_REPORTS
from ...optim.auditing.evidence import Evidence
from ...optim.auditing.twins import nearest_twins
from ...optim.auditing.undoing import undoing
from ..preparing import PreparedRun
from ..replica import data_seed, shared_seed
from .earlier import Earlier

SHARED_BATCHES: Final = 4
"""Of the run's text, in an audit of an offer that was made from other data."""


@dataclass(frozen=True, slots=True)
class Found:
    """`why`: in words, of an offer that has failed."""

    verdict: Verdict
    why: str = ""


PASSED = Found(Verdict.PASSED)


def failed(why: str) -> Found:
    return Found(Verdict.FAILED, why)


class Findings:
    """Of a node that trains on the run's text. `before`: the commit before; `earlier`: the weights that the
    offers were made from; `is_suspect`: what this replica's scores say of a peer."""

    def __init__(
        self,
        run: PreparedRun,
        commit: Commit,
        before: Commit | None,
        earlier: Earlier,
        is_suspect: Callable[[int], bool],
    ) -> None:
        self._run, self._commit, self._earlier, self._is_suspect = run, commit, earlier, is_suspect
        self._before = before
        self._offers = {offer.peer: offer for offer in commit.body.offers if offer.n_samples > 0}

    @property
    def of_many_ranks(self) -> bool:
        """Whether several processes do the work together."""
        return self._run.replica.strategy.ranks.count > 1

    def of(self, draw: Draw) -> Found | None:
        """None: nothing can be said. Raises SwarmUnreachable where a payload cannot be had."""
        offer = self._offers[draw.target]
        try:
            return self._of_other_data(offer, draw) if offer.own_data else self._of_text(offer)
        except BadPayload as e:
            return failed(f"it is not what its work comes to when it is done again: {e}")

    def _of_text(self, offer: OfferEntry) -> Found | None:
        evidence = self._evidence(offer, offer)
        if evidence is None:
            return None
        if not evidence.passed:
            if not self._is_clear():
                return None
            least = f"agreement {evidence.agreement:.3f}, at least {evidence.limit:.3f} expected"
            return failed(f"it is not what its work comes to when it is done again: {least}")
        for twin in self._twins(offer):
            if self._is_rather_of(offer, twin):
                return failed(f"it is the payload of peer {twin.peer}, whose work it is")
        return PASSED

    def _is_rather_of(self, offer: OfferEntry, twin: OfferEntry) -> bool:
        """Whether the offer's payload agrees better with the twin's work, by as many batches of either: who
        claims more is not measured more surely."""
        n_batches = min(self._n_batches(offer), self._n_batches(twin))
        ours, theirs = (self._evidence(offer, whose, n_batches) for whose in (offer, twin))
        return ours is not None and theirs is not None and theirs.agreement > ours.agreement

    def _is_clear(self) -> bool:
        """Whether this node's own offer of that round, which was honest, shows what work comes to."""
        own = self._offers.get(self._run.peer_index)
        evidence = None if own is None else self._evidence(own, own)
        return evidence is not None and evidence.is_clear

    def _n_batches(self, offer: OfferEntry) -> int:
        return -(-offer.n_samples // self._run.work.task.n_samples)

    def _evidence(
        self, offer: OfferEntry, whose: OfferEntry, n_batches: int | None = None
    ) -> Evidence | None:
        """What speaks for the offer's payload as the work of `whose` peer, by its batches, or so many."""
        run_id, round_, peer_id = self._run.replica.run_id, self._earlier.round, self._peer_id(whose)
        (evidence,) = self._run.work.audit(
            {peer_id: self._payload(offer)},
            self._earlier,
            lambda i: data_seed(run_id, round_, peer_id, i),
            self._n_batches(whose) if n_batches is None else n_batches,
            self._sent_before(whose),
        )
        return evidence

    def _sent_before(self, offer: OfferEntry) -> Payload | None:
        """By the same peer, in the round before, if its work depends on that."""
        replica, round_ = self._run.replica, self._earlier.round - 1
        if replica.strategy.staleness == 0 or self._before is None or self._before.body.round != round_:
            return None
        for known in self._before.body.offers:
            if known.peer == offer.peer and known.n_samples > 0:
                with suppress(BadPayload):
                    return replica.decode(self._run.link.payload(known), self._earlier.turn_before())
        return None

    def _twins(self, offer: OfferEntry) -> list[OfferEntry]:
        """Other peers' offers of the very same payload, or nearly that, made from the run's text."""
        digest = payload_digest(offer)
        others = [o for o in self._offers.values() if o.peer != offer.peer and not o.own_data]
        return [o for o in others if payload_digest(o) == digest] or self._near(offer, others)

    def _near(self, offer: OfferEntry, others: Sequence[OfferEntry]) -> list[OfferEntry]:
        readable, payloads = list[OfferEntry](), list[Payload]()
        for other in others:
            with suppress(BadPayload):
                payloads.append(self._payload(other))
                readable.append(other)
        strategy, turn = self._run.replica.strategy, self._earlier.turn_of(self._peer_id(offer))
        found = strategy.cosines(self._payload(offer), payloads, turn)
        return [readable[i] for i in nearest_twins(found or [])]

    # ------------------------------------------------------------------------------------- of other data

    def _of_other_data(self, offer: OfferEntry, draw: Draw) -> Found | None:
        others = [o for o in map(self._offers.get, draw.auditors) if o is not None and not o.own_data]
        if len(others) < MIN_REPORTS:
            return None  # the others cannot report
        payloads = {self._peer_id(offer): self._payload(offer)}
        for other in others:
            with suppress(BadPayload):
                payloads[self._peer_id(other)] = self._payload(other)
        digest = self._commit.digest
        theirs, *found = self._run.work.audit(
            payloads, self._earlier, lambda i: shared_seed(digest, i), SHARED_BATCHES
        )
        usual = [evidence for evidence in found if evidence is not None]
        if theirs is None or not usual:
            return None
        undone = undoing(theirs, usual, self._is_suspect(offer.peer))
        if undone.has_failed is None:
            return None
        figures = f"agreement {undone.theirs:.3f}, where others have {undone.usual:.3f}"
        return failed(f"it undoes what the run's text teaches: {figures}") if undone.has_failed else PASSED

    def _peer_id(self, offer: OfferEntry) -> str:
        return self._run.history.peers[offer.peer]

    def _payload(self, offer: OfferEntry) -> Payload:
        turn = self._earlier.turn_of(self._peer_id(offer))
        return self._run.replica.decode(self._run.link.payload(offer), turn)
