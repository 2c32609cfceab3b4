"""The coordinator as a server: a `Service` behind libp2p streams, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import count
from typing import Any, BinaryIO

from thinwire.compression.errors import (
    ConfigError,
    Incompatible,
    LedgerCorrupt,
    SwarmUnreachable,
    ThinwireError,
)
from thinwire.coordinator.blob_streams import Sink, serve_blobs
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.identity import load_or_create
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.messages import (
    BadMessage,
    Follow,
    GenesisBody,
    Head,
    Heartbeat,
    Hello,
    Message,
    NodeState,
    Refused,
    State,
    digest_of,
)
from thinwire.coordinator.p2p import Host, StreamHandler, start_p2p
from thinwire.coordinator.service import Service
from thinwire.coordinator.sessions import Session
from thinwire.coordinator.settings import parse_settings
from thinwire.coordinator.state import StateDir
from thinwire.coordinator.streams import BLOB, FROM_NODE, SESSION, STATUS, BadFrame, Kind, Meter, Stream
from thinwire.coordinator.ticket import Ticket

_log = logging.getLogger("thinwire.coordinator")

HELLO_TIMEOUT_S = 10.0
STATUS_IDLE_S = 120.0
MAX_STRANGERS = 64
"""Streams of peers that have not shown the token yet."""

MAX_STRANGE_STREAMS = 8
"""Of one such peer."""

MAX_BLOB_STREAMS = 8
"""Of one member."""

SILENT_SESSION_S = 30.0
"""A session without a byte for this long, and for three times the run's own limit, is closed."""

DEFAULT_QUOTA_BYTES = 20 * 10**9


