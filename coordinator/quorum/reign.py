"""What one who leads knows of the others: who answers, and who rests."""

from __future__ import annotations

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

    def is_carried(self, need: int, patience_s: float, now_s: float) -> bool:
        """Whether a majority has answered within the patience; the leader is one of them."""
        n_alive = 1 + sum(now_s - heard_s <= patience_s for heard_s in self._heard_s.values())
        return n_alive >= need or now_s - self._began_s <= patience_s
