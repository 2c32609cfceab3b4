"""The status of a run, asked from its coordinator under a throwaway identity."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from ...compression.errors import ConfigError, SwarmUnreachable
from ...coordinator.protocol.identity import new_key
from ...coordinator.protocol.messages import BadMessage, Refused, decode_message
from ...coordinator.protocol.p2p import P2PTransport, start_p2p
from ...coordinator.protocol.streams import STATUS, FrameKind, Meter, Stream
from ...coordinator.protocol.ticket import Ticket

T = TypeVar("T")

_ANSWERS = {FrameKind.STATUS: 16 * 2**20, FrameKind.MESSAGE: 16 * 2**10}


class StatusClient:
    """Keeps one connection for asking again and again. Use as a context manager, from one thread."""

    def __init__(self, ticket: Ticket | str) -> None:
        """Raises ConfigError for a ticket that is none."""
        self._ticket = Ticket.parse(ticket) if isinstance(ticket, str) else ticket
        self._loop = asyncio.new_event_loop()
        self._host: P2PTransport | None = None
        self._stream: Stream | None = None

    def fetch(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """Raises SwarmUnreachable (why each address failed, or no answer in time) or ConfigError (token)."""
        return self._run(self._fetch(timeout_s))

    def close(self) -> None:
        if self._loop.is_closed():
            return
        try:
            self._run(self._close())
        finally:
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Like `asyncio.run`: what is interrupted is cancelled before the error goes on."""
        task = self._loop.create_task(work)
        try:
            return self._loop.run_until_complete(task)
        except BaseException:
            task.cancel()
            self._loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            raise

    async def _fetch(self, timeout_s: float) -> dict[str, Any]:
        if self._host is None or self._host.died.is_set():
            await self._close()
            self._host = await start_p2p(new_key())
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ask(self._host)
        except TimeoutError as e:
            self._drop()
            raise SwarmUnreachable(f"the coordinator does not answer within {timeout_s:g} s") from e
        except (OSError, EOFError, BadMessage) as e:
            self._drop()
            raise SwarmUnreachable(f"the connection to the coordinator broke: {e}") from e

    async def _ask(self, host: P2PTransport) -> dict[str, Any]:
        if self._stream is None:
            peer_id = self._ticket.peer_id
            await host.dial(peer_id, self._ticket.addresses, 10.0)
            reader, writer = await host.open_stream(peer_id, STATUS)
            self._stream = Stream(reader, writer, Meter())
        try:
            return await ask(self._stream, self._ticket.token)
        except ConfigError:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.abort()
            self._stream = None

    async def _close(self) -> None:
        self._drop()
        if self._host is not None:
            await self._host.close()
            self._host = None


async def ask(stream: Stream, token: str) -> dict[str, Any]:
    """The status, over a stream to its door. Raises ConfigError (token), BadMessage, OSError, EOFError."""
    await stream.send(FrameKind.ASK, token.encode())
    kind, body = await stream.receive(_ANSWERS)
    if kind is FrameKind.MESSAGE:
        refused = decode_message(body)
        raise ConfigError(refused.text if isinstance(refused, Refused) else "the coordinator refuses")
    try:
        status: dict[str, Any] = json.loads(body)
    except ValueError as e:
        raise BadMessage("the status is no JSON") from e
    return status


def fetch_status(ticket: Ticket | str, timeout_s: float = 10.0) -> dict[str, Any]:
    """One status. Raises like `StatusClient`."""
    with StatusClient(ticket) as client:
        return client.fetch(timeout_s)
