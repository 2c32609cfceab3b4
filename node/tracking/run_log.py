"""What a node logs of its run for trackers: the kinds of entries, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...coordinator.protocol.figures import mean_loss
from ...coordinator.protocol.messages import Commit
from ...optim.base import Own
from ..links.base import Traffic
from ..local_work import Proposal
from .metrics import NodeMetrics
from .trackers import Tracks


class RunLog:
    """Of one run. Names of figures end in their unit: `_s`, `_bytes`; losses are in nats. `own_loss`,
    `samples`, `tokens`, `payload_bytes` and the phases are this node's part of a round, `loss` is the mean
    over the offers that counted."""

    def __init__(self, tracks: Tracks, metrics: NodeMetrics, traffic: Callable[[], Traffic]) -> None:
        self._tracks, self._metrics, self._traffic = tracks, metrics, traffic
        self._own: dict[str, float | None] = {}

    def event(self, kind: str, round: int, **figures: Any) -> None:
        """`start`, `held_out`, `replay` or `end`."""
        self._tracks.add(kind, round, **figures)

    def proposed(self, proposal: Proposal) -> None:
        """Is logged with the round that it was for."""
        self._own = {
            "own_loss": proposal.loss,
            "samples": proposal.n_samples,
            "tokens": proposal.n_tokens,
            "payload_bytes": len(proposal.payload),
        }

    def applied(self, commits: Sequence[Commit], own: Own, round_s: float | None) -> None:
        """One entry for all rounds that were applied at once: for one, where this node trains. `round_s`: how
        long it took; None: it was not live."""
        last = commits[-1].body
        figures: dict[str, float | None] = {"loss": mean_loss(last)}
        if own is not None:
            figures |= self._own | {f"{phase}_s": s for phase, s in self._metrics.parts().items()}
        if round_s is not None:
            figures["round_s"] = round_s
        traffic = self._traffic()
        self._tracks.add(
            "round",
            last.round,
            rounds=len(commits),
            offers=len(last.offers),
            own=own or "none",
            **figures,
            sent_bytes=sum(traffic.sent.values()),
            received_bytes=sum(traffic.received.values()),
        )
