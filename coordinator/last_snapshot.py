"""The snapshot that a coordinator keeps of its run's end: nodes go when the run is over, and who comes then
needs one, because payloads are kept back to the second newest only.

It is fetched from the nodes that have it, once or twice in a run, chunk by chunk, as a joining node would. Of
its data nothing is opened: the manifest is the one that the ledger names, and it names the chunks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

import msgpack

from ..compression.errors import SwarmUnreachable
from .blobs import BlobStore
from .protocol.attested import Attested
from .protocol.blob_streams import get_blob
from .protocol.messages import BadMessage
from .protocol.settings import RunSection
from .protocol.streams import Stream

_log = logging.getLogger("thinwire.coordinator")

CHUNK_BYTES: Final = 4 * 2**20
"""No chunk of a snapshot is larger."""

LOOK_EVERY_S: Final = 5.0
RETRY_S: Final = 1.0

_CHUNKS: Final = 6
"""The place of the chunks' digests in a manifest."""

_SLACK_BYTES: Final = 2**16

OpenStream = Callable[[str], Awaitable[Stream]]
"""A stream for blobs to a connected peer. Raises SwarmUnreachable."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """An attested snapshot, and the peer ids of connected peers that have it."""

    snapshot: Attested
    holders: tuple[str, ...]

    @classmethod
    def of(
        cls,
        run: RunSection,
        newest: Attested | None,
        connected: Collection[int],
        peer_id: Callable[[int], str],
    ) -> Wanted | None:
        """The newest one, once it may be the run's last; None: nothing yet."""
        if newest is None or not run.is_over(newest.round + run.snapshot_every + run.snapshot_every // 2):
            return None
        return cls(newest, tuple(peer_id(index) for index in newest.peers if index in connected))


class LastSnapshot:
    """Lives in the server's event loop. `wanted`: what is to be kept by now, None: nothing yet; `has_room`:
    whether there is room for so many bytes more."""

    def __init__(
        self,
        blobs: BlobStore,
        wanted: Callable[[], Wanted | None],
        open_stream: OpenStream,
        has_room: Callable[[int], bool],
    ) -> None:
        self._blobs, self._wanted, self._open_stream = blobs, wanted, open_stream
        self._has_room = has_room
        self._changed = asyncio.Event()
        self._complete: bytes | None = None
        """The manifest of the snapshot that is all here."""
        self._kept: frozenset[bytes] = frozenset()
        self._told: int | None = None

    def wake(self) -> None:
        """There is a new record: another snapshot may be wanted."""
        self._changed.set()

    async def keep(self) -> None:
        """For ever: looks what is wanted, and fetches it."""
        while True:
            self._changed.clear()
            wanted = self._wanted()
            if wanted is not None and wanted.holders and not self._is_known(wanted.snapshot.manifest):
                if self.has(wanted.snapshot) or await self.fetch(wanted):
                    self._complete = wanted.snapshot.manifest
                else:
                    await asyncio.sleep(RETRY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._changed.wait()

    def _is_known(self, manifest: bytes) -> bool:
        """Without a look into it. What a restart found here may be released while rounds go on."""
        return self._complete == manifest and manifest in self._blobs

    def has(self, snapshot: Attested) -> bool:
        """Whether all of it is on the disk."""
        if snapshot.manifest not in self._blobs:
            return False
        try:
            chunks = chunks_of(self._blobs.read(snapshot.manifest), snapshot.n_bytes)
        except (BadMessage, OSError):
            return False
        return all(chunk in self._blobs for chunk in chunks)

    async def fetch(self, wanted: Wanted) -> bool:
        """From one holder after the other; what came stays. False: nobody could give the rest."""
        snapshot = wanted.snapshot
        if not self._has_room(snapshot.n_bytes):
            self._tell(snapshot, f"there is no room for its {snapshot.n_bytes:,} bytes")
            return False
        for holder in wanted.holders:
            try:
                await self._fetch_from(holder, snapshot)
            except (SwarmUnreachable, BadMessage, OSError, EOFError, TimeoutError) as e:
                self._tell(snapshot, str(e) or type(e).__name__)
                continue
            _log.info("kept the snapshot after round %d, for when the nodes are gone", snapshot.round)
            return True
        return False

    async def _fetch_from(self, holder: str, snapshot: Attested) -> None:
        stream = await self._open_stream(holder)
        try:
            most = _SLACK_BYTES + 34 * _n_chunks(snapshot.n_bytes)
            manifest = await self._get(stream, snapshot.manifest, most)
            chunks = chunks_of(manifest, snapshot.n_bytes)
            for chunk in chunks:
                if chunk not in self._blobs:
                    await self._get(stream, chunk, CHUNK_BYTES)
        finally:
            stream.abort()
        now = frozenset({snapshot.manifest, *chunks})
        for digest in self._kept - now:  # an older one: the run has gone on
            self._blobs.discard(digest)
        self._kept = now

    async def _get(self, stream: Stream, digest: bytes, max_bytes: int) -> bytes:
        data = await get_blob(stream, digest, max_bytes, "snapshot")
        self._blobs.put(digest, data)
        return data

    def _tell(self, snapshot: Attested, why: str) -> None:
        """Once for each snapshot: it is tried again, and the run needs none of it."""
        if self._told != snapshot.round:
            self._told = snapshot.round
            _log.info("the snapshot after round %d is not kept here yet: %s", snapshot.round, why)


def leaves_room(n_bytes: int, free_bytes: int | None) -> bool:
    """Whether the disk, with so much free, can take a snapshot of this size, which only nodes have told:
    the ledger needs room, too. None: nobody knows."""
    return free_bytes is None or n_bytes <= free_bytes // 2


def chunks_of(manifest: bytes, n_bytes: int) -> Sequence[bytes]:
    """Digests of the chunks that a manifest of a snapshot of `n_bytes` names. Raises BadMessage."""
    try:
        n = len(manifest)
        fields = msgpack.unpackb(manifest, max_array_len=n, max_map_len=n, max_bin_len=n, max_str_len=n)
        chunks = fields[_CHUNKS]
        is_good = all(isinstance(chunk, bytes) and len(chunk) == 32 for chunk in chunks)
    except (ValueError, TypeError, LookupError, RecursionError, msgpack.UnpackException) as e:
        raise BadMessage(f"the snapshot's manifest cannot be read: {e}") from e
    if not is_good or len(chunks) > _n_chunks(n_bytes):
        raise BadMessage("the snapshot's manifest names something else than its chunks")
    return list(chunks)


def _n_chunks(n_bytes: int) -> int:
    return -(-n_bytes // CHUNK_BYTES)