class CoordinatorServer:
    """Serves one run from its state directory: `start`, then `run_until_finished`, then `stop`.

    A new directory needs the run's `genesis` (with the coordinator's peer id) and the `blobs` that it names;
    afterwards both are left out. Identity and port stay the same over restarts.
    """

    def __init__(
        self,
        state: StateDir,
        *,
        genesis: GenesisBody | None = None,
        blobs: Sequence[bytes] = (),
        host: str = "0.0.0.0",
        port: int = 0,
        announce: Sequence[str] = (),
        quota_bytes: int = DEFAULT_QUOTA_BYTES,
    ) -> None:
        """Raises ConfigError or LedgerCorrupt."""
        self._state, self._host_ip, self._port, self._announce = state, host, port, tuple(announce)
        self._token = state.token()
        self.blobs = BlobStore(state.blobs_path, quota_bytes)
        for blob in blobs:
            self.blobs.put(digest_of(blob), blob)
        key = self._key = load_or_create(state.key_path)
        if genesis is None:
            self.ledger = Ledger.open(state.ledger_path, key.public_key())
        else:
            self.ledger = Ledger.create(state.ledger_path, genesis, key)
        self.service = Service(
            ledger=self.ledger,
            blobs=self.blobs,
            key=key,
            token=self._token,
            send=self._send,
            on_commit=self._wake_sessions,
            now_s=time.monotonic(),
            wall_ms=lambda: time.time_ns() // 10**6,
        )
        self._settings = parse_settings(self.ledger.genesis.config)
        self._silence_limit_s = max(SILENT_SESSION_S, 3 * self._settings.silence_s)
        self.meter = Meter()
        self._sessions: dict[str, Session] = {}
        self._numbers = count(1)
        self._strangers: Counter[str] = Counter()
        self._blob_streams: dict[str, int] = {}
        self._p2p: Host | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._is_stopped = False
        self._tasks: list[asyncio.Task[None]] = []

    # ------------------------------------------------------------------------------------ start and stop

    async def start(self) -> None:
        """Listens; nodes can join when this returns. Raises ConfigError (a taken port, a bad address)."""
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._port = self._port or self._state.port() or 0
        await self._listen()
        self._state.save_port(self._port)
        self._tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._watch_p2p())]
        self._tick()

    @property
    def ticket(self) -> Ticket:
        """What nodes need to join; valid once started, and after every restart on this state directory."""
        assert self._p2p is not None, "the server is not started"
        return Ticket(
            peer_id=self._p2p.peer_id,
            addresses=self._p2p.addresses,
            run_id=self.ledger.run_id,
            token=self._token,
        )

    async def run_until_finished(self) -> None:
        """Returns when the last round is acknowledged. Raises what made the server fail."""
        await asyncio.shield(self._done)

    async def stop(self) -> None:
        """Tells nodes that the coordinator stops, ends libp2p and closes the ledger. May be called twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._is_stopped = True
        text = "the run is over" if self.service.finished else "the coordinator was stopped"
        for session in self._sessions.values():
            session.end(Refused(error="SwarmUnreachable", text=text))
        deadline_s = time.monotonic() + 2.0
        while self._sessions and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)
        if self._p2p is not None:
            await self._p2p.close()
            self._p2p = None
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        self.ledger.close()
        self._done.cancel()

    def status(self) -> dict[str, Any]:
        """The service's, and the bytes of this process."""
        traffic = {"sent_bytes": dict(self.meter.sent), "received_bytes": dict(self.meter.received)}
        return {**self.service.status(time.monotonic()), "coordinator": traffic}

    async def _listen(self) -> None:
        self._p2p = await start_p2p(self._key, host=self._host_ip, port=self._port, announce=self._announce)
        self._port = self._p2p.port
        await self._p2p.handle(SESSION, self._guarded(self._serve_session))
        await self._p2p.handle(BLOB, self._guarded(self._serve_blobs))
        await self._p2p.handle(STATUS, self._guarded(self._serve_status))

    async def _watch_p2p(self) -> None:
        """libp2p runs in a process of its own: if that dies, another one takes its port and identity."""
        while True:
            assert self._p2p is not None
            await self._p2p.died.wait()
            _log.warning("libp2p has ended unexpectedly: starting it again on port %d", self._port)
            await self._p2p.close()
            try:
                await self._listen()
            except ThinwireError as e:
                self._fail(e)
                return

    def _fail(self, error: BaseException) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    # ------------------------------------------------------------------------------------ the service's side

    def _send(self, peer_id: str, message: Message) -> None:
        session = self._sessions.get(peer_id)
        if session is not None and not session.post(message):
            self.service.count_rejected("too_slow")
            session.stream.abort()

    def _wake_sessions(self, _round: int) -> None:
        for session in self._sessions.values():
            session.wake()

    def _tick(self) -> None:
        """Lets the service's time pass, now and when it wants it again."""
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        now_s = time.monotonic()
        try:
            again_s = self.service.tick(now_s)
        except sqlite3.Error as e:
            self._fail(LedgerCorrupt(f"the ledger cannot be written: {e}"))
            return
        if self.service.finished and not self._done.done():
            self._done.set_result(None)
        loop = asyncio.get_running_loop()
        self._tick_timer = loop.call_later(max(0.001, again_s - now_s), self._tick)

    def _soon(self) -> None:
        """A tick after whatever else is ready now."""
        if self._is_stopped:
            return
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        self._tick_timer = asyncio.get_running_loop().call_later(0, self._tick)

    async def _beat(self) -> None:
        """Heartbeats to every node; sessions that have long been silent are closed."""
        while True:
            await asyncio.sleep(self._settings.network.heartbeat_s)
            sent, received = self.meter.totals()
            beat = Heartbeat(
                round=self.service.head,
                sent_bytes=sent,
                received_bytes=received,
                payload_bytes=self.meter.received["payload"],
            )
            for session in list(self._sessions.values()):
                if time.monotonic() - session.stream.heard_s > self._silence_limit_s:
                    session.stream.abort()
                else:
                    self._send(session.peer_id, beat)

    # ------------------------------------------------------------------------------------ streams

    def _guarded(self, serve: Callable[[str, Stream], Awaitable[None]]) -> StreamHandler:
        """A stream handler that answers for what a peer does wrong, and lets nobody else notice."""

        async def handler(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = Stream(reader, writer, self.meter)
            try:
                await serve(peer_id, stream)
            except BadMessage as e:
                if isinstance(e, BadFrame):  # what the service refuses it counts itself
                    self.service.count_rejected(e.reason)
                _log.info("closed a stream of %s: %s", peer_id, e)
            except (OSError, EOFError, TimeoutError, SwarmUnreachable) as e:
                _log.debug("a stream of %s ended: %s", peer_id, e)
            except sqlite3.Error as e:
                self._fail(LedgerCorrupt(f"the ledger cannot be written: {e}"))
            except Exception:  # noqa: BLE001 - the edge: a fault met in serving one peer must not end the run
                _log.exception("a stream of %s met a fault of ours", peer_id)
                self.service.count_rejected("internal")

        return handler

    @contextlib.contextmanager
    def _stranger(self, peer_id: str) -> Iterator[None]:
        """Limits how many streams may be open, and for how long, without the token having been shown."""
        if self._strangers.total() >= MAX_STRANGERS or self._strangers[peer_id] >= MAX_STRANGE_STREAMS:
            raise BadFrame("strangers", "too many streams that have not said hello")
        self._strangers[peer_id] += 1
        try:
            yield
        finally:
            self._strangers -= Counter((peer_id,))

    async def _serve_session(self, peer_id: str, stream: Stream) -> None:
        number = next(self._numbers)
        with self._stranger(peer_id):
            try:
                async with asyncio.timeout(HELLO_TIMEOUT_S):
                    hello = await stream.receive_message(FROM_NODE)
                if not isinstance(hello, Hello):
                    raise BadFrame("hello", f"a session starts with Hello, not {type(hello).__name__}")
                welcome = self.service.open(peer_id, number, hello, time.monotonic())
            except ThinwireError as e:
                await _refuse(stream, e)
                if isinstance(e, BadMessage):
                    raise
                return
        old = self._sessions.get(peer_id)
        if old is not None:
            old.end(Refused(error="ConfigError", text=_REPLACED))
        session = Session(peer_id, number, stream)
        self._sessions[peer_id] = session
        writer = asyncio.create_task(self._write(session, welcome))
        self._soon()
        try:
            await self._read(session)
        except BadMessage as e:
            session.end(_refusal(e))
            await asyncio.wait({writer}, timeout=2.0)
            raise
        finally:
            if self._sessions.get(peer_id) is session:
                del self._sessions[peer_id]
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            self.service.closed(peer_id, number, time.monotonic())
            self._soon()

    async def _write(self, session: Session, welcome: Message) -> None:
        """The session's sending half; when it cannot go on, the receiving half ends too."""
        try:
            await session.stream.send_message(welcome)
            await session.write(self.service.commits)
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
            if isinstance(message, Follow):
                session.follow(message.after)
            else:
                self.service.receive(session.peer_id, session.number, message, time.monotonic())
                self._soon()
            if isinstance(message, State) and message.state is NodeState.LEAVING:
                session.post(Head(round=self.service.head))  # all that came before has been read

    async def _serve_blobs(self, peer_id: str, stream: Stream) -> None:
        open_streams = self._blob_streams.get(peer_id, 0)
        if open_streams >= MAX_BLOB_STREAMS:
            raise BadFrame("blob_streams", f"more than {MAX_BLOB_STREAMS} blob streams")
        self._blob_streams[peer_id] = open_streams + 1
        try:
            if self.service.is_member(peer_id):
                shelf = _StoreShelf(self, peer_id)
                await serve_blobs(stream, shelf, "payload", lambda: self.service.is_member(peer_id))
            else:
                with self._stranger(peer_id):
                    async with asyncio.timeout(HELLO_TIMEOUT_S):
                        await serve_blobs(stream, _StoreShelf(self, peer_id), "control", lambda: False)
        finally:
            self._blob_streams[peer_id] -= 1
            if not self._blob_streams[peer_id]:
                del self._blob_streams[peer_id]

    async def _serve_status(self, peer_id: str, stream: Stream) -> None:
        """Whoever knows the token may ask, again and again."""
        with self._stranger(peer_id):
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                frame = await stream.receive({Kind.ASK: 200})
            if not hmac.compare_digest(frame.body, self._token.encode()):
                self.service.count_rejected("token")
                await _refuse(stream, ConfigError("the ticket's token is wrong: ask for a new ticket"))
                return
        while True:
            await stream.send(Kind.STATUS, json.dumps(self.status()).encode())
            async with asyncio.timeout(STATUS_IDLE_S):
                await stream.receive({Kind.ASK: 200})


async def _refuse(stream: Stream, error: ThinwireError) -> None:
    with contextlib.suppress(OSError):
        await stream.send_message(_refusal(error))
        await stream.ended(2.0)


def _refusal(error: ThinwireError) -> Refused:
    known = isinstance(error, ConfigError | Incompatible | LedgerCorrupt)
    return Refused(error=type(error).__name__ if known else "BadMessage", text=str(error)[:2000])


_REPLACED = (
    "another node with this identity has joined: every node needs a --state directory of its own, or none"
)


class _StoreShelf:
    """The coordinator's blobs as one member may use them."""

    def __init__(self, server: CoordinatorServer, peer_id: str) -> None:
        self._server, self._peer_id = server, peer_id

    def open(self, digest: bytes) -> tuple[BinaryIO, int]:
        n_bytes = self._server.blobs.size(digest)
        if n_bytes is None:
            raise KeyError(digest.hex())
        return self._server.blobs.open(digest), n_bytes

    def sink(self, digest: bytes, n_bytes: int) -> Sink | None:
        if digest in self._server.blobs:
            return None
        self._server.service.may_store(self._peer_id, n_bytes)
        return self._server.blobs.writer(digest)

    def stored(self, digest: bytes) -> None:
        self._server.service.blob_arrived(self._peer_id, digest, time.monotonic())
        self._server._soon()
