"""A node's session with the coordinator, kept alive over breaks. All of it runs in one event loop.

With several coordinators it is with the seat that leads; a watch stream to another seat tells when that is
not the same any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from ...compression.errors import SwarmUnreachable, ThinwireError
from ...coordinator.protocol.figures import human_seconds, one_line, short
from ...coordinator.protocol.messages import (
    BadMessage,
    Elsewhere,
    Message,
    PeerId,
    Refused,
    Welcome,
)
from ...coordinator.protocol.patience import Patience
from ...coordinator.protocol.streams import FROM_COORDINATOR, Meter, Stream, Throttle
from ...coordinator.protocol.ticket import Ticket
from ...coordinator.protocol.transport import Transport
from .connecting.connecting import DIAL_TIMEOUT_S, Connecting, OpenTransport
from .connecting.finding import Found, NobodyLeads
from .known_seats import KnownSeats
from .session_handler import SessionHandler
from .upload_limit import UploadLimit
from .watching import Watch

_log = logging.getLogger("thinwire.link")

QUICK_DIAL_S = 2.0
"""For other nodes, once it is known how quickly they answer."""

GOODBYE_S = 5.0
FIRST_RETRY_S, LAST_RETRY_S = 0.25, 4.0
"""A restarted coordinator waits 10 s for the peers that it knew: who tries this often is among them."""

LAST_RETRY_OF_SEVERAL_S = 1.5
"""Some seat leads after a few seconds."""

TELL_AGAIN_S = 30.0
"""The same words are not told again before."""

MAX_HOPS = 8
"""So many sessions in a row that soon said who leads instead are followed without a pause."""

OVER_PATIENCE_S = 5.0
"""A coordinator that is gone when the run is over will hardly come back."""

STEADY_S = 10.0
"""A session that human_seconds for this long makes the next retries quick again."""

_PAUSE_S = 2.0


class CoordinatorSession:
    """`open` once, then `post`; `close` at the end. Breaks are mended until `patience_s` is over.

    `seats`: of the run's committee, as far as they are known; they may become more.
    `limit`: of what this node sends, None: there is none; `device`: what people are told that it trains on;
    `agent`: see `Hello`.
    """

    def __init__(
        self,
        ticket: Ticket,
        seats: KnownSeats,
        open_transport: OpenTransport,
        meter: Meter,
        handler: SessionHandler,
        patience_s: float,
        limit: UploadLimit | None = None,
        device: Callable[[], str] = str,
        agent: str = "thinwire",
    ) -> None:
        self._seats, self._meter, self._handler = seats, meter, handler
        self._control = None if limit is None else limit.control
        self._patience_s = patience_s
        self._jitter = random.Random()
        self._queue: deque[Message] = deque()
        self._wake = asyncio.Event()
        self._stream: Stream | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._at: PeerId | None = None
        """The seat of the open session."""
        self._was_at = ticket.peer_id
        self._term, self._n_hops = 0, 0
        self._elsewhere = asyncio.Event()
        """A seat has said that another one leads."""
        self._connecting = Connecting(
            ticket, seats, open_transport, meter, handler, self._control, device, agent, self._elsewhere
        )
        self._latest: tuple[int, PeerId, PeerId] | None = None
        """The latest term that a watched seat has announced, who leads by it, and the seat."""
        self._announced_by: PeerId | None = None
        """The seat for whose word a session was ended."""
        self._watch = Watch(
            seats,
            self._connecting.open_session,
            self._connecting.hello,
            lambda: self._at,
            self._heard_from_watch,
        )
        self._watching: asyncio.Task[None] | None = None
        self._retry_s = FIRST_RETRY_S
        self._told: dict[str, float] = {}
        """When: what people have been told of late."""
        self._dial_patience = Patience(floor_s=QUICK_DIAL_S, ceiling_s=DIAL_TIMEOUT_S)
        self.is_up, self._is_down = asyncio.Event(), asyncio.Event()
        self.was_read = asyncio.Event()
        """Set by the link: the coordinator has answered that this node leaves."""

    @property
    def _transport(self) -> Transport | None:
        return self._connecting.transport

    async def open(self) -> Welcome:
        """Raises SwarmUnreachable, ConfigError, Incompatible or LedgerCorrupt.

        A node that has been in the run before waits for the coordinator as after a break; a new one is told
        at once what is wrong with its ticket or network.
        """
        try:
            found = await self._connect()
        except SwarmUnreachable as e:
            head_round, _ = self._handler.known_head()
            if not head_round and not isinstance(e, NobodyLeads):
                raise
            found = await self._reconnect(str(e))
        self._keeping = asyncio.create_task(self._keep(found))
        return found.welcome

    def post(self, message: Message) -> None:
        """Queues a message; dropped when there is no session, because its successor hears a greeting."""
        if self._stream is not None:
            self._queue.append(message)
            self._wake.set()

    async def open_stream(self, protocol: str, throttle: Throttle | None = None) -> Stream:
        """Another stream to the coordinator. Raises SwarmUnreachable."""
        if self._transport is None or self._at is None:
            raise SwarmUnreachable("there is no connection to the coordinator")
        reader, writer = await self._transport.open_stream(self._at, protocol, DIAL_TIMEOUT_S)
        return Stream(reader, writer, self._meter, throttle or self._control)

    @property
    def seat(self) -> PeerId | None:
        """Of the open session; None: there is none."""
        return self._at

    def other_seats(self) -> list[PeerId]:
        """Of the committee, beside the one that leads; they have what it has."""
        return [seat for seat in self._seats.in_order() if seat != self._at and len(self._seats) > 1]

    async def open_stream_to(self, peer_id: str, addresses: Sequence[str], protocol: str) -> Stream:
        """A stream to another node. Raises SwarmUnreachable."""
        if self._transport is None:
            raise SwarmUnreachable("there is no connection to the swarm")
        began_s, limit_s = time.monotonic(), self._dial_patience.limit_s
        try:
            await self._transport.dial(peer_id, addresses, limit_s)
            reader, writer = await self._transport.open_stream(peer_id, protocol, limit_s)
        except SwarmUnreachable:
            if time.monotonic() - began_s >= limit_s:
                self._dial_patience.ran_out()
            raise
        self._dial_patience.took(time.monotonic() - began_s)
        return Stream(reader, writer, self._meter, self._control)

    async def close(self, *, say_goodbye: bool = True) -> None:
        """Waits until the coordinator has read that this node leaves, for at most 5 s and while there is a
        session, and ends all."""
        if say_goodbye and self._stream is not None:
            read, broken = (asyncio.create_task(e.wait()) for e in (self.was_read, self._is_down))
            await asyncio.wait({read, broken}, timeout=GOODBYE_S, return_when=asyncio.FIRST_COMPLETED)
            for waiting in (read, broken):
                waiting.cancel()
        both = (self._keeping, self._watching)
        tasks: list[asyncio.Task[None]] = [task for task in both if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connecting.close()

    # ------------------------------------------------------------------------------------- connecting

    async def _connect(self) -> Found:
        """With the seat that leads. Raises SwarmUnreachable, BadMessage, or what no retry can mend."""
        found = await self._connecting.find()
        if self._announced_by is not None and found.seat != self._seats.leader:
            self._watch.misled(self._announced_by)
            self._latest = None
        self._announced_by, self._seats.leader = None, found.seat
        if found.seat != self._was_at:
            self._handler.tell(f"coordinator {short(found.seat)} leads now", False)
            if self._transport is not None:
                await self._transport.disconnect(self._was_at)  # what is under way there goes on elsewhere
        self._was_at = found.seat
        return found

    # -------------------------------------------------------------------------------- keeping it alive

    async def _keep(self, found: Found) -> None:
        self._watching = asyncio.create_task(self._watch.keep())
        try:
            while True:
                why = await self._session(found)
                if self.was_read.is_set():
                    return
                found = await self._reconnect(why)
        except ThinwireError as e:
            self._handler.failed(e)

    async def _session(self, found: Found) -> str:
        """One session from its Welcome to its end; returns why it ended. Raises what no retry can mend."""
        self._at, stream, welcome = found
        self._stream, self._term = stream, welcome.term
        self._watch.silence_s = max(10.0, 5 * welcome.heartbeat_s)
        self._elsewhere.clear()
        self._go_where_it_leads()
        began_s = time.monotonic()
        self._queue.clear()
        self._handler.connected(welcome)
        for message in self._handler.greeting():
            self.post(message)
        self.is_up.set()
        self._is_down.clear()
        assert self._transport is not None
        tasks: list[asyncio.Task[object]] = [
            asyncio.create_task(self._read(stream)),
            asyncio.create_task(self._write(stream)),
            asyncio.create_task(self._beat(stream, welcome.heartbeat_s)),
            asyncio.create_task(self._transport.died.wait()),
            asyncio.create_task(self._elsewhere.wait()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.is_up.clear()
            self._is_down.set()
            self._stream, self._at = None, None
            self._connecting.broke(found.seat)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            stream.abort()
            if time.monotonic() - began_s > STEADY_S:
                self._retry_s, self._n_hops = FIRST_RETRY_S, 0
        return self._why_ended(done)

    def _why_ended(self, done: Iterable[asyncio.Task[object]]) -> str:
        """In words. `done`: the tasks of the session that have ended. Raises what no retry can mend."""
        error = next((e for task in done if (e := task.exception()) is not None), None)
        if error is None and self._elsewhere.is_set():
            return f"coordinator {short(self._seats.leader)} leads now"
        if error is None:
            return "this machine's libp2p has ended"
        if isinstance(error, BadMessage):
            self._handler.refused()
        if isinstance(error, OSError | EOFError | SwarmUnreachable | BadMessage):
            return str(error) or "the connection broke"
        raise error

    async def _reconnect(self, why: str) -> Found:
        """Tries until it works. Raises SwarmUnreachable after `patience_s` (earlier, if the run is over),
        or what no retry can mend."""
        broke_s = time.monotonic()
        while True:
            away_s = time.monotonic() - broke_s
            over_after = self._handler.over_after()
            if over_after is not None and away_s > min(self._patience_s, OVER_PATIENCE_S):
                raise SwarmUnreachable(
                    f"the run is over after round {over_after}, and its coordinator does not answer: {why}"
                )
            if away_s > self._patience_s:
                raise SwarmUnreachable(f"the coordinator has not answered for {human_seconds(away_s)}: {why}")
            await self._pause(why, away_s)
            try:
                found = await self._connect()
            except (SwarmUnreachable, BadMessage) as e:
                why = str(e)
                continue
            self._handler.tell(f"connected again after {time.monotonic() - broke_s:.0f} s", False)
            return found

    async def _pause(self, why: str, away_s: float) -> None:
        """Before another attempt; none when a seat has just said who leads, unless that is all they do."""
        if self._elsewhere.is_set() and self._n_hops < MAX_HOPS:
            self._n_hops += 1
            self._elsewhere.clear()
            return
        self._elsewhere.clear()
        pause_s = self._retry_s * self._jitter.uniform(0.7, 1.3)
        several = len(self._seats) > 1
        what = one_line(why) if several else f"the coordinator {_silent(away_s)} ({one_line(why)})"
        now_s = time.monotonic()
        self._told = {text: told_s for text, told_s in self._told.items() if now_s - told_s < TELL_AGAIN_S}
        if what not in self._told:
            self._told[what] = now_s
            again = f"trying again in {human_seconds(pause_s)}; training state is kept"
            self._handler.tell(f"{what}; {again}", True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await (self._elsewhere.wait() if self._n_hops < MAX_HOPS else asyncio.sleep(pause_s))
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_OF_SEVERAL_S if several else LAST_RETRY_S)

    # ------------------------------------------------------------------------------------- other seats

    def _heard_from_watch(self, seat: PeerId, elsewhere: Elsewhere) -> None:
        """A seat beside the session's says who leads: if by a later term, this node goes there at once."""
        leader = self._followed(seat, elsewhere)
        if leader is None:
            return
        if self._latest is None or elsewhere.term > self._latest[0]:
            self._latest = elsewhere.term, leader, seat
        if self._at is None:
            self._seats.leader = leader
            self._elsewhere.set()
        else:
            self._go_where_it_leads()

    def _go_where_it_leads(self) -> None:
        """Ends the session where a later term than its own was announced."""
        if self._latest is None or self._latest[0] <= self._term:
            return
        self._term, leader, seat = self._latest
        if leader != self._at:
            self._seats.leader, self._announced_by = leader, seat
            self._elsewhere.set()

    def _followed(self, seat: PeerId, elsewhere: Elsewhere) -> PeerId | None:
        """Who leads, by what a seat says; None: nobody that this node goes to."""
        leader = self._seats.heard(elsewhere)
        n = self._seats.n_lies
        if leader is None and elsewhere.leader is not None and n & (n - 1) == 0:  # told ever more rarely
            self._handler.tell(
                f"coordinator {short(seat)} says that {short(elsewhere.leader)} leads, which is no seat by "
                f"the ticket and the ledger: this node does not go there",
                True,
            )
        return leader

    async def _read(self, stream: Stream) -> None:
        while True:
            message = await stream.receive_message(FROM_COORDINATOR)
            if isinstance(message, Refused):
                raise message.as_error()
            if isinstance(message, Elsewhere):
                assert self._at is not None
                self._seats.leader = self._followed(self._at, message) or self._seats.leader
                self._elsewhere.set()
                return
            await self._handler.received(message)

    async def _write(self, stream: Stream) -> None:
        while True:
            self._wake.clear()
            while self._queue:
                await stream.send_message(self._queue.popleft())
            await self._wake.wait()

    async def _beat(self, stream: Stream, heartbeat_s: float) -> None:
        """Sends heartbeats; raises SwarmUnreachable when the coordinator is silent for too long."""
        limit_s = max(10.0, 5 * heartbeat_s)
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(heartbeat_s)
            now_s = time.monotonic()
            if now_s - before_s > heartbeat_s + _PAUSE_S:
                stream.heard_s = now_s  # this process was stopped: it says nothing about the coordinator
            silent_s = now_s - max(stream.heard_s, self._handler.last_heard_s())
            if silent_s > limit_s:
                raise SwarmUnreachable(f"silent for {silent_s:.0f} s")
            self.post(self._handler.heartbeat())


def _silent(seconds: float) -> str:
    """With how long it has been, once that is a time to speak of."""
    return f"has not answered for {human_seconds(seconds)}" if seconds >= 1 else "does not answer"
