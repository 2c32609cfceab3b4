"""Strategies on parameters that are sharded over a node's ranks: nothing that leaves the node depends on how
many there are, but for the rounding of its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support import shard_ranks as ranks
from tests.support.rank_processes import run_ranks
from thinwire.compression.base import Part
from thinwire.compression.errors import ConfigError
from thinwire.optim.base import Parameter
from thinwire.optim.parts.packing import owned
from thinwire.optim.parts.ranks import ALONE, local_of, parts_of, ranks_of, refuse_placement

STRATEGIES, COMPRESSORS = list(ranks.STRATEGIES), list(ranks.COMPRESSORS)
CHECKSUM_BYTES = 8
pytestmark = pytest.mark.timeout(240)  # one test waits for all ranks


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What the ranks of a node did, by how many they are and by rank."""
    return run_ranks("tests.support.shard_ranks", [1, 2, 3], tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def unsharded(worlds: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    return worlds[1][0]


@pytest.fixture(params=[2, 3])
def sharded(request: pytest.FixtureRequest, worlds: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    found = worlds[request.param]
    assert len(found) == request.param
    return found


@pytest.mark.swarm
@pytest.mark.parametrize("name", STRATEGIES)
def test_replicas_are_the_same_bit_for_bit(
    name: str, unsharded: dict[str, Any], sharded: list[dict[str, Any]]
) -> None:
    expected = unsharded["train"][name]["prints"]
    assert len(set(expected)) == ranks.N_ROUNDS
    for rank in sharded:
        assert rank["train"][name]["prints"] == expected


@pytest.mark.swarm
@pytest.mark.parametrize("name", STRATEGIES)
def test_local_work_is_the_same_but_for_rounding(
    name: str, unsharded: dict[str, Any], sharded: list[dict[str, Any]]
) -> None:
    expected = unsharded["train"][name]
    for rank in sharded:
        found = rank["train"][name]
        assert found == sharded[0]["train"][name]  # all ranks have the whole payload
        is_narrow = name.endswith("bfloat16")
        assert found["losses"] == pytest.approx(expected["losses"], rel=2e-2 if is_narrow else 1e-5)
        for ours, theirs in zip(found["payloads"], expected["payloads"], strict=True):
            a, b = (bytes.fromhex(p)[:-CHECKSUM_BYTES] for p in (ours, theirs))
            n_differing = sum(x != y for x, y in zip(a, b, strict=True))
            # A value next to the edge between two codes may fall on either side; bfloat16 rounds coarsely.
            assert is_narrow or n_differing <= 0.02 * len(a)


@pytest.mark.swarm
@pytest.mark.parametrize("name", COMPRESSORS)
def test_given_values_are_packed_to_the_same_bytes(
    name: str, unsharded: dict[str, Any], sharded: list[dict[str, Any]]
) -> None:
    assert {rank["packed"][name] for rank in sharded} == {unsharded["packed"][name]}


@pytest.mark.swarm
def test_torch_s_tools_know_what_is_sharded(sharded: list[dict[str, Any]]) -> None:
    for rank in sharded:
        assert rank["tools"] == {"whole": True, "gathered": True, "files": True}


@pytest.mark.swarm
def test_what_is_sharded_is_read_with_its_noise_before_and_after_a_forward(
    sharded: list[dict[str, Any]],
) -> None:
    """torch 2.13: `functional_call` on a module of `fully_shard` uses the old weights, without a word, unless
    it is a root of its own that is not together. So nothing here goes by it."""
    for rank in sharded:
        before, plain, after = rank["substituted"]["nothing"]
        assert before == after != plain
        for groups in ranks.GROUPS:
            assert rank["substituted"][groups] == [before, plain, after], groups


@pytest.mark.swarm
def test_collectives(sharded: list[dict[str, Any]]) -> None:
    n = len(sharded)
    for me, rank in enumerate(sharded):
        sent = [float(10 * r + me) for r in range(n) for _ in range(r + me)]
        assert rank["collectives"] == {
            "sums": [float(n), sum(map(float, range(n)))],
            "gather": [3 * r for r in range(n)],
            "broadcast": [0, 7],
            "all_to_all": sent,
            "all_to_all of others": {
                name: make(torch.tensor(sent)).float().tolist() for name, make in ranks.PIECES.items()
            },
            "broadcast_tensor": {
                name: make(torch.arange(1.0, 13.0)).float().flatten().tolist()
                for name, make in ranks.TENSORS.items()
            },
        }


def test_alone_every_parameter_is_whole() -> None:
    weight = nn.Parameter(torch.zeros(5, 3))
    assert ranks_of([weight]) is ALONE
    assert parts_of(weight, 1) == [Part((5, 3), 0, 15)]
    assert local_of(weight).data_ptr() == weight.data_ptr()
    assert ALONE.sums([2.0]) == [2.0]
    assert ALONE.gather(b"x") == [b"x"]
    assert ALONE.broadcast(b"x") == b"x"


def test_every_parameter_has_one_owner_and_loads_are_even() -> None:
    sizes = [100, 1, 7, 60, 50, 0, 30, 100]
    parameters = [
        Parameter(f"p{i}", i, nn.Parameter(torch.zeros(n)), Part.whole((n,)), {}) for i, n in enumerate(sizes)
    ]
    lists = owned(parameters, 3)
    assert sorted(p.name for list_ in lists for p in list_) == [p.name for p in parameters]
    loads = [sum(p.part.n_global for p in list_) for list_ in lists]
    assert max(loads) - min(loads) <= max(sizes) / 2


def test_the_unknown_placement_is_refused_by_name() -> None:
    class Columns:
        placements = ("Shard(dim=1)", "Replicate()")

    with pytest.raises(ConfigError, match="parameter 'w' is placed as"):
        refuse_placement("w", Columns())  # type: ignore[arg-type]
