"""What a node in gossip tells people."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite

from ...coordinator.protocol.messages import MAX_EDGES, EdgeEntry, Gossiping
from ...optim.gossip.strategy import Gossip
from ..preparing import PreparedRun


def gossiping(run: PreparedRun) -> Gossiping | None:
    """None: this run's peers have no models of their own. May be asked from any thread."""
    strategy, link = run.replica.strategy, run.link.neighbours
    if not isinstance(strategy, Gossip) or link is None:
        return None
    met, mixed = strategy.met, strategy.mixed
    return Gossiping(
        round=0 if met is None else met.turn.round,
        merged=strategy.merged(run.replica.round, run.replica.course.n_rounds),
        distance=None if mixed is None else _finite(mixed.distance),
        own_held_out=_finite(run.work.own_held_out),
        edges=_edges(run, [] if met is None else list(met.weights)),
        carried=link.carried(),
    )


def _edges(run: PreparedRun, met: list[str]) -> tuple[EdgeEntry, ...]:
    """Those that were met last before the others."""
    assert run.link.neighbours is not None
    found = run.link.neighbours.edges()
    order = sorted(found, key=lambda peer: (peer not in met, peer))
    known = [(index, found[peer]) for peer in order if (index := run.history.index_of(peer)) is not None]
    return tuple(EdgeEntry(peer=i, **asdict(edge)) for i, edge in known[:MAX_EDGES])


def _finite(x: float | None) -> float | None:
    return float(x) if x is not None and isfinite(x) else None
