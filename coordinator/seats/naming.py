"""Whom the next committee record names: pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from ...compression.errors import ConfigError
from ..control.orders import Order
from ..protocol.figures import short
from ..protocol.messages import MAX_SEATS, Address, CommitteeEntry, SeatEntry


@dataclass(frozen=True, slots=True)
class Wish:
    """Of an operator. `n_seats`: how many seats there are to be, 0: as many as there are; `drops`: one that
    is to go, "": nobody."""

    n_seats: int = 0
    drops: str = ""
    others: frozenset[str] = frozenset()
    """That are to go, too: of several wishes."""

    @property
    def all_drops(self) -> frozenset[str]:
        return self.others | ({self.drops} if self.drops else set())

    @classmethod
    def all_of(cls, wishes: Sequence[Self]) -> Self:
        """The largest number of seats that anybody wants, and without all who are to go."""
        gone = frozenset().union(*(wish.all_drops for wish in wishes))
        return cls(max((wish.n_seats for wish in wishes), default=0), others=gone)


def wish_of(order: Order, seats: Sequence[str]) -> Wish:
    """What an order about seats asks for; `seats`: as they are. Raises ConfigError."""
    if order.what == "seats":
        if not 1 <= order.rounds <= MAX_SEATS:
            raise ConfigError(f"seats: between 1 and {MAX_SEATS}: thinwire run STATE seats 3")
        return Wish(order.rounds)
    if len(order.peers) != 1 or order.peers[0] not in seats:
        raise ConfigError(f"{order.what} whom? One of the coordinators: {', '.join(seats)}")
    if order.what == "remove" and len(seats) == 1:
        raise ConfigError("it is the only coordinator")
    return Wish(len(seats) - 1 if order.what == "remove" else 0, order.peers[0])


def next_seats(
    seats: Sequence[str], ready: Sequence[str], n_seats: int, drops: Collection[str]
) -> tuple[str, ...] | None:
    """The seats as they are wanted. None: as they are, or not yet: who is to come is not ready.

    `ready`: onlookers that have all that a seat must have, in the order in which they came; `n_seats`: how
    many there are to be, 0: as many as there are; `drops`: those that are to go. One step at a time: a new
    one takes the place of one that goes, unless there are to be fewer; only then others come.
    """
    waiting = [seat for seat in ready if seat not in seats]
    gone = [seat for seat in seats if seat in drops]
    n_missing = (n_seats or len(seats)) - len(seats)
    if gone and n_missing < 0:
        left = [seat for seat in seats if seat not in gone[:-n_missing]]
        return tuple(left) if left else None
    if gone and waiting:
        return tuple(waiting[0] if seat == gone[0] else seat for seat in seats)
    if 0 < n_missing <= len(waiting):
        return (*seats, *waiting[:n_missing])
    return None


def entry_of(
    seats: Sequence[str], places: Mapping[str, Sequence[Address]], recovery: bytes
) -> CommitteeEntry:
    """More than half of them must sign. `recovery`: digest of the recovery key, where the run has none."""
    entries = tuple(SeatEntry(peer_id=seat, addresses=tuple(places.get(seat, ()))[:8]) for seat in seats)
    return CommitteeEntry(seats=entries, need=len(entries) // 2 + 1, recovery=recovery)


def told(seats: Sequence[str], reachable: Collection[str], me: str, state: str) -> str:
    """Why nobody leads, for people: what is missing, and what helps. "": a majority is there.

    `reachable`: seats that this one has a stream to; `state`: how to name its folder in a command.
    """
    here = [seat for seat in seats if seat == me or seat in reachable]
    need = len(seats) // 2 + 1
    if len(here) >= need:
        return ""
    missing = ", ".join(short(seat) for seat in seats if seat not in here)
    return (
        f"{len(here)} of {len(seats)} coordinators reachable; training waits until {need} are. Missing: "
        f"{missing}: start them again (thinwire coordinator, as before). If they are lost for ever: "
        f"thinwire coordinator --state {state} --recover, with the run's recovery key"
    )
