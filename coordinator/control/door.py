"""The coordinator's side of its local door: takes orders, and says when they are in the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from ...compression.errors import ThinwireError
from ..protocol.files import disk_error
from ..protocol.messages import BadMessage, decode_record
from .orders import Order, Ordered
from .wire import HEAD, SOCKET_NAME, Answer, frame, framed, length, refused, socket_path

log = logging.getLogger("thinwire.coordinator")

ORDER_WITHIN_S: Final = 10.0
MAX_OWNERS: Final = 16
"""That wait at the same time."""

UNKNOWN: Final = refused(
    "this coordinator leads no more, and the record with this order was being signed: it may have been "
    "written or not. Look at thinwire status, then say it again to the coordinator that leads, if need be."
)
LOST: Final = refused(
    "this coordinator leads no more, and the order was in no record yet: say it again to the coordinator "
    "that leads (thinwire status says which)."
)


class Door:
    """In the server's event loop. `order`: orders it from the service, and raises a ThinwireError for what is
    refused; `is_in_ledger`: whether the changes of a plan came about; `count_bad`: counts a bad frame;
    `foresee`: what takes its time before `order` can be called; `status`: for people."""

    def __init__(
        self,
        folder: Path,
        order: Callable[[Order], Ordered],
        is_in_ledger: Callable[[Ordered], bool],
        count_bad: Callable[[], None],
        foresee: Callable[[Order], Awaitable[None]],
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self._folder, self._foresee, self._status = folder, foresee, status
        self._order, self._is_in_ledger, self._count_bad = order, is_in_ledger, count_bad
        self._server: asyncio.Server | None = None
        self._waiting: dict[asyncio.Future[Answer | None], int] = {}
        self._owners: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Whoever holds the folder's lock may take away what another process left. Without the socket (a file
        system that has none) the run goes on, and cannot be changed."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            (self._folder / SOCKET_NAME).unlink(missing_ok=True)
            # Before it can be reached: between `bind` and `chmod` the umask alone would protect it.
            with socket_path(self._folder) as path:
                os.fchmod(sock.fileno(), 0o600)
                sock.bind(path)
            os.chmod(self._folder / SOCKET_NAME, 0o600)
            self._server = await asyncio.start_unix_server(self._serve, sock=sock)
        except OSError as e:
            sock.close()
            log.warning("%s cannot be made (%s): thinwire run cannot change this run", SOCKET_NAME, e)

    async def close(self) -> None:
        """Owners who wait hear that the coordinator stops. The socket is gone. May be called twice."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        for task in self._owners:
            task.cancel()
        await asyncio.gather(*self._owners, return_exceptions=True)
        with contextlib.suppress(
            OSError
        ):  # it may have lost the folder; the rest is to be closed all the same
            (self._folder / SOCKET_NAME).unlink(missing_ok=True)

    def committed(self, round_: int) -> None:
        """The record of this round is on the disk."""
        for done in [done for done, wanted in self._waiting.items() if wanted <= round_]:
            del self._waiting[done]
            if not done.done():
                done.set_result(None)

    def reign_ended(self, proposed: int | None) -> None:
        """This coordinator leads no more; owners who wait hear what that means for them. `proposed`: the
        round whose record waited for its seal."""
        for done, wanted in self._waiting.items():
            if not done.done():
                done.set_result(UNKNOWN if wanted == proposed else LOST)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._owners.add(task)
        try:
            if len(self._owners) > MAX_OWNERS:
                writer.write(frame(refused("too many orders are waiting: try again")))
            else:
                await self._answer(reader, writer)
            await writer.drain()
        except asyncio.CancelledError:
            writer.write(frame(refused("the coordinator was stopped before the record was written")))
        except (OSError, EOFError):
            pass  # the owner has left; what was ordered stays ordered
        finally:
            self._owners.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(ORDER_WITHIN_S):
                n_bytes = length(await reader.readexactly(HEAD.size))
                order = decode_record(Order, await reader.readexactly(n_bytes))
        except (BadMessage, TimeoutError) as e:
            self._count_bad()
            writer.write(frame(refused(f"this is no order: {e}")))
            return
        try:
            if order.what == "status":
                writer.write(frame(Answer(what="told")) + framed(json.dumps(self._status()).encode()))
                return
            await self._foresee(order)
            ordered = self._order(order)
        except (ThinwireError, OSError) as e:
            told = (disk_error(e) if isinstance(e, OSError) else None) or e
            writer.write(frame(refused(str(told))))
            return
        if ordered.is_done:
            writer.write(frame(Answer(what="done", told=ordered.told)))
            return
        writer.write(frame(Answer(what="planned", round=ordered.round, told=ordered.told)))
        await writer.drain()
        writer.write(frame(await self._wait(ordered, reader) or self._outcome(ordered)))

    async def _wait(self, ordered: Ordered, reader: asyncio.StreamReader) -> Answer | None:
        """For the record; a round may take hours. Returns what the owner hears if it is not known what became
        of it. Raises EOFError: the owner has left before, and must not keep a place."""
        if self._is_in_ledger(ordered):
            return None
        done: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        left: asyncio.Future[bytes] = asyncio.ensure_future(reader.read(1))
        self._waiting[done] = ordered.round
        try:
            await asyncio.wait((done, left), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise EOFError
            return done.result()
        finally:
            self._waiting.pop(done, None)
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)

    def _outcome(self, ordered: Ordered) -> Answer:
        if self._is_in_ledger(ordered):
            return Answer(what="done", round=ordered.round, told=ordered.told)
        return refused(
            "the record was written without it: another order took its place, or lost rounds came back. "
            "Say it again."
        )
