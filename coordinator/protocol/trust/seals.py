"""Seals: a majority of a committee's seats has signed a record, which anybody can check offline.

A seat votes for a record by signing (run, ballot, round, digest of the record). `need` votes of the same
ballot are the record's seal. A ballot is (epoch, number, seat): the epoch is the round of the record that set
the committee, and ballots of another epoch are void.

    seal     u64 ballot | vote, vote, ...      in the order of their seats      (big-endian)
    vote     u8 place of the seat in the committee | 64 bytes signature

A committee of one has no ballots: its seat's signature over the record is the seal, as it always was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field

from ..figures import counted, short
from ..identity import is_signed_by
from ..messages import (
    MAX_ROUND,
    MAX_SEATS,
    BadMessage,
    Commit,
    CommitteeEntry,
    Record,
    SealBytes,
    Work,
    digest_of,
)
from .signatures import SIGNATURE_BYTES

_PLACE_BITS: Final = 3
_NUMBER_BITS: Final = 28
MAX_NUMBER: Final = 2**_NUMBER_BITS - 1

MAX_BALLOT: Final = (MAX_ROUND << _NUMBER_BITS | MAX_NUMBER) << _PLACE_BITS | MAX_SEATS
Ballot = Annotated[int, Field(ge=0, le=MAX_BALLOT)]

_BALLOT_BYTES: Final = 8
_VOTE_BYTES: Final = 1 + SIGNATURE_BYTES

Check = Callable[[str, bytes, bytes], bool]
"""Whether the peer (its id) made this signature over these bytes."""


@dataclass(frozen=True, slots=True)
class Seal:
    """`votes`: signatures by the place of their seat, one at least."""

    ballot: int
    votes: Mapping[int, bytes]

    def to_bytes(self) -> bytes:
        """As a commit carries it."""
        votes = b"".join(bytes([place]) + self.votes[place] for place in sorted(self.votes))
        return self.ballot.to_bytes(_BALLOT_BYTES, "big") + votes

    @classmethod
    def parse(cls, data: bytes) -> Seal:
        """Raises BadMessage for what `to_bytes` never gives."""
        n_votes, rest = divmod(len(data) - _BALLOT_BYTES, _VOTE_BYTES)
        starts = range(_BALLOT_BYTES, len(data), _VOTE_BYTES)
        places = [data[start] for start in starts]
        if rest or not 1 <= n_votes <= MAX_SEATS or max(places) >= MAX_SEATS:
            raise BadMessage("these bytes are no seal")
        if places != sorted(set(places)):
            raise BadMessage("each seat has one vote, in the order of the seats")
        votes = {data[start]: data[start + 1 : start + _VOTE_BYTES] for start in starts}
        return cls(int.from_bytes(data[:_BALLOT_BYTES], "big"), votes)


class Sealed(Record):
    """A record of the ledger and why it is one; with the blob that it names as its `work`."""

    n_younger = 1
    record: Annotated[bytes, Field(max_length=16 * 2**20)]
    seal: SealBytes
    work: Work = b""

    @property
    def commit(self) -> Commit:
        """As nodes get it."""
        return Commit(record=self.record, signature=self.seal)


@dataclass(frozen=True, slots=True)
class Committee:
    """The seats that order a run's records from round `epoch` + 1 on, and how many of them must sign.

    Raises ValueError for seats that are none, too many or named twice, and for less than a majority.
    """

    epoch: int
    seats: tuple[str, ...]
    need: int

    def __post_init__(self) -> None:
        n = len(self.seats)
        if not 1 <= n <= MAX_SEATS or len(set(self.seats)) != n or not n // 2 < self.need <= n:
            raise ValueError(f"{self.need} of the seats {', '.join(self.seats)}: no committee")

    @classmethod
    def majority(cls, epoch: int, seats: tuple[str, ...]) -> Committee:
        """More than half of them must sign."""
        return cls(epoch, seats, len(seats) // 2 + 1)

    @classmethod
    def founder(cls, peer_id: str) -> Committee:
        """Of a new run: the coordinator that record 0 names."""
        return cls(0, (peer_id,), 1)

    @classmethod
    def named(cls, epoch: int, entry: CommitteeEntry) -> Committee:
        """By the record of round `epoch`."""
        return cls(epoch, tuple(seat.peer_id for seat in entry.seats), entry.need)

    def is_only(self, peer_id: str) -> bool:
        """Whether this seat alone orders the run."""
        return self.seats == (peer_id,)

    def ballot_above(self, ballot: int, seat: str) -> int:
        """The first one of this epoch and seat that is higher than `ballot`. Raises OverflowError."""
        number = 1
        if ballot >> (_NUMBER_BITS + _PLACE_BITS) == self.epoch:
            number = ((ballot >> _PLACE_BITS) & MAX_NUMBER) + 1
        if number > MAX_NUMBER:
            raise OverflowError(f"more than {MAX_NUMBER} ballots in an epoch")
        return (self.epoch << _NUMBER_BITS | number) << _PLACE_BITS | self.seats.index(seat)

    def owner(self, ballot: int) -> str | None:
        """The seat whose ballot it is; None: it is void here."""
        place = ballot & (2**_PLACE_BITS - 1)
        if ballot >> (_NUMBER_BITS + _PLACE_BITS) != self.epoch or place >= len(self.seats):
            return None
        return self.seats[place]

    def signed(self, run_id: bytes, ballot: int, round_: int, record: bytes) -> bytes:
        """What a seat's vote for the record signs."""
        if len(self.seats) == 1:
            return record
        return vote_bytes(run_id, ballot, round_, digest_of(record))

    def seal(self, ballot: int, votes: Mapping[str, bytes]) -> bytes:
        """Of the signatures of `need` seats or more."""
        if len(self.seats) == 1:
            return votes[self.seats[0]]
        return Seal(ballot, {self.seats.index(seat): vote for seat, vote in votes.items()}).to_bytes()

    def has_sealed(
        self, run_id: bytes, round_: int, record: bytes, seal: bytes, check: Check = is_signed_by
    ) -> bool:
        """Whether this committee has sealed the record of that round: enough of its seats, one ballot."""
        return self.why_not_sealed(run_id, round_, record, seal, check) is None

    def why_not_sealed(
        self, run_id: bytes, round_: int, record: bytes, seal: bytes, check: Check = is_signed_by
    ) -> str | None:
        """What is wrong with the seal; None: nothing, `has_sealed`."""
        if len(self.seats) == 1:
            is_signed = len(seal) == SIGNATURE_BYTES and check(self.seats[0], seal, record)
            return None if is_signed else "its signature is not the coordinator's"
        try:
            why = self._why_not(run_id, round_, record, Seal.parse(seal), check)
        except BadMessage as e:
            why = str(e)
        return why and f"its signature is not a majority's of its committee: {why}"

    def _why_not(self, run_id: bytes, round_: int, record: bytes, seal: Seal, check: Check) -> str | None:
        n_seats = len(self.seats)
        if self.owner(seal.ballot) is None:
            return f"its ballot is void since record {self.epoch} named that"
        if len(seal.votes) < self.need:
            return f"it has {counted(len(seal.votes), 'vote')} of {self.need} that are needed"
        if max(seal.votes) >= n_seats:
            return f"it has a vote of seat {max(seal.votes) + 1} of {n_seats}"
        data = vote_bytes(run_id, seal.ballot, round_, digest_of(record))
        for place, vote in seal.votes.items():
            if not check(self.seats[place], vote, data):
                return f"the vote of {short(self.seats[place])} is not its own for this record"
        return None


def vote_bytes(run_id: bytes, ballot: int, round_: int, digest: bytes) -> bytes:
    """What a vote for a record signs."""
    return b"thinwire vote\n" + run_id + ballot.to_bytes(8, "big") + round_.to_bytes(8, "big") + digest
