"""One idle stream to another seat than the one in use: it says at once when another one leads.

A coordinator that hangs keeps its connections; its committee goes on without it, and this is how a node
hears of that early.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

from ...compression.errors import ThinwireError
from ...coordinator.protocol.figures import short
from ...coordinator.protocol.messages import BadMessage, Elsewhere, Heartbeat, Hello, PeerId, Refused
from ...coordinator.protocol.streams import FrameKind, FrameLimits, Stream
from .known_seats import KnownSeats

_log = logging.getLogger("thinwire.link")

FROM_SEAT: Final[FrameLimits] = {FrameKind.MESSAGE: 64 * 2**10}
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 30.0
STEADY_S = 10.0
FIRST_REST_S, LAST_REST_S = 15.0, 240.0
"""For a seat that has sent this node where nobody led."""


class Watch:
    """`open_stream`: to a seat, raises ThinwireError; `hello`: what is said there; `in_use`: the seat of the
    session; `announced`: told what a seat says. One event loop."""

    def __init__(
        self,
        seats: KnownSeats,
        open_stream: Callable[[PeerId], Awaitable[Stream]],
        hello: Callable[[], Hello],
        in_use: Callable[[], PeerId | None],
        announced: Callable[[PeerId, Elsewhere], None],
    ) -> None:
        self._seats, self._open_stream, self._hello = seats, open_stream, hello
        self._in_use, self._announced = in_use, announced
        self._jitter = random.Random()
        self._last: PeerId | None = None
        self._misled: dict[PeerId, tuple[int, float]] = {}
        self.silence_s = 10.0
        """A seat that says nothing for so long is not watched any more; its heartbeats come more often."""

    def misled(self, seat: PeerId) -> None:
        """Whom it announced did not lead: it is not listened to for a while."""
        n = self._misled.get(seat, (0, 0.0))[0] + 1
        rest_s = min(FIRST_REST_S * 2 ** min(n - 1, 10), LAST_REST_S)
        self._misled[seat] = n, time.monotonic() + rest_s

    def _rests(self, seat: PeerId) -> bool:
        return self._misled.get(seat, (0, 0.0))[1] > time.monotonic()

    async def keep(self) -> None:
        """Until it is cancelled."""
        pause_s = FIRST_PAUSE_S
        while True:
            seat = self._next()
            if seat is None:
                await self._until_there_are_more(LAST_PAUSE_S)
                continue
            began_s = time.monotonic()
            try:
                await self._watch(seat)
                continue  # to another one
            except (ThinwireError, OSError, EOFError, TimeoutError) as e:
                _log.debug("the watch at %s ended: %s", short(seat), e)
            if time.monotonic() - began_s > STEADY_S:
                pause_s = FIRST_PAUSE_S
            await asyncio.sleep(pause_s * self._jitter.uniform(0.7, 1.3))
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def _next(self) -> PeerId | None:
        """In turn, whoever is not in use and has not misled this node lately. None: there is no other."""
        seats = sorted(self._seats.in_order())
        others = [seat for seat in seats if seat != self._in_use() and not self._rests(seat)]
        if not others:
            return None
        later = (seat for seat in others if self._last is None or seat > self._last)
        self._last = next(later, others[0])
        return self._last

    async def _until_there_are_more(self, at_most_s: float) -> None:
        changed = asyncio.ensure_future(self._seats.changed())
        await asyncio.wait({changed}, timeout=at_most_s)
        changed.cancel()

    async def _watch(self, seat: PeerId) -> None:
        """Until the seat is the one in use, or has misled this node. Raises ThinwireError, OSError, EOFError
        or TimeoutError."""
        stream = await self._open_stream(seat)
        try:
            await stream.send_message(self._hello().model_copy(update={"watches": True}))
            while seat != self._in_use() and not self._rests(seat):
                async with asyncio.timeout(self.silence_s):
                    message = await stream.receive_message(FROM_SEAT)
                match message:
                    case Elsewhere():
                        self._announced(seat, message)
                    case Heartbeat():
                        pass
                    case Refused():
                        raise message.as_error()
                    case _:
                        raise BadMessage(f"{type(message).__name__} is not for who watches")
        finally:
            stream.abort()
