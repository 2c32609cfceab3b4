"""The audits that this node was drawn for: it does another peer's work of one round again, in its own time,
and says what it has found. What counts of that is the ledger's matter (see `trust.standing`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

from ...compression.base import Payload
from ...compression.errors import BadPayload, SwarmUnreachable
from ...coordinator.protocol.messages import Commit, OfferEntry, Verdict
from ...coordinator.protocol.trust.audits import payload_digest, signed_bytes
from ...coordinator.protocol.trust.drawing import MIN_AUDITORS, Draw
from ...optim.auditing.evidence import Evidence
from ..preparing import PreparedRun
from ..tracking.observer import Observer
from .earlier import Earlier
from .scores import Scores

log = logging.getLogger("thinwire.node")


class Auditor:
    """Of one run on this node; used by the node's thread.

    Nobody's work can be done again by a node that has data of its own, or whose model is sharded over ranks:
    such a node says nothing, and neither does one that is too late.
    """

    def __init__(self, run: PreparedRun, observer: Observer) -> None:
        self._run, self._observer = run, observer
        self._commit: Commit | None = None
        self._due: tuple[Draw, ...] = ()
        self._earlier: Earlier | None = None
        self._can_audit = run.replica.strategy.ranks.count == 1 and not run.has_own_data
        self._scores, self._scored = Scores(), 0
        self._has_scores = run.replica.strategy.ranks.count == 1 and _has_audits(run)

    def coming(self, commits: Sequence[Commit]) -> None:
        """The replica applies these next. If the offers of a single one are to be audited here, the weights
        that they were made from are kept. Audits that are not done by now never will be."""
        self._skip(len(self._due))
        drawn = self._run.history.standing.drawn(commits[-1].body.round)
        own = [d for d in drawn if self._run.peer_index in d.auditors]
        due = [d for d in own if not d.for_suspects or self._scores.is_suspect(d.target)]
        self._due, self._earlier = (), None
        if not due:
            return
        if len(commits) > 1 or not self._can_audit:
            self._skip(len(due))
        else:
            self._due, self._earlier = tuple(due), Earlier(self._run.replica)

    def applied(self, commit: Commit) -> None:
        """The replica is after this commit now, whose offers are audited next."""
        self._commit = commit

    def forget(self) -> None:
        """The replica was moved to another round: what is due was to be done at weights that may be wrong."""
        self._skip(len(self._due))
        self._due, self._earlier = (), None

    def audit(self) -> None:
        """All that is due. It takes about the time of a round's local work for each."""
        self._score()
        due, self._due = self._due, ()
        for draw in due:
            self._audit(draw.target)
        self._earlier = None

    def _skip(self, n: int) -> None:
        for _ in range(n):
            self._observer.audited("skipped")

    def _score(self) -> None:
        """The payloads of the newest commit."""
        if not self._has_scores or self._commit is None or self._commit.body.round == self._scored:
            return
        replica, self._scored = self._run.replica, self._commit.body.round
        turn = replica.turn_of(self._scored, replica.peer_id)
        found = dict[int, Payload]()
        for offer in replica.heard(self._commit):
            if offer.n_samples > 0:
                with suppress(BadPayload, SwarmUnreachable):
                    found[offer.peer] = replica.decode(self._run.link.payload(offer), turn)
        if len(found) > MIN_AUDITORS:
            scores = replica.strategy.scores(list(found.values()), turn)
            self._has_scores = scores is not None
            self._scores.add(dict(zip(found, scores or (), strict=False)))

    def _audit(self, target: int) -> None:
        assert self._commit is not None
        run, round_ = self._run, self._commit.body.round
        offer = next(o for o in self._commit.body.offers if o.peer == target)
        verdict = self._verdict(offer, round_)
        self._observer.audited("skipped" if verdict is None else verdict.value)
        if verdict is not None:
            target_id = run.history.peers[target]
            claim = signed_bytes(run.link.run_id, round_, target_id, payload_digest(offer), verdict)
            run.link.audit(round_, target, verdict, claim)

    def _verdict(self, offer: OfferEntry, round_: int) -> Verdict | None:
        """None: nothing can be said."""
        if offer.own_data:
            return None
        try:
            return self._found(offer, round_)
        except BadPayload as e:
            return self._tell(offer, round_, str(e))
        except SwarmUnreachable as e:
            log.info("round %d: no audit of peer %d, its payload cannot be had: %s", round_, offer.peer, e)
        except Exception:
            log.exception("round %d: the work of peer %d cannot be done again", round_, offer.peer)
        return None

    def _found(self, offer: OfferEntry, round_: int) -> Verdict | None:
        data = self._run.link.payload(offer)
        evidence = self._evidence(data, offer, round_)
        if evidence is None:
            return None
        if not evidence.passed:
            if not self._is_clear(round_):
                return None
            words = f"agreement {evidence.agreement:.3f}, at least {evidence.limit:.3f} expected"
            return self._tell(offer, round_, words)
        for twin in self._twins(offer):
            theirs = self._evidence(data, twin, round_)
            if theirs is not None and theirs.agreement > evidence.agreement:
                return self._tell(offer, round_, f"it is the payload of peer {twin.peer}, whose work it is")
        return Verdict.PASSED

    def _is_clear(self, round_: int) -> bool:
        """Whether this node's own offer of that round, which was honest, shows what work comes to."""
        assert self._commit is not None
        own = next((o for o in self._commit.body.offers if o.peer == self._run.peer_index), None)
        if own is None or own.n_samples == 0:
            return False
        evidence = self._evidence(self._run.link.payload(own), own, round_)
        return evidence is not None and evidence.is_clear

    def _evidence(self, data: bytes, offer: OfferEntry, round_: int) -> Evidence | None:
        """What speaks for these bytes as the work of the offer's peer."""
        assert self._earlier is not None
        peer_id = self._run.history.peers[offer.peer]
        return self._run.work.audit(data, self._earlier, peer_id, offer.n_samples)

    def _twins(self, offer: OfferEntry) -> list[OfferEntry]:
        """Other peers' offers of the very same payload."""
        assert self._commit is not None
        digest = payload_digest(offer)
        others = [o for o in self._commit.body.offers if o.peer != offer.peer and o.n_samples > 0]
        return [o for o in others if payload_digest(o) == digest]

    def _tell(self, offer: OfferEntry, round_: int, why: str) -> Verdict:
        peer_id = self._run.history.peers[offer.peer]
        log.warning(
            "round %d: the offer of %s is not what its work comes to when it is done again: %s. This node "
            "reports that; one that fails too often weighs nothing any more",
            *(round_, peer_id, why),
        )
        return Verdict.FAILED


def _has_audits(run: PreparedRun) -> bool:
    return run.config.audits is not None and run.config.audits.rate > 0
