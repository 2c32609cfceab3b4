"""How long to wait for something, learnt from how long it took before: nothing for a user to guess."""

from __future__ import annotations

from collections import deque
from statistics import median

KEPT_TIMES = 16
MEASURED_TIMES = 3
"""Until this many times are known the wait is the longest one."""


class Patience:
    """median + max(k MAD, 0.5 median) of the last times, between `floor_s` and `ceiling_s`.

    A wait that ran out says that the times have changed: each doubles the next one, until something comes.
    """

    def __init__(self, *, floor_s: float, ceiling_s: float, k: float = 4.0) -> None:
        self._floor_s, self._ceiling_s, self._k = floor_s, ceiling_s, k
        self._times: deque[float] = deque(maxlen=KEPT_TIMES)
        self._factor = 1.0

    def took(self, time_s: float) -> None:
        """It came, after so long."""
        self._times.append(time_s)
        self._factor = 1.0

    def ran_out(self) -> None:
        """It did not come within `limit_s`."""
        self._factor = min(2 * self._factor, 2.0**10)

    @property
    def limit_s(self) -> float:
        """Seconds to wait for it the next time."""
        if len(self._times) < MEASURED_TIMES:
            return self._ceiling_s
        middle = median(self._times)
        mad = median(abs(t - middle) for t in self._times)
        usual_s = max(middle + max(self._k * mad, 0.5 * middle), self._floor_s)
        return min(self._factor * usual_s, self._ceiling_s)
