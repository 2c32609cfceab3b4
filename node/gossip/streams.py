"""Messages from node to node over streams: what one node does as a sender and as a receiver. One event loop.

MODEL round, n  -> CHUNK ..., END digest -> DONE    or NO reason, before or after the chunks
LATEST          -> MODEL round, n; CHUNK ..., END digest    or NO reason
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

from ...compression.errors import SwarmUnreachable
from ...coordinator.protocol.messages import BadMessage, digest_of
from ...coordinator.protocol.streams import (
    CHUNK_BYTES,
    BadFrame,
    FrameKind,
    FrameLimits,
    Meter,
    Stream,
    Throttle,
)
from ..links.members import MemberList
from .base import EdgeBytes
from .inbox import Inbox, Rejection

_HEAD: Final = struct.Struct(">IQ")
_DIGEST_BYTES: Final = 32
_NO_BYTES: Final = 200
_STALL_S: Final = 30.0
_ASKED: Final = 3
"""Members that are asked for their latest message."""

_STREAMS_PER_MEMBER: Final = 4

_REQUESTS: FrameLimits = {FrameKind.MODEL: _HEAD.size, FrameKind.LATEST: 0}
_DATA: FrameLimits = {FrameKind.CHUNK: CHUNK_BYTES, FrameKind.END: _DIGEST_BYTES}
_TAKEN: FrameLimits = {FrameKind.DONE: 0, FrameKind.NO: _NO_BYTES}
_GO: FrameLimits = {FrameKind.GO: 0, FrameKind.NO: _NO_BYTES}
_ANSWER: FrameLimits = {FrameKind.MODEL: _HEAD.size, FrameKind.NO: _NO_BYTES}

OpenStream = Callable[[str], Awaitable[Stream]]
"""To a member. Raises SwarmUnreachable."""


class NeighbourStreams:
    """`own`: this node's peer id; `throttle`: of what is sent to those that ask."""

    def __init__(
        self, open_stream: OpenStream, members: MemberList, own: str, meter: Meter, throttle: Throttle | None
    ) -> None:
        self._open_stream, self._members, self._own = open_stream, members, own
        self._meter, self._throttle = meter, throttle
        self.inbox = Inbox()
        self.edges: dict[str, EdgeBytes] = {}
        """Replaced entry by entry: read from any thread."""
        self._latest: tuple[int, bytes] | None = None
        self._streams: dict[str, Stream] = {}
        self._serving: Counter[str] = Counter()
        self._pending: dict[str, tuple[int, bytes]] = {}
        """What goes to a peer next: a newer message takes its place."""
        self._senders: dict[str, asyncio.Task[None]] = {}
        self._gone: set[str] = set()
        """Of those that this round's message went to: it did not reach them."""
        self._changed = asyncio.Event()
        self._is_closed = False

    def close(self) -> None:
        """Whoever waits wakes up."""
        self._is_closed = True
        for task in self._senders.values():
            task.cancel()
        for stream in self._streams.values():
            stream.abort()
        self._changed.set()

    # ----------------------------------------------------------------------------------------- this node's

    def send(self, round_: int, to: Sequence[str], data: bytes) -> None:
        """See `NeighbourLink`."""
        if self._is_closed:
            return
        self.inbox.began(round_, to)
        self._latest, self._gone = (round_, data), set()
        self._pending = dict.fromkeys(to, (round_, data))
        for peer in to:
            if peer not in self._senders:
                self._senders[peer] = asyncio.create_task(self._send_to(peer))

    async def received(
        self, round_: int, awaited: Collection[str], timeout_s: float
    ) -> list[tuple[str, bytes]]:
        """See `NeighbourLink`."""
        until_s = time.monotonic() + timeout_s
        while not self._is_closed and any(self._may_come(p) for p in self.inbox.missing(round_, awaited)):
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                break
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(left_s, 0.5))  # members leave without a word
        return [] if self._is_closed else self.inbox.of(round_)

    def _may_come(self, peer: str) -> bool:
        """Whether there is something to wait for: not of a peer that is gone."""
        return peer not in self._gone and peer in self._members.connected()

    async def latest(self, timeout_s: float) -> list[tuple[int, bytes]]:
        """See `NeighbourLink`."""
        others = [peer for peer in self._members.connected() if peer != self._own][:_ASKED]
        asked = [asyncio.create_task(self._latest_of(peer, timeout_s)) for peer in others]
        answers = await asyncio.gather(*asked)
        return [answer for answer in answers if answer is not None]

    async def _send_to(self, peer: str) -> None:
        """One message after the other, as long as there are any."""
        try:
            while (message := self._pending.pop(peer, None)) is not None:
                try:
                    await self._put_again(peer, *message)
                    self._gone.discard(peer)
                except (SwarmUnreachable, BadMessage, OSError, EOFError, TimeoutError):
                    self._drop(peer)
                    self._gone.add(peer)
                    self._changed.set()
        finally:
            del self._senders[peer]

    async def _put_again(self, peer: str, round_: int, data: bytes) -> None:
        """Once more over a new stream: that the other end has closed a kept one shows when it is used."""
        try:
            await self._put(peer, round_, data)
        except (OSError, EOFError, BadFrame):
            self._drop(peer)
            await self._put(peer, round_, data)

    async def _put(self, peer: str, round_: int, data: bytes) -> None:
        stream = self._streams.get(peer)
        if stream is None or stream.is_closing:
            stream = self._streams[peer] = await self._open_stream(peer)
        await self._say(stream, FrameKind.MODEL, _HEAD.pack(round_, len(data)))
        async with asyncio.timeout(_STALL_S):
            answer = await stream.receive(_GO)
        if answer.kind is FrameKind.NO:
            return
        await self._give(stream, data)
        self._count(peer, sent=len(data))
        async with asyncio.timeout(_STALL_S):
            await stream.receive(_TAKEN)

    async def _latest_of(self, peer: str, timeout_s: float) -> tuple[int, bytes] | None:
        try:
            async with asyncio.timeout(timeout_s):
                stream = await self._open_stream(peer)
                try:
                    await stream.send(FrameKind.LATEST)
                    kind, body = await stream.receive(_ANSWER)
                    if kind is FrameKind.NO:
                        return None
                    round_, n_bytes = _head(body)
                    if not 0 < n_bytes <= self.inbox.max_bytes:
                        raise BadFrame("frame_size", f"a message of {n_bytes} bytes")
                    data = await self._take(stream, n_bytes)
                    self._count(peer, received=len(data))
                    return round_, data
                finally:
                    stream.abort()
        except (SwarmUnreachable, BadMessage, OSError, EOFError, TimeoutError):
            return None

    def _drop(self, peer: str) -> None:
        stream = self._streams.pop(peer, None)
        if stream is not None:
            stream.abort()

    # ------------------------------------------------------------------------------------------ the others'

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A `StreamHandler`: takes messages and gives the latest one, until the other end closes the stream
        or breaks the protocol."""
        if self._serving[peer] >= _STREAMS_PER_MEMBER:
            return
        self._serving[peer] += 1
        stream = Stream(reader, writer, self._meter, self._throttle)
        try:
            while not self._is_closed:
                kind, body = await stream.receive(_REQUESTS)
                if kind is FrameKind.LATEST:
                    await self._answer(peer, stream)
                else:
                    await self._accept(peer, stream, *_head(body))
        except (SwarmUnreachable, BadMessage, OSError, EOFError, TimeoutError):
            return
        finally:
            self._serving -= Counter((peer,))

    async def _accept(self, peer: str, stream: Stream, round_: int, n_bytes: int) -> None:
        """One message. Raises BadFrame when the stream cannot go on."""
        refusal = self.inbox.refusal(peer, peer in self._members, round_, n_bytes)
        if refusal is not None:
            self.inbox.rejected[refusal] += 1
            await self._say(stream, FrameKind.NO, refusal.encode())
            return
        await self._say(stream, FrameKind.GO)
        try:
            data = await self._take(stream, n_bytes)
        except BadFrame as e:
            reason: Rejection = "cut" if e.reason == "frame_cut" else "digest"
            self.inbox.rejected[reason] += 1
            raise
        self._count(peer, received=n_bytes)
        self.inbox.put(peer, round_, data)
        self._changed.set()
        await self._say(stream, FrameKind.DONE)

    async def _answer(self, peer: str, stream: Stream) -> None:
        if peer not in self._members or self._latest is None:
            await self._say(stream, FrameKind.NO, b"nothing")
            return
        round_, data = self._latest
        await self._say(stream, FrameKind.MODEL, _HEAD.pack(round_, len(data)))
        await self._give(stream, data)
        self._count(peer, sent=len(data))

    # ---------------------------------------------------------------------------------------------- both

    async def _give(self, stream: Stream, data: bytes) -> None:
        n = stream.chunk_bytes
        for start in range(0, len(data), n):
            await self._say(stream, FrameKind.CHUNK, data[start : start + n])
        await self._say(stream, FrameKind.END, digest_of(data))

    async def _say(self, stream: Stream, kind: FrameKind, body: bytes = b"") -> None:
        async with asyncio.timeout(_STALL_S):
            await stream.send(kind, body, "gossip")

    async def _take(self, stream: Stream, n_bytes: int) -> bytes:
        """Exactly so many bytes, and their digest. Raises BadFrame, EOFError, OSError, TimeoutError."""
        parts, missing = list[bytes](), n_bytes
        while True:
            async with asyncio.timeout(_STALL_S):
                kind, body = await stream.receive(_DATA, "gossip")
            if kind is FrameKind.END:
                break
            missing -= len(body)
            if missing < 0 or not body:
                raise BadFrame("blob", f"its chunks do not make {n_bytes} bytes")
            parts.append(body)
        data = b"".join(parts)
        if missing or digest_of(data) != body:
            raise BadFrame("blob", "its bytes do not fit its digest")
        return data

    def _count(self, peer: str, sent: int = 0, received: int = 0) -> None:
        before = self.edges.get(peer, EdgeBytes())
        self.edges[peer] = EdgeBytes(before.sent + sent, before.received + received)

    def keep_only(self, members: Collection[str]) -> None:
        """Streams to the others are closed."""
        for peer in self._streams.keys() - set(members):
            self._drop(peer)


def _head(body: bytes) -> tuple[int, int]:
    """Round and size. Raises BadFrame."""
    if len(body) != _HEAD.size:
        raise BadFrame("frame_size", f"a head of {len(body)} bytes")
    round_, n_bytes = _HEAD.unpack(body)
    return int(round_), int(n_bytes)
