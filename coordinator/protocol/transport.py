"""The contract of transports: this process's end of a network that carries streams between peers.

Two implementations: libp2p (`p2p.P2PTransport`), and a Ray cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

StreamHandler = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Gets the peer id that the network vouches for, never what a message claims."""


class Transport(Protocol):
    """Belongs to one event loop."""

    port: int
    addresses: tuple[str, ...]
    """Where others reach this transport."""
    died: asyncio.Event
    """Set when the network has ended by itself: another transport is to be started."""

    @property
    def peer_id(self) -> str: ...

    async def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Calls `handler` for every stream that a peer opens; the stream is closed when it returns."""
        ...

    async def dial(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        """Connects to a peer. Raises SwarmUnreachable."""
        ...

    async def open_stream(
        self, peer_id: str, protocol: str, timeout_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to a peer that was dialled. Raises SwarmUnreachable."""
        ...

    async def disconnect(self, peer_id: str) -> None:
        """Drops the connection to a peer and with it all streams; silent when there is none."""
        ...

    async def close(self) -> None:
        """Ends all streams and handlers. May be called twice."""
        ...
