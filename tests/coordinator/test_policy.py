"""When a round closes although somebody is still awaited."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.coordinator.policy import KEPT_ROUNDS, OfferTimes, deadline_s, limit, patience_s


def times_of(*rounds: list[float]) -> OfferTimes:
    """Peer i has the i-th time of each round."""
    times = OfferTimes()
    for round_, values in enumerate(rounds, start=1):
        for peer, value in enumerate(values):
            times.record(round_, peer, value)
    return times


def enough(times: OfferTimes, n_peers: int, round_: int = 100) -> int | None:
    return limit("fastest", times, round_, range(n_peers)).enough


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
    times.record(3, 0, 1.0)
    assert limit("deadline", times, 3).after_s == 60, "the open round is not measured yet"
    due = limit("deadline", times, 4)
    assert due.after_s == pytest.approx(1.5)
    assert not due.drops


def test_a_pace_of_its_own_has_no_use_for_what_was_measured() -> None:
    due = limit("async", times_of([7.0], [7.0], [7.0]), 5, every_s=2.5)
    assert (due.after_s, due.drops, due.enough) == (2.5, False, None)


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


def test_times_stay_in_order_whatever_becomes_of_an_offer() -> None:
    times = OfferTimes()
    for round_ in range(KEPT_ROUNDS + 3):
        times.record(round_, 0, 7.0 - round_ % 5)
        times.only_offered(round_, 1, 5.0)
        times.is_missing(round_, 2, 9.0)
        if round_ % 2:
            times.record(round_, 1, 6.5)
            times.record(round_, 2, 9.5)
        assert times.in_order == sorted(times.values(before=1000))


@pytest.mark.parametrize(
    ("times", "k"),
    [
        ([1.0] * 6 + [2.0, 4.0], 6),
        ([1.0] * 8, 8),
        ([1.0] * 7 + [1.05], 8),  # a 14% larger batch for 5% more time
        ([1.0] * 7 + [1.08], 7),
        ([1.0, 10.0], 1),
        ([1.0, 1.2], 2),
        ([5.0], 1),
    ],
)
def test_as_many_as_are_worth_most_per_second_are_enough(times: list[float], k: int) -> None:
    measured = times_of(*[times] * 4)
    assert enough(measured, len(times)) == k
    slower = times_of(*[[t * 60 for t in times]] * 4)
    assert enough(slower, len(times)) == k, "whatever the unit of time"


def test_equal_peers_with_their_ups_and_downs_are_judged_by_order_statistics() -> None:
    """Every peer is slow now and then: the medians of all are equal, and yet one is not worth waiting for."""
    rounds = [[5.0 if (round_ + peer) % 4 == 0 else 1.0 for peer in range(4)] for round_ in range(8)]
    assert enough(times_of(*rounds), 4) == 3


def test_samples_count_not_offers() -> None:
    """The slow peer brings most of the samples: it is waited for."""
    times = OfferTimes()
    for round_ in range(1, 5):
        for peer, (time_s, n_samples) in enumerate([(1.0, 8), (1.0, 8), (1.6, 64)]):
            times.record(round_, peer, time_s, n_samples)
    assert enough(times, 3) == 3
    assert enough(times_of(*[[1.0, 1.0, 1.6]] * 4), 3) == 2


def test_nobody_waits_for_a_peer_of_which_nothing_has_come() -> None:
    times = times_of(*[[1.0, 1.0]] * 4)
    assert enough(times, 3) == 2
    assert limit("fastest", times, 100, [2]) == limit("all", times, 100), "nothing to go by: patience"


def test_a_peer_that_was_missing_is_slower_than_the_round_was_long() -> None:
    times = times_of(*[[1.0, 1.0, 1.0]] * 4)
    assert enough(times, 3) == 3
    for round_ in range(5, 9):
        times.record(round_, 0, 1.0)
        times.record(round_, 1, 1.0)
        times.is_missing(round_, 2, 2.5)
    assert enough(times, 3) == 2
    times.record(8, 2, 1.0)
    assert times.values(before=9).count(1.0) == 12 + 9, "its offer of round 8 came after all"


def test_waiting_for_the_last_of_them_has_an_end() -> None:
    """As the deadline does: some spread after the usual time of the last offer that is enough."""
    due = limit("fastest", times_of(*[[1.0, 1.0, 1.2]] * 4), 5, range(3))
    assert due.enough == 3
    assert due.after_s == pytest.approx(1.8)
    assert not due.drops


def test_the_fastest_wait_for_all_until_three_rounds_are_measured() -> None:
    times = times_of([1.0, 9.0], [1.0, 9.0])
    assert limit("fastest", times, 3, range(2)) == limit("all", times, 3)
    assert limit("fastest", times_of(*[[1.0, 9.0]] * 3), 4, range(2)).enough == 1


@given(
    st.lists(st.lists(st.floats(0.001, 1e4), min_size=1, max_size=6), min_size=3, max_size=20),
    st.sets(st.integers(0, 7), min_size=1),
)
def test_what_is_enough_can_always_be_had(rounds: list[list[float]], expected: set[int]) -> None:
    due = limit("fastest", times_of(*rounds), len(rounds) + 1, expected)
    assert due.enough is None or 1 <= due.enough <= len(expected)
    assert due.after_s > 0
