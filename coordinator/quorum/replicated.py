"""A service's records in the hands of a committee: one reign of the seat that leads it."""

from __future__ import annotations

from collections.abc import Mapping

from ..ledger import Ledger
from ..protocol.messages import CommitBody, encode_record
from .checking import RecordChecks
from .events import Role
from .log import OnSealed
from .seat import Seat


class Replicated:
    """Of one reign: made when the seat says `Leads`, of no use any more when it says `StepsDown`. Whoever
    takes the seat's events hands `NewRecord` on to `new_record`."""

    on_sealed: OnSealed

    def __init__(self, seat: Seat, ledger: Ledger, checks: RecordChecks) -> None:
        self._seat, self._ledger, self._checks = seat, ledger, checks
        self.proposed_s = 0.0
        """When the record that is proposed was."""

    @property
    def is_over(self) -> bool:
        """See `Log.is_over`."""
        return self._seat.role is not Role.LEADING

    @property
    def resting(self) -> Mapping[str, bytes]:
        """See `Log.resting`."""
        return self._seat.resting

    def propose(self, body: CommitBody, work: bytes, now_s: float) -> None:
        """See `Log.propose`. If the reign is over already, which its service is about to hear, the record is
        never heard of."""
        if not self.is_over:
            record, self.proposed_s = encode_record(body), now_s
            self._checks.trust(record, work)
            self._seat.propose(record, now_s, work)

    def new_record(self, round_: int, now_s: float) -> None:
        """The record of this round, which was proposed here, is sealed and on the disk."""
        (commit,) = self._ledger.commits(round_ - 1, 1)
        self.on_sealed(commit, now_s)
