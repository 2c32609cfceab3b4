"""Bounded frames on a binary stream: u32 length of the body, u8 kind, body. All bytes are counted.

Four protocols use them. A session carries messages both ways; a blob stream serves one request after the
other; a gossip stream takes what neighbours send; a status stream answers questions for people. Who the other
end is was proved by libp2p; nothing that a frame says can change it.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Literal, NamedTuple, Protocol

from .messages import (
    BadMessage,
    Commit,
    Heartbeat,
    Message,
    Offer,
    Rejected,
    Welcome,
    decode_message,
)

SESSION = "thinwire/1/session"
BLOB = "thinwire/1/blob"
STATUS = "thinwire/1/status"
SEAT = "thinwire/1/seat"
GOSSIP = "thinwire/1/gossip"

HEADER = struct.Struct(">IB")
CHUNK_BYTES = 64 * 2**10
_PIECE_BYTES = 256 * 2**10

TrafficKind = Literal["payload", "snapshot", "ledger", "control", "gossip", "heartbeat"]
PURPOSES: tuple[TrafficKind, ...] = ("payload", "snapshot", "ledger", "control", "gossip", "heartbeat")


class FrameKind(IntEnum):
    """What a frame's body is."""

    MESSAGE = 1  # one message of messages.py
    GET = 2  # digest of the wanted blob
    PUT = 3  # digest and u64 size of a blob to store
    SIZE = 4  # answer to GET: u64, then chunks follow
    CHUNK = 5  # at most 64 KiB of a blob
    END = 6  # digest: all of the blob was sent
    NO = 7  # why a request is not served, as text
    GO = 8  # answer to PUT: send the chunks
    DONE = 9  # answer to PUT: the blob is stored
    ASK = 10  # token: asks for the status
    STATUS = 11  # the status as JSON
    MODEL = 12  # u32 round and u64 size of what a neighbour is sent, then chunks follow
    LATEST = 13  # asks for what was last sent to neighbours
    CARRY = 14  # as MODEL, and signature and peer: a member is to bring it there
    CARRIED = 15  # as MODEL, and signature and peer: a member brings it from there
    AT = 16  # answer to GET: the peer that is to be asked for it


_ANSWERS = (FrameKind.GO, FrameKind.DONE)
"""What is sent here stands still until they come."""

FrameLimits = Mapping[FrameKind, int]
"""The kinds that may come next, and how long each body may be, in bytes."""

FROM_NODE: FrameLimits = {FrameKind.MESSAGE: 64 * 2**10}
COMMITS_FROM_NODE: FrameLimits = {FrameKind.MESSAGE: 17 * 2**20}  # the same records as below, given back
BETWEEN_SEATS: FrameLimits = {FrameKind.MESSAGE: 17 * 2**20}
FROM_COORDINATOR: FrameLimits = {FrameKind.MESSAGE: 17 * 2**20}  # record 0 and commits have at most 16 MiB


class Frame(NamedTuple):
    kind: FrameKind
    body: bytes


