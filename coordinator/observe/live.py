"""Server-sent events: everybody who watches gets the same bytes, made once, at most once a second.

Nobody is waited for. While nobody watches, nothing is asked of the coordinator; who reads too slowly is cut
off, and comes back to a whole picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from ..protocol.figures import wall_ms

log = logging.getLogger("thinwire.http")

MAX_WATCHERS: Final = 48
MAX_WAITING: Final = 8
"""Events that wait for a slow reader."""

EVERY_S: Final = 1.0
BYTES_PER_S: Final = 40_000

SILENCE_S: Final = 15.0
"""After so long without an event comes a line without meaning: proxies and browsers see that we are here."""

SEND_S: Final = 20.0
"""An event that cannot be sent for so long."""

_RETRY: Final = b"retry: 2000\n\n"

Seen = tuple[dict[str, Any], dict[str, Any]]
"""What is now, and the trend's points; see `Service.overview` and `Service.trend`."""

Look = Callable[[int], Awaitable[Seen]]
"""The points are those that have changed since a stamp."""


class NothingToShow(Exception):
    """The coordinator does not say how things are."""


class Watcher:
    """One stream; `abort` cuts its connection."""

    def __init__(self, abort: Callable[[], None]) -> None:
        self.waiting: deque[bytes] = deque()
        self.wake = asyncio.Event()
        self.is_over = False
        self._abort = abort

    def put(self, event: bytes) -> None:
        """One more event to be sent; a reader that is too far behind is cut off."""
        if len(self.waiting) >= MAX_WAITING:
            self.drop()
            return
        self.waiting.append(event)
        self.wake.set()

    def drop(self) -> None:
        """Ends the stream at once, whatever waits to be sent."""
        self.is_over = True
        self.waiting.clear()
        self.wake.set()
        self._abort()

    def end(self) -> None:
        """Ends the stream once it has sent what waits."""
        self.is_over = True
        self.wake.set()


class Live:
    """An ASGI application. All but `end` and `n_watchers` belongs to the loop that it is served in.

    `every_s`: how often to look at most; `bytes_per_s`: for each watcher, so that larger swarms are shown
    less often; `max_watchers`: how many may watch at a time.
    """

    def __init__(
        self,
        look: Look,
        *,
        every_s: float = EVERY_S,
        bytes_per_s: float = BYTES_PER_S,
        max_watchers: int = MAX_WATCHERS,
    ) -> None:
        self._look = look
        self._every_s, self._bytes_per_s, self._max_watchers = every_s, bytes_per_s, max_watchers
        self._watchers: set[Watcher] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looking: asyncio.Task[None] | None = None
        self._whole: asyncio.Task[bytes] | None = None
        self._stamp = 0
        self._last = b""
        self._is_over = False

    @property
    def n_watchers(self) -> int:
        """Open streams; may be asked from any thread."""
        return len(self._watchers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        if self._is_over or len(self._watchers) >= self._max_watchers:
            full = PlainTextResponse("too many are watching: try again later\n", 503, {"retry-after": "30"})
            await full(scope, receive, send)
            return
        watcher = Watcher(scope["state"]["abort"])
        self._watchers.add(watcher)
        gone = asyncio.create_task(_gone(receive, watcher))
        try:
            whole = await self._whole_picture()
            await send(_START)
            await send(_body(_RETRY + whole))
            await self._serve(watcher, send)
        except NothingToShow as e:
            await PlainTextResponse(f"{e}\n", 503, {"retry-after": "2"})(scope, receive, send)
        finally:
            gone.cancel()
            self._watchers.discard(watcher)
            await asyncio.gather(gone, return_exceptions=True)

    def end(self, *last: tuple[str, Mapping[str, Any]]) -> None:
        """Everybody gets these events, and no more. From any thread."""
        self._is_over = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._end, [_event(n, _dated(data)) for n, data in last])

    def _end(self, last: list[bytes]) -> None:
        if self._looking is not None:
            self._looking.cancel()
        for watcher in self._watchers:
            for event in last:
                watcher.put(event)
            watcher.end()

    async def _serve(self, watcher: Watcher, send: Send) -> None:
        while watcher.waiting or not watcher.is_over:
            if not watcher.waiting:
                watcher.wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SILENCE_S):
                        await watcher.wake.wait()
            event = watcher.waiting.popleft() if watcher.waiting else b":\n\n"
            try:
                async with asyncio.timeout(SEND_S):
                    await send(_body(event))
            except TimeoutError:
                watcher.drop()
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _whole_picture(self) -> bytes:
        """For somebody new; however many come at once, it is made once. Raises NothingToShow."""
        if self._looking is None or self._looking.done():
            self._whole = None
            self._looking = asyncio.create_task(self._look_on())
        if self._whole is None:
            self._whole = asyncio.create_task(self._make_whole())
        return await asyncio.shield(self._whole)

    async def _make_whole(self) -> bytes:
        try:
            now, trend = await self._look(0)
        except Exception as e:
            self._whole = None
            log.exception("the page cannot be shown")
            raise NothingToShow("the coordinator does not answer") from e
        return _event("points", _dated(trend)) + _event("now", _dated(now))

    async def _look_on(self) -> None:
        pause_s = self._every_s
        while self._watchers:
            await asyncio.sleep(pause_s)
            pause_s = await self._look_once()

    async def _look_once(self) -> float:
        """Tells what has changed; returns for how long that will do."""
        try:
            now, trend = await self._look(self._stamp)
        except Exception:  # the edge: a look that fails is repeated
            log.exception("the page cannot be told what is new")
            return self._every_s
        self._whole = None
        events = b""
        if trend["index"] and trend["stamp"] != self._stamp:
            self._stamp = trend["stamp"]
            events += _event("points", _dated(trend))
        plain = json.dumps(now, allow_nan=False).encode()
        if plain != self._last:
            self._last = plain
            events += _event("now", _dated(now))
        if events:
            for watcher in list(self._watchers):
                watcher.put(events)
        return max(self._every_s, len(events) / self._bytes_per_s)


async def _gone(receive: Receive, watcher: Watcher) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    watcher.waiting.clear()
    watcher.end()


def _dated(data: Mapping[str, Any]) -> dict[str, Any]:
    """With the time of this machine, in ms: times in `data` are read against it, not the reader's."""
    return {**data, "time_ms": wall_ms()}


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n".encode()


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


_START: Final = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),
        (b"x-content-type-options", b"nosniff"),
    ],
}
