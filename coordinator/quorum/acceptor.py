"""The half of a seat that must not forget: what it has promised, and what it has voted for."""

from __future__ import annotations

from typing import Literal

from ..protocol.messages import BadMessage, digest_of
from ..protocol.trust.seals import Committee
from .disk import Place, Records, SeatDisk, Signer, VoteState
from .words import Accepted, Propose, Voted

Refusal = Literal["outbid", "two records", "no vote"]
"""Why there is no vote: a promise, or it is not of the open round; its leader lies; what the record says, or
names and is not here (yet)."""


class Acceptor:
    """Of one seat. Everything is on the disk before anybody hears of it: its methods raise OSError, and then
    nothing was promised or voted for, whatever the disk says."""

    def __init__(self, run_id: bytes, signer: Signer, disk: SeatDisk, records: Records) -> None:
        self._run_id, self._signer, self._disk, self._records = run_id, signer, disk, records

    @property
    def committee(self) -> Committee:
        return self._disk.committee

    @property
    def may_vote(self) -> bool:
        """Whether it is of the committee, and knows its votes."""
        return self._signer.seat in self.committee.seats and self._disk.rests is None

    @property
    def promised(self) -> int:
        """It takes no lower ballot of this epoch."""
        vote = self._disk.vote
        return vote.promised if vote.epoch == self.committee.epoch else 0

    @property
    def accepted(self) -> Accepted | None:
        """The last vote, if it is for the open round and of this epoch."""
        vote = self._disk.vote
        accepted = vote.accepted if vote.epoch == self.committee.epoch else None
        return accepted if accepted is not None and accepted.round == self._disk.head + 1 else None

    def place(self, record: bytes) -> Place | None:
        """None: it is no record."""
        try:
            return self._records.place(record)
        except BadMessage:
            return None

    def follows(self, record: bytes) -> bool:
        """Whether it is a record of the open round, upon the head."""
        place = self.place(record)
        return place is not None and place[:2] == (self._disk.head + 1, self._disk.head_digest)

    def promise(self, ballot: int) -> bool:
        """Whether it has: only a ballot that is higher than what was promised, and it may vote."""
        if not self.may_vote or ballot <= self.promised:
            return False
        self._disk.save_vote(VoteState(self.committee.epoch, ballot, self.accepted))
        return True

    def accept(self, proposed: Propose) -> Voted | Refusal:
        """A vote, which is on the disk, or why not."""
        accepted = self.accepted
        if not self.may_vote or proposed.ballot < self.promised or proposed.round != self._disk.head + 1:
            return "outbid"
        is_again = accepted is not None and accepted.ballot == proposed.ballot
        if accepted is not None and is_again and accepted.record != proposed.record:
            return "two records"
        if not self.follows(proposed.record) or not self._records.may_vote(proposed.record, proposed.work):
            return "no vote"
        if not is_again:
            vote = Accepted(
                ballot=proposed.ballot, round=proposed.round, record=proposed.record, work=proposed.work
            )
            self._disk.save_vote(VoteState(self.committee.epoch, proposed.ballot, vote))
        digest = digest_of(proposed.record)
        data = self.committee.signed(self._run_id, proposed.ballot, proposed.round, proposed.record)
        signature = self._signer.sign(data)
        return Voted(ballot=proposed.ballot, round=proposed.round, digest=digest, signature=signature)
