"""The coordinator's streams: sessions, blobs and status, and who may open them.

Every handler goes by the peer id that libp2p has proved. What one peer does wrong is counted and ends its
own stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, BinaryIO, Final

from ..compression.errors import ConfigError, SwarmUnreachable, ThinwireError
from .adoption import STALL_S, Claims, adopt
from .blobs import BlobStore, BlobWriter
from .entry.fetching import BlobStreams, open_blob
from .entry.guarded import guarded
from .entry.rates import PeerRates
from .entry.strangers import GOODBYE_S, Strangers, looker, or_refused, receive_hello, tell_status
from .observe.metrics_requests import ANSWER_TIMEOUT_S, MetricsRequests
from .observe.quiet_log import QuietLog
from .protocol.blob_streams import Coming, Sink
from .protocol.messages import (
    BadMessage,
    Elsewhere,
    Follow,
    Head,
    Heartbeat,
    Hello,
    Message,
    Metrics,
    NodeState,
    Offer,
    Offered,
    Refused,
    State,
    Welcome,
)
from .protocol.streams import BLOB, FROM_NODE, SESSION, STATUS, BadFrame, Meter, Stream
from .protocol.transport import StreamHandler
from .seats.fetching import OpenStream
from .seats.watchers import Watchers
from .service import Service
from .serving.handing_out import HandingOut
from .serving.passing_on import Nobody, PassedOn, Uploads
from .serving.signatures import SignatureChecks
from .sessions import Session

_log = logging.getLogger("thinwire.coordinator")

_REPLACED = (
    "another node with this identity has joined: every node needs a --state directory of its own, or none"
)
_ADOPTED = "the coordinator gets commits back from a node, after it was restored from an older copy"


@dataclass(frozen=True, slots=True)
class Waits:
    """For how many seconds a peer is waited for.

    `hello_s`: until a stranger has shown the token; `status_s`: between two questions for the status;
    `metrics_s`: for a node's metrics; `stall_s`: for the next bytes of commits that a node gives back.
    """

    hello_s: float = 10.0
    status_s: float = 120.0
    metrics_s: float = ANSWER_TIMEOUT_S
    stall_s: float = STALL_S


class StreamServer:
    """Open sessions by peer id, and the handlers of all streams. One event loop.

    `changed`: the service was told something. `failed`: the ledger cannot be written. `status`: for people.
    `uploaded`: a peer's bytes came in so many seconds; `asked`: a peer asks for a blob; `instead`: see
    `Referring`. `watchers`: who wants
    to hear when another seat leads, and the term by which this one does. `is_seat`: of the same run, which
    gets blobs as members do, also while they are uploaded, of which `uploads` hears. `open_stream`: for
    blobs, to a node; `me`: the peer id of this coordinator.
    """

    def __init__(
        self,
        service: Service,
        blobs: BlobStore,
        meter: Meter,
        *,
        changed: Callable[[], None],
        failed: Callable[[sqlite3.Error], None],
        status: Callable[[], dict[str, Any]],
        waits: Waits,
        watchers: Watchers,
        open_stream: OpenStream,
        me: str,
        is_seat: Callable[[str], bool] = lambda _peer_id: False,
        uploads: Uploads = Nobody(),  # noqa: B008 - has no state
        uploaded: Callable[[str, int, float], object] = lambda _peer_id, _n_bytes, _took_s: None,
        asked: Callable[[str, bytes], object] = lambda _peer_id, _digest: None,
        instead: Callable[[str, bytes, float], str | None] = lambda _peer_id, _digest, _now_s: None,
    ) -> None:
        self._uploaded, self._asked, self._instead = uploaded, asked, instead
        self._service, self._blobs, self._meter, self._uploads = service, blobs, meter, uploads
        self._changed, self._failed, self._status = changed, failed, status
        self._waits, self._watchers, self._is_seat = waits, watchers, is_seat
        self._sessions: dict[str, Session] = {}
        self._metrics_requests = MetricsRequests(self._post, answer_timeout_s=waits.metrics_s)
        self._numbers = count(1)
        self._opening = asyncio.Lock()
        """Held while one node is let in: the others wait for what it may have to give back."""
        self._claims = Claims(waits.stall_s / 2)
        self._signatures = SignatureChecks(service.is_signed)
        self._rates, self._lines = PeerRates(), QuietLog(_log, time.monotonic)
        self._handing_out = HandingOut(blobs, open_stream, me)
        self._strangers = Strangers(service.has_worked)
        self._blob_streams = BlobStreams(self._may_fetch, self._strangers, waits.hello_s)

    @property
    def handlers(self) -> dict[str, StreamHandler]:
        """By protocol."""
        served = {SESSION: self._serve_session, BLOB: self._serve_blobs, STATUS: self._serve_status}
        return {protocol: self._guarded(serve) for protocol, serve in served.items()}

    def send(self, peer_id: str, message: Message) -> None:
        """To the peer's current session, if there is one. Payloads that it gets from here go along."""
        if isinstance(message, Offered) and peer_id in self._sessions:
            message = self._handing_out.offered(peer_id, message)
        self._post(peer_id, message)

    def _post(self, peer_id: str, message: Message) -> bool:
        """False: there is no session."""
        session = self._sessions.get(peer_id)
        if session is None:
            return False
        if not session.post(message):
            self._service.count_rejected("too_slow", peer_id)
            session.stream.abort()
        return True

    def end(self, peer_id: str, why: ThinwireError) -> None:
        """The peer's session, if there is one: it is told why."""
        session = self._sessions.get(peer_id)
        if session is not None:
            session.end(Refused.of(why))

    async def metrics_of(self, peer_id: str) -> bytes:
        """A node's own, in Prometheus' text format. Raises `metrics_requests.Unanswered`."""
        return await self._metrics_requests.metrics(peer_id)

    def committed(self, round_: int) -> None:
        """There is a new commit, the newest."""
        for commit in self._service.commits(round_ - 1, 1):
            for session in self._sessions.values():
                session.committed(round_, commit)

    def beat(self, heartbeat: Heartbeat, silence_limit_s: float) -> None:
        """A heartbeat to every node; a session without a byte for so long is closed."""
        self._lines.flush()
        for session in list(self._sessions.values()):
            if time.monotonic() - session.stream.heard_s > silence_limit_s:
                session.stream.abort()
            else:
                self.send(session.peer_id, heartbeat)

    async def close(self, text: str) -> None:
        """Tells every node why its session ends, and waits for a moment until it knows."""
        await self._say_goodbye(Refused.of(SwarmUnreachable(text)))

    async def step_down(self) -> None:
        """The same for a seat that leads no more: nodes hear who does, as far as that is known."""
        await self._say_goodbye(self._watchers.who.now)

    async def _say_goodbye(self, why: Refused | Elsewhere) -> None:
        for session in self._sessions.values():
            session.end(why)
        deadline_s = time.monotonic() + GOODBYE_S
        while self._sessions and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)

    def _guarded(self, serve: Callable[[str, Stream], Awaitable[None]]) -> StreamHandler:
        return guarded(serve, self._meter, self._service.count_rejected, self._lines, self._failed)

    async def _serve_session(self, peer_id: str, stream: Stream) -> None:
        self._check_rate(peer_id)
        with self._strangers.one(peer_id):
            hello = await or_refused(stream, self._receive_hello(peer_id, stream))
        if hello is None:
            return
        if hello.watches:
            await self._watchers.serve(peer_id, stream)
            return
        opened = await or_refused(stream, self._let_in(peer_id, stream, hello))
        if opened is None:
            return
        number, welcome = opened
        session = Session(peer_id, number, stream)
        self._enter(session)
        writer = asyncio.create_task(self._write(session, welcome))
        self._changed()
        try:
            await self._read(session)
        except BadMessage as e:
            session.end(Refused.of(e))
            await asyncio.wait({writer}, timeout=GOODBYE_S)
            raise
        finally:
            self._leave(session)
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            self._service.closed(peer_id, number, time.monotonic())
            self._changed()

    def _enter(self, session: Session) -> None:
        """It is the peer's session now, in the place of an older one."""
        old = self._sessions.get(session.peer_id)
        if old is not None:
            self._metrics_requests.forget(session.peer_id)
            old.end(Refused.of(ConfigError(_REPLACED)))
        self._sessions[session.peer_id] = session

    def _leave(self, session: Session) -> None:
        """Unless a newer one has its place already."""
        if self._sessions.get(session.peer_id) is session:
            del self._sessions[session.peer_id]
            self._handing_out.forget(session.peer_id)
            self._metrics_requests.forget(session.peer_id)

    async def _receive_hello(self, peer_id: str, stream: Stream) -> Hello:
        hello = await receive_hello(stream, self._waits.hello_s)
        self._service.check(peer_id, hello)
        return hello

    async def _let_in(self, peer_id: str, stream: Stream, hello: Hello) -> tuple[int, Welcome]:
        """The session's number, and what to say first. Raises ThinwireError or OSError."""
        async with self._opening:
            if hello.is_ahead_of(self._service.head):  # it has commits that were lost here: they go first
                await self._adopt(peer_id, stream, hello)
            number = next(self._numbers)
            welcome = self._service.open(peer_id, number, hello, time.monotonic())
            return number, welcome.model_copy(update={"term": self._watchers.who.now.term})

    async def _adopt(self, peer_id: str, stream: Stream, hello: Hello) -> None:
        """Strangers are as many as they like: they are one."""
        who = peer_id if self._service.has_worked(peer_id) else ""
        head, began_s = self._service.head, time.monotonic()
        self._claims.check(who, began_s)
        try:
            await adopt(self._service, stream, hello, self._end_all, self._waits.stall_s)
        finally:
            if self._service.head == head:
                now_s = time.monotonic()
                self._claims.was_in_vain(who, now_s - began_s, now_s)
            self._changed()

    def _check_rate(self, peer_id: str) -> None:
        has_worked = self._service.has_worked(peer_id)
        if not self._rates.session(peer_id, time.monotonic(), has_worked=has_worked):
            raise BadFrame("rate", "this peer opens too many sessions")

    def _end_all(self) -> None:
        """There are adopted commits: every node that is here has to come anew."""
        for session in self._sessions.values():
            session.end(Refused.of(SwarmUnreachable(_ADOPTED)))

    async def _write(self, session: Session, welcome: Message) -> None:
        """The session's sending half; when it cannot go on, the receiving half ends too."""
        try:
            await session.stream.send_message(welcome)
            await session.write(self._service.commits)
            await asyncio.sleep(1.0)  # the node closes the stream when it has read the reason
        except OSError as e:
            _log.debug("cannot send to %s: %s", session.peer_id, e)
        session.stream.abort()

    async def _read(self, session: Session) -> None:
        """Until the node closes the session. Raises BadMessage or OSError."""
        while True:
            try:
                message = await session.stream.receive_message(FROM_NODE)
            except EOFError:
                return
            n_bytes, now_s = session.stream.frame_bytes, time.monotonic()
            if (what := self._rates.message(session.peer_id, message, n_bytes, now_s)) is not None:
                raise BadFrame("rate", f"it sends too many {what}")
            if session.is_ending:
                continue  # nobody answers any more, but the node has not read why yet
            if isinstance(message, Follow):
                session.follow(message.after)
            elif isinstance(message, Metrics):
                if self._sessions.get(session.peer_id) is session:
                    self._metrics_requests.answered(session.peer_id, message)
            else:
                if isinstance(message, Offer):
                    await self._refuse_unsigned(session.peer_id, message)
                self._service.receive(session.peer_id, session.number, message, time.monotonic())
                self._changed()
            if isinstance(message, State) and message.state is NodeState.LEAVING:
                session.post(Head(round=self._service.head))  # all that came before has been read

    async def _refuse_unsigned(self, peer_id: str, offer: Offer) -> None:
        """Raises BadMessage."""
        if not await self._signatures.is_signed(peer_id, offer):
            self._service.count_rejected("signature", peer_id)
            raise BadMessage(f"the offer of round {offer.round} is not signed by its peer")

    async def _serve_blobs(self, peer_id: str, stream: Stream) -> None:
        uploaded, asked = partial(self._uploaded, peer_id), partial(self._asked, peer_id)
        shelf = _Shelf(self._service, self._blobs, peer_id, self._changed, self._uploads, uploaded, asked)
        coming, given = self._coming_for(peer_id), partial(self._uploads.given, peer_id)
        await self._blob_streams.serve(
            peer_id,
            stream,
            shelf,
            coming=coming,
            given=given,
            elsewhere=lambda digest: self._instead(peer_id, digest, time.monotonic()),
        )

    def _coming_for(self, peer_id: str) -> Callable[[bytes], Coming | None]:
        """What is being uploaded, for other seats alone."""

        def coming(digest: bytes) -> Coming | None:
            goes_on = partial(self._uploads.passes_on, digest)
            writer = self._blobs.coming(digest) if self._is_seat(peer_id) and goes_on() else None
            return None if writer is None else PassedOn(writer, goes_on)

        return coming

    def _may_fetch(self, peer_id: str) -> bool:
        """Members may, other seats, and who watches (a seat that led before may have let it in); they may not
        store."""
        return self._service.is_member(peer_id) or peer_id in self._watchers or self._is_seat(peer_id)

    async def _serve_status(self, peer_id: str, stream: Stream) -> None:
        """Whoever has the token, or an invitation, may ask, again and again."""
        with self._strangers.one(peer_id):
            if not await looker(stream, self._service.check_looker, self._waits.hello_s):
                return
        await tell_status(stream, self._status, self._waits.status_s)


