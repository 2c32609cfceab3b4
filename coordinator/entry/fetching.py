"""Streams on which peers fetch blobs: how many each may have, and what else than the store's is served."""

from __future__ import annotations

from asyncio import timeout
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from typing import Any, BinaryIO, Final

from ..blobs import BlobStore
from ..protocol.blob_streams import Shelf, serve_blobs
from ..protocol.streams import BadFrame, Stream
from .strangers import Strangers

MAX_BLOB_STREAMS: Final = 8
"""Of one peer that may fetch."""


class BlobStreams:
    """Counts the open ones. `may_fetch` is asked again for every blob; who may not is a stranger, and has
    `hello_s` seconds until it is told so."""

    def __init__(self, may_fetch: Callable[[str], bool], strangers: Strangers, hello_s: float) -> None:
        self._may_fetch, self._strangers, self._hello_s = may_fetch, strangers, hello_s
        self._open: Counter[str] = Counter()

    async def serve(self, peer_id: str, stream: Stream, shelf: Shelf, **passing_on: Any) -> None:
        """Until the peer ends the stream. `passing_on`: `coming` and `given` of `serve_blobs`, for who may
        fetch. Raises as that does, or TimeoutError."""
        if not self._may_fetch(peer_id):
            with self._strangers.one(peer_id):
                async with timeout(self._hello_s):
                    await serve_blobs(stream, shelf, "control", lambda: False)
            return
        if self._open[peer_id] >= MAX_BLOB_STREAMS:
            raise BadFrame("blob_streams", f"more than {MAX_BLOB_STREAMS} blob streams")
        self._open[peer_id] += 1
        try:
            await serve_blobs(stream, shelf, "payload", lambda: self._may_fetch(peer_id), **passing_on)
        finally:
            self._open -= Counter((peer_id,))


def open_blob(
    blobs: BlobStore, signatures: Callable[[bytes], bytes | None], digest: bytes
) -> tuple[BinaryIO, int]:
    """A blob of the store, or signatures of offers that the ledger has, and its size in bytes. Raises
    KeyError."""
    n_bytes = blobs.size(digest)
    if n_bytes is not None:
        return blobs.open(digest), n_bytes
    work = signatures(digest)
    if work is None:
        raise KeyError(digest.hex())
    return BytesIO(work), len(work)
