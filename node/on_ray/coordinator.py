"""The coordinator as an actor: the same server, on the same files, with calls in the place of libp2p.

Ray starts it again on the same machine when its process dies; it goes on from its folder then, and nodes come
back to it as they do to any coordinator that was restarted.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import SwarmUnreachable, ThinwireError, error_name
from ...coordinator.protocol.identity import peer_id_of
from ...coordinator.server import CoordinatorServer
from ...coordinator.state import StateDir
from .coordinator_transport import Found, RayCoordinatorTransport
from .transport import ADDRESS_PREFIX, once_free


class CoordinatorActor:
    """Serves the run that is in a state folder, from the first call on. Calls that change something are made
    at most once: whoever makes them never repeats them."""

    def __init__(self, folder: str, namespace: str) -> None:
        self._folder, self._namespace = Path(folder), namespace
        self._opening = asyncio.Lock()
        self._state: StateDir | None = None
        self._server: CoordinatorServer | None = None
        self._transport: RayCoordinatorTransport | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopped = False

    # ------------------------------------------------------------------------------- for whoever started it

    async def status(self) -> dict[str, Any]:
        """The server's, and `failed`: what ended the run, if anything has. Raises nothing."""
        try:
            server, _ = await self._serving()
        except ThinwireError as e:
            return {"failed": (error_name(e), str(e))}
        ending = self._tasks[0]
        error = ending.exception() if ending.done() and not ending.cancelled() else None
        failed = None if error is None else (error_name(error), str(error))
        ended = ending.done() and error is None
        return {**server.status(), "failed": failed, "acknowledged": ended}

    async def ticket(self) -> str:
        """The line that nodes join with. Raises ThinwireError if the run cannot be served."""
        server, _ = await self._serving()
        return server.ticket.line()

    async def stop(self) -> None:
        """Tells the nodes, and closes the folder."""
        async with self._opening:
            self._is_stopped = True
            await self._stop()

    # ------------------------------------------------------------------------------- for nodes' transports
    # See the methods of `RayCoordinatorTransport` with these names.

    async def attend(self, line: bytes) -> None:
        await (await self._serving_transport()).attend(line)

    async def connect(self, line: bytes, peer_id: str, protocol: str, life: list[Any]) -> bool:
        return await (await self._serving_transport()).connect(line, peer_id, protocol, life)

    async def write(self, line: bytes, data: bytes) -> bool:
        return await (await self._serving_transport()).write(line, data)

    async def read(self, line: bytes) -> bytes | None:
        return await (await self._serving_transport()).read(line)

    async def hang_up(self, line: bytes) -> None:
        await (await self._serving_transport()).hang_up(line)

    async def put_blob(self, line: bytes, digest: bytes, refs: list[Any]) -> str | None:
        return await (await self._serving_transport()).put_blob(line, digest, refs)

    async def get_blob(self, line: bytes, digest: bytes, holder: str | None, is_fresh: bool) -> Found:
        return await (await self._serving_transport()).get_blob(line, digest, holder, is_fresh)

    async def wanted(self, line: bytes) -> list[tuple[int, str, bytes]] | None:
        return await (await self._serving_transport()).wanted(line)

    async def answer(self, number: int, refs: list[Any], why: str) -> None:
        await (await self._serving_transport()).answer(number, refs, why)

    # ---------------------------------------------------------------------------------------- the server

    async def _serving_transport(self) -> RayCoordinatorTransport:
        return (await self._serving())[1]

    async def _serving(self) -> tuple[CoordinatorServer, RayCoordinatorTransport]:
        if self._server is None or self._transport is None:
            async with self._opening:
                if self._server is None or self._transport is None:
                    await self._start()
        assert self._server is not None
        assert self._transport is not None
        return self._server, self._transport

    async def _start(self) -> None:
        if self._is_stopped:
            raise SwarmUnreachable("the coordinator was stopped")
        self._state = await asyncio.to_thread(once_free, lambda: StateDir(self._folder))
        try:
            server = CoordinatorServer(self._state, start_transport=self._open_transport)
            await server.start()
        except BaseException:
            self._state.close()
            raise
        assert self._transport is not None
        self._server = server
        self._tasks = [
            asyncio.create_task(server.run_until_finished()),
            asyncio.create_task(self._transport.forget_old_again_and_again()),
        ]

    async def _open_transport(
        self, key: Ed25519PrivateKey, *, port: int, **_where: Any
    ) -> RayCoordinatorTransport:
        """A `StartTransport`. Keeps the port in the folder, for a run that is continued over libp2p."""
        peer_id = peer_id_of(key.public_key())
        self._transport = RayCoordinatorTransport(peer_id, ADDRESS_PREFIX + self._namespace, self._is_member)
        self._transport.port = port
        return self._transport

    def _is_member(self, peer_id: str) -> bool:
        return self._server is not None and self._server.service.is_member(peer_id)

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.stop()
        if self._state is not None:
            self._state.close()
        self._server, self._transport, self._state = None, None, None
