"""The blobs that a seat must have before it votes, or is named: fetched from other seats, a few at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from ...compression.errors import SwarmUnreachable
from ..blobs import BlobStore
from ..protocol.blob_streams import NotServed, get_blob_into
from ..protocol.messages import BadMessage
from ..protocol.streams import Stream

log = logging.getLogger("thinwire.coordinator")

AT_ONCE: Final = 8
"""A leader serves no more to one seat."""

BESIDE: Final = AT_ONCE // 2
"""So many are asked of seats that do not lead: one that stands still must not hold up what the leader has."""

RETRY_S: Final = 2.0
MAX_WANTED: Final = 2**17

OpenStream = Callable[[str], Awaitable[Stream]]
"""A stream for blobs to a connected seat. Raises SwarmUnreachable."""


@dataclass(slots=True)
class _Wanted:
    max_bytes: int
    at: str | None = None
    """The seat that has said last that it has it."""
    not_at: set[str] = field(default_factory=set)
    """Seats that have said that it is not there, since it was asked for last."""


class Fetcher:
    """In one event loop. `sources`: seats that may have blobs, the likeliest first; `arrived`: is told of a
    blob that is in the store; `comes`: whether one comes by itself, and need not be asked for."""

    def __init__(
        self,
        blobs: BlobStore,
        open_stream: OpenStream,
        sources: Callable[[], Sequence[str]],
        arrived: Callable[[bytes], None],
        comes: Callable[[bytes], bool] = lambda _digest: False,
    ) -> None:
        self._blobs, self._open_stream, self._sources, self._arrived = blobs, open_stream, sources, arrived
        self._comes = comes
        self._wanted: dict[bytes, _Wanted] = {}
        self._under_way: dict[bytes, tuple[str, asyncio.Task[None]]] = {}
        self._streams: dict[str, list[Stream]] = {}
        self._wake = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self.trouble = ""
        """Why the last one could not be stored, in words."""

    @property
    def n_wanted(self) -> int:
        return len(self._wanted)

    def want(self, digest: bytes, max_bytes: int, at: str | None = None) -> bool:
        """False: the blob is here. `at`: the seat that says that it has it: there it is asked for first."""
        if digest in self._blobs:
            return False
        wanted = self._wanted.get(digest)
        if wanted is not None:
            wanted.max_bytes = max(wanted.max_bytes, max_bytes)  # what was said first may have been untrue
            wanted.not_at.clear()
        elif len(self._wanted) < MAX_WANTED:
            wanted = self._wanted[digest] = _Wanted(max_bytes)
        if wanted is not None and at is not None:
            wanted.at = at
            source, fetching = self._under_way.get(digest, (at, None))
            if fetching is not None and source != at:
                fetching.cancel()
        self._wake.set()
        if not self._workers:
            self._workers = [asyncio.create_task(self._work()) for _ in range(AT_ONCE)]
        return True

    def wants(self, digest: bytes) -> bool:
        """Whether it is on its way."""
        return digest in self._wanted

    def forget(self, digests: Collection[bytes]) -> None:
        """They are not wanted any more."""
        for digest in digests:
            self._wanted.pop(digest, None)

    def leave(self, source: str) -> None:
        """That seat may stand still: what comes from there is to come from others, if they have it."""
        for wanted in self._wanted.values():
            if wanted.at == source:
                wanted.at = None
        for seat, fetching in self._under_way.values():
            if seat == source:
                fetching.cancel()

    def wake(self) -> None:
        """Something that came by itself does not come any more."""
        self._wake.set()

    def look_again(self) -> None:
        """There may be new sources."""
        for wanted in self._wanted.values():
            wanted.not_at.clear()
        self._wake.set()

    async def close(self) -> None:
        tasks = [*self._workers, *(fetching for _, fetching in self._under_way.values())]
        self._workers = []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for streams in self._streams.values():
            for stream in streams:
                stream.abort()
        self._streams.clear()

    async def _work(self) -> None:
        while True:
            found = self._next()
            if found is None:
                self._wake.clear()
                try:
                    async with asyncio.timeout(RETRY_S if self._wanted else None):
                        await self._wake.wait()
                except TimeoutError:  # whether it is set says nothing: other workers clear it
                    self.look_again()
                continue
            digest, source = found
            wanted = self._wanted[digest]
            fetching = asyncio.create_task(self._fetch(digest, wanted, source))
            self._under_way[digest] = source, fetching
            try:
                await asyncio.wait({fetching})
                if fetching.cancelled():  # see `leave`
                    wanted.not_at.add(source)
                else:
                    fetching.result()
            except Exception:
                log.exception("a blob from seat %s met a fault of ours", source)
                await asyncio.sleep(RETRY_S)
            finally:
                fetching.cancel()
                del self._under_way[digest]

    def _next(self) -> tuple[bytes, str] | None:
        """A blob, and a seat that may have it."""
        sources = self._sources()
        n_beside = sum(seat != sources[0] for seat, _ in self._under_way.values()) if sources else 0
        for digest, wanted in self._wanted.items():
            if digest in self._under_way or self._comes(digest):
                continue
            if wanted.at is not None and wanted.at in sources and wanted.at not in wanted.not_at:
                return digest, wanted.at
            source = next((seat for seat in sources if seat not in wanted.not_at), None)
            if source is not None and (source == sources[0] or n_beside < BESIDE):
                return digest, source
        return None

    async def _fetch(self, digest: bytes, wanted: _Wanted, source: str) -> None:
        try:
            stream = await self._stream(source)
        except SwarmUnreachable:
            wanted.not_at.add(source)
            return
        try:
            await get_blob_into(
                stream, digest, wanted.max_bytes, "payload", lambda n: self._blobs.writer(digest, n)
            )
        except NotServed:
            wanted.not_at.add(source)
            self._streams.setdefault(source, []).append(stream)
            return
        except (SwarmUnreachable, BadMessage, EOFError, OSError) as e:
            stream.abort()
            wanted.not_at.add(source)
            self._tell(f"a blob does not come whole from seat {source}: {e or type(e).__name__}")
            return
        except BaseException:
            stream.abort()
            raise
        self._streams.setdefault(source, []).append(stream)
        self._wanted.pop(digest, None)
        self.trouble = ""
        self._arrived(digest)

    async def _stream(self, source: str) -> Stream:
        """One that waits for its next request, or a new one. Raises SwarmUnreachable."""
        free = self._streams.get(source)
        while free:
            stream = free.pop()
            if not stream.is_closing:
                return stream
        return await self._open_stream(source)

    def _tell(self, why: str) -> None:
        if why != self.trouble:
            self.trouble = why
            log.info("%s", why)
