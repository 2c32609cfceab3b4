"""A message over a stream, in chunks. One event loop.

MODEL round, n                     -> CHUNK ..., END digest -> DONE, or NO reason before or after the chunks
CARRY round, n, signature, to      -> the same; to whom it brings it over a stream of its own:
CARRIED round, n, signature, from  -> the same
LATEST                             -> MODEL round, n; CHUNK ..., END digest, or NO reason
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from typing import Final

from ...coordinator.protocol.messages import digest_of
from ...coordinator.protocol.streams import CHUNK_BYTES, BadFrame, FrameKind, FrameLimits, Stream
from ...coordinator.protocol.trust.signatures import SIGNATURE_BYTES

_STALL_S: Final = 30.0

_HEAD: Final = struct.Struct(">IQ")
_DIGEST_BYTES: Final = 32
_NO_BYTES: Final = 200
_NAME_BYTES: Final = 128

_CARRY_BYTES: Final = _HEAD.size + SIGNATURE_BYTES + _NAME_BYTES
REQUESTS: FrameLimits = {
    FrameKind.MODEL: _HEAD.size,
    FrameKind.CARRY: _CARRY_BYTES,
    FrameKind.CARRIED: _CARRY_BYTES,
    FrameKind.LATEST: 0,
}
ANSWER: FrameLimits = {FrameKind.MODEL: _HEAD.size, FrameKind.NO: _NO_BYTES}
GO: FrameLimits = {FrameKind.GO: 0, FrameKind.NO: _NO_BYTES}
TAKEN: FrameLimits = {FrameKind.DONE: 0, FrameKind.NO: _NO_BYTES}
_DATA: FrameLimits = {FrameKind.CHUNK: CHUNK_BYTES, FrameKind.END: _DIGEST_BYTES}


@dataclass(frozen=True, slots=True)
class Head:
    """Of a message of `n_bytes`. Of one that a member carries also `other`, the peer at its other end, and
    its sender's signature."""

    round: int
    n_bytes: int
    signature: bytes = b""
    other: str = ""

    def packed(self) -> bytes:
        return _HEAD.pack(self.round, self.n_bytes) + self.signature + self.other.encode()


def head_of(body: bytes, *, carried: bool = False) -> Head:
    """Raises BadFrame."""
    n = _HEAD.size
    least, most = (n + SIGNATURE_BYTES + 1, _CARRY_BYTES) if carried else (n, n)
    if not least <= len(body) <= most:
        raise BadFrame("frame_size", f"a head of {len(body)} bytes")
    round_, n_bytes = _HEAD.unpack(body[:n])
    name = body[n + SIGNATURE_BYTES :].decode(errors="replace")
    return Head(int(round_), int(n_bytes), body[n : n + SIGNATURE_BYTES], name)


async def say(stream: Stream, kind: FrameKind, body: bytes = b"") -> None:
    async with asyncio.timeout(_STALL_S):
        await stream.send(kind, body, "gossip")


async def hear(stream: Stream, limits: FrameLimits) -> FrameKind:
    """Raises BadFrame, EOFError, OSError, TimeoutError."""
    async with asyncio.timeout(_STALL_S):
        return (await stream.receive(limits)).kind


async def give(stream: Stream, data: bytes) -> None:
    n = stream.chunk_bytes
    for start in range(0, len(data), n):
        await say(stream, FrameKind.CHUNK, data[start : start + n])
    await say(stream, FrameKind.END, digest_of(data))


async def take(stream: Stream, n_bytes: int) -> bytes:
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


async def pass_on(stream: Stream, onward: Stream, n_bytes: int) -> None:
    """At most so many bytes from one stream to the other, and their digest, which its end looks at. Raises as
    `take` does."""
    kind = FrameKind.CHUNK
    while kind is FrameKind.CHUNK:
        async with asyncio.timeout(_STALL_S):
            kind, body = await stream.receive(_DATA, "gossip")
        if kind is FrameKind.CHUNK:
            n_bytes -= len(body)
            if n_bytes < 0 or not body:
                raise BadFrame("blob", "its chunks do not make what was said")
        await say(onward, kind, body)


async def put(stream: Stream, kind: FrameKind, head: Head, data: bytes) -> bool:
    """A whole message; whether the other end has it. False, and the stream goes on: it does not want it.
    Raises BadFrame, EOFError, OSError, TimeoutError."""
    await say(stream, kind, head.packed())
    if await hear(stream, GO) is FrameKind.NO:
        return False
    await give(stream, data)
    return await hear(stream, TAKEN) is FrameKind.DONE
