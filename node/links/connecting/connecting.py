"""A node's way to an open session: its transport, the seat that leads, and seats that it has not heard of."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from ....compression.errors import SwarmUnreachable, ThinwireError
from ....coordinator.protocol.figures import short
from ....coordinator.protocol.messages import (
    PROTOCOL_VERSION,
    READER,
    Commit,
    Elsewhere,
    Follow,
    Hello,
    PeerId,
    Welcome,
)
from ....coordinator.protocol.streams import BLOB, FROM_COORDINATOR, GOSSIP, SESSION, Meter, Stream, Throttle
from ....coordinator.protocol.ticket import Ticket
from ....coordinator.protocol.transport import Transport
from ..known_seats import KnownSeats
from ..session_handler import SessionHandler
from .finding import Found, NobodyLeads, find_leader
from .introducing import ANSWER_TIMEOUT_S, QUICK_ANSWER_S, introduce

_log = logging.getLogger("thinwire.link")

DIAL_TIMEOUT_S: Final = 10.0
SEAT_DIAL_S: Final = 5.0
"""Where there are other seats to dial."""

READ_AGAIN_S: Final = 60.0
"""A seat whose ledger was read for who the seats are is not read again for so long."""

OpenTransport = Callable[[], Awaitable[Transport]]
"""Opens this node's transport in the network. Raises ConfigError."""


class Connecting:
    """In one event loop. `throttle`: of what is sent; `device`, `agent`: see `Hello`; `announced`: see
    `find_leader`."""

    def __init__(
        self,
        ticket: Ticket,
        seats: KnownSeats,
        open_transport: OpenTransport,
        meter: Meter,
        handler: SessionHandler,
        throttle: Throttle | None,
        device: Callable[[], str],
        agent: str,
        announced: asyncio.Event,
    ) -> None:
        self._ticket, self._seats, self._open_transport = ticket, seats, open_transport
        self._meter, self._handler, self._throttle = meter, handler, throttle
        self._device, self._agent, self._announced = device, agent, announced
        self.transport: Transport | None = None
        self._stale: set[PeerId] = set()
        """Seats whose connection may be broken without a word."""
        self._read_again_s: dict[PeerId, float] = {}

    async def find(self) -> Found:
        """A session with the seat that leads. Raises SwarmUnreachable, BadMessage, or what no retry can
        mend."""
        await self._living_transport()
        try:
            return await find_leader(self._seats, self._approach, self._announced)
        except NobodyLeads as e:
            if not await self._learn_seats(e.strange):
                raise
            return await find_leader(self._seats, self._approach, self._announced)

    def broke(self, seat: PeerId) -> None:
        """A session there has ended."""
        self._stale.add(seat)

    async def _learn_seats(self, strange: Sequence[PeerId]) -> bool:
        """Reads the ledger where somebody is said to lead whom this node does not know as a seat: a record
        that it has not seen yet may name the seat. True: there are others than before."""
        known = self._seats.in_order()
        for seat in strange:
            if time.monotonic() < self._read_again_s.get(seat, 0.0):
                continue
            self._read_again_s[seat] = time.monotonic() + READ_AGAIN_S
            try:
                await self._read_ledger_of(seat)
            except (ThinwireError, OSError, EOFError, TimeoutError) as e:
                _log.info("the ledger of coordinator %s cannot be read: %s", short(seat), e)
            if self._seats.in_order() != known:
                return True
        return False

    async def _read_ledger_of(self, seat: PeerId) -> None:
        """Up to its head, every record verified. Raises ThinwireError, OSError, EOFError or TimeoutError."""
        stream = await self.open_session(seat)
        try:
            hello = self.hello().model_copy(update={"agent": READER})
            welcome = await introduce(stream, hello, self._handler.missing_commits, self._handler.tell)
            if isinstance(welcome, Elsewhere) or not welcome.is_copy:
                return
            self._handler.keep_record_0(welcome)
            head, _ = self._handler.known_head()
            await stream.send_message(Follow(after=head or 0))
            while (head or 0) < welcome.head_round:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    message = await stream.receive_message(FROM_COORDINATOR)
                if isinstance(message, Commit):
                    await self._handler.received(message)
                    head, _ = self._handler.known_head()
        finally:
            stream.abort()

    async def _approach(self, seat: PeerId) -> tuple[Stream, Welcome | Elsewhere]:
        """Says Hello to a seat. Raises what `introduce` does."""
        stream = await self.open_session(seat)
        wait_s = ANSWER_TIMEOUT_S if len(self._seats) == 1 else QUICK_ANSWER_S
        try:
            answer = await introduce(
                stream, self.hello(), self._handler.missing_commits, self._handler.tell, wait_s
            )
        except BaseException:
            self._stale.add(seat)
            stream.abort()
            raise
        if isinstance(answer, Elsewhere):
            stream.abort()
        return stream, answer

    async def open_session(self, seat: PeerId) -> Stream:
        """For a Hello. Raises SwarmUnreachable."""
        transport, limit_s = self.transport, DIAL_TIMEOUT_S if len(self._seats) == 1 else SEAT_DIAL_S
        if transport is None or transport.died.is_set():
            raise SwarmUnreachable("this machine's libp2p has ended")
        if seat in self._stale:
            await transport.disconnect(seat)
            self._stale.discard(seat)
        try:
            await transport.dial(seat, self._seats.addresses(seat), limit_s)
            reader, writer = await transport.open_stream(seat, SESSION, limit_s)
        except SwarmUnreachable:
            self._stale.add(seat)
            raise
        return Stream(reader, writer, self._meter, self._throttle)

    def hello(self) -> Hello:
        """What this node says of itself, as it is now."""
        head_round, head_digest = self._handler.known_head()
        return Hello(
            version=PROTOCOL_VERSION,
            run_id=self._ticket.run_id,
            token=self._ticket.token,
            head_round=head_round,
            head_digest=head_digest,
            addresses=() if self.transport is None else self.transport.addresses,
            agent=self._agent,
            device=self._device(),
        )

    async def _living_transport(self) -> Transport:
        if self.transport is not None and self.transport.died.is_set():
            self._handler.tell("this machine's libp2p has ended unexpectedly: starting it again", True)
            await self.transport.close()
            self.transport = None
        if self.transport is None:
            self.transport = await self._open_transport()
            await self.transport.handle(BLOB, self._handler.serve_blobs)
            await self.transport.handle(GOSSIP, self._handler.serve_neighbours)
        return self.transport

    async def close(self) -> None:
        if self.transport is not None:
            await self.transport.close()
            self.transport = None
