"""Who gives a joiner its replica: asks one training peer at a time and passes on what it publishes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from thinwire.coordinator.messages import Message, SnapshotAt, WantSnapshot

SILENCE_S = 30.0
"""A donor that has not published for this long is given up."""

Sends = list[tuple[int, Message]]
"""(peer, message) in order."""


@dataclass(frozen=True, slots=True)
class _Asked:
    donor: int
    since_s: float


class Donors:
    """A pure state machine. `training`: who could give now; `peer_id`: the name for others to dial."""

    def __init__(self, training: Callable[[], list[int]], peer_id: Callable[[int], str]) -> None:
        self._training = training
        self._peer_id = peer_id
        self._waiting: list[int] = []
        self._asked: _Asked | None = None
        self._failed: set[int] = set()
        self._served_by: dict[int, int] = {}
        self._last = -1

    def want(self, joiner: int, now_s: float) -> Sends:
        """A joiner asks. One that asks again could not use what it was told: that donor comes last."""
        if joiner not in self._waiting:
            self._waiting.append(joiner)
        if self._asked is not None and self._asked.donor == joiner:
            return self._give_up(joiner, now_s)
        return [] if self._asked is not None else self._ask(now_s)

    def published(self, donor: int, round_: int, digest: bytes, n_bytes: int) -> Sends:
        """A peer reports a snapshot: everyone who waits is told, whoever was asked."""
        waiting, self._waiting, self._asked = self._waiting, [], None
        self._failed.clear()
        answer = SnapshotAt(round=round_, digest=digest, n_bytes=n_bytes, holder=self._peer_id(donor))
        self._served_by.update(dict.fromkeys(waiting, donor))
        return [(joiner, answer) for joiner in waiting]

    def gone(self, peer: int, now_s: float) -> Sends:
        """The peer does not train any more: it neither gives nor, if its session is over, waits."""
        if self._asked is not None and self._asked.donor == peer:
            return self._give_up(peer, now_s)
        return []

    def forget(self, joiner: int) -> None:
        """The joiner's session is over: it asks again when it is back."""
        if joiner in self._waiting:
            self._waiting.remove(joiner)

    def tick(self, now_s: float) -> Sends:
        if self._asked is not None and now_s >= self._asked.since_s + SILENCE_S:
            return self._give_up(self._asked.donor, now_s)
        return []

    def wake_s(self) -> float | None:
        return None if self._asked is None else self._asked.since_s + SILENCE_S

    def _give_up(self, donor: int, now_s: float) -> Sends:
        self._failed.add(donor)
        self._asked = None
        return self._ask(now_s)

    def _ask(self, now_s: float) -> Sends:
        if not self._waiting:
            self._failed.clear()
            return []
        able = [p for p in self._training() if p not in self._failed and p not in self._waiting]
        if not able:
            return self._nobody()
        disappointed = {self._served_by[j] for j in self._waiting if j in self._served_by}
        # Round robin; donors whose snapshot a joiner could not use come after all others.
        order = sorted(able, key=lambda p: (p in disappointed, p <= self._last, p))
        self._last = order[0]
        self._asked = _Asked(order[0], now_s)
        return [(order[0], WantSnapshot())]

    def _nobody(self) -> Sends:
        waiting, self._waiting = self._waiting, []
        self._failed.clear()
        answer = SnapshotAt(round=0, digest=bytes(32), n_bytes=0, holder=None)
        return [(joiner, answer) for joiner in waiting]
