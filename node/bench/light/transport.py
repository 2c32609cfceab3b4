"""A transport for measuring: a Unix socket on which every peer says who it is. A thousand libp2p daemons
would take 50 GB; what is measured here is the coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ....compression.errors import SwarmUnreachable
from ....coordinator.protocol.identity import peer_id_of
from ....coordinator.protocol.transport import StreamHandler

BACKLOG = 4096


class PlainTransport:
    """See `Transport`. Every stream begins with a line, "PEER PROTOCOL"; nothing is proved."""

    port = 1
    addresses: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/1",)

    def __init__(self, peer_id: str) -> None:
        self._peer_id = peer_id
        self.died = asyncio.Event()
        self._handlers: dict[str, StreamHandler] = {}
        self._server: asyncio.Server | None = None

    @property
    def peer_id(self) -> str:
        return self._peer_id

    async def listen(self, path: Path) -> None:
        self._server = await asyncio.start_unix_server(self._incoming, path=path, backlog=BACKLOG)

    async def handle(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    async def dial(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        raise SwarmUnreachable("light peers are not dialled")

    async def open_stream(
        self, peer_id: str, protocol: str, timeout_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        raise SwarmUnreachable("light peers serve nothing")

    async def disconnect(self, peer_id: str) -> None:
        pass

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self.died.set()

    async def _incoming(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            peer_id, protocol = (await reader.readline()).decode().split()
            await self._handlers[protocol](peer_id, reader, writer)
        finally:
            writer.close()


async def start_plain(
    path: Path, key: Ed25519PrivateKey, *, host: str, port: int, announce: Sequence[str]
) -> PlainTransport:
    """In the place of `start_p2p`."""
    transport = PlainTransport(peer_id_of(key.public_key()))
    await transport.listen(path)
    return transport
