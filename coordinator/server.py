"""The coordinator as a server: a `Service` behind libp2p streams, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..compression.errors import ConfigError, LedgerCorrupt, ThinwireError
from .admission import AdmissionControl
from .blobs import BlobStore
from .control.door import Door
from .control.orders import MODES, CheckStrategy, Order, Ordered, no_strategy
from .entry.guard import guard, rules_of, save_address
from .last_snapshot import LastSnapshot, Wanted, leaves_room
from .ledger import Ledger
from .observe.metrics import with_trust
from .protocol.addresses import HttpAddress
from .protocol.figures import wall_ms
from .protocol.files import disk_error
from .protocol.identity import load_or_create, peer_id_of
from .protocol.messages import GenesisBody, Heartbeat, Message, SeatEntry, digest_of
from .protocol.p2p import start_p2p
from .protocol.settings import Keep, parse_settings, strategy_options
from .protocol.streams import BLOB, Meter, Stream
from .protocol.ticket import Ticket
from .protocol.transport import Transport
from .quorum.log import Log
from .quorum.recollection import Recollection
from .seats.elsewhere import ElsewhereServer
from .seats.hosting import Hosting
from .seats.naming import Wish, wish_of
from .seats.plan import SeatPlan
from .seats.reception import Reception
from .seats.recovering import Returns, check_key, recovery_record
from .seats.ticket import FILE_NAME, keep_ticket
from .seats.view import for_the_page, status_alone
from .seats.watchers import Watchers, WhoLeads
from .service import Service
from .serving.fanout import UPLOAD_BYTES_PER_S, Fanout
from .serving.history import KeptHistory
from .serving.machine import free_bytes, machine
from .serving.passing_on import Nobody, Uploads
from .serving.pulse import Pulse
from .state import StateDir
from .stream_server import StreamServer, Waits

_log = logging.getLogger("thinwire.coordinator")

SILENT_SESSION_S = 30.0
"""A session without a byte for this long, and for three times the run's own limit, is closed."""

LOOK_EVERY_S = 1.0
OPEN_TIMEOUT_S = 10.0


