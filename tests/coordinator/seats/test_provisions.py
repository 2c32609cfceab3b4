"""What a seat must have: payloads of a record that waits for its vote, and what nodes bring to another."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.committee import SEATS, Sealing
from tests.support.records import OFFER
from thinwire.compression.errors import SwarmUnreachable
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.blob_streams import serve_blobs
from thinwire.coordinator.protocol.messages import GenesisBody, digest_of, encode_record
from thinwire.coordinator.protocol.streams import Frame, FrameKind, Meter, Stream
from thinwire.coordinator.quorum.words import Enter, Keep, Keeps, Word
from thinwire.coordinator.seats import fetching
from thinwire.coordinator.seats.disk import StateDisk
from thinwire.coordinator.seats.elsewhere import Shelf as SeatShelf
from thinwire.coordinator.seats.holders import KEPT_ROUNDS
from thinwire.coordinator.seats.link import Link
from thinwire.coordinator.seats.provisions import EARLY, Provisions

NOBODY = cast("Any", None)
"""Who takes what is pushed, where nothing is."""

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
                    await serve_blobs(served, SeatShelf(ledger, theirs, NOBODY, ""), "payload", lambda: True)
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


@pytest.mark.parametrize("stands_still", [False, True])
def test_a_payload_whose_stream_breaks_just_after_it_counted_as_held_is_fetched_once_more(
    tmp_path: Path,
    make_genesis: Callable[..., GenesisBody],
    monkeypatch: pytest.MonkeyPatch,
    stands_still: bool,
) -> None:
    """The leader has sent all of it and proposes; the last bytes are lost, or stand still on their way. The
    slot waits for one more fetch, which begins when the leader asks for the vote again, or when another one
    leads, and for no pause."""
    monkeypatch.setattr(fetching, "RETRY_S", 3600.0)
    payload, sealing = PAYLOADS[0], Sealing(make_genesis().model_copy(update={"coordinator": SEATS[0]}))
    ledger = Ledger.begin(tmp_path / "ledger.db", sealing.genesis_record, sealing.genesis_signature)
    theirs, ours = BlobStore(tmp_path / "theirs"), BlobStore(tmp_path / "ours")
    digest = digest_of(payload)
    theirs.put(digest, payload)
    offer = OFFER.model_copy(update={"peer": 0, "n_bytes": 5000, "payload": None, "digest": digest})
    record = encode_record(sealing.body(offers=(offer,)))
    given: list[bytes] = []
    whole: list[bool] = []

    async def scene() -> None:
        serving: list[asyncio.Task[None]] = []

        async def open_stream(seat: str) -> Stream:
            near, far = socket.socketpair()
            served = Stream(*await asyncio.open_connection(sock=far), Meter())

            async def serve() -> None:
                shelf = SeatShelf(ledger, theirs, NOBODY, "")
                with contextlib.suppress(OSError):
                    await serve_blobs(served, shelf, "payload", lambda: True, given=given.append)
                served.abort()

            serving.append(asyncio.create_task(serve()))
            ours_of_it = Stream(*await asyncio.open_connection(sock=near), Meter())
            if seat == SEATS[0] and len(serving) == 1:
                monkeypatch.setattr(ours_of_it, "receive", _cut_before_the_end(ours_of_it, stands_still))
            return ours_of_it

        leader = SEATS[0]
        provisions = Provisions(
            SEATS[1],
            ledger,
            ours,
            StateDisk(tmp_path, ledger, SEATS[1], is_new=True),
            cast("Any", dict.fromkeys((SEATS[0], SEATS[2]) if stands_still else SEATS[:1])),
            lambda _seat, _word: None,
            open_stream,
            lambda: leader,
            Shelf(),
            lambda _digest: None,
            lambda: whole.append(True),
        )
        provisions.led_by(leader)
        provisions.keep(leader, Keep(digest=digest, n_bytes=5000))
        provisions.proposed(record)
        provisions.waits_for(record)
        async with asyncio.timeout(10):
            while not (given if stands_still else provisions.fetcher.trouble):
                await asyncio.sleep(0.005)
            assert (given, whole, digest in ours) == ([digest], [], False)
            if stands_still:
                leader = SEATS[2]
                provisions.led_by(leader)
            else:
                provisions.proposed(record)
            while not whole:
                await asyncio.sleep(0.005)
        await provisions.fetcher.close()
        await asyncio.gather(*serving)

    asyncio.run(scene())
    ledger.close()
    assert (given, whole, digest in ours) == ([digest] * 2, [True], True)


def _cut_before_the_end(stream: Stream, stands_still: bool) -> Callable[..., Awaitable[Frame]]:
    """Its `receive`, which gets all but the last frame; then the connection breaks, or nothing comes."""
    receive = stream.receive

    async def cut(*args: Any) -> Frame:
        frame = await receive(*args)
        if frame.kind is FrameKind.END:
            if stands_still:
                await asyncio.Event().wait()
            raise ConnectionResetError("the link is gone")
        return frame

    return cut


def provisions_of(
    folder: Path, genesis: GenesisBody, me: int, said: list[tuple[str, Word]]
) -> tuple[Provisions, BlobStore, Sealing]:
    """Of seat `me`, which is connected to one more and gets nothing from it."""
    sealing = Sealing(genesis.model_copy(update={"coordinator": SEATS[0]}))
    ledger = Ledger.begin(folder / "ledger.db", sealing.genesis_record, sealing.genesis_signature)
    blobs, other = BlobStore(folder / "blobs"), SEATS[1 - me]

    async def nowhere(_seat: str) -> Stream:
        raise SwarmUnreachable("nobody is there")

    found = Provisions(
        SEATS[me],
        ledger,
        blobs,
        StateDisk(folder, ledger, SEATS[me], is_new=True),
        cast("Any", {other: None}),
        lambda seat, word: said.append((seat, word)),
        nowhere,
        lambda: SEATS[0],
        Shelf(),
        lambda _digest: None,
        lambda: None,
    )
    return found, blobs, sealing


def test_uploads_are_announced_when_they_begin_a_few_at_a_time(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody]
) -> None:
    """And no more than can be passed on while others wait; one that breaks off is not reminded of."""
    said: list[tuple[str, Word]] = []
    provisions, blobs, sealing = provisions_of(tmp_path, make_genesis(), 0, said)
    uploads = [bytes([i]) * 100 for i in range(EARLY + 2)]
    digests = [digest_of(data) for data in uploads]
    for digest in digests:
        provisions.begins(digest, 100)
    assert said == [(SEATS[1], Keep(digest=digest, n_bytes=100)) for digest in digests[:EARLY]]
    assert [provisions.passes_on(digest) for digest in digests] == [True] * EARLY + [False] * 2
    blobs.put(digests[1], uploads[1])
    provisions.ends(digests[1], is_stored=True)
    provisions.ends(digests[2], is_stored=False)
    assert said[EARLY:] == [(SEATS[1], Keep(digest=digest, n_bytes=100)) for digest in digests[EARLY:]]
    said.clear()
    provisions.remind()
    assert {word.digest for _, word in said if isinstance(word, Keep)} == set(digests) - {digests[2]}
    later = digest_of(b"later")
    provisions.begins(later, 5)
    assert not provisions.passes_on(later)
    provisions.recorded(sealing.body().model_copy(update={"round": KEPT_ROUNDS + 1}))
    assert [provisions.passes_on(digest) for digest in [*digests, later]] == [False] * len(digests) + [True]


def test_who_leads_no_more_announces_no_uploads(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody]
) -> None:
    said: list[tuple[str, Word]] = []
    provisions, _, _ = provisions_of(tmp_path, make_genesis(), 1, said)
    for payload in PAYLOADS:
        provisions.begins(digest_of(payload), 5000)
    provisions.ends(digest_of(PAYLOADS[0]), is_stored=False)
    assert said == []


def test_a_payload_that_is_larger_than_its_node_said_is_announced_again(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody]
) -> None:
    said: list[tuple[str, Word]] = []
    provisions, blobs, _ = provisions_of(tmp_path, make_genesis(), 0, said)
    digest = digest_of(PAYLOADS[0])
    provisions.begins(digest, 1)
    blobs.put(digest, PAYLOADS[0])
    provisions.ends(digest, is_stored=True)
    for _ in range(2):
        provisions.held(digest)
    assert [word for _, word in said] == [Keep(digest=digest, n_bytes=n) for n in (1, 5000)]


def test_what_was_announced_and_never_came_is_not_wanted_for_ever(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody]
) -> None:
    """Else a seat that looks on would say for ever that it lacks a payload."""
    said: list[tuple[str, Word]] = []
    provisions, blobs, sealing = provisions_of(tmp_path, make_genesis(), 1, said)

    async def scene() -> None:
        lost, here = digest_of(PAYLOADS[0]), digest_of(PAYLOADS[1])
        assert provisions.keep(SEATS[0], Keep(digest=lost, n_bytes=5000)) is None
        blobs.put(here, PAYLOADS[1])
        assert provisions.keep(SEATS[0], Keep(digest=here, n_bytes=5000)) is None
        assert said == [(SEATS[0], Keeps(digest=here))]
        body = sealing.body()
        provisions.recorded(body)
        assert provisions.fetcher.wants(lost)
        provisions.recorded(body.model_copy(update={"round": body.round + KEPT_ROUNDS}))
        assert provisions.fetcher.n_wanted == 0
        await provisions.fetcher.close()

    asyncio.run(scene())