class _Shelf:
    """The coordinator's blobs as one peer may use them."""

    def __init__(
        self,
        service: Service,
        blobs: BlobStore,
        peer_id: str,
        changed: Callable[[], None],
        uploads: Uploads,
        uploaded: Callable[[int, float], object],
        asked: Callable[[bytes], object],
    ) -> None:
        self._service, self._blobs, self._peer_id, self._changed = service, blobs, peer_id, changed
        self._uploads, self._uploaded, self._asked = uploads, uploaded, asked

    def open(self, digest: bytes) -> tuple[BinaryIO, int]:
        """The blob and its size in bytes. Raises KeyError."""
        self._asked(digest)
        return open_blob(self._blobs, self._service.signatures, digest)

    def sink(self, digest: bytes, n_bytes: int) -> Sink | None:
        """Where an upload goes; None: the blob is here. Raises BadMessage."""
        if digest in self._blobs:
            return None
        self._service.may_store(self._peer_id, n_bytes)
        not_stored = partial(self._service.not_stored, self._peer_id, n_bytes)
        with _disk(not_stored):
            writer = self._blobs.writer(digest, n_bytes, self._peer_id)
        self._uploads.begins(digest, n_bytes)
        return _Upload(writer, not_stored, partial(self._ends, digest), self._uploaded)

    def _ends(self, digest: bytes, *, is_stored: bool) -> None:
        if is_stored or self._blobs.coming(digest) is None:  # else it comes twice
            self._uploads.ends(digest, is_stored=is_stored)

    def stored(self, digest: bytes) -> None:
        """An upload is complete."""
        self._service.blob_arrived(self._peer_id, digest, time.monotonic())
        self._changed()


