"""This node's part of the open round: local work, an offer, and work ahead while the commit has not come."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from ..compression.errors import SwarmUnreachable
from ..coordinator.protocol.messages import Commit, Offer
from .local_work import Proposal
from .preparing import PreparedRun
from .tracking.observer import Observer, OpenOffer


class Proposer:
    """Makes one offer at a time. `clock`: in seconds; `stopped`: whether this node is to leave the run."""

    def __init__(
        self,
        run: PreparedRun,
        observer: Observer,
        clock: Callable[[], float],
        stopped: Callable[[], bool],
    ) -> None:
        self._run, self._observer, self._clock, self._stopped = run, observer, clock, stopped
        self._open: OpenOffer | None = None
        self._last: Proposal | None = None
        self._missed: Proposal | None = None
        """What came too late, and is to be offered once more."""

    @property
    def open_offer(self) -> OpenOffer | None:
        return self._open

    def settled(self, *, missed: bool = False) -> None:
        """The round of the open offer, if there is one, was applied. `missed`: without that offer."""
        self._open = None
        is_asynchronous = self._run.config.policy.name == "async"
        if missed and is_asynchronous and self._last is not None and self._last.loss is not None:
            self._missed = self._last

    def give_up(self) -> None:
        """The replica goes to another round: what was offered for the open one is not settled any more."""
        if self._open is not None:
            self._observer.gave_up_offer()
        self._open = self._missed = None

    def propose(self, came_s: float, meanwhile: Callable[[], object] | None = None) -> None:
        """Local work and an offer for the round after the replica's, which is at the head of the ledger. With
        the policy `async` work that came too late is offered for this round, before there is more.

        `came_s`: when the commit came that opened the round, by `clock`; `meanwhile`: done once the offer is
        under way.
        """
        proposal = self._offered_again() or self._worked(came_s)
        self._last = proposal
        self._run.link.offer(_offer(proposal, self._run.has_own_data))
        self._open = OpenOffer(proposal.round, self._clock())
        if meanwhile is not None:
            meanwhile()
        self._work_ahead(proposal.round)

    def _offered_again(self) -> Proposal | None:
        missed, self._missed = self._missed, None
        return None if missed is None else self._run.work.propose_again(missed)

    def _worked(self, came_s: float) -> Proposal:
        """Local work for the round, as much as fits."""
        run, workload = self._run, self._run.workload
        began_s = self._clock()
        allotted = None if workload is None else workload.allotment()
        proposal = run.work.propose(allotted)
        duration_s = self._clock() - began_s
        self._observer.proposed(proposal)
        if workload is not None and allotted is not None:
            if run.replica.round > 0:
                workload.began(began_s - came_s)
            workload.worked(proposal.n_batches, duration_s)
            rate_bytes_per_s = run.link.traffic().upload_bytes_per_s
            workload.sent(len(proposal.payload), allotted.share, rate_bytes_per_s)
        return proposal

    def _work_ahead(self, round_: int) -> None:
        """What the strategy can do for the next round while the commit of this one has not come."""
        run = self._run
        is_last = round_ == run.replica.course.n_rounds
        while not is_last and run.is_at_head and self._works_ahead():
            pass

    def finish_ahead(self, commit: Commit) -> None:
        """All of the next round's work that is to be done before this commit is applied."""
        run, sent = self._run, b""
        if run.replica.strategy.staleness == 0:
            return
        if self._open is None:  # it was started anew since it made an offer that is in the commit
            own = (o for o in commit.body.offers if o.peer == run.peer_index and o.n_samples > 0)
            with suppress(SwarmUnreachable):
                sent = next((run.link.payload(offer) for offer in own), b"")
        while self._works_ahead(sent):
            pass

    def _works_ahead(self, sent: bytes = b"") -> bool:
        """A piece of it; False: there is none, or this node is stopped."""
        began_s = time.monotonic()
        if self._stopped() or not self._run.work.work_ahead(sent):
            return False
        duration_s = time.monotonic() - began_s
        self._observer.worked_ahead(duration_s)
        if self._run.workload is not None and self._run.replica.strategy.staleness:
            self._run.workload.worked(1, duration_s)
        return True


def _offer(proposal: Proposal, own_data: bool) -> Offer:
    """Without a batch that counts it has no samples: nobody waits for it, and nobody's work is diluted."""
    has_worked = proposal.loss is not None
    payload = proposal.payload if has_worked else b""
    return Offer(
        round=proposal.round,
        n_samples=proposal.n_samples if has_worked else 0,
        n_tokens=proposal.n_tokens if has_worked else 0,
        loss=proposal.loss,
        n_bytes=len(payload),
        payload=payload,
        digest=None,
        own_data=own_data,
    )
