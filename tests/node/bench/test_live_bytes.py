"""Counting what tensors take."""

from __future__ import annotations

import torch

from thinwire.node.bench.live_bytes import LiveBytes
from thinwire.node.bench.memory import _alone, _measured
from thinwire.optim.diloco import Diloco
from thinwire.optim.gossip.strategy import Gossip
from thinwire.optim.subspace import Subspace


def test_memory_counts_once_and_until_it_is_given_back() -> None:
    given = torch.ones(100)
    with LiveBytes([given, given.view(10, 10)]) as live:
        assert live.bytes() == 400
        double = given.double()
        assert live.bytes() == 400 + 800
        view = double[:3]
        assert live.bytes() == 400 + 800
        del double
        assert live.bytes() == 400 + 800  # the view keeps it
        del view
        assert live.bytes() == 400
        given.add_(1.0)
    assert live.peak_bytes == 400 + 800


def test_gradients_are_seen() -> None:
    weight = torch.nn.Parameter(torch.ones(1000))
    with LiveBytes([weight.detach()]) as live:
        (weight * 2.0).sum().backward()  # type: ignore[no-untyped-call]
        assert live.bytes() == 2 * 4000
        weight.grad = None
        assert live.bytes() == 4000


def test_a_node_of_one_rank_holds_the_state_and_little_else() -> None:
    found = _measured(0, 1, 1_000_000, meeting=None)
    assert found["n_state_bytes"] <= found["peak_bytes"] <= 1.3 * found["n_state_bytes"]


def test_what_inner_steps_do_not_need_can_wait_elsewhere() -> None:
    """Largest parameters, which a quarter of such a model is, come on top."""
    plain, spared = (_alone(name, 200_000, layers=2) for name in ("diloco", "diloco_offload_idle"))
    assert spared < 23
    assert plain >= Diloco.facts.bytes_per_parameter({}) == 28.0


def test_what_doctor_says_of_others_is_what_they_hold() -> None:
    """With a neighbour's message, that and the own one, packed to 8 bits, and a model come on top."""
    subspace, gossip = (_alone(name, 200_000, layers=2) for name in ("subspace", "gossip"))
    assert subspace >= Subspace.facts.bytes_per_parameter({}) - 0.1
    assert Gossip.facts.bytes_per_parameter({}) - 6 <= gossip <= Gossip.facts.bytes_per_parameter({})
