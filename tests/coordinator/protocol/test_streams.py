"""Frames and blob transfers: there and back, every limit, and nothing but named errors for garbage."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.compression.byte_planes import pack
from thinwire.compression.errors import SwarmUnreachable
from thinwire.coordinator.protocol.blob_streams import (
    EARLY_BYTES,
    Base,
    NotServed,
    Referred,
    Sink,
    get_blob,
    put_blob,
    serve_blobs,
)
from thinwire.coordinator.protocol.messages import (
    BadMessage,
    Commit,
    Follow,
    Heartbeat,
    Message,
    NodeState,
    Notice,
    Offer,
    State,
    digest_of,
)
from thinwire.coordinator.protocol.streams import (
    CHUNK_BYTES,
    FROM_COORDINATOR,
    FROM_NODE,
    HEADER,
    BadFrame,
    FrameKind,
    Meter,
    Stream,
)

OFFER = Offer(round=3, n_samples=8, n_tokens=512, loss=2.5, n_bytes=16, payload=b"p" * 16, digest=None)
MESSAGES: list[Message] = [
    OFFER,
    State(state=NodeState.TRAINING),
    Follow(after=7),
    Heartbeat(round=1, sent_bytes=2, received_bytes=3, payload_bytes=4),
    Notice(text="waiting", warning=False),
    Commit(record=b"r" * 300_000, signature=bytes(64)),
]


async def pair() -> tuple[Stream, Stream]:
    """Two ends of a stream, each with a meter of its own."""
    ends = []
    for sock in socket.socketpair():
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        ends.append(Stream(reader, writer, Meter()))
    return ends[0], ends[1]


def over_a_pair(body: Callable[[Stream, Stream], Awaitable[None]]) -> None:
    async def run() -> None:
        a, b = await pair()
        try:
            async with asyncio.timeout(10):
                await body(a, b)
        finally:
            a.abort()
            b.abort()
            await asyncio.sleep(0)

    asyncio.run(run())


def received(data: bytes) -> Stream:
    """A stream on which exactly these bytes came. Only for receiving, inside of a running loop."""
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return Stream(reader, None, Meter())  # type: ignore[arg-type]


async def receive_all(stream: Stream) -> None:
    while True:
        await stream.receive_message(FROM_NODE)


def test_messages_arrive_as_they_were_sent_and_all_bytes_are_counted() -> None:
    async def body(a: Stream, b: Stream) -> None:
        sending = asyncio.create_task(send_all(a))
        assert [await b.receive_message(FROM_COORDINATOR) for _ in MESSAGES] == MESSAGES
        await sending
        a.close()
        with pytest.raises(EOFError):
            await b.receive_message(FROM_COORDINATOR)
        assert a.meter.sent == b.meter.received
        assert a.meter.sent["payload"] == 16
        assert a.meter.sent["ledger"] > 300_000
        assert a.meter.sent["heartbeat"] > 0
        assert a.meter.totals() == (sum(a.meter.sent.values()) - a.meter.sent["heartbeat"], 0)

    async def send_all(a: Stream) -> None:
        for message in MESSAGES:
            await a.send_message(message)

    over_a_pair(body)


@given(st.binary(max_size=300) | st.binary(max_size=60).map(lambda b: HEADER.pack(len(b), 1) + b))
def test_random_bytes_raise_only_named_errors(data: bytes) -> None:
    async def body() -> None:
        stream = received(data)
        with pytest.raises((BadMessage, EOFError)):
            await receive_all(stream)

    asyncio.run(body())


@given(st.data())
def test_mutated_messages_raise_only_named_errors(data: st.DataObject) -> None:
    async def body() -> None:
        frames = bytearray()
        for message in MESSAGES[:5]:
            a, b = await pair()
            await a.send_message(message)
            frames += await b._reader.readexactly(a.meter.totals()[0] + a.meter.sent["heartbeat"])
            a.abort()
            b.abort()
        at = data.draw(st.integers(0, len(frames) - 1))
        frames[at] = data.draw(st.integers(0, 255))
        stream = received(bytes(frames[: data.draw(st.integers(0, len(frames)))]))
        with pytest.raises((BadMessage, EOFError)):
            await receive_all(stream)

    asyncio.run(body())


def test_a_length_over_the_limit_is_refused_before_its_body_comes() -> None:
    async def body() -> None:
        reader = asyncio.StreamReader()
        stream = Stream(reader, None, Meter())  # type: ignore[arg-type]
        reader.feed_data(HEADER.pack(2**32 - 1, FrameKind.MESSAGE))  # and nothing after it
        async with asyncio.timeout(1):
            with pytest.raises(BadFrame, match="at most") as caught:
                await stream.receive_message(FROM_NODE)
        assert caught.value.reason == "frame_size"

    asyncio.run(body())


@pytest.mark.parametrize("code", [0, 2, 11, 12, 255])
def test_a_kind_that_is_not_expected_is_refused(code: int) -> None:
    async def body() -> None:
        with pytest.raises(BadFrame) as caught:
            await received(HEADER.pack(0, code)).receive_message(FROM_NODE)
        assert caught.value.reason == "frame_kind"

    asyncio.run(body())


def test_a_frame_that_is_cut_is_not_an_orderly_end() -> None:
    async def body() -> None:
        for n in range(1, 9):
            with pytest.raises(BadFrame) as caught:
                await received((HEADER.pack(4, 1) + b"abcd")[:n]).receive_message(FROM_NODE)
            assert caught.value.reason == "frame_cut"

    asyncio.run(body())


# ---------------------------------------------------------------------------------------------------- blobs


class Memory:
    """A shelf and its sinks."""

    def __init__(self, *blobs: bytes) -> None:
        self.blobs = {digest_of(blob): blob for blob in blobs}
        self.uploads: list[bytes] = []
        self.aborted = 0
        self.refuses = ""

    def open(self, digest: bytes) -> tuple[BinaryIO, int]:
        return BytesIO(self.blobs[digest]), len(self.blobs[digest])

    def sink(self, digest: bytes, n_bytes: int) -> Sink | None:
        if self.refuses:
            raise BadMessage(self.refuses)
        return None if digest in self.blobs else MemorySink(self, digest)

    def stored(self, digest: bytes) -> None:
        self.uploads.append(digest)


class MemorySink:
    is_quick = True

    def __init__(self, shelf: Memory, digest: bytes) -> None:
        self._shelf, self._digest, self._data = shelf, digest, b""

    def write(self, chunk: bytes) -> None:
        self._data += chunk

    def sync(self) -> None:
        if digest_of(self._data) != self._digest:
            raise BadMessage("its bytes do not fit its digest")

    def finish(self) -> int:
        self._shelf.blobs[self._digest] = self._data
        return len(self._data)

    def abort(self) -> None:
        self._shelf.aborted += 1


def served(
    shelf: Memory,
    body: Callable[[Stream], Awaitable[None]],
    allowed: Callable[[], bool] = lambda: True,
    elsewhere: Callable[[bytes], str | None] = lambda _digest: None,
) -> Exception | None:
    """Runs a client against a server of the shelf; returns how the server ended."""
    ended: list[Exception | None] = []

    async def both(client: Stream, server: Stream) -> None:
        async def serve() -> None:
            try:
                await serve_blobs(server, shelf, "payload", allowed, elsewhere=elsewhere)
                ended.append(None)
            except (BadMessage, EOFError, OSError) as e:
                ended.append(e)
                server.abort()

        task = asyncio.create_task(serve())
        await body(client)
        client.close()
        await task

    over_a_pair(both)
    return ended[0]


SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES + 7]


def test_one_stream_serves_many_requests() -> None:
    blobs = [bytes([n % 251]) * size for n, size in enumerate(SIZES)]
    shelf = Memory(*blobs[:3])

    async def body(client: Stream) -> None:
        for blob in blobs:
            await put_blob(client, digest_of(blob), blob, "payload")
            assert await get_blob(client, digest_of(blob), len(blob), "payload") == blob
        with pytest.raises(NotServed, match="is not here"):
            await get_blob(client, digest_of(b"absent"), 10, "payload")
        assert await get_blob(client, digest_of(blobs[1]), 1, "payload") == blobs[1]
        sent = sum(len(blob) for blob in blobs)  # of which some were there already
        assert sent <= client.meter.sent["payload"] <= sent + 5 * (sent // CHUNK_BYTES + 3)
        assert client.meter.sent["control"] < 120 * len(blobs) + 100

    assert served(shelf, body) is None
    assert shelf.uploads == [digest_of(blob) for blob in blobs]


def test_who_has_a_blob_may_name_another_one_to_who_takes_that_for_an_answer() -> None:
    there, busy = b"there" * 1000, b"busy" * 1000
    shelf = Memory(there, busy)

    async def body(client: Stream) -> None:
        with pytest.raises(Referred) as e:
            await get_blob(client, digest_of(busy), len(busy), "payload", referred=True)
        assert e.value.holder == "somebody"
        assert await get_blob(client, digest_of(busy), len(busy), "payload") == busy
        assert await get_blob(client, digest_of(there), len(there), "payload", referred=True) == there

    assert served(shelf, body, elsewhere={digest_of(busy): "somebody"}.get) is None


def test_builds_that_name_nobody_send_what_they_have() -> None:
    """They take every wish for one to have fewer bytes."""
    blob = b"old" * 1000

    async def old(server: Stream) -> None:
        wish = (await server.receive({FrameKind.GET: 65})).body[32:]
        assert wish[0] & 1
        packed = pack(blob, None)
        await server.send(FrameKind.SIZE, struct.pack(">Q", len(blob)) + b"\1")
        await server.send(FrameKind.CHUNK, struct.pack(">I", len(packed)) + packed)
        await server.send(FrameKind.END, digest_of(blob))

    async def both(client: Stream, server: Stream) -> None:
        _, got = await asyncio.gather(
            old(server), get_blob(client, digest_of(blob), len(blob), "payload", referred=True)
        )
        assert got == blob

    over_a_pair(both)


def test_an_upload_that_comes_in_one_piece_is_answered_once() -> None:
    async def body(client: Stream) -> None:
        await put_blob(client, digest_of(b"abc"), b"abc", "payload")
        assert client.meter.received["control"] == HEADER.size  # DONE
        await put_blob(client, digest_of(b"defg"), b"defg", "payload", n_early=0)
        assert client.meter.received["control"] == 3 * HEADER.size  # GO, DONE

    shelf = Memory()
    assert served(shelf, body) is None
    assert sorted(shelf.blobs.values()) == [b"abc", b"defg"]


def test_an_upload_that_is_refused_leaves_the_stream_usable() -> None:
    shelf = Memory(b"there")
    shelf.refuses = "too large"

    async def body(client: Stream) -> None:
        with pytest.raises(NotServed, match="too large"):
            await put_blob(client, digest_of(b"x"), b"x", "payload")
        assert await get_blob(client, digest_of(b"there"), 5, "payload") == b"there"

    assert served(shelf, body) is None


@pytest.mark.parametrize("refuses", ["", "too large"])
@pytest.mark.parametrize("n_early", [0, EARLY_BYTES])
def test_what_is_sent_of_an_upload_that_is_not_wanted_is_dropped(refuses: str, n_early: int) -> None:
    blob, other = b"b" * (EARLY_BYTES + 3 * CHUNK_BYTES), b"other"
    shelf = Memory(blob, other)

    async def body(client: Stream) -> None:
        for _ in range(2):
            shelf.refuses = refuses
            with pytest.raises(NotServed) if refuses else contextlib.nullcontext():
                await put_blob(client, digest_of(blob), blob, "payload", n_early=n_early)
            shelf.refuses = ""
            await put_blob(client, digest_of(b"new"), b"new", "payload", n_early=n_early)
            assert await get_blob(client, digest_of(other), 5, "payload") == other
        most = 2 * (n_early + CHUNK_BYTES) if n_early else 2 * len(b"new") + 10
        assert client.meter.sent["payload"] <= most

    assert served(shelf, body) is None
    assert shelf.aborted == 0


def test_more_of_an_upload_that_is_not_wanted_ends_its_stream() -> None:
    async def body(client: Stream) -> None:
        await client.send(FrameKind.PUT, digest_of(b"there") + struct.pack(">Q", 2**30))
        with contextlib.suppress(OSError):
            for _ in range(EARLY_BYTES // CHUNK_BYTES + 2):
                await client.send(FrameKind.CHUNK, b"b" * CHUNK_BYTES)
            await client.ended(10)

    ended = served(Memory(b"there"), body)
    assert isinstance(ended, BadFrame)
    assert ended.reason == "blob"


def test_a_stranger_is_told_and_counted() -> None:
    async def body(client: Stream) -> None:
        with pytest.raises(NotServed, match="only members"):
            await get_blob(client, digest_of(b"there"), 5, "payload")

    ended = served(Memory(b"there"), body, allowed=lambda: False)
    assert isinstance(ended, BadFrame)
    assert ended.reason == "stranger"


def test_an_upload_with_other_bytes_is_refused() -> None:
    shelf = Memory()

    async def body(client: Stream) -> None:
        with pytest.raises(NotServed, match="digest"):
            await put_blob(client, digest_of(b"right"), b"wrong", "payload")

    ended = served(shelf, body)
    assert isinstance(ended, BadFrame)
    assert (shelf.blobs, shelf.uploads, shelf.aborted) == ({}, [], 1)


@pytest.mark.parametrize("n_chunks", [0, 1, 2])
def test_an_upload_that_is_cut_is_not_stored(n_chunks: int) -> None:
    blob = b"b" * 3 * CHUNK_BYTES
    shelf = Memory()

    async def body(client: Stream) -> None:
        await client.send(FrameKind.PUT, digest_of(blob) + struct.pack(">Q", len(blob)))
        await client.receive({FrameKind.GO: 0})
        for _ in range(n_chunks):
            await client.send(FrameKind.CHUNK, b"b" * CHUNK_BYTES)

    assert isinstance(served(shelf, body), EOFError)
    assert (shelf.blobs, shelf.aborted) == ({}, 1)


def test_an_upload_of_more_than_was_announced_is_refused() -> None:
    shelf = Memory()

    async def body(client: Stream) -> None:
        await client.send(FrameKind.PUT, digest_of(b"abc") + struct.pack(">Q", 2))
        await client.receive({FrameKind.GO: 0})
        await client.send(FrameKind.CHUNK, b"abc")
        await client.receive({FrameKind.NO: 2000})

    assert isinstance(served(shelf, body), BadFrame)
    assert (shelf.blobs, shelf.aborted) == ({}, 1)


def test_a_blob_larger_than_expected_is_not_downloaded() -> None:
    async def body(client: Stream) -> None:
        with pytest.raises(BadFrame, match="at most 4"):
            await get_blob(client, digest_of(b"large"), 4, "payload")

    served(Memory(b"large"), body)


_BLOB = bytes(range(256)) * 3
_ANSWER = (
    HEADER.pack(8, FrameKind.SIZE) + struct.pack(">Q", len(_BLOB))
    + HEADER.pack(len(_BLOB), FrameKind.CHUNK) + _BLOB
    + HEADER.pack(32, FrameKind.END) + digest_of(_BLOB)
)  # fmt: skip


@given(st.integers(0, len(_ANSWER)), st.integers(0, len(_ANSWER) - 1), st.integers(1, 255))
def test_a_damaged_download_never_gives_other_bytes(cut: int, at: int, flip: int) -> None:
    damaged = bytearray(_ANSWER)
    damaged[at] ^= flip

    async def body(client: Stream, server: Stream) -> None:
        server._writer.write(bytes(damaged[:cut]))
        server._writer.write_eof()
        with pytest.raises((BadMessage, EOFError, SwarmUnreachable)):
            await get_blob(client, digest_of(_BLOB), 2**20, "payload")

    over_a_pair(body)


def test_weights_come_in_fewer_bytes_and_neighbours_in_fewer_still() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0, 0.02, 700_000)
    before, after = ((values + x).astype(np.float32).view(np.uint16)[1::2].tobytes() for x in (0.0, 1e-6))
    shelf = Memory(before, after, b"")
    base = Base(digest_of(before), before)

    async def body(client: Stream) -> None:
        async def wire_bytes(blob: bytes, **options: Any) -> int:
            had = client.meter.received["snapshot"]
            assert await get_blob(client, digest_of(blob), len(blob), "snapshot", **options) == blob
            return client.meter.received["snapshot"] - had

        plain = await wire_bytes(after)
        assert plain >= len(after)
        assert await wire_bytes(after, packed=True) < 0.72 * plain
        assert await wire_bytes(after, packed=True, base=base) < 0.15 * plain
        # What the other end does not have, or what is of another size, is no base.
        assert await wire_bytes(after, packed=True, base=Base(digest_of(b"?"), after)) < 0.72 * plain
        assert await wire_bytes(before, packed=True, base=Base(digest_of(b""), b"")) < 0.72 * plain
        assert await wire_bytes(b"", packed=True) < 100

    assert served(shelf, body) is None


_PACKED = pack(_BLOB)
_PACKED_ANSWER = (
    HEADER.pack(9, FrameKind.SIZE) + struct.pack(">QB", len(_BLOB), 1)
    + HEADER.pack(4 + len(_PACKED), FrameKind.CHUNK) + struct.pack(">I", len(_PACKED)) + _PACKED
    + HEADER.pack(32, FrameKind.END) + digest_of(_BLOB)
)  # fmt: skip


@given(st.integers(0, len(_PACKED_ANSWER)), st.integers(0, len(_PACKED_ANSWER) - 1), st.integers(1, 255))
def test_a_damaged_packed_download_never_gives_other_bytes(cut: int, at: int, flip: int) -> None:
    damaged = bytearray(_PACKED_ANSWER)
    damaged[at] ^= flip

    async def body(client: Stream, server: Stream) -> None:
        server._writer.write(bytes(damaged[:cut]))
        server._writer.write_eof()
        with contextlib.suppress(BadMessage, EOFError, SwarmUnreachable):
            # What a damaged length of zlib's leaves alone is not damaged.
            assert await get_blob(client, digest_of(_BLOB), 2**20, "snapshot", packed=True) == _BLOB

    over_a_pair(body)


@pytest.mark.parametrize(
    ("flags", "body"),
    [
        (1, struct.pack(">I", 2**31)),
        (1, struct.pack(">I", len(_PACKED)) + _PACKED + b"more"),
        (3, struct.pack(">I", len(_PACKED)) + _PACKED),
        (9, struct.pack(">I", len(_PACKED)) + _PACKED),
    ],
)
def test_packed_bytes_that_nobody_can_have_meant_are_refused(flags: int, body: bytes) -> None:
    answer = (
        HEADER.pack(9, FrameKind.SIZE) + struct.pack(">QB", len(_BLOB), flags)
        + HEADER.pack(len(body), FrameKind.CHUNK) + body + HEADER.pack(32, FrameKind.END) + digest_of(_BLOB)
    )  # fmt: skip

    async def both(client: Stream, server: Stream) -> None:
        server._writer.write(answer)
        with pytest.raises(BadFrame):
            await get_blob(client, digest_of(_BLOB), 2**20, "snapshot", packed=True)

    over_a_pair(both)


def test_the_undamaged_download() -> None:
    async def body(client: Stream, server: Stream) -> None:
        server._writer.write(_ANSWER)
        assert await get_blob(client, digest_of(_BLOB), 2**20, "payload") == _BLOB

    over_a_pair(body)
