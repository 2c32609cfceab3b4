"""Streams between seats: one for each pair, whoever dials, and again when it breaks; who is not let in."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.committee import KEYS, SEATS
from tests.support.loop_transport import LoopTransport, Network
from thinwire.coordinator.protocol.messages import encode_message
from thinwire.coordinator.protocol.streams import SEAT, FrameKind, Meter, Stream
from thinwire.coordinator.quorum.words import Aye, Enter, Follow, Memory, Ping, Word, decode_word
from thinwire.coordinator.seats.link import BACK_S, MAX_QUEUED, TWINS_S, Link, Twins
from thinwire.coordinator.seats.streams import SeatStreams

PLACE = ("/ip4/127.0.0.1/tcp/1",)


@dataclass
class Seat:
    """Remembers what it hears."""

    me: str
    transport: LoopTransport
    denies: str | None = None
    place: tuple[str, ...] = PLACE
    heard_words: list[tuple[str, Word]] = field(default_factory=list)
    n_up: int = 0

    def __post_init__(self) -> None:
        self.streams = SeatStreams(self.me, self, Meter(), random.Random(1))

    def enter(self, seat: str) -> Enter:
        return Enter(
            run_id=b"r" * 32, secret=b"", addresses=self.place, wants_seat=False, lacks=f"{self.n_up} links"
        )

    def refuses(self, seat: str, enter: Enter) -> str | None:
        return self.denies

    def up(self, link: Link, *, is_new: bool) -> None:
        self.n_up += 1

    def down(self, seat: str) -> None:
        pass

    def heard(self, seat: str, word: Word) -> None:
        self.heard_words.append((seat, word))


async def seat_at(network: Network, n: int, denies: str | None = None) -> Seat:
    transport = await network.start(KEYS[n])
    seat = Seat(SEATS[n], transport, denies)
    await seat.streams.open_on(transport)
    return seat


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_both_ends_dial_and_one_stream_is_left_also_after_a_break() -> None:
    async def scene() -> None:
        network = Network()
        a, b = await seat_at(network, 0), await seat_at(network, 1)
        a.streams.keep({b.me: PLACE})
        b.streams.keep({a.me: PLACE})

        async def is_one_pair() -> None:
            await until(lambda: a.streams.links and b.streams.links)
            await asyncio.sleep(0.02)
            assert a.streams.links[b.me].is_ours != b.streams.links[a.me].is_ours
            a.streams.send(b.me, Follow(after=7))
            b.streams.send(a.me, Follow(after=8))
            await until(lambda: a.heard_words and b.heard_words)

        await is_one_pair()
        assert (a.heard_words, b.heard_words) == ([(b.me, Follow(after=8))], [(a.me, Follow(after=7))])
        a.heard_words.clear()
        b.heard_words.clear()
        network.cut(a.me)
        await until(lambda: not a.streams.links and not b.streams.links)
        network.mend()
        await is_one_pair()
        a.streams.introduce()
        await until(lambda: b.streams.links[a.me].enter.lacks == f"{a.n_up} links")
        for seat in (a, b):
            await seat.streams.close()
            await seat.transport.close()

    asyncio.run(scene())


def test_who_is_not_let_in_hears_why() -> None:
    async def scene() -> None:
        network = Network()
        a, b = await seat_at(network, 0), await seat_at(network, 1, "your ticket is not this run's")
        a.streams.keep({b.me: PLACE})
        await until(lambda: a.streams.failed.get(b.me) == "your ticket is not this run's")
        assert not a.streams.links
        assert b.streams.rejected["denied"] >= 1
        a.streams.keep({})
        for seat in (a, b):
            await seat.streams.close()
            await seat.transport.close()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([encode_message(Follow(after=1))], "hello"),
        ([b"\xc1nonsense"], "message"),
        (["enter", b"\xc1nonsense"], "message"),
        (["enter", *[encode_message(Follow(after=1))] * 5000], "rate"),
    ],
)
def test_bad_words_are_counted_and_end_their_own_stream(frames: list[Any], reason: str) -> None:
    async def scene() -> None:
        network = Network()
        a, b = await seat_at(network, 0), await seat_at(network, 1)
        stranger = await network.start(Ed25519PrivateKey.generate())
        a.streams.keep({b.me: PLACE})
        await until(lambda: a.streams.links)
        stream = Stream(*await stranger.open_stream(b.me, SEAT), Meter())
        for frame in frames:
            packed = encode_message(a.enter("")) if frame == "enter" else frame
            await stream.send(FrameKind.MESSAGE, packed)
        await until(lambda: b.streams.rejected[reason] == 1)
        assert a.me in b.streams.links, "the others do not notice"
        for seat in (a, b):
            await seat.streams.close()
            await seat.transport.close()
        await stranger.close()

    asyncio.run(scene())


def test_a_seat_that_does_not_read_loses_the_oldest_words_and_hears_the_newest_ping() -> None:
    async def scene() -> None:
        network = Network()
        a, b = await seat_at(network, 0), await network.start(KEYS[1])
        got: list[Word] = []

        async def serve(_peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = Stream(reader, writer, Meter())
            while True:
                got.append(decode_word((await stream.receive({FrameKind.MESSAGE: 1000})).body))

        await b.handle("x", serve)
        link = Link(
            SEATS[1],
            Stream(*await a.transport.open_stream(SEATS[1], "x"), Meter()),
            a.enter(""),
            is_ours=True,
        )
        n_before = 0
        while link.stream.send_now(Memory(packed=bytes(900))):  # until the system takes no more
            n_before += 1
        for head in range(3):
            link.send(Ping(ballot=1, head=head))
        for n in range(MAX_QUEUED + 9):
            link.send(Aye(highest=n))
        writing = asyncio.create_task(link.write())
        await until(lambda: len(got) == n_before + MAX_QUEUED)
        assert got[-1] == Aye(highest=MAX_QUEUED + 8)
        assert link.n_dropped == 10
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await a.transport.close()
        await b.close()

    asyncio.run(scene())


def test_of_two_that_run_with_one_state_folder_neither_is_let_in_until_one_is_gone() -> None:
    async def scene() -> None:
        network, elsewhere = Network(), Network()
        a, b = await seat_at(network, 0), await seat_at(network, 1)
        transport = await elsewhere.start(KEYS[1])  # the copy, on another machine
        copy = Seat(b.me, transport, place=("/ip4/127.0.0.2/tcp/1",))
        elsewhere.transports[a.me] = a.transport
        await copy.streams.open_on(transport)
        for one in (b, copy):
            one.streams.keep({a.me: PLACE})
            await until(lambda: one.streams.links)  # noqa: B023
        await until(lambda: all("copies of one" in s.streams.failed.get(a.me, "") for s in (b, copy)))
        await until(lambda: not a.streams.links)
        assert a.streams.rejected["denied"] >= 2
        for seat in (a, b, copy):
            await seat.streams.close()
            await seat.transport.close()

    asyncio.run(scene())


def test_who_was_moved_is_no_twin_and_twins_are_until_one_has_not_come_for_a_while() -> None:
    here, there, twins = PLACE, ("/ip4/127.0.0.2/tcp/1",), Twins()
    assert [twins.of("x", place, now) for now, place in ((0, here), (1, here), (99, there))] == [()] * 3
    assert twins.of("x", here, 99 + BACK_S) == (), "moved back"
    now = 300.0
    assert twins.of("x", there, now) == ()
    assert twins.of("x", here, now + 1) == (here, there)
    assert twins.of("x", there, now + 5) == (there, here)
    assert twins.of("y", there, now + 5) == ()
    assert twins.of("x", there, now + 4 + TWINS_S) == (there, here)
    assert twins.of("x", there, now + 5 + TWINS_S) == ()
