"""What this node reports of its replica after a round: the fingerprint, the held-out loss."""

from __future__ import annotations

import logging

from ..coordinator.protocol.messages import NoiseEntry, Report
from .healing import Healer
from .preparing import PreparedRun
from .tracking.observer import Observer

log = logging.getLogger("thinwire.node")


class Reporter:
    """`healer`: remembers what was reported, to find out later what was wrong."""

    def __init__(self, run: PreparedRun, healer: Healer, observer: Observer) -> None:
        self._run, self._healer, self._observer = run, healer, observer
        self.has_evaluated = False
        """Whether a held-out loss has been told."""

    def report(self, *, evaluate: bool, is_replay: bool, is_proof: bool) -> None:
        """Tells the fingerprint where it is news, and the held-out loss where `evaluate` asks for it. Nobody
        hears of the fingerprint before this node's work has counted; that it has the last round it says
        anyway.

        `is_replay`: the replica came from the ledger alone, so its fingerprint needs no check; `is_proof`:
        and it began where nobody's word is taken, so that others may know.
        """
        run, round_ = self._run, self._run.replica.round
        may_say = run.history.standing.has_worked(run.peer_index)
        told = may_say and run.is_verified(round_) and self._is_news(round_, is_replay)
        fingerprint = self._healer.fingerprint(checked=is_replay) if told else None
        held_out = self._held_out() if evaluate else None
        if fingerprint is None and held_out is None and not (run.is_over and not may_say):
            return
        if fingerprint is not None:
            self._observer.fingerprint_reported()
        checked = is_replay and is_proof and told
        noise = self._noise() if evaluate else None
        report = Report(
            round=round_, fingerprint=fingerprint, checked=checked, held_out=held_out, noise=noise
        )
        self._run.link.report(report)

    def evaluate(self) -> None:
        """Tells the held-out loss, and how noisy the round's payloads were."""
        round_ = self._run.replica.round
        self._run.link.report(Report(round=round_, held_out=self._held_out(), noise=self._noise()))

    def _noise(self) -> NoiseEntry | None:
        found = self._run.replica.noise()
        if found is None:
            return None
        signal = max(-1.0, min(1.0, found.signal))
        return NoiseEntry(signal=signal, noise=found.noise, n_samples=found.n_samples, of=found.of)

    def _is_news(self, round_: int, is_replay: bool) -> bool:
        """Far behind the head others have compared the round already; a wrong word is taken back even so."""
        run = self._run
        takes_back = is_replay and self._healer.said(round_)
        return takes_back or run.is_near(run.config.run.verify_every) or run.history.verdicts.differs(round_)

    def _held_out(self) -> float:
        """The held-out loss of the replica, in nats."""
        round_, loss = self._run.replica.round, self._run.work.evaluate()
        self.has_evaluated = True
        self._observer.measured_held_out(round_, loss)
        own = self._run.work.evaluate_own()
        also = "" if own is None else f"; of this node's own model {own:.4f}"
        log.info("round %d: held-out loss %.4f%s", round_, loss, also)
        return loss
