"""Orders about who may come in, as the state folder keeps them: bans, and the token of the run's tickets."""

from __future__ import annotations

import logging

from ...compression.errors import ConfigError
from ..control.orders import MODES, Order
from ..protocol.figures import counted
from ..protocol.messages import AccessEntry
from ..protocol.ticket import Ticket
from ..state import StateDir
from .rules import EntryRules

log = logging.getLogger("thinwire.coordinator")


def guard(state: StateDir, order: Order, access: AccessEntry | None = None) -> tuple[str, ...]:
    """Does it, and says so. `access`: as the ledger has it, if it does: then that is changed, whatever this
    folder says. Raises ConfigError for what is refused, with nothing done, or not written."""
    try:
        if access is not None:
            state.save_banned(access.banned)
        return _done(state, order)
    except OSError as e:
        raise ConfigError(f"{state.path} cannot be written: {e.strerror}") from e


def save_address(state: StateDir, ticket: Ticket) -> None:
    """For tickets that are made beside the coordinator; without it none can be."""
    try:
        state.save_address(ticket.model_copy(update={"token": ""}).line())
    except OSError as e:
        log.warning("%s cannot be written (%s): thinwire invite has no address", state.path, e.strerror)


def _done(state: StateDir, order: Order) -> tuple[str, ...]:
    if order.what == "rotate-token":
        state.rotate_token()
        return (
            "a new token: tickets given out so far let no newcomer in; invitations do, and who is in stays",
        )
    if order.what in MODES:
        rules = rules_of(order)
        state.save_rules(rules)
        return (_told(rules),)
    if not order.peers:
        raise ConfigError(f"{order.what} whom? A peer id, as thinwire status shows it: 12D3Koo...")
    if order.what == "ban":
        state.ban(order.peers)
        return tuple(f"{peer_id} is banned: it is not let in any more" for peer_id in order.peers)
    strange = [peer_id for peer_id in order.peers if peer_id not in state.banned()]
    if strange:
        raise ConfigError(f"{strange[0]} is not banned; who is stands in {state.path / 'banned'}")
    state.unban(order.peers)
    return tuple(f"{peer_id} may come in again" for peer_id in order.peers)


def rules_of(order: Order) -> EntryRules:
    """What an order of `MODES` says. Raises ConfigError."""
    if (order.what == "listed") != bool(order.peers):
        raise ConfigError(
            "listed takes the peer ids (12D3Koo...) of all who may come in; open and invited take none"
        )
    return EntryRules.of(order.what, order.peers)


def _told(rules: EntryRules) -> str:
    who = {
        "open": "who shows the run's ticket, or an invitation",
        "invited": "who has an invitation",
        "listed": f"{counted(len(rules.peers), 'listed peer')}, and nobody else",
    }
    return f"from now on comes in: {who[rules.mode]}; sessions go on"
