"""What time it is for who leads: a record from a time to come gets no votes, and is proposed for ever."""

from __future__ import annotations

from collections.abc import Callable, Collection


class Clocks:
    """Of the seats, as one of them knows them. `wall_ms`: this machine's."""

    def __init__(self, wall_ms: Callable[[], int]) -> None:
        self.wall_ms = wall_ms
        self._ahead_ms: dict[str, float] = {}
        """How far a seat's clock was ahead of `now_s` when it was told last."""

    def heard(self, seat: str, time_ms: int, now_s: float) -> None:
        """`time_ms`: by the seat's clock; 0: not told."""
        if time_ms:
            self._ahead_ms[seat] = time_ms - now_s * 1000

    def time_ms(self, seats: Collection[str], now_s: float) -> int:
        """By this machine's clock, but not later than by half of those of `seats` that are known: neither a
        wrong clock here nor one seat's word makes a time to come; where the word is too early, records have
        the time of the one before."""
        own_ms = self.wall_ms()
        self._ahead_ms = {seat: ms for seat, ms in self._ahead_ms.items() if seat in seats}
        ahead_ms = sorted([own_ms - now_s * 1000, *self._ahead_ms.values()])
        return min(own_ms, int(ahead_ms[(len(ahead_ms) - 1) // 2] + now_s * 1000))
