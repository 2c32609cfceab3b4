"""The handlers of a transport's streams, whoever serves them: libp2p takes one for each protocol, once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Final

from ..protocol.streams import BLOB, SESSION, STATUS
from ..protocol.transport import StreamHandler, Transport

PROTOCOLS: Final = (SESSION, BLOB, STATUS)


class Reception:
    """Streams that come while nobody serves are closed."""

    def __init__(self) -> None:
        self._handlers: Mapping[str, StreamHandler] = {}

    async def open_on(self, transport: Transport) -> None:
        """From now on peers that dial `transport` are served."""
        for protocol in PROTOCOLS:
            await transport.handle(protocol, partial(self._serve, protocol))

    def hand_to(self, handlers: Mapping[str, StreamHandler]) -> None:
        """From now on these serve, by protocol. Streams that are open stay with whom they have."""
        self._handlers = handlers

    async def _serve(
        self, protocol: str, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        handler = self._handlers.get(protocol)
        if handler is not None:
            await handler(peer_id, reader, writer)
