"""Which payloads a record may name: those that enough seats hold, so that nobody's vote waits for bytes.

Two payloads that are held by a majority each may have no majority that holds both. So what is held is held by
the same seats: a payload that comes later is held once enough seats have it and all others that are.
"""

from __future__ import annotations

from collections.abc import Collection


class Holding:
    """Of one reign, for the round that is open. `others`: the committee's seats but the leader, which holds
    all that it announces; `need`: how many seats must vote, with the leader."""

    def __init__(self, others: Collection[str], need: int) -> None:
        self._n_others = need - 1
        self._by_seat: dict[str, set[bytes]] = {seat: set() for seat in others}
        self._waiting: dict[bytes, None] = {}
        self._held: set[bytes] = set()

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
        if seat not in self._by_seat or not (digest in self._waiting or digest in self._held):
            return []
        self._by_seat[seat].add(digest)
        return list(iter(self._next, None))

    def sealed(self) -> None:
        """A new round is open: what was held is settled. What waits still does."""
        waiting = self._waiting.keys()
        self._by_seat = {seat: has & waiting for seat, has in self._by_seat.items()}
        self._held.clear()

    def forget(self, digest: bytes) -> None:
        """The payload is not offered any more."""
        self._waiting.pop(digest, None)

    def _next(self) -> bytes | None:
        for digest in self._waiting:
            wanted = self._held | {digest}
            if sum(wanted <= has for has in self._by_seat.values()) >= self._n_others:
                del self._waiting[digest]
                self._held.add(digest)
                return digest
        return None
