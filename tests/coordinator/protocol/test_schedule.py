"""The learning-rate factor of each round."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, getcontext, localcontext
from fractions import Fraction
from itertools import pairwise
from math import cos, pi

import numpy as np
import pytest

from thinwire.coordinator.protocol.messages import OfferEntry
from thinwire.coordinator.protocol.schedule import (
    _BITS,
    _PI,
    Samples,
    cos_pi,
    float32_bits,
    float32_of_bits,
    lr_factor,
)
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


def test_power_falls_with_the_root_whatever_the_length_of_the_run() -> None:
    power = section("power", 4, 0.1)
    factors = [lr_factor(power, r, 10) for r in (1, 4, 16, 64, 400)]
    assert factors == [0.25, 1.0, 0.5, 0.25, 0.1]
    assert [lr_factor(power, r, 10**6) for r in (1, 4, 16, 64, 400)] == factors
    assert lr_factor(section("power", 0, 0.1), 9, 10) == pytest.approx(1 / 3)
    assert float32_bits(lr_factor(power, 7, 10)) == 0x3F41848F == float32_bits((4 / 7) ** 0.5)


def test_samples_scale_every_schedule_by_the_root_of_their_share() -> None:
    def of(name: str) -> ScheduleSection:
        fields = {"name": name, "warmup_rounds": 4, "final_factor": 0.1, "batch_samples": 64}
        return ScheduleSection.model_validate(fields)

    assert Samples().share(64) == 1, "nothing is known before the first round"
    half = Samples((16, 32, 48))
    for name in ("batch", "constant", "linear", "cosine", "power"):
        plain = section("constant" if name == "batch" else name, 4, 0.1)
        for r in (1, 4, 9):
            assert lr_factor(of(name), r, 10, half) == lr_factor(plain, r, 10) * 0.5**0.5
            assert lr_factor(of(name), r, 10, Samples((1000,))) == lr_factor(plain, r, 10), "no more than lr"
            assert lr_factor(plain, r, 10, half) == lr_factor(plain, r, 10)
    with pytest.raises(ValueError, match="needs batch_samples"):
        section("batch", 0, 0.1)


def test_rounds_without_samples_and_old_ones_are_left_out() -> None:
    samples = Samples()
    for n in (5, 0, *range(1, 9)):
        samples = samples.after((entry(n), entry(0)))
    assert samples.recent == tuple(range(1, 9))
    assert samples.after(()) is samples


def entry(n_samples: int) -> OfferEntry:
    return OfferEntry(peer=0, n_samples=n_samples, n_tokens=0, loss=None, n_bytes=0, payload=b"", digest=None)


def test_a_warm_up_as_long_as_the_run_never_falls() -> None:
    assert [lr_factor(section("linear", 3, 0.1), r, 3) for r in range(1, 4)] == [1 / 3, 2 / 3, 1.0]


def test_rounds_past_the_end_keep_the_final_factor() -> None:
    linear = section("linear", 0, 0.1)
    assert lr_factor(linear, 11, 10) == lr_factor(linear, 10, 10)


@pytest.mark.parametrize("x", [0.0, 1.0, 0.1, 1 / 3, 1e-8, 0.99999999])
def test_bits_are_those_of_the_nearest_float32(x: float) -> None:
    assert float32_bits(x) == int(np.float32(x).view(np.uint32))
    assert float32_of_bits(float32_bits(x)) == float(np.float32(x))


def test_factors_are_rounded_once() -> None:
    linear = section("linear", 10, 0.1)
    for round_ in range(1, 101):
        expected = np.float32(lr_factor(linear, round_, 100))
        assert float32_bits(lr_factor(linear, round_, 100)) == int(expected.view(np.uint32))


def test_cosine_is_half_a_wave_between_warm_up_and_end() -> None:
    cosine = section("cosine", 4, 0.1)
    factors = [lr_factor(cosine, r, 24) for r in range(1, 27)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[13] == 0.1 + 0.9 / 2, "in the middle, exactly"
    assert factors[23:] == [0.1, 0.1, 0.1]
    assert all(a > b for a, b in pairwise(factors[3:24]))
    for r in range(4, 25):
        assert factors[r - 1] == pytest.approx(0.1 + 0.45 * (1 + cos(pi * (r - 4) / 20)), rel=1e-14)
    assert lr_factor(section("cosine", 0, 0.0), 7, 7) == 0.0, "nothing is left of the last step"
    assert lr_factor(section("cosine", 0, 1.0), 3, 7) == 1.0
    assert lr_factor(section("cosine", 3, 0.5), 3, 3) == 1.0


def test_the_cosine_is_right_to_a_hundred_bits() -> None:
    """Against a series in decimals of 60 digits; and the constant."""
    with localcontext() as context:
        context.prec = 60
        pi_60 = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
        assert abs(Decimal(_PI) / 2**_BITS - pi_60) < Decimal(2) ** -_BITS
        for numerator, denominator in (
            (0, 1),
            (1, 7),
            (1, 3),
            (1, 2),
            (2, 3),
            (999, 1000),
            (1, 2**31),
            (1, 1),
        ):
            x = pi_60 * numerator / denominator
            term = total = Decimal(1)
            for n in range(2, 120, 2):
                term *= -x * x / (n * (n - 1))
                total += term
            found = cos_pi(Fraction(numerator, denominator))
            error = Decimal(found.numerator) / Decimal(found.denominator) - total
            assert abs(error) <= Decimal(2) ** -101 + Decimal(10) ** -55
    assert cos_pi(Fraction(1, 3)) == Fraction(1, 2)
    assert getcontext().prec < 60


def test_the_cosine_of_records_stays(golden: Callable[[dict[str, str]], None]) -> None:
    """Bits that records of the ledger carry: of whole runs, short and long, with and without warm-up."""
    runs = [(0, 0.0, 9), (3, 0.1, 17), (10, 0.05, 200), (1000, 0.1, 100_000), (0, 0.1, 2**31)]
    found = {}
    for warmup, final, rounds in runs:
        cosine = section("cosine", warmup, final)
        chosen = sorted({1 + (rounds - 1) * i // 40 for i in range(41)})
        bits = b"".join(float32_bits(lr_factor(cosine, r, rounds)).to_bytes(4, "little") for r in chosen)
        found[f"cosine, warm-up {warmup}, to {final}, {rounds} rounds"] = bits.hex()
    golden(found)
