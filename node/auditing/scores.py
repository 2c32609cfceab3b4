"""Who is suspect to this replica: peers whose payloads keep pointing away from those of the others.

It proves nothing, and it is in no ledger: it only decides whether an audit is made that was drawn for
suspects. Replicas score alike, so that all its auditors make it, or none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

from ...coordinator.protocol.messages import MAX_PEERS

WINDOW: Final = 16
"""Of a peer's rounds."""

FEWEST: Final = 6
"""Rounds that a peer was scored in before it is suspect."""


class Scores:
    """Of one replica, of the last rounds. Pure."""

    def __init__(self) -> None:
        self._away: dict[int, deque[bool]] = {}

    def add(self, scores: Mapping[int, float]) -> None:
        """A round's, by peer: the sign counts, and nothing is as bad as the wrong way."""
        for peer, score in scores.items():
            recent = self._away.pop(peer, None) or deque(maxlen=WINDOW)
            recent.append(not score > 0)
            self._away[peer] = recent  # the ones that were scored last are at the end
        while len(self._away) > MAX_PEERS:
            del self._away[next(iter(self._away))]

    def is_suspect(self, peer: int) -> bool:
        """Whether at least three of four scores were not positive."""
        recent = self._away.get(peer, ())
        return len(recent) >= FEWEST and 4 * sum(recent) >= 3 * len(recent)
