"""Which payloads a record may name: those that enough seats hold, so that nobody's vote waits for bytes.

Two payloads that are held by a majority each may have no majority that holds both. So what is held is held by
the same seats: a payload that comes later is held once enough seats have it and all others that are.

A seat that said of the last payload soon after its last byte had left here that it holds it is taken to hold
the next one as soon as that has left here as a whole: the record that names it comes right behind it, and is
voted for once the payload is on that seat's disk, never before. That saves the round trip of its answer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

PROMPT_S: Final = 1.0
"""From a payload's last byte to the word that it is held: who takes longer is waited for the next time."""

MAX_UNDER_WAY: Final = 16 * 2**20
"""Bytes that left for a seat and that it may not have yet: of more, their last byte says little."""


class Holding:
    """Of one reign, for the round that is open. `others`: the committee's seats but the leader, which holds
    all that it announces; `need`: how many seats must vote, with the leader."""

    def __init__(self, others: Collection[str], need: int) -> None:
        self._n_others = need - 1
        self._by_seat: dict[str, set[bytes]] = {seat: set() for seat in others}
        self._waiting: dict[bytes, None] = {}
        self._held: set[bytes] = set()
        self._prompt: set[str] = set()
        """Seats that hold soon what was sent to them."""
        self._given: dict[str, dict[bytes, tuple[float, int]]] = {seat: {} for seat in others}
        """What left for each of them and it has not said that it holds: since when, and its bytes."""

    def announce(self, digest: bytes) -> None:
        """The leader has the payload, and asks the others to fetch it."""
        if self._n_others > 0 and digest not in self._held:
            self._waiting[digest] = None

    def is_held(self, digest: bytes) -> bool:
        """For `Service(held=...)`."""
        return self._n_others == 0 or digest in self._held

    def keeps(self, seat: str, digest: bytes) -> list[bytes]:
        """A seat says that it has the payload. Returns those that are held from now on, for
        `Service.held_arrived`; what was not announced, or comes from nobody's seat, changes nothing."""
        if not self._is_asked(seat, digest):
            return []
        self._by_seat[seat].add(digest)
        return list(iter(self._next, None))

    def given(self, seat: str, digest: bytes, n_bytes: int, now_s: float) -> list[bytes]:
        """All of the payload has left for that seat. Returns those that are held from now on: what one has
        that was prompt so far."""
        if not self._is_asked(seat, digest) or digest in self._by_seat[seat]:
            return []
        given = self._given[seat]
        given[digest] = now_s, n_bytes
        oldest_s = min(since_s for since_s, _ in given.values())
        n_under_way = sum(n for _, n in given.values())
        if now_s - oldest_s > PROMPT_S or n_under_way > MAX_UNDER_WAY:
            self._prompt.discard(seat)
        return self.keeps(seat, digest) if seat in self._prompt else []

    def answered(self, seat: str, digest: bytes, now_s: float) -> None:
        """It says that it holds what was given to it: soon, or late."""
        since_s, _ = self._given.get(seat, {}).pop(digest, (None, 0))
        if since_s is not None and now_s - since_s <= PROMPT_S:
            self._prompt.add(seat)
        elif since_s is not None:
            self._prompt.discard(seat)

    def gone(self, seat: str) -> None:
        """It is not connected any more: what was under way to it may be lost."""
        self._prompt.discard(seat)
        if seat in self._given:
            self._by_seat[seat] -= self._given[seat].keys()
            self._given[seat].clear()

    def _is_asked(self, seat: str, digest: bytes) -> bool:
        return seat in self._by_seat and (digest in self._waiting or digest in self._held)

    def sealed(self) -> None:
        """A new round is open: what was held is settled. What waits still does."""
        waiting = self._waiting.keys()
        self._by_seat = {seat: has & waiting for seat, has in self._by_seat.items()}
        self._held.clear()

    def forget(self, digest: bytes) -> None:
        """The payload is not offered any more."""
        self._waiting.pop(digest, None)
        for given in self._given.values():
            given.pop(digest, None)

    def lost(self, digest: bytes) -> list[bytes]:
        """The payload was given to others while it came, and has not come whole: nobody has it. Returns those
        that are held from now on, for they need not be where this one was taken to be."""
        self.forget(digest)
        self._held.discard(digest)
        for has in self._by_seat.values():
            has.discard(digest)
        return list(iter(self._next, None))

    def _next(self) -> bytes | None:
        for digest in self._waiting:
            wanted = self._held | {digest}
            if sum(wanted <= has for has in self._by_seat.values()) >= self._n_others:
                del self._waiting[digest]
                self._held.add(digest)
                return digest
        return None
