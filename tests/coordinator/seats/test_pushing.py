"""Payloads that come to seats without being asked for, and what happens where a push does not get there."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.committee import SEATS
from tests.support.seat_world import Peer, SeatWorld, until
from thinwire.compression.errors import SwarmUnreachable
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.protocol.blob_streams import NotServed, get_blob_into, put_blob, serve_blobs
from thinwire.coordinator.protocol.messages import BadMessage, GenesisBody, Offered, digest_of
from thinwire.coordinator.protocol.streams import BLOB, Meter, Stream
from thinwire.coordinator.seats import fetching
from thinwire.coordinator.seats.driving.council import Council
from thinwire.coordinator.seats.pushing import MAX_REFUSALS, MAX_WAITING, STREAMS, Pusher
from thinwire.coordinator.serving.handing_out import HandingOut
from thinwire.coordinator.serving.passing_on import PassedOn, Stored

PAYLOAD = bytes(range(256)) * 1000
DIGEST = digest_of(PAYLOAD)


def council_of(world: SeatWorld, n: int) -> Council:
    hosting = world.servers[n]._seat
    assert hosting is not None
    return hosting.council


def play(folder: Path, genesis: GenesisBody, scene: Callable[[SeatWorld], Awaitable[None]]) -> None:
    async def whole() -> None:
        world = SeatWorld(folder, genesis)
        world.named(0, 1, 2)
        for n in range(3):
            await world.start(n)
        try:
            await scene(world)
        finally:
            await world.close()

    asyncio.run(whole())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Payloads that seats have asked each other for."""
    found: list[bytes] = []

    async def counted(stream: Stream, digest: bytes, *args: Any) -> None:
        found.append(digest)
        await get_blob_into(stream, digest, *args)

    monkeypatch.setattr(fetching, "get_blob_into", counted)
    return found


def test_no_seat_asks_for_a_payload_in_a_normal_round(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], asked: list[bytes]
) -> None:
    async def scene(world: SeatWorld) -> None:
        leader = await world.led()
        async with Peer(world, 200_000) as a, Peer(world, 200_000):
            await until(lambda: len(a.commits) > 2)
            asked.clear()
            head = len(a.commits)
            await until(lambda: len(a.commits) > head + 5)
            named = {offer.digest for c in a.commits[head : head + 5] for offer in c.body.offers}
        assert asked == []
        for server in world.servers.values():
            await until(lambda: all(d in server.blobs for d in named if d is not None))  # noqa: B023
        assert leader == world.leader

    play(tmp_path, make_genesis(rounds=10_000), scene)


