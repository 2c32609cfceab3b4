"""The payloads of a record that waits for a seat's vote: they are fetched, and the last one is told of."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.support.committee import SEATS, Sealing
from tests.support.records import OFFER
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.blob_streams import serve_blobs
from thinwire.coordinator.protocol.messages import GenesisBody, digest_of, encode_record
from thinwire.coordinator.protocol.streams import Meter, Stream
from thinwire.coordinator.quorum.words import Enter, Word
from thinwire.coordinator.seats.disk import StateDisk
from thinwire.coordinator.seats.elsewhere import _Shelf
from thinwire.coordinator.seats.link import Link
from thinwire.coordinator.seats.provisions import Provisions

PAYLOADS = [bytes([i]) * 5000 for i in range(3)]


class Shelf:
    def __init__(self) -> None:
        self.came: list[bytes] = []

    def arrived(self, digest: bytes) -> None:
        self.came.append(digest)

    def missing(self) -> Mapping[bytes, int]:
        return {}

    def has_room(self, n_bytes: int) -> bool:
        return True


def test_the_last_payload_of_a_record_makes_it_whole(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody]
) -> None:
    sealing = Sealing(make_genesis().model_copy(update={"coordinator": SEATS[0]}))
    ledger = Ledger.begin(tmp_path / "ledger.db", sealing.genesis_record, sealing.genesis_signature)
    theirs, ours, shelf = BlobStore(tmp_path / "theirs"), BlobStore(tmp_path / "ours"), Shelf()
    for payload in PAYLOADS:
        theirs.put(digest_of(payload), payload)
    ours.put(digest_of(PAYLOADS[0]), PAYLOADS[0])
    offers = [
        OFFER.model_copy(update={"peer": i, "n_bytes": 5000, "payload": None, "digest": digest_of(payload)})
        for i, payload in enumerate(PAYLOADS)
    ]
    record = encode_record(sealing.body(offers=tuple(offers)))
    said: list[Word] = []
    whole: list[int] = []

    async def scene() -> None:
        serving: list[asyncio.Task[None]] = []

        async def open_stream(_seat: str) -> Stream:
            near, far = socket.socketpair()
            served = Stream(*await asyncio.open_connection(sock=far), Meter())

            async def serve() -> None:
                with contextlib.suppress(OSError, EOFError):
                    await serve_blobs(served, _Shelf(ledger, theirs), "payload", lambda: True)
                served.abort()

            serving.append(asyncio.create_task(serve()))
            return Stream(*await asyncio.open_connection(sock=near), Meter())

        enter = Enter(run_id=sealing.run_id, secret=b"", addresses=(), wants_seat=False, lacks="")
        links = {SEATS[0]: Link(SEATS[0], await open_stream(""), enter, is_ours=True)}
        provisions = Provisions(
            SEATS[1],
            ledger,
            ours,
            StateDisk(tmp_path, ledger, SEATS[1], is_new=True),
            links,
            lambda _seat, word: said.append(word),
            open_stream,
            lambda: SEATS[0],
            shelf,
            lambda _digest: None,
            lambda: whole.append(len(shelf.came)),
        )
        provisions.waits_for(record)
        async with asyncio.timeout(10):
            while len(shelf.came) < 2:
                await asyncio.sleep(0.005)
        provisions.waits_for(record)
        provisions.waits_for(b"no record")
        provisions.waits_for(None)
        await provisions.fetcher.close()
        for link in links.values():
            link.stream.abort()
        await asyncio.gather(*serving)

    asyncio.run(scene())
    ledger.close()
    assert whole == [2], "once, with the last one"
    assert set(shelf.came) == {digest_of(payload) for payload in PAYLOADS[1:]}
