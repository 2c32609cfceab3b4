"""Seals: a majority of a committee's seats has signed a record, which anybody can check offline.

A seat votes for a record by signing (run, ballot, round, digest of the record). `need` votes
of the same ballot are the record's seal. A ballot is (epoch, number, seat): the epoch is the round of the
record that set the committee, and ballots of another epoch are void.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field

from ..identity import is_signed_by
from ..messages import MAX_ROUND, PeerId, Record, Signature, digest_of

MAX_SEATS: Final = 7
_PLACE_BITS: Final = 3
_NUMBER_BITS: Final = 28
MAX_NUMBER: Final = 2**_NUMBER_BITS - 1

MAX_BALLOT: Final = (MAX_ROUND << _NUMBER_BITS | MAX_NUMBER) << _PLACE_BITS | MAX_SEATS
Ballot = Annotated[int, Field(ge=0, le=MAX_BALLOT)]


Check = Callable[[str, bytes, bytes], bool]
"""Whether the peer (its id) made this signature over these bytes."""


class Vote(Record):
    """A seat's signature of `vote_bytes`."""

    seat: PeerId
    signature: Signature


class Seal(Record):
    """`votes`: in the order of their seats' names, each one once."""

    ballot: Ballot
    votes: Annotated[tuple[Vote, ...], Field(min_length=1, max_length=MAX_SEATS)]


class Sealed(Record):
    """A record of the ledger and why it is one."""

    record: Annotated[bytes, Field(max_length=16 * 2**20)]
    seal: Seal


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

    def has_sealed(self, run_id: bytes, round_: int, sealed: Sealed, check: Check = is_signed_by) -> bool:
        """Whether this committee has sealed the record of that round: enough of its seats, one ballot."""
        if self.owner(sealed.seal.ballot) is None:
            return False
        data = vote_bytes(run_id, sealed.seal.ballot, round_, digest_of(sealed.record))
        seats = [vote.seat for vote in sealed.seal.votes]
        if seats != sorted(set(seats)) or not set(seats) <= set(self.seats) or len(seats) < self.need:
            return False
        return all(check(vote.seat, vote.signature, data) for vote in sealed.seal.votes)


def vote_bytes(run_id: bytes, ballot: int, round_: int, digest: bytes) -> bytes:
    """What a vote for a record signs."""
    return b"thinwire vote\n" + run_id + ballot.to_bytes(8, "big") + round_.to_bytes(8, "big") + digest
