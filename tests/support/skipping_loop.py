"""An event loop whose time passes only while nothing is to do: what takes seconds takes none, and a busy
machine changes nothing. For streams within this process; nothing may wait for another thread or process."""

from __future__ import annotations

import asyncio
import selectors


class _Skipping(selectors.DefaultSelector):
    """Instead of waiting for nothing, lets the time pass."""

    passed_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout:
            self.passed_s += timeout
        return ready


class SkippingLoop(asyncio.SelectorEventLoop):
    """For `asyncio.Runner`; see `time`."""

    def __init__(self) -> None:
        self._skipping = _Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.passed_s
