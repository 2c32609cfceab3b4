"""What the operator of a coordinator wants of it as a seat, and what its state folder has for that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..protocol.messages import SeatEntry
from ..quorum.events import Timing
from .naming import Wish
from .ticket import kept_ticket, new_secret


@dataclass(frozen=True, slots=True)
class SeatPlan:
    """`secret`: who shows it may look on; `places`: where seats were reached last; `wish`: of the committee;
    `wants_seat`: this one is to be named; `waits_for_payloads`: False: offers count of which only the leader
    has the payload."""

    secret: bytes
    places: tuple[SeatEntry, ...] = ()
    wish: Wish = Wish()  # noqa: RUF009 - frozen
    wants_seat: bool = True
    waits_for_payloads: bool = True
    timing: Timing = Timing()  # noqa: RUF009 - frozen

    @classmethod
    def of(cls, folder: Path, wish: Wish = Wish()) -> SeatPlan:  # noqa: B008 - frozen
        """As the state folder's seat ticket says; with a new secret, if it has none. Raises ConfigError."""
        ticket = kept_ticket(folder)
        return cls(new_secret(), (), wish) if ticket is None else cls(ticket.secret, ticket.seats, wish)
