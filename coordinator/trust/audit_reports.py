"""Auditors' reports on their way into the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ..protocol.messages import MAX_AUDITS, Audit, AuditEntry, Rejected
from ..protocol.trust.audits import check_audit
from ..protocol.trust.judging import REPORT_ROUNDS
from ..protocol.trust.standing import Standing

Key = tuple[int, int, int]
"""Round, target, auditor."""


class AuditReports:
    """Of one run; they wait here for the next commit. `peer_id`: of a peer's index.

    Only those are taken up that `Standing` will hear: of auditors that were drawn, once each, signed, in
    time. So there are never more than were drawn in the last rounds.
    """

    def __init__(
        self, standing: Standing, peer_id: Callable[[int], str], rejected: Counter[Rejected]
    ) -> None:
        self._standing, self._peer_id, self._rejected = standing, peer_id, rejected
        self._pending: dict[Key, AuditEntry] = {}
        self._unsigned: set[Key] = set()
        """Of which a report came that the auditor has not signed: no other one is checked."""

    def note(self, auditor: int, message: Audit) -> None:
        """Takes up a report on the offer of a committed round. One that comes too late, or again after a
        reconnect, changes nothing; one that nobody asked for is counted."""
        key = (message.round, message.target, auditor)
        if key in self._pending:
            return
        if not self._standing.awaits(*key) or key in self._unsigned:
            if not self._was_drawn(*key) or key in self._unsigned:
                self._rejected["audit"] += 1
            return
        entry = AuditEntry(
            round=message.round,
            target=message.target,
            auditor=auditor,
            verdict=message.verdict,
            signature=message.signature,
        )
        claim = self._standing.claim(entry)
        if claim is None or not check_audit(self._peer_id(auditor), message.signature, claim):
            self._unsigned.add(key)
            self._rejected["audit"] += 1
            return
        self._pending[key] = entry

    def take(self) -> tuple[AuditEntry, ...]:
        """For the next commit, in order; what has no room waits for the one after it."""
        useful = sorted(key for key in self._pending if self._standing.awaits(*key))
        taken = tuple(self._pending[key] for key in useful[:MAX_AUDITS])
        self._pending = {key: self._pending[key] for key in useful[MAX_AUDITS:]}
        return taken

    def forget_pending(self) -> None:
        """None waits any more: auditors say theirs again to whoever leads."""
        self._pending.clear()
        self._unsigned.clear()

    def committed(self) -> None:
        """A commit more is known to `Standing`: what is over is forgotten."""
        self._unsigned = {key for key in self._unsigned if self._standing.awaits(*key)}

    def _was_drawn(self, round_: int, target: int, auditor: int) -> bool:
        """Also of an audit that has been judged meanwhile, and of any round that is too old to tell."""
        if round_ <= self._standing.round - REPORT_ROUNDS:
            return True
        return any(d.target == target and auditor in d.auditors for d in self._standing.drawn(round_))
