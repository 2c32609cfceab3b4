"""The seats of a run's committee that a node knows, and where they are.

Who a seat is comes from the ticket or from a sealed record, never from what a seat says: one could lie.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from ...coordinator.protocol.messages import Elsewhere, PeerId, SeatEntry
from ...coordinator.protocol.ticket import Ticket

_MAX_ADDRESSES: Final = 32


class KnownSeats:
    """One event loop. `named`: the seats of the newest committee record that the node has."""

    def __init__(self, ticket: Ticket, named: Sequence[SeatEntry] = ()) -> None:
        self._ticket, self._named = ticket, tuple(named)
        self._told: dict[PeerId, tuple[str, ...]] = {}
        self.leader = ticket.peer_id
        """To be tried first: whoever led, as far as this node has heard."""
        self.n_lies = 0
        """How often a seat has named somebody that is no seat as the leader."""
        self._changed = asyncio.Event()

    def __contains__(self, peer_id: object) -> bool:
        return any(seat == peer_id for seat in self.in_order())

    def __len__(self) -> int:
        return len(self.in_order())

    def in_order(self) -> list[PeerId]:
        """As they are to be tried: who led, the committee, and what else the ticket has."""
        entries = (*self._named, *self._ticket.seats)
        known = list(dict.fromkeys(entry.peer_id for entry in entries))
        return sorted(known, key=lambda peer_id: peer_id != self.leader)

    def addresses(self, peer_id: PeerId) -> tuple[str, ...]:
        """Of a seat: by the newest record, by what seats say, by the ticket."""
        named = next((seat.addresses for seat in self._named if seat.peer_id == peer_id), ())
        ticket = next((seat.addresses for seat in self._ticket.others if seat.peer_id == peer_id), ())
        first = self._ticket.addresses if peer_id == self._ticket.peer_id else ()
        every = (*named, *self._told.get(peer_id, ()), *first, *ticket)
        return tuple(dict.fromkeys(every))[:_MAX_ADDRESSES]

    def name(self, seats: Sequence[SeatEntry]) -> None:
        """A sealed record has named these."""
        self._named = tuple(seats)
        self._told = {peer_id: told for peer_id, told in self._told.items() if peer_id in self}
        self._changed.set()
        self._changed = asyncio.Event()

    def heard(self, elsewhere: Elsewhere) -> PeerId | None:
        """What a seat says; returns who leads. None: nobody, or no seat, which is counted as a lie."""
        for seat in elsewhere.seats:
            if seat.peer_id in self:
                self._told[seat.peer_id] = seat.addresses
        if elsewhere.leader is None or elsewhere.leader in self:
            return elsewhere.leader
        self.n_lies += 1
        return None

    async def changed(self) -> None:
        """Returns when the committee is another one."""
        await self._changed.wait()
