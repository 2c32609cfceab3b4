"""What a seat fetches from others: while it still comes to them, and without turning in circles meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import BinaryIO

from thinwire.compression.errors import SwarmUnreachable
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.protocol.blob_streams import Sink, serve_blobs
from thinwire.coordinator.protocol.messages import BadMessage, digest_of
from thinwire.coordinator.protocol.streams import Meter, Stream
from thinwire.coordinator.seats.fetching import AT_ONCE, BESIDE, Fetcher
from thinwire.coordinator.serving.passing_on import PassedOn

PAYLOAD = bytes(range(256)) * 1000
HALF = len(PAYLOAD) // 2
DIGEST = digest_of(PAYLOAD)


class Shelf:
    """What is in a store, and no more."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    def open(self, digest: bytes) -> tuple[BinaryIO, int]:
        return self._blobs.open(digest), self._blobs.size(digest) or 0

    def sink(self, digest: bytes, n_bytes: int) -> Sink | None:
        raise BadMessage("nothing is stored here")

    def stored(self, digest: bytes) -> None:
        raise AssertionError("nothing is ever stored here")


class Pair:
    """A seat that fetches from another one, which nodes upload to. `n_asked`: how often it looked for a
    source."""

    def __init__(self, folder: Path) -> None:
        self.theirs, self.ours = BlobStore(folder / "theirs"), BlobStore(folder / "ours")
        self.next = BlobStore(folder / "next")
        self.came: list[bytes] = []
        self.n_asked, self.goes_on = 0, True
        self.fetcher = Fetcher(self.ours, self._open, self._sources, self.came.append)
        self._serving: list[asyncio.Task[None]] = []

    def _sources(self) -> list[str]:
        self.n_asked += 1
        return ["leader", "next leader"]

    async def _open(self, seat: str) -> Stream:
        blobs = self.theirs if seat == "leader" else self.next
        near, far = socket.socketpair()
        stream = Stream(*await asyncio.open_connection(sock=far), Meter())
        self._serving.append(asyncio.create_task(self._serve(stream, blobs)))
        return Stream(*await asyncio.open_connection(sock=near), Meter())

    async def _serve(self, stream: Stream, blobs: BlobStore) -> None:
        def coming(digest: bytes) -> PassedOn | None:
            writer = blobs.coming(digest)
            return None if writer is None else PassedOn(writer, lambda: self.goes_on)

        with contextlib.suppress(OSError, EOFError, SwarmUnreachable):
            await serve_blobs(stream, Shelf(blobs), "payload", lambda: True, coming=coming)
        stream.abort()

    async def close(self) -> None:
        await self.fetcher.close()
        await asyncio.gather(*self._serving)


def played(folder: Path, scene: Callable[[Pair], Awaitable[None]]) -> None:
    async def play() -> None:
        pair = Pair(folder)
        async with asyncio.timeout(10):
            await scene(pair)
        await pair.close()

    asyncio.run(play())


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.002)


def n_coming(pair: Pair) -> int:
    writer = pair.ours.coming(DIGEST)
    return 0 if writer is None else writer.n_bytes


def test_a_payload_is_here_before_its_upload_has_ended_there(tmp_path: Path) -> None:
    async def scene(pair: Pair) -> None:
        upload = pair.theirs.writer(DIGEST, len(PAYLOAD))
        upload.write(PAYLOAD[:HALF])
        pair.fetcher.want(DIGEST, len(PAYLOAD))
        await until(lambda: n_coming(pair) == HALF)
        upload.write(PAYLOAD[HALF:])
        await until(lambda: pair.came == [DIGEST])
        assert DIGEST not in pair.theirs
        upload.finish()
        assert pair.ours.read(DIGEST) == pair.theirs.read(DIGEST) == PAYLOAD
        assert not upload.watchers

    played(tmp_path, scene)


def test_an_upload_that_breaks_off_leaves_nothing_and_may_come_again(tmp_path: Path) -> None:
    async def scene(pair: Pair) -> None:
        upload = pair.theirs.writer(DIGEST, len(PAYLOAD))
        upload.write(PAYLOAD[:HALF])
        pair.fetcher.want(DIGEST, len(PAYLOAD))
        await until(lambda: n_coming(pair) == HALF)
        upload.abort()
        await until(lambda: pair.ours.coming(DIGEST) is None)
        assert (pair.came, list((tmp_path / "ours").iterdir())) == ([], [])
        pair.theirs.put(DIGEST, PAYLOAD)
        pair.fetcher.want(DIGEST, len(PAYLOAD))
        await until(lambda: pair.came == [DIGEST])

    played(tmp_path, scene)


