"""How large peers' payloads are beside each other. The coordinator opens none: nodes tell, each of all peers.

What one node says of another is hearsay. Shown is what half of those that tell agree on, and only peers with
counted work are listened to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median_low
from typing import Final, NamedTuple

from ..protocol.messages import PeerSize

MAX_NODES: Final = 31
"""That are remembered to have told of a peer: the last ones."""

LEAST_NODES: Final = 2
STALE_S: Final = 600.0


class Size(NamedTuple):
    """`size`: of a peer's payloads, in medians of a round; `clipped`: share of them that were scaled down for
    that; `n_nodes`: those who say so."""

    size: float
    clipped: float
    n_nodes: int


class _Told(NamedTuple):
    at_s: float
    size: int
    clipped: int


class PeerSizes:
    """`is_heard`: whether a peer may tell; `is_known`: whether a peer is told of. Both by index."""

    def __init__(self, is_heard: Callable[[int], bool], is_known: Callable[[int], bool]) -> None:
        self._is_heard, self._is_known = is_heard, is_known
        self._told: dict[int, dict[int, _Told]] = {}
        """Peer -> who has told of it -> what."""

    def heard(self, node: int, sizes: Iterable[PeerSize], now_s: float) -> None:
        """What a node says in a heartbeat."""
        if not self._is_heard(node):
            return
        for one in sizes:
            if self._is_known(one.peer):
                told = self._told.setdefault(one.peer, {})
                told.pop(node, None)
                told[node] = _Told(now_s, one.size, one.clipped)
                if len(told) > MAX_NODES:
                    del told[next(iter(told))]

    def of(self, peer: int, now_s: float) -> Size | None:
        """None: too few nodes have told of it lately."""
        told = [
            one
            for node, one in self._told.get(peer, {}).items()
            if now_s < one.at_s + STALE_S and self._is_heard(node)
        ]
        if len(told) < LEAST_NODES:
            return None
        size, clipped = median_low(one.size for one in told), median_low(one.clipped for one in told)
        return Size(size / 100, clipped / 100, len(told))
