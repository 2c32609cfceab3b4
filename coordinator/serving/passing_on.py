"""Uploads that other seats get while they come: a majority has a payload soon after its last byte is here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from ...compression.errors import SwarmUnreachable
from ..blobs import BlobStore, BlobWriter


class Uploads(Protocol):
    """Who is told of what nodes upload. Called in the event loop."""

    def begins(self, digest: bytes, n_bytes: int) -> None:
        """It comes: other seats may have it meanwhile."""
        ...

    def ends(self, digest: bytes, *, is_stored: bool) -> None:
        """It is in the store, or does not come any more."""
        ...

    def passes_on(self, digest: bytes) -> bool:
        """Whether other seats were told that it comes, not too long ago. Else they do not get it before it is
        here: who waits for what is slow to come has no hands for the rest."""
        ...

    def given(self, seat: str, digest: bytes) -> None:
        """All of it was sent to that seat."""
        ...


class Nobody:
    """Who leads alone has nobody to tell; see `Uploads`."""

    def begins(self, digest: bytes, n_bytes: int) -> None:
        pass

    def ends(self, digest: bytes, *, is_stored: bool) -> None:
        pass

    def passes_on(self, digest: bytes) -> bool:
        return False

    def given(self, seat: str, digest: bytes) -> None:
        pass


class Stored:
    """See `blob_streams.Coming`: a blob that is in the store. Raises KeyError."""

    def __init__(self, blobs: BlobStore, digest: bytes) -> None:
        self._file, self.n_bytes = blobs.open(digest), blobs.size(digest) or 0

    async def read(self, n_bytes: int) -> bytes:
        """See `blob_streams.Coming`."""
        return self._file.read(n_bytes)

    def close(self) -> None:
        self._file.close()


class PassedOn:
    """See `blob_streams.Coming`: what `writer` has written, from the beginning; the rest from the store, once
    another upload has brought it there. `goes_on`: whether to wait for more. Raises OSError."""

    def __init__(self, writer: BlobWriter, goes_on: Callable[[], bool]) -> None:
        self._writer, self._file, self._goes_on = writer, writer.open(), goes_on
        self._n_read = 0
        self._is_whole = False
        """It is the store's file that is read."""
        self._more = asyncio.Event()
        writer.watchers.add(self._more.set)

    @property
    def n_bytes(self) -> int:
        """Of the whole."""
        return self._writer.expected_bytes

    async def read(self, n_bytes: int) -> bytes:
        """See `blob_streams.Coming`."""
        while self._n_read < self.n_bytes:
            self._more.clear()
            piece = self._file.read(min(n_bytes, self.n_bytes - self._n_read))
            if piece:
                self._n_read += len(piece)
                return piece
            if self._writer.is_here and not self._is_whole:
                self._turn_to_store()
            elif self._writer.is_over or self._is_whole:
                raise SwarmUnreachable("the upload has ended before its last byte")
            elif not self._goes_on():
                raise SwarmUnreachable("the upload takes too long to be passed on")
            else:
                await self._more.wait()
        return b""

    def _turn_to_store(self) -> None:
        self._file.close()
        self._file, self._is_whole = self._writer.open(), True
        self._file.seek(self._n_read)

    def close(self) -> None:
        """Nobody reads any more."""
        self._writer.watchers.discard(self._more.set)
        self._file.close()
