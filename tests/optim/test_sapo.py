"""Shared rollouts: what is sent, what is trained on, what is verified, and what sharing is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinwire.compression.base import Payload, Turn
from thinwire.compression.errors import BadPayload, ConfigError
from thinwire.optim.base import Share
from thinwire.optim.registry import build_strategy
from thinwire.optim.sapo import TOKENS, Group, Sapo

pytestmark = pytest.mark.usefixtures("one_thread")

N = 12
CONFIG = {
    "name": "sapo",
    "lr": 1.0,
    "inner": "SGD",
    "max_grad_norm": 0.0,
    "prompts": 2,
    "samples": 4,
    "length": 1,
    "vocabulary": N,
    "own": 2,
    "foreign": 6,
}


class Table:
    """A policy with a row of logits for each of N prompts; 5 p + 1 is the right answer to prompt p."""

    def __init__(self, logits_PV: Tensor) -> None:
        self.logits_PV = logits_PV

    def sample(self, seed: int, prompts: int, samples: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed % 2**63)
        p = self.logits_PV[asked(seed, prompts)].softmax(dim=1)
        return torch.multinomial(p, samples, replacement=True, generator=rng).to(torch.uint8)[..., None]

    def rewards(self, seed: int, tokens_PGC: Tensor) -> Tensor:
        right_P = (5 * asked(seed, len(tokens_PGC)) + 1) % N
        return (tokens_PGC[..., 0] == right_P[:, None]).float()

    def loss(self, groups: Sequence[Group]) -> Tensor:
        rows = torch.stack([asked(g.seed, g.prompt + 1)[-1] for g in groups])
        log_p = self.logits_PV[rows].log_softmax(dim=1)
        said = torch.stack([g.tokens_GC[:, 0].long() for g in groups])
        return -(log_p.gather(1, said) * torch.stack([g.advantage_G for g in groups])).mean()


def asked(seed: int, n: int) -> Tensor:
    return torch.randint(0, N, (n,), generator=torch.Generator().manual_seed(seed % 2**63))


class Peer:
    def __init__(self, number: int, **options: Any) -> None:
        self.number = number
        self.logits = nn.Parameter(torch.zeros(N, N))
        strategy = build_strategy({**CONFIG, **options}, [("logits", self.logits)])
        assert isinstance(strategy, Sapo)
        self.strategy = strategy
        self.strategy.policy = Table(self.logits)

    def turn(self, round_: int) -> Turn:
        return Turn(round_, 7, 1_000_003 * round_ + self.number, 1.0)

    def own(self) -> Tensor:
        with self.strategy.own_model():
            return self.logits.detach().clone()


def run(peers: Sequence[Peer], rounds: range) -> list[Payload]:
    payloads: list[Payload] = []
    for r in rounds:
        payloads = [p.strategy.propose(lambda: lambda: torch.zeros(()), p.turn(r)) for p in peers]
        shares = [Share(p.turn(r).own_seed, 1, payload) for p, payload in zip(peers, payloads, strict=True)]
        for p in peers:
            p.strategy.apply(shares, p.turn(r), "counted")
    return payloads


def right(peers: Sequence[Peer]) -> float:
    """The mean probability of right answers."""
    answers = (5 * torch.arange(N) + 1) % N
    p = torch.stack([peer.own().softmax(dim=1) for peer in peers])
    return float(p[:, torch.arange(N), answers].mean())


def test_models_are_the_peers_own_and_the_replica_stays() -> None:
    peers = [Peer(i) for i in range(3)]
    run(peers, range(1, 20))
    assert all(torch.equal(p.logits, torch.zeros(N, N)) for p in peers)
    assert all(p.strategy.has_own_model for p in peers)
    assert not torch.equal(peers[0].own(), peers[1].own())
    assert peers[0].strategy.merged(19, 20) == 0


def test_shared_rollouts_teach_more_than_one_s_own() -> None:
    """With as many completions of one's own."""
    shared, alone = [Peer(i) for i in range(4)], [Peer(i, foreign=0) for i in range(4)]
    for peers in (shared, alone):
        run(peers, range(1, 61))
    assert right(shared) > 1.15 * right(alone) > 1.15 / N


def test_nothing_is_believed_but_what_is_right_and_nobody_has_more_than_its_turn() -> None:
    """A peer that always says 3 is wrong nearly always, and a group that is all wrong says nothing."""
    honest, liar = Peer(0), Peer(1)
    for r in range(1, 10):
        turns = [honest.turn(r), liar.turn(r)]
        own = honest.strategy.propose(lambda: lambda: torch.zeros(()), turns[0])
        lie = {TOKENS: (torch.full_like(own[TOKENS][0], 3),)}
        liar.strategy.check(lie, turns[1])
        shares = [Share(t.own_seed, 1, p) for t, p in zip(turns, (own, lie), strict=True)]
        honest.strategy.apply(shares, turns[0], "counted")
    assert honest.strategy.counters.get("foreign", 0) == 0
    peers = [Peer(i, foreign=2, samples=16) for i in range(3)]
    run(peers, range(1, 9))
    groups = peers[0].strategy._chosen(torch.zeros(32, dtype=torch.uint8), peers[0].turn(9))
    foreign = [g.seed for g in groups if g.seed != peers[0].turn(9).own_seed]
    assert len(set(foreign)) == len(foreign) <= 2


def test_what_is_no_completion_is_refused() -> None:
    peer, turn = Peer(0), Peer(0).turn(1)
    for bad in (torch.zeros(7), torch.zeros(8), torch.full((8,), N)):
        with pytest.raises(BadPayload):
            peer.strategy.check(
                {TOKENS: (bad.to(torch.uint8 if len(bad) == 7 or bad[0] else torch.float32),)}, turn
            )
    with pytest.raises(ConfigError, match=r"strategy\.length"):
        Peer(0, length=2).strategy.propose(lambda: lambda: torch.zeros(()), turn)
    peer.strategy.policy = None
    with pytest.raises(ConfigError, match="a task that writes"):
        peer.strategy.propose(lambda: lambda: torch.zeros(()), turn)
    with pytest.raises(ConfigError, match="uses no gradients"):
        peer.strategy.step()
