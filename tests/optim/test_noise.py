"""The gradient noise scale across peers: of payloads whose noise is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from thinwire.compression.base import Part, Turn
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.topk import TopK
from thinwire.optim.base import Noise, Share, Strategy
from thinwire.optim.decoupled import Decoupled
from thinwire.optim.diloco import Diloco
from thinwire.optim.spsa import Spsa

N_PARAMS, DEVIATION, SIGNAL = 4096, 0.5, 2.0
TRUE_SCALE = N_PARAMS * DEVIATION**2 / SIGNAL**2
"""256 samples: tr S of one sample over |G|^2."""


def named() -> list[tuple[str, nn.Parameter]]:
    return [("w", nn.Parameter(torch.zeros(64, 64)))]


def payload_shares(
    compressor: Dense | TopK, n_samples: Sequence[int], seed: int, scales: Sequence[float] = ()
) -> list[Share]:
    """Gradients of length SIGNAL, and the noise of so many samples."""
    rng = torch.Generator().manual_seed(seed)
    gradient = torch.randn(N_PARAMS, generator=torch.Generator().manual_seed(99))
    gradient *= SIGNAL / gradient.norm()
    shares = []
    for n, scale in zip(n_samples, scales or [1.0] * len(n_samples), strict=True):
        x = (gradient + torch.randn(N_PARAMS, generator=rng) * DEVIATION / n**0.5) * scale
        packed = compressor.pack(x, Part.whole((64, 64)), turn(seed))
        shares.append(Share(seed, n, {"w": packed}))
    return shares


def turn(round_: int) -> Turn:
    return Turn(round_, 5, 6, 1.0)


def scale_of(strategy: Strategy, n_samples: Sequence[int], scales: Sequence[float] = ()) -> float:
    """As the coordinator takes it: a quotient of means, over 30 rounds."""
    found: list[Noise] = []
    for round_ in range(1, 31):
        shares = payload_shares(strategy.compressor, n_samples, round_, scales)  # type: ignore[attr-defined]
        strategy.apply(shares, turn(round_), None)
        noise = strategy.noise(shares, turn(round_))
        assert noise is not None
        assert noise.n_samples == sum(n_samples) / len(n_samples)
        found.append(noise)
    return sum(x.noise for x in found) / sum(x.signal for x in found)


@pytest.mark.parametrize("n_samples", [[16] * 4, [8, 16, 64], [300, 300]])
@pytest.mark.parametrize("strategy", [Decoupled, Diloco])
def test_the_noise_scale_is_that_of_the_gradients(strategy: type[Strategy], n_samples: list[int]) -> None:
    options = {"lr": 0.1} if strategy is Decoupled else {"inner_steps": 2}
    made = strategy(named(), compressor=Dense(bits=8), **options)  # type: ignore[arg-type, call-arg]
    assert scale_of(made, n_samples) == pytest.approx(TRUE_SCALE, rel=0.1)


def test_a_peer_whose_payloads_are_too_large_does_not_decide() -> None:
    """The bound takes it back to twice the median: its noise is counted twice as long, and not a thousand
    times."""
    strategy = Decoupled(named(), compressor=Dense(bits=16), bound=2.0)
    found = scale_of(strategy, [16] * 8, [1.0] * 7 + [1000.0])
    assert TRUE_SCALE * 0.8 < found < TRUE_SCALE * 2


def test_selected_coefficients_hide_what_peers_share() -> None:
    strategy = Decoupled(named(), compressor=TopK(k=64, group_size=1024, bits=8))
    assert scale_of(strategy, [16] * 4) > 1.2 * TRUE_SCALE


def test_where_there_is_nothing_to_tell() -> None:
    compressor = Dense(bits=8)
    decoupled = Decoupled(named(), compressor=compressor)
    assert decoupled.noise(payload_shares(compressor, [16], 1), turn(1)) is None
    assert decoupled.noise([], turn(1)) is None
    silent = payload_shares(compressor, [16, 16], 1, [0.0, 1.0])
    assert decoupled.noise(silent, turn(1)) is None, "one of them has sent nothing"
    shares = payload_shares(compressor, [16, 16], 1)
    controlled = Diloco(named(), compressor=compressor, inner_steps=2, control="scaffold")
    assert controlled.noise(shares, turn(1)) is None, "of differences from control variates"
    assert Spsa(named(), lr=1e-3).noise(shares, turn(1)) is None, "peers look into directions of their own"


def test_of_many_payloads_some_are_looked_at() -> None:
    compressor = Dense(bits=8)
    found = Decoupled(named(), compressor=compressor).noise(payload_shares(compressor, [16] * 40, 1), turn(1))
    assert found is not None
    assert found.noise / found.signal == pytest.approx(TRUE_SCALE, rel=0.3)
