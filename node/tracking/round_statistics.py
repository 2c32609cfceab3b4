"""What a node counts of its rounds: into its metrics, and into its run log for trackers."""

from __future__ import annotations

import logging
from typing import Final

from ...coordinator.protocol.figures import ddp_bytes
from ...coordinator.protocol.messages import CommitBody
from ..local_work import Proposal
from ..preparing import PreparedRun
from ..result import Result
from ..tasks.base import loss_unit_of
from .metrics import Audited, NodeMetrics
from .observer import Applied
from .run_log import RunLog
from .trackers import Tracks

log = logging.getLogger("thinwire.node")

TOLD_AFTER_EMPTY: Final = 16
"""Rounds in a row without a finite loss: the user is told at the first and again after as many more."""


class RoundStatistics:
    """An `Observer` of one run; `result` says what it has come to."""

    def __init__(self, run: PreparedRun, metrics: NodeMetrics, tracks: Tracks) -> None:
        self._run, self._metrics = run, metrics
        self._log = RunLog(tracks, metrics, run.link.traffic)
        self._applied_s: float | None = None
        """When the last commits were applied; None: not since this node trains."""
        self._counted = self._missed = self._n_offers = self._payload_bytes = 0
        self._empty_round, self._n_empty = 0, 0
        """The last one in which every batch was dropped; how many in a row."""
        self._held_out: list[tuple[int, float]] = []
        metrics.behind(run.rounds_behind)

    def result(self) -> Result:
        traffic = self._run.link.traffic()
        return Result(
            rounds=self._run.replica.round,
            fingerprint=self._run.replica.fingerprint().hex(),
            held_out=tuple(self._held_out),
            sent_bytes=sum(traffic.sent.values()),
            received_bytes=sum(traffic.received.values()),
            payload_bytes=self._payload_bytes,
            counted=self._counted,
            missed=self._missed,
            loss_unit=loss_unit_of(self._run.work.task),
            bytes_per_token=getattr(self._run.work.task, "bytes_per_token", None),
        )

    def started(self, round_: int) -> None:
        run = self._run
        self._log.event(
            "start",
            round_,
            run=run.config.run.name,
            run_id=run.link.run_id.hex(),
            peer_id=run.link.peer_id,
            parameters=run.n_parameters,
            config=run.config.model_dump(mode="json"),
        )

    def training(self, is_training: bool) -> None:
        self._metrics.training(is_training)
        if is_training:
            self._applied_s = None

    def proposed(self, proposal: Proposal) -> None:
        metrics, n_bytes = self._metrics, len(proposal.payload)
        self._n_offers += 1
        self._watch_losses(proposal)
        self._payload_bytes += n_bytes
        metrics.proposed(proposal.loss, n_bytes, proposal.n_samples, proposal.n_tokens, proposal.n_batches)
        self._log.proposed(proposal)
        metrics.not_finite(self._run.replica.strategy.counters)
        metrics.phase("compute", proposal.compute_s)
        metrics.phase("pack", proposal.pack_s)

    def _watch_losses(self, proposal: Proposal) -> None:
        """Warns of a node whose work is worth nothing."""
        if proposal.loss is not None:
            self._n_empty = 0
            return
        self._empty_round = proposal.round
        if self._n_empty % TOLD_AFTER_EMPTY == 0:
            log.warning(
                "round %d: no batch had a finite loss and finite gradients, so that this node's offer "
                "contributes nothing and is not counted as work. Check its data (--data) and its arithmetic "
                "(--precision float32, thinwire doctor); if all nodes say so, the learning rate",
                proposal.round,
            )
        self._n_empty += 1

    def worked_ahead(self, duration_s: float) -> None:
        self._metrics.phase("ahead", duration_s)

    def gave_up_offer(self) -> None:
        self._metrics.not_counted("given_up")

    def applied(self, applied: Applied) -> None:
        is_empty = applied.commits[-1].body.round == self._empty_round
        self._counted += applied.own == "counted" and not is_empty
        self._missed += applied.own == "missed"
        self._count_own(applied)
        self._time(applied)
        round_s = self._round_s(applied)
        self._applied_s = applied.ended_s if applied.is_training else None
        metrics = self._metrics
        metrics.round(self._run.replica.round, round_s)
        metrics.traffic(self._run.link.traffic())
        metrics.bad_payloads(self._run.replica.bad)
        self._weigh(applied.commits[-1].body)
        self._compare_bytes(len(applied.commits[-1].body.offers))
        self._log.applied(applied.commits, applied.own, round_s)

    def replayed(self, round_: int, was_wrong: bool) -> None:
        self._metrics.replayed(was_wrong)
        self._log.event("replay", round_, was_wrong=was_wrong)

    def fingerprint_reported(self) -> None:
        self._metrics.fingerprint_reported()

    def audited(self, result: Audited) -> None:
        self._metrics.audited(result)

    def measured_held_out(self, round_: int, loss: float) -> None:
        self._held_out.append((round_, loss))
        self._metrics.held_out(loss)
        self._log.event("held_out", round_, loss=loss)

    def ended(self, round_: int) -> None:
        self._metrics.training(False)
        self._log.event("end", round_, counted=self._counted, missed=self._missed)

    # ------------------------------------------------------------------------------------ applied rounds

    def _count_own(self, applied: Applied) -> None:
        """What became of this node's offers, and why some did not count."""
        for commit, own in zip(applied.commits, applied.owns, strict=True):
            self._metrics.result(own or "none")
            if own == "missed":
                is_here = any(offer.peer == self._run.peer_index for offer in commit.body.offers)
                self._metrics.not_counted("bad_payload" if is_here else "late")

    def _weigh(self, body: CommitBody) -> None:
        """How large the payloads of the last round were."""
        replica = self._run.replica
        if replica.weighed:
            peers = {replica.peers[offer.peer]: offer.peer for offer in body.offers}
            found = [(peers[peer_id], one) for peer_id, one in replica.weighed.items() if peer_id in peers]
            self._metrics.sizes.weighed(body.round, found)

    def _time(self, applied: Applied) -> None:
        """Exchange goes from the offer to the commit, and is waiting for payloads."""
        duration_s = applied.ended_s - applied.began_s
        self._metrics.phase("apply", duration_s - applied.fetched_s)
        if applied.offer is not None:
            waited_s = max(0.0, applied.came_s - applied.offer.sent_s)
            self._metrics.phase("exchange", waited_s + applied.fetched_s)

    def _round_s(self, applied: Applied) -> float | None:
        """Seconds from the round before to this one; None where that says nothing about the swarm."""
        if self._applied_s is None or len(applied.commits) > 1:
            return None
        return applied.ended_s - self._applied_s

    def _compare_bytes(self, n_peers: int) -> None:
        """With what an all-reduce of gradients would have sent; one peer alone would send nothing."""
        if n_peers > 1 and self._payload_bytes:
            data_parallel = ddp_bytes(n_peers, self._run.n_parameters) * self._n_offers
            sent = max(self._payload_bytes, sum(self._run.link.traffic().sent.values()))
            self._metrics.compression(data_parallel / self._payload_bytes, data_parallel / sent)
