"""What people are shown of a committee by one of its seats."""

from __future__ import annotations

from thinwire.coordinator.quorum.observed import Observed

A, B, C = "12D3KooWa", "12D3KooWb", "12D3KooWc"


def test_elections_and_the_time_without_a_leader() -> None:
    seen = Observed(A, 100.0)
    assert seen.figures(103.0)["leaderless_s"] == 3
    seen.led(B, 4, 105.0, 5_000)
    seen.led(B, 4, 109.0, 9_000)
    figures = seen.figures(110.0)
    assert (figures["leader"], figures["since_ms"], figures["elections"]) == (B, 5_000, 1)
    assert figures["leaderless_s"] == 5
    seen.led(None, 4, 111.0, 11_000)
    assert seen.figures(113.0)["leaderless_s"] == 7
    seen.led(C, 4, 114.0, 14_000)  # known by its words before its ballot is
    seen.led(C, 9, 114.5, 14_500)
    figures = seen.figures(120.0)
    assert (figures["leader"], figures["since_ms"], figures["elections"]) == (C, 14_000, 2)
    assert figures["leaderless_s"] == 8
    seen.led(C, 12, 121.0, 21_000)  # the same seat, elected again
    assert seen.figures(121.0)["elections"] == 3


def test_what_is_known_of_each_seat() -> None:
    seen = Observed(A, 0.0)
    seen.led(A, 1, 0.0, 0)
    seen.heard(B, 7)
    seen.heard(B, 6)  # an older word
    b, c = seen.seats((A, B, C), {B}, {B}, 9, "leads")[1:]
    assert (b["role"], b["head"], b["lag"], b["reachable"]) == ("rests", 7, 2, True)
    assert (c["role"], c["head"], c["lag"], c["reachable"]) == ("not reachable", None, None, False)
    (mine,) = seen.seats((A,), (), (), 9, "leads")
    assert (mine["role"], mine["lag"]) == ("leads", 0)


def test_a_clock_that_jumps_does_not_spoil_how_long_seals_take() -> None:
    seen = Observed(A, 0.0)
    for took_s in (0.02, -5.0, 1e12):
        seen.sealed(took_s)
    figures = seen.figures(0.0)
    assert sum(figures["seals"]) == 3
    assert figures["seals_s"] == 3600.02
