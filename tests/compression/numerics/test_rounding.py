"""Stochastic rounding to bfloat16: unbiased, the same on every path; replicas that are kept so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from thinwire.compression.base import Turn
from thinwire.compression.errors import ConfigError
from thinwire.compression.fingerprint import parameter_sum
from thinwire.compression.numerics.noise import initial_values
from thinwire.compression.numerics.rounding import round_to_bfloat16, round_torch
from thinwire.optim.base import Closure, Round, Share
from thinwire.optim.registry import build_strategy


def rounded(x: Tensor, seed: int = 7, index: int = 3, start: int = 0) -> Tensor:
    out = torch.empty(x.numel(), dtype=torch.bfloat16)
    round_to_bfloat16(x, out, seed, index, start)
    return out


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


def special_values() -> Tensor:
    patterns = [
        0x7F800000,
        -0x800000,
        0x7FC00000,
        0x7F800001,
        0x7FFFFFFF,
        -1,
        0x7F7FFFFF,
        -0x80000000,
        1,
        0x80,
    ]
    return torch.tensor(patterns, dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 123_457])
def test_the_compiled_kernel_gives_the_bits_of_the_reference(start: int) -> None:
    x = torch.cat([initial_values(1, 0, 0, 70_001, 1.0), special_values()])
    reference = torch.empty(x.numel(), dtype=torch.bfloat16)
    round_torch(x, reference, 7, 3, start)
    assert torch.equal(bits(rounded(x, start=start)), bits(reference))


def test_a_shard_is_rounded_like_the_whole() -> None:
    x = initial_values(1, 0, 0, 20_000, 1.0)
    whole = rounded(x)
    for a, b in [(0, 5), (5, 4096), (4096, 4096), (4096, 19_999), (12_289, 20_000)]:
        assert torch.equal(bits(rounded(x[a:b], start=a)), bits(whole[a:b]))


def test_it_goes_to_a_neighbour_and_on_average_nowhere() -> None:
    step = 2.0**-7  # between bfloat16 values from 1 to 2
    for fraction in (0.0, 0.25, 0.5, 1 - 2.0**-16):
        for sign in (1.0, -1.0):
            x = torch.full((1 << 18,), sign * (1 + fraction * step))
            y = rounded(x).float()
            assert set(y.tolist()) <= {sign, sign * (1 + step)}
            up = float((y != sign).float().mean())
            assert up == pytest.approx(fraction, abs=0.005)


def test_seed_parameter_and_element_draw_other_bits() -> None:
    x = torch.full((4096,), 1 + 2.0**-8)
    different = [rounded(x), rounded(x, seed=8), rounded(x, index=4), rounded(x, start=4096)]
    for i, a in enumerate(different):
        assert not any(torch.equal(a, b) for b in different[:i])
    halves = rounded(x).view(2, 2048)
    assert not torch.equal(halves[0], halves[1])


def test_what_is_not_finite_stays_so() -> None:
    y = rounded(special_values())
    assert bits(y)[:6].tolist() == [0x7F80, -0x80, 0x7FC0, 0x7FC0, 0x7FC0, 0x7FC0]
    assert y[6].item() in (float("inf"), torch.finfo(torch.bfloat16).max)
    assert bits(y)[7] == -0x8000  # minus zero


def test_other_tensors_are_refused() -> None:
    out = torch.empty(4, dtype=torch.bfloat16)
    for x, y in [(torch.zeros(4, 1), out), (torch.zeros(5), out), (torch.zeros(4), torch.zeros(4))]:
        with pytest.raises(ValueError, match="flat contiguous rows"):
            round_to_bfloat16(x, y, 1, 0)


# ------------------------------------------------------------------------------------------- replicas

CONFIGS = {
    "spsa": {"name": "spsa", "lr": 1e-2, "eps": 1e-2, "probes": 4},
    "decoupled": {"name": "decoupled", "lr": 1e-3, "beta": 0.9},
}


def net() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(torch.bfloat16)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(initial_values(3, i, 0, p.numel(), 0.2).view(p.shape))
    return model


def loss_of(model: nn.Module, seed: int) -> Closure:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))
    y = x.view(64, 4, 4).sum(2).argmax(1)
    return lambda: nn.functional.cross_entropy(model(x.bfloat16()).float(), y)


def turn_of(round: int) -> Turn:
    return Turn(round, 100 + round, 200 + round, 1.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_replicas_in_bfloat16_learn_and_replay_to_the_same_bits(name: str) -> None:
    model = net()
    strategy = build_strategy(CONFIGS[name], model.named_parameters())
    before = loss_of(model, 0)().item()
    rounds, sums = [], []
    for round in range(1, 61):
        turn = turn_of(round)
        share = Share(turn.own_seed, 1, strategy.propose(lambda r=round: loss_of(model, r), turn))  # type: ignore[misc]
        strategy.check(share.payload, turn)
        strategy.apply([share], turn, "counted")
        rounds.append(Round([share], turn, None))
        sums.append([parameter_sum(t) for t in strategy.replicated_tensors().values()])
    assert loss_of(model, 0)().item() < 0.9 * before
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert len({tuple(s) for s in sums}) == 60
    again = build_strategy(CONFIGS[name], net().named_parameters())
    again.apply_many(rounds)
    assert [parameter_sum(t) for t in again.replicated_tensors().values()] == sums[-1]


def test_small_updates_are_not_lost() -> None:
    """To the nearest, steps of a hundredth of the distance to the next value would leave it where it is."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    config = {"name": "decoupled", "lr": 2.0**-14, "compressor": {"name": "dense"}}
    strategy = build_strategy(config, [("w", weight)])
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        strategy.step()
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 100 * 2.0**-14, abs=3e-4)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "a vector": lambda x: x,
    "odd rows": lambda x: x.view(-1, 7),
    "one row": lambda x: x.view(1, -1),
    "transposed": lambda x: x.view(7, -1).t().contiguous().t(),
    "every second value": lambda x: x.repeat_interleave(2)[::2].view(-1, 7),
}


