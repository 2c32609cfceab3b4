"""How a seat that is behind gets sealed records: one question at a time."""

from __future__ import annotations

from collections.abc import Callable

from ..protocol.trust.seals import Sealed
from .disk import SeatDisk
from .words import BATCH, BATCH_BYTES, Batch, Follow, Word


class CatchingUp:
    """A question for every message from ahead, answered by many records each, would multiply without end; so
    would records that nobody asked for. Only the record that was sealed just now comes unasked."""

    def __init__(self, send: Callable[[str, Word], None], disk: SeatDisk, retry_s: float) -> None:
        self._send, self._disk, self._retry_s = send, disk, retry_s
        self._asked_s: float | None = None
        self._asked_at = -1
        """The head at the time of the last question."""

    def heard_of(self, seat: str, head: int, now_s: float) -> None:
        """Somebody has the record of that round."""
        is_answered = self._disk.head > self._asked_at
        is_due = self._asked_s is None or now_s >= self._asked_s + self._retry_s
        if head > self._disk.head and (is_answered or is_due):
            self._asked_s, self._asked_at = now_s, self._disk.head
            self._send(seat, Follow(after=self._disk.head))

    def give(self, seat: str, after: int) -> None:
        """What is here after that round and fits into a message, if there is any."""
        if after >= self._disk.head:
            return
        fit: list[Sealed] = []
        n_bytes = 0
        for sealed in self._disk.after(after, BATCH):
            n_bytes += len(sealed.record) + len(sealed.work)
            if fit and n_bytes > BATCH_BYTES:
                break
            fit.append(sealed)
        self._send(seat, Batch(head=self._disk.head, sealed=tuple(fit)))
