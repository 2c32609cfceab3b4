"""How large peers' payloads are beside each other, as this node's replica has weighed them; for people."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Final, Protocol

from ...coordinator.protocol.messages import MAX_PEERS, MAX_SIZES, PeerSize

RECENT_OFFERS: Final = 16
"""Of a peer."""

FORGOTTEN_AFTER: Final = 64
"""Rounds in which a peer had no payload."""

_MOST: Final = 1e6


class Weighed(Protocol):
    """What a round made of a payload: its norm in lower medians, and what it was scaled by, at most 1."""

    @property
    def size(self) -> float: ...

    @property
    def kept(self) -> float: ...


@dataclass(slots=True)
class _Seen:
    round: int = 0
    sizes: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_OFFERS))
    clipped: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT_OFFERS))

    def size(self) -> float:
        return median(self.sizes)

    def clipped_share(self) -> float:
        return sum(self.clipped) / len(self.clipped)


class PeerSizes:
    """Fed by the node's thread, asked from any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[int, _Seen] = {}
        """By the peer's index."""
        self._told = -1
        """The last index that was told."""

    def weighed(self, round_: int, found: Iterable[tuple[int, Weighed]]) -> None:
        """A round that was applied: what it made of each peer's payload, by the peer's index."""
        with self._lock:
            for peer, one in found:
                if not math.isnan(one.size):
                    seen = self._seen.pop(peer, None) or _Seen()
                    self._seen[peer] = seen  # in the order of their last payloads
                    seen.round = round_
                    seen.sizes.append(min(one.size, _MOST))
                    seen.clipped.append(one.kept < 1.0)
            while self._seen and self._is_too_old(round_):
                del self._seen[next(iter(self._seen))]

    def _is_too_old(self, round_: int) -> bool:
        oldest = next(iter(self._seen.values()))
        return len(self._seen) > MAX_PEERS or oldest.round < round_ - FORGOTTEN_AFTER

    def next(self) -> tuple[PeerSize, ...]:
        """Those of the next few peers, in turn, for a heartbeat."""
        with self._lock:
            peers = sorted(self._seen, key=lambda peer: (peer <= self._told, peer))[:MAX_SIZES]
            self._told = peers[-1] if peers else -1
            return tuple(
                PeerSize(
                    peer=peer,
                    size=round(100 * self._seen[peer].size()),
                    clipped=round(100 * self._seen[peer].clipped_share()),
                )
                for peer in sorted(peers)
            )

    def largest(self) -> float:
        """In medians; NaN: nothing is known."""
        with self._lock:
            return max((seen.size() for seen in self._seen.values()), default=math.nan)

    def clipped(self) -> float:
        """Share of all recent payloads that were scaled down; NaN: nothing is known."""
        with self._lock:
            found = [is_clipped for seen in self._seen.values() for is_clipped in seen.clipped]
        return sum(found) / len(found) if found else math.nan
