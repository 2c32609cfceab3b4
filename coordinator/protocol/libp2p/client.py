"""A client of libp2p's daemon: requests over a connection of their own each, as hivemind's client has them,
but with a time limit and closed whatever happens."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from ....compression.errors import SwarmUnreachable
from ..transport import StreamHandler
from .wire import Answer, BadWords, Incoming, framed, identify, read_framed, stay, stream_handler

_log = logging.getLogger("thinwire.p2p")

ANSWER_TIMEOUT_S: Final = 30.0
"""Of what this machine does alone."""

_OUR_SOCKET: Final = "client.sock"

_BACKLOG: Final = 4096
"""Streams that a whole swarm opens at once: the daemon drops those that find no room."""


class DaemonClient:
    """Requests to the daemon that listens on a socket in this folder, and the streams that it passes on: to a
    socket beside it. `open` it first. One event loop."""

    def __init__(self, folder: Path, socket_name: str) -> None:
        self._folder, self._socket = folder, str(folder / socket_name)
        self._handlers: dict[str, StreamHandler] = {}
        self._server: asyncio.Server | None = None
        self._stays: asyncio.StreamWriter | None = None

    async def open(self) -> Answer:
        """The daemon lives as long as this is open. Returns where it listens. Raises SwarmUnreachable."""
        answer, _, self._stays = await self.request(stay(), ANSWER_TIMEOUT_S)
        if answer.error is not None:
            raise SwarmUnreachable(f"this machine's p2pd refuses its client: {answer.error}")
        return await self.ask(identify(), ANSWER_TIMEOUT_S)

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Raises SwarmUnreachable."""
        path = self._folder / _OUR_SOCKET
        if self._server is None:
            self._server = await asyncio.start_unix_server(self._incoming, path=path, backlog=_BACKLOG)
        self._handlers[protocol] = handler
        answer = await self.ask(stream_handler(str(path), protocol), ANSWER_TIMEOUT_S)
        if answer.error is not None:
            raise SwarmUnreachable(f"this machine's p2pd does not serve {protocol}: {answer.error}")

    async def ask(self, request: bytes, timeout_s: float) -> Answer:
        """One request and its answer. Raises SwarmUnreachable."""
        answer, _, writer = await self.request(request, timeout_s)
        await close_writer(writer)
        return answer

    async def request(
        self, request: bytes, timeout_s: float
    ) -> tuple[Answer, asyncio.StreamReader, asyncio.StreamWriter]:
        """The same, with its connection: a stream, if it was opened. Raises SwarmUnreachable."""
        writer = None
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(self._socket)
                writer.write(framed(request))
                await writer.drain()
                answer = Answer.parse(await read_framed(reader))
        except BaseException as e:
            if writer is not None:
                await close_writer(writer)
            if isinstance(e, TimeoutError):
                raise SwarmUnreachable(f"no answer within {timeout_s:g} s") from e
            if isinstance(e, OSError | EOFError | BadWords):
                raise SwarmUnreachable("this machine's p2pd does not answer: it has ended") from e
            raise
        return answer, reader, writer

    async def close(self) -> None:
        """No stream comes any more, and the daemon may end. May be called twice."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._stays is not None:
            self._stays.transport.abort()
            self._stays = None

    async def _incoming(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            incoming = Incoming.parse(await read_framed(reader))
            handler = self._handlers[incoming.protocol]
        except (OSError, EOFError, BadWords, KeyError) as e:
            _log.debug("a stream that the daemon did not explain: %s", e)
            writer.transport.abort()
            return
        await handler(incoming.peer_id, reader, writer)


async def close_writer(writer: asyncio.StreamWriter) -> None:
    """Closes a stream whose other end may be gone already."""
    writer.close()
    try:
        async with asyncio.timeout(1.0):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()
