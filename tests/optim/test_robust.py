"""Robust means: what they are, that they are exact, and that a minority of peers drags them nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from thinwire.compression.base import Compressor, Part, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.striding import Striding
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.errors import ConfigError
from thinwire.optim.base import Share, Strategy
from thinwire.optim.decoupled import Decoupled
from thinwire.optim.diloco import Diloco
from thinwire.optim.parts import byte_code
from thinwire.optim.parts.clip import Weighing
from thinwire.optim.robust.means import BY_COORDINATE, decode_by_coordinate, statistic
from thinwire.optim.spsa import CODES, Spsa

TURN = Turn(1, 5, 6, 1.0)
KINDS = sorted(BY_COORDINATE)
every_kind = pytest.mark.parametrize("kind", KINDS)
SHAPE = (20, 30)


def column(kind: str, values: Sequence[float], weights: Sequence[float] = (), n_absent: int = 0) -> float:
    """Of one coordinate that all peers have, but for `n_absent` more."""
    every = [*values, *[7.0] * n_absent]
    sent = torch.tensor([[True]] * len(values) + [[False]] * n_absent)
    weights = list(weights or [1.0] * len(every))
    (found,) = statistic(kind, torch.tensor(every)[:, None], weights, sent).tolist()
    return float(found)


# ------------------------------------------------------------------------------------------- one coordinate


def test_the_median() -> None:
    assert column("median", [5.0, -1.0, 2.0]) == 2.0
    assert column("median", [5.0, -1.0, 2.0, 4.0]) == 3.0
    assert column("median", [5.0, -1.0, 2.0], [1.0, 5.0, 1.0]) == -1.0
    assert column("median", [9.0]) == 9.0


def test_the_trimmed_mean_is_that_of_the_middle_half() -> None:
    assert column("trimmed", [1e9, 1.0, 2.0, -1e9]) == 1.5
    assert column("trimmed", [1.0, 2.0, 3.0]) == 2.0
    assert column("trimmed", [float(i) for i in (1, 100, 2, 3, 4, 5, 6, -100)]) == 3.5
    assert column("trimmed", [1.0, 2.0], [1.0, 3.0]) == 2.0  # a quarter is all that the first one has


def test_the_vote() -> None:
    assert column("vote", [1.0, 2.0, -8.0]) == 1.0  # 3 of the winners, over three
    assert column("vote", [1.0, 2.0, -8.0], [1.0, 1.0, 3.0]) == pytest.approx(-24 / 5)
    assert column("vote", [1.0, -8.0]) == 0.0
    assert column("vote", [1.0, 0.0, 0.0]) == pytest.approx(1 / 3)


@every_kind
def test_the_absent_are_zeros_below_three_senders_only(kind: str) -> None:
    """Of three on, it is the senders' statistic, times their share of the weight."""
    for values in ([3.0], [3.0, 4.0]):
        zeros = [*values, *[0.0] * (6 - len(values))]
        assert column(kind, values, n_absent=6 - len(values)) == column(kind, zeros)
    assert column(kind, [3.0, 4.0, 5.0], n_absent=3) == column(kind, [3.0, 4.0, 5.0]) / 2


@every_kind
def test_no_weight_no_say(kind: str) -> None:
    assert column(kind, [1.0, 2.0, 6.0, 1e9], [1.0, 1.0, 1.0, 0.0]) == column(kind, [1.0, 2.0, 6.0])
    assert column(kind, [1.0, 2.0], [0.0, 0.0]) == 0.0


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_the_median_is_torchs(values: list[float], seed: int) -> None:
    """And the order of the peers does not matter where they weigh alike."""
    expected = torch.tensor(values, dtype=torch.float64).quantile(0.5, interpolation="midpoint").float()
    assert column("median", values, n_absent=0) == float(expected) + 0.0
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [values[i] for i in order]
    assert column("median", shuffled) == column("median", values)
    assert column("trimmed", shuffled) == column("trimmed", values)


@every_kind
def test_nothing_is_ever_minus_zero(kind: str) -> None:
    value_SC = torch.tensor([[-0.0, -0.0, -1e-40], [0.0, -0.0, 1e-40], [-0.0, -0.0, -1e-45]])
    found = statistic(kind, value_SC, [1.0] * 3)
    assert not (found.signbit() & (found == 0)).any()


@every_kind
def test_many_coordinates_are_one_by_one(kind: str) -> None:
    value_SC = torch.randn(5, 70_000, generator=torch.Generator().manual_seed(1))
    weights = [1.0, 2.0, 0.5, 1.0, 1.0]
    found = statistic(kind, value_SC, weights)
    picked = [0, 65_535, 65_536, 69_999]
    assert torch.equal(found[picked], statistic(kind, value_SC[:, picked], weights))
    assert statistic(kind, torch.zeros(2, 0), [1.0, 1.0]).shape == (0,)


# ------------------------------------------------------------------------------------------- payloads


