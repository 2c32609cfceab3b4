"""Time for a `LocalSwarm` that passes only while all of its threads wait: hours of work take moments.

What a node's work takes is told by `sleep`; all else takes no time. As long as no two things happen at the
same time, every execution is the same.
"""

from __future__ import annotations

import math
import threading


class ScriptedClock:
    """`n_threads`: how many take part, the swarm's own one included. See `link_local.Clock`."""

    def __init__(self, n_threads: int) -> None:
        self._n_threads = n_threads
        self._now_s = 0.0
        self._waiting: dict[int, float] = {}

    def now_s(self) -> float:
        return self._now_s

    def wait(self, changed: threading.Condition, until_s: float | None) -> None:
        me = threading.get_ident()
        self._waiting[me] = math.inf if until_s is None else until_s
        self._move_on(changed)
        while me in self._waiting:
            changed.wait()

    def notify(self, changed: threading.Condition) -> None:
        self._waiting.clear()
        changed.notify_all()

    def sleep(self, changed: threading.Condition, seconds: float) -> None:
        """The calling thread works for so long."""
        with changed:
            until_s = self._now_s + seconds
            while self._now_s < until_s:
                self.wait(changed, until_s)

    def leave(self, changed: threading.Condition) -> None:
        """The calling thread takes part no more."""
        with changed:
            self._n_threads -= 1
            self._move_on(changed)

    def _move_on(self, changed: threading.Condition) -> None:
        # The swarm's own thread alone would never let go of the lock again.
        if len(self._waiting) == self._n_threads > 1:
            self._now_s = max(self._now_s, min(self._waiting.values()))
            assert self._now_s < math.inf, "everybody waits for ever"
            self.notify(changed)
