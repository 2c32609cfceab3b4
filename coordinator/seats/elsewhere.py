"""The streams of a seat that does not lead: it says who does, serves blobs, and tells how it is.

`WhoLeads` is what it goes by: whoever drives the seat tells it when leader, seats or what is waited for
change. Who leads serves with `StreamServer` instead; a process that changes its role hands both the same
`Watchers`, so that those who watch hear of it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO, Protocol

from ..admission import AdmissionControl
from ..adoption import Adopter, adopt
from ..blobs import BlobStore
from ..entry.fetching import BlobStreams, open_blob
from ..entry.guarded import guarded
from ..entry.rates import PeerRates
from ..entry.reading import Readers
from ..entry.strangers import GOODBYE_S, Strangers, looker, or_refused, receive_hello, tell_status
from ..ledger import Ledger
from ..observe.quiet_log import QuietLog
from ..protocol.blob_streams import Sink
from ..protocol.messages import READER, BadMessage, Hello, Rejected
from ..protocol.streams import BLOB, SESSION, STATUS, BadFrame, Meter, Stream
from ..protocol.transport import StreamHandler
from ..stream_server import Waits
from .watchers import Watchers

_log = logging.getLogger("thinwire.coordinator")


class Pushes(Protocol):
    """What becomes of payloads that other seats push to this one."""

    def knows(self, peer_id: str) -> bool:
        """Whether it is a seat, or looks on."""
        ...

    def takes(self, seat: str, digest: bytes, n_bytes: int) -> Sink | None:
        """Where it goes; None: nobody need send it. Raises BadMessage: it is refused; OSError."""
        ...

    def taken(self, seat: str, digest: bytes) -> None:
        """It is here, or nobody need send it."""
        ...


class ElsewhereServer:
    """Handlers of all streams but those between seats. One event loop.

    `admission`: who may come in, by this seat's copy of the ledger; `status`: for people; `failed`: the
    ledger cannot be written; `kept_from`: payloads of the rounds from there on are here; `pushes`:
    takes what other seats send.
    """

    def __init__(
        self,
        ledger: Ledger,
        blobs: BlobStore,
        admission: AdmissionControl,
        watchers: Watchers,
        meter: Meter,
        *,
        status: Callable[[], dict[str, Any]],
        failed: Callable[[sqlite3.Error], object],
        kept_from: Callable[[], int] = lambda: 1,
        waits: Waits,
        pushes: Pushes,
    ) -> None:
        self._ledger, self._admission, self._watchers = ledger, admission, watchers
        self._meter, self._status, self._failed, self._waits = meter, status, failed, waits
        self._is_seat = pushes.knows
        self.returns: Adopter | None = None
        """Takes what nodes have and this seat has lost, while the run is recovered."""
        self._returning = asyncio.Lock()
        self._shelf_of = partial(Shelf, ledger, blobs, pushes)
        self._rates, self._lines = PeerRates(), QuietLog(_log, time.monotonic)
        self._strangers = Strangers(self._is_known)
        self._readers = Readers(ledger, self._rates, kept_from, watchers.beat_s)
        self._blob_streams = BlobStreams(self._may_fetch, self._strangers, waits.hello_s)

    @property
    def handlers(self) -> dict[str, StreamHandler]:
        """By protocol."""
        served = {SESSION: self._serve_session, BLOB: self._serve_blobs, STATUS: self._serve_status}
        return {
            protocol: guarded(serve, self._meter, self._count, self._lines, self._failed)
            for protocol, serve in served.items()
        }

    def _count(self, reason: Rejected, peer_id: str | None = None) -> None:
        self._admission.rejected[reason] += 1

    def _is_known(self, peer_id: str) -> bool:
        """Whether the ledger has let it in, and nobody has shut it out since."""
        gate = self._admission.gate
        return self._ledger.index_of(peer_id) is not None and peer_id not in gate.banned

    async def _serve_session(self, peer_id: str, stream: Stream) -> None:
        with self._strangers.one(peer_id):
            hello = await or_refused(stream, self._receive_hello(peer_id, stream))
        if hello is None:
            return
        if not self._rates.session(peer_id, time.monotonic()):
            raise BadFrame("rate", "this peer opens too many sessions")
        if hello.watches:
            await self._watchers.serve(peer_id, stream)
            return
        if hello.agent == READER:
            await self._readers.serve(peer_id, stream)
            return
        if self.returns is not None and hello.is_ahead_of(self.returns.head):
            async with self._returning:
                await or_refused(stream, adopt(self.returns, stream, hello, lambda: None))
        await stream.send_message(self._watchers.who.now)
        await stream.ended(GOODBYE_S)

    async def _receive_hello(self, peer_id: str, stream: Stream) -> Hello:
        hello = await receive_hello(stream, self._waits.hello_s)
        self._admission.check_hello(peer_id, hello)
        return hello

    async def _serve_blobs(self, peer_id: str, stream: Stream) -> None:
        """To whom the ledger knows, to those who watch or read here, and to seats, of which one may push."""
        await self._blob_streams.serve(peer_id, stream, self._shelf_of(peer_id))

    def _may_fetch(self, peer_id: str) -> bool:
        return (
            self._is_known(peer_id)
            or peer_id in self._watchers
            or peer_id in self._readers
            or self._is_seat(peer_id)
        )

    async def _serve_status(self, peer_id: str, stream: Stream) -> None:
        """Whoever has the token, or an invitation, may ask, again and again."""
        with self._strangers.one(peer_id):
            if not await looker(stream, self._admission.gate.check_looker, self._waits.hello_s):
                return
        await tell_status(stream, self._status, self._waits.status_s)


class Shelf:
    """What is in the store, and the signatures of offers, for one peer. Nothing is stored here for nodes."""

    def __init__(self, ledger: Ledger, blobs: BlobStore, pushes: Pushes, peer_id: str) -> None:
        self._ledger, self._blobs, self._pushes, self._peer_id = ledger, blobs, pushes, peer_id

    def open(self, digest: bytes) -> tuple[BinaryIO, int]:
        """The blob and its size in bytes. Raises KeyError."""
        return open_blob(self._blobs, self._ledger.work, digest)

    def sink(self, digest: bytes, n_bytes: int) -> Sink | None:
        """Where a payload goes; None: it is here, or comes already. Raises BadMessage or OSError."""
        if not self._pushes.knows(self._peer_id):
            raise BadMessage("another seat leads: blobs are stored there")
        return self._pushes.takes(self._peer_id, digest, n_bytes)

    def stored(self, digest: bytes) -> None:
        self._pushes.taken(self._peer_id, digest)