def row(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(600, generator=torch.Generator().manual_seed(seed)) * scale


def packs_of(compressor: Compressor, values: Sequence[Tensor]) -> list[Any]:
    return [compressor.pack(v, Part.whole(SHAPE), TURN) for v in values]


def plain_weighing(n: int) -> Weighing:
    return Weighing([1.0] * n, [1.0] * n)


@every_kind
@pytest.mark.parametrize(
    "compressor", [Dense(), Dense(bits=8), TopK(k=60, group_size=200, bits=8), Striding(rate=0.3)], ids=str
)
def test_of_a_payload_it_is_that_of_every_element(kind: str, compressor: Compressor) -> None:
    part, packs = Part.whole(SHAPE), packs_of(compressor, [row(i) for i in range(4)])
    found = decode_by_coordinate(kind, compressor, packs, plain_weighing(4), part, TURN)
    alone = torch.stack([compressor.decode([p], [1.0], part, TURN) for p in packs])
    sent = alone != 0 if isinstance(compressor, TopK) else None
    assert torch.equal(found, statistic(kind, alone, [1.0] * 4, sent))
    half = Part(SHAPE, 90, 210)
    here = decode_by_coordinate(kind, compressor, packs, plain_weighing(4), half, TURN)
    assert torch.equal(here, found[90:210])


@every_kind
def test_all_alike_is_what_one_sends(kind: str) -> None:
    for compressor in (Dense(), TopK(k=60, group_size=200, bits=8), DctTopK(k=60, group_size=200, bits=8)):
        packs = packs_of(compressor, [row(1)] * 4)
        found = decode_by_coordinate(kind, compressor, packs, plain_weighing(4), Part.whole(SHAPE), TURN)
        assert torch.equal(found, compressor.decode(packs[:1], [1.0], Part.whole(SHAPE), TURN))


# ------------------------------------------------------------------------------------------- strategies


def step_of(make: str, payloads: Sequence[Tensor], compressor: Compressor, **options: Any) -> Tensor:
    """What a round does to zeros."""
    p = nn.Parameter(torch.zeros(SHAPE))
    strategy: Strategy
    if make == "diloco":
        strategy = Diloco([("p", p)], compressor=compressor, outer_lr=1.0, outer_momentum=0.0, **options)
    else:
        sign = make == "sign"
        strategy = Decoupled([("p", p)], compressor=compressor, lr=1.0, sign=sign, **options)
    shares = [Share(i, 1, {"p": pack}) for i, pack in enumerate(packs_of(compressor, payloads))]
    strategy.apply(shares, TURN, None)
    return -p.detach().flatten()


COMPRESSORS = [Dense(), TopK(k=60, group_size=200, bits=8)]


@pytest.mark.parametrize("make", ["diloco", "plain", "sign"])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=["dense", "topk"])
@pytest.mark.parametrize("kind", [*KINDS, "centred"])
def test_two_of_eight_change_little(make: str, compressor: Compressor, kind: str) -> None:
    """They send the others' values, flipped, and twenty times as large; there is no bound here."""
    honest = [row(1) + 0.1 * row(10 + i) for i in range(6)]
    bad = [-20 * row(1) + row(i) for i in (3, 4)]
    alone, found = (step_of(make, v, compressor, aggregate=kind) for v in (honest, [*honest, *bad]))
    mean = step_of(make, [*honest, *bad], compressor)
    same_sign = (found * alone > 0).sum() / (alone != 0).sum()
    assert same_sign > 0.75
    if make != "sign":
        assert float((found - alone).norm()) < 0.7 * float(alone.norm())
        assert float((mean - alone).norm()) > float(alone.norm())


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=["dense", "topk"])
@pytest.mark.parametrize("kind", [*KINDS, "centred"])
def test_values_are_bounded_first(compressor: Compressor, kind: str) -> None:
    """An offer that is scaled down counts as one that was small from the beginning."""
    values = [row(i) for i in range(3)]
    norms = sorted(float(v.abs().sum()) for v in values)
    options = {"aggregate": kind, "bound": 2.0}
    a, b = (step_of("diloco", [*values, row(9, s)], compressor, **options) for s in (2.0**10, 2.0**20))
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * norms[0])


def test_centred_clipping_of_one_is_its_payload() -> None:
    found = step_of("diloco", [row(1)], Dense(), aggregate="centred")
    assert torch.equal(found, row(1))


def test_the_mean_over_senders_is_no_other() -> None:
    with pytest.raises(ConfigError, match="mean = 'senders' is a mean"):
        Decoupled([("p", nn.Parameter(torch.zeros(2)))], compressor=TopK(), mean="senders", aggregate="vote")


# ------------------------------------------------------------------------------------------- probes


def probes(share: int, gs: Sequence[float]) -> Share:
    codes = torch.tensor([byte_code.encode(g, 0) for g in gs], dtype=torch.uint8)
    return Share(share, len(gs), {CODES: (codes,)})


def spsa(shares: Sequence[Share], **options: Any) -> Tensor:
    p = nn.Parameter(torch.zeros(SHAPE))
    Spsa([("p", p)], lr=1.0, shared_noise=True, **options).apply(shares, TURN, None)
    return -p.detach().flatten()


@every_kind
def test_peers_with_shared_directions_have_every_statistic(kind: str) -> None:
    gs = [[1.0, -2.0], [2.0, -1.0], [0.5, -4.0], [4.0, 8.0]]
    found = spsa([probes(i, g) for i, g in enumerate(gs)], aggregate=kind)
    wanted = [column(kind, [g[i] for g in gs]) for i in (0, 1)]
    one, other = (spsa([probes(0, g)]) * 2 for g in ([1.0, 0.0], [0.0, 1.0]))
    torch.testing.assert_close(found, (one / 2 * wanted[0] + other / 2 * wanted[1]) / 2, rtol=1e-5, atol=1e-6)


def test_what_peers_with_their_own_directions_have() -> None:
    parameters = [("p", nn.Parameter(torch.zeros(2)))]
    with pytest.raises(ConfigError, match="spsa has the mean alone"):
        Spsa(parameters, lr=1.0, aggregate="median")
    with pytest.raises(ConfigError, match="spsa has mean, trimmed, median and vote"):
        Spsa(parameters, lr=1.0, aggregate="centred", shared_noise=True)
