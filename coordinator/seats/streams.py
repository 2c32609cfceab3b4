"""The streams between seats: one for each pair, dialled by either end, and again whenever it breaks.

The first word on a stream, both ways, is `Enter`. Peer ids are proved by the transport; seats of the
committee need nothing else, an onlooker shows the secret of a seat ticket. What another seat does wrong is
counted and ends its stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Mapping
from typing import Final, Protocol

from ...compression.errors import SwarmUnreachable
from ..observe.quiet_log import QuietLog
from ..protocol.figures import one_line, short
from ..protocol.messages import BadMessage
from ..protocol.streams import SEAT, BadFrame, Meter, Stream
from ..protocol.transport import Transport
from ..quorum.words import Denied, Enter, Word
from .link import Addresses, Link, Twins, read_word

log = logging.getLogger("thinwire.coordinator")

DIAL_S: Final = 5.0
ENTER_S: Final = 10.0
GOODBYE_S: Final = 2.0
FIRST_RETRY_S: Final = 0.25
LAST_RETRY_S: Final = 4.0

STEADY_S: Final = 10.0
"""A link that lasts for so long makes the next retries quick again."""

SAME_TIME_S: Final = 10.0
"""Two streams of a pair that began within this time were dialled by both ends at once."""

MAX_STRANGERS: Final = 16
"""Streams whose other end has not said who it is."""


class Host(Protocol):
    """Whose streams they are. Calls come from the event loop and must not block."""

    def enter(self, seat: str) -> Enter:
        """What this seat says of itself to that one."""
        ...

    def refuses(self, seat: str, enter: Enter) -> str | None:
        """Why one that dials is not let in, in words; None: it is."""
        ...

    def up(self, link: Link, *, is_new: bool) -> None:
        """A link is there, and what its other end says of itself: when it is new, and whenever that
        changes."""
        ...

    def down(self, seat: str) -> None:
        """It is gone, and no other one has its place."""
        ...

    def heard(self, seat: str, word: Word) -> None: ...


class SeatStreams:
    """Belongs to one event loop. `rejected`: what was not let in, by reason."""

    def __init__(self, me: str, host: Host, meter: Meter, rng: random.Random) -> None:
        self._me, self._host, self._meter, self._rng = me, host, meter, rng
        self._lines = QuietLog(log, time.monotonic)
        self.rejected: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        """Why the last dial of a seat did not work, in words."""
        self._transport: Transport | None = None
        self._links: dict[str, Link] = {}
        self._freed: dict[str, asyncio.Event] = {}
        """Set while there is no link to a seat that is wanted."""
        self._entering: set[str] = set()
        """Seats that this one has reached and waits to be let in by."""
        self._places: dict[str, Addresses] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._twins = Twins()
        self._waiting: Counter[str] = Counter()
        """Streams whose other end has not said who it is."""

    @property
    def links(self) -> Mapping[str, Link]:
        return self._links

    async def open_on(self, transport: Transport) -> None:
        """From now on seats that dial `transport` are served, and those that are wanted dialled from it."""
        self._transport = transport
        await transport.handle(SEAT, self._serve)

    def keep(self, places: Mapping[str, Addresses]) -> None:
        """These seats are wanted, and no others are dialled any more. Links that are there stay."""
        self._places = {seat: addresses for seat, addresses in places.items() if seat != self._me}
        for seat in self._keepers.keys() - self._places.keys():
            self._keepers.pop(seat).cancel()
            self.failed.pop(seat, None)
        for seat in self._places.keys() - self._keepers.keys():
            self._keepers[seat] = asyncio.create_task(self._keep(seat))

    def send(self, seat: str, word: Word) -> None:
        """Queues a word; it is lost where there is no link."""
        link = self._links.get(seat)
        if link is not None:
            link.send(word)

    def introduce(self) -> None:
        """What this seat says of itself has changed: everybody hears it."""
        for seat, link in self._links.items():
            link.send(self._host.enter(seat))

    def drop(self, seat: str, why: str) -> None:
        """Ends the link, if there is one."""
        link = self._links.get(seat)
        if link is not None:
            log.info("the stream to seat %s is closed: %s", short(seat), why)
            link.stream.abort()

    async def close(self) -> None:
        """Ends all. May be called twice."""
        keepers = list(self._keepers.values())
        self._keepers.clear()
        for task in keepers:
            task.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        for link in list(self._links.values()):
            link.stream.abort()

    # ------------------------------------------------------------------------------------------ dialling

    async def _keep(self, seat: str) -> None:
        """Dials a seat whenever there is no link to it."""
        retry_s, is_again = FIRST_RETRY_S, False
        while True:
            await self._without(seat)
            began_s = time.monotonic()
            try:
                await self._dial(seat)
            except (SwarmUnreachable, BadMessage, OSError, EOFError, TimeoutError) as e:
                if isinstance(e, BadMessage):
                    self.rejected[e.reason if isinstance(e, BadFrame) else "message"] += 1
                log.debug("the stream to seat %s ended: %s", seat, e)
                if seat not in self._links and is_again:  # the first one says how a link has ended
                    self._tell(seat, str(e) or type(e).__name__)
            except Exception:
                log.exception("a stream to seat %s met a fault of ours", seat)
                self.rejected["internal"] += 1
            is_again = time.monotonic() - began_s <= STEADY_S
            if not is_again:
                retry_s = FIRST_RETRY_S
            await asyncio.sleep(retry_s * self._rng.uniform(0.7, 1.3))
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _without(self, seat: str) -> None:
        """Returns once there is no link to it."""
        while seat in self._links:
            freed = self._freed.setdefault(seat, asyncio.Event())
            freed.clear()
            await freed.wait()

    async def _dial(self, seat: str) -> None:
        """Until a link that was made is over. Raises SwarmUnreachable, BadFrame, EOFError or OSError."""
        transport = self._transport
        if transport is None or transport.died.is_set():
            raise SwarmUnreachable("this machine's libp2p is not there")
        try:
            await transport.dial(seat, self._places.get(seat, ()), DIAL_S)
            stream = Stream(*await transport.open_stream(seat, SEAT, DIAL_S), self._meter)
        except SwarmUnreachable:
            if seat not in self._links and seat not in self._waiting:
                await transport.disconnect(seat)  # what libp2p has may be a connection that is dead
            raise
        self._entering.add(seat)
        try:
            async with asyncio.timeout(ENTER_S):
                await stream.send_message(self._host.enter(seat))
                answer, _ = await read_word(stream)
        except BaseException:
            stream.abort()
            raise
        finally:
            self._entering.discard(seat)
        if isinstance(answer, Denied):
            stream.abort()
            raise SwarmUnreachable(answer.why)
        if not isinstance(answer, Enter):
            stream.abort()
            raise BadFrame("hello", f"a stream between seats begins with Enter, not {type(answer).__name__}")
        if (why := self._twin(seat, answer)) is not None:
            with contextlib.closing(stream):
                await stream.send_message(Denied(why=why))
            raise SwarmUnreachable(why)
        await self._run(Link(seat, stream, answer, is_ours=True))

    def _tell(self, seat: str, why: str) -> None:
        """Once for each reason."""
        if self.failed.get(seat) != why:
            self.failed[seat] = why
            log.info("seat %s cannot be reached: %s", short(seat), one_line(why, heading=False))

    # ------------------------------------------------------------------------------------------- serving

    async def _serve(self, seat: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = Stream(reader, writer, self._meter)
        try:
            link = await self._let_in(seat, stream)
            if link is not None:
                await self._run(link)
        except BadMessage as e:
            self.rejected[e.reason if isinstance(e, BadFrame) else "message"] += 1
            self._lines.say(logging.INFO, seat, "seat", "closed a stream of seat %s: %s", short(seat), e)
        except (OSError, EOFError, TimeoutError, SwarmUnreachable) as e:
            log.debug("a stream of seat %s ended: %s", seat, e)
        except Exception:
            log.exception("a stream of seat %s met a fault of ours", seat)
            self.rejected["internal"] += 1

    async def _let_in(self, seat: str, stream: Stream) -> Link | None:
        """None: it was told why not, or both ends have dialled at once. Raises BadFrame, EOFError, OSError or
        TimeoutError."""
        if self._waiting.total() >= MAX_STRANGERS:
            raise BadFrame("strangers", "too many streams that have not said who they are")
        self._waiting[seat] += 1
        try:
            async with asyncio.timeout(ENTER_S):
                enter, _ = await read_word(stream)
        finally:
            self._waiting -= Counter((seat,))
        if not isinstance(enter, Enter):
            raise BadFrame("hello", f"a stream between seats begins with Enter, not {type(enter).__name__}")
        why = self._host.refuses(seat, enter) or self._twin(seat, enter)
        if why is not None:
            self.rejected["denied"] += 1
            self._lines.say(logging.WARNING, seat, "denied", "seat %s is not let in: %s", short(seat), why)
            await stream.send_message(Denied(why=why))
            await stream.ended(GOODBYE_S)
            return None
        if self._is_dialled_by_both(seat):
            return None
        await stream.send_message(self._host.enter(seat))
        return Link(seat, stream, enter, is_ours=False)

    def _is_dialled_by_both(self, seat: str) -> bool:
        """Then the stream of the lower id is the one. Otherwise who dials has none, as far as it knows."""
        ours = self._links.get(seat)
        is_young = ours is not None and ours.is_ours and time.monotonic() - ours.began_s < SAME_TIME_S
        return self._me < seat and (is_young or seat in self._entering)

    # --------------------------------------------------------------------------------------------- links

    def _twin(self, seat: str, enter: Enter) -> str | None:
        """Why none of two processes that are this seat is let in, in words; None: there is one."""
        places = self._twins.of(seat, enter.addresses, time.monotonic())
        if not places:
            return None
        self.drop(seat, "another one has come")
        where = " and ".join(addresses[0] if addresses else "an unknown place" for addresses in places)
        return (
            f"two coordinators run with copies of one state folder, at {where}: stop one of them, and start "
            f"the other with --restored"
        )

    async def _run(self, link: Link) -> None:
        """Until it is over; it has the place of an older one. Raises BadFrame, EOFError or OSError."""
        old, self._links[link.seat] = self._links.get(link.seat), link
        if old is not None:
            old.stream.abort()
        self.failed.pop(link.seat, None)
        writer = asyncio.create_task(self._write(link))
        try:
            self._host.up(link, is_new=True)
            while True:
                word = await link.read()
                if self._links.get(link.seat) is not link:
                    return
                if isinstance(word, Denied):
                    self._tell(link.seat, word.why)
                    return
                if isinstance(word, Enter):
                    link.enter = word
                    self._host.up(link, is_new=False)
                else:
                    self._host.heard(link.seat, word)
        finally:
            writer.cancel()
            link.stream.abort()
            if self._links.get(link.seat) is link:
                del self._links[link.seat]
                self._host.down(link.seat)
                if (freed := self._freed.pop(link.seat, None)) is not None:
                    freed.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, link: Link) -> None:
        """The sending half; when it cannot go on, the receiving half ends too."""
        try:
            await link.write()
        except OSError as e:
            log.debug("cannot send to seat %s: %s", link.seat, e)
        link.stream.abort()
