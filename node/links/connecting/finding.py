"""The seat that leads, found among all that a node knows: an unreachable one costs little."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from ....compression.errors import SwarmUnreachable, ThinwireError
from ....coordinator.protocol.figures import one_line, short
from ....coordinator.protocol.messages import BadMessage, Elsewhere, PeerId, Welcome
from ....coordinator.protocol.streams import Stream
from ..known_seats import KnownSeats

HEAD_START_S: Final = 1.0
"""A seat that has not answered for so long is not waited for any more before the next one is tried."""


class NobodyLeads(SwarmUnreachable):
    """Seats answer, and none of them leads. `strange`: seats that say that somebody leads who is no seat, as
    far as this node knows."""

    def __init__(self, text: str, strange: Sequence[PeerId] = ()) -> None:
        super().__init__(text)
        self.strange = tuple(strange)


class Found(NamedTuple):
    """An open session."""

    seat: PeerId
    stream: Stream
    welcome: Welcome


Approach = Callable[[PeerId], Awaitable[tuple[Stream, Welcome | Elsewhere]]]
"""Says Hello to a seat. Raises ThinwireError; the stream of an Elsewhere is closed."""


async def find_leader(seats: KnownSeats, approach: Approach, announced: asyncio.Event) -> Found:
    """Each seat is tried once at most, in their order; whom one names as the leader goes first. `announced`:
    `seats.leader` leads since just now: it is tried at once, again if need be, whoever is still waited for. A
    reader, whom every seat says Welcome, gets who leads before a copy. Raises NobodyLeads or
    SwarmUnreachable, or what the leader, or every seat that answers, refuses with."""
    return await _Search(seats, approach, announced).run()


class _Search:
    def __init__(self, seats: KnownSeats, approach: Approach, announced: asyncio.Event) -> None:
        self._seats, self._approach, self._announced = seats, approach, announced
        self._untried = seats.in_order()
        self._tried_again: set[PeerId] = set()
        self._due: PeerId | None = None
        """It was announced while it was being asked."""
        self._under_way: dict[asyncio.Task[tuple[Stream, Welcome | Elsewhere]], PeerId] = {}
        self._elsewhere: dict[PeerId, Elsewhere] = {}
        self._refused: dict[PeerId, ThinwireError] = {}
        self._failed: dict[PeerId, ThinwireError] = {}
        self._copy: Found | None = None

    async def run(self) -> Found:
        try:
            while self._untried or self._under_way:
                self._try_next()
                for task in await self._some_end():
                    if (found := self._ended(task)) is not None:
                        self._give_up_copy()
                        return found
        finally:
            await self._drop()
        if self._copy is None:
            raise self._why()
        return self._copy

    async def _some_end(self) -> list[asyncio.Task[tuple[Stream, Welcome | Elsewhere]]]:
        """Those that have; none when it is time to try the next seat."""
        told = asyncio.ensure_future(self._announced.wait())
        try:
            await asyncio.wait(
                [told, *self._under_way],
                timeout=HEAD_START_S if self._untried else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            told.cancel()
        if self._announced.is_set():
            self._announced.clear()
            self._try_again(self._seats.leader)
        return [task for task in self._under_way if task.done()]

    def _try_again(self, leader: PeerId) -> None:
        """Next, for it leads since just now; never twice at once, for one session would end the other."""
        if leader in self._under_way.values():
            self._due = leader
        elif leader in self._untried:
            self._go_to(leader)
        elif leader not in self._tried_again:
            self._tried_again.add(leader)
            self._untried.insert(0, leader)

    def _try_next(self) -> None:
        if self._untried:
            seat = self._untried.pop(0)
            self._under_way[asyncio.ensure_future(self._approach(seat))] = seat

    def _ended(self, task: asyncio.Task[tuple[Stream, Welcome | Elsewhere]]) -> Found | None:
        seat = self._under_way.pop(task)
        if seat == self._due:
            self._due = None
            self._try_again(seat)
        try:
            stream, answer = task.result()
        except (SwarmUnreachable, BadMessage) as e:
            self._failed[seat] = e
        except ThinwireError as e:
            self._refused[seat] = e
        else:
            if isinstance(answer, Welcome):
                found = Found(seat, stream, answer)
                if not answer.is_copy:
                    return found
                self._give_up_copy()
                self._copy = found
                return None
            self._elsewhere[seat] = answer
            self._go_to(self._seats.heard(answer))
        return None

    def _go_to(self, leader: PeerId | None) -> None:
        """Next, unless it was tried."""
        if leader in self._untried:
            self._untried.sort(key=lambda seat: seat != leader)

    def _give_up_copy(self) -> None:
        if self._copy is not None:
            self._copy.stream.abort()

    async def _drop(self) -> None:
        """Two may say Welcome while one has not noticed yet that it leads no more: the first is taken."""
        for task in self._under_way:
            task.cancel()
        for task in self._under_way:
            with contextlib.suppress(ThinwireError, asyncio.CancelledError):
                stream, _ = await task
                stream.abort()
        self._under_way.clear()

    def _why(self) -> ThinwireError:
        """Nobody said Welcome."""
        leaders = {answer.leader for answer in self._elsewhere.values()}
        by_leader = next((e for seat, e in self._refused.items() if seat in leaders), None)
        if by_leader is not None:
            return by_leader
        if self._elsewhere:
            strange = [
                s for s, said in self._elsewhere.items() if said.leader not in (None, *self._seats.in_order())
            ]
            return NobodyLeads(self._in_words(leaders), strange)
        if self._refused:
            return next(iter(self._refused.values()))
        if len(self._seats) == 1:
            return next(iter(self._failed.values()))
        told = {seat: one_line(str(e), heading=False) for seat, e in self._failed.items()}
        listing = "\n".join(f"  {short(seat)}: {why}" for seat, why in told.items())
        return SwarmUnreachable(f"none of {len(self._seats)} coordinators is reachable:\n{listing}")

    def _in_words(self, leaders: set[PeerId | None]) -> str:
        """With what is waited for, as the seat says that knows of the latest leader."""
        newest = max(self._elsewhere.values(), key=lambda answer: (answer.term, bool(answer.waits_for)))
        if newest.waits_for:
            return f"no coordinator leads: {newest.waits_for}"
        waits_for = "they have not agreed yet who of them leads"
        gone = [seat for seat in self._failed if seat in leaders]
        if gone:
            why = one_line(str(self._failed[gone[0]]), heading=False)
            waits_for = f"{short(gone[0])}, which led, does not answer ({why})"
        n_there = len(self._elsewhere) + len(self._refused)
        return f"{n_there} of {len(self._seats)} coordinators reachable; training waits: {waits_for}"
