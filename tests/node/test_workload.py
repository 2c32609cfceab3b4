"""What a node chooses to do in a round, by what it has measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.node.workload import LEAST_SHARE, MARGIN, UPLOAD_PART, Workload
from thinwire.optim.base import Allotment


def settled(work: Workload, batch_s: float, full_bytes: float = 0, speed: float | None = None) -> Allotment:
    """After some rounds on a machine of that speed, at the end of such a line."""
    for _ in range(12):
        allotted = work.allotment()
        assert allotted.n_batches is not None
        work.began(0.0)
        work.worked(allotted.n_batches, batch_s * allotted.n_batches)
        work.sent(int(full_bytes * allotted.share), allotted.share, speed)
    return work.allotment()


def test_the_first_round_measures_with_one_batch() -> None:
    assert Workload(10.0, 100).allotment() == Allotment(1, 1.0)


@pytest.mark.parametrize(
    ("batch_s", "n"), [(0.1, 90), (0.5, 18), (1.0, 9), (5.0, 1), (60.0, 1), (0.001, 100)]
)
def test_as_many_batches_as_fit_at_most_all_and_one_at_least(batch_s: float, n: int) -> None:
    assert settled(Workload(10.0, 100), batch_s) == Allotment(n, 1.0)


def test_what_comes_before_own_work_is_taken_off() -> None:
    work = Workload(10.0, 100)
    for _ in range(5):
        work.began(4.0)
        work.worked(2, 2.0)
    assert work.allotment().n_batches == 5


def test_a_machine_that_becomes_slower_does_less_and_one_hiccup_is_none() -> None:
    work = Workload(10.0, 100)
    assert settled(work, 0.5).n_batches == 18
    work.worked(18, 90.0)
    assert work.allotment().n_batches == 18
    for _ in range(3):
        work.worked(18, 18.0)
    assert work.allotment().n_batches == 9


def test_a_quick_line_sends_all_and_its_time_is_taken_off() -> None:
    assert settled(Workload(10.0, 100), 0.5, full_bytes=1000, speed=1000.0) == Allotment(16, 1.0)


def test_a_thin_line_sends_less() -> None:
    allotted = settled(Workload(10.0, 100), 0.5, full_bytes=20_000, speed=1000.0)
    assert allotted.share == pytest.approx(MARGIN * 10.0 * UPLOAD_PART / 20.0, rel=0.01)
    assert allotted.n_batches in (8, 9)
    hopeless = settled(Workload(10.0, 100), 0.5, full_bytes=10**7, speed=1000.0)
    assert hopeless == Allotment(1, LEAST_SHARE)


def test_what_cannot_be_sent_in_parts_leaves_less_time_for_work() -> None:
    work = Workload(10.0, 100)
    for _ in range(12):
        allotted = work.allotment()
        work.worked(allotted.n_batches or 0, 0.5 * (allotted.n_batches or 0))
        work.sent(7000, allotted.share, 1000.0)
    assert work.allotment().n_batches == 4


@given(
    st.floats(0.01, 1e4),
    st.integers(1, 1000),
    st.lists(
        st.tuples(st.integers(0, 50), st.floats(0, 1e4), st.floats(0, 1e4), st.integers(0, 10**9)),
        max_size=30,
    ),
    st.one_of(st.none(), st.floats(1e-3, 1e9)),
)
def test_whatever_is_measured_the_decision_can_be_carried_out(
    round_s: float, most: int, measured: list[tuple[int, float, float, int]], speed: float | None
) -> None:
    work = Workload(round_s, most)
    for n_batches, seconds, before_s, n_bytes in measured:
        allotted = work.allotment()
        assert allotted.n_batches is not None
        assert 1 <= allotted.n_batches <= most
        assert LEAST_SHARE <= allotted.share <= 1
        work.began(before_s)
        work.worked(n_batches, seconds)
        work.sent(n_bytes, allotted.share, speed)
