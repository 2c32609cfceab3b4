"""How a seat that is behind gets sealed records: one question at a time."""

from __future__ import annotations

from collections.abc import Callable

from .disk import SeatDisk
from .words import BATCH, Batch, Follow, Word


class CatchingUp:
    """A question for every message from ahead, answered by many records each, would multiply without end."""

    def __init__(self, send: Callable[[str, Word], None], disk: SeatDisk, retry_s: float) -> None:
        self._send, self._disk, self._retry_s = send, disk, retry_s
        self._asked_s: float | None = None
        self._asked_at = -1
        """The head at the time of the last question."""

    def heard_of(self, seat: str, head: int, now_s: float) -> None:
        """Somebody has the record of that round."""
        if head > self._disk.head:
            self._ask(seat, now_s)

    def took(self, seat: str, n: int, now_s: float) -> None:
        """So many came at once; after as many as go into a message there may be more."""
        if n == BATCH:
            self._ask(seat, now_s)

    def give(self, seat: str, after: int) -> None:
        """What is here after that round, if there is any."""
        if after < self._disk.head:
            self._send(seat, Batch(sealed=tuple(self._disk.after(after, BATCH))))

    def _ask(self, seat: str, now_s: float) -> None:
        is_answered = self._disk.head > self._asked_at
        if is_answered or self._asked_s is None or now_s >= self._asked_s + self._retry_s:
            self._asked_s, self._asked_at = now_s, self._disk.head
            self._send(seat, Follow(after=self._disk.head))
