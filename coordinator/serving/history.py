"""What the page shows of a run's past, on the coordinator's disk."""

from __future__ import annotations

import logging
import threading

from ..state import StateDir

log = logging.getLogger("thinwire.coordinator")


class KeptHistory:
    """In its state folder; from any thread."""

    def __init__(self, state: StateDir) -> None:
        self._state, self._saving, self._kept = state, threading.Lock(), b""

    def save(self, data: bytes) -> None:
        """Unless it is there already."""
        with self._saving:
            if data == self._kept:
                return
            try:
                self._state.save_history(data)
            except OSError as e:
                log.warning("what the page shows of the past cannot be kept: %s", e)
            self._kept = data
