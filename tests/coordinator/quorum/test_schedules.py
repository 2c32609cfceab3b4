"""Seats of a committee under generated schedules, and bugs that are planted to see that they are found."""

from __future__ import annotations

import pytest

from .world import BUGS, first_fault

MILD, HOSTILE = range(150), range(1000, 1150)

FOUND: dict[str, tuple[range, bool]] = {}
"""Seeds among which the planted bug shows, and whether their worlds are hostile."""


@pytest.mark.parametrize("first", range(0, 150, 50))
def test_nothing_is_sealed_twice_and_rounds_go_on(first: int) -> None:
    assert first_fault(range(first, first + 50), is_hostile=False) is None


@pytest.mark.parametrize("first", range(1000, 1150, 50))
def test_neither_in_a_hostile_world(first: int) -> None:
    assert first_fault(range(first, first + 50), is_hostile=True) is None


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    seeds, is_hostile = FOUND[bug]
    found = first_fault(seeds, is_hostile=is_hostile, bug=bug)
    assert found is not None
    assert "were sealed" in str(found[1])
