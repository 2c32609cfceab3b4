"""Whom to ask for a payload that did not come from whom it was to: lines share what is left to send.

When a relay is gone, all who were to get anything there ask the coordinator at once, whose line may be
narrow. So each of them is told who would have sent it first: the coordinator, the node that made the payload,
or another relay of it. Of each line is known how long it is busy with what was given so before. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from .deliveries import Deliveries


class Referring:
    """`own_rate`: bytes per second of the coordinator's line; `rates`: of nodes', as they are measured."""

    def __init__(self, deliveries: Deliveries, own_rate: float, rates: Mapping[str, float]) -> None:
        self._deliveries, self._own_rate, self._rates = deliveries, own_rate, rates
        self._busy_to_s: dict[str | None, float] = {}
        """None: the coordinator."""

    def instead(self, peer: str, digest: bytes, now_s: float) -> str | None:
        """Who is to send the payload to a peer that has asked for it; None: the coordinator."""
        deliveries = self._deliveries
        deliveries.asked(peer, digest)
        n_bytes, holders = deliveries.holders(digest)
        others = [h for h in holders if h != peer and h in self._rates and not deliveries.rests(h)]
        ends_s = {who: self._ends_s(who, n_bytes, now_s) for who in (None, *others)}
        best = min(ends_s, key=ends_s.__getitem__)
        self._busy_to_s = {who: end_s for who, end_s in self._busy_to_s.items() if end_s > now_s}
        self._busy_to_s[best] = ends_s[best]
        if best is not None:
            deliveries.named(peer, digest, best)
        return best

    def _ends_s(self, who: str | None, n_bytes: int, now_s: float) -> float:
        rate = self._own_rate if who is None else self._rates[who]
        return max(now_s, self._busy_to_s.get(who, now_s)) + n_bytes / rate
