"""What a coordinator keeps of its run's end, fetched over streams from peers that may lie or go."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.service_world import World, offer
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.last_snapshot import CHUNK_BYTES, LastSnapshot, Wanted, chunks_of, leaves_room
from thinwire.coordinator.protocol import streams
from thinwire.coordinator.protocol.attested import Attested
from thinwire.coordinator.protocol.blob_streams import serve_blobs
from thinwire.coordinator.protocol.messages import BadMessage, GenesisBody, digest_of, encode_record
from thinwire.node.snapshots.format import CHUNK_BYTES as WRITTEN_BYTES
from thinwire.node.snapshots.format import VERSION, Manifest

CHUNKS = [b"1" * CHUNK_BYTES, b"2" * 1000]
MANIFEST = encode_record(
    Manifest(
        version=VERSION,
        run_id=bytes(32),
        round=50,
        commit=bytes(32),
        fingerprint=bytes(8),
        n_bytes=CHUNK_BYTES + 1000,
        chunks=tuple(digest_of(chunk) for chunk in CHUNKS),
    )
)
SNAPSHOT = Attested(50, digest_of(MANIFEST), len(MANIFEST) + CHUNK_BYTES + 1000, (0, 1))


class Peer:
    """Serves blobs, or other bytes than those that were asked for."""

    def __init__(self, *blobs: bytes, lies: bool = False) -> None:
        self.blobs, self.lies = {digest_of(blob): blob for blob in blobs}, lies
        self.n_asked = 0

    def open(self, digest: bytes) -> tuple[BinaryIO, int]:
        self.n_asked += 1
        data = b"lie" if self.lies else self.blobs[digest]
        return BytesIO(data), len(data)

    def sink(self, digest: bytes, n_bytes: int) -> None:
        raise BadMessage("nothing is stored here")

    def stored(self, digest: bytes) -> None: ...


async def _stream(peer: Peer, serving: list[asyncio.Task[None]]) -> streams.Stream:
    ours, theirs = socket.socketpair()
    served = streams.Stream(*await asyncio.open_connection(sock=theirs), streams.Meter())

    async def serve() -> None:
        with contextlib.suppress(OSError, EOFError):
            await serve_blobs(served, peer, "snapshot", lambda: True)
        served.abort()

    serving.append(asyncio.create_task(serve()))
    return streams.Stream(*await asyncio.open_connection(sock=ours), streams.Meter())


def _fetched(store: BlobStore, *peers: Peer, quota_bytes: int = 10**9) -> tuple[bool, bool]:
    """Whether it was fetched, and whether all of it is there."""

    async def run() -> tuple[bool, bool]:
        serving: list[asyncio.Task[None]] = []

        async def open_stream(name: str) -> streams.Stream:
            return await _stream(peers[int(name)], serving)

        last = LastSnapshot(
            store, lambda: None, open_stream, lambda n_bytes: store.n_bytes + n_bytes <= quota_bytes
        )
        names = tuple(str(i) for i in range(len(peers)))
        done = await last.fetch(Wanted(SNAPSHOT, names))
        await asyncio.gather(*serving)
        await asyncio.sleep(0.01)
        return done, last.has(SNAPSHOT)

    return asyncio.run(run())


def test_it_is_fetched_from_whoever_gives_it(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    gone, liar = Peer(MANIFEST), Peer(MANIFEST, lies=True)
    honest = Peer(MANIFEST, *CHUNKS)
    assert _fetched(store, liar, gone) == (False, False)
    assert _fetched(store, liar, gone, honest) == (True, True)
    assert [store.read(digest_of(chunk)) for chunk in CHUNKS] == CHUNKS
    assert _fetched(BlobStore(tmp_path), Peer(MANIFEST)) == (True, True), "what is here is not asked for"


def test_a_full_quota_keeps_nothing(tmp_path: Path) -> None:
    peer = Peer(MANIFEST, *CHUNKS)
    assert _fetched(BlobStore(tmp_path), peer, quota_bytes=CHUNK_BYTES) == (False, False)
    assert peer.n_asked == 0


@pytest.mark.parametrize(
    "manifest",
    [b"", b"\xc1", msgpack.packb([1, 2]), msgpack.packb([0] * 7), msgpack.packb([0] * 6 + [[b"short"]])],
)
def test_what_is_no_manifest(manifest: bytes) -> None:
    with pytest.raises(BadMessage, match="manifest"):
        chunks_of(manifest, 100)
    assert list(chunks_of(MANIFEST, SNAPSHOT.n_bytes)) == [digest_of(chunk) for chunk in CHUNKS]
    with pytest.raises(BadMessage, match="something else"):
        chunks_of(MANIFEST, 1000)
    assert CHUNK_BYTES == WRITTEN_BYTES


def test_when_it_is_wanted(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey
) -> None:
    world = World(tmp_path, make_genesis(rounds=12, snapshot_every=4), key)
    world.train("a", "b")
    found = {}
    for round_ in range(1, 13):
        for peer in ("a", "b"):
            world.say(peer, offer(round_))
        if round_ % 4 == 0:
            world.snapshot(round_, "a", "b")
        wanted = world.service.last_snapshot()
        found[round_] = None if wanted is None else (wanted.snapshot.round, wanted.holders)
    # That of round 4 may be followed by one of round 8; the reports on round 12 come too late for a record.
    assert found == dict.fromkeys(range(1, 9), None) | dict.fromkeys(range(9, 13), (8, ("a", "b")))
    assert world.service.is_over
    world.ledger.close()


def test_half_of_the_disk_stays_for_the_ledger() -> None:
    assert leaves_room(50, 100)
    assert not leaves_room(51, 100)
    assert leaves_room(2**40, None)
