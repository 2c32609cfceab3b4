"""When a round closes although somebody is still awaited."""

from __future__ import annotations

import pytest

from thinwire.coordinator.policy import KEPT_ROUNDS, OfferTimes, deadline_s, limit, patience_s


def times_of(*rounds: list[float]) -> OfferTimes:
    times = OfferTimes()
    for round_, values in enumerate(rounds, start=1):
        for value in values:
            times.record(round_, value)
    return times


@pytest.mark.parametrize(
    ("times", "expected_s"),
    [
        ([0.1, 0.1, 0.1], 0.1 + 0.5),  # never less than half a second more
        ([10.0, 10.0, 10.0], 10.0 + 5.0),  # half of the median
        ([8.0, 10.0, 10.0, 12.0, 14.0], 10.0 + 4 * 2.0),  # four median absolute deviations
    ],
)
def test_the_deadline_follows_the_spread(times: list[float], expected_s: float) -> None:
    assert deadline_s(times) == pytest.approx(expected_s)


def test_one_straggler_does_not_move_the_deadline() -> None:
    assert deadline_s([1.0] * 9 + [100.0]) == deadline_s([1.0] * 9)


def test_patience_is_ten_medians_but_at_least_a_minute() -> None:
    assert patience_s([]) == 60
    assert patience_s([1.0, 2.0, 3.0]) == 60
    assert patience_s([7.0, 8.0, 100.0]) == 80


def test_there_is_no_deadline_until_three_rounds_are_measured() -> None:
    times = times_of([1.0], [1.0])
    assert limit("deadline", times, 3).after_s == 60
    times.record(3, 1.0)
    assert limit("deadline", times, 3).after_s == 60, "the open round is not measured yet"
    due = limit("deadline", times, 4)
    assert due.after_s == pytest.approx(1.5)
    assert not due.drops


def test_all_gives_up_only_what_hangs() -> None:
    due = limit("all", times_of([7.0], [7.0], [7.0], [7.0]), 5)
    assert due.after_s == 70
    assert due.drops


def test_slow_first_rounds_are_not_cut_off_by_the_minute() -> None:
    assert limit("all", times_of([90.0]), 1).after_s == 900


def test_old_rounds_are_forgotten() -> None:
    times = times_of(*([[100.0]] * 5), *([[1.0]] * KEPT_ROUNDS))
    assert times.values(before=1000) == [1.0] * KEPT_ROUNDS
    assert times.n_rounds(before=1000) == KEPT_ROUNDS
