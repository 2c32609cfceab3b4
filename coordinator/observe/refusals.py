"""What was not let in, by the peer that brought it."""

from __future__ import annotations

from collections import Counter
from typing import Final

from ..protocol.messages import Rejected

KEPT_PEERS: Final = 1024
"""Those that were refused something last."""


class Refusals:
    """Since the coordinator was started. `rejected`: all that is refused, by reason; counted elsewhere."""

    def __init__(self, rejected: Counter[Rejected]) -> None:
        self.rejected = rejected
        self._by_peer: dict[int, Counter[Rejected]] = {}

    def of(self, peer: int | None) -> Meanwhile:
        """What is counted meanwhile is this peer's; None: nobody's that is known."""
        return Meanwhile(self, peer)

    def count(self, peer: int, more: Counter[Rejected]) -> None:
        """So many more of this peer's."""
        counts = self._by_peer.pop(peer, None) or Counter()
        counts.update(more)
        self._by_peer[peer] = counts
        if len(self._by_peer) > KEPT_PEERS:
            del self._by_peer[next(iter(self._by_peer))]

    def by(self, peer: int) -> dict[Rejected, int]:
        """Reason -> how often, of those that there were."""
        return dict(sorted(self._by_peer.get(peer, {}).items()))


class Meanwhile:
    """A context; entered for every message, so that it is a plain class."""

    __slots__ = ("_before", "_peer", "_refusals")

    def __init__(self, refusals: Refusals, peer: int | None) -> None:
        self._refusals, self._peer = refusals, peer
        self._before: dict[Rejected, int] = {}

    def __enter__(self) -> None:
        self._before = dict(self._refusals.rejected)

    def __exit__(self, *_: object) -> None:
        now = self._refusals.rejected
        if self._peer is not None and now != self._before:
            self._refusals.count(self._peer, now - Counter(self._before))
