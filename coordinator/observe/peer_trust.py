"""What there is to say of a peer's honesty: sizes, audits, refusals; for the status, the page and metrics."""

from __future__ import annotations

from typing import Any

from ..protocol.trust.standing import Standing
from .peer_sizes import PeerSizes
from .refusals import Refusals


class PeerTrust:
    """Looks at its parts, and changes none of them."""

    def __init__(self, standing: Standing, sizes: PeerSizes, refusals: Refusals) -> None:
        self._standing, self._sizes, self._refusals = standing, sizes, refusals

    def of(self, index: int, now_s: float) -> dict[str, Any]:
        """JSON-able. `size`: of its payloads in medians of a round, `clipped`: the share of them that was
        scaled down for that; both as most nodes say, None: unknown. `audits_*`: of its offers, over the whole
        run. `condemned_until`: the last round in which it weighs nothing, None: it counts. `rejected`: what
        of it was not let in since the coordinator was started, by reason."""
        size = self._sizes.of(index, now_s)
        return {
            **in_ledger(self._standing, index),
            "size": None if size is None else size.size,
            "clipped": None if size is None else size.clipped,
            "rejected": dict(self._refusals.by(index)),
        }


def in_ledger(standing: Standing, index: int) -> dict[str, Any]:
    """The same as far as a ledger tells it."""
    passed, failed = standing.audited(index)
    return {
        "size": None,
        "clipped": None,
        "audits_passed": passed,
        "audits_failed": failed,
        "condemned_until": standing.condemned_until(index),
        "rejected": {},
    }
