"""Nodes' metrics, asked for over their sessions: that is the way that works for a node behind a NAT.

However often somebody scrapes, a node is asked once at a time and once a second at most, and what it says is
bounded: an answer is a few kilobytes that count as control traffic, and towards the node's upload limit.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from thinwire.compression.errors import SwarmUnreachable
from thinwire.coordinator.messages import MAX_METRICS_BYTES, AskMetrics, Message, Metrics
from thinwire.coordinator.streams import BadFrame

ANSWER_TIMEOUT_S: Final = 5.0
"""Prometheus gives up after 10 s by default, and counts a late answer like a wrong one."""

FRESH_S: Final = 1.0
"""An answer is good for this long."""

ASK_AGAIN_S: Final = 30.0
"""A question that was not answered for this long is forgotten."""

MAX_TEXT_BYTES: Final = 2**19


class Unanswered(SwarmUnreachable):
    """The peer is not connected, or does not answer."""


def packed(text: bytes) -> Metrics:
    """What a node answers with. Text that does not fit is left out: a node has some 200 lines."""
    data = zlib.compress(text)
    if len(text) > MAX_TEXT_BYTES or len(data) > MAX_METRICS_BYTES:
        data = zlib.compress(b"# the metrics of this node are too large to be sent\n")
    return Metrics(text=data)


def unpacked(metrics: Metrics) -> bytes:
    """Raises BadFrame for what `packed` does not make, whatever it would grow to."""
    unzip = zlib.decompressobj()
    try:
        text = unzip.decompress(metrics.text, MAX_TEXT_BYTES)
    except zlib.error as e:
        raise BadFrame("metrics", f"metrics that are not compressed: {e}") from e
    if not unzip.eof or unzip.unused_data:
        raise BadFrame("metrics", f"metrics of more than {MAX_TEXT_BYTES} bytes, or cut ones")
    return text


@dataclass(frozen=True, slots=True)
class _Asked:
    at_s: float
    answer: asyncio.Future[bytes | None]
    """None: the session is over."""


class Inquiries:
    """One event loop. `post` queues a message for a peer's session; False: it has none."""

    def __init__(self, post: Callable[[str, Message], bool]) -> None:
        self._post = post
        self._asked: dict[str, _Asked] = {}
        self._answers: dict[str, tuple[float, bytes]] = {}

    async def metrics(self, peer_id: str) -> bytes:
        """In Prometheus' text format. Raises Unanswered."""
        at_s, text = self._answers.get(peer_id, (0.0, b""))
        if at_s and time.monotonic() < at_s + FRESH_S:
            return text
        answer = self._ask(peer_id)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                found = await asyncio.shield(answer)
        except TimeoutError:
            raise Unanswered(f"{peer_id} does not answer within {ANSWER_TIMEOUT_S:g} s") from None
        if found is None:
            raise Unanswered(f"{peer_id} has lost its connection")
        return found

    def answered(self, peer_id: str, metrics: Metrics) -> None:
        """What nobody has asked for is dropped. Raises BadFrame."""
        asked = self._asked.pop(peer_id, None)
        if asked is None:
            return
        try:
            text = unpacked(metrics)
        except BadFrame:
            asked.answer.set_result(None)
            raise
        self._answers[peer_id] = time.monotonic(), text
        asked.answer.set_result(text)

    def forget(self, peer_id: str) -> None:
        """The peer's session is over."""
        self._answers.pop(peer_id, None)
        asked = self._asked.pop(peer_id, None)
        if asked is not None:
            asked.answer.set_result(None)

    def _ask(self, peer_id: str) -> asyncio.Future[bytes | None]:
        now_s = time.monotonic()
        asked = self._asked.get(peer_id)
        if asked is not None and now_s < asked.at_s + ASK_AGAIN_S:
            return asked.answer
        if not self._post(peer_id, AskMetrics()):
            raise Unanswered(f"{peer_id} is not connected")
        self.forget(peer_id)
        answer = asyncio.get_running_loop().create_future()
        self._asked[peer_id] = _Asked(now_s, answer)
        return answer
