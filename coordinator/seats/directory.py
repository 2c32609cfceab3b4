"""Where seats are reached, as far as is known here, and whom to dial."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..ledger import Ledger
from ..protocol.messages import Address, SeatEntry
from .link import Addresses


class Directory:
    """`ours`: addresses of this seat."""

    def __init__(
        self, me: str, ledger: Ledger, places: Sequence[SeatEntry], ours: Callable[[], Addresses]
    ) -> None:
        """`places`: of the seat ticket."""
        self._me, self._ledger, self._places, self._ours = me, ledger, tuple(places), ours
        self._told: dict[str, Addresses] = {}
        """By the seats themselves."""

    def told(self, seat: str, addresses: Addresses) -> bool:
        """Whether it is new that the seat is reached there."""
        if not addresses or self._told.get(seat) == addresses:
            return False
        self._told[seat] = addresses
        return True

    def addresses(self) -> dict[str, Addresses]:
        """Of all seats: as they say, as the ledger says, as the seat ticket says."""
        found: dict[str, list[Address]] = {self._me: list(self._ours())}
        for seat, addresses in self._told.items():
            found.setdefault(seat, []).extend(addresses)
        for place in (*self._ledger.seats, *self._places):
            found.setdefault(place.peer_id, []).extend(place.addresses)
        return {seat: tuple(dict.fromkeys(addresses)) for seat, addresses in found.items()}

    def seats(self) -> tuple[SeatEntry, ...]:
        """Of the committee."""
        known = self.addresses()
        return tuple(
            SeatEntry(peer_id=seat, addresses=known.get(seat, ())[:8])
            for seat in self._ledger.committee.seats
        )

    def to_dial(self) -> dict[str, Addresses]:
        """The committee; who looks on asks also those that its ticket names."""
        known, wanted = self.addresses(), set(self._ledger.committee.seats)
        if self._me not in wanted:
            wanted.update(place.peer_id for place in self._places)
        return {seat: known.get(seat, ()) for seat in wanted if seat != self._me}
