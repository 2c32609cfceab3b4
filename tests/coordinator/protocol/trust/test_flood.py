"""When strangers come in numbers and do no work."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from thinwire.coordinator.protocol.trust.flood import LAST, ROUNDS, Flood


def test_it_begins_with_so_many_failures_and_ends_with_fewer() -> None:
    flood = Flood(3)
    for round_, found in enumerate([[True, False], [True], [], [True], *[[False]] * 5], 1):
        flood.committed(round_, found)
    on = [flood.is_on(round_) for round_ in range(1, 11)]
    assert on == [False] * 4 + [True] * 5 + [False], "of the last eight, two have failed again"


def test_what_was_found_long_ago_is_forgotten() -> None:
    flood = Flood(1)
    for round_ in range(1, 2 * ROUNDS):
        flood.committed(round_, [True] if round_ == 1 else [])
    assert [round_ for round_ in range(1, 2 * ROUNDS) if flood.is_on(round_)] == list(range(2, ROUNDS + 2))


@given(st.lists(st.lists(st.booleans(), max_size=3), max_size=ROUNDS), st.integers(1, LAST))
def test_it_is_what_the_last_audits_say(rounds: list[list[bool]], failures: int) -> None:
    flood, found = Flood(failures), list[bool]()
    for round_, audits in enumerate(rounds, 1):
        flood.committed(round_, audits)
        found += audits
        assert flood.is_on(round_ + 1) == (sum(found[-LAST:]) >= failures)
