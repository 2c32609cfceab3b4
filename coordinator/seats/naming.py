"""Whom the next committee record names: pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ..protocol.messages import Address, CommitteeEntry, SeatEntry


def next_seats(
    seats: Sequence[str], ready: Sequence[str], n_seats: int, drops: Collection[str]
) -> tuple[str, ...] | None:
    """The seats as they are wanted. None: as they are, or not yet: who is to come is not ready.

    `ready`: onlookers that have all that a seat must have, in the order in which they came; `n_seats`: how
    many there are to be, 0: as many as there are; `drops`: those that are to go. A new one takes the place of
    one that goes, unless there are to be fewer.
    """
    waiting = [seat for seat in ready if seat not in seats]
    wanted: list[str] = []
    n_wanted = n_seats or len(seats)
    n_too_many = max(0, len(seats) - n_wanted)
    for seat in seats:
        if seat not in drops:
            wanted.append(seat)
        elif n_too_many:
            n_too_many -= 1
        elif waiting:
            wanted.append(waiting.pop(0))
        else:
            wanted.append(seat)
    n_missing = n_wanted - len(wanted)
    if 0 < n_missing <= len(waiting):
        wanted += waiting[:n_missing]
    return tuple(wanted) if wanted and tuple(wanted) != tuple(seats) else None


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
    missing = ", ".join(seat for seat in seats if seat not in here)
    return (
        f"{len(here)} of {len(seats)} coordinators reachable; training waits until {need} are. Missing: "
        f"{missing}: start them again (thinwire coordinator, as before). If they are lost for ever: "
        f"thinwire coordinator --state {state} --recover, with the run's recovery key"
    )
