"""Strongly convex losses with a known optimum: what DADAO claims, on a board."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from blake3 import blake3
from torch import Tensor, nn

from tests.support.gossip_board import Board
from thinwire.compression.base import Turn
from thinwire.optim.base import Closure, Share
from thinwire.optim.gossip.strategy import Gossip
from thinwire.optim.registry import build_strategy

pytestmark = pytest.mark.usefixtures("one_thread")

N, N_PEERS = 6, 4
MU, SMOOTHNESS = 0.5, 4.0
GOSSIP: dict[str, Any] = {
    "name": "gossip",
    "compressor": {"name": "dense", "bits": 32},
    "topology": "ring",
    "merge_every": "end",
    "inner_steps": 1,
}
DADAO = {**GOSSIP, "mixing": "dadao", "mu": MU, "smoothness": SMOOTHNESS}
PLAIN = {**GOSSIP, "inner": "SGD", "weight_decay": 0.0, "max_grad_norm": 0.0, "clip_neighbours": 1e6}


class Peer:
    """1/2 (x - b)^T A (x - b), with curvatures from MU to SMOOTHNESS."""

    def __init__(self, config: dict[str, Any], number: int, board: Board) -> None:
        generator = torch.Generator().manual_seed(number)
        q_NN, _ = torch.linalg.qr(torch.randn(N, N, generator=generator))
        self.a_NN = q_NN @ torch.diag(torch.linspace(MU, SMOOTHNESS, N)) @ q_NN.T
        self.b_N = 3 * torch.randn(N, generator=generator)
        self.number, self.x = number, nn.Parameter(torch.zeros(N))
        strategy = build_strategy(config, [("x", self.x)])
        assert isinstance(strategy, Gossip)
        self.strategy = strategy
        strategy.neighbours = board.of(f"peer-{number}")

    def draw(self) -> Closure:
        def loss() -> Tensor:
            return 0.5 * (self.x - self.b_N) @ self.a_NN @ (self.x - self.b_N)

        return loss

    def turn(self, round_: int) -> Turn:
        seed = int.from_bytes(blake3(f"{round_} {self.number}".encode()).digest(8))
        return Turn(round_, 1000 + round_, seed, 1.0, 0)

    def own(self) -> Tensor:
        with self.strategy.own_model():
            return self.x.detach().clone()


def errors_of(config: dict[str, Any], n_messages: int) -> list[float]:
    """RMS distance of the peers' models from the optimum, at a quarter, a half and so on of the messages."""
    board = Board([f"peer-{i}" for i in range(N_PEERS)])
    peers = [Peer(config, i, board) for i in range(N_PEERS)]
    a_NN, ab_N = sum(p.a_NN for p in peers), sum(p.a_NN @ p.b_N for p in peers)
    optimum, found, round_ = torch.linalg.solve(a_NN, ab_N), list[float](), 0
    while len(found) < 4:
        round_ += 1
        payloads = [p.strategy.propose(p.draw, p.turn(round_)) for p in peers]
        for p in peers:
            shares = [Share(1, 1, payload) for payload in payloads]
            p.strategy.apply(shares, p.turn(round_), "counted")
        if board.n_messages >= n_messages * (len(found) + 1) / 4:
            found.append(float(torch.stack([p.own() - optimum for p in peers]).square().sum(1).mean().sqrt()))
    return found


def test_it_comes_to_the_optimum_at_a_linear_rate_where_plain_gossip_with_as_many_messages_does_not() -> None:
    quarter, half, three, whole = errors_of(DADAO, 800)
    plain = errors_of({**PLAIN, "lr": 0.02}, 800)[-1]  # the best of rates from 0.005 to 0.2
    assert whole < 0.1 * plain
    factors = [half / quarter, three / half, whole / three]
    assert max(factors) < 0.5, factors


def test_a_step_after_the_merge_leads_nowhere_else() -> None:
    """Of 400 rounds two merge, 399 and the last one."""
    board = Board([f"peer-{i}" for i in range(2)])
    peers = [Peer(DADAO, i, board) for i in range(2)]
    optimum = torch.linalg.solve(sum(p.a_NN for p in peers), sum(p.a_NN @ p.b_N for p in peers))
    for round_ in range(1, 401):
        turns = [replace(p.turn(round_), n_rounds=400) for p in peers]
        payloads = [p.strategy.propose(p.draw, turn) for p, turn in zip(peers, turns, strict=True)]
        for p, turn in zip(peers, turns, strict=True):
            p.strategy.apply([Share(1, 1, payload) for payload in payloads], turn, "counted")
    assert torch.equal(peers[0].x, peers[1].x)
    assert float((peers[0].x.detach() - optimum).norm()) < 1e-4


def test_a_bad_message_and_a_loss_that_is_not_finite_change_nothing() -> None:
    board = Board(["peer-0", "peer-1"])
    board.changed = lambda sender, data: data[:-1] if sender == "peer-1" else data
    peers = [Peer(DADAO, i, board) for i in range(2)]
    peers[1].b_N = torch.full((N,), float("nan"))
    for round_ in range(1, 4):
        payloads = [p.strategy.propose(p.draw, p.turn(round_)) for p in peers]
        for p in peers:
            p.strategy.apply([Share(1, 1, payload) for payload in payloads], p.turn(round_), "counted")
    assert peers[0].strategy.counters["refused truncated"] == 2
    assert peers[1].strategy.counters["dropped_batches"] == 3
    assert peers[1].own().isfinite().all()
