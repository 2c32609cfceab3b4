"""Streams of peers that have not shown the token yet: how many, for how long, and how they are refused."""

from __future__ import annotations

import contextlib
import json
from asyncio import timeout
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, TypeVar

from ...compression.errors import ConfigError, ThinwireError
from ..protocol.messages import BadMessage, Hello, Refused
from ..protocol.streams import FROM_NODE, BadFrame, FrameKind, Stream

T = TypeVar("T")

MAX_STRANGERS: Final = 64
"""Streams of peers that have not shown the token yet."""

MAX_STRANGE_STREAMS: Final = 8
"""Of one such peer."""

GOODBYE_S: Final = 2.0
_TOKEN_BYTES: Final = 200


class Strangers:
    """Counts the open ones. `has_worked`: whether work of that peer has counted: they find room among any
    number of strangers."""

    def __init__(self, has_worked: Callable[[str], bool]) -> None:
        self._has_worked = has_worked
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def one(self, peer_id: str) -> Iterator[None]:
        """Open until the peer has shown the token. Raises BadFrame: there are too many."""
        is_full = self._open.total() >= MAX_STRANGERS and not self._has_worked(peer_id)
        if is_full or self._open[peer_id] >= MAX_STRANGE_STREAMS:
            raise BadFrame("strangers", "too many streams that have not said hello")
        self._open[peer_id] += 1
        try:
            yield
        finally:
            self._open -= Counter((peer_id,))


async def receive_hello(stream: Stream, wait_s: float) -> Hello:
    """What a session begins with. Raises BadFrame, TimeoutError, EOFError or OSError."""
    async with timeout(wait_s):
        hello = await stream.receive_message(FROM_NODE)
    if not isinstance(hello, Hello):
        raise BadFrame("hello", f"a session starts with Hello, not {type(hello).__name__}")
    return hello


async def receive_token(stream: Stream, wait_s: float) -> str:
    """What somebody shows who asks for the status. Raises as `receive_hello` does."""
    async with timeout(wait_s):
        frame = await stream.receive({FrameKind.ASK: _TOKEN_BYTES})
    return frame.body.decode(errors="replace")


async def tell_status(stream: Stream, status: Callable[[], dict[str, Any]], wait_s: float) -> None:
    """Now, and whenever the other end asks again, until it has not for so long."""
    while True:
        await stream.send(FrameKind.STATUS, json.dumps(status()).encode())
        await receive_token(stream, wait_s)


async def or_refused(stream: Stream, opening: Awaitable[T]) -> T | None:
    """What it returns; None: the node was told why it is not let in. A BadMessage is raised after that."""
    try:
        return await opening
    except ThinwireError as e:
        await refuse(stream, e)
        if isinstance(e, BadMessage):
            raise
        return None


async def refuse(stream: Stream, error: ThinwireError) -> None:
    """Tells why, and waits for a moment until the other end has read it."""
    with contextlib.suppress(OSError):
        await stream.send_message(Refused.of(error))
        await stream.ended(GOODBYE_S)


async def looker(stream: Stream, check: Callable[[str], None], wait_s: float) -> bool:
    """Whether somebody who asks for the status may hear it; who may not is told why. `check` raises
    ConfigError. Raises as `receive_hello` does."""
    shown = await receive_token(stream, wait_s)
    try:
        check(shown)
    except ConfigError as e:
        await refuse(stream, e)
        return False
    return True
