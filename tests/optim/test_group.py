"""Strategies over a process group: equal to the swarm's arithmetic, at home in a plain loop."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import group_ranks as ranks
from tests.support.rank_processes import run_ranks
from thinwire.compression.base import Payload
from thinwire.compression.errors import ConfigError
from thinwire.optim.base import Share, turn_of_step
from thinwire.optim.group import group_optimizer, rank_seed, verify_group
from thinwire.optim.registry import build_strategy

pytestmark = pytest.mark.usefixtures("one_thread")  # as the ranks have it: sums are the same then

NAMES = list(ranks.CONFIGS)


def swarm_prints(name: str, world_size: int, steps: range) -> list[str]:
    """The same local work, and `apply` of the same shares, as a swarm's nodes would do it."""
    models = [ranks.net() for _ in range(world_size)]
    strategies = [build_strategy(ranks.CONFIGS[name], m.named_parameters()) for m in models]
    prints = []
    for step in steps:
        turns = [turn_of_step(s.counters.get("steps", 0) + 1, s.option("seed"), s.peers) for s in strategies]
        payloads: list[Payload | None] = []
        for rank, (model, strategy, turn) in enumerate(zip(models, strategies, turns, strict=True)):
            seed = rank_seed(turn.shared_seed, rank)
            turns[rank] = type(turn)(turn.round, turn.shared_seed, seed, turn.lr_factor)
            payloads.append(local_work(strategy, model, turns[rank], rank, step))
        if payloads[0] is not None:
            shares = [
                Share(turn.own_seed, s.n_batches, payload)
                for s, turn, payload in zip(strategies, turns, payloads, strict=True)
                if payload is not None
            ]
            for strategy, turn in zip(strategies, turns, strict=True):
                strategy.apply(shares, turn, "counted")
                strategy.count("steps")
                strategy.resume()
        (seen,) = {ranks.print_of(s) for s in strategies}
        prints.append(seen)
    return prints


def local_work(strategy: Any, model: Any, turn: Any, rank: int, step: int) -> Payload | None:
    loss = ranks.batch_loss(model, rank, step)
    if not strategy.needs_grad:
        payload: Payload = strategy.propose(lambda: loss, turn)
        return payload
    strategy.zero_grad()
    ranks.backward(loss())
    return None if strategy.absorb_gradients(turn) else strategy.propose_from_grad(turn)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came of the scenarios, by rank of four and by name; some are those of ranks 0 and 2 alone."""
    return run_ranks("tests.support.group_ranks", [4], tmp_path_factory.mktemp("ranks"))[4]


def of_group(results: list[dict[str, Any]], scenario: str) -> list[Any]:
    """By rank of the group that went through it."""
    return [result[scenario] for result in results if scenario in result]


@pytest.mark.swarm
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_do_what_a_swarm_does(name: str, world_size: int, results: list[dict[str, Any]]) -> None:
    by_rank = [found[name] for found in of_group(results, f"train {world_size}")]
    assert by_rank == [by_rank[0]] * world_size
    assert by_rank[0] == swarm_prints(name, world_size, range(1, 7))
    assert by_rank[0][-1] != by_rank[0][0]


@pytest.mark.swarm
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(4, 2), (2, 4)])
def test_a_state_goes_on_in_a_group_of_another_size(
    saved_by: int, loaded_by: int, results: list[dict[str, Any]]
) -> None:
    before, after = of_group(results, f"train {saved_by}"), of_group(results, f"resume {loaded_by}")
    assert len(after) == loaded_by
    for name in NAMES:
        assert all(found[name] == after[0][name] for found in after)
        assert after[0][name][0] == before[0][name][-1]
        assert after[0][name][-1] != after[0][name][0]


@pytest.mark.swarm
def test_a_loop_with_all_that_loops_do(results: list[dict[str, Any]]) -> None:
    first, second = of_group(results, "loop")
    assert first == second
    assert first["rates"] == pytest.approx([3e-3, 3e-3, 1.5e-3, 1.5e-3, 7.5e-4, 7.5e-4])
    assert len(set(first["prints"])) == 6
    assert first["n_tensors"] == 4 * 6  # each with two moments and a number of updates


@pytest.mark.swarm
def test_what_cannot_work_is_refused_by_name(results: list[dict[str, Any]]) -> None:
    first, second = (dict(said) for said in of_group(results, "refuse"))
    assert first.pop("rate").startswith("rank 1 has other parameters or options (is its learning rate the")
    assert second.pop("rate").startswith("rank 0 has other parameters or options (is its learning rate the")
    assert first == second
    assert first["options"] == "rank 1 differs from rank 0: beta is 0.5, not 0.9"
    assert "shape of weight is [3, 3], not [2, 3]" in first["shapes"]
    assert first["names"].endswith("a parameter 1.bias; a parameter 1.weight")
    assert "0.weight" in first["bits"]
    assert first["columns"].startswith("parameter 'w' is placed as (Shard(dim=1),)")
    assert first["sharded"].startswith("the parameters are sharded over ranks of this group")


@pytest.mark.swarm
def test_groups_within_the_world_and_payloads_that_check_refuses(results: list[dict[str, Any]]) -> None:
    of_pairs = of_group(results, "pairs")
    assert of_pairs[0] == of_pairs[2] != of_pairs[1] == of_pairs[3]
    assert [r["bad"] for r in of_pairs] == [0, 2, 0, 2]


def test_without_a_process_group_it_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="init_process_group first"):
        group_optimizer(ranks.CONFIGS["decoupled"], ranks.net().named_parameters())
    with pytest.raises(ConfigError, match="in no group"):
        verify_group(build_strategy(ranks.CONFIGS["decoupled"], ranks.net().named_parameters()))
