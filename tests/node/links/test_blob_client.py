"""Streams to other peers: kept and reused, replaced when they break; who fails is not asked first."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from io import BytesIO
from typing import BinaryIO

import pytest

from thinwire.compression.errors import SwarmUnreachable
from thinwire.coordinator.protocol import blob_streams
from thinwire.coordinator.protocol.blob_streams import NotServed, get_blob, serve_blobs
from thinwire.coordinator.protocol.messages import BadMessage, digest_of
from thinwire.coordinator.protocol.patience import Patience
from thinwire.coordinator.protocol.streams import HEADER, FrameKind, Meter, Stream, TrafficKind
from thinwire.node.links.base import Lied
from thinwire.node.links.blob_client import FAILURES, STREAMS_PER_HOLDER, Holders

BLOB = bytes(range(256)) * 1000


class Shelf:
    def __init__(self) -> None:
        self.blobs = {digest_of(BLOB): BLOB}

    def open(self, digest: bytes) -> tuple[BinaryIO, int]:
        return BytesIO(self.blobs[digest]), len(self.blobs[digest])

    def sink(self, digest: bytes, n_bytes: int) -> None:
        raise BadMessage("no")

    def stored(self, digest: bytes) -> None:
        raise AssertionError


class Late:
    """A blob that comes once somebody says so."""

    def __init__(self, blob: bytes) -> None:
        self._blob, self.n_bytes, self.comes = BytesIO(blob), len(blob), asyncio.Event()

    async def read(self, n_bytes: int) -> bytes:
        await self.comes.wait()
        return self._blob.read(n_bytes)

    def close(self) -> None:
        pass


class Peers:
    """Serves a shelf to whoever opens a stream. `unreachable`: peers that nobody gets to."""

    def __init__(self) -> None:
        self.shelf = Shelf()
        self.turns: dict[TrafficKind, asyncio.Semaphore] = {"payload": asyncio.Semaphore(2)}
        self.unreachable: set[str] = set()
        self.coming: dict[bytes, Late] = {}
        self.opened: Counter[str] = Counter()
        self.ends: list[Stream] = []
        self._servers: list[asyncio.Task[None]] = []

    async def open_stream(self, holder: str) -> Stream:
        self.opened[holder] += 1
        if holder in self.unreachable:
            raise SwarmUnreachable("no route")
        ours, theirs = [
            Stream(*await asyncio.open_unix_connection(sock=sock), Meter()) for sock in socket.socketpair()
        ]
        self.ends.append(theirs)
        self._servers.append(
            asyncio.create_task(
                serve_blobs(
                    theirs, self.shelf, lambda _: "payload", lambda: True, self.turns, self.coming.get
                )
            )
        )
        return ours

    async def end(self) -> None:
        for end in self.ends:
            end.abort()
        await asyncio.gather(*self._servers, return_exceptions=True)


def in_a_loop(body: Callable[[Peers, Holders], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def with_limit() -> None:
            peers = Peers()
            holders = Holders(peers.open_stream)
            try:
                async with asyncio.timeout(20):
                    await body(peers, holders)
            finally:
                holders.close()
                await peers.end()

        asyncio.run(with_limit())

    run.__name__ = body.__name__
    return run


async def get(holders: Holders, holder: str = "a") -> bytes:
    return await holders.get(holder, digest_of(BLOB), len(BLOB), "snapshot")


@in_a_loop
async def test_one_stream_serves_many_requests(peers: Peers, holders: Holders) -> None:
    assert not holders.has_answered("a")
    for _ in range(5):
        assert await get(holders) == BLOB
    assert holders.has_answered("a")
    assert peers.opened == {"a": 1}


@in_a_loop
async def test_who_waits_for_a_blob_itself_says_so_until_it_comes(peers: Peers, holders: Holders) -> None:
    """So nobody takes it for silent."""
    late = BLOB[1:]
    coming = peers.coming[digest_of(late)] = Late(late)
    n_waits = 0

    def waits() -> None:
        nonlocal n_waits
        n_waits += 1
        if n_waits == 3:
            coming.comes.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blob_streams, "WAITING_S", 0.01)
        assert await holders.get("a", digest_of(late), len(late), "payload", waits=waits) == late
        assert n_waits == 3
        assert await holders.get("a", digest_of(BLOB), len(BLOB), "payload", waits=waits) == BLOB
    assert n_waits == 3, "what is there comes at once"


@in_a_loop
async def test_requests_at_the_same_time_have_a_bounded_number_of_streams(
    peers: Peers, holders: Holders
) -> None:
    assert await asyncio.gather(*(get(holders) for _ in range(20))) == [BLOB] * 20
    assert peers.opened["a"] <= STREAMS_PER_HOLDER


@in_a_loop
async def test_kept_streams_that_have_broken_meanwhile_are_replaced(peers: Peers, holders: Holders) -> None:
    await asyncio.gather(*(get(holders) for _ in range(STREAMS_PER_HOLDER)))
    before = peers.opened["a"]
    for end in peers.ends:
        end.abort()
    await asyncio.sleep(0.01)
    assert await get(holders) == BLOB
    assert peers.opened["a"] == before + 1
    assert not holders.rests("a")


@in_a_loop
async def test_who_keeps_failing_rests_until_it_has_given_something(peers: Peers, holders: Holders) -> None:
    peers.unreachable.add("a")
    for n in range(FAILURES):
        assert not holders.rests("a"), n
        with pytest.raises(SwarmUnreachable, match="no route"):
            await get(holders)
    assert holders.rests("a")
    assert not holders.rests("b")
    # It is asked all the same when somebody insists.
    peers.unreachable.clear()
    assert await get(holders) == BLOB
    assert not holders.rests("a")
    # When it is gone, nothing is held against it.
    peers.unreachable.add("a")
    for end in peers.ends:
        end.abort()
    await asyncio.sleep(0.01)
    for _ in range(FAILURES):
        with pytest.raises(SwarmUnreachable):
            await get(holders)
    assert holders.rests("a")
    for _ in range(2000):
        holders.failed("a")
    assert holders.rests("a")
    holders.keep_only(["b"])
    assert not holders.rests("a")
    assert not holders.has_answered("a")


@in_a_loop
async def test_saying_no_is_no_failure(peers: Peers, holders: Holders) -> None:
    for _ in range(2 * FAILURES):
        with pytest.raises(NotServed):
            await holders.get("a", digest_of(b"absent"), 100, "payload")
    assert not holders.rests("a")
    assert await get(holders) == BLOB
    assert peers.opened == {"a": 1}


@in_a_loop
async def test_who_gives_something_is_kept_until_it_has_given_it(peers: Peers, holders: Holders) -> None:
    getting = asyncio.create_task(get(holders))
    while not ("a" in holders._clients and holders._clients["a"].is_busy):
        await asyncio.sleep(0)
    holders.keep_only([])
    assert await getting == BLOB
    holders.keep_only([])
    assert not holders.has_answered("a")


@in_a_loop
async def test_other_bytes_are_a_lie_and_a_cut_is_none(peers: Peers, holders: Holders) -> None:
    peers.shelf.blobs[digest_of(b"wanted")] = b"others"
    with pytest.raises(Lied):
        await holders.get("a", digest_of(b"wanted"), 100, "payload")
    with pytest.raises(Lied):
        await holders.get("a", digest_of(BLOB), len(BLOB) - 1, "payload")

    async def cut(holder: str) -> Stream:
        ours, theirs = [
            Stream(*await asyncio.open_unix_connection(sock=sock), Meter()) for sock in socket.socketpair()
        ]
        await theirs.send(FrameKind.SIZE, len(BLOB).to_bytes(8, "big"))
        theirs._writer.write(HEADER.pack(1000, FrameKind.CHUNK) + bytes(10))
        theirs.close()
        return ours

    cutting = Holders(cut)
    with pytest.raises(SwarmUnreachable) as broken:
        await get(cutting)
    assert not isinstance(broken.value, Lied)
    cutting.close()


@in_a_loop
async def test_a_holder_that_says_nothing_is_given_up(peers: Peers, holders: Holders) -> None:
    ours, theirs = [
        Stream(*await asyncio.open_unix_connection(sock=sock), Meter()) for sock in socket.socketpair()
    ]
    patience = Patience(floor_s=0.01, ceiling_s=0.05)
    with pytest.raises(SwarmUnreachable, match="stood still"):
        await get_blob(ours, digest_of(BLOB), len(BLOB), "payload", patience)
    ours.abort()
    theirs.abort()
