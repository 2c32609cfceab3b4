"""The limit of what a node sends: over any ten seconds, by urgency, without waste. Time is the loop's own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.skipping_loop import SkippingLoop
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.messages import Heartbeat
from thinwire.coordinator.protocol.streams import CHUNK_BYTES, FROM_NODE, FrameKind, Meter, Stream
from thinwire.node.links.upload_limit import BURST_S, LEAST_BYTES_PER_S, WINDOW_S, UploadLimit, parse_rate


def run(body: Callable[[Callable[[], float]], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(body(runner.get_loop().time))


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("20kB/s", 20_000),
        ("1.5MB/s", 1_500_000),
        ("8Mbit/s", 1_000_000),
        ("512KiB/s", 512 * 1024),
        ("2000 B/s", 2000),
        ("1 GB/s", 1e9),
    ],
)
def test_rates_are_read(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["", "20", "20k", "kB/s", "-1kB/s", "20kb/s", "10B/s", "1e3kB/s", "nan kB/s"]
)
def test_what_is_no_rate_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-upload .*(20kB/s|B/s for bytes|at least 1kB/s)"):
        parse_rate(text)


Wish = tuple[float, int, int]
"""When, how much of a piece (in thousandths), how urgent."""


@given(
    st.floats(LEAST_BYTES_PER_S, 1e8),
    st.lists(st.tuples(st.floats(0, 5), st.integers(0, 1000), st.integers(0, 2)), max_size=80),
)
@settings(max_examples=60)
def test_no_ten_seconds_have_more_than_the_limit(rate: float, wishes: list[Wish]) -> None:
    written: list[tuple[float, float]] = []

    async def body(time: Callable[[], float]) -> None:
        limit = UploadLimit(rate, time)
        assert limit.piece_bytes > 0

        async def send(wait_s: float, n_bytes: int, urgency: int) -> None:
            await asyncio.sleep(wait_s)
            await limit.take(n_bytes, urgency)
            written.append((time(), n_bytes))

        at_s, tasks = 0.0, []
        for gap_s, thousandths, urgency in wishes:
            at_s += gap_s if gap_s > 4 else 0.0  # in bursts
            n_bytes = limit.piece_bytes * thousandths // 1000
            tasks.append(asyncio.create_task(send(at_s, n_bytes, urgency)))
        await asyncio.gather(*tasks)
        assert limit.used_ratio() <= 1.0

    run(body)
    assert len(written) == len(wishes)
    for start_s, _ in written:
        in_window = sum(n for at_s, n in written if start_s <= at_s < start_s + WINDOW_S)
        assert in_window <= rate * WINDOW_S


def test_a_busy_line_is_used() -> None:
    async def body(time: Callable[[], float]) -> None:
        limit = UploadLimit(1e6, time)
        for _ in range(200):
            await limit.take(limit.piece_bytes // 4, 1)
        used = 200 * (limit.piece_bytes // 4) / (time() + BURST_S)
        assert used > 0.85e6
        assert 0.9 < limit.used_ratio() <= 1.0

    run(body)


def test_what_is_urgent_goes_first() -> None:
    order: list[str] = []

    async def body(time: Callable[[], float]) -> None:
        limit = UploadLimit(20_000, time)

        async def send(name: str, urgency: int) -> None:
            await limit.take(limit.piece_bytes, urgency)
            order.append(name)

        names = [("served", 2), ("served", 2), ("own", 1), ("own", 1), ("said", 0)]
        first = asyncio.create_task(send("first", 2))
        await asyncio.sleep(0)
        await asyncio.gather(first, *(send(*entry) for entry in names))

    run(body)
    assert order == ["first", "said", "own", "own", "served", "served"]


def test_who_sends_something_here_is_answered_before_own_payloads_go_on() -> None:
    async def body(time: Callable[[], float]) -> None:
        limit = UploadLimit(20_000, time)
        own = [asyncio.create_task(limit.own.take(limit.piece_bytes, answers=False)) for _ in range(2)]
        near, far = [
            Stream(*await asyncio.open_unix_connection(sock=sock), Meter(), limit.served)
            for sock in socket.socketpair()
        ]
        await near.send(FrameKind.DONE)
        assert [task.done() for task in own] == [True, False]
        await far.send(FrameKind.NO)
        assert all(task.done() for task in own), "what asks for something of this node's waits"
        near.abort()
        far.abort()
        await asyncio.sleep(0)

    run(body)


def test_who_is_cancelled_holds_nobody_up() -> None:
    async def body(time: Callable[[], float]) -> None:
        limit = UploadLimit(20_000, time)
        await limit.take(limit.piece_bytes, 0)
        ahead = asyncio.create_task(limit.take(limit.piece_bytes, 0))
        behind = asyncio.create_task(limit.take(100, 2))
        await asyncio.sleep(0)
        ahead.cancel()
        await behind
        assert ahead.cancelled()
        assert time() < 0.1, "what the other one would have taken is not taken"

    run(body)


def test_a_throttled_stream_sends_the_same_bytes_in_small_frames() -> None:
    async def body(time: Callable[[], float]) -> None:
        limit = UploadLimit(20_000, time)
        ends = []
        for sock, throttle in zip(socket.socketpair(), (limit.own, None), strict=True):
            ends.append(Stream(*await asyncio.open_unix_connection(sock=sock), Meter(), throttle))
        near, far = ends
        assert near.chunk_bytes < 10_000
        assert far.chunk_bytes == CHUNK_BYTES
        beat = Heartbeat(round=1, sent_bytes=2, received_bytes=3, payload_bytes=4)
        receiving = asyncio.create_task(far.receive({FrameKind.CHUNK: CHUNK_BYTES}, "payload"))
        await near.send(FrameKind.CHUNK, bytes(range(256)) * 256, "payload")
        assert (await receiving).body == bytes(range(256)) * 256
        await near.send_message(beat)
        assert await far.receive_message(FROM_NODE) == beat
        assert 2.5 < time() < 4.5
        assert near.meter.sent == far.meter.received
        near.abort()
        far.abort()
        await asyncio.sleep(0)

    run(body)


def test_acknowledgements_are_paid_for_but_stop_nothing_for_long() -> None:
    async def body(time: Callable[[], float]) -> None:
        limit = UploadLimit(20_000, time)
        limit.received(400_000)
        assert limit.used_ratio() == pytest.approx(0.05)
        await limit.take(100, 0)
        assert 0 < time() < 0.05
        limit.received(10**12)
        began_s = time()
        await limit.take(100, 0)
        assert time() - began_s < 2 * BURST_S

    run(body)
