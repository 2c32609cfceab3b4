"""The audits that this node was drawn for: it does another peer's work of one round again, in its own time,
and says what it has found. What counts of that is the ledger's matter (see `trust.standing`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ...compression.errors import SwarmUnreachable
from ...coordinator.protocol.messages import Commit, Verdict
from ...coordinator.protocol.trust.audits import payload_digest, signed_bytes
from ...coordinator.protocol.trust.drawing import MIN_AUDITORS, Draw
from ..preparing import PreparedRun
from ..tracking.observer import Observer
from .earlier import Earlier
from .findings import Findings, Found
from .scores import Scores

log = logging.getLogger("thinwire.node")


class Auditor:
    """Of one run on this node; used by the node's thread.

    Nobody's work can be done again by a node that has data of its own: such a node says nothing, and neither
    does one that is too late. On a node of several ranks all of them do it together.
    """

    def __init__(self, run: PreparedRun, observer: Observer) -> None:
        self._run, self._observer = run, observer
        self._commit: Commit | None = None
        self._before: Commit | None = None
        """The one before it."""
        self._due: tuple[Draw, ...] = ()
        self._earlier: Earlier | None = None
        self._can_audit = not run.has_own_data
        self._scores, self._scored = Scores(), 0
        self._has_scores = _has_audits(run)
        self._keeps = self._has_scores and run.replica.strategy.staleness > 0
        """Of every round: who audits a round's offers is not known yet when they are made."""

    def coming(self, commits: Sequence[Commit]) -> None:
        """The replica applies these next. If the offers of a single one are to be audited here, the weights
        that they were made from are kept. Audits that are not done by now never will be."""
        self._skip(len(self._due))
        drawn = self._run.history.standing.drawn(commits[-1].body.round)
        own = [d for d in drawn if self._run.peer_index in d.auditors]
        due = [d for d in own if not d.for_suspects or self._scores.is_suspect(d.target)]
        self._due, self._earlier = (), None
        if len(commits) > 1 or not self._can_audit:
            self._skip(len(due))
        elif due or self._keeps:
            earlier = self._run.work.keep()
            if due and earlier is None:
                self._skip(len(due))
            elif due:
                self._due, self._earlier = tuple(due), earlier

    def applied(self, commit: Commit) -> None:
        """The replica is after this commit now, whose offers are audited next."""
        self._before, self._commit = self._commit, commit
        if self._earlier is not None and self._earlier.round != commit.body.round:
            self.forget()

    def forget(self) -> None:
        """The replica was moved to another round: what is due was to be done at weights that may be wrong."""
        self._skip(len(self._due))
        self._due, self._earlier = (), None

    def audit(self) -> None:
        """All that is due. It takes about the time of a round's local work for each."""
        self._score()
        due, self._due = self._due, ()
        earlier, self._earlier = self._earlier, None
        if earlier is not None and self._commit is not None:
            findings = Findings(self._run, self._commit, self._before, earlier, self._scores.is_suspect)
            for draw in due:
                self._audit(draw, findings)

    def _skip(self, n: int) -> None:
        for _ in range(n):
            self._observer.audited("skipped")

    def _score(self) -> None:
        """The payloads of the round that was applied last."""
        replica = self._run.replica
        round_, parts = replica.to_score
        if not self._has_scores or round_ == self._scored:
            return
        self._scored = round_
        if len(parts) > MIN_AUDITORS:
            scores = replica.strategy.scores(list(parts.values()), replica.turn_of(round_, replica.peer_id))
            self._has_scores = scores is not None
            self._scores.add(dict(zip(parts, scores or (), strict=False)))

    def _audit(self, draw: Draw, findings: Findings) -> None:
        assert self._commit is not None
        run, round_, target = self._run, self._commit.body.round, draw.target
        offer = next(o for o in self._commit.body.offers if o.peer == target)
        found = _found(findings, draw, round_)
        self._observer.audited("skipped" if found is None else found.verdict.value)
        if found is None:
            return
        target_id = run.history.peers[target]
        if found.verdict == Verdict.FAILED:
            log.warning(
                "round %d: the offer of %s fails: %s. This node reports that; a peer that fails too often "
                "weighs nothing any more",
                *(round_, target_id, found.why),
            )
        claim = signed_bytes(run.link.run_id, round_, target_id, payload_digest(offer), found.verdict)
        run.link.audit(round_, target, found.verdict, claim)


def _found(findings: Findings, draw: Draw, round_: int) -> Found | None:
    """None: nothing can be said."""
    try:
        return findings.of(draw)
    except SwarmUnreachable as e:
        log.info("round %d: no audit of peer %d, a payload cannot be had: %s", round_, draw.target, e)
    except Exception:
        if findings.of_many_ranks:
            raise  # they are out of step
        log.exception("round %d: the work of peer %d cannot be done again", round_, draw.target)
    return None


def _has_audits(run: PreparedRun) -> bool:
    return run.config.audits is not None and run.config.audits.rate > 0