class BadFrame(BadMessage):
    """A frame that breaks the protocol. `reason` is one of few words: it becomes a metric's label."""

    def __init__(self, reason: Rejected, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Meter:
    """Bytes of all streams of a process so far, frame headers included, by purpose and direction."""

    def __init__(self) -> None:
        self.sent: dict[TrafficKind, int] = dict.fromkeys(PURPOSES, 0)
        self.received: dict[TrafficKind, int] = dict.fromkeys(PURPOSES, 0)

    def totals(self) -> tuple[int, int]:
        """Sent and received, heartbeats apart."""
        return (
            sum(n for purpose, n in self.sent.items() if purpose != "heartbeat"),
            sum(n for purpose, n in self.received.items() if purpose != "heartbeat"),
        )


class Throttle(Protocol):
    """Says when bytes may be written."""

    @property
    def piece_bytes(self) -> int:
        """The most that can be asked for at a time."""
        ...

    async def take(self, n_bytes: int, *, answers: bool) -> None:
        """Returns when so many bytes may be written; soon, if it `answers` who sends something here."""
        ...

    def received(self, n_bytes: int) -> None:
        """So many bytes have come, which the other end's TCP wants to have acknowledged."""
        ...


class Stream:
    """One end of a stream. One task at a time may receive, and one may send.

    `throttle`: what is sent is written in pieces, each when it may be.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        meter: Meter,
        throttle: Throttle | None = None,
    ) -> None:
        self._reader, self._writer, self.meter, self._throttle = reader, writer, meter, throttle
        self._came = bytearray()
        """Read, and not yet taken as a frame: one read brings several."""
        self.heard_s = time.monotonic()
        """When bytes last came, whole frames or not."""
        self.heard_bytes = 0
        """So many have come, since somebody last set it to 0."""
        self.frame_bytes = 0
        """Of the last frame that came."""

    async def receive(self, limits: FrameLimits, purpose: TrafficKind = "control") -> Frame:
        """The next frame; `purpose` is what a chunk's bytes are counted as.

        Raises EOFError (the other end is done), BadFrame, or OSError.
        """
        frame = await self._frame(limits)
        counted_as = purpose if frame.kind is FrameKind.CHUNK else "control"
        self.meter.received[counted_as] += self.frame_bytes
        return frame

    async def receive_message(self, limits: FrameLimits) -> Message:
        """The next message. Raises EOFError (the other end is done), BadFrame, or OSError."""
        if len(limits) > 1:
            limits = {FrameKind.MESSAGE: limits[FrameKind.MESSAGE]}
        frame = await self._frame(limits)
        try:
            message = decode_message(frame.body)
        except BadMessage as e:
            self.meter.received["control"] += self.frame_bytes
            raise BadFrame("message", str(e)) from e
        _count(self.meter.received, message, self.frame_bytes)
        return message

    async def send(self, kind: FrameKind, body: bytes = b"", purpose: TrafficKind = "control") -> None:
        """Returns when there is room for more. Raises OSError."""
        self.meter.sent[purpose if kind is FrameKind.CHUNK else "control"] += HEADER.size + len(body)
        await self._write(HEADER.pack(len(body), kind) + body, answers=kind in _ANSWERS)

    def frames_now(self, frames: Sequence[Frame], purpose: TrafficKind) -> bool:
        """`send` of all in one piece, without waiting; False, with nothing sent: it is throttled, or some
        bytes wait already."""
        if not self._sends_at_once:
            return False
        for kind, body in frames:
            self.meter.sent[purpose if kind is FrameKind.CHUNK else "control"] += HEADER.size + len(body)
        self._writer.write(b"".join(HEADER.pack(len(body), kind) + body for kind, body in frames))
        return True

    async def send_message(self, message: Message) -> None:
        """Returns when there is room for more. Raises OSError."""
        body = message.encoded
        _count(self.meter.sent, message, HEADER.size + len(body))
        await self._write(HEADER.pack(len(body), FrameKind.MESSAGE) + body)

    def send_now(self, message: Message) -> bool:
        """The same without waiting; False, with nothing sent: it is throttled, or something waits already."""
        if not self._sends_at_once:
            return False
        body = message.encoded
        _count(self.meter.sent, message, HEADER.size + len(body))
        self._writer.write(HEADER.pack(len(body), FrameKind.MESSAGE) + body)
        return True

    @property
    def _sends_at_once(self) -> bool:
        if self._throttle is not None or self._writer.is_closing():
            return False
        return not self._writer.transport.get_write_buffer_size()

    @property
    def chunk_bytes(self) -> int:
        """How much of a blob goes into a frame: where bytes are few, frames are small, so that they are seen
        to move."""
        if self._throttle is None:
            return CHUNK_BYTES
        return max(1, min(CHUNK_BYTES, self._throttle.piece_bytes - HEADER.size))

    async def _write(self, data: bytes, *, answers: bool = False) -> None:
        if self._throttle is None:
            self._writer.write(data)
            await self._writer.drain()
            return
        n = self._throttle.piece_bytes
        for piece in (data[start : start + n] for start in range(0, len(data), n)):
            await self._throttle.take(len(piece), answers=answers)
            self._writer.write(piece)
            await self._writer.drain()

    async def ended(self, timeout_s: float) -> None:
        """Waits until the other end closes the stream; what still comes is dropped. Raises nothing."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(timeout_s):
                while await self._reader.read(_PIECE_BYTES):
                    pass

    @property
    def is_closing(self) -> bool:
        """Whether nothing can be sent any more, as far as is known here."""
        return self._writer.is_closing() or (self._reader.at_eof() and not self._came)

    def close(self) -> None:
        """Sends what is buffered, and ends both directions: libp2p's daemon knows no half-closed streams."""
        self._writer.close()

    def abort(self) -> None:
        """Closes without waiting for the other end to take what is still buffered."""
        self._writer.transport.abort()

    @property
    def has_frame(self) -> bool:
        """Whether the next frame is here, as a whole."""
        came = self._came
        return len(came) >= HEADER.size and len(came) >= HEADER.size + HEADER.unpack_from(came)[0]

    async def _frame(self, limits: FrameLimits) -> Frame:
        while len(self._came) < HEADER.size:
            await self._read_on()
        n_bytes, code = HEADER.unpack_from(self._came)
        limit = limits.get(code)  # a kind is a number
        if limit is None:
            raise BadFrame("frame_kind", f"a frame of kind {code} is not expected here")
        kind = FrameKind(code)
        if n_bytes > limit:
            raise BadFrame("frame_size", f"a {kind.name} frame of {n_bytes} bytes, at most {limit}")
        self.frame_bytes = HEADER.size + n_bytes
        while len(self._came) < self.frame_bytes:
            await self._read_on()
        body = bytes(self._came[HEADER.size : self.frame_bytes])
        del self._came[: self.frame_bytes]
        return Frame(kind, body)

    async def _read_on(self) -> None:
        """Waits for more bytes. Raises EOFError (the other end is done), BadFrame, or OSError."""
        part = await self._reader.read(_PIECE_BYTES)
        if not part:
            if not self._came:
                raise EOFError("the other end has closed the stream")
            raise BadFrame("frame_cut", "the stream ended inside of a frame")
        self.heard_s = time.monotonic()
        self.heard_bytes += len(part)
        if self._throttle is not None:
            self._throttle.received(len(part))
        self._came += part


def _count(counts: dict[TrafficKind, int], message: Message, n_bytes: int) -> None:
    match message:
        case Commit() | Welcome():
            counts["ledger"] += n_bytes
        case Offer(payload=bytes() as payload):
            counts["payload"] += len(payload)
            counts["control"] += n_bytes - len(payload)
        case Heartbeat():
            counts["heartbeat"] += n_bytes
        case _:
            counts["control"] += n_bytes
