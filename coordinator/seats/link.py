"""One stream between two seats: what waits to be sent on it, and how much the other end may say."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Final

from ..entry.rates import Bucket, Rate
from ..protocol.messages import Address, BadMessage, encode_message
from ..protocol.streams import BETWEEN_SEATS, BadFrame, FrameKind, Stream
from ..quorum.words import Canvass, Enter, Memory, Nack, Ping, Pong, Word, decode_word

MAX_QUEUED: Final = 256
MAX_QUEUED_BYTES: Final = 64 * 2**20
"""A seat that does not read loses the oldest words: seats say again what matters."""

WORDS: Final = Rate(500.0, 4000.0)
"""Rounds of the smallest models take milliseconds, and have three words each."""

WORD_BYTES: Final = Rate(64.0 * 2**20, 512.0 * 2**20)

BACK_S: Final = 10.0
"""Longer than any pause between two tries to connect."""

TWINS_S: Final = 30.0
"""Neither of two processes that are one seat is let in for so long after they came in turns."""

Addresses = tuple[Address, ...]

_LAST_COUNTS: Final = (Ping, Pong, Canvass, Nack, Memory, Enter)
"""Of these only the newest one matters."""


class Link:
    """Belongs to the event loop. `enter`: what the other end said last of itself; `is_ours`: this seat has
    dialled; `heard_s`: when a word came last, in monotonic seconds."""

    def __init__(self, seat: str, stream: Stream, enter: Enter, *, is_ours: bool) -> None:
        self.seat, self.stream, self.enter, self.is_ours = seat, stream, enter, is_ours
        self.began_s = self.heard_s = time.monotonic()
        self.n_dropped = 0
        self._queue: deque[tuple[type[Word], bytes]] = deque()
        self._n_bytes = 0
        self._is_sending = False
        self._wake = asyncio.Event()
        self._words, self._word_bytes = Bucket(WORDS, self.began_s), Bucket(WORD_BYTES, self.began_s)

    def send(self, word: Word) -> None:
        """Gives it to the system at once, where nothing waits: a seat that writes to its disk next does so
        while the word is on its way. Else queues it; of too many the oldest ones are dropped."""
        if not self._queue and not self._is_sending and self.stream.send_now(word):
            return
        kind, packed = type(word), encode_message(word)
        if kind in _LAST_COUNTS:
            old = next((entry for entry in self._queue if entry[0] is kind), None)
            if old is not None:
                self._queue.remove(old)
                self._n_bytes -= len(old[1])
        self._queue.append((kind, packed))
        self._n_bytes += len(packed)
        while len(self._queue) > MAX_QUEUED or (self._n_bytes > MAX_QUEUED_BYTES and len(self._queue) > 1):
            self._n_bytes -= len(self._queue.popleft()[1])
            self.n_dropped += 1
        self._wake.set()

    async def write(self) -> None:
        """Until the stream breaks. Raises OSError."""
        while True:
            self._wake.clear()
            while self._queue:
                _, packed = self._queue.popleft()
                self._n_bytes -= len(packed)
                self._is_sending = True
                await self.stream.send(FrameKind.MESSAGE, packed)
                self._is_sending = False
            await self._wake.wait()

    async def read(self) -> Word:
        """The next word. Raises BadFrame for what is none or too much, EOFError or OSError."""
        word, n_bytes = await read_word(self.stream)
        self.heard_s = now_s = time.monotonic()
        if not self._words.take(1, now_s) or not self._word_bytes.take(n_bytes, now_s):
            raise BadFrame("rate", "it says too much")
        return word


@dataclass(frozen=True, slots=True)
class _Came:
    """Last, as one seat."""

    addresses: Addresses
    came_s: float
    before: Addresses = ()
    """Where whoever came before is reached."""
    denied_to_s: float = 0.0


class Twins:
    """Two processes that are the same seat: a copy of its state folder was started. Each takes the place of
    the other's streams, again and again, and they might vote for different records."""

    def __init__(self) -> None:
        self._came: dict[str, _Came] = {}

    def of(self, seat: str, addresses: Addresses, now_s: float) -> tuple[Addresses, ...]:
        """Somebody comes as this seat: where it and its twin are reached; (): there is no twin, as far as is
        known. Whoever comes back as soon as another one has come has not ended; one that was moved has."""
        last = self._came.get(seat)
        if last is None:
            self._came[seat] = _Came(addresses, now_s)
            return ()
        if last.addresses == addresses:
            came = replace(last, came_s=now_s)
        else:
            is_back = addresses == last.before and now_s < last.came_s + BACK_S
            denied_to_s = now_s + TWINS_S if is_back else last.denied_to_s
            came = _Came(addresses, now_s, last.addresses, denied_to_s)
        self._came[seat] = came
        return (addresses, came.before) if now_s < came.denied_to_s else ()


async def read_word(stream: Stream) -> tuple[Word, int]:
    """The next word, and its bytes. Raises BadFrame, EOFError or OSError."""
    frame = await stream.receive(BETWEEN_SEATS)
    try:
        return decode_word(frame.body), len(frame.body)
    except BadMessage as e:
        raise BadFrame("message", str(e)) from e