def test_a_seat_that_a_push_does_not_reach_asks_for_the_payload(
    tmp_path: Path,
    make_genesis: Callable[..., GenesisBody],
    asked: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both that follow refuse all pushes, as an older build does."""

    def refuse(self: Council, seat: str, digest: bytes, n_bytes: int) -> None:
        raise BadMessage("another seat leads: blobs are stored there")

    monkeypatch.setattr(Council, "takes", refuse)

    async def scene(world: SeatWorld) -> None:
        await world.led()
        async with Peer(world, 10_000) as a, Peer(world, 10_000):
            await until(lambda: len(a.commits) > 5)
        assert {a.commits[3].body.offers[0].digest, a.commits[4].body.offers[0].digest} <= set(asked)

    play(tmp_path, make_genesis(rounds=10_000), scene)


def test_only_who_leads_pushes_and_no_more_than_a_payload(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody]
) -> None:
    async def scene(world: SeatWorld) -> None:
        leader = await world.led()
        to, other = (n for n in range(3) if n != leader)
        council = council_of(world, to)
        await until(lambda: council.seat.leader == SEATS[leader])

        async def push(n: int, data: bytes) -> None:
            ends = await world.network.transports[SEATS[n]].open_stream(SEATS[to], BLOB)
            stream = Stream(*ends, Meter())
            try:
                await put_blob(stream, digest_of(data), data, "payload")
            finally:
                stream.abort()

        with pytest.raises(NotServed, match="push"):
            await push(other, PAYLOAD)
        with pytest.raises(NotServed, match="oversized"):
            await push(leader, bytes(make_genesis().limits.max_payload_bytes + 1))
        assert (council.counts["push"], council.counts["oversized"]) == (1, 1)
        assert list((tmp_path / str(to) / "blobs").glob("*.part")) == []
        await push(leader, PAYLOAD)
        await push(leader, PAYLOAD)
        assert world.servers[to].blobs.read(DIGEST) == PAYLOAD

    play(tmp_path, make_genesis(rounds=10_000), scene)


class Pushing:
    """A leader's store, and what another seat does with a stream that comes: `serve`."""

    def __init__(self, folder: Path, serve: Callable[[Stream], Awaitable[None]]) -> None:
        self.blobs, self._serve = BlobStore(folder), serve
        self.given: list[bytes] = []
        self.failed: list[bytes] = []
        self.pusher = Pusher(
            self._open, self._source, lambda _s, d: self.given.append(d), lambda _s, d: self.failed.append(d)
        )
        self._serving: list[asyncio.Task[None]] = []

    @property
    def n_streams(self) -> int:
        return len(self._serving)

    def _source(self, digest: bytes) -> Any:
        writer = self.blobs.coming(digest)
        return Stored(self.blobs, digest) if writer is None else PassedOn(writer, lambda: True)

    async def _open(self, seat: str) -> Stream:
        near, far = socket.socketpair()
        stream = Stream(*await asyncio.open_connection(sock=far), Meter())
        self._serving.append(asyncio.create_task(self._until_over(stream)))
        return Stream(*await asyncio.open_connection(sock=near), Meter())

    async def _until_over(self, stream: Stream) -> None:
        with contextlib.suppress(OSError, EOFError, BadMessage, SwarmUnreachable):
            await self._serve(stream)
        stream.abort()

    async def close(self) -> None:
        self.pusher.forget_all()
        await asyncio.gather(*self._serving)


class Takes:
    """A shelf that takes all."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs, self.came = blobs, []  # type: tuple[BlobStore, list[bytes]]

    def open(self, digest: bytes) -> Any:
        raise KeyError(digest.hex())

    def sink(self, digest: bytes, n_bytes: int) -> Any:
        return self._blobs.writer(digest, n_bytes)

    def stored(self, digest: bytes) -> None:
        self.came.append(digest)


def test_a_payload_is_pushed_while_it_comes_and_one_that_breaks_off_is_not_left_behind(
    tmp_path: Path,
) -> None:
    theirs = BlobStore(tmp_path / "theirs")
    shelf = Takes(theirs)

    async def scene() -> None:
        pushing = Pushing(
            tmp_path / "ours", lambda stream: serve_blobs(stream, shelf, "payload", lambda: True)
        )
        upload = pushing.blobs.writer(DIGEST, len(PAYLOAD))
        upload.write(PAYLOAD[:1000])
        assert pushing.pusher.push("seat", DIGEST)
        await until(lambda: theirs.coming(DIGEST) is not None)
        upload.abort()
        await until(lambda: pushing.failed == [DIGEST])
        await until(lambda: theirs.coming(DIGEST) is None)
        upload = pushing.blobs.writer(DIGEST, len(PAYLOAD))
        assert pushing.pusher.push("seat", DIGEST)
        upload.write(PAYLOAD)
        await until(lambda: shelf.came == [DIGEST])
        assert DIGEST not in pushing.blobs
        assert pushing.given == [DIGEST]
        upload.finish()
        await pushing.close()
        assert theirs.read(DIGEST) == PAYLOAD

    asyncio.run(scene())


def test_a_seat_that_reads_nothing_holds_a_few_streams_and_names_of_payloads(tmp_path: Path) -> None:
    async def scene() -> None:
        still = asyncio.Event()

        async def serve(_stream: Stream) -> None:
            await still.wait()

        pushing = Pushing(tmp_path, serve)
        n_most = MAX_WAITING + STREAMS
        payloads = [n.to_bytes(4, "big") * 1000 for n in range(n_most + 1)]
        for payload in payloads:
            pushing.blobs.put(digest_of(payload), payload)
        taken = [pushing.pusher.push("seat", digest_of(payload)) for payload in payloads]
        assert taken == [True] * n_most + [False]
        assert pushing.pusher.push("another seat", digest_of(payloads[0]))
        await until(lambda: pushing.n_streams == STREAMS + 1)
        pushing.pusher.forget("seat")
        assert not any(pushing.pusher.is_pushed("seat", digest_of(payload)) for payload in payloads)
        assert pushing.pusher.is_pushed("another seat", digest_of(payloads[0]))
        still.set()
        await pushing.close()

    asyncio.run(scene())


def test_a_seat_that_refuses_what_is_pushed_gets_no_more_until_it_is_connected_anew(tmp_path: Path) -> None:
    class Refuses(Takes):
        def sink(self, digest: bytes, n_bytes: int) -> Any:
            raise BadMessage("not here")

    async def scene() -> None:
        shelf = Refuses(BlobStore(tmp_path / "theirs"))
        pushing = Pushing(
            tmp_path / "ours", lambda stream: serve_blobs(stream, shelf, "payload", lambda: True)
        )
        pushing.blobs.put(DIGEST, PAYLOAD)
        for n in range(MAX_REFUSALS):
            assert pushing.pusher.push("seat", DIGEST)
            await until(lambda: len(pushing.failed) == n + 1)  # noqa: B023
        assert not pushing.pusher.push("seat", DIGEST)
        pushing.pusher.forget("seat")
        assert pushing.pusher.push("seat", DIGEST)
        await pushing.close()

    asyncio.run(scene())


def test_nodes_that_get_a_payload_from_the_coordinator_are_sent_it(tmp_path: Path) -> None:
    """But for one that takes none."""

    def offered(holder: str) -> Offered:
        return Offered(round=1, holder=holder, digest=DIGEST, n_bytes=len(PAYLOAD))

    async def scene() -> None:
        blobs, shelf = BlobStore(tmp_path / "ours"), Takes(BlobStore(tmp_path / "theirs"))
        blobs.put(DIGEST, PAYLOAD)
        pushing = Pushing(
            tmp_path / "none", lambda stream: serve_blobs(stream, shelf, "payload", lambda: True)
        )

        async def open_stream(peer_id: str) -> Stream:
            if peer_id == "takes none":
                raise SwarmUnreachable("it serves no streams")
            return await pushing._open(peer_id)

        handing_out = HandingOut(blobs, open_stream, "me")
        assert handing_out.offered("node", offered("its peer")) == offered("its peer")
        assert handing_out.offered("node", offered("me")) == offered("node")
        await until(lambda: shelf.came == [DIGEST])
        assert handing_out.offered("node", offered("me")) == offered("me"), "it has that"
        told = []
        for _ in range(MAX_REFUSALS + 1):
            told.append(handing_out.offered("takes none", offered("me")).holder)
            for _ in range(5):
                await asyncio.sleep(0)
        assert told == ["takes none"] * MAX_REFUSALS + ["me"]
        handing_out.forget("node")
        await pushing.close()

    asyncio.run(scene())
