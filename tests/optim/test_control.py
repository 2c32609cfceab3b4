"""`control = "scaffold"`: SCALLION and SCAFCOM against the paper's own form, drift, state, record 0."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinwire.compression.base import Payload, Turn
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.errors import ConfigError
from thinwire.optim.base import Own, Share
from thinwire.optim.diloco import Diloco
from thinwire.optim.registry import build_strategy, complete_config, complete_new_run, recorded_config

pytestmark = pytest.mark.usefixtures("one_thread")

N, STEPS, LR = 12, 5, 0.05
OPTIONS: dict[str, Any] = {
    **{"compressor": Dense(bits=32), "inner": {"name": "SGD"}, "inner_steps": STEPS, "lr": LR},
    **{"weight_decay": 0.0, "max_grad_norm": 0.0, "weights": "equal", "clip": 1e9},
    **{"outer_lr": 1.0, "outer_momentum": 0.0, "control": "scaffold", "control_decay": 1.0},
}
TARGETS = torch.stack([torch.linspace(-1, 1, N) * (i - 1) + i for i in range(3)])
CURVATURES = torch.stack([torch.linspace(0.2, 3, N) ** (i - 1) for i in range(3)])
"""Peer i's loss is curvature_i (x - target_i)^2 / 2, element by element."""


def seed_of(peer: int, round_: int) -> int:
    return 1000 * peer + round_


class Peer:
    def __init__(self, number: int, **options: Any) -> None:
        self.number = number
        self.x = nn.Parameter(torch.zeros(N))
        self.strategy = Diloco([("x", self.x)], **{**OPTIONS, **options})

    def turn(self, round_: int) -> Turn:
        return Turn(round_, 7 + round_, seed_of(self.number, round_), 1.0)

    def propose(self, round_: int) -> Share:
        def loss() -> Tensor:
            return (CURVATURES[self.number % 3] * (self.x - TARGETS[self.number % 3]) ** 2).sum() / 2

        payload: Payload = self.strategy.propose(lambda: loss, self.turn(round_))
        return Share(seed_of(self.number, round_), 1, payload)

    def apply(self, shares: Sequence[Share], round_: int) -> None:
        own: Own = "counted" if any(s.seed == seed_of(self.number, round_) for s in shares) else "missed"
        self.strategy.apply(shares, self.turn(round_), own)

    def state(self, entry: str) -> Tensor:
        value: Tensor = self.strategy.state[self.x][entry]
        return value


def train(peers: Sequence[Peer], rounds: range, lost: Sequence[int] = ()) -> Tensor:
    """`lost`: whose offers do not count."""
    for round_ in rounds:
        shares = [peer.propose(round_) for peer in peers]
        counted = [s for s, peer in zip(shares, peers, strict=True) if peer.number not in lost]
        for peer in peers:
            peer.apply(counted, round_)
    return peers[0].x.detach().clone()


def swarm(n: int = 3, **options: Any) -> list[Peer]:
    return [Peer(i, **options) for i in range(n)]


def reference(n_rounds: int, rate: float, momentum: float) -> Tensor:
    """As the paper has it: variates are gradients."""
    x, c, own, v = torch.zeros(N), torch.zeros(N), torch.zeros(3, N), torch.zeros(3, N)
    for round_ in range(n_rounds):
        sent = []
        for i in range(3):
            y = x.clone()
            for _ in range(STEPS):
                y -= LR * (CURVATURES[i] * (y - TARGETS[i]) - own[i] + c)
            estimate = (x - y) / (LR * STEPS) + own[i] - c
            v[i] = estimate if round_ == 0 else (1 - momentum) * v[i] + momentum * estimate
            sent.append(rate * (v[i] - own[i]))
        mean = torch.stack(sent).mean(0)
        x = x - LR * STEPS * (c + mean)
        c = c + mean
        own += torch.stack(sent)
    return x


