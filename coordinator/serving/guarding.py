"""Who may come in changes while a service runs: at its gate at once, by a record where the ledger tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...compression.errors import ConfigError, ThinwireError
from ..control.orders import Ordered
from ..entry.gate import BANNED, Gate
from ..entry.rules import EntryRules
from ..protocol.messages import MAX_LISTED
from .ordering import Ordering
from .parts import Parts


class Guarding:
    """Of one service. `end`: tells a peer why its session is over; `leaves`: nobody waits for this peer."""

    def __init__(
        self,
        gate: Gate,
        ordering: Ordering,
        parts: Callable[[], Parts],
        end: Callable[[str, ThinwireError], object],
        leaves: Callable[[int, float], None],
    ) -> None:
        self._gate, self._ordering, self._parts = gate, ordering, parts
        self._end, self._leaves = end, leaves

    def guard(
        self,
        banned: frozenset[str],
        token: str,
        told: Sequence[str],
        now_s: float,
        rules: EntryRules | None,
    ) -> Ordered:
        """See `Service.guard`."""
        gate = self._gate
        is_shared = self._ordering.access is not None
        if is_shared and len(banned) > MAX_LISTED:
            raise ConfigError(f"{len(banned)} peers would be banned, a record has room for {MAX_LISTED}")
        if is_shared:
            self._ordering.check_place()
        new, gate.banned = banned - gate.banned, banned
        gate.change_token(token)
        if rules is not None:
            gate.change_rules(rules)
        self._tell(new, told, now_s)
        if not is_shared:
            return Ordered(0, tuple(told), (), is_done=True)
        round_ = self._ordering.share_access(now_s)
        return Ordered(round_, tuple(told), (), access=gate.access)

    def _tell(self, new: frozenset[str], told: Sequence[str], now_s: float) -> None:
        """`new`: who is banned from now on."""
        parts = self._parts()
        for text in told:
            parts.notices.guarded(text)
        for peer_id in sorted(new):
            self._end(peer_id, ConfigError(BANNED))
            index = parts.peers.index(peer_id)
            if index is not None and parts.peers.is_member(peer_id):
                self._leaves(index, now_s)
