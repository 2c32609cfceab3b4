"""Nodes' metrics, asked for over their sessions: that is the way that works for a node behind a NAT.

However often somebody scrapes, a node is asked once at a time and once a second at most, and what it says is
bounded: an answer is a few kilobytes that count as control traffic, and towards the node's upload limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ...compression.errors import SwarmUnreachable
from ..protocol.exposition import unpacked
from ..protocol.messages import AskMetrics, Message, Metrics
from ..protocol.streams import BadFrame

ANSWER_TIMEOUT_S: Final = 5.0
"""Prometheus gives up after 10 s by default, and counts a late answer like a wrong one."""

FRESH_S: Final = 1.0
"""An answer is good for this long."""

ASK_AGAIN_S: Final = 30.0
"""A question that was not answered for this long is forgotten."""


class Unanswered(SwarmUnreachable):
    """The peer is not connected, or does not answer."""


@dataclass(frozen=True, slots=True)
class _Asked:
    at_s: float
    answer: asyncio.Future[bytes | None]
    """None: the session is over."""


class MetricsRequests:
    """One event loop. `post` queues a message for a peer's session; False: it has none.

    `answer_timeout_s`: how long an answer is waited for; `fresh_s`: how long it is good.
    """

    def __init__(
        self,
        post: Callable[[str, Message], bool],
        *,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        fresh_s: float = FRESH_S,
    ) -> None:
        self._post = post
        self._answer_timeout_s, self._fresh_s = answer_timeout_s, fresh_s
        self._asked: dict[str, _Asked] = {}
        self._answers: dict[str, tuple[float, bytes]] = {}

    async def metrics(self, peer_id: str) -> bytes:
        """In Prometheus' text format. Raises Unanswered."""
        at_s, text = self._answers.get(peer_id, (0.0, b""))
        if at_s and time.monotonic() < at_s + self._fresh_s:
            return text
        answer = self._ask(peer_id)
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                found = await asyncio.shield(answer)
        except TimeoutError:
            raise Unanswered(f"{peer_id} does not answer within {self._answer_timeout_s:g} s") from None
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
