"""Seats of a committee under generated schedules, and bugs that are planted to see that they are found."""

from __future__ import annotations

import pytest

from tests.coordinator.quorum.bugs import BUGS
from tests.coordinator.quorum.schedules import faults

N = 300
"""`make simulate` runs many more."""


@pytest.mark.parametrize("first", range(0, N, 50))
def test_nothing_is_sealed_twice_and_rounds_go_on(first: int) -> None:
    found, happened = faults(range(first, first + 50))
    assert found == {}
    assert min(happened[what] for what in ("elections", "crashes", "changes", "restored", "disks failed")) > 0


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    found = next((fault for seed in range(N) for fault in faults([seed], bug)[0].values()), None)
    assert found is not None
    assert ("no progress" in found) == (bug == "forgets_resting")
