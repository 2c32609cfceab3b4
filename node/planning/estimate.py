"""From what was measured on this machine to a round of a swarm: a pure calculation, with its spread.

Every node is taken to be as fast as this machine and to have the same link in both directions. A node sends
its payload once to the coordinator, gets those of the others, and serves others: nodes get payloads from one
another, so that each sends about as much as it gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from ...coordinator.protocol.figures import ddp_bytes
from ..workload import MARGIN
from .measuring import Measured

TRIPS: Final = 3
"""Ways over the link that a round waits for, beside the bytes: the offer, the commit, the payloads."""

CONTROL_BYTES: Final = 400
"""Of a round, per peer, in records and messages, beside payloads."""

MUCH: Final = 0.5
"""A link that takes more than this part of a round is what the round waits for."""


@dataclass(frozen=True, slots=True)
class Span:
    """A median, and the smallest and largest that was seen."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Span:
        return cls(median(values), min(values), max(values))

    def times(self, factor: float) -> Span:
        return Span(self.median * factor, self.least * factor, self.most * factor)

    def plus(self, seconds: float) -> Span:
        return Span(self.median + seconds, self.least + seconds, self.most + seconds)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one strategy, in a swarm. All bytes are of one node and one round; times in seconds.
    `link_share`: the part of a round in which the link is what is waited for. `told`: see `Strategy.told`."""

    strategy: str
    rounds_measured: int
    batches: int
    payload_bytes: int
    sent_bytes: int
    received_bytes: int
    compute_s: Span
    pack_s: Span
    exchange_s: float
    apply_s: Span
    round_s: Span
    link_share: float
    tokens_per_s: float
    memory_bytes: int
    device_bytes: int
    ddp_bytes: float
    ddp_exchange_s: float
    verdict: str
    told: str | None

    @property
    def fits(self) -> bool:
        return self.verdict == "fits"


def exchange_s(payload_bytes: float, n_peers: int, link_bytes_per_s: float, rtt_s: float) -> float:
    """What the link takes of a round: one's own payload, and as much again as comes from the others."""
    through_bytes = (n_peers - 1) * payload_bytes + n_peers * CONTROL_BYTES
    return (payload_bytes + through_bytes) / link_bytes_per_s + TRIPS * rtt_s


def estimate(
    found: Measured, n_peers: int, link_bytes_per_s: float, rtt_s: float, round_s: float, memory_bytes: int
) -> Estimate:
    """`round_s`: that the run asks for, 0: none, every node does all the work; `memory_bytes`: that this
    machine has for a node."""
    others = n_peers - 1
    through_bytes = others * found.full_bytes + n_peers * CONTROL_BYTES
    sent = found.full_bytes + through_bytes
    link_s = exchange_s(found.full_bytes, n_peers, link_bytes_per_s, rtt_s)
    pack_s, apply_s = Span.of(found.pack_s), Span.of(found.apply_s)
    batch_s = Span.of([s / found.n_batches for s in found.compute_s])
    batches = found.most_batches
    if round_s:
        left_s = MARGIN * round_s - link_s - pack_s.median - apply_s.median
        batches = max(1, min(batches, int(left_s / batch_s.median)))
    compute_s = batch_s.times(batches)
    totals = [
        c / found.n_batches * batches + p + a + link_s
        for c, p, a in zip(found.compute_s, found.pack_s, found.apply_s, strict=True)
    ]
    whole_s = Span.of(totals)
    ddp = ddp_bytes(n_peers, found.n_parameters)
    link_share = link_s / whole_s.median
    return Estimate(
        strategy=found.strategy,
        rounds_measured=len(found.compute_s),
        batches=batches,
        payload_bytes=found.full_bytes,
        sent_bytes=sent,
        received_bytes=through_bytes,
        compute_s=compute_s,
        pack_s=pack_s,
        exchange_s=link_s,
        apply_s=apply_s,
        round_s=whole_s,
        link_share=link_share,
        tokens_per_s=n_peers * batches * found.tokens_per_batch / whole_s.median,
        memory_bytes=found.memory_bytes,
        device_bytes=found.device_bytes,
        ddp_bytes=ddp,
        ddp_exchange_s=ddp / link_bytes_per_s,
        verdict=_verdict(found.memory_bytes, memory_bytes, link_share),
        told=found.told,
    )


def _verdict(needed_bytes: int, memory_bytes: int, link_share: float) -> str:
    if needed_bytes > memory_bytes:
        return "needs more memory than this machine has free"
    if link_share > MUCH:
        return f"waits for the link {link_share:.0%} of the time"
    return "fits"
