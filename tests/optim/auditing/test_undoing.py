"""An offer from other data may differ from what the text asks for; it may not undo it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from thinwire.optim.auditing.evidence import Evidence
from thinwire.optim.auditing.undoing import undoing


def evidence(where_sent: float) -> Evidence:
    return Evidence(0.0, 0.02, 0.06, where_sent)


OTHERS = [evidence(x) for x in (-0.9, 0.4, 0.9)]


@pytest.mark.parametrize(
    ("theirs", "has_failed"),
    [(0.4, False), (0.05, False), (0.03, None), (0.0, None), (-0.19, None), (-0.2, True), (-0.4, True)],
)
def test_how_far_it_leads_away_decides(theirs: float, has_failed: bool | None) -> None:
    found = undoing(evidence(theirs), OTHERS, is_suspect=False)
    assert (found.theirs, found.usual, found.has_failed) == (theirs, 0.4, has_failed)


def test_where_others_get_nowhere_nothing_can_be_said() -> None:
    for theirs in (-0.5, 0.0, 0.5):
        assert undoing(evidence(theirs), [evidence(0.2)], is_suspect=True).has_failed is None


def test_what_may_be_chance_takes_a_suspect_to_fail() -> None:
    theirs = replace(evidence(-0.31), by_chance=0.5)
    assert undoing(theirs, OTHERS, is_suspect=False).has_failed is None
    assert undoing(theirs, OTHERS, is_suspect=True).has_failed is True
    assert undoing(replace(theirs, where_sent=-0.29), OTHERS, is_suspect=True).has_failed is None
    assert undoing(replace(theirs, where_sent=-0.5), OTHERS, is_suspect=False).has_failed is True
