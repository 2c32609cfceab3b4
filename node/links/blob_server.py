"""Blobs to other members, over the streams that they open."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Container
from functools import partial

from ...compression.errors import SwarmUnreachable
from ...coordinator.protocol.blob_streams import serve_blobs
from ...coordinator.protocol.messages import BadMessage
from ...coordinator.protocol.streams import Meter, Stream, Throttle, TrafficKind
from .members import MemberList
from .payloads import Served
from .visitors import Visitors

_SERVED_AT_ONCE: dict[TrafficKind, int] = {"payload": 256, "snapshot": 16}
"""Who waits for a payload and sees nothing come goes elsewhere: each of them gets some of the line."""

_STREAMS_PER_MEMBER = 8


class BlobServer:
    """Gives members, and the `seats` of the run's committee, what is on the shelf `served`. One event loop.
    `throttle`: of all that is sent so."""

    def __init__(
        self,
        served: Served,
        members: MemberList,
        meter: Meter,
        throttle: Throttle | None,
        seats: Container[str] = (),
    ) -> None:
        self._served, self._members, self._meter, self._throttle = served, members, meter, throttle
        self._seats = seats
        self._turns = {kind: asyncio.Semaphore(n) for kind, n in _SERVED_AT_ONCE.items()}
        self.visitors = Visitors(self._may_ask, _STREAMS_PER_MEMBER)

    async def serve(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A `StreamHandler`: answers one stream until the other end closes it, or is no member any more."""
        stream = Stream(reader, writer, self._meter, self._throttle)
        serving = serve_blobs(
            stream,
            self._served,
            self._served.purpose,
            lambda: self._may_ask(peer_id),
            self._turns,
            self._served.coming,
            announced=partial(self._served.announced, peer_id),
        )
        with contextlib.suppress(OSError, EOFError, BadMessage, SwarmUnreachable):  # the other node notices
            await self.visitors.serve(peer_id, stream, serving)

    def _may_ask(self, peer_id: str) -> bool:
        return peer_id in self._seats or peer_id in self._members
