"""What the methods are published for, on the demo's char-LM: which variant learns better, and that a byte or
a bit is enough. Short runs; `python -m tests.learning` makes long ones and prints the losses."""

from __future__ import annotations

import pytest

from tests.learning.experiments import (
    DECOUPLED_CLAIMS,
    ONE_BIT,
    SMALL,
    FineTuning,
    broken,
    decoupled_losses,
    one_byte,
    share_of_the_fall,
)

# Runs of half a minute each; in a test of its own each would repeat what it is compared with.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]


def test_decoupled_momentum_needs_its_parts() -> None:
    losses = decoupled_losses(seed=1, n_rounds=60)
    assert broken(losses, DECOUPLED_CLAIMS) == []
    assert losses["k 32, 1 bit"] < 1.05 * losses["k 32"]


def test_one_byte_per_probe_fine_tunes_as_float_scalars_do() -> None:
    """90% of their fall in loss, the mean of two seeds; 8 peers."""
    runs, falls = one_byte(lr=1e-2), []
    for seed in (1, 2):
        losses = FineTuning(SMALL, seed, n_rounds=60).losses(runs, n_peers=8, n_rounds=15)
        assert losses["byte"] != losses["float"]
        falls.append({name: losses["before"] - losses[name] for name in runs})
    assert min(fall["float"] for fall in falls) > 0.1
    assert share_of_the_fall(falls) > 0.9


def test_one_bit_fine_tunes_as_eight_bits_do() -> None:
    losses = FineTuning(SMALL, 1, n_rounds=60).losses(ONE_BIT, n_peers=4, n_rounds=30)
    assert losses["8 bits"] < losses["before"] - 0.3
    assert losses["1 bit"] < 1.05 * losses["8 bits"]
