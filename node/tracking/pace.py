"""How long the rest of a run takes, by the pace of its last rounds."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from statistics import median
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
        steps = [(b - a, b_s - a_s) for (a, a_s), (b, b_s) in pairwise(self._ended)]
        paces = [seconds / n for n, seconds in steps if n > 0]
        # The median: a round during which the coordinator was away says nothing of the others.
        return (n_rounds - self._ended[-1][0]) * median(paces) if paces else None
