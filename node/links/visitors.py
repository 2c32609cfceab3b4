"""Streams that others open to this node: how many, and for how long without a word.

Each costs a file descriptor, of which a process has a thousand. Whoever is on no member list may be on its
way there, and has a moment; of members the one with most streams gives one up when there are too many.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from ...coordinator.protocol.streams import Stream

MAX_STREAMS: Final = 256
MAX_STRANGE: Final = 64
"""Of peers that are no members."""

STRANGE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Visit:
    peer_id: str
    stream: Stream
    is_strange: bool


class Visitors:
    """`is_member`: or may ask otherwise; `most`: streams of one peer. One event loop."""

    def __init__(self, is_member: Callable[[str], bool], most: int) -> None:
        self._is_member, self._most = is_member, most
        self._visits: list[_Visit] = []

    @property
    def n_streams(self) -> int:
        """That are open."""
        return len(self._visits)

    async def serve(self, peer_id: str, stream: Stream, serving: Coroutine[Any, Any, None]) -> None:
        """Runs `serving` until it ends; it is ended, and its stream closed, where there is no room for it.
        Raises what it raises."""
        visit = _Visit(peer_id, stream, not self._is_member(peer_id))
        if not self._has_room(visit):
            serving.close()
            return
        self._visits.append(visit)
        task = asyncio.ensure_future(serving)
        try:
            if visit.is_strange:
                await asyncio.wait({task}, timeout=STRANGE_S)
                if not task.done() and not self._is_member(peer_id):
                    return
            await task
        finally:
            task.cancel()
            self._visits.remove(visit)

    def _has_room(self, visit: _Visit) -> bool:
        n_open = Counter(each.peer_id for each in self._visits)
        if n_open[visit.peer_id] >= self._most:
            return False
        if visit.is_strange and sum(each.is_strange for each in self._visits) >= MAX_STRANGE:
            return False
        if len(self._visits) >= MAX_STREAMS:
            fullest = max(n_open.values())
            may_go = [each for each in self._visits if n_open[each.peer_id] == fullest]
            min(may_go, key=lambda each: each.stream.heard_s).stream.abort()
        return True