def test_a_payload_that_stands_still_at_who_led_before_comes_from_who_leads_now(tmp_path: Path) -> None:
    async def scene(pair: Pair) -> None:
        upload = pair.theirs.writer(DIGEST, len(PAYLOAD))
        upload.write(PAYLOAD[:HALF])
        pair.fetcher.want(DIGEST, len(PAYLOAD))
        await until(lambda: n_coming(pair) == HALF)
        pair.next.put(DIGEST, PAYLOAD)
        pair.fetcher.leave("next leader")
        await asyncio.sleep(0.05)
        assert n_coming(pair) == HALF, "nothing comes from there"
        pair.fetcher.leave("leader")
        await until(lambda: pair.came == [DIGEST])
        assert [path.suffix for path in (tmp_path / "ours").iterdir()] == [""]
        upload.abort()

    played(tmp_path, scene)


def test_an_upload_that_stands_still_is_not_waited_for_once_another_has_brought_it(tmp_path: Path) -> None:
    """As of a node whose connection was lost, and which has come back."""

    async def scene(pair: Pair) -> None:
        stalled = pair.theirs.writer(DIGEST, len(PAYLOAD))
        stalled.write(PAYLOAD[:HALF])
        pair.fetcher.want(DIGEST, len(PAYLOAD))
        await until(lambda: n_coming(pair) == HALF)
        pair.theirs.put(DIGEST, PAYLOAD)
        await until(lambda: pair.came == [DIGEST])
        stalled.abort()
        assert pair.ours.read(DIGEST) == pair.theirs.read(DIGEST) == PAYLOAD
        assert not stalled.watchers

    played(tmp_path, scene)


def test_an_upload_that_takes_too_long_is_passed_on_no_more_with_its_next_bytes(tmp_path: Path) -> None:
    async def scene(pair: Pair) -> None:
        upload = pair.theirs.writer(DIGEST, len(PAYLOAD))
        upload.write(PAYLOAD[:HALF])
        pair.fetcher.want(DIGEST, len(PAYLOAD))
        await until(lambda: n_coming(pair) == HALF)
        pair.goes_on = False
        upload.write(PAYLOAD[HALF : HALF + 1])
        await until(lambda: pair.ours.coming(DIGEST) is None and not upload.watchers)
        upload.abort()

    played(tmp_path, scene)


def test_a_size_that_was_untrue_at_first_does_not_keep_a_payload_out(tmp_path: Path) -> None:
    async def scene(pair: Pair) -> None:
        pair.theirs.put(DIGEST, PAYLOAD)
        pair.fetcher.want(DIGEST, 1)
        await until(lambda: bool(pair.fetcher.trouble))
        pair.fetcher.want(DIGEST, len(PAYLOAD))
        await until(lambda: pair.came == [DIGEST])

    played(tmp_path, scene)


def test_who_says_that_it_has_a_payload_is_asked_for_it_first(tmp_path: Path) -> None:
    """Whoever this seat believes to lead: it may not have heard yet that another one does."""

    async def scene(pair: Pair) -> None:
        upload = pair.theirs.writer(DIGEST, len(PAYLOAD))
        pair.fetcher.want(DIGEST, len(PAYLOAD))
        await until(lambda: pair.ours.coming(DIGEST) is not None)
        pair.next.put(DIGEST, PAYLOAD)
        pair.fetcher.want(DIGEST, len(PAYLOAD), "next leader")
        await until(lambda: pair.came == [DIGEST])
        upload.abort()

    played(tmp_path, scene)


def test_what_stands_still_at_another_seat_does_not_hold_up_what_the_leader_has(tmp_path: Path) -> None:
    async def scene(pair: Pair) -> None:
        old = [bytes([i]) * 100 for i in range(AT_ONCE)]
        uploads = [pair.next.writer(digest_of(data), len(data)) for data in old]
        for data in old:
            pair.fetcher.want(digest_of(data), len(data))
        await until(lambda: sum(pair.ours.coming(digest_of(data)) is not None for data in old) == BESIDE)
        pair.theirs.put(DIGEST, PAYLOAD)
        pair.fetcher.want(DIGEST, len(PAYLOAD))
        await until(lambda: pair.came == [DIGEST])
        for upload in uploads:
            upload.abort()

    played(tmp_path, scene)


def test_workers_without_work_do_not_wake_each_other(tmp_path: Path) -> None:
    async def scene(pair: Pair) -> None:
        upload = pair.theirs.writer(DIGEST, len(PAYLOAD))
        pair.fetcher.want(DIGEST, len(PAYLOAD))
        await until(lambda: pair.ours.coming(DIGEST) is not None)
        pair.n_asked = 0
        pair.fetcher.look_again()
        for _ in range(1000):
            await asyncio.sleep(0)
        assert pair.n_asked < 20, "each looks once"
        upload.abort()

    played(tmp_path, scene)
