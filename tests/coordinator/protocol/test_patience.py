"""How long to wait: the longest time until measured, then what was seen, within bounds."""

from __future__ import annotations

import pytest

from thinwire.coordinator.protocol.patience import KEPT_TIMES, MEASURED_TIMES, Patience


def measured(*times_s: float, floor_s: float = 0.25, ceiling_s: float = 2.0) -> Patience:
    patience = Patience(floor_s=floor_s, ceiling_s=ceiling_s)
    for time_s in times_s:
        patience.took(time_s)
    return patience


def test_the_ceiling_until_measured() -> None:
    assert measured(*[0.1] * (MEASURED_TIMES - 1)).limit_s == 2.0
    assert measured(*[0.1] * MEASURED_TIMES).limit_s == 0.25


@pytest.mark.parametrize(
    ("times_s", "limit_s"),
    [
        ((0.4, 0.5, 0.6), 0.5 + 4 * 0.1),
        ((0.5, 0.5, 0.5), 0.5 + 0.5 * 0.5),
        ((0.01, 0.01, 0.02), 0.25),
        ((1.0, 1.5, 3.0), 2.0),
    ],
)
def test_median_and_deviation_between_floor_and_ceiling(times_s: tuple[float, ...], limit_s: float) -> None:
    assert measured(*times_s).limit_s == pytest.approx(limit_s)


def test_one_outlier_changes_little() -> None:
    assert measured(*[0.4] * 8, 60.0).limit_s == pytest.approx(0.6)


def test_old_times_are_forgotten() -> None:
    assert measured(*[1.0] * 50, *[0.1] * KEPT_TIMES).limit_s == 0.25


def test_a_wait_that_ran_out_doubles_the_next_until_something_comes() -> None:
    patience = measured(*[0.2] * 5)
    assert patience.limit_s == pytest.approx(0.3)
    patience.ran_out()
    assert patience.limit_s == pytest.approx(0.6)
    for _ in range(100):
        patience.ran_out()
    assert patience.limit_s == 2.0
    patience.took(0.2)
    assert patience.limit_s == pytest.approx(0.3)
