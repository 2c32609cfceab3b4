"""Replicas of a swarm in one process: they exchange the bytes of their payloads, which offers are lost is
scripted, and what makes a replica (config, model, batches, schedule) is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from thinwire.compression import wire
from thinwire.compression.base import Payload, Turn
from thinwire.compression.errors import BadPayload
from thinwire.compression.exact import to_float32
from thinwire.compression.fingerprint import fingerprint, parameter_sum
from thinwire.optim.base import Closure, Own, Round, Share, Strategy
from thinwire.optim.registry import build_strategy
from thinwire.optim.robust.weights import with_copies

LAYOUT = wire.layout_hash(b"the layout of this suite")
MAX_BYTES = 1 << 20

Batch = Callable[[nn.Module, int], Closure]
"""The batch of a seed, for a model."""


@dataclass
class Replica:
    """One peer: model, strategy, and the bytes of what it offers."""

    config: dict[str, Any]
    peer: int
    model: nn.Module
    batch: Batch
    lr_factor: Callable[[int], float] = lambda round: 1 / round
    run: int = 0
    """Another run has other noise."""
    strategy: Strategy = field(init=False)

    def __post_init__(self) -> None:
        self.strategy = build_strategy(self.config, self.model.named_parameters())
        self.model.train(self.strategy.needs_grad)

    def seed(self, round: int) -> int:
        return (self.peer + 1) * 0x9E3779B97F4A7C15 + (self.run << 32) + round & (1 << 64) - 1

    def turn(self, round: int) -> Turn:
        shared_seed = 0xABCDEF0123456789 + (self.run << 32) + round
        return Turn(round, shared_seed, self.seed(round), to_float32(self.lr_factor(round)))

    def offer(self, round: int) -> bytes:
        """The bytes; what can be done ahead of the commit is done."""
        n_drawn = 0

        def draw() -> Closure:
            nonlocal n_drawn
            n_drawn += 1
            return self.batch(self.model, 1000 * round + 100 * self.peer + n_drawn)

        payload = self.strategy.propose(draw, self.turn(round))
        while self.strategy.work_ahead(draw, self.turn(round)):
            pass
        return wire.encode(payload, self.strategy.fields(self.turn(round)), round, LAYOUT)

    def decode(self, data: bytes, round: int) -> Payload:
        return wire.decode(data, self.strategy.fields(self.turn(round)), round, LAYOUT, MAX_BYTES)

    def read(self, round: int, seeds_and_bytes: Sequence[tuple[int, bytes]], own: Own) -> Round:
        """As a node does it: what does not pass `check` is left out."""
        turn, shares, sent = self.turn(round), list[Share](), list[bytes]()
        for seed, data in seeds_and_bytes:
            payload = self.decode(data, round)
            try:
                self.strategy.check(payload, turn)
            except BadPayload:
                continue
            shares.append(Share(seed, 1, payload))
            sent.append(data)
        return Round(with_copies(shares, sent), turn, own)

    def apply(self, round: int, seeds_and_bytes: Sequence[tuple[int, bytes]], own: Own) -> None:
        r = self.read(round, seeds_and_bytes, own)
        self.strategy.apply(r.shares, r.turn, r.own)

    def print(self) -> str:
        sums = {name: parameter_sum(t) for name, t in self.strategy.replicated_tensors().items()}
        return fingerprint(sums).hex()


def run_round(
    replicas: Sequence[Replica], round: int, lost: set[int] | None = None
) -> list[tuple[int, bytes]]:
    """Everybody proposes; the offers of `lost` peers miss the commit; everybody applies it."""
    lost = lost or set()
    offers = {r.peer: r.offer(round) for r in replicas}
    counted = [(r.seed(round), offers[r.peer]) for r in replicas if r.peer not in lost]
    for r in replicas:
        r.apply(round, counted, "missed" if r.peer in lost else "counted")
    return counted
