"""From what was measured on this machine to a round of a swarm: a pure calculation, with its spread.

Every node is taken to be as fast as this machine, to have the same link in both directions, and to be one
that others can dial. It uploads its payload once and gets those of the others: from the coordinator as far
as the line of that goes, the rest from each other, dealt out as the coordinator does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from ...coordinator.protocol.figures import ddp_bytes
from ...coordinator.protocol.messages import INLINE_BYTES
from ...coordinator.serving.fanout import LITTLE, LITTLE_S, UPLOAD_BYTES_PER_S, deal
from ..workload import MARGIN
from .measuring import Measured

SENT_BYTES: Final = 250
"""In messages of a round, beside payloads (measured: 232, with blobs)."""

RECEIVED_BYTES: Final = 200
"""In messages and records of a round, for each peer (measured: 162, with blobs and three nodes)."""

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


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a round's exchange costs a node. `given`: copies of payloads that it sends beside its upload."""

    given: float
    sent_bytes: int
    received_bytes: int
    seconds: float


def exchange(
    payload_bytes: float,
    n_peers: int,
    link_bytes_per_s: float,
    rtt_s: float,
    work_s: float,
    coordinator_bytes_per_s: float = UPLOAD_BYTES_PER_S,
) -> Exchange:
    """`work_s`: what else a round takes; `coordinator_bytes_per_s`: of its line.

    Uploads come first, all at once; then what takes longest: what a node gets, what it gives, or what the
    coordinator sends. Offer and commit are a round trip; who asks another node for a payload waits for one
    more (`bench link`).
    """
    if payload_bytes <= INLINE_BYTES:  # inside of the commit, which comes from the coordinator alone
        got, by_coordinator, given = n_peers, float(n_peers**2), 0.0
    else:
        got, n_copies = n_peers - 1, n_peers * (n_peers - 1)
        lines = {str(i): link_bytes_per_s for i in range(n_peers)}
        little_s = max(LITTLE_S, LITTLE * work_s)
        by_coordinator = deal(n_peers, round(payload_bytes), lines, coordinator_bytes_per_s, little_s).own
        given = (n_copies - by_coordinator) / n_peers
    received_bytes = got * payload_bytes + n_peers * RECEIVED_BYTES
    uploads_s = payload_bytes * max(1 / link_bytes_per_s, n_peers / coordinator_bytes_per_s)
    copies_s = payload_bytes * max(given / link_bytes_per_s, by_coordinator / coordinator_bytes_per_s)
    return Exchange(
        given,
        round((1 + given) * payload_bytes) + SENT_BYTES,
        round(received_bytes),
        uploads_s + max(received_bytes / link_bytes_per_s, copies_s) + (2 if given else 1) * rtt_s,
    )


def estimate(
    found: Measured,
    n_peers: int,
    link_bytes_per_s: float,
    rtt_s: float,
    round_s: float,
    memory_bytes: int,
    coordinator_bytes_per_s: float = UPLOAD_BYTES_PER_S,
) -> Estimate:
    """`round_s`: that the run asks for, 0: none, every node does all the work; `memory_bytes`: that this
    machine has for a node."""
    pack_s, apply_s = Span.of(found.pack_s), Span.of(found.apply_s)
    batch_s = Span.of([s / found.n_batches for s in found.compute_s])
    batches = found.most_batches
    work_s = batch_s.median * batches + pack_s.median + apply_s.median
    exchanged = exchange(
        found.full_bytes, n_peers, link_bytes_per_s, rtt_s, round_s or work_s, coordinator_bytes_per_s
    )
    link_s = exchanged.seconds
    if round_s:
        left_s = MARGIN * round_s - link_s - pack_s.median - apply_s.median
        batches = max(1, min(batches, int(left_s / batch_s.median)))
    compute_s = batch_s.times(batches)
    beside_s = compute_s.median if found.overlaps else 0.0
    waits_s = max(0.0, link_s - beside_s)
    totals = [
        c / found.n_batches * batches + p + a + waits_s
        for c, p, a in zip(found.compute_s, found.pack_s, found.apply_s, strict=True)
    ]
    whole_s = Span.of(totals)
    ddp = ddp_bytes(n_peers, found.n_parameters)
    link_share = waits_s / whole_s.median
    return Estimate(
        strategy=found.strategy,
        rounds_measured=len(found.compute_s),
        batches=batches,
        payload_bytes=found.full_bytes,
        sent_bytes=exchanged.sent_bytes,
        received_bytes=exchanged.received_bytes,
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
