"""Payloads that a leader sends to the other seats of its committee, while nodes still bring them here: nobody
has to ask, which would cost a round trip. What does not come through is announced (`Keep`), and asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Final

from ...compression.errors import SwarmUnreachable
from ..blobs import BlobWriter
from ..protocol.blob_streams import Coming, NotServed, put_blob
from ..protocol.messages import BadMessage
from ..protocol.streams import Stream
from .fetching import AT_ONCE, OpenStream

log = logging.getLogger("thinwire.coordinator")

STREAMS: Final = AT_ONCE - 1
"""To one seat, which takes one more."""

MAX_WAITING: Final = 256
"""Payloads for one seat, by digest: of more it is told, and asks when it can."""

MAX_REFUSALS: Final = 4
"""So many in a row, and a seat gets none any more until it is connected anew: it may be of an older build, or
take no streams."""


class Pusher:
    """In one event loop. `source`: a payload as far as it is here; raises KeyError or OSError. `given`: all
    of it has left for that seat; `failed`: it did not come there."""

    def __init__(
        self,
        open_stream: OpenStream,
        source: Callable[[bytes], Coming],
        given: Callable[[str, bytes], object],
        failed: Callable[[str, bytes], object],
    ) -> None:
        self._open_stream, self._source, self._given, self._failed = open_stream, source, given, failed
        self._waiting: dict[str, deque[bytes]] = {}
        self._sending: dict[str, dict[bytes, asyncio.Task[None]]] = {}
        self._idle: dict[str, list[Stream]] = {}
        self._refusals: Counter[str] = Counter()

    def push(self, seat: str, digest: bytes) -> bool:
        """Sends it, now or in its turn. False: not to that seat, or too much waits for it."""
        if self.is_pushed(seat, digest):
            return True
        waiting = self._waiting.setdefault(seat, deque())
        if len(waiting) >= MAX_WAITING or self._refusals[seat] >= MAX_REFUSALS:
            return False
        waiting.append(digest)
        self._send_next(seat)
        return True

    def is_pushed(self, seat: str, digest: bytes) -> bool:
        """Whether it is on its way there, or waits for its turn."""
        return digest in self._sending.get(seat, ()) or digest in self._waiting.get(seat, ())

    def forget(self, seat: str) -> None:
        """It is not connected any more, or somebody else leads: nothing more is sent there."""
        self._waiting.pop(seat, None)
        for sending in self._sending.pop(seat, {}).values():
            sending.cancel()
        for stream in self._idle.pop(seat, []):
            stream.abort()
        del self._refusals[seat]

    def forget_all(self) -> None:
        for seat in {*self._waiting, *self._sending, *self._idle}:
            self.forget(seat)

    def _send_next(self, seat: str) -> None:
        waiting, sending = self._waiting.get(seat, deque()), self._sending.setdefault(seat, {})
        while waiting and len(sending) < STREAMS:
            digest = waiting.popleft()
            sending[digest] = task = asyncio.create_task(self._send(seat, digest))
            task.add_done_callback(partial(self._sent, seat, digest))

    def _sent(self, seat: str, digest: bytes, task: asyncio.Task[None]) -> None:
        if self._sending.get(seat, {}).get(digest) is not task:
            return  # see `forget`
        del self._sending[seat][digest]
        error = task.exception()
        if error is None:
            self._refusals[seat] = 0
        elif isinstance(error, KeyError | SwarmUnreachable | BadMessage | EOFError | OSError):
            self._refusals[seat] += isinstance(error, NotServed)
            log.debug("a payload does not come to seat %s: %s", seat, error)
            self._failed(seat, digest)
        else:
            log.error("a payload for seat %s met a fault of ours", seat, exc_info=error)
        self._send_next(seat)

    async def _send(self, seat: str, digest: bytes) -> None:
        with contextlib.closing(self._source(digest)) as source:
            try:
                stream = await self._stream(seat)
            except SwarmUnreachable:
                self._refusals[seat] += 1
                raise
            try:
                await put_blob(stream, digest, source, "payload", partial(self._given, seat, digest))
            except BaseException as e:
                if not isinstance(e, NotServed):
                    stream.abort()
                raise
            finally:
                if not stream.is_closing:
                    self._idle.setdefault(seat, []).append(stream)

    async def _stream(self, seat: str) -> Stream:
        """One that is free; the one that was used last lets most be under way."""
        idle = self._idle.get(seat, [])
        while idle:
            stream = idle.pop()
            if not stream.is_closing:
                return stream
        return await self._open_stream(seat)


class PushedTo:
    """A payload that another seat pushes, on its way to the disk. `ended`: it is whole, or does not come."""

    is_quick: Final = False

    def __init__(self, writer: BlobWriter, ended: Callable[[], object]) -> None:
        self._writer, self._ended = writer, ended
        self.write, self.sync = writer.write, writer.sync

    def finish(self) -> int:
        """See `blob_streams.Sink`."""
        n_bytes = self._writer.finish()
        self._ended()
        return n_bytes

    def abort(self) -> None:
        try:
            self._writer.abort()
        finally:
            self._ended()