class _Upload:
    """A `BlobWriter` whose disk may be full. `uploaded` hears how long the bytes after the first chunk
    took."""

    is_quick: Final = False

    def __init__(
        self,
        writer: BlobWriter,
        not_stored: Callable[[], None],
        ends: Callable[..., None],
        uploaded: Callable[[int, float], object],
    ) -> None:
        self._writer, self._not_stored, self._ends, self._uploaded = writer, not_stored, ends, uploaded
        self._failed: OSError | None = None
        self._n_measured, self._first_s, self._last_s = -1, 0.0, 0.0

    def write(self, chunk: bytes) -> None:
        self._last_s = time.monotonic()
        if self._n_measured < 0:
            self._n_measured, self._first_s = 0, self._last_s
        else:
            self._n_measured += len(chunk)
        with _disk(self._not_stored):
            self._writer.write(chunk)

    def sync(self) -> None:
        try:
            self._writer.sync()
        except OSError as e:
            self._failed = e  # told by `finish`, in the event loop

    def finish(self) -> int:
        with _disk(self._not_stored):
            if self._failed is not None:
                raise self._failed
            n_bytes = self._writer.finish()
        if self._n_measured > 0:
            self._uploaded(self._n_measured, self._last_s - self._first_s)
        self._ends(is_stored=True)
        return n_bytes

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.abort()
        self._ends(is_stored=False)


@contextlib.contextmanager
def _disk(not_stored: Callable[[], None]) -> Iterator[None]:
    """The disk's errors are told to the operator, and to the peer as a refusal; it may try again."""
    try:
        yield
    except OSError as e:
        _log.error("a payload cannot be stored: %s", e)
        not_stored()
        raise BadMessage("the coordinator cannot store payloads: its disk is full or broken") from e
