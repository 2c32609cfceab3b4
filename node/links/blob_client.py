"""Blobs from and to other peers, over streams that are opened when needed and kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

from ...compression.errors import SwarmUnreachable
from ...coordinator.protocol.blob_streams import (
    EARLY_BYTES,
    Base,
    NotServed,
    get_blob,
    put_blob,
    stall_patience,
)
from ...coordinator.protocol.streams import BadFrame, Stream, TrafficKind
from .base import Lied

T = TypeVar("T")

STREAMS_PER_HOLDER = 4
MEASURED_BYTES = 2**20
FAST_BYTES_PER_S = 50e6
"""About what one core packs."""

FAILURES = 2
"""So many in a row, and a holder is not asked first any more for a while."""

FIRST_REST_S, LAST_REST_S = 15.0, 240.0


class _Broken(SwarmUnreachable):
    """The stream has ended in the middle."""


class BlobClient:
    """At most `n_streams` requests at a time; each has a stream for itself, which the next one takes over.

    `open_stream` raises SwarmUnreachable.
    """

    def __init__(self, open_stream: Callable[[], Awaitable[Stream]], n_streams: int) -> None:
        self._open_stream = open_stream
        self._turn = asyncio.Semaphore(n_streams)
        self._idle: list[Stream] = []
        self._busy: set[Stream] = set()
        self._heard_bytes = 0
        self._patience = stall_patience()
        self._is_fast = False
        """The link brings snapshots sooner than the other end packs them."""

    @property
    def heard_s(self) -> float:
        """When bytes last came on any of the streams, in monotonic seconds; 0: never."""
        return max((s.heard_s for s in [*self._idle, *self._busy]), default=0.0)

    @property
    def heard_bytes(self) -> int:
        """So many have come, of whole blobs and of others."""
        return self._heard_bytes + sum(stream.heard_bytes for stream in self._busy)

    @property
    def is_busy(self) -> bool:
        return bool(self._busy)

    async def get(
        self,
        digest: bytes,
        max_bytes: int,
        purpose: TrafficKind,
        base: Base | None = None,
        waits: Callable[[], object] = bool,
        referred: bool = False,
    ) -> bytes:
        """What counts as "snapshot" comes packed, or as what differs from `base`, unless the link is fast.
        `waits`, `referred`: see `get_blob`.

        Raises SwarmUnreachable; NotServed (or Referred) if it is there and has no such blob for us; Lied.
        """
        packed = purpose == "snapshot" and not self._is_fast
        began_s = time.monotonic()
        data = await self._use(
            lambda stream: get_blob(
                stream,
                digest,
                max_bytes,
                purpose,
                self._patience,
                packed=packed,
                base=base,
                waits=waits,
                referred=referred,
            )
        )
        if purpose == "snapshot" and len(data) >= MEASURED_BYTES:
            self._is_fast = len(data) / max(time.monotonic() - began_s, 1e-6) > FAST_BYTES_PER_S
        return data

    async def put(self, digest: bytes, data: bytes, purpose: TrafficKind, *, may_be_there: bool) -> None:
        """`may_be_there`: then nothing is sent before it is known to be wanted.

        Raises SwarmUnreachable; NotServed if the peer does not take the blob."""
        n_early = 0 if may_be_there else EARLY_BYTES
        await self._use(lambda stream: put_blob(stream, digest, data, purpose, n_early=n_early))

    def close(self) -> None:
        self._drop_idle()
        for stream in self._busy:
            stream.abort()

    async def _use(self, work: Callable[[Stream], Awaitable[T]]) -> T:
        async with self._turn:
            if self._idle:
                try:
                    return await self._on(self._idle.pop(), work)
                except _Broken:  # that the other end has closed a kept stream shows only when it is used
                    self._drop_idle()
            return await self._on(await self._open_stream(), work)

    async def _on(self, stream: Stream, work: Callable[[Stream], Awaitable[T]]) -> T:
        self._busy.add(stream)
        stream.heard_bytes = 0
        try:
            result = await work(stream)
        except NotServed:
            self._idle.append(stream)
            raise
        except BadFrame as e:
            stream.abort()
            raise (_Broken if e.reason == "frame_cut" else Lied)(f"a blob's transfer broke: {e}") from e
        except (OSError, EOFError) as e:
            stream.abort()
            raise _Broken(f"a blob's transfer broke: {e}") from e
        except BaseException:
            stream.abort()
            raise
        finally:
            self._busy.discard(stream)
            self._heard_bytes += stream.heard_bytes
        self._idle.append(stream)
        return result

    def _drop_idle(self) -> None:
        for stream in self._idle:
            stream.abort()
        self._idle.clear()


class Holders:
    """Streams to the other nodes, and which of them there is no use in asking first. One event loop.

    `open_stream` opens one to a peer; raises SwarmUnreachable.
    """

    def __init__(self, open_stream: Callable[[str], Awaitable[Stream]]) -> None:
        self._open_stream = open_stream
        self._clients: dict[str, BlobClient] = {}
        self._failures: dict[str, int] = {}
        self._rests_until_s: dict[str, float] = {}
        self._has_answered: set[str] = set()

    async def get(
        self,
        holder: str,
        digest: bytes,
        max_bytes: int,
        purpose: TrafficKind,
        base: Base | None = None,
        waits: Callable[[], object] = bool,
    ) -> bytes:
        """`waits`: see `get_blob`. Raises SwarmUnreachable; NotServed if the holder is there but has no such
        blob for us; Lied."""
        client = self._clients.get(holder)
        if client is None:
            client = BlobClient(lambda: self._open_stream(holder), STREAMS_PER_HOLDER)
            self._clients[holder] = client
        try:
            data = await client.get(digest, max_bytes, purpose, base, waits)
        except NotServed:
            raise
        except SwarmUnreachable:
            self.failed(holder)
            raise
        self._failures.pop(holder, None)
        self._rests_until_s.pop(holder, None)
        self._has_answered.add(holder)
        return data

    def has_answered(self, holder: str) -> bool:
        """Whether it has ever given a blob."""
        return holder in self._has_answered

    def heard_bytes(self, holder: str) -> int:
        """So many have come from it since it is known."""
        client = self._clients.get(holder)
        return 0 if client is None else client.heard_bytes

    def rests(self, holder: str) -> bool:
        """Whether the last fetches from it failed, so that others are to be asked first."""
        return time.monotonic() < self._rests_until_s.get(holder, 0.0)

    def keep_only(self, holders: Collection[str]) -> None:
        """The others are gone, unless they are giving something right now. Who comes back is asked again."""
        for holder in self._clients.keys() - set(holders):
            if not self._clients[holder].is_busy:
                self._forget(holder)

    def close(self) -> None:
        for holder in list(self._clients):
            self._forget(holder)

    def failed(self, holder: str) -> None:
        """A fetch from it has failed, or took too long to be of use."""
        n = self._failures[holder] = self._failures.get(holder, 0) + 1
        if n >= FAILURES:
            rest_s = min(FIRST_REST_S * 2 ** min(n - FAILURES, 10), LAST_REST_S)
            self._rests_until_s[holder] = time.monotonic() + rest_s

    def _forget(self, holder: str) -> None:
        self._clients.pop(holder).close()
        self._failures.pop(holder, None)
        self._rests_until_s.pop(holder, None)
        self._has_answered.discard(holder)
