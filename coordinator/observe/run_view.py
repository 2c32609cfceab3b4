"""A run as people see it: the status, the page, and what is kept of both over a restart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from ..derived_state import DerivedState
from ..entry.gate import Gate
from ..ledger import Ledger
from ..membership import Membership
from ..protocol.figures import noise_in_words
from ..protocol.messages import Gossiping, Rejected
from ..rounds import Rounds
from .counters import Counters
from .loss_unit import LossUnit
from .overview import left_s, overview, run_state, waits_for
from .peer_trust import PeerTrust
from .refusals import Refusals

SHOWN_EVALUATIONS = 20
SHOWN_HELD_OUT = 500
"""Held-out losses in the status: of a long run every so many."""
SHOWN_BANNED = 100
SHOWN_EDGES = 128


class RunView:
    """Looks at the parts of one run and changes none of them. Times are in seconds."""

    def __init__(
        self,
        ledger: Ledger,
        rounds: Rounds,
        members: Membership,
        derived: DerivedState,
        counters: Counters,
        rejected: Counter[Rejected],
        refusals: Refusals,
        wall_ms: Callable[[], int],
        loss_unit: LossUnit,
        gate: Gate,
    ) -> None:
        self._ledger, self._rounds, self._members = ledger, rounds, members
        self._derived, self._counters, self._rejected = derived, counters, rejected
        self._trust = PeerTrust(derived.standing, derived.peer_sizes, refusals)
        self._wall_ms, self._loss_unit, self._gate = wall_ms, loss_unit, gate

    def status(self, now_s: float) -> dict[str, Any]:
        """JSON-able, for `thinwire status` and the live table."""
        return {
            "run": self._derived.course.run.name,
            "run_id": self._ledger.run_id.hex(),
            "strategy": _strategy(self._ledger.genesis.config),
            "round": self._rounds.head,
            "rounds": self._derived.course.n_rounds,
            "state": run_state(self._rounds),
            "waits_for": waits_for(self._rounds, self._derived.course.run.min_peers),
            "left_s": left_s(self._rounds, self._derived.statistics),
            "changes": self._derived.page_history.changes(),
            "errors": self._derived.page_history.errors(),
            "held_out": [list(entry) for entry in self._ledger.held_out(SHOWN_HELD_OUT)],
            "evaluations": [list(entry) for entry in self._ledger.evaluations(SHOWN_EVALUATIONS)],
            "failed_evaluations": self._derived.reports.failed_evaluations,
            "last_failed_evaluation": self._derived.reports.last_failure,
            "peers": [self.peer(index, peer_id, now_s) for index, peer_id in self._shown().items()],
            "rejected": dict(sorted(self._rejected.items())),
            "admission": {"mode": self._gate.mode, "banned": sorted(self._gate.banned)[:SHOWN_BANNED]},
            "since_start": self._counters.figures(),
            "ledger_bytes": self._ledger.n_bytes,
            "gossip": self._gossip(),
            "noise_scale": self._noise_scale(),
            **self._loss_unit.figures(),
            **self._derived.retention.figures(self._members.connected()),
            **self._derived.statistics.figures(),
        }

    def overview(self, now_s: float) -> dict[str, Any]:
        """JSON-able and bounded, for the page."""
        shown = overview(
            self._derived.course.run,
            self._ledger,
            self._rounds,
            self._members,
            self._derived.statistics,
            self._derived.page_history,
            self._trust,
            self._shown(),
            now_s=now_s,
            now_ms=self._wall_ms(),
        )
        also = {"gossip": self._gossip(), "critical_batch": self._noise_scale()["text"]}
        return {**shown, **also, **self._loss_unit.figures()}

    def trend(self, since: int) -> dict[str, Any]:
        """JSON-able and bounded: the points of the charts that have changed since that stamp."""
        trend = self._derived.page_history.trend
        return {"stamp": trend.stamp, **trend.points(since)}

    def history(self) -> bytes:
        """What only this process has seen of the run, to be kept over a restart; small."""
        return self._derived.history()

    def _shown(self) -> dict[int, str]:
        """The peers of the run, by their index, without those that only read from it."""
        return {
            index: peer_id
            for index, peer_id in self._ledger.peers().items()
            if self._members.takes_part(index) or self._derived.statistics.has_offered(index)
        }

    def _noise_scale(self) -> dict[str, Any]:
        """See `RunStatistics.noise_scale`. `round_samples`: that a round counts now."""
        recent = self._derived.samples.recent
        scale = self._derived.statistics.noise_scale()
        scale["round_samples"] = sum(recent) / len(recent) if recent else None
        return {**scale, "text": noise_in_words(scale)}

    def _gossip(self) -> dict[str, Any] | None:
        """How far the models of peers are apart, as they tell it; None: nobody has one of its own."""
        has_offered = self._derived.statistics.has_offered
        told = {index: g for index, g in self._derived.gossip.items() if has_offered(index)}
        if not told:
            return None
        distances = [g.distance for g in told.values() if g.distance is not None]
        last = self._rounds.head if self._rounds.is_over else 0  # which merges, whoever has not told it yet
        return {
            "merged": max(last, *(g.merged for g in told.values())),
            "distance": median(distances) if distances else None,
            "own_held_out": [g.own_held_out for g in told.values() if g.own_held_out is not None],
            "edges": _edges(told),
        }

    def peer(self, index: int, peer_id: str, now_s: float) -> dict[str, Any]:
        """JSON-able: what the status says of one."""
        seen_s = self._members.seen_s(index)
        return {
            "peer_id": peer_id,
            "index": index,
            "invitation": self._ledger.invited.of(index),
            "state": str(self._members.state(index)),
            "last_seen_s": None if seen_s is None else max(0.0, now_s - seen_s),
            **self._derived.statistics.peer(index).figures(),
            **self._trust.of(index, now_s),
            "gossip": None if (told := self._derived.gossip.get(index)) is None else told.model_dump(),
        }


def _strategy(config: str) -> dict[str, Any]:
    """Its options in record 0, but for lists, which may be long: the coordinator need not understand them."""
    strategy = json.loads(config).get("strategy")
    options = strategy if isinstance(strategy, dict) else {}
    return {name: value for name, value in options.items() if not isinstance(value, list)}


def _edges(told: Mapping[int, Gossiping]) -> list[list[int]]:
    """Two peers by index, the bytes of the messages between them so far, and of them those that a member has
    carried, as the one that knows of more tells it; those with most, in the order of the peers."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for index, gossip in told.items():
        for edge in gossip.edges:
            both = min(index, edge.peer), max(index, edge.peer)
            found[both] = max(found.get(both, (0, 0)), (edge.sent + edge.received, edge.relayed))
    most = sorted(found.items(), key=lambda entry: -entry[1][0])[:SHOWN_EDGES]
    return [[*both, *n_bytes] for both, n_bytes in sorted(most)]
