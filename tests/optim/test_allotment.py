"""A peer's own share of a round's work and bytes: receivers take it like any other offer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinwire.compression import wire
from thinwire.compression.base import Part, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.sparse import Sparse
from thinwire.compression.codecs.topk import TopK
from thinwire.optim.base import Allotment, Closure, Share, Strategy
from thinwire.optim.registry import build_strategy

TURN = Turn(round=1, shared_seed=1, own_seed=2, lr_factor=1.0)
TOPK = {"name": "topk", "k": 4, "group_size": 64, "bits": 2}
STRATEGIES: list[dict[str, Any]] = [
    {"name": "decoupled", "lr": 0.1, "accumulate": 6, "compressor": TOPK},
    {"name": "decoupled", "lr": 0.1, "accumulate": 3, "replicate_every": 2, "compressor": TOPK},
    {"name": "diloco", "inner_steps": 6, "compressor": TOPK},
    {"name": "spsa", "lr": 0.1, "probes": 6},
]


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(64, 20)


def drawer(model: nn.Module, drawn: list[Tensor]) -> Any:
    def draw() -> Closure:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(len(drawn)))
        drawn.append(x)
        return lambda: model(x).square().mean()

    return draw


@pytest.mark.parametrize("config", STRATEGIES, ids=lambda c: f"{c['name']}-{len(c)}")
@pytest.mark.parametrize(("allotted", "n"), [(None, 6), (1, 1), (4, 4), (100, 6), (0, 1)])
def test_as_many_batches_are_drawn_as_are_allotted(
    config: dict[str, Any], allotted: int | None, n: int
) -> None:
    model, drawn = model_of(), list[Tensor]()
    strategy = build_strategy(config, model.named_parameters())
    assert strategy.most_batches == 6
    strategy.allotted = Allotment(allotted)
    payload = strategy.propose(drawer(model, drawn), TURN)
    every = config.get("replicate_every", 1)
    assert len(drawn) == max(every, n // every * every)
    strategy.check(payload, TURN)
    strategy.apply([Share(2, len(drawn), payload)], TURN, "counted")


@pytest.mark.parametrize("config", STRATEGIES[::2], ids=lambda c: c["name"])
def test_what_is_not_sent_is_kept(config: dict[str, Any]) -> None:
    """Half of the groups: fewer bytes, and what is left over is what it would be without the other half."""
    sizes, kept = {}, {}
    for share in (1.0, 0.5, 0.01):
        model = model_of()
        strategy = build_strategy(config, model.named_parameters())
        strategy.allotted = Allotment(None, share)
        payload = strategy.propose(drawer(model, []), TURN)
        strategy.check(payload, TURN)
        sizes[share] = len(wire.encode(payload, strategy.fields(TURN), TURN.round, bytes(8)))
        kept[share] = leftovers(strategy)
        for p in strategy.parameters_in_order():
            sent = strategy.compressor.decode([payload[p.name]], [1.0], p.part, TURN)  # type: ignore[attr-defined]
            kept[share][p.name] = kept[share][p.name] + sent
    assert sizes[0.01] < sizes[0.5] < sizes[1.0]
    for name, whole in kept[1.0].items():
        torch.testing.assert_close(kept[0.5][name], whole)
        torch.testing.assert_close(kept[0.01][name], whole)


def leftovers(strategy: Strategy) -> dict[str, Tensor]:
    entry = (
        "momentum" if "momentum" in strategy.state[strategy.parameters_in_order()[0].tensor] else "leftover"
    )
    return {p.name: strategy.state[p.tensor][entry].flatten() for p in strategy.parameters_in_order()}


@pytest.mark.parametrize("indices", ["packed", "rice"])
@pytest.mark.parametrize("kind", [TopK, DctTopK])
def test_the_strongest_groups_are_those_that_are_sent(kind: type[Sparse], indices: Any) -> None:
    compressor = kind(k=4, group_size=64, bits=8, indices=indices)
    part = Part.whole((10, 70))
    x = torch.randn(700, generator=torch.Generator().manual_seed(1))
    x[128:192] *= 100
    x[640:] *= 10
    x[:64] = 0
    packed = compressor.pack(x, part, TURN)
    for share, groups in ((0.2, {2, 10}), (0.001, {2}), (0.1, {2})):
        fewer = compressor.strongest(packed, part, share)
        compressor.check(fewer, part, TURN)
        assert set(fewer[0].nonzero().view(-1).tolist()) == groups
        both = compressor.decode([fewer], [1.0], part, TURN), compressor.decode([packed], [1.0], part, TURN)
        for group in range(11):
            here = slice(group * 64, group * 64 + 64)
            expected = both[1][here] if group in groups else torch.zeros_like(both[1][here])
            assert torch.equal(both[0][here], expected)
    all_of_it = compressor.strongest(packed, part, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(all_of_it, packed, strict=True))


def test_offers_may_count_by_their_samples() -> None:
    """Without signs: three samples here, one there; `clip` bounds what one offer can claim."""
    dense = {"name": "dense"}
    config = {"name": "decoupled", "lr": 1.0, "sign": False, "weights": "samples", "compressor": dense}
    moved = {}
    for counts in ((3, 1), (3_000_000, 1), (1, 1)):
        models = [model_of(0), model_of(0)]
        strategies = [build_strategy(config, model.named_parameters()) for model in models]
        payloads = []
        for sign, strategy in zip((1.0, -1.0), strategies, strict=True):
            for p in strategy.parameters_in_order():
                p.tensor.grad = torch.full_like(p.tensor, sign)
            payloads.append(strategy.propose_from_grad(TURN))
        shares = [Share(i, n, payload) for i, (n, payload) in enumerate(zip(counts, payloads, strict=True))]
        before = models[0].weight.detach().clone()
        strategies[0].apply(shares, TURN, "counted")
        moved[counts] = float((before - models[0].weight.detach()).mean())
    assert moved[3, 1] == pytest.approx(0.5, rel=1e-3)
    assert moved[1, 1] == pytest.approx(0.0, abs=1e-6)
    assert 0.9 < moved[3_000_000, 1] <= 1.0
