"""What a learning rate means, and what new runs have where their file says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from thinwire.compression.base import Compressor, Part, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.random_k import RandomK
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.errors import ConfigError
from thinwire.optim.base import Share
from thinwire.optim.decoupled import Decoupled
from thinwire.optim.parts import byte_code
from thinwire.optim.registry import build_strategy, complete_config, complete_new_run, of_new_run
from thinwire.optim.rules import warning_of
from thinwire.optim.spsa import CODES

TURN = Turn(1, 5, 6, 1.0)
PART = Part.whole((100, 200))
COMPRESSORS: list[Compressor] = [
    Dense(),
    RandomK(rate=1 / 32),
    TopK(k=8, group_size=400, bits=8),
    DctTopK(k=1, group_size=640, bits=8),
    DctTopK(k=2, group_size=1024, layout="tiles", bits=8),
]


def packs_of(compressor: Compressor, n: int) -> list[Any]:
    draw = torch.Generator().manual_seed(n)
    return [compressor.pack(torch.randn(PART.n_global, generator=draw), PART, TURN) for _ in range(n)]


@pytest.mark.parametrize("n_packs", [1, 4])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: type(c).__name__)
def test_the_share_that_moves_is_about_what_does(compressor: Compressor, n_packs: int) -> None:
    mean = compressor.decode(packs_of(compressor, n_packs), [1.0] * n_packs, PART, TURN)
    moved = float((mean != 0).float().mean())
    assert compressor.moved_share(PART, n_packs) == pytest.approx(moved, rel=0.15)


@pytest.mark.parametrize("n", [1, 10, 40, 2500])
@pytest.mark.parametrize(
    "compressor",
    [
        TopK(k=32, group_size=4096, bits=8),
        DctTopK(k=4, group_size=4096, bits=8),
        DctTopK(k=2, group_size=1024, layout="tiles", bits=8),
    ],
    ids=str,
)
def test_so_it_is_of_vectors_and_short_groups(compressor: Compressor, n: int) -> None:
    """Of these more than k of group_size is sent, and none are cut into tiles: a scalar always moves."""
    part, draw, moved, n_rounds = Part.whole((n,)), torch.Generator().manual_seed(n), 0.0, 20
    for _ in range(n_rounds):
        packs = [compressor.pack(torch.randn(n, generator=draw), part, TURN) for _ in range(3)]
        mean = compressor.decode(packs, [1.0] * 3, part, TURN)
        moved += float((mean != 0).float().mean()) / n_rounds
    assert compressor.moved_share(part, 3) == pytest.approx(moved, rel=0.2)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: type(c).__name__)
def test_signs_move_all_parameters_as_far_as_lr_says_in_the_square(compressor: Compressor) -> None:
    """Whatever the compressor: the step's root mean square is lr. Decay goes by lr itself."""
    p = nn.Parameter(torch.zeros(PART.shape))
    strategy = Decoupled([("p", p)], compressor=compressor, lr=0.01, lr_scale="rule")
    shares = [Share(i, 1, {"p": packed}) for i, packed in enumerate(packs_of(compressor, 3))]
    strategy.apply(shares, TURN, None)
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.01, rel=0.1)


def stepped(shares: list[tuple[int, int]], **options: Any) -> torch.Tensor:
    """By shares of (seed, number of probes), each of which says 1."""
    p = nn.Parameter(torch.zeros(300))
    strategy = build_strategy(
        {"name": "spsa", "lr": 0.5, "probes": 4, "max_probes": 64, **options}, [("p", p)]
    )
    code = byte_code.encode(1.0, 0)
    payloads = [{CODES: (torch.full((n,), code, dtype=torch.uint8),)} for _, n in shares]
    strategy.apply([Share(s, n, pl) for (s, n), pl in zip(shares, payloads, strict=True)], TURN, None)
    return -p.detach()


@pytest.mark.parametrize("bound", [0.0, 2.0])
def test_the_rate_of_a_probe_is_the_same_in_any_swarm(bound: float) -> None:
    """Two peers move the parameters as far as both of them alone, one after the other."""
    rule = {"lr_scale": "rule", "bound": bound}
    alone = [stepped([share], **rule) for share in ((1, 4), (2, 2))]
    assert torch.allclose(stepped([(1, 4), (2, 2)], **rule), alone[0] + alone[1], atol=1e-5)
    assert torch.equal(stepped([(1, 1)], **rule), stepped([(1, 1)], bound=bound))


def test_more_probes_than_the_runs_make_no_longer_step() -> None:
    """They do in none of the two: as many as `probes` count in the rate, and all in the mean."""
    assert torch.allclose(stepped([(1, 64)], lr_scale="rule"), 4 * stepped([(1, 64)]), atol=1e-5)


