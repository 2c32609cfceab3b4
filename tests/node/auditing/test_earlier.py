"""The weights of a round that is audited come back for the audit, and the newer ones after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.local_nodes import config_of
from thinwire.node.auditing.earlier import Earlier
from thinwire.node.genesis import initialise, make_genesis
from thinwire.node.replica import Replica, build_replica
from thinwire.node.tasks.registry import make_task

SPSA: dict[str, Any] = {"name": "spsa", "lr": 1e-3}
DILOCO: dict[str, Any] = {"name": "diloco", "inner_steps": 2, "compressor": {"name": "dense"}}


def replica_of(strategy: dict[str, Any]) -> Replica:
    config = config_of(strategy)
    task = make_task(config.task, None, None)
    body = make_genesis(config, task, "coordinator", 1).body
    replica = build_replica(bytes(32), body, task, "peer-0")
    initialise(replica.model, body, config.run.seed, None)
    return replica


def values(replica: Replica) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in replica.model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def move(replica: Replica) -> None:
    with torch.no_grad():
        for p in replica.model.parameters():
            p.add_(torch.rand_like(p) + 1e-3)


def test_the_model_has_them_meanwhile_and_then_its_own_again() -> None:
    replica = replica_of(SPSA)
    before = values(replica)
    earlier = Earlier(replica)
    move(replica)
    now = values(replica)
    for _ in range(2):  # as often as it takes
        with earlier.in_place():
            assert equal(values(replica), before)
        assert equal(values(replica), now)
    with pytest.raises(ZeroDivisionError), earlier.in_place():
        raise ZeroDivisionError
    assert equal(values(replica), now)


def test_of_a_strategy_that_trains_others_in_the_model_they_are_the_outer_ones() -> None:
    """As a loop of its owner's leaves them between two rounds: the inner ones are in the model."""
    replica = replica_of(DILOCO)
    outer = values(replica)
    strategy: Any = replica.strategy
    strategy.resume()
    move(replica)
    inner = values(replica)
    earlier = Earlier(replica)
    with earlier.in_place():
        assert equal(values(replica), outer)
    assert equal(values(replica), inner)


def test_it_is_the_round_that_comes_next_when_they_are_kept() -> None:
    replica = replica_of(SPSA)
    turn, earlier = replica.turn(), Earlier(replica)
    assert earlier.round == turn.round == 1
    assert earlier.turn_of("peer-0") == turn
    assert earlier.turn_of("peer-1").own_seed != turn.own_seed
