"""What a seat has seen of its committee since it was started, for people: pure, times are arguments."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Any, Final

from ..protocol.exposition import BUCKETS_S

MAX_SEAL_S: Final = 3600.0
"""Of one seal, in the sum: a clock that jumps must not spoil it."""


class Observed:
    """Of one seat, `me`. Times are in seconds of a clock that never goes back, but for `wall_ms`."""

    def __init__(self, me: str, now_s: float) -> None:
        self._me = me
        self._leader: str | None = None
        self._term = 0
        self._since_ms: int | None = None
        self._told_s, self._leaderless_s = now_s, 0.0
        self._elections = 0
        self._heads: dict[str, int] = {}
        self._seals = [0] * (len(BUCKETS_S) + 1)
        self._seals_s = 0.0

    def led(self, leader: str | None, term: int, now_s: float, wall_ms: int) -> None:
        """Who leads now, and by which ballot; None: nobody, as far as is known here."""
        if self._leader is None:
            self._leaderless_s += now_s - self._told_s
        self._told_s = now_s
        if leader is not None and term > self._term:
            self._elections += 1
            self._term = term
        if leader != self._leader:
            self._leader, self._since_ms = leader, wall_ms

    def heard(self, seat: str, head: int) -> None:
        """Another seat of the committee has said which round is its newest."""
        self._heads[seat] = max(head, self._heads.get(seat, 0))

    def sealed(self, took_s: float) -> None:
        """A record that was proposed here so long ago is sealed and on the disk."""
        self._seals[bisect_left(BUCKETS_S, took_s)] += 1
        self._seals_s += min(max(0.0, took_s), MAX_SEAL_S)

    def figures(self, now_s: float) -> dict[str, Any]:
        """JSON-able. `seals`: how many took as long as each bucket of `BUCKETS_S` says, or longer."""
        without_s = self._leaderless_s + (now_s - self._told_s if self._leader is None else 0.0)
        return {
            "leader": self._leader,
            "since_ms": self._since_ms,
            "elections": self._elections,
            "leaderless_s": round(without_s, 3),
            "seals": list(self._seals),
            "seals_s": round(self._seals_s, 6),
        }

    def seats(
        self, seats: Sequence[str], connected: Collection[str], resting: Collection[str], head: int, role: str
    ) -> list[dict[str, Any]]:
        """JSON-able: each seat of the committee as far as this one knows; `head` and `role` are its own.

        A seat says how far it is to who leads, and who leads says it to all: of two that follow neither
        knows the other's head, which is None then, and so is its lag (rounds)."""
        heads = {seat: known for seat, known in self._heads.items() if seat in seats} | {self._me: head}
        newest = max(heads.values())

        def told(seat: str) -> dict[str, Any]:
            is_here = seat == self._me or seat in connected
            doing = "leads" if seat == self._leader else "rests" if seat in resting else "follows"
            known = heads.get(seat) if is_here else None
            return {
                "peer_id": seat,
                "role": role if seat == self._me else doing if is_here else "not reachable",
                "reachable": is_here,
                "head": known,
                "lag": None if known is None else newest - known,
            }

        return [told(seat) for seat in seats]
