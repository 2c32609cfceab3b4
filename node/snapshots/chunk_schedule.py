"""Which chunk to ask of which holder next: pure, time is an argument (see `node.snapshots.download`)."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

AT_ONCE: Final = 8
"""Chunks under way at a time, overdue ones left out."""

MOST_AT_ONCE: Final = 32
"""Chunks under way at a time at most; each is held in memory."""

FLOOR_S: Final = 2.0
UNMEASURED_S: Final = 10.0
"""A chunk may take this long before any was measured."""

REST_S: Final = 0.5
MAX_REST_S: Final = 8.0
PATIENCE_S: Final = 30.0


@dataclass(slots=True)
class _Holder:
    """What is known of a holder. `chunk`: that it is fetching, since `since_s`."""

    chunk: int | None = None
    since_s: float = 0.0
    n_failures: int = 0
    rests_until_s: float = 0.0
    lied: bool = False


@dataclass(slots=True)
class ChunkSchedule:
    """One chunk at a time from each holder, in an order that `seed` shuffles: several joiners then have
    different chunks, and the holders' disks are read all over.

    A holder that fails rests, each time longer; one that lied is not asked again. When no chunk is left that
    nobody fetches, the ones that take longer than median + 4 MAD are asked of another holder, too: until then
    there is better to do than to fetch something twice. `patience_s`: without hope, until it is given up.
    """

    missing: Sequence[int]
    seed: int
    now_s: float
    patience_s: float = PATIENCE_S
    n_lies: int = 0
    _todo: deque[int] = field(init=False)
    _left: set[int] = field(init=False)
    _holders: dict[str, _Holder] = field(default_factory=dict)
    _took_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    _hope_s: float = field(init=False)
    """When something last gave hope: a chunk, a new holder, one that failed for the first time since."""

    def __post_init__(self) -> None:
        order = list(self.missing)
        random.Random(self.seed).shuffle(order)
        self._todo, self._left = deque(order), set(order)
        self._hope_s = self.now_s

    @property
    def is_done(self) -> bool:
        """No chunk is missing."""
        return not self._left

    @property
    def busy(self) -> list[str]:
        """The holders that are fetching."""
        return [name for name, h in self._holders.items() if h.chunk is not None]

    def assign(self, names: Iterable[str], now_s: float) -> list[tuple[int, str]]:
        """(chunk, holder) to fetch now. `names`: who has the snapshot, as far as is known."""
        found = []
        n_free = self._n_free(now_s)
        for name in names:
            if name not in self._holders:
                self._holders[name] = _Holder()
                self._hope_s = now_s
            holder = self._holders[name]
            if holder.chunk is None and not holder.lied and now_s >= holder.rests_until_s:
                chunk = self._next(now_s) if n_free > 0 else None
                if chunk is not None:
                    holder.chunk, holder.since_s = chunk, now_s
                    n_free -= 1
                    found.append((chunk, name))
        return found

    def arrived(self, chunk: int, name: str, now_s: float) -> bool:
        """The holder gave the chunk. False: it was here already."""
        holder = self._holders[name]
        self._took_s.append(now_s - holder.since_s)
        holder.chunk, holder.n_failures = None, 0
        self._hope_s = now_s
        was_missing = chunk in self._left
        self._left.discard(chunk)
        return was_missing

    def failed(self, chunk: int, name: str, now_s: float, lied: bool) -> None:
        """The holder did not give the chunk, or gave wrong bytes: somebody else gets it next."""
        holder = self._holders[name]
        holder.chunk = None
        holder.n_failures += 1
        if holder.n_failures == 1:
            self._hope_s = now_s
        holder.rests_until_s = now_s + min(MAX_REST_S, REST_S * 2 ** min(holder.n_failures, 10))
        if lied:
            holder.lied = True
            self.n_lies += 1
        if chunk in self._left and not self._since_s(chunk):
            self._todo.appendleft(chunk)

    def hopeless_s(self, now_s: float) -> float:
        """For how long nothing has given hope; 0 while anybody is at work."""
        return 0.0 if self.busy else now_s - self._hope_s

    def is_hopeless(self, now_s: float) -> bool:
        """For much longer than a chunk takes."""
        return self.hopeless_s(now_s) > self.patience_s + (self._limit_s() if self._took_s else 0.0)

    def _next(self, now_s: float) -> int | None:
        if self._todo:
            return self._todo.popleft()
        newest_s = {chunk: max(self._since_s(chunk)) for chunk in self._under_way()}
        overdue = [
            (since_s, chunk) for chunk, since_s in newest_s.items() if now_s - since_s > self._limit_s()
        ]
        return min(overdue)[1] if overdue else None

    def _n_free(self, now_s: float) -> int:
        """How many more may start now. Those that are overdue keep nobody else from working."""
        busy = [h for h in self._holders.values() if h.chunk is not None]
        on_time = sum(now_s - h.since_s <= self._limit_s() for h in busy)
        return min(AT_ONCE - on_time, MOST_AT_ONCE - len(busy))

    def _under_way(self) -> set[int]:
        return {h.chunk for h in self._holders.values() if h.chunk is not None and h.chunk in self._left}

    def _since_s(self, chunk: int) -> list[float]:
        """When each of its fetches began."""
        return [h.since_s for h in self._holders.values() if h.chunk == chunk]

    def _limit_s(self) -> float:
        if not self._took_s:
            return UNMEASURED_S
        middle = median(self._took_s)
        return max(FLOOR_S, middle + 4 * median(abs(t - middle) for t in self._took_s))
