"""What one who leads knows of the others: who answers, and who rests."""

from __future__ import annotations

import math

from .words import Pong


class Reign:
    """Of one leader, who begins with the promises of a majority."""

    def __init__(self, promised: set[str], now_s: float) -> None:
        self.resting: dict[str, bytes] = {}
        """Seats whose votes are lost, and the nonce that a record would have to name: kept from record to
        record, else a seat would rest for ever where they follow quickly."""
        self._began_s = now_s
        self._heard_s = dict.fromkeys(promised, now_s)

    def heard(self, seat: str, pong: Pong, now_s: float) -> None:
        """A seat of the committee answers."""
        self._heard_s[seat] = now_s
        if pong.nonce is None:
            self.resting.pop(seat, None)
        else:
            self.resting[seat] = pong.nonce

    def carried_to_s(self, need: int, patience_s: float) -> float:
        """Until when a majority has answered within the patience, if nobody else does; the leader is one of
        them."""
        answered_s = sorted(self._heard_s.values(), reverse=True)[: need - 1]
        if len(answered_s) < need - 1:
            return self._began_s + patience_s
        return max(self._began_s, min(answered_s, default=math.inf)) + patience_s
