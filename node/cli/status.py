"""The status of a run, asked from its coordinator under a throwaway identity; of several from the one that
leads, or, if that one does not answer, from whoever does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from ...compression.errors import ConfigError, SwarmUnreachable
from ...coordinator.protocol.figures import short
from ...coordinator.protocol.identity import new_key
from ...coordinator.protocol.messages import BadMessage, PeerId, Refused, decode_message
from ...coordinator.protocol.p2p import P2PTransport, start_p2p
from ...coordinator.protocol.streams import STATUS, FrameKind, Meter, Stream
from ...coordinator.protocol.ticket import Ticket
from ..links.known_seats import KnownSeats

T = TypeVar("T")

SEAT_S = 3.0
"""For each of several coordinators."""

_ANSWERS = {FrameKind.STATUS: 16 * 2**20, FrameKind.MESSAGE: 16 * 2**10}


class StatusClient:
    """Keeps one connection for asking again and again. Use as a context manager, from one thread."""

    def __init__(self, ticket: Ticket | str) -> None:
        """Raises ConfigError for a ticket that is none."""
        self._ticket = Ticket.parse(ticket) if isinstance(ticket, str) else ticket
        self._seats = KnownSeats(self._ticket)
        self._loop = asyncio.new_event_loop()
        self._host: P2PTransport | None = None
        self._stream: Stream | None = None

    def fetch(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """Raises SwarmUnreachable (why each address failed, or no answer in time) or ConfigError (token)."""
        return self._run(self._fetch(timeout_s))

    def close(self) -> None:
        if self._loop.is_closed():
            return
        try:
            self._run(self._close())
        finally:
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Like `asyncio.run`: what is interrupted is cancelled before the error goes on."""
        task = self._loop.create_task(work)
        try:
            return self._loop.run_until_complete(task)
        except BaseException:
            task.cancel()
            self._loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            raise

    async def _fetch(self, timeout_s: float) -> dict[str, Any]:
        if self._host is None or self._host.died.is_set():
            await self._close()
            self._host = await start_p2p(new_key())
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ask(self._host)
        except TimeoutError as e:
            self._drop()
            raise SwarmUnreachable(f"the coordinator does not answer within {timeout_s:g} s") from e
        except (OSError, EOFError, BadMessage) as e:
            self._drop()
            raise SwarmUnreachable(f"the connection to the coordinator broke: {e}") from e

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the coordinator that has answered."""
        return self._seats.addresses(self._seats.leader)

    async def _ask(self, host: P2PTransport) -> dict[str, Any]:
        try:
            if self._stream is None:
                return await self._ask_all(host)
            try:
                status = await ask(self._stream, self._ticket.token)
            except (OSError, EOFError):
                if len(self._seats) == 1:
                    raise
                self._drop()
                return await self._ask_all(host)
            if not leads(status):
                self._drop()  # the next question goes to who does
            return status
        except ConfigError:
            self._drop()
            raise

    async def _ask_all(self, host: P2PTransport) -> dict[str, Any]:
        """In turn, until one answers that leads; else the answer of one that does not."""
        answers, failed = dict[PeerId, dict[str, Any]](), dict[PeerId, Exception]()
        tried = list[PeerId]()
        while untried := [seat for seat in self._seats.in_order() if seat not in tried]:
            seat = untried[0]
            tried.append(seat)
            try:
                answers[seat] = status = await self._ask_seat(host, seat)
            except (SwarmUnreachable, BadMessage, OSError, EOFError, TimeoutError) as e:
                failed[seat] = e
                self._drop()
                continue
            if leads(status):
                self._seats.leader = seat
                return status
            self._drop()
            named = status["seat"].get("leader")
            self._seats.leader = named if named in self._seats else self._seats.leader
        if not answers:
            raise _none(failed)
        self._seats.leader, status = next(iter(answers.items()))
        return status

    async def _ask_seat(self, host: P2PTransport, seat: PeerId) -> dict[str, Any]:
        several = len(self._seats) > 1
        async with asyncio.timeout(SEAT_S if several else None):
            await host.dial(seat, self._seats.addresses(seat), SEAT_S if several else 10.0)
            reader, writer = await host.open_stream(seat, STATUS)
            self._stream = Stream(reader, writer, Meter())
            return await ask(self._stream, self._ticket.token)

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.abort()
            self._stream = None

    async def _close(self) -> None:
        self._drop()
        if self._host is not None:
            await self._host.close()
            self._host = None


async def ask(stream: Stream, token: str) -> dict[str, Any]:
    """The status, over a stream to its door. Raises ConfigError (token), BadMessage, OSError, EOFError."""
    await stream.send(FrameKind.ASK, token.encode())
    kind, body = await stream.receive(_ANSWERS)
    if kind is FrameKind.MESSAGE:
        refused = decode_message(body)
        raise ConfigError(refused.text if isinstance(refused, Refused) else "the coordinator refuses")
    try:
        status: dict[str, Any] = json.loads(body)
    except ValueError as e:
        raise BadMessage("the status is no JSON") from e
    return status


def leads(status: Mapping[str, Any]) -> bool:
    """Whether it comes from who leads; a coordinator that is alone does."""
    return bool(_seat(status).get("role", "leads") == "leads")


def seat_in_words(status: Mapping[str, Any]) -> str | None:
    """Whose status it is, where that is not the coordinator that leads; None: it is."""
    if leads(status):
        return None
    seat = _seat(status)
    leader = seat.get("leader")
    who = "nobody leads" if leader is None else f"{short(str(leader))} leads"
    me = short(str(seat.get("peer_id")))
    return f"coordinator {me} {role_in_words(seat)}; {who}. It knows the ledger, and not who is connected"


def waits_in_words(waits_for: str) -> str:
    """Why no round closes, as a seat says it: it may have said already that training waits."""
    return waits_for if "training waits" in waits_for else f"training waits: {waits_for}"


def role_in_words(seat: Mapping[str, Any]) -> str:
    """Of a status's `seat`: what it does, and how far it is."""
    lag = seat.get("lag")
    return f"{seat.get('role')}, at round {seat.get('head')}{f', {lag} behind' if lag else ''}"


def _seat(status: Mapping[str, Any]) -> Mapping[str, Any]:
    found = status.get("seat")
    return found if isinstance(found, dict) else {}


def _none(failed: Mapping[PeerId, Exception]) -> Exception:
    """Why nobody has answered."""
    if len(failed) == 1:
        return next(iter(failed.values()))
    listing = "\n".join(f"  {short(seat)}: {' '.join(str(e).split())}" for seat, e in failed.items())
    return SwarmUnreachable(f"none of {len(failed)} coordinators answers:\n{listing}")


def fetch_status(ticket: Ticket | str, timeout_s: float = 10.0) -> dict[str, Any]:
    """One status. Raises like `StatusClient`."""
    with StatusClient(ticket) as client:
        return client.fetch(timeout_s)