StartTransport = Callable[..., Awaitable[Transport]]
"""Opens the coordinator's transport in a network; takes the arguments of `start_p2p`."""


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
        keep: Keep | None = None,
        start_transport: StartTransport = start_p2p,
        waits: Waits = Waits(),  # noqa: B008 - frozen
        check_strategy: CheckStrategy = no_strategy,
        keeps_last_snapshot: bool = False,
        loss_unit: str | None = None,
        seats: SeatPlan | None = None,
        upload_bytes_per_s: float = UPLOAD_BYTES_PER_S,
    ) -> None:
        """`keep`: None: what the state folder says. `check_strategy`: of what the run's owner changes;
        `keeps_last_snapshot`: for those who join or export when the run is over and its nodes are gone.
        `seats`: this coordinator is one seat of several, or is to be; None: it orders the run alone.
        `upload_bytes_per_s`: what its line sends.

        Raises ConfigError or LedgerCorrupt."""
        self._state, self._host_ip, self._port, self._announce = state, host, port, tuple(announce)
        self._start_transport, self._loss_unit = start_transport, loss_unit
        self._token = state.token()
        self._check_strategy = check_strategy
        self._keep = keep or state.keep()
        self.blobs = BlobStore(state.blobs_path)
        for blob in blobs:
            self.blobs.put(digest_of(blob), blob)
        self._key = load_or_create(state.key_path)
        if genesis is None:
            self.ledger = Ledger.open(state.ledger_path, self._key.public_key())
        else:
            self.ledger = Ledger.create(state.ledger_path, genesis, self._key)
        self._history = KeptHistory(state, self.ledger, self._key, lambda: self._reign)
        self._settings = parse_settings(self.ledger.genesis.config)
        self._silence_limit_s = max(SILENT_SESSION_S, 3 * self._settings.silence_s)
        self.meter, self.fanout = Meter(), Fanout(upload_bytes_per_s)
        me = self._me = peer_id_of(self._key.public_key())
        self._since_ms = wall_ms()
        self.watchers = Watchers(
            WhoLeads(me), lambda: self.ledger.head_round, self._settings.network.heartbeat_s
        )
        self._waits = waits
        self._reception = Reception()
        self._reign: Service | None = None
        self._pulse = Pulse(self._tick)
        self._stream_server: StreamServer | None = None
        self._farewells: set[asyncio.Task[None]] = set()
        self._seat: Hosting | None = None
        self._returns: Returns | None = None
        if seats is None and not self.ledger.committee.is_only(me):
            seats = SeatPlan.of(state.path)
        if seats is None:
            self._serve_run(self._new_service(), lambda _peer_id: False, Nobody())
        else:
            self._seat = self._hosting(seats)
            self._serve_elsewhere()
        self._door = Door(
            state.path, self._order, self._is_ordered, self._count_bad_order, self._foresee, self.status
        )
        self._last_snapshot = LastSnapshot(
            self.blobs, self._wanted_snapshot, self._open_stream_to, self._has_room
        )
        self._keeps_last_snapshot = keeps_last_snapshot
        self._done: asyncio.Future[None] | None = None
        self.failure: ThinwireError | None = None
        """What made the server fail, also when the run is over."""
        self._transport: Transport | None = None
        self._is_stopped = False
        self._tasks: list[asyncio.Task[None]] = []
        self.on_new_ticket: Callable[[], object] = bool
        """Called when the ticket is another one."""
        self.http: HttpAddress | None = None
        """Where this coordinator is served over HTTP, too: told to those who ask for the status."""

    @property
    def reign(self) -> Service | None:
        """See `hosting.Reigns`, also for the two below. None: another seat leads."""
        return self._reign

    @property
    def service(self) -> Service:
        """Of who leads. Raises ConfigError: another seat does."""
        if self._reign is None:
            leader = self.watchers.who.now.leader
            who = f"coordinator {leader} leads" if leader is not None else "no coordinator leads now"
            raise ConfigError(f"{who}: ask there, this one follows")
        return self._reign

    def begin_reign(self, log: Log, recollection: Recollection, held: Callable[[bytes], bool]) -> None:
        assert self._seat is not None
        service = self._new_service(log=log, recollection=recollection, held=held)
        council = self._seat.council
        self._serve_run(service, council.knows, council.uploads)
        self._pulse.soon()

    def end_reign(self, why: str) -> None:
        service, stream_server = self._reign, self._stream_server
        self._reign = self._stream_server = None
        self._pulse.rest()
        self._serve_elsewhere()
        if service is not None:
            service.drop()
            self._door.reign_ended(service.proposed)
        if stream_server is not None:
            farewell = asyncio.create_task(stream_server.step_down())
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)

    def followed(self, round_: int) -> None:
        """See `hosting.Reigns`."""
        self._door.committed(round_)
        self._last_snapshot.wake()

    def renewed(self) -> None:
        """See `hosting.Reigns`."""
        if self._transport is not None:
            self._save_tickets()
            self.on_new_ticket()
        if self._reign is None:
            self._serve_elsewhere()

    async def recover(self, key: Ed25519PrivateKey, wait_s: float) -> None:
        """Goes on alone, by a record that the run's recovery key signs, upon the newest round that this seat,
        others or nodes have, which are waited for. Raises ConfigError: that is not the key, or nothing is to
        be recovered."""
        seat = self._seat
        if seat is None or self.ledger.committee.is_only(seat.council.me):
            _log.info("nothing is to be recovered: this coordinator orders the run alone")
            return
        check_key(self.ledger, key)
        self._returns = Returns(self.ledger, self._adopted)
        if self._reign is None:
            self._serve_elsewhere()
        _log.warning(
            "asking nodes and other coordinators for newer rounds than %d, for %.0f s", self.head, wait_s
        )
        await asyncio.sleep(wait_s)
        self._returns = None
        leader = seat.council.seat.leader
        if leader is not None:
            raise ConfigError(f"nothing is to be recovered: coordinator {leader} leads, with a majority")
        seat.council.recover(recovery_record(self.ledger, key, [seat.here]))

    def wish(self, wish: Wish) -> tuple[str, ...]:
        """The owner wants the committee to be another one: says what it waits for. A coordinator that was
        alone becomes one seat of several, with a new reign."""
        seat = self._seat
        if seat is None:
            try:
                seat = self._seat = self._hosting(SeatPlan.of(self._state.path, wish))
            except OSError as e:
                raise ConfigError(f"{self._state.path} cannot be written: {e.strerror}") from e
            self._history.save()
            self.end_reign("it becomes one of several")
            self._tasks.append(asyncio.create_task(self._take_a_seat(seat)))
        else:
            seat.council.wish(wish)
        path = self._state.path / FILE_NAME
        return (f"noted; it comes once they are ready: thinwire coordinator --replica FILE, with {path}",)

    async def _take_a_seat(self, seat: Hosting) -> None:
        try:
            if self._transport is not None:
                await seat.council.open_on(self._transport)
        except ThinwireError as e:
            self._fail(e)
            return
        self._save_tickets()
        await self._await_the_end(seat)

    def _adopted(self) -> None:
        """Nodes have given rounds back."""
        assert self._seat is not None
        _log.info("got rounds back from a node: round %d is the newest", self.head)
        self._seat.adopted()

    def _serve_run(self, service: Service, is_seat: Callable[[str], bool], uploads: Uploads) -> None:
        self._reign = service
        self._stream_server = StreamServer(
            service,
            self.blobs,
            meter=self.meter,
            changed=self._pulse.soon,
            failed=self._ledger_failed,
            status=self.status,
            waits=self._waits,
            watchers=self.watchers,
            open_stream=self._open_stream_to,
            me=self._me,
            is_seat=is_seat,
            uploads=uploads,
            uploaded=self.fanout.uploaded,
            asked=self.fanout.deliveries.asked,
            instead=self.fanout.referring.instead,
        )
        self._reception.hand_to(self._stream_server.handlers)

    def _hosting(self, plan: SeatPlan) -> Hosting:
        who, meter = self.watchers.who, self.meter
        return Hosting(self, self._state, self.ledger, self._key, self.blobs, who, meter, plan, self._keep)

    def _serve_elsewhere(self) -> None:
        """Another seat leads, or none."""
        assert self._seat is not None
        state = self._state
        admission = AdmissionControl(
            self.ledger, self._token, state.banned(), state.rules(), wall_ms, Counter()
        )
        elsewhere = ElsewhereServer(
            self.ledger,
            self.blobs,
            admission,
            self.watchers,
            self.meter,
            status=self.status,
            failed=self._ledger_failed,
            kept_from=self._seat.kept_from,
            waits=self._waits,
            pushes=self._seat.council,
        )
        elsewhere.returns = self._returns
        self._reception.hand_to(elsewhere.handlers)

    def _new_service(self, **order: Any) -> Service:
        """`order`: how its records are ordered; nothing: alone. Raises ConfigError."""
        return Service(
            ledger=self.ledger,
            blobs=self.blobs,
            key=self._key,
            token=self._token,
            send=self._send,
            on_commit=self._committed,
            end=self._end,
            now_s=time.monotonic(),
            wall_ms=wall_ms if self._seat is None else self._seat.council.time_ms,
            history=self._state.history(),
            banned=self._state.banned(),
            rules=self._state.rules(),
            check_strategy=self._check_strategy,
            loss_unit=self._loss_unit,
            keep=self._keep,
            fanout=self.fanout,
            **order,
        )

    # ------------------------------------------------------------------------------------ start and stop

    async def start(self) -> None:
        """Listens; nodes can join when this returns. Raises ConfigError (a taken port, a bad address)."""
        self._done = asyncio.get_running_loop().create_future()
        self._port = self._port or self._state.port() or 0
        await self._listen()
        self._state.save_port(self._port)
        await self._door.open()
        work = (self._beat(), self._watch_transport(), self._history.keep())
        self._tasks = [asyncio.create_task(one) for one in work]
        if self._keeps_last_snapshot:
            self._tasks.append(asyncio.create_task(self._last_snapshot.keep()))
        if self._seat is not None:
            self._tasks.append(asyncio.create_task(self._await_the_end(self._seat)))
        self._pulse.now()

    @property
    def ticket(self) -> Ticket:
        """What nodes need to join; valid once started, and after every restart on this state directory."""
        assert self._transport is not None, "the server is not started"
        own = self._transport.addresses
        ours = SeatEntry(peer_id=self._transport.peer_id, addresses=own[:8])
        first, *others = (ours,) if self._seat is None else self._seat.places(ours)
        return Ticket(
            peer_id=first.peer_id,
            addresses=own if first is ours else first.addresses,
            run_id=self.ledger.run_id,
            token=self._token,
            others=tuple(others),
        )

    @property
    def is_seat(self) -> bool:
        """Of the committee, or alone; else it looks on."""
        return self._seat is None or self._seat.council.is_seat

    @property
    def seat_ticket(self) -> Path | None:
        """Where the secret ticket for other seats is kept; None: this coordinator is alone."""
        return None if self._seat is None else self._state.path / FILE_NAME

    @property
    def head(self) -> int:
        """The newest round."""
        return self.ledger.head_round

    @property
    def is_over(self) -> bool:
        """The last round is committed."""
        if self._reign is not None:
            return self._reign.is_over
        return self._seat is not None and self._seat.is_over

    @property
    def _is_finished(self) -> bool:
        return self._reign.finished if self._reign is not None else self.is_over

    async def run_until_finished(self) -> None:
        """Returns when the last round is acknowledged. Raises what made the server fail. May be called again:
        a run that was made longer ends once more."""
        assert self._done is not None, "the server is not started"
        if self._done.done() and self._done.exception() is None and not self._is_finished:
            self._done = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._done)

    async def stop(self) -> None:
        """Tells nodes that the coordinator stops, ends libp2p and closes the ledger. May be called twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._is_stopped = True
        self._pulse.end()
        await self._door.close()
        if self._stream_server is not None:
            await self._stream_server.close(
                over_text(self.head) if self.is_over else "the coordinator was stopped"
            )
        if self._seat is not None:
            await self._seat.council.close()
        await asyncio.gather(*self._farewells)
        if self._transport is not None:
            await self._transport.close()
            self._transport = None
        self._pulse.rest()
        self._history.end()
        self.ledger.close()
        if self._done is not None:
            self._done.cancel()

    @property
    def is_serving(self) -> bool:
        """Whether nodes can be served right now; may be asked from any thread."""
        return self._transport is not None and not self._transport.died.is_set() and not self._is_stopped

    def scraped(self) -> list[str]:
        """Peers whose metrics are to be asked for."""
        return [] if self._reign is None else self._reign.scraped(time.monotonic())

    async def metrics_of(self, peer_id: str) -> bytes:
        """A node's metrics and what is known of it here, in Prometheus' text format. Raises KeyError for
        somebody who was never admitted, `metrics_requests.Unanswered` for a peer that is not there or does
        not answer."""
        if self._stream_server is None or not self.service.is_admitted(peer_id):
            raise KeyError(peer_id)
        said = await self._stream_server.metrics_of(peer_id)
        peer = self.service.peer(peer_id, time.monotonic())
        return said if peer is None else with_trust(said, peer)

    def status(self) -> dict[str, Any]:
        """JSON-able: `Service.status`, what this process says of itself, and of its seat."""
        here = machine(self.meter, self._state.path, self.http)
        if self._seat is None:
            seat = status_alone(peer_id_of(self._key.public_key()), self._since_ms, self.head)
            return {**self.service.status(time.monotonic()), **here, "seat": seat}
        run = self._seat.view() if self._reign is None else self._reign
        return {**run.status(time.monotonic()), **here, "seat": self._seat.status()}

    def _has_room(self, n_bytes: int) -> bool:
        """For the last snapshot: in the quota, and on the disk."""
        return (
            self._reign is not None
            and self._reign.has_room(n_bytes)
            and leaves_room(n_bytes, free_bytes(self._state.path))
        )

    def look(self, since: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """For the page: how things are, and the points of its charts that have changed since that stamp."""
        run = self._seat.view() if self._seat is not None and self._reign is None else self.service
        seat = None if self._seat is None else for_the_page(self._seat.status())
        return {**run.overview(time.monotonic()), "seat": seat}, run.trend(since)

    def _wanted_snapshot(self) -> Wanted | None:
        return None if self._reign is None else self._reign.last_snapshot()

    def _count_bad_order(self) -> None:
        if self._reign is not None:
            self._reign.count_rejected("message")

    async def _listen(self) -> None:
        self._transport = await self._start_transport(
            self._key, host=self._host_ip, port=self._port, announce=self._announce
        )
        self._port = self._transport.port
        await self._reception.open_on(self._transport)
        if self._seat is not None:
            await self._seat.council.open_on(self._transport)
        self._save_tickets()

    def _save_tickets(self) -> None:
        """Those that are made from the state folder need to know where this coordinator is reached."""
        save_address(self._state, self.ticket)
        if self._seat is not None:
            try:
                keep_ticket(self._state.path, self._seat.ticket(self._token))
            except ConfigError as e:  # a full disk: there may be an older one
                _log.warning("%s: other coordinators cannot be started with it", e)

    async def _open_stream_to(self, peer_id: str) -> Stream:
        """For blobs, to a connected peer. Raises SwarmUnreachable."""
        assert self._transport is not None
        reader, writer = await self._transport.open_stream(peer_id, BLOB, OPEN_TIMEOUT_S)
        return Stream(reader, writer, self.meter)

    async def _watch_transport(self) -> None:
        """libp2p runs in a process of its own: if that dies, another one takes its port and identity."""
        while True:
            assert self._transport is not None
            await self._transport.died.wait()
            _log.warning("libp2p has ended unexpectedly: starting it again on port %d", self._port)
            await self._transport.close()
            try:
                await self._listen()
            except ThinwireError as e:
                self._fail(e)
                return

    def _ledger_failed(self, error: sqlite3.Error) -> None:
        """Nobody has heard of what could not be written. Of several coordinators another one may lead."""
        failed = disk_error(error, self._state.ledger_path)
        if self._seat is None or failed is None:
            self._fail(failed or LedgerCorrupt(f"the ledger cannot be written: {error}"))
        else:
            self._seat.council.disk_failed(str(error))

    def _fail(self, error: ThinwireError) -> None:
        self.failure = self.failure or error
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # ------------------------------------------------------------------------------------- the service's side

    def _committed(self, round_: int) -> None:
        if self._stream_server is not None:
            self._stream_server.committed(round_)
        self._door.committed(round_)
        self._last_snapshot.wake()

    def _order(self, order: Order) -> Ordered:
        """Raises ConfigError or LedgerCorrupt."""
        if order.is_seating:
            told = self.wish(wish_of(order, self.ledger.committee.seats))
            return Ordered(0, told, (), is_done=True)
        service = self.service
        try:
            if order.is_guarding:
                return self._guard(order)
            ordered = service.order(order, time.monotonic())
        except sqlite3.Error as e:
            self._ledger_failed(e)
            raise ConfigError(f"the ledger cannot be written: {e}") from e
        if self._done is not None and _is_result(self._done) and not service.finished:
            self._done = asyncio.get_running_loop().create_future()  # it goes on
        self._pulse.soon()
        return ordered

    async def _foresee(self, order: Order) -> None:
        """A process may be started to check the options of a strategy: it answers the same again at once."""
        if self._reign is not None and (options := strategy_options(order.changes)):
            with contextlib.suppress(ConfigError):  # `_order` raises it
                await asyncio.to_thread(self._check_strategy, self._reign.course.strategy, options)

    def _guard(self, order: Order) -> Ordered:
        """Who may come in: holds at once. Raises ConfigError."""
        told = guard(self._state, order, self.service.access)
        self._token = self._state.token()
        rules = rules_of(order) if order.what in MODES else None
        ordered = self.service.guard(self._state.banned(), self._token, told, time.monotonic(), rules)
        if order.what == "rotate-token":
            self.on_new_ticket()
        self._pulse.soon()
        return ordered

    def _is_ordered(self, ordered: Ordered) -> bool:
        """Whether the record that was to carry the changes does so."""
        commit = next(iter(self.ledger.commits(ordered.round - 1, 1)), None)
        return commit is not None and ordered.is_in(commit.body)

    def _send(self, peer_id: str, message: Message) -> None:
        if self._stream_server is not None:
            self._stream_server.send(peer_id, message)

    def _end(self, peer_id: str, why: ThinwireError) -> None:
        if self._stream_server is not None:
            self._stream_server.end(peer_id, why)

    def _tick(self) -> float | None:
        """Lets the service's time pass; in how many seconds it wants it again."""
        service, now_s = self._reign, time.monotonic()
        if service is None:
            return None
        try:
            again_s = service.tick(now_s)
        except sqlite3.Error as e:
            self._ledger_failed(e)
            return None
        if self._seat is not None and not self._seat.settled():
            return None
        if service.finished and self._done is not None and not self._done.done():
            self._done.set_result(None)
        return again_s - now_s

    async def _await_the_end(self, seat: Hosting) -> None:
        """Of a run that another seat leads: once that one has nobody to wait for any more."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._reign is None and seat.may_go and self._done is not None and not self._done.done():
                self._done.set_result(None)

    async def _beat(self) -> None:
        """Heartbeats to every node. Time in which this process stood still is no silence of theirs."""
        every_s = self._settings.network.heartbeat_s
        while True:
            began_s = time.monotonic()
            await asyncio.sleep(every_s)
            overslept_s = time.monotonic() - began_s - every_s
            sent, received = self.meter.totals()
            if self._stream_server is None:
                continue
            beat = Heartbeat(
                round=self.head,
                sent_bytes=sent,
                received_bytes=received,
                payload_bytes=self.meter.received["payload"],
            )
            self._stream_server.beat(beat, self._silence_limit_s + overslept_s)


def _is_result(done: asyncio.Future[None]) -> bool:
    return done.done() and not done.cancelled() and done.exception() is None


def over_text(head: int) -> str:
    """What everybody hears of a finished run whose coordinator goes."""
    return (
        f"the run is over after round {head}; next: thinwire export STATE_FOLDER -o weights (a node's state "
        f"folder, or the coordinator's)"
    )
