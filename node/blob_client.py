"""Blobs from and to one peer, over streams that are opened when needed and kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from thinwire.compression.errors import SwarmUnreachable
from thinwire.coordinator.blob_streams import NotServed, get_blob, put_blob
from thinwire.coordinator.messages import BadMessage
from thinwire.coordinator.streams import Purpose, Stream

T = TypeVar("T")


class BlobClient:
    """At most `n_streams` requests at a time; each has a stream for itself, which the next one takes over.

    `open_stream` raises SwarmUnreachable. `heard` is told whenever a request has brought something.
    """

    def __init__(self, open_stream: Callable[[], Awaitable[Stream]], n_streams: int) -> None:
        self._open_stream = open_stream
        self._turn = asyncio.Semaphore(n_streams)
        self._idle: list[Stream] = []
        self._busy: set[Stream] = set()

    @property
    def heard_s(self) -> float:
        """When bytes last came on any of the streams, in monotonic seconds; 0: never."""
        return max((s.heard_s for s in [*self._idle, *self._busy]), default=0.0)

    async def get(self, digest: bytes, max_bytes: int, purpose: Purpose) -> bytes:
        """Raises SwarmUnreachable; NotServed if the peer is there but has no such blob for us."""
        return await self._use(lambda stream: get_blob(stream, digest, max_bytes, purpose))

    async def put(self, digest: bytes, data: bytes, purpose: Purpose) -> None:
        """Raises SwarmUnreachable; NotServed if the peer does not take the blob."""
        await self._use(lambda stream: put_blob(stream, digest, data, purpose))

    def close(self) -> None:
        for stream in [*self._idle, *self._busy]:
            stream.abort()
        self._idle.clear()

    async def _use(self, work: Callable[[Stream], Awaitable[T]]) -> T:
        async with self._turn:
            stream = self._idle.pop() if self._idle else await self._open_stream()
            self._busy.add(stream)
            try:
                result = await work(stream)
            except NotServed:
                stream.abort()  # whoever refuses may close its end: the next request gets a new stream
                raise
            except (OSError, EOFError, BadMessage) as e:
                stream.abort()
                raise SwarmUnreachable(f"a blob's transfer broke: {e}") from e
            except BaseException:
                stream.abort()
                raise
            finally:
                self._busy.discard(stream)
            self._idle.append(stream)
            return result
