"""What nodes report after a round: fingerprints, snapshots, held-out losses; and who has the last commit."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter

from .ledger import Ledger
from .observe.quiet_log import QuietLog
from .observe.run_statistics import KEPT_FINGERPRINTS, RunStatistics
from .observe.trend import Trend
from .protocol.attested import Snapshots
from .protocol.figures import figures_in_words, printable
from .protocol.messages import (
    MAX_PEERS,
    CommitBody,
    Evaluation,
    Rejected,
    Report,
    ReportEntry,
    SnapshotEntry,
)
from .protocol.settings import Course
from .protocol.trust.standing import Standing

log = logging.getLogger("thinwire.coordinator")

PER_COMMIT = 4
"""Fingerprints of one peer that a commit takes up."""

SNAPSHOTS_PER_COMMIT = 2
"""Snapshots of one peer that a commit takes up."""

PER_ROUND = 8
"""Different things that one peer may report about one round: its own fingerprint, a checked one, ..."""

TOLD_OF_FAILURE = 300
"""Characters of why an evaluation failed."""

Said = tuple[bytes, bool]
"""A fingerprint, and whether it was checked."""


class Reports:
    """Of one run. Fingerprints and snapshots wait here for the next commit; held-out losses go to the file.

    What a node sends again after a reconnect is known already, also after a restart. Fingerprints and
    snapshots of peers without counted work (`standing`) are counted as rejected, and not looked at.
    """

    def __init__(
        self,
        ledger: Ledger,
        statistics: RunStatistics,
        trend: Trend,
        snapshots: Snapshots,
        standing: Standing,
        rejected: Counter[Rejected],
        course: Course,
    ) -> None:
        self._ledger, self._statistics, self._trend, self._snapshots = ledger, statistics, trend, snapshots
        self._standing = standing
        self._eval = course.settings.eval
        self._rejected, self._run, self._ends = rejected, course.run, {course.n_rounds}
        # By convention the first peer evaluates the model as it is before the first round with offers.
        self._evaluators: dict[int, int] = {0: 0}
        self._said: dict[int, dict[int, list[Said]]] = {}
        self._pending: dict[tuple[int, int], ReportEntry] = {}
        self._pending_snapshots: dict[tuple[int, int], SnapshotEntry] = {}
        self._unsealed: list[ReportEntry] = []
        """Of those that are remembered: in no record yet, though perhaps in one that waits for its seal."""
        self.failed_evaluations = 0
        self.last_failure: tuple[int, str] | None = None
        """The newest evaluation that failed: its round, and why."""
        self._lines = QuietLog(log, time.monotonic)
        self.acknowledged: set[int] = set()
        """Peers that have the last commit; its evaluator also has to report the loss."""

    def committed(self, body: CommitBody, course: Course) -> None:
        """A new commit, or an old one while the ledger is read again. `course`: after it."""
        if body.changes:
            self._run = course.run
            self._ends.add(course.n_rounds)
            self.acknowledged.clear()
        if body.evaluator is not None:
            self._evaluators[body.round] = body.evaluator
        elif self._standing.is_untouched and not body.offers:
            self._evaluators[body.round] = 0
        if self._unsealed:
            self._unsealed = [entry for entry in self._unsealed if entry not in body.reports]

    def forget_pending(self) -> None:
        """What no record carries yet is not known any more: nodes say it again to whoever leads."""
        for entry in self._unsealed:
            said = self._said.get(entry.round, {}).get(entry.peer, [])
            if (entry.fingerprint, entry.checked) in said:
                said.remove((entry.fingerprint, entry.checked))
        self._unsealed, self._pending, self._pending_snapshots = [], {}, {}
        self.acknowledged.clear()

    def recall(self, body: CommitBody, course: Course) -> None:
        """An old commit, in order: brings back what had been reported."""
        self.committed(body, course)
        for entry in body.reports:
            self._remember(entry.peer, entry.round, (entry.fingerprint, entry.checked))
            self._statistics.fingerprint(entry.peer, entry.round, entry.fingerprint)

    def take(self) -> tuple[tuple[ReportEntry, ...], tuple[SnapshotEntry, ...]]:
        """Fingerprints and snapshots for the next commit; they wait no longer."""
        taken = tuple(self._pending.values()), tuple(self._pending_snapshots.values())
        self._pending, self._pending_snapshots = {}, {}
        return taken

    def note(self, peer: int, report: Report) -> set[int]:
        """Takes a report on a committed round; returns the peers whose fingerprints differ from this one."""
        differ: set[int] = set()
        if report.fingerprint is None and report.snapshot is None:
            pass
        elif not self._standing.has_worked(peer):
            self._rejected["no_work"] += 1
        else:
            differ = self._note_state(peer, report)
        if report.held_out is not None:
            self._note_held_out(peer, report.round, report.held_out)
        if report.noise is not None and self._evaluators.get(report.round) == peer:
            self._statistics.noise(report.round, report.noise)
        evaluates = self._evaluators.get(report.round) == peer
        if report.round == self._run.rounds and (report.held_out is not None or not evaluates):
            self.acknowledged.add(peer)
        return differ

    def has_evaluator(self, round_: int) -> bool:
        """Whether a peer was named to evaluate the weights after that round."""
        return round_ in self._evaluators

    def note_evaluation(self, evaluation: Evaluation) -> None:
        """Takes what an evaluation of a committed round's weights has given, or why it failed."""
        round_, figures = evaluation.round, {f.name: f.value for f in evaluation.figures}
        if self._eval is None or (round_ % self._eval.every and round_ not in self._ends):
            self._rejected["evaluation"] += 1
            return
        if evaluation.failed is not None:
            self.failed_evaluations += 1
            self.last_failure = round_, printable(evaluation.failed, TOLD_OF_FAILURE)
            text = "round %d: its evaluation failed: %s"
            self._lines.say(logging.WARNING, "", "evaluation", text, *self.last_failure)
            return
        is_fine = figures and all(map(math.isfinite, figures.values())) and all(map(str.isprintable, figures))
        if not is_fine:
            self._rejected["evaluation"] += 1
            return
        if self._ledger.note_evaluation(round_, figures):
            log.info("round %d: evaluation: %s", round_, figures_in_words(figures))

    def _note_state(self, peer: int, report: Report) -> set[int]:
        if report.snapshot is not None:
            self._note_snapshot(peer, report.round, report.snapshot, report.snapshot_bytes)
        if report.fingerprint is None:
            return set()
        return self._note_fingerprint(peer, report.round, (report.fingerprint, report.checked))

    def _note_fingerprint(self, peer: int, round_: int, said: Said) -> set[int]:
        if round_ % self._run.verify_every and round_ not in self._ends:
            self._rejected["fingerprint"] += 1
            return set()
        if len(self._said) >= KEPT_FINGERPRINTS and round_ < min(self._said):
            return set()
        before = self._said.get(round_, {}).get(peer, [])
        if said in before:
            return set()
        n_pending = sum(entry.peer == peer for entry in self._pending.values())
        is_full = n_pending >= PER_COMMIT or len(self._pending) >= PER_COMMIT * MAX_PEERS
        if len(before) >= PER_ROUND or (is_full and (peer, round_) not in self._pending):
            self._rejected["too_many_reports"] += 1
            return set()
        value, checked = said
        entry = ReportEntry(peer=peer, round=round_, fingerprint=value, checked=checked)
        self._pending[peer, round_] = entry
        self._unsealed.append(entry)
        self._remember(peer, round_, said)
        return self._statistics.fingerprint(peer, round_, value)

    def _remember(self, peer: int, round_: int, said: Said) -> None:
        self._said.setdefault(round_, {}).setdefault(peer, []).append(said)
        if len(self._said) > KEPT_FINGERPRINTS:
            del self._said[min(self._said)]

    def _note_snapshot(self, peer: int, round_: int, manifest: bytes, n_bytes: int | None) -> None:
        if round_ == 0 or round_ % self._run.snapshot_every or n_bytes is None:
            self._rejected["snapshot"] += 1
            return
        entry = SnapshotEntry(peer=peer, round=round_, manifest=manifest, n_bytes=n_bytes)
        is_old_news = self._snapshots.reported(peer, round_) == (manifest, n_bytes)
        if not self._snapshots.is_known(round_) or is_old_news:
            return
        n_pending = sum(pending.peer == peer for pending in self._pending_snapshots.values())
        is_full = (
            n_pending >= SNAPSHOTS_PER_COMMIT
            or len(self._pending_snapshots) >= SNAPSHOTS_PER_COMMIT * MAX_PEERS
        )
        if is_full and (peer, round_) not in self._pending_snapshots:
            self._rejected["too_many_reports"] += 1
            return
        self._pending_snapshots[peer, round_] = entry

    def _note_held_out(self, peer: int, round_: int, loss: float) -> None:
        if self._evaluators.get(round_) != peer or not math.isfinite(loss):
            self._rejected["held_out"] += 1
            return
        if self._ledger.note_held_out(round_, loss):
            self._trend.held_out(round_, loss)
            log.info("round %d: held-out loss %.4f", round_, loss)
