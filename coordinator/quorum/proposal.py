"""A leader's open proposal: one record of one ballot, and the votes for it."""

from __future__ import annotations

from typing import Final

from ..protocol.messages import digest_of
from ..protocol.trust.seals import Check, Committee, Sealed
from .words import Propose, Voted

_MOST_RETRIES_S: Final = 8
"""Times the first wait: a long record over a thin link is still on its way when the first wait is over."""


class Proposal:
    """Of one leader and ballot."""

    def __init__(self, word: Propose, now_s: float, retry_s: float) -> None:
        self.word, self.record = word, word.record
        self.votes: dict[str, bytes] = {}
        self.digest = digest_of(word.record)
        self._wait_s, self._most_s = retry_s, _MOST_RETRIES_S * retry_s
        self._again_s = now_s + retry_s

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to say it again; from then on the next, longer wait counts."""
        if now_s <= self._again_s:
            return False
        self._wait_s = min(2 * self._wait_s, self._most_s)
        self._again_s = now_s + self._wait_s
        return True

    def add(self, run_id: bytes, committee: Committee, seat: str, voted: Voted, check: Check | None) -> None:
        """A seat's vote, if it is one for this record; None: its signature is our own."""
        what = (voted.ballot, voted.round, voted.digest)
        if what != (self.word.ballot, self.word.round, self.digest):
            return
        if seat in self.votes or seat not in committee.seats:
            return
        data = committee.signed(run_id, voted.ballot, voted.round, self.record)
        if check is None or check(seat, voted.signature, data):
            self.votes[seat] = voted.signature

    def sealed(self, committee: Committee) -> Sealed | None:
        """The record with its seal, once there are enough votes."""
        if len(self.votes) < committee.need:
            return None
        seal = committee.seal(self.word.ballot, self.votes)
        return Sealed(record=self.record, seal=seal, work=self.word.work)
