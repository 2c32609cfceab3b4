"""What was not let in, by the peer that brought it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ..protocol.messages import Rejected

KEPT_PEERS: Final = 1024
"""Those that were refused something last."""


class Refusals:
    """Since the coordinator was started. `rejected`: all that is refused, by reason; counted elsewhere."""

    def __init__(self, rejected: Counter[Rejected]) -> None:
        self._rejected = rejected
        self._by_peer: dict[int, Counter[Rejected]] = {}

    @contextmanager
    def of(self, peer: int | None) -> Iterator[None]:
        """What is counted meanwhile is this peer's; None: nobody's that is known."""
        before = self._rejected.copy()
        try:
            yield
        finally:
            if peer is not None and self._rejected != before:
                counts = self._by_peer.pop(peer, None) or Counter()
                counts.update(self._rejected - before)
                self._by_peer[peer] = counts
                if len(self._by_peer) > KEPT_PEERS:
                    del self._by_peer[next(iter(self._by_peer))]

    def by(self, peer: int) -> dict[Rejected, int]:
        """Reason -> how often, of those that there were."""
        return dict(sorted(self._by_peer.get(peer, {}).items()))