@pytest.mark.parametrize(("rate", "momentum"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.3)])
def test_with_sgd_inside_it_is_the_paper_s(rate: float, momentum: float) -> None:
    x = train(swarm(control_rate=rate, control_momentum=momentum), range(1, 9))
    assert torch.allclose(x, reference(8, rate, momentum), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compressor", [Dense(bits=32), TopK(k=4, group_size=12, bits=8)])
def test_uneven_peers_find_the_optimum_of_all(compressor: Any) -> None:
    """Each goes to its own in a round: the mean of that is another point."""
    best = (CURVATURES * TARGETS).sum(0) / CURVATURES.sum(0)

    def away(**options: Any) -> float:
        found = train(swarm(compressor=compressor, mean="all", **options), range(1, 151))
        return float((found - best).norm() / best.norm())

    assert away(control="none", control_decay=0.95) > 5 * away(control_decay=0.95)


def test_all_have_the_same_replica_also_who_only_follows() -> None:
    peers, follower = swarm(), Peer(9)
    for round_ in range(1, 6):
        shares = [peer.propose(round_) for peer in peers]
        for peer in peers:
            peer.apply(shares, round_)
        follower.strategy.apply(shares, follower.turn(round_), None)
    replicas = [p.strategy.replicated_tensors() for p in (*peers, follower)]
    assert set(replicas[0]) == {"x", "x:control_mean"}
    for other in replicas[1:]:
        assert all(torch.equal(other[name], t) for name, t in replicas[0].items())
    # With decay 1 and all offers counted the mean of control is the mean of the peers'.
    own = torch.stack([p.state("control") for p in peers]).mean(0)
    assert torch.allclose(own, peers[0].state("control_mean"), atol=1e-6)
    follower.propose(6)
    assert torch.equal(follower.state("control"), follower.state("control_mean")), "it changes no mean"


def test_who_is_gone_fades_and_a_missed_offer_is_nobody_s() -> None:
    peers = swarm(control_decay=0.5)
    train(peers, range(1, 4))
    before = peers[2].state("control").clone()
    train(peers, range(4, 6), lost=[2])
    assert torch.equal(peers[2].state("control"), before * 0.25)
    left = peers[:2]
    train(left, range(6, 26))
    own = torch.stack([p.state("control") for p in left]).mean(0)
    assert torch.allclose(own, left[0].state("control_mean"), atol=1e-5)


def test_control_goes_on_from_a_state_and_from_the_ledger_alike() -> None:
    peers = swarm()
    train(peers, range(1, 4))
    saved, x = copy.deepcopy(peers[1].strategy.state_dict()), peers[1].x.detach().clone()
    ledger = []
    for round_ in range(4, 7):
        shares = [peer.propose(round_) for peer in peers]
        ledger.append(shares)
        for peer in peers:
            peer.apply(shares, round_)
    again = Peer(1)
    with torch.no_grad():
        again.x.copy_(x)
    again.strategy.load_state_dict(saved)
    for round_, shares in enumerate(ledger, 4):
        again.apply(shares, round_)
    assert torch.equal(again.x, peers[1].x)
    for entry in ("control", "control_mean"):
        assert torch.equal(again.state(entry), peers[1].state(entry))
    assert torch.equal(again.propose(7).payload["x"][0], peers[1].propose(7).payload["x"][0])


def test_a_replica_that_was_moved_begins_with_the_mean() -> None:
    peers = swarm()
    train(peers, range(1, 4))
    peers[0].strategy.apply([], replace(peers[0].turn(9)), None)
    assert "control" not in peers[0].strategy.state[peers[0].x]


def test_record_0_has_control_only_where_it_is_used() -> None:
    plain = recorded_config(complete_new_run({"name": "diloco", "compressor": {"name": "topk"}}))
    assert not [key for key in plain if "control" in key]
    assert plain["mean"] == "senders"
    whole = complete_config(plain)
    assert {key: whole[key] for key in plain} == plain
    used = recorded_config(
        complete_new_run({"name": "diloco", "compressor": {"name": "topk"}, "control": "scaffold"})
    )
    assert used["control"] == "scaffold"
    assert used["control_decay"] == 0.95
    assert (used["mean"], used["outer_lr"], used["outer_momentum"]) == ("all", 0.7, 0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control": "scaffold", "fragments": 2}, "fragments = 1 is needed"),
        ({"control": "scaffold", "mean": "senders", "weights": "equal"}, "mean = 'all' is needed"),
        ({"control_decay": 0.5}, "does nothing without control"),
        ({"control": "scafold"}, "scaffold"),
    ],
)
def test_what_does_not_go_with_control_is_refused(options: dict[str, Any], message: str) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=message):
        build_strategy(
            {"name": "diloco", "compressor": {"name": "dense"}, **options}, model.named_parameters()
        )


def test_audits_say_nothing_of_changes_of_control() -> None:
    peer = Peer(0)
    share = peer.propose(1)
    assert peer.strategy.audit([share.payload], lambda: peer.x.sum, [peer.turn(1)], 3) == [None]
    assert peer.strategy.scores([share.payload], peer.turn(1)) is None
