"""What has happened in a run since its coordinator was started: counts for metrics, the run needs none."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..protocol.exposition import BUCKETS_S


@dataclass(slots=True)
class Counters:
    """Keys are of fixed, small sets: they become labels."""

    closed: Counter[str] = field(default_factory=Counter)
    """Rounds by why they were closed (`rounds.Why`)."""
    joined: Counter[str] = field(default_factory=Counter)
    """Sessions that were opened: of new peers, and of returned ones."""
    left: Counter[str] = field(default_factory=Counter)
    """Peers that are gone, by cause (`membership.Cause`)."""
    _durations: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    _total_s: float = 0.0

    def round_closed(self, why: str, duration_s: float) -> None:
        """`why`: see `rounds.Why`; `duration_s`: from its opening to its commit."""
        self.closed[why] += 1
        self._durations[bisect_left(BUCKETS_S, duration_s)] += 1
        self._total_s += duration_s

    def figures(self) -> dict[str, Any]:
        """JSON-able. Durations: rounds that took at most BUCKETS_S[i] and more than the bound before; the
        last entry has the longer ones."""
        return {
            "closed": dict(self.closed),
            "joined": dict(self.joined),
            "left": dict(self.left),
            "durations": list(self._durations),
            "durations_s": self._total_s,
        }
