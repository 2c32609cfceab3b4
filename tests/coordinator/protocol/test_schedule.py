"""The learning-rate factor of each round."""

from __future__ import annotations

import numpy as np
import pytest

from thinwire.coordinator.protocol.schedule import float32_bits, float32_of_bits, lr_factor, lr_factor_bits
from thinwire.coordinator.protocol.settings import ScheduleSection


def section(name: str, warmup_rounds: int, final_factor: float) -> ScheduleSection:
    return ScheduleSection.model_validate(
        {"name": name, "warmup_rounds": warmup_rounds, "final_factor": final_factor}
    )


def test_linear_ramps_up_then_falls_to_the_final_factor() -> None:
    linear = section("linear", 4, 0.1)
    factors = [lr_factor(linear, r, 10) for r in range(1, 11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[-1] == pytest.approx(0.1)
    steps = np.diff(factors[3:])
    assert np.allclose(steps, steps[0])
    assert steps[0] < 0


def test_linear_without_warm_up() -> None:
    assert [lr_factor(section("linear", 0, 0.0), r, 4) for r in range(1, 5)] == [0.75, 0.5, 0.25, 0.0]


def test_constant_stays_at_one() -> None:
    assert [lr_factor(section("constant", 2, 0.1), r, 5) for r in range(1, 6)] == [0.5, 1, 1, 1, 1]


def test_a_warm_up_as_long_as_the_run_never_falls() -> None:
    assert [lr_factor(section("linear", 3, 0.1), r, 3) for r in range(1, 4)] == [1 / 3, 2 / 3, 1.0]


def test_rounds_past_the_end_keep_the_final_factor() -> None:
    linear = section("linear", 0, 0.1)
    assert lr_factor(linear, 11, 10) == lr_factor(linear, 10, 10)


@pytest.mark.parametrize("x", [0.0, 1.0, 0.1, 1 / 3, 1e-8, 0.99999999])
def test_bits_are_those_of_the_nearest_float32(x: float) -> None:
    assert float32_bits(x) == int(np.float32(x).view(np.uint32))
    assert float32_of_bits(float32_bits(x)) == float(np.float32(x))


def test_lr_factor_bits_round_once() -> None:
    linear = section("linear", 10, 0.1)
    for round_ in range(1, 101):
        expected = np.float32(lr_factor(linear, round_, 100))
        assert lr_factor_bits(linear, round_, 100) == int(expected.view(np.uint32))
