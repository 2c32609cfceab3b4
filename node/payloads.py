"""A node's blobs in memory: payloads of commits, fetched ahead, its own ones, and what it serves."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from io import BytesIO
from typing import BinaryIO

from thinwire.coordinator.blob_streams import Sink
from thinwire.coordinator.messages import BadMessage, Commit, digest_of

AHEAD = 4
"""Commits whose payloads are fetched before the node takes them."""

_KEPT_OWN = 3
_KEPT_PUBLISHED = 2


class Payloads:
    """Starts downloads as commits arrive, keeps them until their round is over. One event loop."""

    def __init__(self, download: Callable[[bytes], Awaitable[bytes]]) -> None:
        self._download = download
        self._own: OrderedDict[bytes, bytes] = OrderedDict()
        self._rounds: OrderedDict[int, tuple[bytes, ...]] = OrderedDict()
        self._tasks: dict[bytes, asyncio.Task[bytes]] = {}
        self._taken = 0

    def keep_own(self, payload: bytes) -> bytes:
        """This node offered it: it need not be fetched. Returns its digest."""
        digest = digest_of(payload)
        self._own[digest] = payload
        self._own.move_to_end(digest)
        while len(self._own) > _KEPT_OWN:
            self._own.popitem(last=False)
        return digest

    def arrived(self, commit: Commit) -> None:
        """A commit that the node will take after those that arrived before."""
        body = commit.body
        self._rounds[body.round] = tuple(o.digest for o in body.offers if o.digest is not None)
        self._fetch_ahead()

    def taken(self, round_: int) -> None:
        """The node works on this commit now."""
        self._taken = round_
        for old in [r for r in self._rounds if r < round_]:
            del self._rounds[old]
        wanted = {digest for digests in self._rounds.values() for digest in digests}
        for digest in self._tasks.keys() - wanted:
            self._tasks.pop(digest).cancel()
        self._fetch_ahead()

    def restart(self, after: int) -> None:
        """The node takes commits from elsewhere."""
        self._rounds.clear()
        self.taken(after)

    def is_payload(self, digest: bytes) -> bool:
        return any(digest in digests for digests in self._rounds.values())

    async def get(self, digest: bytes) -> bytes:
        """Raises what the download raises."""
        own = self._own.get(digest)
        if own is not None:
            return own
        task = self._tasks.get(digest)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.ensure_future(self._download(digest))
            if self.is_payload(digest):
                self._tasks[digest] = task
        return await asyncio.shield(task)

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    def _fetch_ahead(self) -> None:
        for round_, digests in self._rounds.items():
            if round_ > self._taken + AHEAD:
                return
            for digest in digests:
                if digest not in self._own and digest not in self._tasks:
                    task = asyncio.ensure_future(self._download(digest))
                    task.add_done_callback(_look)
                    self._tasks[digest] = task


class Published:
    """What this node serves to members: a read-only shelf of its two newest blobs."""

    def __init__(self) -> None:
        self._blobs: OrderedDict[bytes, bytes] = OrderedDict()

    def add(self, blob: bytes) -> bytes:
        digest = digest_of(blob)
        self._blobs[digest] = blob
        self._blobs.move_to_end(digest)
        while len(self._blobs) > _KEPT_PUBLISHED:
            self._blobs.popitem(last=False)
        return digest

    def open(self, digest: bytes) -> tuple[BinaryIO, int]:
        blob = self._blobs[digest]
        return BytesIO(blob), len(blob)

    def sink(self, digest: bytes, n_bytes: int) -> Sink | None:
        raise BadMessage(f"a node stores no blob of others ({digest.hex()[:16]}, {n_bytes} bytes)")

    def stored(self, digest: bytes) -> None:
        raise AssertionError("nothing is ever stored here")


def _look(task: asyncio.Future[bytes]) -> None:
    """A download that nobody asked for yet may fail: whoever asks starts another one."""
    if not task.cancelled():
        task.exception()