@pytest.mark.parametrize("n", [7, 35, 1001])
@pytest.mark.parametrize("name", CONFIGS)
def test_neither_shape_nor_strides_change_a_bit(name: str, n: int) -> None:
    """torch 2.13 adds `alpha * x` with alpha rounded to bfloat16, and rounds products besides in tensors that
    are short (fewer than 32), odd or transposed, which it goes through value by value; `index_add_` of a
    thousand ones gives 256 in a vector and 1,000 in a matrix. (From its sources, aten/src/ATen/native/cpu;
    asked of it in this way.) Here all is float32 until it is rounded, once, by bits of our own.
    """
    values, toward = (initial_values(3, i, 0, n, 0.2).bfloat16() for i in (0, 1))
    found = {}
    for kind, shaped in SHAPES.items():
        weight = nn.Parameter(shaped(values.clone()))
        config = {"compressor": {"name": "dense"}} if name == "decoupled" else {}
        strategy = build_strategy({**CONFIGS[name], **config}, [("w", weight)])
        for round in (1, 2):
            turn = turn_of(round)
            if name == "decoupled":
                weight.grad = shaped(toward.clone())
                payload = strategy.propose_from_grad(turn)
            else:
                payload = {"codes": (torch.tensor([5, 77, 201], dtype=torch.uint8),)}
            strategy.apply([Share(turn.own_seed, 1, payload)], turn, "counted")
        found[kind] = weight.detach().reshape(-1).clone()
        if name == "decoupled":  # a momentum in bfloat16 would stop at 9.75 where it should come to 10
            assert strategy.state[weight]["momentum"].dtype == torch.float32
    assert not torch.equal(found["a vector"], values)
    for kind, values_of_it in found.items():
        assert torch.equal(values_of_it, found["a vector"]), kind


def test_diloco_says_that_it_takes_float32_only() -> None:
    with pytest.raises(ConfigError, match="replicas are float32 with Diloco"):
        build_strategy({"name": "diloco"}, net().named_parameters())
