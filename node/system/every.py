"""What a loop does every few seconds only, such as telling people how far it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Every:
    """Due `seconds` after it was made (`at_once`: at first, too), and after each time it was due. `clock`:
    monotonic seconds."""

    def __init__(
        self, seconds: float, clock: Callable[[], float] = time.monotonic, *, at_once: bool = False
    ) -> None:
        self._seconds, self._clock = seconds, clock
        self._last_s = -math.inf if at_once else clock()

    def is_due(self) -> bool:
        """True: the next one is `seconds` from now."""
        now_s = self._clock()
        if now_s - self._last_s < self._seconds:
            return False
        self._last_s = now_s
        return True
