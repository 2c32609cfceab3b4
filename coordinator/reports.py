"""What nodes report after a round: fingerprints, held-out losses, and that they have the last commit."""

from __future__ import annotations

import logging
import math
from collections import Counter

from thinwire.coordinator.board import Board
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.messages import MAX_PEERS, CommitBody, Report, ReportEntry

log = logging.getLogger("thinwire.coordinator")

PER_COMMIT = 4
"""Fingerprints of one peer that a commit takes up."""


class Reports:
    """Of one run. Fingerprints wait here for the next commit; held-out losses go to the ledger's file."""

    def __init__(self, ledger: Ledger, board: Board, rejected: Counter[str], last_round: int) -> None:
        self._ledger, self._board, self._rejected = ledger, board, rejected
        self._last_round = last_round
        # By convention the first peer evaluates the model as it is before round 1.
        self._evaluators: dict[int, int] = {0: 0}
        self._pending: list[ReportEntry] = []
        self.acknowledged: set[int] = set()
        """Peers that have the last commit; its evaluator also has to report the loss."""

    def committed(self, body: CommitBody) -> None:
        """A new commit, or an old one while the ledger is read again."""
        if body.evaluator is not None:
            self._evaluators[body.round] = body.evaluator

    def recall(self, body: CommitBody) -> None:
        """An old commit, in order: shows again what had been reported."""
        self.committed(body)
        for entry in body.reports:
            self._board.fingerprint(entry.peer, entry.round, entry.fingerprint)

    def take(self) -> tuple[ReportEntry, ...]:
        """What the next commit carries."""
        taken, self._pending = tuple(self._pending), []
        return taken

    def note(self, peer: int, report: Report) -> set[int]:
        """Takes a report on a committed round; returns the peers whose fingerprints differ from this one."""
        differ: set[int] = set()
        if report.fingerprint is not None:
            differ = self._note_fingerprint(peer, report.round, report.fingerprint)
        if report.held_out is not None:
            self._note_held_out(peer, report.round, report.held_out)
        evaluates = self._evaluators.get(report.round) == peer
        if report.round == self._last_round and (report.held_out is not None or not evaluates):
            self.acknowledged.add(peer)
        return differ

    def _note_fingerprint(self, peer: int, round_: int, value: bytes) -> set[int]:
        if self._board.has_reported(peer, round_, value):
            return set()
        n_pending = sum(entry.peer == peer for entry in self._pending)
        if n_pending >= PER_COMMIT or len(self._pending) >= PER_COMMIT * MAX_PEERS:
            self._rejected["too_many_reports"] += 1
            return set()
        self._pending.append(ReportEntry(peer=peer, round=round_, fingerprint=value))
        return self._board.fingerprint(peer, round_, value)

    def _note_held_out(self, peer: int, round_: int, loss: float) -> None:
        if self._evaluators.get(round_) != peer or not math.isfinite(loss):
            self._rejected["held_out"] += 1
            return
        self._ledger.note_held_out(round_, loss)
        log.info("round %d: held-out loss %.4f", round_, loss)
