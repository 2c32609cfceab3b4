"""Who leads, and those who want to hear of it at once: a stream that says it again whenever it changes.

A watch session is a session whose Hello `watches`. The node says nothing more; it hears `Elsewhere`, and
heartbeats, from which it sees that the seat is alive. It is no peer of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..protocol.messages import MAX_PEERS, Elsewhere, Heartbeat, SeatEntry, as_text
from ..protocol.streams import BadFrame, Stream

MAX_WATCHERS: Final = MAX_PEERS + 64
"""Every peer of a full run has one such stream to some seat."""

_SEND_S: Final = 10.0
"""A watcher that takes nothing for this long is dropped."""


class WhoLeads:
    """What a seat knows of its committee, as nodes hear it. One event loop."""

    def __init__(self, leader: str | None = None) -> None:
        self.now = Elsewhere(leader=leader, seats=(), waits_for="")
        self._changed = asyncio.Event()

    def tell(
        self, leader: str | None, seats: Sequence[SeatEntry], waits_for: str = "", term: int = 0
    ) -> None:
        """How it is from now on, see `Elsewhere`."""
        now = Elsewhere(leader=leader, seats=tuple(seats), waits_for=as_text(waits_for), term=term)
        if now == self.now:
            return
        self.now = now
        self._changed.set()
        self._changed = asyncio.Event()

    def figures(self, me: str, head: int, lag: int | None) -> dict[str, Any]:
        """JSON-able, as `seat` of a status: what readers go by. `me`: this seat; `head`: the newest round
        here; `lag`: rounds that it is known to be behind, None: nobody has said."""
        role = "leads" if self.now.leader == me else "follows"
        seats = [seat.peer_id for seat in self.now.seats]
        if seats and me not in seats:
            role = "looks on"
        said = {
            "leader": self.now.leader,
            "seats": [{"peer_id": seat} for seat in seats],
            "waits_for": self.now.waits_for,
        }
        return {"peer_id": me, "role": role, "head": head, "lag": lag, "term": self.now.term, **said}

    async def changes_from(self, known: Elsewhere, timeout_s: float) -> None:
        """Returns when it is not `known` any more, or time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.now == known:
                    await self._changed.wait()


class Watchers:
    """Open watch sessions, one of each peer at most. They outlive a change of this seat's role.

    `head`: the newest round here; `beat_s`: the pace of the run's heartbeats.
    """

    def __init__(self, who: WhoLeads, head: Callable[[], int], beat_s: float) -> None:
        self.who, self._head, self.beat_s = who, head, beat_s
        self._streams: dict[str, Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, peer_id: str) -> bool:
        return peer_id in self._streams

    async def serve(self, peer_id: str, stream: Stream) -> None:
        """Until the stream breaks; a newer one of the same peer takes its place. Raises BadFrame, OSError."""
        old = self._streams.pop(peer_id, None)
        if old is not None:
            old.abort()
        if len(self._streams) >= MAX_WATCHERS:
            raise BadFrame("strangers", "too many watch sessions")
        self._streams[peer_id] = stream
        try:
            await self._tell(stream)
        except TimeoutError as e:
            raise OSError("it takes nothing") from e
        finally:
            if self._streams.get(peer_id) is stream:
                del self._streams[peer_id]

    async def _tell(self, stream: Stream) -> None:
        said: Elsewhere | None = None
        while True:
            now = self.who.now
            async with asyncio.timeout(_SEND_S):
                if now != said:
                    await stream.send_message(now)
                else:
                    await stream.send_message(self._heartbeat())
            said = now
            await self.who.changes_from(now, self.beat_s)

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(round=self._head(), sent_bytes=0, received_bytes=0, payload_bytes=0)
