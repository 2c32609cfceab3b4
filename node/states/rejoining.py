"""Back into a run without a ticket: its ledger names the coordinators, where there are several."""

from __future__ import annotations

from pathlib import Path

from ...compression.errors import ConfigError
from ...coordinator.protocol.ticket import Ticket
from .opening import open_state


def ticket_in(path: Path) -> Ticket:
    """For a node that has been in the run of this state folder: whom the ledger names as the run's
    coordinators. Peers that a commit has admitted need no token. Raises ConfigError (no committee was ever
    named: only a ticket says where the coordinator is) or LedgerCorrupt."""
    with open_state(path) as state:
        seats = [seat for seat in state.seats if seat.addresses]
        if not seats:
            raise ConfigError(
                f"{path}: its ledger names no committee of coordinators, so only a ticket says where the "
                f"coordinator is: thinwire join TICKET --state {path}"
            )
        first, *others = seats
        return Ticket(
            peer_id=first.peer_id,
            addresses=first.addresses,
            run_id=state.run_id,
            token="",
            others=tuple(others),
        )
