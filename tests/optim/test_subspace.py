"""Random subspaces: what is sent, where the replica moves, and what a new draw is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.replicas import Replica, run_round
from thinwire.compression.exact import to_float32
from thinwire.compression.numerics.noise import noise
from thinwire.optim.base import Closure, Share
from thinwire.optim.subspace import NUMBERS, Subspace

pytestmark = pytest.mark.usefixtures("one_thread")

D = 12
CONFIG = {"name": "subspace", "lr": 0.02, "dimension": D, "compressor": {"name": "dense"}}


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2))


def batch(net: nn.Module, seed: int) -> Closure:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(seed))
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2] - x[:, 3]], dim=1)
    return lambda: functional.mse_loss(net(x), y)


def replica(peer: int = 0, **options: Any) -> Replica:
    return Replica({**CONFIG, **options}, peer, model(), batch, lr_factor=lambda round: 1.0)


def flat(strategy: Subspace) -> Tensor:
    return torch.cat([p.local.flatten() for p in strategy.parameters_in_order()])


def directions(peer: Replica, round_: int) -> Tensor:
    """P^T: as `noise` has it for one long parameter."""
    assert isinstance(peer.strategy, Subspace)
    key, n = peer.strategy._key(peer.turn(round_)), flat(peer.strategy).numel()
    return torch.stack([noise("sign", key, 0, i, 0, n) for i in range(D)])


def test_a_peer_sends_its_momentum_along_the_directions() -> None:
    peer = replica(beta=0.5)
    momentum = torch.zeros(flat(peer.strategy).numel())
    for round_ in (1, 2):
        batch(peer.model, 1000 * round_ + 1)().backward()
        grads = [p.tensor.grad for p in peer.strategy.parameters_in_order()]
        momentum = 0.5 * momentum + torch.cat([g.flatten() for g in grads if g is not None])
        payload = peer.decode(peer.offer(round_), round_)
        torch.testing.assert_close(
            payload[NUMBERS][0], directions(peer, round_) @ momentum, rtol=1e-4, atol=1e-4
        )


def test_a_round_moves_along_the_mean_by_the_learning_rate() -> None:
    peers = [replica(i) for i in range(3)]
    before = flat(peers[0].strategy)
    counted = run_round(peers, 1)
    sent = torch.stack([peers[0].decode(data, 1)[NUMBERS][0] for _, data in counted])
    mean = sent.mean(0)
    expected = before - CONFIG["lr"] * (mean / mean.norm()) @ directions(peers[0], 1)
    torch.testing.assert_close(flat(peers[0].strategy), expected, rtol=1e-5, atol=1e-6)


def test_what_peers_share_is_told_from_their_noise_by_the_numbers() -> None:
    peers = [replica(i) for i in range(3)]
    shares = [Share(p.seed(1), 32, p.decode(p.offer(1), 1)) for p in peers]
    alike = [shares[0], Share(1, 32, shares[0].payload)]
    turn = peers[0].turn(1)
    found, of_copies = (peers[0].strategy.noise(some, turn) for some in (shares, alike))
    assert found is not None
    assert of_copies is not None
    assert of_copies.signal > found.signal > 0.0


@pytest.mark.parametrize("every", [0, 1, 3])
def test_the_replica_stays_in_a_subspace_until_the_next_draw(every: int) -> None:
    peers = [replica(i, reseed_every=every) for i in range(2)]
    start = flat(peers[0].strategy)
    for round_ in range(1, 7):
        run_round(peers, round_)
        moved = flat(peers[0].strategy) - start
        periods = {0: 1, 1: round_, 3: 1 + (round_ - 1) // 3}[every]
        P = torch.cat([directions(peers[0], 1 + i * every) for i in range(periods)])
        outside = moved - P.T @ torch.linalg.lstsq(P.T, moved[:, None]).solution[:, 0]
        assert outside.norm() <= 1e-4 * moved.norm()
        if every and round_ % every == 0:
            assert not torch.equal(directions(peers[0], round_), directions(peers[0], round_ + 1))


def test_nobody_s_scale_matters() -> None:
    one, other = replica(), replica()
    other.batch = lambda net, seed: lambda: 1000 * batch(net, seed)()
    for round_ in (1, 2):
        run_round([one], round_)
        run_round([other], round_)
    torch.testing.assert_close(flat(one.strategy), flat(other.strategy), rtol=1e-4, atol=1e-6)


def test_no_peer_moves_more_than_its_bound() -> None:
    """A payload of a thousand times its size counts as one of a million times does."""

    def moved(times: float) -> Tensor:
        peers = [replica(i, bound=2.0) for i in range(4)]
        counted = [(p.seed(1), dict(p.decode(p.offer(1), 1))) for p in peers]
        counted[3][1][NUMBERS] = (counted[3][1][NUMBERS][0] * times,)
        shares = [Share(seed, 1, payload) for seed, payload in counted]
        peers[0].strategy.apply(shares, peers[0].turn(1), None)
        return flat(peers[0].strategy)

    thousand, million, honest = moved(1e3), moved(1e6), moved(1.0)
    torch.testing.assert_close(thousand, million, rtol=1e-5, atol=1e-6)
    assert not torch.equal(thousand, honest)


def test_new_directions_learn_more_than_the_same_ones() -> None:
    """The loss that a few directions cannot bring down, more of them do, one after the other."""

    def trained(every: int) -> float:
        peers = [replica(i, reseed_every=every) for i in range(2)]
        for p in peers:
            p.lr_factor = lambda round: to_float32(1 - round / 200)
        for round_ in range(1, 200):
            run_round(peers, round_)
        with torch.no_grad():
            return float(batch(peers[0].model, 1)())

    fresh, same = trained(1), trained(0)
    assert fresh < 0.8 * same
