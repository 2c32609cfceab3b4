"""What a seat stands on in these worlds: records without content, keys without secrets, disks that fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import msgpack

from thinwire.coordinator.protocol.messages import BadMessage, digest_of
from thinwire.coordinator.protocol.trust.seals import Committee, Sealed
from thinwire.coordinator.quorum.disk import Place, VoteState

RUN = b"r" * 32


class Fault(AssertionError):
    """What the oracle has found."""


class PowerCut(Exception):
    """While a disk was written."""


@dataclass(frozen=True)
class Body:
    """A record of these schedules."""

    round: int
    parent: bytes
    number: int
    seats: tuple[str, ...] = ()
    """The committee from the next round on; (): as before."""
    reseated: tuple[str, bytes] | None = None
    """A seat that need not rest any more, and its nonce."""

    def packed(self) -> bytes:
        plain = (self.round, self.parent, self.number, self.seats, self.reseated)
        packed: bytes = msgpack.packb(plain)
        return packed

    @classmethod
    def of(cls, record: bytes) -> Body:
        return cls(*msgpack.unpackb(record, use_list=False))


class Records:
    """What a coordinator would check is not the matter here; but payloads may be missing for a while."""

    def __init__(self, is_here: Callable[[], bool] = lambda: True) -> None:
        self._is_here = is_here

    def place(self, record: bytes) -> Place:
        try:
            body = Body.of(record)
        except (ValueError, TypeError, msgpack.UnpackException) as e:
            raise BadMessage("no record") from e
        return Place(body.round, body.parent, bool(body.seats))

    def may_vote(self, record: bytes, work: bytes) -> bool:
        return self._is_here()


@dataclass
class Key:
    """A quick stand-in for a signature: whoever knows a seat's name could forge it, and nobody does."""

    seat: str
    signed: Callable[[str, bytes], None] = lambda _seat, _data: None

    def sign(self, data: bytes) -> bytes:
        self.signed(self.seat, data)
        return _signature(self.seat, data)

    def check(self, seat: str, signature: bytes, data: bytes) -> bool:
        return signature == _signature(seat, data)


def _signature(seat: str, data: bytes) -> bytes:
    return blake2b(data, key=seat.encode(), digest_size=64).digest()


@dataclass
class Disk:
    """Outlives its seat's process."""

    committee: Committee
    records: list[Sealed] = field(default_factory=list)
    head_digest: bytes = RUN
    vote: VoteState = field(default_factory=VoteState)
    vote_before: VoteState = field(default_factory=VoteState)
    rests: bytes | None = None
    me: str = ""
    fate: Callable[[str], Exception | None] = lambda _when: None
    """What befalls "before" and "after" something is written."""
    appended: Callable[[Body, bytes], None] = lambda _body, _digest: None

    @property
    def head(self) -> int:
        return len(self.records)

    def save_vote(self, vote: VoteState) -> None:
        self._befall("before")
        self.vote_before, self.vote = self.vote, vote
        self._befall("after")

    def append(self, *sealed: Sealed) -> None:
        bodies, epoch = [Body.of(one.record) for one in sealed], self.committee.epoch
        self._befall("before")
        for body, one in zip(bodies, sealed, strict=True):
            if (body.round, body.parent) != (self.head + 1, self.head_digest):
                raise Fault(f"{self.me} appends a record that does not follow")
            if self.committee.epoch != epoch:
                raise Fault(f"{self.me} appends what it has not checked: the committee has changed")
            self.records.append(one)
            self.head_digest = digest_of(one.record)
            if body.seats:
                self.committee = Committee.majority(body.round, body.seats)
            if body.reseated == (self.me, self.rests):
                self.rests = None
            self.appended(body, self.head_digest)
        self._befall("after")

    def after(self, round_: int, limit: int) -> list[Sealed]:
        return self.records[round_ : round_ + limit]

    def copy(self) -> Disk:
        return replace(self, records=list(self.records))

    def _befall(self, when: str) -> None:
        error = self.fate(when)
        if error is not None:
            raise error
