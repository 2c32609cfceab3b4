"""What the links of real networks share: the session runs in an event loop of its own thread, the node calls
from its thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import SwarmUnreachable
from ...coordinator.protocol.blob_streams import Base
from ...coordinator.protocol.ledger_copy import COPY_NAME, LedgerCopy
from ...coordinator.protocol.messages import (
    MAX_ROUND,
    Audit,
    Commit,
    Digest,
    Evaluation,
    NodeState,
    Offer,
    OfferEntry,
    Report,
    Verdict,
    Welcome,
)
from ...coordinator.protocol.streams import Meter, TrafficKind
from ...coordinator.protocol.ticket import Ticket
from ...coordinator.protocol.trust.audits import sign_audit
from ..gossip.base import NeighbourLink
from ..gossip.remote import RemoteNeighbours
from ..gossip.streams import NeighbourStreams
from .base import LinkEvent, Shelf, Traffic
from .connecting.begun import Begun
from .connecting.connecting import OpenTransport
from .core import About, LinkCore
from .mailbox import Mailbox
from .upload_limit import UploadLimit

T = TypeVar("T")

_READ_AT_ONCE = 64


class RemoteLink:
    """See `Link`. `open_transport`: opens this node's transport in the network; `run_folder`: where this
    run's copy of the ledger is kept, None: in memory.

    `patience_s`: how long to go on trying when the coordinator does not answer any more. `limit`: of all that
    this node sends. `key`: signs its offers and audits; None: the peer id is only a name. `metrics`: this
    node's, in Prometheus' text format, for when the coordinator asks; called in a thread of its own. `about`:
    what people are told of this node.
    """

    def __init__(
        self,
        ticket: Ticket,
        peer_id: str,
        open_transport: OpenTransport,
        *,
        run_folder: Path | None = None,
        patience_s: float = 600.0,
        limit: UploadLimit | None = None,
        key: Ed25519PrivateKey | None = None,
        metrics: Callable[[], bytes] = bytes,
        about: About = About(),  # noqa: B008 - frozen
    ) -> None:
        self.run_id = ticket.run_id
        self._ticket, self._patience_s, self._limit = ticket, patience_s, limit
        self._key, self._metrics, self._about = key, metrics, about
        self.peer_id, self.run_folder = peer_id, run_folder
        self._open_transport = open_transport
        self._mailbox = Mailbox()
        self._meter = Meter()
        self._closing = threading.Lock()
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._core: LinkCore | None = None
        self._copy: LedgerCopy | None = None
        self._copy_path = None if self.run_folder is None else self.run_folder / COPY_NAME
        self._begun: Begun | None = None
        self.neighbours: NeighbourLink | None = RemoteNeighbours(_InLoop(self), self.run_id, key)

    # ----------------------------------------------------------------------------- the node's thread

    def begin(self) -> None:
        """Opens the transport, without a word to anybody, while the node has other things to do. Before
        `open`, which raises what this fails with."""
        with self._closing:
            if not self._is_closed and self._loop is None:
                self._start_loop().call_soon_threadsafe(self._begin)

    def open(self) -> Welcome:
        with self._closing:
            if self._is_closed or self._copy is not None:
                raise SwarmUnreachable(
                    "the link is closed" if self._is_closed else "the link is open already"
                )
            copy = self._copy = LedgerCopy(self._copy_path, self.run_id, self._ticket.peer_id)
            if self._loop is None:
                self._start_loop()
        try:
            return self._wait(self._open(copy))
        except BaseException:
            self.close()
            raise

    def _start_loop(self) -> asyncio.AbstractEventLoop:
        loop = self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run, args=(loop,), name="link", daemon=True)
        self._thread.start()
        return loop

    def _begin(self) -> None:
        self._open_transport = self._begun = Begun(self._open_transport)

    async def _open(self, copy: LedgerCopy) -> Welcome:
        self._core = LinkCore(
            self._ticket,
            self._open_transport,
            self._mailbox,
            self._meter,
            self._patience_s,
            peer_id=self.peer_id,
            copy=copy,
            copy_path=self._copy_path,
            limit=self._limit,
            key=self._key,
            metrics=self._metrics,
            about=self._about,
        )
        return await self._core.open()

    @property
    def head(self) -> int:
        return 0 if self._core is None else self._core.commits.head

    def state(self, state: NodeState, needs_after: int | None = None, last_word: str = "") -> None:
        self._soon(lambda core: core.say_state(state, needs_after, last_word))

    def offer(self, offer: Offer) -> None:
        if offer.payload is None:
            raise ValueError("offer.payload carries the payload's bytes")
        self._soon(lambda core: core.make_offer(offer))

    def report(self, report: Report | Evaluation) -> None:
        self._soon(lambda core: core.make_report(report))

    def audit(self, round_: int, target: int, verdict: Verdict, claim: bytes) -> None:
        signature = sign_audit(self._key, claim)
        audit = Audit(round=round_, target=target, verdict=verdict, signature=signature)
        self._soon(lambda core: core.make_audit(audit))

    def records(self, after: int) -> Iterator[Commit]:
        yield from self._read(after, self.head)

    def commits(self, after: int) -> Iterator[Commit]:
        for commit in self._read(after, MAX_ROUND):
            self._take(commit.body.round)
            yield commit

    def _take(self, round_: int) -> None:
        if self._core is not None and self._core.commits.taken(round_):
            self._soon(lambda core: core.commits.fetch_ahead())

    def _read(self, after: int, up_to: int) -> Iterator[Commit]:
        """From the copy, as it grows; ends when the link is closed."""
        copy = self._copy
        while copy is not None and after < up_to:
            if not self._mailbox.wait(partial(_goes_past, copy, after)):
                return
            for commit in copy.commits(after, min(_READ_AT_ONCE, up_to - after)):
                if self._mailbox.is_closed:
                    return
                after += 1
                yield commit

    def payload(self, offer: OfferEntry) -> bytes:
        if offer.payload is not None:
            return offer.payload
        core = self._opened()
        here = None if offer.digest is None else core.kept.get(offer.digest)
        return self._wait(core.commits.payload(offer)) if here is None else here

    def fetch(
        self, digest: Digest, n_bytes: int, holder: str | None = None, base: Base | None = None
    ) -> bytes:
        blobs = self._opened().blobs
        if holder is None:
            return self._wait(blobs.fetch(digest, n_bytes))
        return self._wait(blobs.fetch_from(holder, digest, n_bytes, base))

    def keep_payloads(self, after: int) -> None:
        self._soon(lambda core: core.kept.keep_after(after))

    def has_payload(self, digest: Digest) -> bool:
        return self._core is not None and digest in self._core.kept

    def members(self) -> list[str]:
        return [] if self._core is None else self._core.blobs.members()

    def serve(self, shelf: Shelf | None) -> None:
        if self._core is not None:
            self._core.served.shelf = shelf

    def events(self) -> Iterator[LinkEvent]:
        while (event := self._mailbox.take_event()) is not None:
            yield event

    def traffic(self) -> Traffic:
        return Traffic(
            _without_heartbeats(self._meter.sent),
            _without_heartbeats(self._meter.received),
            None if self._core is None else self._core.offers.upload_bytes_per_s,
            {} if self._core is None else dict(self._core.not_taken),
        )

    def close(self) -> None:
        self._end(say_goodbye=True)

    def kill(self) -> None:
        """Ends the session as a crash of the node does: without a word."""
        self._end(say_goodbye=False)

    def _end(self, say_goodbye: bool) -> None:
        with self._closing:
            was_closed, self._is_closed = self._is_closed, True
            loop, thread = self._loop, self._thread
            if not was_closed and loop is not None and thread is not None:
                done = asyncio.run_coroutine_threadsafe(self._shut(say_goodbye), loop)
                self._mailbox.close()
                done.result()
                loop.call_soon_threadsafe(loop.stop)
                thread.join()
                loop.close()
            self._mailbox.close()
            if self._copy is not None:
                self._copy.close()

    async def _shut(self, say_goodbye: bool) -> None:
        """Ends the session, then whatever still runs in the loop, so that nobody waits for it."""
        if self._core is not None:
            await self._core.close(say_goodbye)
        if self._begun is not None:
            await self._begun.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_default_executor()

    def _opened(self) -> LinkCore:
        if self._core is None or self._is_closed:
            raise SwarmUnreachable("the link is not open")
        return self._core

    def _soon(self, work: Callable[[LinkCore], object]) -> None:
        """Does it in the loop; does nothing where there is no session."""
        if self._core is None or self._loop is None or self._is_closed:
            return
        try:
            self._loop.call_soon_threadsafe(work, self._core)
        except RuntimeError:  # the loop was closed by another thread meanwhile
            return

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work in the loop. Raises SwarmUnreachable when the link is closed meanwhile."""
        assert self._loop is not None
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except (concurrent.futures.CancelledError, RuntimeError) as e:
            work.close()
            if self._is_closed:
                raise SwarmUnreachable("the link was closed") from e
            raise


class _InLoop:
    """How the link's neighbours are reached, see `InLoop`."""

    def __init__(self, link: RemoteLink) -> None:
        self._link = link

    def soon(self, work: Callable[[NeighbourStreams], object]) -> None:
        self._link._soon(lambda core: work(core.neighbours))

    def wait(self, work: Callable[[NeighbourStreams], Coroutine[Any, Any, Any]]) -> Any:
        return self._link._wait(work(self._link._opened().neighbours))

    def now(self) -> NeighbourStreams | None:
        core = self._link._core
        return None if core is None else core.neighbours


def _goes_past(copy: LedgerCopy, round_: int) -> bool:
    return copy.head_round > round_


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """In a thread of its own: until the loop is stopped. Ends what other threads have asked for while it was
    about to stop: they wait for an answer."""

    async def cancel_all() -> None:
        late = asyncio.all_tasks() - {asyncio.current_task()}
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    loop.run_forever()
    loop.run_until_complete(cancel_all())


def _without_heartbeats(counts: Mapping[TrafficKind, int]) -> dict[str, int]:
    return {str(purpose): n for purpose, n in counts.items() if purpose != "heartbeat"}
