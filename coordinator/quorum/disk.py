"""What a seat of a committee keeps, and how it sees records: contracts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..protocol.trust.seals import Committee, Sealed
from .words import Accepted


@dataclass(frozen=True, slots=True)
class VoteState:
    """Of ballots of one epoch. `promised`: no vote for a lower one; `accepted`: the last vote."""

    epoch: int = 0
    promised: int = 0
    accepted: Accepted | None = None


class SeatDisk(Protocol):
    """Of one seat. What is written is durable when a method returns; where one raises OSError, all of it or
    nothing is written. A copy of an older state must not come back as if it were this one: see `rests`."""

    @property
    def head(self) -> int:
        """The newest sealed round; 0: none."""
        ...

    @property
    def head_digest(self) -> bytes:
        """Of its record."""
        ...

    @property
    def committee(self) -> Committee:
        """That seals the record after the head."""
        ...

    @property
    def vote(self) -> VoteState: ...

    @property
    def rests(self) -> bytes | None:
        """A nonce: the votes of this seat are lost, and it gives none until a sealed record names the nonce.
        None: it does not rest."""
        ...

    def save_vote(self, vote: VoteState) -> None: ...

    def append(self, *sealed: Sealed) -> None:
        """The records after the head, which were checked; with what they say of committee and resting seats.
        Only the last one may name a committee."""
        ...

    def after(self, round_: int, limit: int) -> Iterable[Sealed]:
        """At most so many from that round + 1 on; better read one by one: who asks takes what fits."""
        ...


class Place(NamedTuple):
    """What a record says of itself. `parent`: its digest."""

    round: int
    parent: bytes
    names_committee: bool


class Records(Protocol):
    """What a seat must know of records that are not sealed yet."""

    def place(self, record: bytes) -> Place:
        """Raises BadMessage for what is no record."""
        ...

    def may_vote(self, record: bytes, work: bytes) -> bool:
        """Whether it follows the head, says nothing wrong, and every payload that it names is here. `work`:
        the signatures of its offers. Asked again later: time to fetch what is not here yet."""
        ...


class Signer(Protocol):
    """This seat's key."""

    seat: str

    def sign(self, data: bytes) -> bytes: ...

    def check(self, seat: str, signature: bytes, data: bytes) -> bool:
        """Whether that seat's key made the signature."""
        ...
