"""Seats of a committee under generated schedules, and bugs that are planted to see that they are found."""

from __future__ import annotations

import pytest

from tests.coordinator.quorum.world import first_fault

SHOWN = {"no_recovery": 58, "old_copy": 14}
"""A hostile world in which the planted bug shows. The other bugs of the world are rarer than one in some
hundred of its schedules: `python -m tests.coordinator.quorum.world N --bug NAME` looks for them."""


@pytest.mark.parametrize("first", range(0, 60, 30))
def test_nothing_is_sealed_twice_and_rounds_go_on(first: int) -> None:
    assert first_fault(range(first, first + 30), is_hostile=False) is None


@pytest.mark.parametrize("first", range(1000, 1060, 30))
def test_neither_in_a_hostile_world(first: int) -> None:
    assert first_fault(range(first, first + 30), is_hostile=True) is None


@pytest.mark.parametrize("bug", SHOWN)
def test_a_planted_bug_is_found(bug: str) -> None:
    found = first_fault(range(SHOWN[bug], SHOWN[bug] + 1), is_hostile=True, bug=bug)
    assert found is not None
    assert "were sealed" in str(found[1])
