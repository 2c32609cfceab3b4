"""How long the rest of a run takes."""

from __future__ import annotations

from thinwire.node.tracking.pace import RECENT_ROUNDS, Pace


def test_by_the_last_rounds() -> None:
    pace = Pace()
    pace.ended(1, 100.0)
    assert pace.left_s(11) is None
    pace.ended(2, 102.0)
    assert pace.left_s(12) == 20.0
    for round_ in range(3, 3 + RECENT_ROUNDS):
        pace.ended(round_, 102.0 + 0.5 * round_)
    assert pace.left_s(2 + RECENT_ROUNDS + 10) == 5.0
    pace.ended(3 + RECENT_ROUNDS, 1e4)
    assert pace.left_s(3 + RECENT_ROUNDS + 10) == 5.0, "one round took hours"
    assert pace.left_s(3 + RECENT_ROUNDS) == 0.0
