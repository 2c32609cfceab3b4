"""A service's records in the hands of a committee: one reign of the seat that leads it."""

from __future__ import annotations

from ..ledger import Ledger
from ..protocol.messages import CommitBody, encode_record
from .events import Role
from .log import OnSealed
from .seat import Seat


class Replicated:
    """Of one reign: made when the seat says `Leads`, of no use any more when it says `StepsDown`. Whoever
    takes the seat's events hands `NewRecord` on to `new_record`."""

    on_sealed: OnSealed

    def __init__(self, seat: Seat, ledger: Ledger) -> None:
        self._seat, self._ledger = seat, ledger

    def propose(self, body: CommitBody, work: bytes, now_s: float) -> None:
        """See `Log.propose`. If the reign is over already, which its service is about to hear, the record is
        never heard of."""
        if self._seat.role is Role.LEADING:
            self._seat.propose(encode_record(body), now_s, work)

    def new_record(self, round_: int, now_s: float) -> None:
        """The record of this round, which was proposed here, is sealed and on the disk."""
        (commit,) = self._ledger.commits(round_ - 1, 1)
        self.on_sealed(commit, now_s)
