"""How long the rest of a run takes, by the pace of its last rounds."""

from __future__ import annotations

from collections import deque
from typing import Final

RECENT_ROUNDS: Final = 16


class Pace:
    """Of rounds as this node sees them end. Times are in seconds."""

    def __init__(self) -> None:
        self._ended: deque[tuple[int, float]] = deque(maxlen=RECENT_ROUNDS)

    def ended(self, round_: int, now_s: float) -> None:
        """The round is over, and so are those before it."""
        self._ended.append((round_, now_s))

    def left_s(self, n_rounds: int) -> float | None:
        """Until this many rounds are over; None: too few were seen."""
        if not self._ended:
            return None
        (first, first_s), (last, last_s) = self._ended[0], self._ended[-1]
        if last == first or last_s <= first_s:
            return None
        return (n_rounds - last) * (last_s - first_s) / (last - first)
