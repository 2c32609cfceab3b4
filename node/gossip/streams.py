"""Messages from node to node over streams: what one node does as a sender and as a receiver. One event loop;
see `transfer` for the frames, and `carrying` for peers that cannot reach each other."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Sequence
from typing import Final

from ...compression.errors import SwarmUnreachable
from ...coordinator.protocol.streams import BadFrame, FrameKind, Meter, Stream, Throttle
from ..links.members import MemberList
from ..links.visitors import Visitors
from .base import EdgeBytes
from .carrying import BROKEN, Carrying, OpenStream, Signer
from .inbox import Inbox, Rejection
from .transfer import ANSWER, REQUESTS, Head, give, head_of, put, say, take

_ASKED: Final = 3
"""Members that are asked for their latest message."""

_STREAMS_PER_MEMBER: Final = 4


class NeighbourStreams:
    """`signer`: this node; `throttle`: of what is sent to those that ask."""

    def __init__(
        self,
        open_stream: OpenStream,
        members: MemberList,
        signer: Signer,
        meter: Meter,
        throttle: Throttle | None,
    ) -> None:
        self._open_stream, self._members, self._signer = open_stream, members, signer
        self._meter, self._throttle = meter, throttle
        self.inbox = Inbox()
        self.carrying = Carrying(open_stream, members, self.inbox, signer)
        self.edges: dict[str, EdgeBytes] = {}
        """Replaced entry by entry: read from any thread."""
        self._latest: tuple[int, bytes] | None = None
        self._streams: dict[str, Stream] = {}
        self._visitors = Visitors(members.__contains__, _STREAMS_PER_MEMBER)
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
        others = [peer for peer in self._members.connected() if peer != self._signer.me][:_ASKED]
        asked = [asyncio.create_task(self._latest_of(peer, timeout_s)) for peer in others]
        answers = await asyncio.gather(*asked)
        return [answer for answer in answers if answer is not None]

    async def _send_to(self, peer: str) -> None:
        """One message after the other, as long as there are any."""
        try:
            while (message := self._pending.pop(peer, None)) is not None:
                try:
                    await self._deliver(peer, *message)
                    self._gone.discard(peer)
                except BROKEN:
                    self._drop(peer)
                    self._gone.add(peer)
                    self._changed.set()
        finally:
            del self._senders[peer]

    async def _deliver(self, peer: str, round_: int, data: bytes) -> None:
        """Itself, or by way of a member; then it looks now and then whether the peer can be reached again."""
        routes = self.carrying.routes
        if not routes.is_cut_off(peer):
            try:
                await self._put_again(peer, round_, data)
                return
            except SwarmUnreachable:
                if peer not in self._members.connected():
                    raise
                routes.tried(peer, reached=False)
        await self.carrying.send(peer, round_, data)
        self._count(peer, sent=len(data), relayed=len(data))
        if routes.is_time_to_try(peer):
            with contextlib.suppress(SwarmUnreachable):
                self._streams[peer] = await self._open_stream(peer)
            routes.tried(peer, reached=peer in self._streams)

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
        if await put(stream, FrameKind.MODEL, Head(round_, len(data)), data):
            self._count(peer, sent=len(data))

    async def _latest_of(self, peer: str, timeout_s: float) -> tuple[int, bytes] | None:
        try:
            async with asyncio.timeout(timeout_s):
                stream = await self._open_stream(peer)
                try:
                    await stream.send(FrameKind.LATEST)
                    kind, body = await stream.receive(ANSWER)
                    if kind is FrameKind.NO:
                        return None
                    head = head_of(body)
                    if not 0 < head.n_bytes <= self.inbox.max_bytes:
                        raise BadFrame("frame_size", f"a message of {head.n_bytes} bytes")
                    data = await take(stream, head.n_bytes)
                    self._count(peer, received=len(data))
                    return head.round, data
                finally:
                    stream.abort()
        except BROKEN:
            return None

    def _drop(self, peer: str) -> None:
        stream = self._streams.pop(peer, None)
        if stream is not None:
            stream.abort()

    # ------------------------------------------------------------------------------------------ the others'

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A `StreamHandler`: takes messages and gives the latest one, until the other end closes the stream
        or breaks the protocol."""
        stream = Stream(reader, writer, self._meter, self._throttle)
        with contextlib.suppress(*BROKEN):
            await self._visitors.serve(peer, stream, self._serve(peer, stream))

    async def _serve(self, peer: str, stream: Stream) -> None:
        self.carrying.routes.tried(peer, reached=True)  # over the same connection
        while not self._is_closed:
            kind, body = await stream.receive(REQUESTS)
            if kind is FrameKind.LATEST:
                await self._answer(peer, stream)
            elif kind is FrameKind.CARRY:
                await self.carrying.carry(peer, stream, head_of(body, carried=True))
            else:
                is_carried = kind is FrameKind.CARRIED
                await self._accept(peer, stream, head_of(body, carried=is_carried))

    async def _accept(self, peer: str, stream: Stream, head: Head) -> None:
        """One message: the peer's, or one that it carries. Raises BadFrame when the stream cannot go on."""
        sender, members = head.other or peer, self._members
        are_members = peer in members and sender in members
        refusal = self.inbox.refusal(sender, are_members, head.round, head.n_bytes)
        if refusal is not None:
            await self._refuse(stream, refusal)
            return
        await say(stream, FrameKind.GO)
        try:
            data = await take(stream, head.n_bytes)
        except BadFrame as e:
            self.inbox.rejected["cut" if e.reason == "frame_cut" else "digest"] += 1
            raise
        if head.other and not self._signer.is_from(sender, head.signature, head.round, data):
            await self._refuse(stream, "signature")
            return
        self._count(sender, received=len(data), relayed=len(data) if head.other else 0)
        self.inbox.put(sender, head.round, data)
        self._changed.set()
        await say(stream, FrameKind.DONE)

    async def _refuse(self, stream: Stream, why: Rejection) -> None:
        self.inbox.rejected[why] += 1
        await say(stream, FrameKind.NO, why.encode())

    async def _answer(self, peer: str, stream: Stream) -> None:
        if peer not in self._members or self._latest is None:
            await say(stream, FrameKind.NO, b"nothing")
            return
        round_, data = self._latest
        await say(stream, FrameKind.MODEL, Head(round_, len(data)).packed())
        await give(stream, data)
        self._count(peer, sent=len(data))

    def _count(self, peer: str, sent: int = 0, received: int = 0, relayed: int = 0) -> None:
        edge = self.edges.get(peer, EdgeBytes())
        self.edges[peer] = EdgeBytes(edge.sent + sent, edge.received + received, edge.relayed + relayed)

    def keep_only(self, members: Collection[str]) -> None:
        """Streams to the others are closed."""
        for peer in self._streams.keys() - set(members):
            self._drop(peer)
