"""When a state machine's time passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Pulse:
    """Calls `beat`, which says in how many seconds it wants to be called again; None: not by itself. Belongs
    to one event loop."""

    def __init__(self, beat: Callable[[], float | None]) -> None:
        self._beat = beat
        self._timer: asyncio.TimerHandle | None = None
        self._is_soon = self._is_over = False

    def now(self) -> None:
        self.rest()
        again_s = self._beat()
        if again_s is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.001, again_s), self.now)

    def soon(self) -> None:
        """Once the loop has done what is ready now."""
        if self._is_over or self._is_soon:
            return
        self.rest()
        self._is_soon = True
        self._timer = asyncio.get_running_loop().call_later(0, self.now)

    def rest(self) -> None:
        """Until it is called for."""
        self._is_soon = False
        if self._timer is not None:
            self._timer.cancel()

    def end(self) -> None:
        """Nobody can ask for it any more: only what it asked for itself still comes, until `rest`."""
        self._is_over = True
