"""A coordinator in a thread of this process, with real libp2p: for tests, benchmarks, and whoever starts one
from a program of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from .protocol.messages import GenesisBody
from .protocol.ticket import Ticket
from .server import CoordinatorServer
from .state import StateDir
from .stream_server import Waits

T = TypeVar("T")


class ServerThread:
    """Serves from entering to leaving the context: on loopback with the arguments of the server, or what
    `make` gives for the state folder, in the server's loop."""

    def __init__(
        self,
        folder: Path,
        genesis: GenesisBody | None = None,
        blobs: Sequence[bytes] = (),
        port: int = 0,
        waits: Waits = Waits(),  # noqa: B008 - frozen
        make: Callable[[StateDir], CoordinatorServer] | None = None,
    ) -> None:
        self._folder = folder
        self._make = make or partial(
            CoordinatorServer, genesis=genesis, blobs=blobs, host="127.0.0.1", port=port, waits=waits
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="coordinator", daemon=True)
        self.ticket: Ticket
        self.server: CoordinatorServer

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._end()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The one that the server runs in."""
        return self._loop

    def call(self, what: Callable[[CoordinatorServer], T]) -> T:
        """Runs `what(server)` in the server's loop."""

        async def run() -> T:
            return what(self.server)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def status(self) -> dict[str, Any]:
        """See `CoordinatorServer.status`."""
        return self.call(lambda server: server.status())

    async def _start(self) -> None:
        self._state = StateDir(self._folder)
        try:
            self.server = self._make(self._state)
        except BaseException:
            self._state.close()
            raise
        try:
            await self.server.start()
        except BaseException:
            await self._stop()
            raise
        self.ticket = self.server.ticket

    async def _stop(self) -> None:
        await self.server.stop()
        self._state.close()
        await self._loop.shutdown_default_executor()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
