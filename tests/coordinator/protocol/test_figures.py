"""How figures are told to people."""

from __future__ import annotations

from thinwire.coordinator.protocol.figures import FIRST_ROUNDS, RoundLines, counted, human_seconds


def test_one_of_a_kind_is_no_plural() -> None:
    told = [counted(n, "offer") for n in (0, 1, 2, 1200)]
    assert told == ["0 offers", "1 offer", "2 offers", "1,200 offers"]


def test_times_are_told_as_finely_as_they_matter() -> None:
    told = [human_seconds(s) for s in (0.04, 3.21, 12.6, 75.3, 3599.6, 7320.0)]
    assert told == ["0.0 s", "3.2 s", "13 s", "1 min 15 s", "1 h 0 min", "2 h 2 min"]


def test_quick_rounds_share_a_line_slow_ones_have_their_own() -> None:
    lines = RoundLines()
    assert [lines.due(0.1 * i) for i in range(FIRST_ROUNDS)] == [0] * FIRST_ROUNDS
    told = [lines.due(2.0 + i) for i in range(1, 25)]
    assert [n for n in told if n is not None] == [9, 9]
    assert lines.due(60.0) == 4
    assert [lines.due(80.0 + 20 * i) for i in range(3)] == [0, 0, 0]
    assert lines.due(121.0) is None
    assert lines.due(122.0, is_last=True) == 1
