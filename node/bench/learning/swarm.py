"""A swarm in lockstep: strategies as a swarm calls them, payloads as bytes, without sockets and clocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from ....compression import wire
from ....compression.base import Turn
from ....compression.errors import ThinwireError
from ....compression.exact import to_float32
from ....compression.fingerprint import fingerprint, parameter_sum
from ....optim.base import Closure, Share
from ....optim.registry import build_strategy
from ....optim.robust.weights import with_copies
from .averaging import MakeAveraging, finished, no_averaging
from .text import Learnt, Schedule, constant

LAYOUT: Final = wire.layout_hash(b"thinwire bench learning")
MAX_BYTES: Final = 2**32
_ODD: Final = 0x9E3779B97F4A7C15
"""Spreads peers' seeds over 64 bits."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What all replicas are in the end. `payload_bytes`: that a peer has sent. `curve`: payload bytes of a
    peer so far, and the held-out loss, now and then and in the end."""

    model: nn.Module
    payload_bytes: float
    curve: tuple[tuple[float, float], ...]


def train(
    text: Learnt,
    strategy: Mapping[str, Any],
    *,
    n_peers: int,
    n_rounds: int,
    schedule: Schedule = constant,
    n_points: int = 1,
    averaging: MakeAveraging = no_averaging,
) -> Trained:
    """`schedule`: over rounds; `n_points`: of the curve; `averaging`: of rounds, by all replicas alike. Every
    offer counts. Raises ConfigError, and ThinwireError if replicas differ by a bit."""
    peers = [_Peer(text, strategy, i, averaging) for i in range(n_peers)]
    payload_bytes, curve = 0, []
    for round_ in range(1, n_rounds + 1):
        factor = to_float32(schedule(round_))
        offers = [(peer.seed(round_), peer.offer(round_, factor)) for peer in peers]
        payload_bytes += sum(len(data) for _, data in offers)
        for peer in peers:
            peer.apply(round_, factor, offers)
        if round_ * n_points // n_rounds > (round_ - 1) * n_points // n_rounds:
            curve.append((payload_bytes / n_peers, peers[0].held_out()))
    if len({peer.fingerprint() for peer in peers}) != 1:
        raise ThinwireError("the replicas of a swarm in lockstep differ")
    peers[0].average.finish()
    return Trained(peers[0].model, payload_bytes / n_peers, tuple(curve))


class _Peer:
    def __init__(
        self, text: Learnt, strategy: Mapping[str, Any], number: int, averaging: MakeAveraging
    ) -> None:
        self.model, self.n_drawn = text.model(), 0
        self.average = averaging(self.model)
        self._text, self._number = text, number
        self._strategy = build_strategy(strategy, self.model.named_parameters())
        self.model.train(self._strategy.needs_grad)

    def seed(self, round_: int) -> int:
        return (self._number + 1) * _ODD + (self._text.seed << 32) + round_ & (1 << 64) - 1

    def offer(self, round_: int, factor: float) -> bytes:
        turn = self._turn(round_, factor)
        payload = self._strategy.propose(self._draw, turn)
        while self._strategy.work_ahead(self._draw, turn):
            pass
        return wire.encode(payload, self._strategy.fields(turn), round_, LAYOUT)

    def apply(self, round_: int, factor: float, offers: list[tuple[int, bytes]]) -> None:
        turn, sent = self._turn(round_, factor), [data for _, data in offers]
        fields, shares = self._strategy.fields(turn), list[Share]()
        for seed, data in offers:
            payload = wire.decode(data, fields, round_, LAYOUT, MAX_BYTES)
            self._strategy.check(payload, turn)
            shares.append(Share(seed, 1, payload))
        self._strategy.apply(with_copies(shares, sent), turn, "counted")
        self.average.stepped()

    def held_out(self) -> float:
        with finished(self.average, self.model):
            loss = self._text.loss(self.model)
        self.model.train(self._strategy.needs_grad)
        return loss

    def fingerprint(self) -> bytes:
        sums = {name: parameter_sum(t) for name, t in self._strategy.replicated_tensors().items()}
        return fingerprint(sums)

    def _draw(self) -> Closure:
        self.n_drawn += 1
        return self._text.batch(self.model, self._number, self.n_drawn)

    def _turn(self, round_: int, factor: float) -> Turn:
        shared_seed = 0xABCDEF0123456789 + (self._text.seed << 32) + round_
        return Turn(round_, shared_seed, self.seed(round_), factor)
