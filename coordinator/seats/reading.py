"""The ledger for those who only read, from a seat that does not lead: when nobody does, and for nodes that
know its committee from no record yet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from ..entry.rates import PeerRates
from ..ledger import Ledger
from ..protocol.messages import Follow, Head, Heartbeat, NodeState, State, Welcome
from ..protocol.streams import FROM_NODE, BadFrame, Stream
from ..sessions import Session

MAX_READERS: Final = 32


class Readers:
    """Open sessions of readers, one of each peer at most; none of them is a peer of the run. One event loop.

    `kept_from`: payloads of the rounds from there on are here; `beat_s`: the pace of the run's heartbeats.
    """

    def __init__(self, ledger: Ledger, rates: PeerRates, kept_from: Callable[[], int], beat_s: float) -> None:
        self._ledger, self._rates, self._kept_from, self._beat_s = ledger, rates, kept_from, beat_s
        self._sessions: dict[str, Session] = {}

    def __contains__(self, peer_id: str) -> bool:
        return peer_id in self._sessions

    async def serve(self, peer_id: str, stream: Stream) -> None:
        """Until the reader leaves or the stream breaks; a newer session of the same peer takes its place.
        Raises BadMessage, EOFError or OSError."""
        old = self._sessions.pop(peer_id, None)
        if old is not None:
            old.stream.abort()
        if len(self._sessions) >= MAX_READERS:
            raise BadFrame("strangers", "too many sessions of readers")
        session = self._sessions[peer_id] = Session(peer_id, 0, stream)
        await stream.send_message(self._welcome())
        tasks = [asyncio.create_task(session.write(self._ledger.commits))]
        tasks.append(asyncio.create_task(self._beat(session)))
        try:
            await self._read(session)
        finally:
            if self._sessions.get(peer_id) is session:
                del self._sessions[peer_id]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _welcome(self) -> Welcome:
        return Welcome(
            genesis=self._ledger.genesis_record,
            signature=self._ledger.genesis_signature,
            head_round=self._ledger.head_round,
            head_digest=self._ledger.head_digest,
            kept_from=self._kept_from(),
            peer_index=0,
            heartbeat_s=self._beat_s,
            is_copy=True,
        )

    async def _beat(self, session: Session) -> None:
        """With what is new on the ledger."""
        while True:
            await asyncio.sleep(self._beat_s)
            head = self._ledger.head_round
            session.post(Heartbeat(round=head, sent_bytes=0, received_bytes=0, payload_bytes=0))
            session.wake()

    async def _read(self, session: Session) -> None:
        """What else a reader says is for who leads."""
        while True:
            message = await session.stream.receive_message(FROM_NODE)
            n_bytes = session.stream.frame_bytes
            if what := self._rates.message(session.peer_id, message, n_bytes, time.monotonic()):
                raise BadFrame("rate", f"it sends too many {what}")
            match message:
                case Follow(after=after):
                    session.follow(after)
                case State(state=NodeState.LEAVING):
                    session.post(Head(round=self._ledger.head_round))
