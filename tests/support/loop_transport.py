"""A network inside of one event loop: transports whose streams are socket pairs. Peer ids are as good as
those that libp2p proves, because nobody else can open one. Peers can be cut off from each other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.compression.errors import SwarmUnreachable
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.transport import StreamHandler


class Network:
    """`start` has the arguments of `start_p2p`."""

    def __init__(self) -> None:
        self.transports: dict[str, LoopTransport] = {}
        self._cut: set[frozenset[str]] = set()

    async def start(
        self, key: Ed25519PrivateKey, *, host: str = "", port: int = 0, announce: Sequence[str] = ()
    ) -> LoopTransport:
        peer_id = peer_id_of(key.public_key())
        assert peer_id not in self.transports, "it is there already"
        self.transports[peer_id] = LoopTransport(self, peer_id, port or 4000 + len(self.transports))
        return self.transports[peer_id]

    def cut(self, *peer_ids: str) -> None:
        """These are cut off from all others."""
        for one in peer_ids:
            for other in self.transports:
                if other not in peer_ids:
                    self._cut.add(frozenset((one, other)))
                    self.transports[one].drop(other)

    def cut_pair(self, one: str, other: str) -> None:
        """These two are cut off from each other."""
        self._cut.add(frozenset((one, other)))
        self.transports[one].drop(other)

    def mend(self) -> None:
        self._cut.clear()

    def other_end(self, one: str, other: str) -> LoopTransport:
        """Raises SwarmUnreachable."""
        if other not in self.transports or frozenset((one, other)) in self._cut:
            raise SwarmUnreachable(f"{other} is not there")
        return self.transports[other]


class LoopTransport:
    """See `Transport`."""

    def __init__(self, network: Network, peer_id: str, port: int) -> None:
        self._network, self.peer_id, self.port = network, peer_id, port
        self.addresses: tuple[str, ...] = (f"/ip4/127.0.0.1/tcp/{port}",)
        self.died = asyncio.Event()
        self._handlers: dict[str, StreamHandler] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[tuple[str, asyncio.StreamWriter]] = []

    async def handle(self, protocol: str, handler: StreamHandler) -> None:
        assert protocol not in self._handlers, "libp2p has one handler for a protocol"
        self._handlers[protocol] = handler

    async def dial(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        if not addresses:
            raise SwarmUnreachable(f"no address of {peer_id} is known")
        self._network.other_end(self.peer_id, peer_id)

    async def open_stream(
        self, peer_id: str, protocol: str, timeout_s: float = 10.0
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        other = self._network.other_end(self.peer_id, peer_id)
        here, there = socket.socketpair()
        try:
            reader, writer = await asyncio.open_connection(sock=here)
        except BaseException:
            there.close()
            raise
        self._writers.append((peer_id, writer))
        try:
            await other._accept(self.peer_id, protocol, there)
        except BaseException:
            # Never its socket: the next one gets the same number, and loses its events when this transport
            # ends.
            writer.transport.abort()
            raise
        return reader, writer

    async def disconnect(self, peer_id: str) -> None:
        self.drop(peer_id)

    def drop(self, peer_id: str) -> None:
        """All streams between this peer and that one."""
        for transport, other in ((self, peer_id), (self._network.transports.get(peer_id), self.peer_id)):
            for peer, writer in transport._writers if transport is not None else ():
                if peer == other:
                    writer.transport.abort()

    async def close(self) -> None:
        if self._network.transports.get(self.peer_id) is self:
            del self._network.transports[self.peer_id]
        for _, writer in self._writers:
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # sockets are closed in the next turn of the loop
        self.died.set()

    async def _accept(self, peer_id: str, protocol: str, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        self._writers.append((peer_id, writer))
        handler = self._handlers.get(protocol)
        if handler is None or self._network.transports.get(self.peer_id) is not self:
            writer.transport.abort()  # it may have been closed meanwhile: nobody would end the handler
            raise SwarmUnreachable(f"{self.peer_id} does not serve {protocol}")
        task = asyncio.create_task(self._serve(handler, peer_id, reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(
        self,
        handler: StreamHandler,
        peer_id: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        try:
            await handler(peer_id, reader, writer)
        finally:
            writer.close()
