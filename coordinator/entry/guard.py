"""Orders about who may come in, as the state folder keeps them: bans, and the token of the run's tickets."""

from __future__ import annotations

from ...compression.errors import ConfigError
from ..control.orders import Order
from ..state import StateDir


def guard(state: StateDir, order: Order) -> tuple[str, ...]:
    """Does it, and says so. Raises ConfigError for what is refused, with nothing done."""
    if order.what == "rotate-token":
        state.rotate_token()
        state.token()
        return (
            "a new token: tickets given out so far let no newcomer in; invitations do, and who is in stays",
        )
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
