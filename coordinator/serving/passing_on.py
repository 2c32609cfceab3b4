"""Uploads that other seats get while they come: a majority has a payload soon after its last byte is here."""

from __future__ import annotations

import asyncio
from typing import Protocol

from ...compression.errors import SwarmUnreachable
from ..blobs import BlobWriter


class Uploads(Protocol):
    """Who is told of what nodes upload. Called in the event loop."""

    def begins(self, digest: bytes, n_bytes: int) -> None:
        """It comes: other seats may have it meanwhile."""
        ...

    def ends(self, digest: bytes, *, is_stored: bool) -> None:
        """It is in the store, or does not come any more."""
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

    def given(self, seat: str, digest: bytes) -> None:
        pass


class PassedOn:
    """See `blob_streams.Coming`: what `writer` has written, from the beginning."""

    def __init__(self, writer: BlobWriter) -> None:
        self._writer, self._file = writer, writer.open()
        self._n_read = 0
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
            piece = self._file.read(n_bytes)
            if piece:
                self._n_read += len(piece)
                return piece
            if self._writer.is_over:
                raise SwarmUnreachable("the upload has ended before its last byte")
            await self._more.wait()
        return b""

    def close(self) -> None:
        """Nobody reads any more."""
        self._writer.watchers.discard(self._more.set)
        self._file.close()
