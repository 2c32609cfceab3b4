"""Where payloads come from, and in which order: scripted sources, an event loop with a time of its own."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from types import SimpleNamespace

import pytest

from tests.support.records import commit_body, unsigned
from tests.support.skipping_loop import SkippingLoop
from thinwire.compression.errors import SwarmUnreachable
from thinwire.coordinator.protocol.blob_streams import NotServed, Referred, put_blob, serve_blobs
from thinwire.coordinator.protocol.messages import (
    Commit,
    Offered,
    OfferEntry,
    digest_of,
)
from thinwire.coordinator.protocol.streams import FrameKind, Meter, Stream, TrafficKind
from thinwire.node.links import payloads as payloads_module
from thinwire.node.links.base import Lied
from thinwire.node.links.blob_client import Holders
from thinwire.node.links.payloads import AHEAD, KEPT_ROUNDS, PayloadCache, Payloads, Served

ME, A, B, C = "me", "a", "b", "c"
PEERS = {0: ME, 1: A, 2: B, 3: C}


class Swarm:
    """Who has which payload. Every attempt is written down; what is held back waits for `let_go`."""

    def __init__(self) -> None:
        self.coordinator: dict[bytes, bytes] = {}
        self.is_up = True
        self.named: str | None = None
        """Who has it, too, as the coordinator says."""
        self.given_up = False
        self.peers: dict[str, dict[bytes, bytes]] = {A: {}, B: {}, C: {}}
        self.resting: set[str] = set()
        self.held: set[str] = set()
        self.waiting: set[str] = set()
        """Who has nothing before `let_go`, either, and says so."""
        self.let_go = asyncio.Event()
        self.asked: list[str] = []
        self.slow: list[str] = []
        self.streams = Holders(self.open_stream)
        self.piece_bytes = 0
        """Payloads come over real streams, so many bytes every ten milliseconds; 0: at once, without."""
        self.giving: list[asyncio.Task[None]] = []

    async def from_coordinator(self, digest: bytes, n_bytes: int, referred: bool = False) -> bytes:
        self.asked.append("coordinator")
        if not self.is_up:
            raise SwarmUnreachable("no connection")
        if referred and self.named is not None:
            raise Referred(self.named)
        if digest not in self.coordinator:
            raise NotServed("not here")
        return self.coordinator[digest]

    async def open_stream(self, holder: str) -> Stream:
        ours, theirs = [
            Stream(*await asyncio.open_connection(sock=sock), Meter()) for sock in socket.socketpair()
        ]
        self.giving.append(asyncio.create_task(self.give(theirs, self.peers[holder])))
        return ours

    async def give(self, stream: Stream, payloads: dict[bytes, bytes]) -> None:
        try:
            digest = (await stream.receive({FrameKind.GET: len(digest_of(b""))})).body
            payload = payloads[digest]
            await stream.send(FrameKind.SIZE, struct.pack(">Q", len(payload)))
            for start in range(0, len(payload), self.piece_bytes):
                await asyncio.sleep(0.01)
                await stream.send(FrameKind.CHUNK, payload[start : start + self.piece_bytes])
            await stream.send(FrameKind.END, digest)
            await stream.ended(20)
        finally:
            stream.abort()

    async def from_member(
        self, holder: str, digest: bytes, n_bytes: int, waits: Callable[[], object] = bool
    ) -> bytes:
        if self.is_coordinator(holder):
            await self.let_go.wait()
            return await self.from_coordinator(digest, n_bytes)
        self.asked.append(holder)
        while holder in self.waiting and not self.let_go.is_set():
            waits()
            await asyncio.sleep(0.01)
        if holder in self.held:
            await self.let_go.wait()
        if self.piece_bytes:
            return await self.streams.get(holder, digest, n_bytes, "payload")
        if digest not in self.peers[holder]:
            raise NotServed("not here")
        return self.peers[holder][digest]

    def holders(self, offerer: str | None) -> list[str]:
        return sorted(self.peers, key=lambda peer_id: peer_id != offerer)

    def is_coordinator(self, holder: str) -> bool:
        return holder == "coordinator"

    def rests(self, holder: str) -> bool:
        return holder in self.resting

    def heard_bytes(self, holder: str) -> int:
        return self.streams.heard_bytes(holder)

    def too_slow(self, holder: str) -> None:
        self.slow.append(holder)

    async def reconnected(self, timeout_s: float) -> None:
        if self.given_up:
            raise SwarmUnreachable("given up")
        self.is_up = True


def in_a_loop(body: Callable[[Swarm, Payloads], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def with_limit() -> None:
            swarm = Swarm()
            payloads = Payloads(swarm, ME)
            payloads.max_offers, payloads.max_bytes = 3, 10_000
            async with asyncio.timeout(20):
                await body(swarm, payloads)
            payloads.close()
            swarm.streams.close()
            for task in swarm.giving:
                task.cancel()
            await asyncio.gather(*swarm.giving, return_exceptions=True)
            await settle()

        with asyncio.Runner(loop_factory=SkippingLoop) as runner, pytest.MonkeyPatch.context() as patch:
            patch.setattr(payloads_module, "time", SimpleNamespace(monotonic=runner.get_loop().time))
            runner.run(with_limit())

    run.__name__ = body.__name__
    return run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads_module, "_RETRY_S", 0.001)
    monkeypatch.setattr(payloads_module, "LONG_WAIT_S", 0.05)
    monkeypatch.setattr(payloads_module, "_ANNOUNCED_S", 0.02)
    monkeypatch.setattr(payloads_module, "_AGAIN_S", 0.005)
    monkeypatch.setattr(payloads_module, "SHORT_WAIT_S", 0.05)


def data(name: str) -> bytes:
    return name.encode() * 100


def entry(peer: int, payload: bytes) -> OfferEntry:
    return OfferEntry(
        peer=peer,
        n_samples=1,
        n_tokens=1,
        loss=None,
        n_bytes=len(payload),
        payload=None,
        digest=digest_of(payload),
    )


def commit(round_: int, *entries: OfferEntry) -> Commit:
    return unsigned(commit_body(round_, offers=entries))


def offered(round_: int, holder: str, payload: bytes) -> Offered:
    return Offered(round=round_, holder=holder, digest=digest_of(payload), n_bytes=len(payload))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@in_a_loop
async def test_what_was_fetched_while_the_round_was_open_is_not_asked_for_again(
    swarm: Swarm, payloads: Payloads
) -> None:
    x = data("x")
    swarm.peers[A][digest_of(x)] = x
    payloads.offered(offered(1, A, x))
    await settle()
    payloads.committed(commit(1, entry(1, x)))
    assert await payloads.get(entry(1, x), A) == x
    assert swarm.asked == [A]


async def send(payloads: Payloads, payload: bytes, sender: str = "coordinator") -> dict[TrafficKind, int]:
    """As the coordinator does. Returns what came, by its kind."""
    near, far = socket.socketpair()
    ours = Stream(*await asyncio.open_connection(sock=near), Meter())
    theirs = Stream(*await asyncio.open_connection(sock=far), Meter())
    served = Served(payloads.kept, payloads=payloads)
    allowed, announced = lambda: True, partial(served.announced, sender)
    serving = asyncio.create_task(serve_blobs(ours, served, served.purpose, allowed, announced=announced))
    try:
        await put_blob(theirs, digest_of(payload), payload, "payload")
    finally:
        theirs.close()
        await asyncio.gather(serving, return_exceptions=True)
        ours.close()
    return ours.meter.received


@in_a_loop
async def test_what_the_coordinator_sends_by_itself_is_not_asked_for(
    swarm: Swarm, payloads: Payloads
) -> None:
    """Although it is ahead of the word that it comes."""
    x = data("x")
    sending = asyncio.create_task(send(payloads, x))
    await settle()
    payloads.offered(offered(1, ME, x))
    payloads.want([commit(1, entry(1, x))], PEERS)
    assert (await sending)["payload"] > len(x)
    assert await payloads.get(entry(1, x), A) == x
    assert swarm.asked == []
    await send(payloads, x)


@in_a_loop
async def test_what_the_coordinator_has_announced_no_member_sends(swarm: Swarm, payloads: Payloads) -> None:
    """It could begin, and stand still."""
    x = data("x")
    payloads.offered(offered(1, ME, x))
    with pytest.raises(NotServed, match="asked for"):
        await send(payloads, x, A)
    assert {reason: n for reason, n in payloads.refused.items() if n} == {"sender": 1}
    assert digest_of(x) not in payloads.kept
    await send(payloads, x)
    assert await payloads.get(entry(1, x), A) == x


@in_a_loop
async def test_what_the_coordinator_has_not_sent_is_asked_for(swarm: Swarm, payloads: Payloads) -> None:
    x = data("x")
    swarm.coordinator[digest_of(x)] = x
    payloads.offered(offered(1, ME, x))
    assert await payloads.get(entry(1, x), A) == x
    assert swarm.asked == ["coordinator"]


@in_a_loop
async def test_what_a_coordinator_has_begun_to_send_is_asked_of_the_next_one(
    swarm: Swarm, payloads: Payloads
) -> None:
    """It may stand still."""
    x = data("x")
    swarm.coordinator[digest_of(x)] = x
    payloads.offered(offered(1, ME, x))
    sink = payloads.takes(digest_of(x), len(x))
    assert sink is not None
    sink.write(x[:1])
    payloads.want([commit(1, entry(1, x))], PEERS)
    await settle()
    assert swarm.asked == []
    payloads.reconnected()
    assert await payloads.get(entry(1, x), A) == x
    assert swarm.asked == ["coordinator"]
    assert payloads.takes(digest_of(x), len(x)) is None


@in_a_loop
async def test_what_was_not_announced_is_refused_and_counted(swarm: Swarm, payloads: Payloads) -> None:
    x, y = data("x"), data("y")
    payloads.offered(Offered(round=1, holder=ME, digest=digest_of(y), n_bytes=len(y) + 1))
    for payload in (x, y):
        with pytest.raises(NotServed, match="announced"):
            await send(payloads, payload)
    assert {reason: n for reason, n in payloads.refused.items() if n} == {"unannounced": 2}
    assert not payloads.kept.n_bytes


@in_a_loop
async def test_ones_own_offer_is_never_fetched(swarm: Swarm, payloads: Payloads) -> None:
    x = data("x")
    assert payloads.keep_own(1, x) == digest_of(x)
    payloads.offered(offered(1, ME, x))
    payloads.offered(offered(1, B, x))
    payloads.want([commit(1, entry(0, x))], PEERS)
    assert await payloads.get(entry(0, x), ME) == x
    assert swarm.asked == []


@in_a_loop
async def test_what_is_on_its_way_from_its_offerer_is_waited_for(swarm: Swarm, payloads: Payloads) -> None:
    x = data("x")
    swarm.peers[A][digest_of(x)] = x
    swarm.held.add(A)
    payloads.offered(offered(1, A, x))
    await settle()
    payloads.want([commit(1, entry(1, x))], PEERS)
    swarm.let_go.set()
    assert await payloads.get(entry(1, x), A) == x
    assert swarm.asked == [A]


@in_a_loop
async def test_after_a_short_wait_the_coordinator_is_asked(swarm: Swarm, payloads: Payloads) -> None:
    x = data("x")
    swarm.coordinator[digest_of(x)] = x
    swarm.held.add(A)
    payloads.offered(offered(1, A, x))
    await settle()
    payloads.want([commit(1, entry(1, x))], PEERS)
    assert await payloads.get(entry(1, x), A) == x
    assert swarm.asked == [A, "coordinator"]
    assert swarm.slow == [A]


@in_a_loop
async def test_whom_the_coordinator_names_is_asked(swarm: Swarm, payloads: Payloads) -> None:
    x = data("x")
    swarm.coordinator[digest_of(x)] = swarm.peers[B][digest_of(x)] = x
    swarm.held.add(A)
    swarm.named = B
    payloads.offered(offered(1, A, x))
    assert await payloads.get(entry(1, x), A) == x
    assert swarm.asked == [A, "coordinator", B]


@in_a_loop
async def test_and_the_coordinator_again_where_nothing_comes_from_there(
    swarm: Swarm, payloads: Payloads
) -> None:
    x = data("x")
    swarm.coordinator[digest_of(x)] = x
    swarm.held |= {A, B}
    swarm.named = B
    payloads.offered(offered(1, A, x))
    assert await payloads.get(entry(1, x), A) == x
    assert swarm.asked == [A, "coordinator", B, "coordinator"]
    assert swarm.slow == [B, A]
    assert payloads.refused["slow"] == 2


@in_a_loop
async def test_wrong_bytes_are_counted_and_come_from_elsewhere(swarm: Swarm, payloads: Payloads) -> None:
    x = data("x")
    swarm.coordinator[digest_of(x)] = x
    swarm.peers[A][digest_of(x)] = data("y")
    swarm.piece_bytes = len(x)
    payloads.offered(offered(1, A, x))
    assert await payloads.get(entry(1, x), A) == x
    assert swarm.asked == [A, "coordinator"]
    assert payloads.refused["wrong"] == 1


@in_a_loop
async def test_who_passes_a_payload_on_may_hear_of_it_later(swarm: Swarm, payloads: Payloads) -> None:
    x = data("x")
    payloads.offered(offered(1, A, x))
    while not swarm.asked:
        await settle()
    swarm.peers[A][digest_of(x)] = x
    assert await payloads.get(entry(1, x), A) == x
    assert set(swarm.asked) == {A}


async def come_slowly(swarm: Swarm, payloads: Payloads, piece_bytes: int) -> list[str]:
    """A large payload comes from A so. Returns who was asked for it."""
    x, payloads.max_bytes = bytes(100_000), 100_000
    swarm.coordinator[digest_of(x)] = swarm.peers[A][digest_of(x)] = x
    swarm.piece_bytes = piece_bytes
    swarm.asked.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(payloads_module, "LONG_WAIT_S", 0.25)
        payloads.offered(offered(2, A, x))
        assert await payloads.get(entry(1, x), A) == x
    return swarm.asked


@in_a_loop
async def test_what_comes_slowly_is_waited_for(swarm: Swarm, payloads: Payloads) -> None:
    """Several times as long as what does not come."""
    assert await come_slowly(swarm, payloads, 2000) == [A]
    assert swarm.slow == []


async def ask_who_waits(swarm: Swarm, payloads: Payloads) -> Awaitable[bytes]:
    """A payload of which A says that it waits for it. Returns when that has gone on for a while."""
    x, payloads.max_bytes = bytes(10_000), 10_000
    swarm.coordinator[digest_of(x)] = swarm.peers[A][digest_of(x)] = x
    swarm.waiting.add(A)
    payloads.offered(offered(2, A, x))
    getting = asyncio.create_task(payloads.get(entry(1, x), A))
    await asyncio.sleep(2.5 * payloads_module.LONG_WAIT_S)
    return getting


@in_a_loop
async def test_who_says_that_it_waits_itself_is_waited_for(swarm: Swarm, payloads: Payloads) -> None:
    getting = await ask_who_waits(swarm, payloads)
    swarm.let_go.set()
    await getting
    assert swarm.asked == [A]
    assert swarm.slow == []


@in_a_loop
async def test_but_no_longer_than_who_gives(swarm: Swarm, payloads: Payloads) -> None:
    await (await ask_who_waits(swarm, payloads))
    assert swarm.asked == [A, "coordinator"]
    assert swarm.slow == [A]


@in_a_loop
async def test_who_gives_next_to_nothing_is_not_waited_for(swarm: Swarm, payloads: Payloads) -> None:
    assert await come_slowly(swarm, payloads, 1) == [A, "coordinator"]
    assert swarm.slow == [A]


@in_a_loop
async def test_who_is_slower_than_others_were_is_not_waited_for(swarm: Swarm, payloads: Payloads) -> None:
    for payload in map(data, "uvw"):
        swarm.peers[B][digest_of(payload)] = payload
        payloads.offered(offered(1, B, payload))
        await payloads.get(entry(2, payload), B)
    assert await come_slowly(swarm, payloads, 1000) == [A, "coordinator"]
    assert swarm.slow == [A]


@in_a_loop
async def test_the_slow_offerer_may_still_win_against_a_coordinator_without_it(
    swarm: Swarm, payloads: Payloads
) -> None:
    x = data("x")
    swarm.peers[A][digest_of(x)] = x
    swarm.held |= {A, B}
    payloads.offered(offered(1, A, x))
    await settle()
    payloads.want([commit(1, entry(1, x))], PEERS)
    getting = asyncio.create_task(payloads.get(entry(1, x), A))
    while "coordinator" not in swarm.asked:
        await asyncio.sleep(0.001)
    swarm.let_go.set()
    assert await getting == x
    assert swarm.slow == []


@in_a_loop
async def test_what_the_coordinator_gives_is_not_asked_for_twice(swarm: Swarm, payloads: Payloads) -> None:
    x = data("x")
    swarm.coordinator[digest_of(x)] = x
    payloads.offered(offered(1, "coordinator", x))
    payloads.want([commit(1, entry(1, x))], PEERS)
    await asyncio.sleep(3 * payloads_module.LONG_WAIT_S)
    swarm.let_go.set()
    assert await payloads.get(entry(1, x), A) == x
    assert swarm.asked == ["coordinator"]


@in_a_loop
async def test_what_is_on_its_way_is_passed_on_once_it_is_here(swarm: Swarm, payloads: Payloads) -> None:
    x = data("x")
    swarm.peers[A][digest_of(x)] = x
    swarm.held.add(A)
    served = Served(payloads.kept, 2 * len(x) / payloads_module.LONG_WAIT_S, payloads)
    assert served.coming(digest_of(x)) is None, "nobody has said that it comes"
    payloads.offered(offered(1, A, x))
    first, second = served.coming(digest_of(x)), served.coming(digest_of(x))
    assert first is not None
    assert second is not None
    assert (first.n_bytes, served.purpose(digest_of(x))) == (len(x), "payload")
    assert served.coming(digest_of(x)) is None, "two are all that there is time for"
    second.close()
    reading = asyncio.create_task(first.read(60))
    await settle()
    assert not reading.done()
    swarm.let_go.set()
    assert await reading + await first.read(60) == x
    assert await first.read(60) == b""
    assert served.coming(digest_of(x)) is None
    first.close()
    file, _ = served.open(digest_of(x))
    assert file.read() == x


@in_a_loop
async def test_a_narrow_line_gives_what_it_sends_while_payloads_are_waited_for(
    swarm: Swarm, payloads: Payloads
) -> None:
    x = bytes(50_000)
    payloads.kept.add(1, digest_of(x), x)
    served = Served(payloads.kept, len(x) / 0.5, payloads)
    served.open(digest_of(x))[0].close()  # nobody knows yet how long payloads take
    for payload in map(data, "uvw"):
        swarm.peers[B][digest_of(payload)] = payload
        payloads.offered(offered(1, B, payload))
        await payloads.get(entry(2, payload), B)
    with pytest.raises(KeyError):
        served.open(digest_of(x))


@in_a_loop
async def test_who_waits_for_what_does_not_come_is_told(swarm: Swarm, payloads: Payloads) -> None:
    x, y = data("x"), data("y")
    swarm.held.add(A)
    served = Served(payloads.kept, payloads=payloads)
    waiting = []
    for payload in (x, y):
        payloads.offered(offered(1, A, payload))
        coming = served.coming(digest_of(payload))
        assert coming is not None
        waiting.append(asyncio.create_task(coming.read(10)))
    payloads.committed(commit(1, entry(1, x)))
    with pytest.raises(SwarmUnreachable):
        await waiting[1]
    swarm.let_go.set()
    with pytest.raises(SwarmUnreachable):
        await waiting[0]


@in_a_loop
async def test_nobody_waits_for_what_this_node_looks_for_itself(swarm: Swarm, payloads: Payloads) -> None:
    """Two nodes that have both lost a payload would wait for each other."""
    x = data("x")
    swarm.held.add(A)
    payloads.want([commit(1, entry(1, x))], PEERS)
    await settle()
    assert swarm.asked == ["coordinator", A]
    assert Served(payloads.kept, payloads=payloads).coming(digest_of(x)) is None


@in_a_loop
async def test_a_failed_early_fetch_is_silent_and_the_coordinator_helps(
    swarm: Swarm, payloads: Payloads
) -> None:
    x = data("x")
    swarm.coordinator[digest_of(x)] = x
    payloads.offered(offered(1, A, x))
    await settle()
    assert await payloads.get(entry(1, x), A) == x
    assert list(dict.fromkeys(swarm.asked)) == [A, "coordinator"]
    assert swarm.slow == []


@in_a_loop
async def test_without_an_offer_announced_the_coordinator_comes_first(
    swarm: Swarm, payloads: Payloads
) -> None:
    x = data("x")
    swarm.coordinator[digest_of(x)] = swarm.peers[A][digest_of(x)] = x
    assert await payloads.get(entry(1, x), A) == x
    assert swarm.asked == ["coordinator"]


@in_a_loop
async def test_what_the_coordinator_does_not_have_comes_from_a_member(
    swarm: Swarm, payloads: Payloads
) -> None:
    x = data("x")
    swarm.peers[C][digest_of(x)] = x
    assert await payloads.get(entry(2, x), B) == x
    assert swarm.asked == ["coordinator", B, A, C]


@in_a_loop
async def test_what_nobody_has_is_unreachable(swarm: Swarm, payloads: Payloads) -> None:
    with pytest.raises(SwarmUnreachable, match="nobody has"):
        await payloads.get(entry(1, data("x")), A)
    assert swarm.asked == ["coordinator", A, B, C] * 2


@in_a_loop
async def test_a_coordinator_that_is_away_is_waited_for(swarm: Swarm, payloads: Payloads) -> None:
    x = data("x")
    swarm.coordinator[digest_of(x)] = x
    swarm.is_up = False
    assert await payloads.get(entry(1, x), A) == x
    assert swarm.asked == ["coordinator", A, B, C, "coordinator"]


@in_a_loop
async def test_a_coordinator_that_is_given_up_ends_the_wait(swarm: Swarm, payloads: Payloads) -> None:
    swarm.is_up, swarm.given_up = False, True
    with pytest.raises(SwarmUnreachable, match="given up"):
        await payloads.get(entry(1, data("x")), A)


@in_a_loop
async def test_an_open_round_costs_a_bounded_number_of_fetches(swarm: Swarm, payloads: Payloads) -> None:
    swarm.held |= {A, B, C}
    for i in range(10):
        payloads.offered(offered(1, A, data(str(i))))
    payloads.offered(offered(1, B, bytes(10_001)))
    await settle()
    assert swarm.asked == [A, A, A]
    payloads.committed(commit(1, entry(1, data("1"))))
    await settle()
    payloads.offered(offered(2, B, data("next")))
    await settle()
    assert swarm.asked == [A, A, A, B]
    for round_ in range(3, 50):
        payloads.offered(offered(round_, A, data(str(round_))))
    await settle()
    assert len(swarm.asked) <= 2 + AHEAD * payloads.max_offers, "whatever rounds there are said to be"


@in_a_loop
async def test_a_peer_that_keeps_failing_is_not_tried_first(swarm: Swarm, payloads: Payloads) -> None:
    """While the round is open already, the coordinator says from whom its payloads come instead."""
    x = data("x")
    swarm.resting.add(A)
    swarm.named = B
    swarm.peers[B][digest_of(x)] = x
    payloads.offered(offered(1, A, x))
    await settle()
    assert swarm.asked == ["coordinator", B]
    assert digest_of(x) in payloads.kept


@in_a_loop
async def test_commits_to_come_are_fetched_ahead(swarm: Swarm, payloads: Payloads) -> None:
    xs = [data(str(i)) for i in range(6)]
    swarm.coordinator = {digest_of(x): x for x in xs}
    commits = [commit(i + 1, entry(1, x)) for i, x in enumerate(xs)]
    payloads.want(commits[:3], PEERS)
    await settle()
    assert swarm.asked == ["coordinator"] * 3
    payloads.want(commits[2:], PEERS)
    await settle()
    assert swarm.asked == ["coordinator"] * 6
    # Those that the node took before it applied them are still here.
    assert [await payloads.get(entry(1, x), A) for x in xs] == xs
    assert swarm.asked == ["coordinator"] * 6


@in_a_loop
async def test_fetches_go_on_until_their_round_is_long_over(swarm: Swarm, payloads: Payloads) -> None:
    x, y = data("x"), data("y")
    swarm.peers[A][digest_of(x)] = x
    swarm.held.add(A)
    payloads.want([commit(1, entry(1, x))], PEERS)
    await settle()
    payloads.want([commit(2, entry(1, y).model_copy(update={"digest": None, "payload": b"y"}))], PEERS)
    getting = asyncio.create_task(payloads.get(entry(1, x), A))
    await settle()
    assert swarm.asked == ["coordinator", A]
    swarm.let_go.set()
    assert await getting == x
    swarm.let_go.clear()

    payloads.want([commit(2, entry(1, y))], PEERS)
    late = asyncio.create_task(payloads.get(entry(1, y), A))
    await settle()
    payloads.want([commit(2 + KEPT_ROUNDS, entry(1, x))], PEERS)
    with pytest.raises(asyncio.CancelledError):
        await late


@in_a_loop
async def test_a_fetch_that_failed_ahead_is_begun_again(swarm: Swarm, payloads: Payloads) -> None:
    x = data("x")
    payloads.want([commit(1, entry(1, x))], PEERS)
    while len(swarm.asked) < 8:
        await asyncio.sleep(0.001)
    await settle()
    swarm.peers[B][digest_of(x)] = x
    payloads.want([commit(1, entry(1, x))], PEERS)
    assert await payloads.get(entry(1, x), A) == x


@in_a_loop
async def test_a_liar_s_word_is_not_taken(swarm: Swarm, payloads: Payloads) -> None:
    x = data("x")
    swarm.peers[C][digest_of(x)] = x

    async def lies(digest: bytes, n_bytes: int) -> bytes:
        raise Lied("wrong bytes")

    swarm.from_coordinator = lies  # type: ignore[method-assign]
    assert await payloads.get(entry(1, x), A) == x


def test_kept_payloads_are_bounded_in_rounds_and_bytes() -> None:
    kept = PayloadCache(max_bytes=1000)
    for round_ in range(1, 5):
        kept.add(round_, bytes([round_]) * 32, bytes(300))
    assert [bytes([r]) * 32 in kept for r in range(1, 5)] == [False, True, True, True]
    assert kept.n_bytes == 900
    kept.add(4, bytes([2]) * 32, bytes(300))
    assert kept.n_bytes == 900
    kept.add(3 + KEPT_ROUNDS, b"new" * 11, bytes(5))
    assert (bytes([3]) * 32 in kept, bytes([2]) * 32 in kept) == (False, True)
    assert kept.n_bytes == 605
    kept.add(100, b"large" * 7, bytes(5000))
    assert (kept.n_bytes, b"large" * 7 in kept) == (5000, True)


def test_what_a_node_may_have_to_replay_goes_for_want_of_room_alone() -> None:
    kept = PayloadCache(max_bytes=1000)
    kept.keep_after(2)
    for round_ in range(1, 4):
        kept.add(round_, bytes([round_]) * 32, bytes(300))
    kept.add(3 + KEPT_ROUNDS, b"new" * 11, bytes(5))
    assert [bytes([r]) * 32 in kept for r in range(1, 4)] == [False, False, True]
    kept.add(4 + KEPT_ROUNDS, b"large" * 7, bytes(900))
    assert bytes([3]) * 32 not in kept


def test_payloads_and_the_shelf_are_served() -> None:
    kept = PayloadCache()
    served = Served(kept)
    kept.add(1, digest_of(b"p"), b"p")
    file, n_bytes = served.open(digest_of(b"p"))
    assert (file.read(), n_bytes, served.purpose(digest_of(b"p"))) == (b"p", 1, "payload")
    with pytest.raises(KeyError):
        served.open(digest_of(b"s"))
    other = PayloadCache()
    other.add(1, digest_of(b"s"), b"s")
    served.shelf = Served(other)
    assert served.open(digest_of(b"s"))[0].read() == b"s"
    assert served.purpose(digest_of(b"s")) == "snapshot"