def test_along_shared_directions_peers_make_no_longer_step() -> None:
    rule = {"lr_scale": "rule", "shared_noise": True}
    assert torch.allclose(stepped([(1, 4), (2, 4), (3, 4)], **rule), stepped([(1, 4)], **rule), atol=1e-5)


def test_a_root_and_the_rule_are_two_rules() -> None:
    with pytest.raises(ConfigError, match="a rule of its own"):
        stepped([(1, 4)], scale="sqrt", lr_scale="rule")
    assert of_new_run({"name": "spsa", "lr": 1.0, "scale": "sqrt"})["lr_scale"] == "none"


# ------------------------------------------------------------------------------------------- new runs

LOCO = {
    "mean": "senders",
    "sender_floor": 0.25,
    "outer_lr": 1.0,
    "outer_momentum": 0.0,
    "feedback_decay": 0.95,
}
PLAIN = {"mean": "all", "sender_floor": 0.0, "outer_lr": 0.7, "outer_momentum": 0.6, "feedback_decay": 1.0}
NEW: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"name": "diloco"}, PLAIN),
    ({"name": "diloco", "compressor": {"name": "topk"}}, LOCO),
    ({"name": "diloco", "compressor": {"name": "dct_topk"}}, LOCO),
    ({"name": "diloco", "compressor": {"name": "striding"}}, PLAIN),
    (
        {"name": "diloco", "compressor": {"name": "topk"}, "aggregate": "vote"},
        {**LOCO, "mean": "all", "sender_floor": 0.0},
    ),
    (
        {"name": "diloco", "compressor": {"name": "topk"}, "outer_lr": 0.5, "sender_floor": 0.5},
        {**LOCO, "outer_lr": 0.5, "sender_floor": 0.5},
    ),
    ({"name": "decoupled"}, {"mean": "all", "sender_floor": 0.0, "lr_scale": "rule", "adam_beta1": 0.9}),
    ({"name": "decoupled", "mean": "senders"}, {"sender_floor": 0.25}),
    ({"name": "decoupled", "base": "adamw"}, {"mean": "senders", "adam_beta1": 0.0, "adam_beta2": 0.95}),
    ({"name": "decoupled", "base": "adamw", "beta": 0.0}, {"adam_beta1": 0.9, "adam_beta2": 0.999}),
]


@pytest.mark.parametrize(("said", "expected"), NEW)
def test_what_a_new_run_has_follows_its_compressor(said: dict[str, Any], expected: Mapping[str, Any]) -> None:
    found = complete_new_run(said)
    assert {key: found[key] for key in expected} == expected
    assert {key: found[key] for key in said if key != "compressor"} == {
        key: said[key] for key in said if key != "compressor"
    }
    build_strategy(found, [("p", nn.Parameter(torch.zeros(3)))])


@pytest.mark.parametrize("beta", ["0.9", None, [0.9]])
def test_what_is_no_number_is_refused_in_words_although_a_rule_asks_for_it(beta: object) -> None:
    said = {"name": "decoupled", "base": "adamw", "beta": beta}
    with pytest.raises(ConfigError, match=r"beta = .*must be a number >= 0 and < 1"):
        build_strategy(of_new_run(said), [("p", nn.Parameter(torch.zeros(3)))])


def test_diloco_has_another_compressor_in_new_runs() -> None:
    assert complete_new_run({"name": "diloco"})["compressor"].items() >= {"name": "dense", "bits": 4}.items()
    assert complete_config({"name": "diloco"})["compressor"]["name"] == "dct_topk"


@pytest.mark.parametrize("name", ["decoupled", "diloco", "spsa"])
def test_a_record_that_does_not_know_a_rule_means_what_was_before_it(name: str) -> None:
    """Also where the run is gone on with by a file that says nothing of it."""
    said = {"name": name, **({"lr": 1e-3} if name == "spsa" else {})}
    new = {"mean", "sender_floor", "lr_scale"}
    older = {key: value for key, value in complete_config(said).items() if key not in new}
    assert {k: v for k, v in complete_config(older).items() if k in new} == {
        k: v for k, v in {"mean": "all", "sender_floor": 0.0, "lr_scale": "none"}.items()
        if k in complete_config(said)
    }  # fmt: skip
    assert complete_config(of_new_run(said, older)) == complete_config(older)


def test_momentum_of_few_rounds_is_told() -> None:
    options = complete_new_run({"name": "diloco"})
    told = warning_of(options, 20)
    assert told is not None
    assert "outer_momentum = 0.6 in 20 rounds" in told
    assert warning_of(options, 50) is None
    assert warning_of({**options, "outer_momentum": 0.0}, 20) is None
    assert warning_of(complete_new_run({"name": "decoupled"}), 20) is None
